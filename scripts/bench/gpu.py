"""FLUX.1-dev's transformer on a GPU, with random weights: what `gpu_report.py` measures, part by part."""

import dataclasses
import os
import shutil
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench.harness import repeated
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from jitexport import quant, registry
from jitexport.backends.aoti import PROGRAM, REGIONS, AOTInductorBackend
from jitexport.backends.base import Engine
from jitexport.backends.eager import as_engine
from jitexport.building.comparing import compare
from jitexport.console import err
from jitexport.graphs import CUDARecorder
from jitexport.models.sources import ModelSource, config_adapter, find_source
from jitexport.plan import Plan, plan
from jitexport.profile.measure import PeakMemory, copy_rate, matmul_rate, now, shortest
from jitexport.quant import quantize_linears
from jitexport.runtime import Condition, Pipeline
from jitexport.specs import DTYPES, EngineSpec

TINY = {
    "transformer": {
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": [4, 6, 6],
    },
    "settings": {"height": 192, "width": 128, "max_sequence_length": 16, "num_inference_steps": 50},
}


# --- the model ----------------------------------------------------------------------------------------------------


MODELS = {"flux": "FLUX.1-dev", "shallow": "FLUX.1-dev with 2 + 3 blocks", "tiny": "A tiny FLUX"}

#: As wide as FLUX.1-dev: its blocks are the same, and so are their engines.
SHALLOW = {"transformer": {"num_layers": 2, "num_single_layers": 3}, "settings": {}}


def source(config: str) -> ModelSource:
    """FLUX.1-dev as it is, or with a few of its blocks, or a tiny model of its kind that shows that everything runs."""
    flux = find_source("flux")
    changed = {"flux": {"transformer": {}, "settings": {}}, "shallow": SHALLOW, "tiny": TINY}[config]
    transformer = flux.configs["transformer"] | changed["transformer"]
    return dataclasses.replace(
        flux, configs=flux.configs | {"transformer": transformer}, settings=flux.settings | changed["settings"]
    )


@torch.no_grad()
def fill(module: nn.Module, device: torch.device) -> None:
    """Random weights on the device for a module on meta; norms keep their scale, so that activations stay finite."""
    module.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in module.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)


def has_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and "fp8" in quant.available(device)


# --- measuring ----------------------------------------------------------------------------------------------------


#: Orders in which PyTorch tries its attention kernels; its own where there is none.
ATTENTION = {
    "default": None,
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "flash": [SDPBackend.FLASH_ATTENTION],
}


def attention_by(kind: str) -> AbstractContextManager[None]:
    """Attention by a kind of kernel, in what is run and in what is compiled."""
    return nullcontext() if ATTENTION[kind] is None else sdpa_kernel(ATTENTION[kind])


