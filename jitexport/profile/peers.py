"""The same model run in other ways, for comparison: diffusers, and this package's schedule without compiling."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from jitexport.errors import InputError
from jitexport.profile.phases import Profile, chrome_trace, engine_flops, profile_call, profile_pipeline
from jitexport.specs import DTYPES

if TYPE_CHECKING:
    from jitexport.bundle.manifest import Manifest
    from jitexport.runtime import Pipeline

#: What `--against` takes, and what it is.
PEERS: dict[str, str] = {
    "diffusers": "the ordinary pipeline, eager, fp32",
    "compile": "the ordinary pipeline with a torch.compile'd transformer, in the bundle's dtype",
    "few-step": "the ordinary pipeline with as many steps as the bundle computes, eager, in the bundle's dtype",
    "eager": "the bundle's own schedule and modules, not compiled, fp32",
}


def parse_peers(text: str) -> list[str]:
    """Names of `PEERS` from comma-separated text; empty for none.

    Raises:
        InputError: there is another name.
    """
    peers = [p for p in text.split(",") if p]
    if wrong := set(peers) - set(PEERS):
        raise InputError("unknown peer", found=", ".join(sorted(wrong)), expected=", ".join(PEERS))
    return peers


def profile_bundle(
    pipe: Pipeline, manifest: Manifest, prompt: str, *, repeats: int, peers: Sequence[str] = (),
    trace: Path | None = None, status: Callable[[str], None] = lambda text: None,
) -> list[Profile]:
    """Profiles of peers and, last in the list, of a bundle; that one is measured first, so that its memory is its own.

    Args:
        pipe, manifest: the bundle's.
        repeats: of peers at most 3.
        trace: file for a Chrome trace of one image.
        status: told what is being done.

    Raises:
        InputError: no such peer, or the bundle's model is not at hand.
    """
    schedule = manifest.schedule
    status("measuring the bundle")
    label = f"{manifest.method.name}, {manifest.backend} {manifest.precision}"
    measured = profile_pipeline(
        pipe, label, prompt, flops=engine_flops(manifest), repeats=repeats,
        speedup=(schedule.reference_steps, schedule.predicted_speedup),
    )  # fmt: skip
    if trace is not None:
        status("tracing")
        chrome_trace(pipe, prompt, trace)
    profiles = []
    for peer in peers:
        status(f"measuring {peer}: {PEERS[peer]}")
        profiles.append(measure_peer(peer, manifest, prompt, repeats=min(repeats, 3)))
    return [*profiles, measured]


def measure_peer(peer: str, manifest: Manifest, prompt: str, *, repeats: int) -> Profile:
    """Measure one of `PEERS` on a bundle's model, at its image size and batch.

    Raises:
        InputError: no such peer, or the bundle's model is not at hand.
    """
    schedule, dtype = manifest.schedule, manifest.dtype
    run: dict[str, Callable[[], Profile]] = {
        "diffusers": lambda: diffusers_profile(
            manifest, prompt, steps=schedule.reference_steps, dtype="fp32", repeats=repeats
        ),
        "compile": lambda: diffusers_profile(
            manifest, prompt, steps=schedule.reference_steps, dtype=dtype, compiled=True, repeats=repeats
        ),
        "few-step": lambda: diffusers_profile(
            manifest, prompt, steps=len(schedule.schedule().computed), dtype=dtype, repeats=repeats
        ),
        "eager": lambda: eager_profile(manifest, prompt, dtype="fp32", repeats=repeats),
    }
    if peer not in run:
        raise InputError("unknown peer", found=peer, expected=", ".join(PEERS))
    return run[peer]()


def diffusers_pipeline(manifest: Manifest, dtype: str, *, compiled: bool = False) -> Any:
    """The model's own diffusers pipeline on the bundle's device; its transformer compiles at the first call.

    Raises:
        InputError: the bundle's model is not at hand.
    """
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(model_folder(manifest), dtype=DTYPES[dtype]).to(manifest.host.device)
    pipe.set_progress_bar_config(disable=True)
    if compiled:
        pipe.transformer.compile(dynamic=False)
    return pipe


def diffusers_call(pipe: Any, manifest: Manifest, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> Any:
    """Images from a diffusers pipeline as the bundle would make them: its size, text length and guidance."""
    geometry, defaults = manifest.geometry, manifest.defaults
    known = inspect.signature(pipe.__call__).parameters
    wanted = {
        "max_sequence_length": defaults.max_sequence_length,
        "num_frames": geometry.frames,
        "guidance_scale": defaults.guidance.scale or 0.0,
    }
    images = pipe(
        list(prompts),
        height=geometry.height,
        width=geometry.width,
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        **{name: value for name, value in wanted.items() if name in known and value is not None},
    )
    return images.images if geometry.frames is None else images.frames


def diffusers_profile(
    manifest: Manifest, prompt: str, *, steps: int, dtype: str, compiled: bool = False, repeats: int
) -> Profile:
    """The model's own diffusers pipeline; compiling falls into the warm-up.

    Raises:
        InputError: the bundle's model is not at hand.
    """
    pipe = diffusers_pipeline(manifest, dtype, compiled=compiled)
    batch = manifest.batch

    def call(seed: int) -> Sequence[Image.Image]:
        return diffusers_call(pipe, manifest, [prompt] * batch, range(seed, seed + batch), steps)

    label = f"diffusers, {steps} steps, {'torch.compile' if compiled else 'eager'} {dtype}"
    return profile_call(call, label, repeats=repeats)


def eager_bundle(manifest: Manifest, dtype: str) -> Pipeline:
    """The bundle's own schedule, methods and stage modules, not compiled and without quantization.

    Raises:
        InputError: the bundle's model is not at hand.
    """
    from jitexport.building.reference import eager_pipeline
    from jitexport.models.sources import ModelSource, load_adapter
    from jitexport.quant import unquantized

    source = ModelSource(manifest.model.name, folder=model_folder(manifest))
    adapter = load_adapter(source, DTYPES[dtype], unquantized(manifest.model.settings))
    return eager_pipeline(
        adapter,
        manifest.schedule.schedule(),
        manifest.method.name,
        manifest.method.options,
        batch=manifest.batch,
        dtype=dtype,
        device=torch.device(manifest.host.device),
        cache=manifest.temporal,
    )


def eager_profile(manifest: Manifest, prompt: str, *, dtype: str, repeats: int) -> Profile:
    """`eager_bundle`, measured.

    Raises:
        InputError: the bundle's model is not at hand.
    """
    schedule = manifest.schedule
    return profile_pipeline(
        eager_bundle(manifest, dtype),
        f"{manifest.method.name}, eager {dtype}",
        prompt,
        flops=engine_flops(manifest),
        speedup=(schedule.reference_steps, schedule.predicted_speedup),
        repeats=repeats,
    )


def model_folder(manifest: Manifest) -> Path:
    """The diffusers folder that a bundle was built from.

    Raises:
        InputError: it is not on this machine.
    """
    from jitexport.models.sources import download, find_source

    source = find_source(manifest.model.source)
    folder = source.folder or download(source)
    if not folder.is_dir():
        raise InputError("the bundle's model is not at hand", found=manifest.model.source)
    return folder
