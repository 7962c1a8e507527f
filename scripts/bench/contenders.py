"""Who takes part in `peers.py`: diffusers and what is built on it, a plain JiT loop, and this package's bundles."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import CPU, PROMPT
from PIL import Image

from jitexport import machine, registry
from jitexport.choice import choose
from jitexport.console import err, quiet_libraries

REFERENCE = "diffusers-50-fp32"
NFE = {4: 18, 7: 11}  # the published schedules
#: What is worth measuring: bf16 takes ten times as long and more where the CPU emulates it.
KINDS = ("fp32", "bf16") if machine.computes("bf16", CPU) else ("fp32",)
DTYPE = KINDS[-1]

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
    warmup_prompt: str = PROMPT


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
