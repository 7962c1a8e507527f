"""How cost grows with the work: the loop around the engines, its memory, planning, and the engines themselves.

    python scripts/bench/scale.py --report docs/results            # 6 to 7 minutes on two cores
    python scripts/bench/scale.py --tokens 256 --tokens 1024 --engines 0

- loop: everything between the engines (gathering, lifting, Euler steps, activation, micro-flow) of the preset
  `default`, with engines that cost nothing; tokens of 64 channels, as FLUX.1 has them. Seconds are medians over runs.
- loop memory: most bytes of tensors that lived at once beside the draws, counted tensor by tensor.
- engine: the demo model's largest stage by `aoti`, in the dtype that the CPU computes in, beside its FLOPs and the
  share of the machine's best matrix product; --engines is the largest number of tokens that is measured.
"""

import math
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import CPU, facts, parser, said, timed, write
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jitexport import registry
from jitexport.choice import choose
from jitexport.console import err, track
from jitexport.flops import meta_adapter, step_cost
from jitexport.grid import TokenGrid
from jitexport.methods.jit import JiT
from jitexport.methods.temporal.base import Run
from jitexport.models.sources import config_adapter, find_source, load_adapter
from jitexport.plan import plan
from jitexport.profile.measure import matmul_rate, shortest
from jitexport.sampler import draw, sample
from jitexport.schedule import Stage, StageSchedule, make_stages, timesteps
from jitexport.specs import DTYPES

DTYPE = choose("cpu", "aoti").dtype  # of the engine
CHANNELS = 64
#: Token shares of schedules of one to six stages; the third is the published one at 4x.
RATIOS = {
    1: (1.0,), 2: (0.5, 1.0), 3: (0.35, 0.62, 1.0), 4: (0.3, 0.5, 0.75, 1.0), 5: (0.25, 0.4, 0.55, 0.75, 1.0),
    6: (0.2, 0.35, 0.5, 0.65, 0.8, 1.0),
}
STEPS = 18


class Living(TorchDispatchMode):
    """Counts the bytes of the tensors that were made while it is active and still live; `peak` is the largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if torch.is_tensor(leaf):
                self._count(leaf.untyped_storage(), before)
        return out

    def _count(self, storage: torch.UntypedStorage, before: set[int]) -> None:
        key, size = storage.data_ptr(), storage.nbytes()
        if size == 0 or key in before or key in self._known:
            return
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        self._known[key] = weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.bytes -= size


def split(steps: int, stages: int) -> tuple[int, ...]:
    """Steps shared out over stages, the first ones getting what is left over."""
    return tuple(steps // stages + (i < steps % stages) for i in range(stages))


def loop(tokens: int, batch: int, stages: int) -> Callable[[], object]:
    """The stage loop with engines that return a constant, ready to run."""
    side = math.isqrt(tokens)
    method = JiT(TokenGrid((side, side)), JiT.options("default"))
    made = make_stages(tokens, split(STEPS, stages), RATIOS[stages])
    schedule = StageSchedule(made, timesteps(method.settings.timesteps, STEPS, None))
    generators = [torch.Generator().manual_seed(i) for i in range(batch)]
    draws = draw(method, schedule, (CHANNELS, side, side), 1, generators)

    def begin_stage(stage: Stage, where: torch.Tensor) -> Run:
        velocity = torch.randn(batch, stage.tokens, CHANNELS, generator=generators[0])
        return lambda action, tokens, step: [velocity]

    return lambda: sample(method, schedule, draws, begin_stage)


@torch.inference_mode()
def measure_loop(tokens: int, batch: int, stages: int, repeats: int) -> dict[str, Any]:
    run = loop(tokens, batch, stages)
    timing = timed(run, repeats)
    with Living() as living:
        run()
    state = tokens * batch * CHANNELS * 4
    return {
        "tokens": tokens, "batch": batch, "stages": stages, "seconds": timing.median, "p10": timing.p10,
        "p90": timing.p90, "ns_per_token_step": timing.median / (tokens * batch * STEPS) * 1e9,
        "peak_bytes": living.peak, "peak_over_latents": living.peak / state,
    }


def measure_plan(tokens: int) -> dict[str, Any]:
    """A 4x plan of FLUX.1-dev at a size, from its configuration."""
    side = math.isqrt(tokens) * 16
    adapter = config_adapter(find_source("flux"), torch.bfloat16, {"height": side, "width": side})
    start = time.perf_counter()
    made = plan(adapter, speedup=4)
    return {
        "tokens": tokens, "seconds": time.perf_counter() - start, "predicted_speedup": made.predicted_speedup,
        "stages": [(s.steps, s.tokens) for s in made.schedule.stages],
        "step_tflops": made.cost(tokens) / 1e12,
    }


@torch.inference_mode()
def measure_engine(tokens: int, batch: int) -> dict[str, Any]:
    """The demo model's stage of all tokens of a grid of that size."""
    side = math.isqrt(tokens) * 8
    adapter = load_adapter(find_source("demo"), DTYPES[DTYPE], {"height": side, "width": side})
    schedule = plan(adapter, speedup=1).schedule
    spec = next(s for s in adapter.specs(schedule, batch, DTYPE) if s.name == "stage0")
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(s.shape, generator=generator).to(DTYPES[s.dtype]) for s in spec.inputs]
    backend = registry.backend("aoti")
    flops = step_cost(meta_adapter(adapter, DTYPE), DTYPE)(tokens) * batch
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder, "stage0")
        directory.mkdir()
        start = time.perf_counter()
        with torch.inference_mode(False), torch.no_grad():
            backend.build(spec, adapter.module("stage0"), [x.clone() for x in inputs], directory)
        built = time.perf_counter() - start
        run = backend.load(spec, directory, dict(adapter.tensors()), lambda: adapter.module("stage0"), CPU)
        ceiling = matmul_rate(DTYPES[DTYPE], CPU)
        seconds = shortest(lambda: run(inputs), CPU, 3.0)
    return {
        "tokens": tokens, "batch": batch, "build_seconds": built, "seconds": seconds, "gflop": flops / 1e9,
        "gflop_per_second": flops / seconds / 1e9, "share_of_ceiling": flops / seconds / ceiling,
    }


