"""What several verbs take: single options by their type, and groups of options as dataclasses.

A verb has a group as one parameter; `flat` shows typer the group's options in its place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from jitexport import registry
from jitexport.errors import InputError

if TYPE_CHECKING:
    from jitexport.schedule import CustomSchedule

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Directory of a built bundle.")]
ReplaceBundle = Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")]
Speedup = Annotated[
    float, typer.Option(min=1, max=20, help="Denoising speed-up over the model's usual steps, 1 to 20.")
]
Cache = Annotated[
    str | None,
    typer.Option(
        help=f"Temporal method: {', '.join(registry.CACHES)}; with options as taylor:order=2, taylorseer:every=7, or "
        "reuse:computed=0+1+4."
    ),
]
Device = Annotated[str, typer.Option(help="cpu or cuda; auto is cuda where torch can use a GPU.")]


@dataclass(frozen=True)
class Source:
    """Which model."""

    model: Annotated[
        str,
        typer.Option(
            help=f"A registered model ({', '.join(registry.MODELS)}), a diffusers folder, a file, or a hub id."
        ),
    ] = "demo"
    base: Annotated[
        str | None,
        typer.Option(help="For a model in one .safetensors file: the folder or model that everything else comes from."),
    ] = None


@dataclass(frozen=True)
class Spatial:
    """The spatial method."""

    method: Annotated[str, typer.Option(help=f"Acceleration method: {', '.join(registry.METHODS)}.")] = "jit"
    preset: Annotated[
        str | None, typer.Option(help="The method's settings by name: default, paper, ...; another name lists them.")
    ] = None


@dataclass(frozen=True)
class Stages:
    """A schedule in place of a speed-up."""

    steps: Annotated[str | None, typer.Option(help="Custom schedule: steps per stage, as 7,4,7.")] = None
    ratios: Annotated[
        str | None, typer.Option(help="Custom schedule: token ratios per stage, as 0.35,0.62,1.")
    ] = None

    def custom(self) -> CustomSchedule | None:
        """The schedule; None where none was given.

        Raises:
            InputError: ratios without steps, or no numbers.
        """
        from jitexport.plan import parse_custom

        if self.steps is None and self.ratios is not None:
            raise InputError("--ratios needs --steps", remedy="for example --steps 7,4,7 --ratios 0.35,0.62,1")
        return parse_custom(self.steps, self.ratios) if self.steps is not None else None


@dataclass(frozen=True)
class Size:
    """Of images, videos and prompts."""

    height: Annotated[
        int | None, typer.Option(min=1, help="Image height in pixels; the model's usual one by default.")
    ] = None
    width: Annotated[
        int | None, typer.Option(min=1, help="Image width in pixels; the model's usual one by default.")
    ] = None
    frames: Annotated[
        int | None, typer.Option(min=1, help="Frames of a video; the model's usual number by default.")
    ] = None
    text_tokens: Annotated[
        int | None, typer.Option(min=1, help="Length of the text sequence; the model's usual one by default.")
    ] = None

    def settings(self) -> dict[str, int | None]:
        """As models take them."""
        return {
            "height": self.height, "width": self.width, "frames": self.frames, "max_sequence_length": self.text_tokens,
        }  # fmt: skip


def flat(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb as typer reads and calls it: by keyword, with a group's options in the place of the group."""
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    hints = get_type_hints(verb, include_extras=True)
    for name, parameter in inspect.signature(verb).parameters.items():
        options = {name: (hints[name], parameter.default)}
        if is_dataclass(group := hints[name]):
            groups[name] = group
            types = get_type_hints(group, include_extras=True)
            options = {field.name: (types[field.name], field.default) for field in fields(group)}
        parameters += [
            inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)
            for option, (kind, default) in options.items()
        ]

    @wraps(verb)
    def call(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        verb(**values)

    vars(call)["__signature__"] = inspect.Signature(parameters)
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call
