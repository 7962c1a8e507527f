"""Break bundles and builds on purpose and count what gets through. Nothing may.

    python scripts/faults/run.py                           # the demo model with the eager backend, full counts
    python scripts/faults/run.py --scale 0.02 --only flips,kills
    python scripts/faults/run.py --backend aoti --bundle engines/demo-4x --json

Every run is seeded. The exit code is 1 if anything got through. What cannot be tried here is printed with its reason.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import jitexport
from jitexport import registry
from jitexport.build import build
from jitexport.bundle import EngineBundle
from jitexport.bundle.manifest import DIGEST_NAME, FILE_NAME, digest_line
from jitexport.bundle.reading import read_manifest
from jitexport.errors import BundleError, BundleExistsError, JitExportError

PROMPTS = ("red apple on a blue background", "a cat", "green tree", "yellow house near the river")


@dataclass
class Outcome:
    """What a kind of fault came to: cases tried, those that ended as they must, and the others in words."""

    name: str
    cases: int = 0
    held: int = 0
    failures: list[str] = field(default_factory=list)
    note: str = ""

    def record(self, held: bool, otherwise: str) -> None:
        self.cases += 1
        self.held += held
        if not held:
            self.failures.append(otherwise)


# --- damaged files ---------------------------------------------------------------------------------------------------


@contextmanager
def counting_loads(backend: str) -> Iterator[list[str]]:
    """Names of the engines that the backend is asked to open meanwhile."""
    kind = type(registry.backend(backend))
    opened: list[str] = []
    real = kind.load

    def load(self: Any, spec: Any, *rest: Any) -> Any:
        opened.append(spec.name)
        return real(self, spec, *rest)

    with mock.patch.object(kind, "load", load):
        yield opened


def expect_refusal(outcome: Outcome, bundle: Path, backend: str, what: str, verify: str = "full") -> None:
    """Load a damaged bundle: one of the package's errors, and no engine opened."""
    with counting_loads(backend) as opened:
        try:
            jitexport.load(bundle, verify=verify)
            ending = "loaded"
        except JitExportError as error:
            ending = "" if str(error) and error.remedy else f"{type(error).__name__} without a remedy"
        except Exception as error:
            ending = f"{type(error).__name__}: {error}"
    outcome.record(not ending and not opened, f"{what}: {ending or 'refused'}, {len(opened)} engines opened")


def expect_only_full(outcome: Outcome, bundle: Path, backend: str, path: Path) -> None:
    """A bundle with a link to the right bytes: loads with all digests; not with sizes only, the manifest's aside."""
    try:
        jitexport.load(bundle)
        ending = ""
    except JitExportError as error:
        ending = str(error)
    outcome.record(not ending, f"{path.name} a link to its own bytes: {ending}")
    if path.name not in (FILE_NAME, DIGEST_NAME):
        expect_refusal(outcome, bundle, backend, f"{path.name} a link, sizes only", verify="size")