def exponent(rows: list[dict[str, Any]], x: str, y: str) -> float:
    """Slope of log y over log x between the last two rows: 1 is linear growth."""
    a, b = rows[-2:]
    return math.log(b[y] / a[y]) / math.log(b[x] / a[x])


def markdown(report: dict[str, Any]) -> str:
    known = report["conditions"]
    lines = [
        "# Growth", "",
        f"{said(known)}. Seconds are medians of {report['repeats']} runs after one not counted.", "",
        f"## The loop around the engines, {STEPS} steps, {CHANNELS} channels", "",
        "| tokens | batch | stages | ms | 10th to 90th | ns a token and step | memory, MB | in sizes of the latents |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['tokens']:,} | {r['batch']} | {r['stages']} | {r['seconds'] * 1e3:.1f} | {r['p10'] * 1e3:.1f} to "
        f"{r['p90'] * 1e3:.1f} | {r['ns_per_token_step']:.0f} | {r['peak_bytes'] / 1e6:.1f} | "
        f"{r['peak_over_latents']:.1f} |"
        for r in report["loop"]
    ]
    sizes = [r for r in report["loop"] if r["batch"] == 1 and r["stages"] == 3]
    if len(sizes) > 1:
        lines += ["", f"From {sizes[-2]['tokens']:,} to {sizes[-1]['tokens']:,} tokens the time grows with the "
                      f"{exponent(sizes, 'tokens', 'seconds'):.2f}th power of the tokens."]
    lines += ["", "## Planning FLUX.1-dev at 4x", "", "| tokens | s | TFLOP a full step | stages | predicted |",
              "|---|---|---|---|---|"]
    lines += [
        f"| {r['tokens']:,} | {r['seconds']:.1f} | {r['step_tflops']:.1f} | "
        f"{', '.join(f'{s} x {n:,}' for s, n in r['stages'])} | {r['predicted_speedup']:.2f} |"
        for r in report["plan"]
    ]
    if report["engine"]:
        lines += ["", f"## The demo model's full stage, `aoti`, {report.get('dtype', 'bf16')}, fastest run", "",
                  "| tokens | batch | build, s | ms | GFLOP | GFLOP/s | of the ceiling |", "|" + "---|" * 7]
        lines += [
            f"| {r['tokens']:,} | {r['batch']} | {r['build_seconds']:.0f} | {r['seconds'] * 1e3:.1f} | "
            f"{r['gflop']:.1f} | {r['gflop_per_second']:.0f} | {r['share_of_ceiling']:.0%} |"
            for r in report["engine"]
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--tokens", type=int, action="append", default=[], help="square numbers; repeatable")
    arguments.add_argument("--engines", type=int, default=16384, help="largest stage that is compiled and measured")
    arguments.add_argument("--repeats", type=int, default=7)
    arguments.add_argument("--report", type=Path, default=Path("out/scale"), help="folder of scale.json and scale.md")
    args = arguments.parse_args()
    sizes = args.tokens or [256, 1024, 4096, 16384]
    if wrong := [n for n in sizes if math.isqrt(n) ** 2 != n]:
        arguments.error(f"not square: {wrong}")
    middle = 4096 if 4096 in sizes else sizes[-1]
    cases = [(n, 1, 3) for n in sizes] + [(middle, b, 3) for b in (2, 4, 8)]
    cases += [(middle, 1, k) for k in RATIOS if k != 3]
    report: dict[str, Any] = {"conditions": facts(), "repeats": args.repeats, "dtype": DTYPE}
    report["loop"] = [measure_loop(*case, args.repeats) for case in track(cases, "loop")]
    report["plan"] = [measure_plan(n) for n in track(sizes, "plan")]
    engines = [(n, 1) for n in sizes if n <= args.engines] + [(256, b) for b in (2, 4, 8) if args.engines >= 256]
    report["engine"] = [measure_engine(*case) for case in track(engines, "engines")]
    write(args.report, "scale", report, markdown(report))
    err.print(f"wrote {args.report}/scale.json and scale.md")


if __name__ == "__main__":
    main()