class Bench:
    """The model on the device, and what is measured on it."""

    def __init__(self, config: str, device: torch.device, engine: str, repeats: int, engines: Path) -> None:
        self.device = device
        self.engine = engine
        self.engines = engines / config.replace("shallow", "flux")
        self.repeats = repeats
        self.source = source(config)
        self.dtype = torch.bfloat16

    @cached_property
    def adapter(self) -> Any:
        adapter = config_adapter(self.source, self.dtype)
        fill(adapter.components["transformer"], self.device)
        return adapter

    @property
    def transformer(self) -> Any:
        return self.adapter.components["transformer"]

    def timed(self, run: Callable[[], object], repeats: int) -> dict[str, float]:
        """Seconds of a run, after one that is not counted, and the most memory that the GPU held meanwhile."""
        run()
        memory = PeakMemory(self.device)
        found = dataclasses.asdict(repeated(run, repeats, self.device)) | {"repeats": repeats}
        return found if (peak := memory.gpu()) is None else found | {"peak_gb": peak / 1e9}

    # --- parts ---

    def ceilings(self) -> dict[str, float]:
        """What the chip does at best: matrix products and copies."""
        size = 2**31 if self.device.type == "cuda" else 2**26
        found = {"bf16_tflops": matmul_rate(self.dtype, self.device) / 1e12,
                 "copy_tbs": copy_rate(self.device, size) / 1e12}  # fmt: skip
        if has_fp8(self.device):
            found["fp8_tflops"] = self.fp8_rate() / 1e12
        rates = {kind: self.attention_rate(kind) for kind in ATTENTION}
        return found | {f"attention_{kind}_tflops": rate / 1e12 for kind, rate in rates.items() if rate is not None}

    def attention_rate(self, kind: str) -> float | None:
        """FLOP/s of PyTorch's attention at FLUX.1-dev's shapes; None where the device has no such kernel."""
        tokens, heads, channels = (4608, 24, 128) if self.device.type == "cuda" else (256, 4, 64)
        shape = (1, tokens, heads, channels)
        q, k, v = (torch.randn(shape, device=self.device, dtype=self.dtype).transpose(1, 2) for _ in range(3))
        try:
            with attention_by(kind), torch.inference_mode():
                seconds = shortest(lambda: F.scaled_dot_product_attention(q, k, v), self.device, 0.25)
        except RuntimeError:
            return None
        return 4 * tokens**2 * heads * channels / seconds

    def fp8_rate(self, n: int = 8192) -> float:
        x, w = (quant.quantize(torch.randn(n, n, device=self.device), "fp8") for _ in range(2))
        scale = w[1].T.contiguous()

        def product() -> Tensor:
            return torch._scaled_mm(
                x[0], w[0].T, scale_a=x[1], scale_b=scale, out_dtype=self.dtype, use_fast_accum=True
            )

        product()
        start = now(self.device)
        for _ in range(20):
            product()
        return 20 * 2 * n**3 / (now(self.device) - start)

    def diffusers(self, compiled: bool) -> dict[str, float]:
        """The ordinary denoising loop, 50 steps on diffusers' own transformer."""
        adapter, transformer, device = self.adapter, self.transformer, self.device
        config, geometry = transformer.config, adapter.geometry
        text = geometry.text_tokens
        rows, columns = geometry.grid.shape
        ids = torch.zeros(rows, columns, 3, device=device, dtype=self.dtype)
        ids[..., 1] += torch.arange(rows, device=device)[:, None]
        ids[..., 2] += torch.arange(columns, device=device)
        fixed = {
            "guidance": torch.full([1], 3.5, device=device) if config.guidance_embeds else None,
            "pooled_projections": torch.randn(1, config.pooled_projection_dim, device=device, dtype=self.dtype),
            "encoder_hidden_states": torch.randn(1, text, config.joint_attention_dim, device=device, dtype=self.dtype),
            "txt_ids": torch.zeros(text, 3, device=device, dtype=self.dtype),
            "img_ids": ids.flatten(0, 1),
            "return_dict": False,
        }
        steps = adapter.defaults.num_inference_steps
        sigmas = adapter.native_sigmas(steps)
        times = torch.tensor(sigmas, device=device, dtype=self.dtype)
        if compiled:
            transformer.compile_repeated_blocks(dynamic=False)

        @torch.inference_mode()
        def loop() -> None:
            y = torch.randn(1, geometry.grid.tokens, geometry.channels, device=device, dtype=self.dtype)
            for i in range(steps):
                velocity = transformer(hidden_states=y, timestep=times[i : i + 1], **fixed)[0]
                y = (y.float() + (sigmas[i + 1] - sigmas[i]) * velocity.float()).to(self.dtype)

        try:
            return self.timed(loop, max(1, self.repeats // 2))
        finally:
            for module in transformer.modules():
                module._compiled_call_impl = None

    def ours(self, speedup: float, graphs: bool, fp8: bool = False) -> dict[str, Any]:
        """This package's denoising loop, and its engines alone, each run as often as the loop runs it."""
        if fp8 and not any(isinstance(m, quant.QuantizedLinear) for m in self.transformer.modules()):
            quantize_linears(self.transformer, "fp8", self.adapter.quantized)
        made = plan(self.adapter, speedup=speedup)
        pipe = self.pipeline(made, graphs)
        with torch.inference_mode():
            condition = self.condition(pipe)
            draws = pipe.draw([torch.Generator().manual_seed(0)]).each(lambda t: t.to(self.device))
            found: dict[str, Any] = self.timed(lambda: pipe.denoise(condition, draws), self.repeats)
            engines = 0.0
            for stage in made.schedule.stages:
                step = self.engine_seconds(pipe, stage.name, condition, graphs)
                found[f"{stage.name}_ms"] = step * 1e3
                found[f"{stage.name}_error"] = self.engine_error(pipe, stage.name, condition)
                engines += stage.steps * step
        level = None if pipe.graph is None else pipe.graph.level
        return found | {
            "engines": engines,
            "around_engines": found["median"] / engines - 1,
            "graphs": level,
            "tflop": made.tflops,
            "tflops": made.tflops / found["median"],
            "predicted_speedup": made.predicted_speedup,
        }

    def pipeline(self, made: Plan, graphs: bool) -> Pipeline:
        adapter = self.adapter
        specs = adapter.specs(made.schedule, 1, "bf16")
        engines = {s.name: self.open(s) for s in specs if s.name == "condition" or s.name.startswith("stage")}
        return Pipeline(
            engines=engines,
            method=registry.method(made.method)(adapter.geometry.grid, made.options, adapter.geometry.patch),
            schedule=made.schedule,
            geometry=adapter.geometry,
            defaults=adapter.defaults,
            readers=[],
            batch_size=1,
            dtype=self.dtype,
            device=self.device,
            cuda_graphs=graphs,
        )

    def open(self, spec: EngineSpec) -> Engine:
        """An engine; what it has no library for is compiled. Conditions are made once for an image, and run eagerly."""
        module = self.adapter.module(spec.name)
        if spec.name == "condition" or self.engine == "eager":
            return Engine(spec, as_engine(module), self.device)
        if self.engine == "blocks":
            compile_blocks([module])
            return Engine(spec, as_engine(module), self.device)
        weights = dict(self.adapter.tensors())
        kinds = "fp8" if any(t.dtype == torch.float8_e4m3fn for t in weights.values()) else "bf16"
        folder = self.engines / f"{spec.inputs[0].shape[1]}-tokens-{kinds}"
        build_regions(spec, module, example(spec, self.device), folder)
        raw = AOTInductorBackend().load(spec, folder, weights, lambda: module, self.device)
        return Engine(spec, raw, self.device)

    def condition(self, pipe: Pipeline) -> Condition:
        """Of random embeddings."""
        engine = pipe.engines["condition"]
        known = {"sigmas": torch.tensor(pipe.schedule.sigmas[:-1]), "guidance": torch.full((1,), 3.5)}
        given = [known.get(s.name, torch.randn(s.shape, dtype=self.dtype)).to(self.device) for s in engine.spec.inputs]
        return Condition.of(engine.spec, engine(*given))

    def engine_inputs(self, pipe: Pipeline, name: str, condition: Condition) -> list[Tensor]:
        """Of a condition, with random tokens."""
        spec = pipe.engines[name].spec
        known = {**{name: value[0] for name, value in condition.per_step.items()}, **condition.static}
        given = example(spec, self.device)
        return [known.get(s.name, value) for s, value in zip(spec.inputs, given, strict=True)]

    def engine_error(self, pipe: Pipeline, name: str, condition: Condition) -> float:
        """Of an engine, relative to the eager module."""
        given = self.engine_inputs(pipe, name, condition)
        return compare(pipe.engines[name](*given), as_engine(self.adapter.module(name))(given))[0]

    def engine_seconds(self, pipe: Pipeline, name: str, condition: Condition, graphs: bool) -> float:
        """Seconds of one run of an engine among runs of nothing else."""
        engine, given = pipe.engines[name], self.engine_inputs(pipe, name, condition)
        run: Callable[[], object] = lambda: engine(*given)[0]  # noqa: E731
        if graphs and self.device.type == "cuda":
            run, _ = CUDARecorder(self.device).record(run)
        run()
        seconds = []
        for _ in range(3):
            start = now(self.device)
            for _ in range(5):
                run()
            seconds.append((now(self.device) - start) / 5)
        return statistics.median(seconds)


def example(spec: EngineSpec, device: torch.device) -> list[Tensor]:
    """Random inputs of an engine."""
    return [torch.randn(s.shape, device=device).to(DTYPES[s.dtype]) for s in spec.inputs]


def build_regions(spec: EngineSpec, module: nn.Module, given: list[Tensor], folder: Path) -> None:
    """An AOTInductor engine of regions; libraries that the folder has are kept, and its program is made anew."""
    backend = AOTInductorBackend(regional=True)
    made = backend.outline(spec, module, given)
    assert made is not None
    for name, kind in made.kinds.items():
        library = folder / REGIONS / name
        if not library.is_dir():
            err.print(f"compiling {name} for {given[0].shape[1]} tokens")
            scratch = folder / f".{name}-{os.getpid()}"
            backend.compile(f"{spec.name} (region {name})", kind, kind.example(), scratch)
            library.parent.mkdir(exist_ok=True)
            with suppress(OSError):  # another process was first
                scratch.rename(library)
            shutil.rmtree(scratch, ignore_errors=True)
    (folder / PROGRAM).write_text(made.program.model_dump_json(exclude_defaults=True))


def compile_blocks(modules: list[nn.Module]) -> None:
    """Compile the repeated blocks of stage modules: once for each shape and kind of block, not for each block."""
    torch._dynamo.config.recompile_limit = 64
    for module in modules:
        for name in getattr(module, "regions", ()):
            setattr(module, name, torch.compile(getattr(module, name), dynamic=False))