def flipped(path: Path, rng: random.Random) -> Path:
    """A copy of a file beside it, with one bit changed."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    other = path.with_name(path.name + ".flipped")
    other.unlink(missing_ok=True)
    other.write_bytes(content)
    return other


def bundle_files(bundle: Path) -> list[Path]:
    return sorted(p for p in bundle.rglob("*") if p.is_file())


def put(path: Path, content: bytes) -> None:
    """Write a file anew: libraries of an earlier load stay mapped, and would crash if their file were cut."""
    path.unlink()
    path.write_bytes(content)


def bit_flips(bundle: Path, count: int, rng: random.Random) -> Outcome:
    """One bit of one file, then back; a file is as likely as any other, whatever its size."""
    outcome, backend = Outcome("bit flips"), read_manifest(bundle).backend
    for _ in range(count):
        path = rng.choice(bundle_files(bundle))
        content = path.read_bytes()
        at, bit = rng.randrange(len(content)), rng.randrange(8)
        put(path, content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        expect_refusal(outcome, bundle, backend, f"{path.name}, byte {at}, bit {bit}")
        put(path, content)
    jitexport.load(bundle)  # the copy is whole again, so the refusals were about the flips
    return outcome


def truncations(bundle: Path, count: int, rng: random.Random) -> Outcome:
    outcome, backend = Outcome("truncations"), read_manifest(bundle).backend
    for _ in range(count):
        path = rng.choice(bundle_files(bundle))
        content = path.read_bytes()
        length = rng.randrange(len(content))
        put(path, content[:length])
        expect_refusal(outcome, bundle, backend, f"{path.name} cut to {length}")
        put(path, content)
    jitexport.load(bundle)
    return outcome


def replacements(bundle: Path, count: int, rng: random.Random) -> list[Outcome]:
    """Deletions, swaps, extra files, and links, `count` of each.

    Links lead to the very bytes that were there, with which the bundle must load where digests are compared, and must
    be refused where they are not; then to bytes of which one bit is another.
    """
    backend = read_manifest(bundle).backend
    aside = bundle.with_name(bundle.name + ".aside")
    outcomes = [Outcome(n) for n in ("deletions", "swaps", "extra files", "symlinks", "hard links")]
    deletions, swaps, extras, symlinks, hard_links = outcomes
    for i in range(count):
        path = rng.choice(bundle_files(bundle))
        path.rename(aside)
        expect_refusal(deletions, bundle, backend, f"{path.name} deleted")
        for outcome, link in ((symlinks, path.symlink_to), (hard_links, path.hardlink_to)):
            link(aside)
            expect_only_full(outcome, bundle, backend, path)
            path.unlink()
            link(flipped(aside, rng))
            expect_refusal(outcome, bundle, backend, f"{path.name} a link to other bytes")
            path.unlink()
        aside.rename(path)

        other = rng.choice([p for p in bundle_files(bundle) if p.read_bytes() != path.read_bytes()])
        path.rename(aside), other.rename(path), aside.rename(other)
        expect_refusal(swaps, bundle, backend, f"{path.name} and {other.name} swapped")
        path.rename(aside), other.rename(path), aside.rename(other)

        extra = path.with_name(f"extra{i}")
        [extra.touch, extra.mkdir, lambda e=extra: os.mkfifo(e), lambda e=extra: e.symlink_to("/dev/zero")][i % 4]()
        expect_refusal(extras, bundle, backend, f"{extra.name} beside {path.name}")
        extra.rmdir() if i % 4 == 1 else extra.unlink()
    jitexport.load(bundle)
    return outcomes


# --- mutated manifests -----------------------------------------------------------------------------------------------

_VALUES = (
    None, True, False, 0, 1, -1, 2, 3, 10**6, -(10**30), 0.5, -1.5, 1e308, "", "x", "..", "/", "a/b", "fp32", "bf16",
    "int64", "\x00", "é" * 50, [], {}, [1], [[]], {"a": 1}, "engines/stage0", "weights/transformer.safetensors",
)


def mutated_json(raw: Any, rng: random.Random) -> bytes:
    """A JSON document with one to three random changes: of values, keys, list items, or of its text."""
    raw = copy.deepcopy(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        nodes = [n for n in _nodes(raw) if n]
        node = rng.choice(nodes)
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        donor = rng.choice(nodes)
        action = rng.randrange(7)
        if action == 0:
            del node[key]
        elif action == 1:
            node[key] = copy.deepcopy(rng.choice(list(donor.values()) if isinstance(donor, dict) else donor))
        elif action == 2 and isinstance(node, dict):
            node[rng.choice([f"{key}_", key.upper(), "", "extra"])] = node.pop(key)
        elif action == 3 and isinstance(node, list):
            node.insert(key, copy.deepcopy(node[key]))
        elif action == 4 and isinstance(node, list):
            rng.shuffle(node)
        elif action == 5 and isinstance(node[key], (int, float)):
            node[key] = node[key] * rng.choice((-1, 0, 2, 1.5)) + rng.choice((0, 1, -1))
        else:
            node[key] = rng.choice(_VALUES)
    text = bytearray(json.dumps(raw, indent=1).encode())
    if rng.random() < 0.1:
        start = rng.randrange(len(text))
        text[start : start + rng.randrange(20)] = rng.randbytes(rng.randrange(20))
    return bytes(text)


def _nodes(raw: Any) -> Iterator[Any]:
    """All objects and lists of a JSON document."""
    if isinstance(raw, (dict, list)):
        yield raw
        for value in raw.values() if isinstance(raw, dict) else raw:
            yield from _nodes(value)


def manifest_mutations(bundle: Path, count: int, rng: random.Random, loads: int = 500) -> Outcome:
    """Manifests that are changed and signed again, so that the schema and the loading code see them.

    What passes the schema is loaded, the first `loads` of them, as long as that opens only files that are unchanged.
    """
    outcome = Outcome("mutated manifests")
    text = (bundle / FILE_NAME).read_bytes()
    raw = json.loads(text)
    tally = {"loaded": 0, "opened": 0, "refused": 0}
    for i in range(count):
        changed = mutated_json(raw, rng)
        (bundle / FILE_NAME).write_bytes(changed)
        (bundle / DIGEST_NAME).write_bytes(digest_line(changed))
        ending = "opened"
        try:
            EngineBundle.open(bundle, "size")
            if tally["loaded"] < loads:
                jitexport.load(bundle, verify="size")
                ending = "loaded"
            held = True
        except JitExportError:
            ending, held = "refused", True
        except Exception as error:
            ending, held = f"{type(error).__name__}: {error}", False
        outcome.record(held, f"mutation {i}: {ending}")
        if held:
            tally[ending] += 1
    (bundle / FILE_NAME).write_bytes(text)
    (bundle / DIGEST_NAME).write_bytes(digest_line(text))
    jitexport.load(bundle)
    outcome.note = f"{tally['refused']} refused, {tally['loaded'] + tally['opened']} harmless (free text, for example)"
    return outcome


# --- interrupted and competing builds --------------------------------------------------------------------------------


def _build(model: str, output: str, backend: str, speedup: float, replace: bool, kill_at: int, answer: str) -> None:
    """Process body: build, write how that ended and after how many touches of the output's folder.

    With kill_at, die with that touch instead. Only Python's own touches count, so libraries' are met by time.
    """
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - as long as the process
    torch.set_num_threads(1)
    touches = 0
    folder = str(Path(output).parent)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal touches
        if event.split(".")[0] in ("open", "os", "shutil", "fcntl", "ctypes"):
            touches += event.startswith(("fcntl", "ctypes")) or any(folder in str(a) for a in arguments[:2])
            if kill_at and touches == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    try:
        build(model, output=output, backend=backend, speedup=speedup, replace=replace)
        ending = "built"
    except BaseException as error:
        ending = type(error).__name__ if isinstance(error, JitExportError) else repr(error)
    Path(answer).write_text(f"{ending}\n{touches}")


def _processes() -> Any:
    """Processes that start with everything imported but nothing run, so that a build begins at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jitexport.build", "jitexport.models.flux", "jitexport.backends.aoti", __name__])
    return context


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def opens(path: Path) -> bool:
    """Whether a bundle is whole; anything but this package's errors is passed on."""
    try:
        EngineBundle.open(path)
        return True
    except BundleError:
        return False


