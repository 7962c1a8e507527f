"""All that wants a GPU, one after the other within a time limit: tests, the demo's training, FLUX.1-dev's report.

    CXX=g++ python scripts/gpu_all.py --data PICTURES --minutes 12 --out out/gpu-all

For a machine that is there for a quarter of an hour. First the tests, beside the compiling of the engines that the
report measures; then training, alone; then the report, alone. Each part is stopped when its time is over, so that the
next one has its own, and `--out` holds what it has done by then: the parts' logs, gpu.json and gpu.md of the report,
losses, sheets and the averaged weights (weights.safetensors) of the training, and the compiled engines, from which a
second call goes on. A training whose compiled blocks make no step in time is run without compiling, and one that does
not run at all without PyTorch's fused attention.

Parts run in turns because they disturb each other: on an H100, beside tests and a compiler, training made 10 steps of
32,768 tokens a second and the report's figures would have been worth nothing.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.harness import parser

from jitexport.console import err

ROOT = Path(__file__).parents[1]
TRAIN = "scripts/demo_model/train.py"
WEIGHTS = ROOT / "scripts/demo_model/scenes.safetensors"
REPORT = "scripts/gpu_report.py"
GRAPHS = ("ours-4x-graph", "ours-7x-graph", "ours-4x-fp8-graph", "ours-7x-fp8-graph")
#: Of the report.
PARTS = ("ceilings", *GRAPHS[:2], "ours-dense-graph", "diffusers-eager", "diffusers-compiled", *GRAPHS[2:])
#: Without PyTorch's fused attention, which was under suspicion once: see `velocity.rms_norm`.
PLAIN = (
    "import runpy, sys, torch; torch.backends.cuda.enable_flash_sdp(False); "
    "torch.backends.cuda.enable_mem_efficient_sdp(False); sys.path.insert(0, 'scripts/demo_model'); "
    f"runpy.run_path('{TRAIN}', run_name='__main__')"
)
#: Ways to train, until one makes steps: a log's name, how to start, further options.
ATTEMPTS = (
    ("training-compiled", [TRAIN], "--compile"),
    ("training", [TRAIN]),
    ("training-plain", ["-c", PLAIN]),
)
#: Seconds within which a training must have made steps.
FIRST_STEPS = 80


class Job:
    """A command in a process of its own, whose output goes to a file."""

    def __init__(self, log: Path, command: Sequence[str | Path]) -> None:
        self.log = log
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, command)], cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"},
                start_new_session=True,
            )  # fmt: skip

    def said(self) -> str:
        """What it has written so far."""
        return self.log.read_text(errors="replace")

    def end(self) -> int:
        """Stop it, with the processes that it began, if it still runs; its exit code, negative if it was stopped."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


def wait(seconds: float, over: Callable[[], bool]) -> bool:
    """Wait for something, for at most so long; whether it came."""
    until = time.monotonic() + seconds
    while not (came := over()) and time.monotonic() < until:
        time.sleep(0.5)
    return came


def run(jobs: Sequence[Job], seconds: float) -> list[int]:
    """Wait until jobs end, for at most so long; their exit codes."""
    wait(seconds, lambda: all(job.process.poll() is not None for job in jobs))
    codes = [job.end() for job in jobs]
    for job, code in zip(jobs, codes, strict=True):
        lines = job.said().splitlines()
        err.print(f"{job.log.stem}: exit code {code}; {lines[-1][:160] if lines else 'nothing said'}")
    return codes


def begins(job: Job, seconds: float) -> bool:
    """Whether a training makes steps within a time."""
    wait(seconds, lambda: "steps/s" in job.said() or job.process.poll() is not None)
    return "steps/s" in job.said()


def train(args: argparse.Namespace, seconds: float) -> None:
    """The demo's training for so long, and what it has learnt; what it needs before its first step is taken off."""
    for name, start, *more in ATTEMPTS:
        began, work = time.monotonic(), args.out / name
        options = ["--device", "cuda", "--minutes", f"{(seconds - 35) / 60:.2f}", "--checkpoint-minutes", "1"]
        options += ["--evaluation-minutes", "1.5", "--sample-minutes", "60", "--data", args.data, "--work", work]
        options += ["--weights", args.weights]
        job = Job(args.out / f"{name}.log", [*start, "train", *options, *more])
        patience = min(seconds, FIRST_STEPS)
        run([job], seconds - patience if begins(job, patience) else 0)
        if (work / "checkpoint.pt").is_file():
            write = [TRAIN, "weights", "--work", work, "--out", args.out / "weights.safetensors"]
            run([Job(args.out / "weights.log", write)], 60)
            (work / "checkpoint.pt").unlink()  # 200 MB, which nobody wants to carry
            return
        seconds -= time.monotonic() - began
        if seconds < 60:
            return


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--minutes", type=float, default=12, help="of everything together")
    arguments.add_argument("--train-minutes", type=float, default=5, help="of them for training; 0 for none")
    arguments.add_argument("--test-minutes", type=float, default=3, help="for tests and compiling; 0 for neither")
    arguments.add_argument("--data", type=Path, required=True, help="train.py's --data, where it has no network")
    arguments.add_argument("--weights", type=Path, default=WEIGHTS, help="what training starts from, see train.py")
    arguments.add_argument("--out", type=Path, default=Path("out/gpu-all"))
    args = arguments.parse_args()
    for name in ("data", "weights", "out"):
        setattr(args, name, getattr(args, name).resolve())
    args.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * args.minutes
    engines = ["--engines", args.out / "engines"]

    if args.test_minutes:
        shallow = [REPORT, "--config", "shallow", "--repeats", "1", "--seconds", "3600", "--out", args.out / "shallow"]
        for name in GRAPHS:
            shallow += ["--only", name]
        tests = ["-m", "pytest", "-m", "gpu", "-n", "4", "-q", "-rA", "-p", "no:cacheprovider", "-o", "timeout=600"]
        jobs = [Job(args.out / "tests.log", [*tests, "tests/test_cuda.py", "tests/test_graphs.py",
                                             "tests/test_train_demo.py", "tests/serve/test_gpu.py"]),
                Job(args.out / "compiling.log", [*shallow, *engines])]  # fmt: skip
        run(jobs, 60 * args.test_minutes)
    if args.train_minutes:
        train(args, 60 * args.train_minutes)
    left = until - time.monotonic()
    report = [REPORT, "--seconds", f"{left - 10:.0f}", "--out", args.out, *engines]
    for name in PARTS:
        report += ["--only", name]
    run([Job(args.out / "report.log", report)], left)
    if (page := args.out / "gpu.md").is_file():
        print(page.read_text())


if __name__ == "__main__":
    main()
