"""The same model run in other ways, for comparison: diffusers, and this package's schedule without compiling."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from jitexport.errors import InputError
from jitexport.profile.measure import PeakMemory
from jitexport.profile.phases import Profile, chrome_trace, engine_flops
from jitexport.profile.rounds import CallWay, PipelineWay, Way, profile_ways
from jitexport.quant import unquantized
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


def profile_bundles(
    bundles: Sequence[Path], prompt: str, *, repeats: int, peers: Sequence[str] = (), trace: Path | None = None,
    status: Callable[[str], None] = lambda text: None,
) -> list[Profile]:  # fmt: skip
    """Profiles of peers and, last in the list, of bundles, measured in turns; ratios are to the first of the list.

    The first bundle is opened before anything else, so that its memory is its own. That of the others is not known.

    Args:
        bundles: directories; one at least.
        repeats: rounds, after one that does not count.
        trace: file for a Chrome trace of one image of the last bundle.
        status: told what is being done.

    Raises:
        InputError: no such peer, bundles that cannot be compared, or their model is not at hand.
    """
    from jitexport import runtime
    from jitexport.bundle.reading import read_manifest

    manifests = {path: read_manifest(path) for path in bundles}
    check_comparable(manifests)
    names = distinct_names(bundles)
    ours: list[PipelineWay] = []
    memory: dict[str, int | None] = {}
    for path, manifest in manifests.items():
        status(f"opening {path}")
        ours.append(pipeline_way(runtime.load(path), names[path], bundle_title(manifest), manifest, prompt))
        if not memory:
            counter = PeakMemory(ours[0].pipe.device)
            ours[0].run(0, counted=False)
            memory = counter.peak()
    if trace is not None:
        status("tracing")
        chrome_trace(ours[-1].pipe, prompt, trace)
    others: dict[tuple[str, ...], Way] = {}
    for peer in peers:
        for path, manifest in manifests.items():
            if (key := peer_key(peer, manifest)) not in others:
                status(f"opening {peer}: {PEERS[peer]}")
                others[key] = peer_way(peer, manifest, prompt, names[path])
    profiles = profile_ways([*others.values(), *ours], repeats=repeats, status=status)
    profiles[len(others)] = replace(profiles[len(others)], peak_memory=memory)
    return profiles


def check_comparable(manifests: Mapping[Path, Manifest]) -> None:
    """Whether bundles make the same images, as many at once, on one kind of device.

    Raises:
        InputError: they do not.
    """
    (first, wanted), *others = ((path, _comparable(manifest)) for path, manifest in manifests.items())
    for path, found in others:
        for what in wanted:
            if found[what] != wanted[what]:
                raise InputError(
                    f"bundles that differ in {what} cannot be measured in turns",
                    found=str(path), expected=f"the {what} of {first}", remedy="profile them one by one",
                )  # fmt: skip


def _comparable(manifest: Manifest) -> dict[str, object]:
    """What bundles must have in common; of the model what is not an engine's own."""
    settings = unquantized(manifest.model.settings) | {"features": None}
    return {
        "model": (manifest.model.source, settings), "size": manifest.geometry, "batch": manifest.batch,
        "device": manifest.host.device,
    }  # fmt: skip


def distinct_names(bundles: Sequence[Path]) -> dict[Path, str]:
    """What reports call bundles: nothing where there is one, else their folders' names, or whole paths.

    Raises:
        InputError: one is named twice.
    """
    if len(set(bundles)) < len(bundles):
        raise InputError("a bundle is named twice", found=", ".join(map(str, bundles)), remedy="name each one once")
    if len(bundles) == 1:
        return {bundles[0]: ""}
    short = len({path.name for path in bundles}) == len(bundles)
    return {path: path.name if short else str(path) for path in bundles}


def bundle_title(manifest: Manifest) -> str:
    """A bundle's method, backend and precision."""
    return f"{manifest.method.name}, {manifest.backend} {manifest.precision}"


def pipeline_way(pipe: Pipeline, name: str, title: str, manifest: Manifest, prompt: str) -> PipelineWay:
    """A pipeline of a bundle's schedule; `name` is the bundle's, where there are several."""
    schedule = manifest.schedule
    return PipelineWay(
        pipe, f"{name}: {title}" if name else title, prompt, flops=engine_flops(manifest),
        speedup=(schedule.reference_steps, schedule.predicted_speedup),
    )  # fmt: skip


def peer_key(peer: str, manifest: Manifest) -> tuple[str, ...]:
    """What tells two runs of a peer apart: bundles with the same key have it in common."""
    parts: dict[str, tuple[object, ...]] = {
        "diffusers": (manifest.schedule.reference_steps,),
        "compile": (manifest.schedule.reference_steps, manifest.dtype),
        "few-step": (len(manifest.schedule.schedule().computed), manifest.dtype),
        "eager": (manifest.method, manifest.schedule, manifest.cache),
    }
    return peer, *(repr(part) for part in parts.get(peer, ()))


def peer_way(peer: str, manifest: Manifest, prompt: str, name: str = "") -> Way:
    """One of `PEERS` on a bundle's model, at its image size and batch.

    Args:
        name: the bundle's, for the label of what runs its own schedule.

    Raises:
        InputError: no such peer, or the bundle's model is not at hand.
    """
    schedule, dtype = manifest.schedule, manifest.dtype
    if peer == "diffusers":
        return diffusers_way(manifest, prompt, steps=schedule.reference_steps, dtype="fp32")
    if peer == "compile":
        return diffusers_way(manifest, prompt, steps=schedule.reference_steps, dtype=dtype, compiled=True)
    if peer == "few-step":
        return diffusers_way(manifest, prompt, steps=len(schedule.schedule().computed), dtype=dtype)
    if peer == "eager":
        title = f"{manifest.method.name}, eager fp32"
        return pipeline_way(eager_bundle(manifest, "fp32"), name, title, manifest, prompt)
    raise InputError("unknown peer", found=peer, expected=", ".join(PEERS))


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


def diffusers_way(manifest: Manifest, prompt: str, *, steps: int, dtype: str, compiled: bool = False) -> CallWay:
    """The model's own diffusers pipeline; compiling falls into its first batch.

    Raises:
        InputError: the bundle's model is not at hand.
    """
    pipe = diffusers_pipeline(manifest, dtype, compiled=compiled)
    batch = manifest.batch

    def call(seed: int) -> Sequence[Image.Image]:
        images: Sequence[Image.Image] = diffusers_call(
            pipe, manifest, [prompt] * batch, range(seed, seed + batch), steps
        )
        return images

    label = f"diffusers, {steps} steps, {'torch.compile' if compiled else 'eager'} {dtype}"
    return CallWay(call, label, torch.device(manifest.host.device))


def eager_bundle(manifest: Manifest, dtype: str) -> Pipeline:
    """The bundle's own schedule, methods and stage modules, not compiled and without quantization.

    Raises:
        InputError: the bundle's model is not at hand.
    """
    from jitexport.building.reference import eager_pipeline
    from jitexport.models.sources import ModelSource, load_adapter

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