def kills(model: str, backend: str, work: Path, count: int, rng: random.Random) -> Outcome:
    """kill -9 of a build, by time or by its n-th touch of the disk, with and without a bundle to replace."""
    outcome = Outcome("kill -9 during a build")
    folder = work / "kills"
    folder.mkdir()
    target, old = folder / "bundle", work / "kills-old"
    build(model, output=old, backend=backend, speedup=2)
    context = _processes()

    answer = work / "kills-answer"

    def run(kill_at: int, delay: float | None, replace: bool) -> float:
        process = context.Process(target=_build, args=(model, str(target), backend, 4, replace, kill_at, str(answer)))
        started = time.monotonic()
        process.start()
        process.join(delay)
        if process.is_alive():
            process.kill()
        process.join()
        return time.monotonic() - started

    seconds = 0.0
    for _ in range(2):  # the first also starts the server
        seconds = run(0, None, False)
        ending, touches = answer.read_text().split("\n")
        if ending != "built":
            raise RuntimeError(f"a build that nobody disturbs ends with {ending}")
        shutil.rmtree(target)
    built = 0
    for i in range(count):
        shutil.rmtree(target, ignore_errors=True)
        replace = i % 4 >= 2
        if replace:
            shutil.copytree(old, target)
        by_touch = i % 2 and backend == "eager"  # a compiler's own files are not ours to count
        first = 1 if rng.random() < 0.5 else int(touches) - 12  # the end, where the bundle is put in place, more often
        moment = rng.randrange(first, int(touches) + 5) if by_touch else rng.uniform(0, seconds)
        run(moment if by_touch else 0, None if by_touch else moment, replace)
        what = f"kill at {'touch ' if by_touch else ''}{moment:.3f}{' over a bundle' if replace else ''}"
        whole = opens(target)
        held = whole or (not replace and not target.exists())
        built += whole and read_manifest(target).schedule.speedup == 4
        remains = leftovers(folder)
        try:
            build(model, output=target, backend=backend, speedup=3, replace=True)
            mended = opens(target) and not leftovers(folder)
        except JitExportError as error:
            mended, remains = False, [*remains, str(error)]
        outcome.record(held and mended, f"{what}: whole {whole}, left {remains}, next build mends {mended}")
    outcome.note = f"{built} after the new bundle was in place"
    return outcome


