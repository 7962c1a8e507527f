"""The command line. Data goes to stdout, everything else to stderr; exit codes come from `jitexport.errors`."""

from __future__ import annotations

import json
import logging
import shlex
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from jitexport import causes, interrupts, registry
from jitexport._version import __version__
from jitexport.console import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Table,
    TimeElapsedColumn,
    TimeRemainingColumn,
    echo,
    err,
    out,
    prepare_streams,
    text_column,
)
from jitexport.errors import InputError, JitExportError, OutputError
from jitexport.files import (
    DISK_ERRORS,
    check_writable,
    check_writable_folder,
    nearest_folder,
    temporary_folder,
    write_file,
)
from jitexport.png import encode_png

app = typer.Typer(
    name="jitexport",
    help="Training-free spatial acceleration of diffusion transformers, compiled into prebuilt engines.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Directory of a built bundle.")]
Model = Annotated[
    str,
    typer.Option(help=f"A registered model ({', '.join(registry.MODELS)}), a diffusers folder, a file, or a hub id."),
]
Base = Annotated[
    str | None,
    typer.Option(help="For a model in one .safetensors file: the folder or model that everything else comes from."),
]
Speedup = Annotated[
    float, typer.Option(min=1, max=20, help="Denoising speed-up over the model's usual steps, 1 to 20.")
]
Steps = Annotated[str | None, typer.Option(help="Custom schedule: steps per stage, as 7,4,7.")]
Ratios = Annotated[str | None, typer.Option(help="Custom schedule: token ratios per stage, as 0.35,0.62,1.")]
Method = Annotated[str, typer.Option(help=f"Acceleration method: {', '.join(registry.METHODS)}.")]
Preset = Annotated[
    str | None, typer.Option(help="The method's settings by name: default, paper, ...; another name lists them.")
]
Cache = Annotated[
    str | None,
    typer.Option(
        help=f"Temporal method: {', '.join(registry.CACHES)}; with options as taylor:order=2, taylorseer:every=7, or "
        "reuse:computed=0+1+4."
    ),
]
Height = Annotated[int | None, typer.Option(min=1, help="Image height in pixels; the model's usual one by default.")]
Width = Annotated[int | None, typer.Option(min=1, help="Image width in pixels; the model's usual one by default.")]
Frames = Annotated[int | None, typer.Option(min=1, help="Frames of a video; the model's usual number by default.")]
TextTokens = Annotated[
    int | None, typer.Option(min=1, help="Length of the text sequence; the model's usual one by default.")
]


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a command and turns this package's errors and signals into a message and an exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    if argv is None:  # a process of its own
        prepare_streams()
        interrupts.adopt_orphans()
    with interrupts.watched():
        try:
            code = _run(argv)
        except interrupts.Interrupted as stop:  # between the command and its end
            code = _interrupted(stop.number)
    sys.exit(code)


def _run(argv: Sequence[str] | None) -> int | str | None:
    """A command's exit code, after its message."""
    try:
        with causes.explained("running the command"):
            interrupts.check()  # what came before, and was dropped
            app(args=list(argv) if argv is not None else None, standalone_mode=True)
    except SystemExit as end:
        code = end.code
    except JitExportError as error:
        if interrupts.caught() is None:  # else it is what a compiler said when the signal reached it
            err.print(f"error: {error}", style="red", soft_wrap=True)
        code = error.exit_code
    except (interrupts.Interrupted, KeyboardInterrupt):
        code = 128 + signal.SIGINT
    except Exception as error:
        if interrupts.caught() is None:
            if not isinstance(error, OSError) or error.errno not in DISK_ERRORS:
                raise
            what = "  remedy:   free space, or write elsewhere"
            err.print(f"error: cannot write\n  found:    {error}\n{what}", style="red", soft_wrap=True)
        code = OutputError.exit_code
    number = interrupts.caught()
    return code if number is None else _interrupted(number)


def _interrupted(number: int) -> int:
    """The exit code of a signal, after its word."""
    interrupts.ignore()
    interrupts.end_children()
    err.print("interrupted")
    return 128 + number


