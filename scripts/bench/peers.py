"""The demo model made faster in different ways, side by side: same prompts, same seeds, same noise, one machine.

    python scripts/bench/peers.py                      # run again until it says that nothing is left
    python scripts/bench/peers.py --prompts 2 --only diffusers-50-fp32 --only ours-aoti-bf16-4x --out out/try

Every contender makes one image a prompt, from the same initial noise. A run works for --seconds and stops; the next
one goes on from what lies in --out, image by image, each part of a contender after a warm-up of its own (compiling
and calibrating fall into it). When nothing is left, the report is written: JSON, Markdown and a picture.

- seconds: from prompt to PNG, one image, median and 90th percentile;
- PSNR to 50 steps: to the picture of 50 ordinary fp32 steps of the same seed (median), at 256 x 256;
- PSNR to data, name, pair, background, sharpness: against the data, see jitexport/evaluate/demo.py;
- machine: rate of fp32 matrix products beside the contender's own parts, relative to the median over all contenders;
  a contender far from 1 was measured on a machine that was faster or slower than usual, and is marked.
"""

import argparse
import json
import math
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from jitexport import machine, registry
from jitexport.choice import choose
from jitexport.console import Table, err, out, quiet_libraries
from jitexport.evaluate.demo import DemoData, DemoPrompt, Judge
from jitexport.evaluate.report import spread_labels
from jitexport.models.sources import DEMO_FOLDER
from jitexport.png import encode_png
from jitexport.profile.measure import Timing, conditions, matmul_rate

REFERENCE = "diffusers-50-fp32"
NFE = {4: 18, 7: 11}  # the published schedules
CPU = torch.device("cpu")
#: What is worth measuring: bf16 takes ten times as long and more where the CPU emulates it.
KINDS = ("fp32", "bf16") if machine.computes("bf16", CPU) else ("fp32",)
DTYPE = KINDS[-1]
UNSTEADY = 0.1  # a contender whose machine differed by more than this is marked

#: A prompt and a seed -> a picture.
Make = Callable[[str, int], Image.Image]


@dataclass(frozen=True)
class Contender:
    """A way of making pictures; `open` loads it."""

    name: str
    what: str
    open: Callable[["Setting"], Make]


@dataclass(frozen=True)
class Setting:
    """What all contenders share."""

    folder: Path
    out: Path
    defaults: dict[str, Any] = field(default_factory=dict)
    warmup_prompt: str = "red apple on a blue background"


# --- diffusers and what is built on it --------------------------------------------------------------------------------


