"""What this machine lets this process have: processors, memory, a GPU, and the number formats that they compute in.

Containers and services are limited by control groups (cgroups), which neither `os.cpu_count` nor /proc/meminfo know of.
Both versions are read, every group from the process's own up to the mounted root: the tightest limit counts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

from jitexport.kernels import native
from jitexport.kernels.linear import KINDS, quantize

ROOT = Path("/")

# --- processors and memory -------------------------------------------------------------------------------------------


def affinity() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpus(root: Path = ROOT) -> int:
    """Processors that this process may use: of its affinity, or its cgroups' quota where that is less; at least 1.

    A quota is rounded: half a processor more is worth a thread, a tenth would keep all the others waiting for it.
    """
    return max(1, min([affinity(), *(int(quota + 0.5) for quota in _quotas(root))]))


def memory(root: Path = ROOT) -> int:
    """Bytes that new processes can have without swapping or meeting a cgroup's limit; 0 where nobody says."""
    lines = _lines(root / "proc/meminfo")
    available = next((int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:")), 0)
    return max(0, min([available, *_free_in_groups(root)]))


def default_threads() -> int:
    """Threads of a computation where nobody says how many: torch's own setting, but no more than `cpus`."""
    return min(torch.get_num_threads(), cpus())


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch computes on so many threads inside, and on as many as before afterwards, in the calling thread.

    Torch keeps the number for each thread that calls it, and gives a thread that calls it for the first time the number
    that was set last, anywhere. So other threads that use torch already keep theirs; one that begins inside takes this
    one's.
    """
    before = torch.get_num_threads()  # also makes torch hand its setting to OpenMP, in a new thread
    if count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _quotas(root: Path) -> Iterator[float]:
    """CPU quotas of all groups, in processors."""
    for folder in _groups(root, "cpu"):
        quota, period = "max", "100000"
        if words := _words(folder / "cpu.max"):  # version 2: "max 100000"
            quota, period = words[0], words[1] if len(words) > 1 else period
        elif words := _words(folder / "cpu.cfs_quota_us"):  # version 1: -1 is none
            quota, period = words[0], (_words(folder / "cpu.cfs_period_us") or [period])[0]
        if quota.isdecimal() and period.isdecimal() and int(period) > 0:
            yield int(quota) / int(period)


def _free_in_groups(root: Path) -> Iterator[int]:
    """Bytes left in every group that has a limit. File caches that the kernel would drop count as free."""
    for folder in _groups(root, "memory"):
        for limit, usage, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.high", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            most, used = _number(folder / limit), _number(folder / usage)
            if most is not None and used is not None:
                pairs = (line.split() for line in _lines(folder / "memory.stat"))
                droppable = next((int(p[1]) for p in pairs if len(p) == 2 and p[0] == cached), 0)
                yield most - max(0, used - droppable)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's groups for a controller, in both hierarchies, from its own up to what is mounted."""
    mounts = [line.split() for line in _lines(root / "proc/self/mountinfo")]
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        for mount in mounts:
            dash = mount.index("-")
            kind, options = mount[dash + 1], mount[-1].split(",")
            unified = kind == "cgroup2" and not controllers
            own = kind == "cgroup" and controller in controllers.split(",") and controller in options
            if not unified and not own:
                continue
            top, point = Path(mount[3]), root / mount[4].lstrip("/")
            # In a container the path may be one that is not seen from inside: then what is mounted is its own group.
            inside = Path(path).relative_to(top) if Path(path).is_relative_to(top) and ".." not in path else Path()
            yield from (point / Path(*inside.parts[:i]) for i in range(len(inside.parts), -1, -1))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _number(path: Path) -> int | None:
    words = _words(path)
    return int(words[0]) if words and words[0].isdecimal() else None


# --- what computes in what -------------------------------------------------------------------------------------------

#: CPU features, by torch's names, of which one is enough to multiply numbers of a kind.
_CPU_FEATURES = {
    "bf16": ("avx512_bf16", "amx_bf16", "bf16"),
    "int8": ("avx512_vnni", "avx_vnni", "amx_int8", "i8mm", "dot"),
    "fp8": (),
}
#: The least compute capability of GPUs that multiply numbers of a kind.
_GPU_CAPABILITY = {"bf16": (8, 0), "int8": (6, 1), "fp8": (8, 9)}

CPU = torch.device("cpu")


def gpu_problem() -> str | None:
    """Why torch cannot compute on a GPU of this machine; None where it can."""
    if not torch.cuda.is_available():
        return "no CUDA device is visible to torch"
    try:
        torch.zeros(1, device="cuda").add_(1).item()
    except RuntimeError as error:  # too old for this torch, out of memory, in use by another process alone
        return f"torch cannot use {torch.cuda.get_device_name()}: {str(error).splitlines()[0]}"
    return None


def computes(kind: str, device: torch.device, target: str | None = None) -> bool:
    """Whether a device's processor multiplies numbers of a kind (fp32, bf16, int8, fp8), rather than emulating it.

    Args:
        target: architecture of another machine's GPU, as "sm_89".
    """
    if kind == "fp32":
        return True
    if device.type == "cpu" and target is None:
        has = torch.cpu.get_capabilities()
        return any(has.get(name) for name in _CPU_FEATURES[kind])
    return _capability(device, target) >= _GPU_CAPABILITY[kind]


def processor(device: torch.device, target: str | None = None) -> str:
    """A device's processor in a few words: "the CPU (AVX2)", "the GPU (sm_89)"."""
    if device.type == "cpu" and target is None:
        return f"the CPU ({torch.backends.cpu.get_cpu_capability()})"
    return "the GPU (sm_{}{})".format(*_capability(device, target))


def cpu_class() -> str:
    """What makes figures of different CPUs comparable: "AVX2", "AVX512 with bf16, int8"."""
    kinds = ", ".join(kind for kind in _CPU_FEATURES if computes(kind, CPU))
    return torch.backends.cpu.get_cpu_capability() + (f" with {kinds}" if kinds else "")


def _capability(device: torch.device, target: str | None) -> tuple[int, int]:
    """(0, 0) where there is no such GPU."""
    if target is not None:
        digits = target.removeprefix("sm_")
        return (int(digits[:-1]), int(digits[-1])) if len(digits) > 1 and digits.isdecimal() else (0, 0)
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (0, 0)


@cache
def slowdown(kind: str, device: torch.device) -> float:
    """How many times as long as in fp32 a matrix product takes in another kind: measured, in tens of milliseconds."""
    return _seconds(_product(kind, device), device) / _seconds(_product("fp32", device), device)


def emulation(dtype: str, quantization: str | None, device: torch.device, *, kernels: bool = False) -> str | None:
    """What is slow because the device emulates it, and by how much; None where nothing is.

    What is no slower than fp32 although it is emulated is none of it. Measures only where it has to.

    Args:
        kernels: whether the engines may have our own kernels, which make int8 products of what the CPU has.
    """
    ours = kernels and device.type == "cpu" and native.missing() is None
    for kind in filter(None, (None if quantization == "int8" and ours else quantization, dtype)):
        if not computes(kind, device) and (times := slowdown(kind, device)) >= 1:
            return (
                f"{processor(device)} does not compute in {kind}, which is emulated: "
                f"a matrix product of PyTorch's takes {times:.3g} times as long as in fp32"
            )
    return None


def _product(kind: str, device: torch.device) -> Callable[[], object]:
    """A product of [256, 512] and [512, 512], as the engines' linear layers do it."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, 512, generator=generator).to(device) for rows in (256, 512))
    if kind == "fp32":
        return lambda: F.linear(x, w)
    if kind not in KINDS:
        x, w = x.bfloat16(), w.bfloat16()
        return lambda: F.linear(x, w)
    (x, its), (w, scale) = quantize(x, kind), quantize(w, kind)
    if kind == "int8":
        return lambda: torch._int_mm(x, w.t())
    return lambda: torch._scaled_mm(x, w.t(), scale_a=its, scale_b=scale.t(), out_dtype=torch.bfloat16)


@torch.inference_mode()
def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of the faster of two runs, after one that is not counted."""
    best = float("inf")
    for i in range(3):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start) if i else best
    return best
