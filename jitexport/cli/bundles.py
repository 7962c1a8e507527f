"""A bundle as a thing: what is in it, whether it is whole, and how it travels."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jitexport.cli.options import Bundle, Json, ReplaceBundle
from jitexport.cli.wording import count, frames, tera
from jitexport.console import Table, echo, err, out, quiet_libraries

if TYPE_CHECKING:
    from jitexport.bundle.entries import EngineEntry
    from jitexport.bundle.manifest import Manifest


def inspect(bundle: Bundle, as_json: Json = False) -> None:
    """Show what a bundle holds. Reads the manifest only; nothing is checked or opened."""
    from jitexport.bundle.reading import read_manifest

    manifest = read_manifest(bundle)
    if as_json:
        echo(manifest.to_json())
        return
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in _facts(manifest).items():
        if value:
            facts.add_row(name, value)
    out.print(facts)
    out.print(_engine_table(manifest))
    for engine in manifest.engines:
        takes, gives = (", ".join(map(str, specs)) for specs in (engine.spec().inputs, engine.spec().outputs))
        out.print(f"{engine.name}({takes}) -> {gives}", soft_wrap=True)


def _facts(manifest: Manifest) -> dict[str, str]:
    """Of the bundle as a whole, by name; what it lacks is empty."""
    schedule, geometry, host = manifest.schedule, manifest.geometry, manifest.host
    return {
        "model": f"{manifest.model.name} ({manifest.model.family}, from {manifest.model.source})",
        "image" if geometry.frames is None else "video": f"{geometry.height} x {geometry.width} pixels, "
        f"{frames(geometry)}{geometry.grid} tokens, batch {manifest.batch}",
        "method": f"{manifest.method.name}, preset {manifest.method.preset}",
        "cache": _cache(manifest),
        "speed-up": f"{schedule.predicted_speedup:.2f}x predicted over {schedule.reference_steps} steps "
        f"({tera(schedule.tflops)} of {tera(schedule.reference_tflops)} TFLOP)",
        "engines": f"{manifest.backend}, {manifest.precision}, built on {host.system} {host.machine} "
        f"{host.gpu or host.cpu} with torch {host.torch}",
        "kernels": _kernels(manifest.engines),
        "chosen": "; ".join(f"{field}: {reason}" for field, reason in manifest.chosen.items()),
        "size": f"{manifest.size / 1e6:.1f} MB in {len(manifest.files)} files",
        "built": f"{manifest.created} with jitexport {manifest.jitexport_version}: {manifest.command or 'from Python'}",
    }


def _cache(manifest: Manifest) -> str:
    """The temporal method, its settings, and which steps are computed."""
    if manifest.cache is None:
        return ""
    schedule = manifest.schedule.schedule()
    said = ", ".join(f"{k} {v}" for k, v in manifest.cache.options.items() if k != "computed")
    evidence = manifest.cache.evidence
    seen = "" if evidence is None else f", by calibration over {count(evidence['prompts'], 'image')}"
    steps = ", ".join(map(str, schedule.computed))
    return f"{manifest.cache.name} ({said}): of {schedule.nfe} steps these are computed{seen}: {steps}"


def _kernels(engines: Sequence[EngineEntry]) -> str:
    """The kernels of jitexport's own that engines have, each set with the engines that have it."""
    names: dict[str, list[str]] = {}
    for engine in engines:
        if engine.kernels is not None:
            names.setdefault(engine.kernels, []).append(engine.name)
    return "; ".join(f"{kernels} in {', '.join(of)}" for kernels, of in names.items())


def _engine_table(manifest: Manifest) -> Table:
    """A row an engine: when it runs, on what, its size and its error."""
    from jitexport.schedule import COMPUTED

    schedule = manifest.schedule.schedule()
    tflops = {s.index: s.step_tflops for s in manifest.schedule.stages}
    steps = Counter(stage.engine(step.action) for stage, steps in schedule for step in steps)
    runs = {stage.engine(action): (action, stage) for action, stage in schedule.runs}
    table = Table("engine", "steps", "tokens", "TFLOP/step", "MB", "relative error")
    for engine in manifest.engines:
        cells = ("", "", "")
        if engine.name in runs:
            action, stage = runs[engine.name]
            flops = tera(tflops[stage.index]) if action == COMPUTED else ""
            cells = (str(steps[engine.name]), str(stage.tokens), flops)
        size = sum(f.size for f in manifest.files if f.path.startswith(engine.directory + "/"))
        error = "not run" if engine.relative_error is None else f"{engine.relative_error:.1g}"
        table.add_row(engine.name, *cells, f"{size / 1e6:.1f}", error)
    return table


def verify(bundle: Bundle, as_json: Json = False) -> None:
    """Check a bundle: all digests, then every engine on its stored golden input."""
    from jitexport.errors import BundleError
    from jitexport.verify import verify as verify_bundle

    quiet_libraries()
    with err.status("digests") as status:
        result = verify_bundle(bundle, on_engine=lambda name: status.update(f"engine {name}"))
    if as_json:
        echo(result.to_json())
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


def unpack(
    archive: Annotated[Path, typer.Argument(metavar="ARCHIVE", help="A packed bundle, NAME.tar.zst.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Bundle directory; NAME here by default.")
    ] = None,
    force: ReplaceBundle = False,
    as_json: Json = False,
) -> None:
    """Unpack a bundle that `pack` made, checking every byte before it is put in place."""
    from jitexport.bundle.archive import unpack as unpack_archive

    with err.status("unpacking"):
        target = unpack_archive(archive, output, replace=force)
    echo(json.dumps({"bundle": str(target)}) if as_json else target)


def push(
    bundle: Bundle,
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Hub repository; made where there is none.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
) -> None:
    """Upload a bundle to a Hugging Face hub."""
    from jitexport import hub

    echo(hub.push(bundle, repo, private=not public))


def pull(
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Hub repository with a bundle.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Bundle directory; engines/NAME by default.")
    ] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Take native code, as engines are, from this owner.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    force: ReplaceBundle = False,
) -> None:
    """Download a bundle from a Hugging Face hub, checking every byte before it is put in place."""
    from jitexport import hub

    echo(hub.pull(repo, output, trust=trust, revision=revision, replace=force))
