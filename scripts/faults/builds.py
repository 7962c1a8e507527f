"""Builds that are killed, that compete for one target, and whose disk is full or read-only."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from outcomes import Outcome, bundle_files, leftovers, opens

from jitexport.build import build
from jitexport.bundle.manifest import DIGEST_NAME
from jitexport.bundle.reading import read_manifest
from jitexport.errors import BundleError, BundleExistsError, JitExportError

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
    context.set_forkserver_preload(["jitexport.build", "jitexport.models.flux", "jitexport.backends.aoti"])
    return context


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
