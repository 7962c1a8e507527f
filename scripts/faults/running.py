"""Bundles in use: many threads, calls that are cancelled or fail, and loading over and over."""

from __future__ import annotations

import gc
import os
import random
import statistics
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from outcomes import PROMPTS, Outcome

import jitexport
from jitexport.errors import JitExportError


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
