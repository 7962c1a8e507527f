"""What a process may have, in made-up trees of cgroups and under real affinity; and what computes in what."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch

from jitexport import machine
from jitexport.kernels import native

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
GIB = 1024**3
NONE_V1 = 9223372036854771712

V2_MOUNT = "41 31 0:38 {top} /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw"
V1_MOUNTS = (
    "32 31 0:29 {top} /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:5 - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 {top} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
)
PLAIN_MOUNT = "23 1 254:0 / / rw,relatime - ext4 /dev/root rw"


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Writes files of a root by their paths; the process may use 64 processors by its affinity."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)

    def write(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{text}\n")
        return tmp_path

    write({"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {32 * 1024**2} kB"})
    return write


def v2(path, top="/"):
    return {"proc/self/cgroup": f"0::{path}", "proc/self/mountinfo": f"{PLAIN_MOUNT}\n{V2_MOUNT.format(top=top)}"}


def v1(path, top="/"):
    return {
        "proc/self/cgroup": f"5:cpu,cpuacct:{path}\n4:memory:{path}\n3:cpuset:/",
        "proc/self/mountinfo": f"{PLAIN_MOUNT}\n{V1_MOUNTS.format(top=top)}",
    }


# --- processors ---


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, 64),
        ({"a/b/cpu.max": "max 100000"}, 64),
        ({"a/b/cpu.max": "300000 100000"}, 3),
        ({"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 100000"}, 2),  # the limit is further up
        ({"a/b/cpu.max": "200000 100000", "a/cpu.max": "800000 100000"}, 2),
        ({"a/b/cpu.max": "800000 100000", "a/cpu.max": "100000 50000"}, 2),
        ({"a/c/cpu.max": "100000 100000"}, 64),  # of another group
        ({"a/b/cpu.max": "20000 100000"}, 1),
        ({"a/b/cpu.max": "150000 100000"}, 2),
        ({"a/b/cpu.max": "140000 100000"}, 1),
        ({"a/b/cpu.max": "99900000 100000"}, 64),
        ({"a/b/cpu.max": ""}, 64),
        ({"a/b/cpu.max": "junk"}, 64),
        ({"a/b/cpu.max": "100000 0"}, 64),
    ],
)
def test_quota_of_version_2(tree, limits, expected):
    root = tree(v2("/a/b") | {f"sys/fs/cgroup/{name}": text for name, text in limits.items()})
    assert machine.cpus(root) == expected


@pytest.mark.parametrize(
    ("quotas", "expected"),
    [({"a/b": -1}, 64), ({"a/b": 300000}, 3), ({"a/b": -1, "a": 200000}, 2), ({"a/b": 500000, "": 400000}, 4)],
)
def test_quota_of_version_1(tree, quotas, expected):
    files = {}
    for group, quota in quotas.items():
        folder = f"sys/fs/cgroup/cpu,cpuacct/{group}".rstrip("/")
        files |= {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": 100000}
    assert machine.cpus(tree(v1("/a/b") | files)) == expected


@pytest.mark.parametrize(
    ("path", "top"),
    [
        ("/docker/1", "/docker/1"),  # the container sees its own group only, under the host's name
        ("/", "/"),  # and under a name of its own
        ("/../other", "/"),  # a process that was moved in from outside
        ("/docker/1", "/docker/2"),
    ],
)
@pytest.mark.parametrize("version", [v1, v2])
def test_what_a_container_mounts_is_its_own_group(tree, version, path, top):
    root = tree(version(path, top) | {
        "sys/fs/cgroup/cpu.max": "200000 100000", "sys/fs/cgroup/memory.max": 3 * GIB,
        "sys/fs/cgroup/memory.current": GIB, "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": 200000,
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": 100000,
        "sys/fs/cgroup/memory/memory.limit_in_bytes": 3 * GIB, "sys/fs/cgroup/memory/memory.usage_in_bytes": GIB,
    })  # fmt: skip
    assert (machine.cpus(root), machine.memory(root)) == (2, 2 * GIB)


def test_both_versions_at_once(tree):
    """As systemd mounts them: controllers in version 1, an empty hierarchy of version 2 beside them."""
    files = v1("/a")
    files["proc/self/cgroup"] += "\n0::/user.slice"
    files["proc/self/mountinfo"] += "\n" + V2_MOUNT.format(top="/").replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
    root = tree(files | {
        "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": 500000, "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": 100000,
        "sys/fs/cgroup/unified/user.slice/cpu.max": "300000 100000",
    })  # fmt: skip
    assert machine.cpus(root) == 3


def test_without_cgroups_affinity_counts(tree, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3))
    assert machine.cpus(tree({})) == 3


def test_without_affinity_all_processors_count(tree, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert machine.cpus(tree({})) == 5


@pytest.mark.skipif(shutil.which("taskset") is None, reason="needs taskset")
def test_affinity_of_a_real_process():
    one = min(os.sched_getaffinity(0))
    code = (
        "import torch; from jitexport import machine\n"
        "torch.set_num_threads(7); print(machine.cpus(), machine.default_threads(), torch.get_num_threads())"
    )
    run = subprocess.run(
        ["taskset", "-c", str(one), sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["1", "1", "7"]


def test_this_machine():
    assert 1 <= machine.cpus() <= (os.cpu_count() or 1)
    assert 0 < machine.memory() < 2**50


# --- memory ---


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 32),
        ({"a/b/memory.max": "max", "a/b/memory.current": GIB}, 32),
        ({"a/b/memory.max": 8 * GIB, "a/b/memory.current": 3 * GIB}, 5),
        ({"a/b/memory.max": 8 * GIB, "a/b/memory.current": 3 * GIB,
          "a/b/memory.stat": f"anon {GIB}\ninactive_file {2 * GIB}"}, 7),
        ({"a/b/memory.max": "max", "a/b/memory.current": 3 * GIB, "a/memory.max": 8 * GIB,
          "a/memory.current": 4 * GIB}, 4),
        ({"a/b/memory.max": 8 * GIB, "a/b/memory.high": 4 * GIB, "a/b/memory.current": 3 * GIB}, 1),
        ({"a/b/memory.max": GIB, "a/b/memory.current": 2 * GIB}, 0),
        ({"a/b/memory.max": 64 * GIB, "a/b/memory.current": 0}, 32),
    ],
)  # fmt: skip
def test_memory_of_version_2(tree, files, expected):
    root = tree(v2("/a/b") | {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    assert machine.memory(root) == expected * GIB


def test_memory_of_version_1(tree):
    folder = "sys/fs/cgroup/memory/a/b"
    usage = {f"{folder}/memory.usage_in_bytes": 6 * GIB, f"{folder}/memory.stat": f"total_inactive_file {GIB}"}
    assert machine.memory(tree(v1("/a/b") | usage | {f"{folder}/memory.limit_in_bytes": NONE_V1})) == 32 * GIB
    assert machine.memory(tree({f"{folder}/memory.limit_in_bytes": 8 * GIB})) == 3 * GIB


def test_no_word_on_memory_is_none(tree):
    root = tree({})
    (root / "proc/meminfo").write_text("MemTotal: 1 kB\n")
    assert machine.memory(root) == 0


# --- threads ---


def test_default_threads_are_torchs_but_no_more_than_processors(monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        for processors, expected in ((8, 5), (2, 2)):
            monkeypatch.setattr(machine, "cpus", lambda n=processors: n)
            assert machine.default_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_threads_are_put_back_whatever_happens():
    before = torch.get_num_threads()
    with machine.threads(before + 3):
        assert torch.get_num_threads() == before + 3
        with machine.threads(before + 3):
            pass
        assert torch.get_num_threads() == before + 3
    with pytest.raises(ValueError, match="it"), machine.threads(before + 1):
        raise ValueError("it")
    assert torch.get_num_threads() == before


def test_threads_of_others_that_use_torch_are_left_alone():
    before, found = torch.get_num_threads(), []
    ready, look = threading.Event(), threading.Event()

    def other():
        torch.get_num_threads()
        ready.set()
        look.wait(60)
        found.append(torch.get_num_threads())

    thread = threading.Thread(target=other)
    thread.start()
    assert ready.wait(60)
    with machine.threads(before + 2):
        look.set()
        thread.join()
    assert found == [before]


# --- what computes in what ---


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ((), set()),
        (("avx2", "fma3"), set()),
        (("avx512_f", "avx512_bw"), set()),
        (("avx512_f", "avx512_vnni"), {"int8"}),
        (("avx2", "avx_vnni"), {"int8"}),
        (("avx512_vnni", "avx512_bf16"), {"int8", "bf16"}),
        (("amx_tile", "amx_bf16", "amx_int8"), {"int8", "bf16"}),
        (("neon", "bf16", "i8mm", "dot"), {"int8", "bf16"}),
    ],
)
def test_cpus(monkeypatch, features, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(features, True) | {"sse": True})
    assert {kind for kind in ("bf16", "int8", "fp8") if machine.computes(kind, CPU)} == expected
    assert machine.computes("fp32", CPU)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((6, 0), set()), ((7, 5), {"int8"}), ((8, 0), {"int8", "bf16"}), ((8, 9), {"int8", "bf16", "fp8"}),
     ((12, 0), {"int8", "bf16", "fp8"})],
)  # fmt: skip
def test_gpus_here_and_elsewhere(monkeypatch, capability, expected):
    target = "sm_{}{}".format(*capability)
    kinds = ("bf16", "int8", "fp8")
    assert {kind for kind in kinds if machine.computes(kind, CUDA, target)} == expected
    assert machine.processor(CUDA, target) == f"the GPU ({target})"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert {kind for kind in kinds if machine.computes(kind, CUDA)} == expected


def test_a_gpu_that_fails_is_not_usable(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in machine.gpu_problem()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old GPU")

    def zeros(*_, **__):
        raise RuntimeError("no kernel image is available\nmore")

    monkeypatch.setattr(torch, "zeros", zeros)
    assert machine.gpu_problem() == "torch cannot use Old GPU: no kernel image is available"


def test_nothing_is_measured_where_nothing_is_emulated(monkeypatch):
    monkeypatch.setattr(machine, "slowdown", lambda *_: pytest.fail("measured"))
    assert machine.emulation("fp32", None, CPU) is None
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "avx512_vnni": True})
    assert machine.emulation("bf16", "int8", CPU) is None


@pytest.mark.parametrize(("dtype", "quantization", "named"), [("bf16", None, "bf16"), ("fp32", "int8", "int8")])
def test_what_is_emulated_is_said_with_its_cost(monkeypatch, dtype, quantization, named):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"sse": True})
    monkeypatch.setattr(machine, "slowdown", lambda kind, device: {"bf16": 12.34, "int8": 5.0}[kind])
    said = machine.emulation(dtype, quantization, CPU)
    assert f"does not compute in {named}" in said
    assert f"{12.3 if named == 'bf16' else 5} times as long as in fp32" in said
    monkeypatch.setattr(machine, "slowdown", lambda *_: 0.5)
    assert machine.emulation(dtype, quantization, CPU) is None


def test_int8_by_our_kernels_is_not_pytorchs(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(native.AVX2.features, True))
    monkeypatch.setattr(machine, "slowdown", lambda kind, device: 50.0)
    assert machine.emulation("fp32", "int8", CPU, kernels=True) is None
    assert "int8" in machine.emulation("fp32", "int8", CPU)
    assert "bf16" in machine.emulation("bf16", "int8", CPU, kernels=True)


@pytest.mark.parametrize("kind", ["bf16", "int8", "fp8"])
def test_products_can_be_measured(kind):
    assert 0 < machine.slowdown(kind, CPU) < 1e6