def _version(value: bool) -> None:
    if value:
        echo(f"jitexport {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _custom(steps: str | None, ratios: str | None) -> Any:
    from jitexport.plan import parse_custom

    if steps is None and ratios is not None:
        raise InputError("--ratios needs --steps", remedy="for example --steps 7,4,7 --ratios 0.35,0.62,1")
    return parse_custom(steps, ratios) if steps is not None else None


def _settings(
    height: int | None, width: int | None, frames: int | None, text_tokens: int | None
) -> dict[str, Any]:
    return {"height": height, "width": width, "frames": frames, "max_sequence_length": text_tokens}


def _tera(tflops: float) -> str:
    """TFLOPs with three significant digits: 0.0123, 74.4, 899, 3719."""
    return f"{tflops:.0f}" if tflops >= 100 else f"{tflops:.3g}"


def _quiet_libraries() -> None:
    """Keep the libraries that read models from writing banners and bars between our lines."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|copyreg")
    for name in ("diffusers", "transformers", "torch._inductor", "torch.utils.flop_counter"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging
    except ImportError:
        return  # reported by whatever needs them
    for module in (diffusers_logging, transformers_logging):
        module.set_verbosity_error()
        module.disable_progress_bar()


class _BuildProgress:
    """Progress of a build on stderr: a bar on a terminal, a line per step elsewhere."""

    def __init__(self) -> None:
        self._bar = Progress(
            SpinnerColumn(),
            text_column("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=err,
        )
        self._task = self._bar.add_task("build")
        self._steps: list[str] = []
        self._done: dict[str, float] = {}
        self._since = time.monotonic()

    def __enter__(self) -> _BuildProgress:
        if err.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, steps: Sequence[str]) -> None:
        self._steps = list(steps)
        self._bar.update(self._task, total=len(self._steps))

    def step(self, name: str) -> None:
        interrupts.check()
        index = self._steps.index(name)
        left = self._estimate(index)
        self._bar.update(self._task, completed=index, description=f"{name}{left}")
        if not err.is_terminal:
            err.print(f"[{index + 1}/{len(self._steps)}] {name}{left}")
        self._done[name] = time.monotonic()

    def note(self, text: str) -> None:
        err.print(text, markup=False, highlight=False, soft_wrap=True)

    def _estimate(self, index: int) -> str:
        """Time left, from the engines that are done: they take most of it, and about the same each."""
        starts = [t for name, t in self._done.items() if name.startswith("engine")]
        if not starts:
            return ""
        each = (time.monotonic() - starts[0]) / len(starts)
        engines = sum(name.startswith("engine") for name in self._steps[index:])
        return f", about {each * engines:.0f} s left" if engines else ""


@app.command()
def build(
    model: Model = "demo",
    base: Base = None,
    speedup: Speedup = 4,
    backend: Annotated[str, typer.Option(help=f"Engine backend: auto, {', '.join(registry.BACKENDS)}.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Of weights and engines: bf16 or fp32; auto is bf16 where the processor computes in it.")
    ] = "auto",
    quant: Annotated[
        str | None, typer.Option(help="8-bit linear layers: int8 or fp8; weights are quantized here.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per engine run.")] = 1,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Bundle directory; engines/MODEL-SPEEDUPx by default.")
    ] = None,
    method: Method = "jit",
    preset: Preset = None,
    cache: Cache = None,
    calibration: Annotated[
        Path | None, typer.Option(help="The cache with the steps that `jitexport calibrate` wrote to this file.")
    ] = None,
    steps: Steps = None,
    ratios: Ratios = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    text_tokens: TextTokens = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; auto is cuda where torch can use a GPU.")] = "auto",
    passes: Annotated[
        int | None,
        typer.Option(
            min=1, max=2, help="A prompt and its negative prompt: 1 after the other, or 2 at once; for models that are "
            "usually guided so the faster one by default."
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Build for another machine's GPU, as sm_89 (--backend tensorrt).")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="store copies the weights; reference points at the model's own files by digest.")
    ] = "store",
    jobs: Annotated[
        int | None, typer.Option(help="Processes that compile at once; by default as cores and memory allow.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    as_json: Json = False,
) -> None:
    """Turn a model and a speed-up into an engine bundle."""
    custom = _custom(steps, ratios)
    with temporary_folder(nearest_folder(output or Path("engines"))), _BuildProgress() as progress:
        _quiet_libraries()  # imports libraries, some of which look for a temporary folder at once
        from jitexport.build import build as build_bundle

        result = build_bundle(
            model,
            base=base,
            output=output,
            speedup=speedup,
            custom=custom,
            method=method,
            preset=preset,
            cache=cache,
            calibration=calibration,
            backend=backend,
            dtype=dtype,
            batch=batch,
            device=device,
            target=target,
            settings=_settings(height, width, frames, text_tokens),
            weights=weights,
            replace=force,
            jobs=jobs,
            quantization=quant,
            passes=passes,
            command=["jitexport", *sys.argv[1:]],
            progress=progress,
        )
    manifest = result.manifest
    if as_json:
        echo(
            json.dumps({"bundle": str(result.path), "bytes": manifest.size, "seconds": round(result.seconds, 1)})
        )
        return
    errors = [e.relative_error for e in manifest.engines if e.relative_error is not None]
    checked = f"relative error of the engines at most {max(errors):.1g}" if errors else "engines not run here"
    out.print(
        f"built {result.path}: {len(manifest.engines)} engines, {manifest.size / 1e6:.1f} MB, "
        f"{result.seconds:.0f} s, predicted speed-up {manifest.schedule.predicted_speedup:.2f}x, {checked}",
        soft_wrap=True,
    )
    out.print(
        f'next: jitexport generate {shlex.quote(str(result.path))} "{_example_prompt(manifest)}" '
        f"-o {'image.png' if manifest.geometry.frames is None else 'video.mp4'}",
        soft_wrap=True,
    )


def _frames(geometry: Any) -> str:
    return "" if geometry.frames is None else f"{geometry.frames} frames, "


def _example_prompt(manifest: Any) -> str:
    return "red apple on a blue background" if manifest.model.name == "demo" else "a red fox in the snow"


@app.command()
def plan(
    model: Model = "demo",
    base: Base = None,
    speedup: Speedup = 4,
    method: Method = "jit",
    preset: Preset = None,
    cache: Cache = None,
    steps: Steps = None,
    ratios: Ratios = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    text_tokens: TextTokens = None,
    as_json: Json = False,
) -> None:
    """Print the schedule for a speed-up without building: stages, steps, tokens, TFLOPs."""
    custom = _custom(steps, ratios)
    _quiet_libraries()
    import torch

    from jitexport.build import schedule_entry
    from jitexport.models.sources import config_adapter, find_source
    from jitexport.plan import DISTILLED_STEPS
    from jitexport.plan import plan as make_plan
    from jitexport.schedule import COMPUTED

    adapter = config_adapter(find_source(model, base), torch.float32, _settings(height, width, frames, text_tokens))
    made = make_plan(adapter, speedup=speedup, custom=custom, method=method, preset=preset, cache=cache)
    if as_json:
        echo(schedule_entry(made).model_dump_json())
        return
    geometry, full = adapter.geometry, made.cost(made.grid_tokens) / 1e12
    guided = made.passes == 2 or (adapter.defaults.guidance.true or 0) > 1
    times = {2: ", two a step with classifier-free guidance", 1: ", two a step with a negative prompt"}
    err.print(
        f"{model}: {geometry.height} x {geometry.width} pixels, {_frames(geometry)}{made.grid_tokens} image tokens, "
        f"{geometry.text_tokens} text tokens; full pass {_tera(full / made.passes)} TFLOP"
        f"{times[made.passes] if guided else ''}",
        soft_wrap=True,
    )

    def counted(actions: Sequence[str]) -> str:
        """Steps, and with a cache how many are computed."""
        return str(len(actions)) if made.cache is None else f"{len(actions)} ({actions.count(COMPUTED)})"

    table = Table("stage", "steps", "tokens", "share", "TFLOP/step", "TFLOP", "sigma from", "to")
    for stage, runs in groupby(made.schedule, key=lambda run: run[0].index):  # stages in a row on one engine
        stages, steps_of_stages = zip(*runs, strict=True)
        tokens = stages[0].tokens
        actions = [step.action for steps in steps_of_stages for step in steps]
        table.add_row(
            str(stage),
            counted(actions),
            str(tokens),
            f"{tokens / made.grid_tokens:.0%}",
            _tera(made.cost(tokens) / 1e12),
            _tera(sum(made.costs[action](tokens) for action in actions) / 1e12),
            f"{steps_of_stages[0][0].sigma:.3f}",
            f"{steps_of_stages[-1][-1].sigma_next:.3f}",
        )
    table.add_section()
    if made.preview:
        table.add_row("preview", "", "", "", "", _tera(made.preview / 1e12), "", "")
    actions = [step.action for _, steps in made.schedule for step in steps]
    table.add_row("all", counted(actions), "", "", "", _tera(made.tflops), "", "")
    out.print(table)
    if made.cache is not None:
        computed = ", ".join(map(str, made.schedule.computed))
        out.print(f"computed steps, in brackets: {computed}; the others: {_others(made)}", soft_wrap=True)
    distilled = f", {made.over(50):.1f}x over 50" if made.reference_steps <= DISTILLED_STEPS else ""
    out.print(
        f"predicted speed-up {made.predicted_speedup:.2f}x over {made.reference_steps} full steps "
        f"({_tera(made.reference_tflops)} TFLOP){distilled}",
        soft_wrap=True,
    )


def _others(made: Any) -> str:
    """What the steps that are not computed do, and what one of them costs at all tokens."""
    from jitexport.schedule import COMPUTED

    said = [
        f"{count} {action}, {_tera(made.costs[action](made.grid_tokens) / 1e12)} TFLOP each at all tokens"
        for action, count in Counter(made.schedule.actions).items() if action != COMPUTED
    ]
    return f"{made.cache.name}: {'; '.join(said) or 'none'}"


@app.command()
def calibrate(
    model: Model = "demo",
    base: Base = None,
    cache: Annotated[
        str, typer.Option(help="A temporal method that decides while it runs, with options: teacache:threshold=0.6.")
    ] = "teacache",
    speedup: Speedup = 1,
    method: Method = "jit",
    preset: Preset = None,
    steps: Steps = None,
    ratios: Ratios = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    text_tokens: TextTokens = None,
    prompts: Annotated[
        Path | None, typer.Option(help="One prompt a line, or GenEval's .jsonl; captions of the demo model, or ours.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Take that many prompts.")] = 16,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32; auto is bf16 where the processor computes in it.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda; auto is cuda where torch can use a GPU.")] = "auto",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File for what was found, for `build --calibration`.")
    ] = Path("calibration.json"),
    as_json: Json = False,
) -> None:
    """Run a cache that decides by data, uncompiled, over prompts, and write down which steps it computes."""
    check_writable(output)
    custom = _custom(steps, ratios)
    _quiet_libraries()
    from jitexport.calibration import calibrate_model

    with Progress(text_column("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                  TimeRemainingColumn(), console=err) as bar:
        task = bar.add_task("images", total=limit)
        found = calibrate_model(
            model, base, cache, prompts=prompts, limit=limit, speedup=speedup, custom=custom, method=method,
            preset=preset, dtype=dtype, device=device, settings=_settings(height, width, frames, text_tokens),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    found.write(output)
    if as_json:
        echo(json.dumps(asdict(found)))
        return
    table = Table("images", "compute these steps")
    for text, count in found.lists.items():
        table.add_row(str(count), text.replace("+", ", "))
    out.print(table)
    out.print(f"most compute {len(found.computed)} of {len(found.shares)} steps: {', '.join(map(str, found.computed))}")
    out.print(f"next: jitexport build --model {shlex.quote(model)} --calibration {shlex.quote(str(output))} ...")


@app.command()
def generate(
    bundle: Bundle,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="PNG to write; of a video, MP4 or a folder of frames. Several are numbered."
        ),
    ] = Path("image.png"),
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**64 - 1, help="Image i has seed + i; random by default.")
    ] = None,
    num_images: Annotated[int, typer.Option(min=1, help="Number of images.")] = 1,
    guidance: Annotated[float | None, typer.Option(min=0, help="Guidance scale, for models that take one.")] = None,
    negative: Annotated[
        str | None, typer.Option(help="What not to draw, for classifier-free guidance.")
    ] = None,
    true_cfg_scale: Annotated[
        float | None, typer.Option(min=0, help="Scale of that guidance, for models that have another one beside it.")
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second of an MP4; 24 by default.")] = None,
    trust: Annotated[
        bool,
        typer.Option("--trust", help="BUNDLE may be OWNER/NAME on a hub, whose engines are native code of that owner."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Make images, or videos, from a bundle."""
    import torch

    import jitexport
    from jitexport.bundle.reading import read_manifest

    paths = numbered(output, num_images)
    for path in paths:
        check_place(path)
    if not trust:  # before anything is loaded
        check_output(output, read_manifest(bundle).geometry.frames, fps)
    if seed is None:
        seed = torch.Generator().seed() % 2**32
    pipe = jitexport.load(bundle, trust=trust)
    interrupts.check()
    if trust:
        check_output(output, pipe.geometry.frames, fps)
    scales = {"guidance_scale": guidance, "true_cfg_scale": true_cfg_scale}
    if guidance is not None and pipe.defaults.guidance.scale is None and true_cfg_scale is None:
        scales = {"true_cfg_scale": guidance}  # the only guidance that the model has
    started = time.perf_counter()
    images = pipe(
        prompt,
        negative_prompt=negative,
        num_images_per_prompt=num_images,
        generator=[torch.Generator().manual_seed((seed + i) % 2**64) for i in range(num_images)],
        output_type="pil" if pipe.geometry.frames is None else "pt",
        **scales,
    ).images
    for image, path in zip(images, paths, strict=True):
        write_output(path, image, fps)
    seconds = time.perf_counter() - started
    if as_json:
        echo(json.dumps({"images": [str(p) for p in paths], "seed": seed, "seconds": round(seconds, 3)}))
        return
    for path in paths:
        echo(path)
    err.print(f"{num_images} {'image' if pipe.geometry.frames is None else 'video'}(s) in {seconds:.2f} s, seed {seed}")


def numbered(output: Path, count: int) -> list[Path]:
    """Where each of several images goes."""
    return [output if count == 1 else output.with_name(f"{output.stem}-{i}{output.suffix}") for i in range(count)]


def check_output(output: Path, frames: int | None, fps: float | None) -> None:
    """Refuse a file that an image, or a video of some frames, is not written to."""
    kind = output.suffix.lower()
    if frames is None and kind != ".png":
        raise InputError("images are written as PNG", found=output.name, expected="a name that ends with .png")
    if frames is not None and kind not in (".mp4", ""):
        raise InputError(
            "videos are written as MP4, or as a folder of frames", found=output.name,
            expected="a name that ends with .mp4, or has no ending", remedy="-o video.mp4",
        )
    if fps is not None and kind != ".mp4":
        raise InputError("--fps is of MP4 files", found=output.name, remedy="leave it out")


def check_place(path: Path) -> None:
    """Find out whether `write_output` can write there."""
    if path.suffix:
        return check_writable(path)
    from jitexport import video

    check_writable_folder(path, video.is_frame)


def write_output(path: Path, image: Any, fps: float | None) -> None:
    """Write a PIL image as PNG, or a video's frames [F, 3, H, W] as MP4 or as a folder of PNG files."""
    if not hasattr(image, "movedim"):
        return write_file(path, encode_png(image))
    from jitexport import video

    if path.suffix.lower() == ".mp4":
        return video.write_mp4(path, image, fps or video.FPS)
    video.write_frames(path, image)


def _kernels(engines: Sequence[Any]) -> str:
    """The kernels of jitexport's own that engines have, each set with the engines that have it."""
    names: dict[str, list[str]] = {}
    for engine in engines:
        if engine.kernels is not None:
            names.setdefault(engine.kernels, []).append(engine.name)
    return "; ".join(f"{kernels} in {', '.join(of)}" for kernels, of in names.items())


def _cache(manifest: Any) -> str:
    """The temporal method, its settings, and which steps are computed."""
    if manifest.cache is None:
        return ""
    schedule = manifest.schedule.schedule()
    said = ", ".join(f"{k} {v}" for k, v in manifest.cache.options.items() if k != "computed")
    evidence = manifest.cache.evidence
    seen = "" if evidence is None else f", by calibration over {evidence['prompts']} images"
    steps = ", ".join(map(str, schedule.computed))
    return f"{manifest.cache.name} ({said}): of {schedule.nfe} steps these are computed{seen}: {steps}"


@app.command()
def inspect(bundle: Bundle, as_json: Json = False) -> None:
    """Show what a bundle holds. Reads the manifest only; nothing is checked or opened."""
    from jitexport.bundle.reading import read_manifest
    from jitexport.schedule import COMPUTED

    manifest = read_manifest(bundle)
    if as_json:
        echo(manifest.to_json())
        return
    schedule = manifest.schedule
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in {
        "model": f"{manifest.model.name} ({manifest.model.family}, from {manifest.model.source})",
        "image" if manifest.geometry.frames is None else "video": f"{manifest.geometry.height} x "
        f"{manifest.geometry.width} pixels, {_frames(manifest.geometry)}"
        f"{manifest.geometry.grid} tokens, batch {manifest.batch}",
        "method": f"{manifest.method.name}, preset {manifest.method.preset}",
        "cache": _cache(manifest),
        "speed-up": f"{schedule.predicted_speedup:.2f}x predicted over {schedule.reference_steps} steps "
        f"({_tera(schedule.tflops)} of {_tera(schedule.reference_tflops)} TFLOP)",
        "engines": f"{manifest.backend}, {manifest.precision}, built on {manifest.host.system} {manifest.host.machine} "
        f"{manifest.host.gpu or manifest.host.cpu} with torch {manifest.host.torch}",
        "kernels": _kernels(manifest.engines),
        "chosen": "; ".join(f"{field}: {reason}" for field, reason in manifest.chosen.items()),
        "size": f"{manifest.size / 1e6:.1f} MB in {len(manifest.files)} files",
        "built": f"{manifest.created} with jitexport {manifest.jitexport_version}: {manifest.command or 'from Python'}",
    }.items():
        if value:
            facts.add_row(name, value)
    out.print(facts)
    tflops = {s.index: s.step_tflops for s in schedule.stages}
    steps = Counter(stage.engine(step.action) for stage, steps in schedule.schedule() for step in steps)
    runs = {stage.engine(action): (action, stage) for action, stage in schedule.schedule().runs}
    sizes = {
        e.name: sum(f.size for f in manifest.files if f.path.startswith(e.directory + "/")) for e in manifest.engines
    }
    table = Table("engine", "steps", "tokens", "TFLOP/step", "MB", "relative error")
    for engine in manifest.engines:
        cells = ("", "", "")
        if engine.name in runs:
            action, stage = runs[engine.name]
            flops = _tera(tflops[stage.index]) if action == COMPUTED else ""
            cells = (str(steps[engine.name]), str(stage.tokens), flops)
        error = "not run" if engine.relative_error is None else f"{engine.relative_error:.1g}"
        table.add_row(engine.name, *cells, f"{sizes[engine.name] / 1e6:.1f}", error)
    out.print(table)
    for engine in manifest.engines:
        takes, gives = (", ".join(map(str, specs)) for specs in (engine.spec().inputs, engine.spec().outputs))
        out.print(f"{engine.name}({takes}) -> {gives}", soft_wrap=True)


@app.command()
def profile(
    bundle: Bundle,
    against: Annotated[
        str, typer.Option(help="Also measure these, comma-separated: diffusers, compile, few-step, eager.")
    ] = "",
    prompt: Annotated[str | None, typer.Option(help="Prompt to measure with.")] = None,
    repeats: Annotated[
        int, typer.Option(min=1, help="Images measured, after one that is not; at most 3 of what it is compared with.")
    ] = 5,
    timeline: Annotated[Path | None, typer.Option(help="Draw where the time goes into this PNG.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a Chrome trace of one image into this JSON.")] = None,
    as_json: Json = False,
) -> None:
    """Measure where the time of an image goes, and compare with the ordinary pipeline."""
    for path in (timeline, trace):
        if path is not None:
            check_writable(path)

    from jitexport import profile as profiling
    from jitexport import runtime
    from jitexport.bundle.reading import read_manifest

    peers = [p for p in against.split(",") if p]
    if wrong := set(peers) - set(profiling.PEERS):
        raise InputError("unknown peer", found=", ".join(sorted(wrong)), expected=", ".join(profiling.PEERS))
    _quiet_libraries()
    pipe = runtime.load(bundle)
    manifest = read_manifest(bundle)
    schedule = manifest.schedule
    prompt = prompt or _example_prompt(manifest)
    with err.status("measuring the bundle") as status:  # first, so that its memory is its own
        measured = profiling.profile_pipeline(
            pipe,
            f"{manifest.method.name}, {manifest.backend} {manifest.precision}",
            prompt,
            flops=profiling.engine_flops(manifest),
            speedup=(schedule.reference_steps, schedule.predicted_speedup),
            repeats=repeats,
        )
        if trace is not None:
            status.update("tracing")
            profiling.chrome_trace(pipe, prompt, trace)
        profiles = []
        for peer in peers:
            status.update(f"measuring {peer}: {profiling.PEERS[peer]}")
            profiles.append(profiling.measure_peer(peer, manifest, prompt, repeats=min(repeats, 3)))
    profiles.append(measured)
    conditions = profiling.conditions()
    if timeline is not None:
        from jitexport.profile.timeline import draw_timeline

        draw_timeline(profiles, conditions, timeline)
    if as_json:
        report = {"conditions": conditions, "bundle": str(bundle), "profiles": [asdict(p) for p in profiles]}
        echo(json.dumps(report))
    else:
        _print_profiles(profiles)
        facts = ", ".join(f"{k} {v}" for k, v in conditions.items() if v is not None)
        err.print(facts, soft_wrap=True)
    for path in (timeline, trace):
        if path is not None:
            err.print(f"wrote {path}", soft_wrap=True)


def _milliseconds(timing: Any) -> tuple[str, str]:
    return f"{timing.median * 1e3:.1f}", f"{timing.p90 * 1e3:.1f}"


def _print_profiles(profiles: Sequence[Any]) -> None:
    """The totals of all, and the phases, engines and steps of the last."""
    first, last = profiles[0], profiles[-1]
    if len(profiles) > 1:
        table = Table("prompt to PNG", "median s", "p90 s", "times faster")
        for p in profiles:
            faster = first.total.median / p.total.median
            table.add_row(p.label, f"{p.total.median:.3f}", f"{p.total.p90:.3f}", f"{faster:.2f}")
        out.print(table)

    table = Table(last.label, "median ms", "p90 ms", "share", title=f"phases, {last.repeats} images")
    for name, timing in last.phases.items():
        if name != "denoise":
            table.add_row(name, *_milliseconds(timing), f"{timing.median / last.total.median:.1%}")
    table.add_section()
    table.add_row("total", *_milliseconds(last.total), "")
    out.print(table)

    table = Table("engine", "tokens", "runs", "median ms", "p90 ms", "GFLOP", "GFLOP/s", "of ceiling", title="engines")
    for e in last.engines:
        work = ("", "", "")
        if e.flops is not None:
            work = (f"{e.flops / 1e9:.2f}", f"{e.flops_per_second / 1e9:.0f}", f"{e.ceiling_share:.0%}")
        table.add_row(e.name, str(e.tokens or ""), str(e.runs), *_milliseconds(e.run), *work)
    out.print(table)

    table = Table("step", "stage", "sigma", "engine ms", "p90 ms", "loop ms", "p90 ms", title="steps")
    for s in last.steps:
        table.add_row(str(s.step), s.stage, f"{s.sigma:.3f}", *_milliseconds(s.engine), *_milliseconds(s.loop))
    out.print(table)

    out.print(f"ceiling: {last.ceiling / 1e9:.0f} GFLOP/s, the best large matrix product in this run")
    out.print(f"the loop around the engines takes {last.overhead:.2%} of denoising")
    out.print(
        f"denoising speed-up {last.speedup.realised:.2f}x over the reference steps on the full stage's engine, "
        f"{last.speedup.predicted:.2f}x predicted: {last.speedup.share:.0%} realised",
        soft_wrap=True,
    )
    memory = {"process": "of memory in the process", "gpu": "on the GPU"}
    peaks = [f"{last.peak_memory[k] / 1e6:.0f} MB {text}" for k, text in memory.items() if last.peak_memory.get(k)]
    out.print(f"at most {', '.join(peaks)}")


class _EvaluationProgress:
    """Progress of an evaluation on stderr: a bar on a terminal, a line per source elsewhere."""

    def __init__(self) -> None:
        columns = (SpinnerColumn(), text_column("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, text_column("left"), TimeRemainingColumn(), console=err)
        self._task = self._bar.add_task("evaluate")
        self._work = self._done = 0.0
        self._since = time.monotonic()

    def __enter__(self) -> _EvaluationProgress:
        if err.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, work: float) -> None:
        self._work = work
        self._bar.update(self._task, total=work)

    def step(self, name: str) -> None:
        interrupts.check()
        self._bar.update(self._task, description=name)
        if not err.is_terminal:
            seconds = time.monotonic() - self._since
            left = seconds / self._done * (self._work - self._done) if self._done else 0
            estimate = f", about {left:.0f} s left" if left else ""
            err.print(f"{name}{estimate}")

    def advance(self, work: float) -> None:
        self._done += work
        self._bar.advance(self._task, work)


@app.command()
def evaluate(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Bundles of one model.")],
    prompts: Annotated[
        Path | None,
        typer.Option(help="One prompt a line, or GenEval's .jsonl; captions of the demo model, or a few of ours."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take that many prompts.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Images of each prompt: 1, for GenEval 4.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="Steps of the ordinary sampler, or a bundle; the model's usual steps.")
    ] = None,
    timed: Annotated[int, typer.Option(min=0, help="Images timed for each latency.")] = 5,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for report, results and images; a run goes on from there.")
    ] = Path("out/evaluation"),
    as_json: Json = False,
) -> None:
    """Compare the quality and speed of bundles with the ordinary sampler's, over many prompts."""
    against: int | Path | None = None
    if reference is not None:
        against = int(reference) if reference.isdecimal() else Path(reference)
    _quiet_libraries()
    from jitexport.evaluate import evaluate as run_evaluation
    from jitexport.evaluate import write_report

    with _EvaluationProgress() as progress:
        result = run_evaluation(
            bundles,
            folder=output / "images",
            prompts=prompts,
            limit=limit,
            seeds=seeds,
            reference=against,
            timed=timed,
            progress=progress,
        )
    report = write_report(result, output / "report.html")
    write_file(output / "results.json", f"{result.to_json()}\n".encode())
    if as_json:
        echo(result.to_json())
        return
    _print_scores(result)
    for name, reason in result.missing.items():
        err.print(f"not measured: {name}: {reason}", soft_wrap=True)
    echo(report)


def _print_scores(result: Any) -> None:
    """A row a measure and a column a source, which fits a terminal where the other way round does not."""
    from jitexport.evaluate.metrics import MEASURES
    from jitexport.evaluate.report import cell, interval

    table = Table("", *(row.label for row in result.rows))
    first = result.reference.latency
    table.add_row("steps", *(str(row.steps) for row in result.rows))
    table.add_row("TFLOP", *(_tera(row.tflops) for row in result.rows))
    if first is not None:
        table.add_row("seconds", *(f"{row.latency.median:.2f}" if row.latency else "" for row in result.rows))
        ratios = (f"{first.median / row.latency.median:.2f}" if row.latency else "" for row in result.rows)
        table.add_row("times faster", *ratios)
    for name in result.measures:
        cells = []
        for row in result.rows:
            score = row.scores.get(name)
            limits = interval(name, score) if score else ""
            cells.append(cell(name, score) + (f"\n{limits}" if limits else ""))
        table.add_row(MEASURES[name].title, *cells)
    out.print(table)


@app.command()
def verify(bundle: Bundle, as_json: Json = False) -> None:
    """Check a bundle: all digests, then every engine on its stored golden input."""
    from jitexport.errors import BundleError
    from jitexport.verify import verify as verify_bundle

    _quiet_libraries()
    with err.status("digests") as status:
        result = verify_bundle(bundle, on_engine=lambda name: status.update(f"engine {name}"))
    if as_json:
        engines = [
            {k: None if v != v else v for k, v in asdict(r).items()} | {"passed": r.passed} for r in result.engines
        ]
        echo(
            json.dumps({"passed": result.passed, "files": result.files, "bytes": result.bytes, "engines": engines})
        )
    else:
        out.print(f"{result.files} files, {result.bytes / 1e6:.1f} MB: all digests as declared")
        table = Table("engine", "result", "relative error", "largest", "tolerance", "seconds")
        for r in result.engines:
            word = "same bits" if r.exact else "close" if r.passed else r.problem or "differs"
            table.add_row(
                r.name, word, f"{r.relative_error:.2g}", f"{r.max_error:.2g}", f"{r.tolerance:g}", f"{r.seconds:.2f}"
            )
        out.print(table)
    if not result.passed:
        raise typer.Exit(BundleError.exit_code)


@app.command()
def pack(
    bundle: Bundle,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Archive to write; BUNDLE.tar.zst here by default.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: Json = False,
) -> None:
    """Pack a bundle into one file to ship."""
    from jitexport.bundle import archive

    target = output or Path(bundle.resolve().name + archive.SUFFIX)
    with err.status("packing"):
        size = archive.pack(bundle, target, replace=force)
    echo(json.dumps({"archive": str(target), "bytes": size}) if as_json else target)


@app.command()
def unpack(
    archive: Annotated[Path, typer.Argument(metavar="ARCHIVE", help="A packed bundle, NAME.tar.zst.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Bundle directory; NAME here by default.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    as_json: Json = False,
) -> None:
    """Unpack a bundle that `pack` made, checking every byte before it is put in place."""
    from jitexport.bundle.archive import unpack as unpack_archive

    with err.status("unpacking"):
        target = unpack_archive(archive, output, replace=force)
    echo(json.dumps({"bundle": str(target)}) if as_json else target)


@app.command()
def push(
    bundle: Bundle,
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Hub repository; made where there is none.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
) -> None:
    """Upload a bundle to a Hugging Face hub."""
    from jitexport import hub

    echo(hub.push(bundle, repo, private=not public))


@app.command()
def pull(
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Hub repository with a bundle.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Bundle directory; engines/NAME by default.")
    ] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Take native code, as engines are, from this owner.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
) -> None:
    """Download a bundle from a Hugging Face hub, checking every byte before it is put in place."""
    from jitexport import hub

    echo(hub.pull(repo, output, trust=trust, revision=revision, replace=force))


@app.command()
def serve(
    bundles: Annotated[list[str], typer.Argument(metavar="BUNDLE...", help="FOLDER or NAME=FOLDER each.")],
    host: Annotated[str, typer.Option(help="Address to listen at; by default only this machine can reach it.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    loras: Annotated[Path | None, typer.Option(help="Folder of adapters, NAME.safetensors each.")] = None,
    memory: Annotated[float | None, typer.Option(min=0, help="GB of bundles that are loaded at once.")] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="Bearer tokens, one a line; by default JITEXPORT_TOKEN of the environment.")
    ] = None,
    public_url: Annotated[str | None, typer.Option(help="The server's address as clients see it.")] = None,
    queue: Annotated[int, typer.Option(min=1, help="Images that may wait.")] = 64,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a request may take.")] = 600,
    drain: Annotated[float, typer.Option(min=1, help="Seconds for what was taken when the server stops.")] = 60,
    batch_wait: Annotated[float, typer.Option(min=0, help="Milliseconds that an image waits for others.")] = 5,
    max_images: Annotated[int, typer.Option(min=1, help="Images of a request.")] = 10,
    max_prompt: Annotated[int, typer.Option(min=1, help="Characters of a prompt.")] = 4000,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = 65536,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the bundles' own by default.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="That an image computes on, on a CPU.")] = None,
    trust: Annotated[bool, typer.Option("--trust", help="FOLDER may be OWNER/NAME on a hub.")] = False,
    ray: Annotated[
        str | None, typer.Option(help="Serve on Ray: a number of replicas, or LEAST-MOST that follow the load.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Serve bundles over HTTP, as OpenAI's images API."""
    from jitexport.serve.command import run
    from jitexport.serve.settings import Limits

    limits = Limits(
        prompt=max_prompt, n=max_images, body=max_body, queue=queue, request=timeout, drain=drain,
        batch_wait=batch_wait / 1000,
    )
    run(
        bundles, limits, host=host, port=port, loras=loras, memory=memory, token_file=token_file,
        public_url=public_url, device=device, threads=threads, trust=trust, replicas=ray, as_json=as_json,
    )


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show what this machine can run, and what would add more."""
    from jitexport.doctor import examine

    report = examine()
    if as_json:
        echo(json.dumps(report))
        return
    for section, rows in report.items():
        table = Table(title=section, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, value in rows.items():
            table.add_row(name, str(value))
        out.print(table)


if __name__ == "__main__":
    from jitexport.__main__ import run

    run()