def competing_builds(model: str, backend: str, work: Path, count: int) -> Outcome:
    """Two builds to one target at the same time, without and with permission to replace."""
    outcome = Outcome("two builds to one target")
    folder = work / "competing"
    context = _processes()
    for i in range(count):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        replace = bool(i % 2)
        answers = [work / f"answer{k}" for k in range(2)]
        processes = [
            context.Process(
                target=_build, args=(model, str(folder / "bundle"), backend, 4, replace, 0, str(a)), daemon=True
            )
            for a in answers
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        endings = sorted(a.read_text().split("\n")[0] for a in answers)
        wanted = ["built", "built"] if replace else [BundleExistsError.__name__, "built"]
        held = endings == sorted(wanted) and opens(folder / "bundle") and not leftovers(folder)
        outcome.record(held, f"replace {replace}: {endings}, left {leftovers(folder)}")
    return outcome


# --- full and read-only disks ----------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A tmpfs of a size in bytes at a folder.

    Raises:
        PermissionError: this user cannot mount.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise PermissionError(str(error)) from None
    if done.returncode:
        raise PermissionError(done.stderr.strip() or "mount failed")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def failed_build(outcome: Outcome, model: str, backend: str, disk: Path, what: str) -> None:
    """A build over a bundle on a disk that cannot take it: BundleError, the old bundle whole, nothing else left."""
    before = (disk / "bundle" / DIGEST_NAME).read_bytes()
    try:
        build(model, output=disk / "bundle", backend=backend, speedup=4, replace=True)
        ending = "built"
    except BundleError as error:
        ending = "" if error.remedy and error.found else "no remedy"
    except Exception as error:
        ending = f"{type(error).__name__}: {error}"
    untouched = opens(disk / "bundle") and (disk / "bundle" / DIGEST_NAME).read_bytes() == before
    outcome.record(
        not ending and untouched and not leftovers(disk),
        f"{what}: {ending or 'refused'}, old bundle whole {untouched}, left {leftovers(disk)}",
    )


def bad_disks(model: str, backend: str, work: Path, count: int) -> list[Outcome]:
    full, read_only = Outcome("full disk"), Outcome("read-only target")
    old = build(model, output=work / "disk-old", backend=backend, speedup=4).path
    page = 4096  # tmpfs counts in pages, a directory or file being one more
    need = sum(-(-p.stat().st_size // page) * page for p in bundle_files(old))
    disk = work / "disk"
    try:
        for i in range(count):
            with small_disk(disk, need + int(need * (i + 0.5) / count) // page * page):
                shutil.copytree(old, disk / "bundle")
                failed_build(full, model, backend, disk, f"room for {(i + 0.5) / count:.0%}")
        with small_disk(disk, 3 * need):
            shutil.copytree(old, disk / "bundle")
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            failed_build(read_only, model, backend, disk, "read-only")
    except PermissionError as error:
        full.note = read_only.note = f"not tried: {error}"
    return [full, read_only]


# --- running ---------------------------------------------------------------------------------------------------------


class Cancelled(Exception):
    """What a caller's callback raises to end a call."""


def concurrent_images(bundle: Path, threads: int, images: int, rng: random.Random) -> Outcome:
    """Threads on one bundle, each with its own prompts and seeds; a tenth cancels, a tenth fails in a callback."""
    outcome = Outcome(f"{threads} threads x {images} images")
    pipe = jitexport.load(bundle)
    pipe.set_progress_bar_config(disable=True)
    jobs = [(prompt, seed) for prompt in PROMPTS for seed in range(min(8, images))]

    def draw(prompt: str, seed: int, callback: Any = None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return pipe(prompt, generator=generator, output_type="pt", callback_on_step_end=callback).images

    serial = {job: draw(*job) for job in jobs}
    lock = threading.Lock()
    ended = {"finished": 0, "cancelled": 0, "failed": 0}

    def cancel(step: int) -> Callable[..., dict[str, Any]]:
        def callback(_: Any, i: int, *rest: Any) -> dict[str, Any]:
            if i == step:
                raise Cancelled
            return {}

        return callback

    def work(own: random.Random) -> None:
        for _ in range(images):
            job = own.choice(jobs)
            fate = own.random()
            step = own.randrange(pipe.schedule.nfe)
            try:
                if fate < 0.1:
                    draw(*job, cancel(step))
                    kind, held = "cancelled", False
                elif fate < 0.2:
                    draw(*job, lambda *_: {"latents": torch.zeros(1)})
                    kind, held = "failed", False
                else:
                    kind, held = "finished", torch.equal(draw(*job), serial[job])
            except Cancelled:
                kind, held = "cancelled", fate < 0.1
            except JitExportError:
                kind, held = "failed", 0.1 <= fate < 0.2
            except Exception as error:
                kind, held = "failed", False
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
            with lock:
                ended[kind] += 1
                outcome.record(held, f"{job}: {kind}")

    workers = [threading.Thread(target=work, args=(random.Random(rng.random()),)) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    outcome.note = ", ".join(f"{n} {kind}" for kind, n in ended.items())
    return outcome


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def load_cycles(bundle: Path, cycles: int, growth: float = 0.01) -> Outcome:
    """Load, use and drop a bundle over and over: memory and file descriptors stay flat after the first tenth."""
    outcome = Outcome(f"{cycles} load/unload cycles")
    memory, files = [], []
    for _ in range(cycles):
        pipe = jitexport.load(bundle)
        pipe.prepare([PROMPTS[0]] * pipe.batch_size)
        del pipe
        gc.collect()
        memory.append(resident())
        files.append(descriptors())
    window = max(1, cycles // 10)
    first, last = (statistics.median(memory[s]) for s in (slice(window, 2 * window), slice(-window, None)))
    change = last / first - 1
    opened = files[-1] - files[window]
    outcome.note = f"memory {change:+.2%} of {first / 1e6:.0f} MB, descriptors {opened:+d}"
    outcome.record(change < growth and opened <= 0, outcome.note)
    return outcome


# --- the command -----------------------------------------------------------------------------------------------------

KINDS = ("flips", "truncations", "replacements", "manifests", "kills", "disks", "competing", "threads", "cycles")


def run_all(
    model: str, backend: str, bundle: Path | None, work: Path, kinds: tuple[str, ...], scale: float, seed: int
) -> Iterator[Outcome]:
    """All faults, `scale` times the full counts of each (at least one)."""

    def n(full: int) -> int:
        return max(1, round(full * scale))

    def rng(kind: str) -> random.Random:
        return random.Random(f"{seed} {kind}")

    if bundle is None:
        bundle = build(model, output=work / "whole", backend=backend).path
    copied = Path(shutil.copytree(bundle, work / "damaged"))
    if "flips" in kinds:
        yield bit_flips(copied, n(1000), rng("flips"))
    if "truncations" in kinds:
        yield truncations(copied, n(100), rng("truncations"))
    if "replacements" in kinds:
        yield from replacements(copied, n(100), rng("replacements"))
    if "manifests" in kinds:
        yield manifest_mutations(copied, n(10_000), rng("manifests"))
    if "kills" in kinds:
        yield kills(model, backend, work, n(50), rng("kills"))
    if "disks" in kinds:
        yield from bad_disks(model, backend, work, n(10))
    if "competing" in kinds:
        yield competing_builds(model, backend, work, max(2, n(10)))
    if "threads" in kinds:
        yield concurrent_images(bundle, 8, n(50), rng("threads"))
    if "cycles" in kinds:
        yield load_cycles(bundle, max(30, n(300)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="a registered model or a diffusers folder")
    parser.add_argument("--backend", default="eager", help="of the builds that are interrupted")
    parser.add_argument("--bundle", type=Path, help="bundle to damage a copy of; built from --model by default")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full counts")
    parser.add_argument("--only", default=",".join(KINDS), help=f"comma-separated: {', '.join(KINDS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    kinds = tuple(arguments.only.split(","))
    if wrong := set(kinds) - set(KINDS):
        parser.error(f"unknown: {', '.join(sorted(wrong))}")

    outcomes, started = [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="jitexport-faults-") as work:
        for outcome in run_all(
            arguments.model, arguments.backend, arguments.bundle, Path(work), kinds, arguments.scale, arguments.seed
        ):
            outcomes.append(outcome)
            seconds = time.monotonic() - started
            print(
                f"{seconds:7.0f} s  {outcome.name:28} {outcome.held} of {outcome.cases} held  {outcome.note}",
                file=sys.stderr, flush=True,
            )
            for failure in outcome.failures[:5]:
                print(f"             {failure}", file=sys.stderr)
    if arguments.json:
        print(json.dumps([asdict(o) for o in outcomes], indent=1))
    else:
        print("| fault | cases | held | note |\n|---|---|---|---|")
        for o in outcomes:
            print(f"| {o.name} | {o.cases} | {o.held} | {o.note} |")
    return int(any(o.failures for o in outcomes))


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