def diffusers_pipeline(setting: Setting, dtype: str) -> Any:
    from diffusers import FluxPipeline

    quiet_libraries()
    pipe = FluxPipeline.from_pretrained(setting.folder, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def initial_noise(pipe: Any, setting: Setting, seed: int) -> torch.Tensor:
    """The seed's noise in fp32, as all contenders start from it: diffusers alone would draw another one in bf16."""
    size = setting.defaults
    channels = pipe.transformer.config.in_channels // 4
    generator = torch.Generator().manual_seed(seed)
    return pipe.prepare_latents(1, channels, size["height"], size["width"], torch.float32, "cpu", generator)[0]


def call(pipe: Any, setting: Setting, steps: int, prompt: str, seed: int) -> Image.Image:
    settings = {**setting.defaults, "num_inference_steps": steps}
    latents = initial_noise(pipe, setting, seed).to(pipe.transformer.dtype)
    return pipe(prompt, latents=latents, **settings).images[0]


def diffusers(dtype: str, steps: int, setting: Setting) -> Make:
    return partial(call, diffusers_pipeline(setting, dtype), setting, steps)


def compiled(dtype: str, steps: int, setting: Setting) -> Make:
    pipe = diffusers_pipeline(setting, dtype)
    pipe.transformer.compile(dynamic=False)
    return partial(call, pipe, setting, steps)


def cached(config: Callable[[Any, Setting], Any], setting: Setting) -> Make:
    """One of diffusers' own caches, over 50 steps in the CPU's dtype."""
    pipe = diffusers_pipeline(setting, DTYPE)
    pipe.transformer.enable_cache(config(pipe, setting))
    return partial(call, pipe, setting, 50)


def first_block(threshold: float, pipe: Any, setting: Setting) -> Any:
    from diffusers import FirstBlockCacheConfig

    return FirstBlockCacheConfig(threshold=threshold)


def taylorseer(interval: int, pipe: Any, setting: Setting) -> Any:
    from diffusers import TaylorSeerCacheConfig

    return TaylorSeerCacheConfig(cache_interval=interval, max_order=1, disable_cache_before_step=3)


def magcache(threshold: float, skip: int, pipe: Any, setting: Setting) -> Any:
    """With ratios calibrated on this model, one image, as its configuration asks for."""
    from diffusers import MagCacheConfig
    from diffusers.hooks import mag_cache

    ratios: list[float] = []

    class Keeping(mag_cache.MagCacheBlockHook):
        """Keeps what calibration would only print."""

        def _advance_step(self, state: Any) -> None:
            ratios[:] = state.calibration_ratios
            state.step_index += 1

    original, mag_cache.MagCacheBlockHook = mag_cache.MagCacheBlockHook, Keeping
    try:
        calibrated = diffusers_pipeline(setting, DTYPE)
        calibrated.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=50))
        call(calibrated, setting, 50, setting.warmup_prompt, 0)
    finally:
        mag_cache.MagCacheBlockHook = original
    return MagCacheConfig(threshold=threshold, max_skip_steps=skip, num_inference_steps=50, mag_ratios=ratios)


def cache_dit(options: dict[str, Any], calibrator: str | None, setting: Setting) -> Make:
    import cache_dit as library

    pipe = diffusers_pipeline(setting, DTYPE)
    config = library.DBCacheConfig(**options)
    calibrators = {
        None: lambda: None,
        "TaylorSeer": lambda: library.TaylorSeerCalibratorConfig(taylorseer_order=1),
        "FoCa": library.FoCaCalibratorConfig,
        "DMD": library.DMDCalibratorConfig,
    }
    library.enable_cache(pipe, cache_config=config, calibrator_config=calibrators[calibrator]())
    return partial(call, pipe, setting, 50)


def static_mask(interval: int) -> dict[str, Any]:
    """cache-dit's options for the steps that TaylorSeer computes of 50, three of warm-up; one block runs in others."""
    computed = {0, 1, 2, *range(2, 50, interval), 49}
    return {
        "Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "num_inference_steps": 50, "max_warmup_steps": 3,
        "steps_computation_mask": [int(i in computed) for i in range(50)], "steps_computation_policy": "static",
    }  # fmt: skip


def by_openvino(module: Any, method: str, result: Callable[[torch.Tensor], Any]) -> None:
    """Let OpenVINO run a module's method, converted and compiled at its first call for the shapes of that."""
    import openvino

    original = getattr(module, method)
    compiled: list[Any] = []

    def run(*inputs: torch.Tensor, **named: Any) -> Any:
        tensors = {k: v for k, v in named.items() if isinstance(v, torch.Tensor)}

        class Plain(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.owner = module

            def forward(self, *given: torch.Tensor) -> torch.Tensor:
                positional, by_name = given[: len(inputs)], zip(tensors, given[len(inputs) :], strict=True)
                return original(*positional, **dict(by_name), return_dict=False)[0]

        given = (*inputs, *tensors.values())
        if not compiled:
            with torch.no_grad():
                model = openvino.convert_model(Plain(), example_input=given, input=[tuple(x.shape) for x in given])
            compiled.append(openvino.Core().compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY"}))
        return result(torch.from_numpy(compiled[0]([x.numpy() for x in given])[0]))

    setattr(module, method, run)


def openvino(steps: int, setting: Setting) -> Make:
    """diffusers with OpenVINO for the transformer and the decoder, in what precision it chooses."""
    pipe = diffusers_pipeline(setting, "fp32")
    by_openvino(pipe.transformer, "forward", lambda x: (x,))
    by_openvino(pipe.vae, "decode", lambda x: (x,))
    return partial(call, pipe, setting, steps)


# --- JiT --------------------------------------------------------------------------------------------------------------


def schedule(speedup: int) -> tuple[list[float], list[tuple[int, int]]]:
    """Noise levels and (steps, tokens) of each stage, as a bundle of that speed-up has them."""
    from jitexport.models.sources import config_adapter, find_source
    from jitexport.plan import plan

    made = plan(config_adapter(find_source("demo"), torch.float32), speedup=speedup)
    return list(made.schedule.sigmas), [(s.steps, s.tokens) for s in made.schedule.stages]


def plain(dtype: str, speedup: int, setting: Setting) -> Make:
    from plain_jit import plain_jit

    pipe = diffusers_pipeline(setting, dtype)
    sigmas, stages = schedule(speedup)
    size = {k: setting.defaults[k] for k in ("height", "width", "max_sequence_length", "guidance_scale")}

    def make(prompt: str, seed: int) -> Image.Image:
        generator = torch.Generator().manual_seed(seed)
        return plain_jit(pipe, prompt, generator, sigmas=sigmas, stages=stages, **size)

    return make


def bundle(path: Path, setting: Setting) -> Make:
    import jitexport

    pipe = jitexport.load(path)
    pipe.set_progress_bar_config(disable=True)

    def make(prompt: str, seed: int) -> Image.Image:
        return pipe(prompt, generator=torch.Generator().manual_seed(seed)).images[0]

    return make


def ours(name: str, options: dict[str, Any], setting: Setting) -> Make:
    """A bundle of the demo model, built where it is not there yet."""
    from jitexport.build import build

    path = setting.out / "bundles" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        err.print(f"building {path}")
        build("demo", output=path, **options)
    return bundle(path, setting)


#: Ours with temporal methods: name, then what is built.
TEMPORAL: dict[str, dict[str, Any]] = {
    **{f"dense-{s}x": {"speedup": s, "method": "dense"} for s in (5, 10, 20)},
    **{f"jit-{s}x-taylor": {"speedup": s, "cache": "taylor"} for s in (5, 7, 10, 14, 20)},
    **{f"dense-{s}x-taylor": {"speedup": s, "method": "dense", "cache": "taylor"} for s in (5, 10, 20)},
    "dense-taylorseer-7": {"speedup": 1, "cache": "taylorseer:every=7"},
    "dense-taylorseer-11": {"speedup": 1, "cache": "taylorseer:every=11"},
    "dense-delta-dit-5": {"speedup": 1, "cache": "delta-dit:every=5"},
    "dense-toca-5": {"speedup": 1, "cache": "toca:every=5"},
    "ralu-5x-taylorseer-3": {"speedup": 5, "method": "ralu", "cache": "taylorseer:every=3,warmup=2"},
    "ralu-5x-delta-dit-2": {"speedup": 5, "method": "ralu", "cache": "delta-dit:every=2"},
    "ralu-5x-toca-3": {"speedup": 5, "method": "ralu", "cache": "toca:every=3"},
}


# --- all of them ------------------------------------------------------------------------------------------------------


def contenders(bundles: list[Path]) -> Iterator[Contender]:
    """Everything that is compared; the first one is the reference. Backends that cannot run here are left out."""
    for dtype in KINDS:
        for steps in (50, *NFE.values()):
            what = f"diffusers, {steps} steps, eager {dtype}"
            yield Contender(f"diffusers-{steps}-{dtype}", what, partial(diffusers, dtype, steps))
    for dtype, steps in dict.fromkeys((("fp32", 50), (DTYPE, 50), (DTYPE, 18), (DTYPE, 11))):
        what = f"diffusers, {steps} steps, torch.compile {dtype}"
        yield Contender(f"compile-{steps}-{dtype}", what, partial(compiled, dtype, steps))
    for steps in (50, *NFE.values()):
        yield Contender(f"openvino-{steps}", f"diffusers, {steps} steps, OpenVINO", partial(openvino, steps))
    for threshold in (0.05, 0.1, 0.2):
        what = f"diffusers' first-block cache, threshold {threshold}, 50 steps, {DTYPE}"
        yield Contender(f"first-block-{threshold}", what, partial(cached, partial(first_block, threshold)))
    for interval in (5, 7, 11):
        what = f"diffusers' TaylorSeer cache, interval {interval}, order 1, 50 steps, {DTYPE}"
        yield Contender(f"taylorseer-{interval}", what, partial(cached, partial(taylorseer, interval)))
    for threshold, skip in ((0.06, 3), (0.24, 5)):
        what = f"diffusers' MagCache, threshold {threshold}, at most {skip} skipped, 50 steps, {DTYPE}"
        yield Contender(f"magcache-{threshold}", what, partial(cached, partial(magcache, threshold, skip)))
    few = {"Fn_compute_blocks": 1, "max_warmup_steps": 4, "max_continuous_cached_steps": 6}
    for name, options, calibrator in (
        ("default", {}, None),
        ("fast", few | {"residual_diff_threshold": 0.2}, None),
        ("fast-taylorseer", few | {"residual_diff_threshold": 0.2}, "TaylorSeer"),
    ):
        settings = ", ".join(f"{k}={v}" for k, v in options.items()) or "default settings"
        with_calibrator = "" if calibrator is None else f", {calibrator}"
        what = f"cache-dit{with_calibrator}, {settings}, 50 steps, {DTYPE}"
        yield Contender(f"cache-dit-{name}", what, partial(cache_dit, options, calibrator))
    for interval in (5, 7, 11):
        for calibrator in (None, "TaylorSeer", "FoCa", "DMD"):
            name = f"cache-dit-static-{interval}-{(calibrator or 'reuse').lower()}"
            what = f"cache-dit, {calibrator or 'no calibrator'}, static mask, interval {interval}, 50 steps, {DTYPE}"
            yield Contender(name, what, partial(cache_dit, static_mask(interval), calibrator))
    for speedup in NFE:
        for dtype in KINDS:
            what = f"plain eager JiT loop, {speedup}x, {dtype}"
            yield Contender(f"plain-jit-{speedup}x-{dtype}", what, partial(plain, dtype, speedup))
    for speedup in NFE:
        for name in registry.BACKENDS:
            backend = registry.backend(name)
            if name == "fastest" or backend.cannot_build(CPU, None) is not None:  # whose engines are the others'
                continue
            dtype = choose("cpu", name).dtype
            for kind in (None, *(["int8"] if name == "aoti" else [])):
                precision = dtype if kind is None else kind
                what = f"jitexport, {speedup}x, {name} {precision}"
                options = {"speedup": speedup, "backend": name, "dtype": dtype, "quantization": kind}
                make = partial(ours, f"{name}-{precision}-{speedup}x", options)
                yield Contender(f"ours-{name}-{precision}-{speedup}x", what, make)
    for name, options in TEMPORAL.items():
        what = f"jitexport, {name}, aoti {DTYPE}"
        yield Contender(f"ours-{name}", what, partial(ours, name, options | {"backend": "aoti", "dtype": DTYPE}))
    for path in bundles:
        yield Contender(f"bundle-{path.name}", f"jitexport, {path}", partial(bundle, path))


# --- measuring, in pieces ---------------------------------------------------------------------------------------------


class Results:
    """What has been measured, in a folder: a JSON file and a folder of pictures for each contender."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def read(self, name: str) -> dict[str, Any]:
        path = self.out / f"{name}.json"
        return json.loads(path.read_text()) if path.is_file() else {"seconds": {}, "rates": [], "error": None}

    def write(self, name: str, result: dict[str, Any]) -> None:
        target = self.out / f"{name}.json"
        partial_file = target.with_suffix(".part")
        partial_file.write_text(json.dumps(result, indent=1) + "\n")
        partial_file.replace(target)

    def picture(self, name: str, prompt: DemoPrompt) -> Path:
        return self.out / name / f"{prompt.text.replace(' ', '-')}.png"


def measure(contender: Contender, setting: Setting, prompts: list[DemoPrompt], results: Results, until: float) -> bool:
    """Make pictures until all are there (True) or time is up; an error is noted as the contender's result."""
    result = results.read(contender.name)
    missing = [p for p in prompts if p.text not in result["seconds"]]
    if result["error"] or not missing:
        return True
    err.print(f"{contender.name}: {len(missing)} of {len(prompts)} left")
    try:
        make = contender.open(setting)
        encode_png(make(setting.warmup_prompt, 0))
        result["rates"].append(matmul_rate(torch.float32, CPU))
        for prompt in missing:
            if time.monotonic() > until:
                return False
            start = time.perf_counter()
            data = encode_png(make(prompt.text, prompt.seed))
            seconds = time.perf_counter() - start
            path = results.picture(contender.name, prompt)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            result["seconds"][prompt.text] = seconds
            results.write(contender.name, result)
    except Exception as error:  # a peer that does not run here is a result, not the end of the comparison
        traceback.print_exc()
        lines = str(error).splitlines()
        result["error"] = f"{type(error).__name__}: {lines[0] if lines else ''}"
    result["rates"].append(matmul_rate(torch.float32, CPU))
    results.write(contender.name, result)
    return True


# --- report -----------------------------------------------------------------------------------------------------------


def psnr(a: Image.Image, b: Image.Image) -> float:
    error = np.square(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)).mean()
    return 10 * math.log10(255**2 / max(error, 1e-2))


def likeness(values: list[float]) -> dict[str, Any]:
    """The median, and the 95% interval that drawing as many prompts again and again gives."""
    drawn = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
    return {"psnr": statistics.median(values), "psnr_interval": [float(low), float(high)]}


def summarise(
    contender: Contender, result: dict[str, Any], prompts: list[DemoPrompt], results: Results, judge: Judge
) -> dict[str, Any]:
    """One row of the report."""
    row: dict[str, Any] = {"name": contender.name, "what": contender.what, "error": result["error"]}
    if result["error"]:
        return row
    pictures = {p: Image.open(results.picture(contender.name, p)).convert("RGB") for p in prompts}
    scores = [judge.score(p.name, p.colour, picture) for p, picture in pictures.items()]
    wanted = [Image.open(results.picture(REFERENCE, p)).convert("RGB") for p in prompts]
    timing = Timing.of([result["seconds"][p.text] for p in prompts])
    return row | {
        "images": len(prompts),
        "median": timing.median,
        "p90": timing.p90,
        **likeness([psnr(a, b) for a, b in zip(pictures.values(), wanted, strict=True)]),
        "psnr_data": statistics.median(s.psnr for s in scores),
        "name_right": sum(s.name_right for s in scores),
        "pair_right": sum(s.pair_right for s in scores),
        "background_right": sum(s.background_right for s in scores),
        "sharpness": statistics.median(s.sharpness for s in scores),
        "rate": statistics.median(result["rates"]),
    }


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in ("torch", "diffusers", "transformers", "cache-dit", "openvino", "onnxruntime"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def markdown(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The report as a page."""
    base = next(r["median"] for r in rows if r["name"] == REFERENCE)
    done = sorted((r for r in rows if not r["error"]), key=lambda r: -r["median"])
    usual = statistics.median(r["rate"] for r in done)
    lines = [
        "# The demo model made faster in different ways",
        "",
        f"{done[0]['images']} prompts, one seed each, 256 x 256, batch 1, prompt to PNG. "
        "The first PSNR is to the picture of 50 ordinary fp32 steps of the same seed, the second to the data's picture "
        "of what was asked for; in brackets the 95% interval of the median; names, pairs and backgrounds are counts of "
        "prompts that were answered (see "
        "`jitexport/evaluate/demo.py`); machine is the rate of matrix products beside the contender's runs, relative "
        f"to the median over all: more than {UNSTEADY:.0%} off is marked with !.",
        "",
        "| | median s | p90 s | times faster | dB to 50 steps | dB to data | name | pair | background | sharpness "
        "| machine |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in done:
        machine = r["rate"] / usual
        mark = "!" if abs(machine - 1) > UNSTEADY else ""
        lines.append(
            f"| {r['what']} | {r['median']:.3f} | {r['p90']:.3f} | {base / r['median']:.2f} "
            f"| {'' if r['name'] == REFERENCE else decibels(r)} | {r['psnr_data']:.1f} "
            f"| {r['name_right']} | {r['pair_right']} | {r['background_right']} | {r['sharpness']:.2f} "
            f"| {machine:.2f}{mark} |"
        )
    lines += ["", "## At equal latency", "", *at_equal_latency(done, base)]
    failed = [f"- {r['what']}: {r['error']}" for r in rows if r["error"]]
    lines += ["", "Did not run:", "", *failed] if failed else []
    lines += ["", *(f"- {k}: {v}" for k, v in facts.items() if v is not None), ""]
    return "\n".join(lines)


def decibels(row: dict[str, Any]) -> str:
    low, high = row["psnr_interval"]
    return f"{row['psnr']:.1f} ({low:.1f} to {high:.1f})"


#: Ways of one kind, by the beginnings of their names; the first that fits.
GROUPS = {
    "few steps": ("diffusers-", "compile-", "openvino-", "ours-dense-5x ", "ours-dense-10x ", "ours-dense-20x "),
    "diffusers' caches": ("first-block", "taylorseer", "magcache"),
    "cache-dit": ("cache-dit",),
    "jitexport, temporal alone": ("ours-dense-",),
    "jitexport, temporal and spatial": ("ours-jit-", "ours-ralu-"),
    "jitexport, spatial alone": ("ours-", "bundle-", "plain-jit-"),
}
WIDTH = 1.5  # of a band of latencies: the longest over the shortest


def at_equal_latency(rows: list[dict[str, Any]], base: float) -> list[str]:
    """A table of what is closest to 50 steps among the ways of one kind that take about as long."""
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if "-50-" not in f"{row['name']}-":  # 50 steps are what others are measured by
            kind = next(g for g, starts in GROUPS.items() if f"{row['name']} ".startswith(starts))
            band = found.setdefault(math.floor(math.log(row["median"], WIDTH)), {})
            if kind not in band or band[kind]["psnr"] < row["psnr"]:
                band[kind] = row
    lines = [f"| seconds | times faster | {' | '.join(GROUPS)} |", "|---" * (len(GROUPS) + 2) + "|"]
    for band, best in sorted(found.items(), reverse=True):
        low, high = WIDTH**band, WIDTH ** (band + 1)
        cells = [
            f"{decibels(row)}: {row['name']}, {row['median']:.2f} s" if (row := best.get(group)) else ""
            for group in GROUPS
        ]
        lines.append(f"| {low:.2f} to {high:.2f} | {base / high:.1f} to {base / low:.1f} | {' | '.join(cells)} |")
    return lines


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Latency against likeness to the 50-step picture."""
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    figure, axis = plt.subplots(figsize=(11, 7), layout="constrained")
    groups = {"ours": "#08519c", "bundle": "#08519c", "plain": "#6baed6", "compile": "#e6550d", "cache": "#31a354"}
    groups |= {"first": "#31a354", "taylorseer": "#31a354", "magcache": "#31a354", "diffusers": "#636363"}
    groups |= {"openvino": "#756bb1"}
    for r in rows:
        if r["error"] or r["name"] == REFERENCE:
            continue
        colour = groups[r["name"].split("-")[0]]
        axis.plot([r["median"], r["p90"]], [r["psnr"]] * 2, color=colour, linewidth=1)
        axis.plot(r["median"], r["psnr"], "o", color=colour)
        axis.annotate(r["name"], (r["median"], r["psnr"]), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.margins(x=0.12)
    axis.grid(alpha=0.3)
    axis.set_xlabel("s from prompt to PNG, median (line: to the 90th percentile)")
    axis.set_ylabel("PSNR to the picture of 50 ordinary fp32 steps, dB")
    figure.draw_without_rendering()  # where labels are is known only then
    spread_labels(axis)
    figure.savefig(path, dpi=110)


def report(chosen: list[Contender], prompts: list[DemoPrompt], results: Results, folder: Path) -> None:
    judge = Judge.of(DemoData())
    rows = [summarise(c, results.read(c.name), prompts, results, judge) for c in chosen]
    command = shlex.join(["python", "scripts/bench/peers.py", *sys.argv[1:]])
    facts = conditions() | versions() | {"command": command}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "peers.json").write_text(json.dumps({"conditions": facts, "rows": rows}, indent=1) + "\n")
    (folder / "peers.md").write_text(markdown(rows, facts))
    picture(rows, folder / "peers.png")
    table = Table("", "median s", "p90 s", "PSNR dB", "pair")
    for r in sorted((r for r in rows if not r["error"]), key=lambda r: -r["median"]):
        table.add_row(r["what"], f"{r['median']:.3f}", f"{r['p90']:.3f}", f"{r['psnr']:.1f}", str(r["pair_right"]))
    out.print(table)
    err.print(f"wrote {folder}/peers.json, peers.md and peers.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16, help="an even number, at most 200")
    parser.add_argument("--seconds", type=float, default=160, help="begin no image after this time")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="repeatable; see --list")
    parser.add_argument("--bundle", type=Path, action="append", default=[], help="measure this one too; repeatable")
    parser.add_argument("--out", type=Path, default=Path("out/peers"), help="pieces and pictures")
    parser.add_argument("--report", type=Path, help="folder of the report; the pieces' by default")
    parser.add_argument("--list", action="store_true", help="print the contenders' names and stop")
    args = parser.parse_args()
    if not (2 <= args.prompts <= 200 and args.prompts % 2 == 0):
        parser.error(f"--prompts must be an even number from 2 to 200, not {args.prompts}")
    every = list(contenders(args.bundle))
    if args.list:
        for c in every:
            print(f"{c.name:28} {c.what}")
        return
    if unknown := set(args.only) - {c.name for c in every}:
        parser.error(f"no such contender: {', '.join(sorted(unknown))}; see --list")
    chosen = [c for c in every if not args.only or c.name in args.only or c.name == REFERENCE]

    prompts = DemoData().prompts(args.prompts)
    defaults = json.loads((DEMO_FOLDER / "jitexport.json").read_text(encoding="utf-8"))
    args.out.mkdir(parents=True, exist_ok=True)
    setting = Setting(DEMO_FOLDER, args.out, defaults)
    results = Results(args.out)
    until = time.monotonic() + args.seconds
    left = list(chosen)
    while left and time.monotonic() < until and measure(left[0], setting, prompts, results, until):
        left.pop(0)
    if left:
        err.print(f"{len(left)} contenders left, from {left[0].name} on: run the same command again")
        sys.exit(75)  # EX_TEMPFAIL: there is more to do
    report(chosen, prompts, results, args.report or args.out)


if __name__ == "__main__":
    main()
