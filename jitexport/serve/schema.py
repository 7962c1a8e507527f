"""What a request of `POST /v1/images/generations` may say: OpenAI's fields, and those of diffusion models.

The latter stand at the top level, in `extra_body` or in `nvext`: three dialects are in use, and all are taken. Nothing
is ignored: a field that is not known, or a value that the bundle cannot do, is an error that says what it can.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jitexport.errors import InputError
from jitexport.serve.catalog import Catalog, Entry
from jitexport.serve.errors import ApiError, invalid
from jitexport.serve.jobs import Job
from jitexport.serve.settings import Limits

ENVELOPES = ("extra_body", "nvext")
#: What may stand in an envelope.
EXTRAS = (
    "seed", "guidance_scale", "true_cfg_scale", "negative_prompt", "num_inference_steps", "lora", "lora_scale",
    "stream_steps",
)  # fmt: skip
Finite = Annotated[float, Field(allow_inf_nan=False)]
_CODES = {"extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter"}


class ImageRequest(BaseModel):
    """The body of a request, as it arrived and of the right types."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    prompt: str
    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    size: str | None = None
    quality: Literal["auto", "standard"] | None = None
    style: None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None

    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    guidance_scale: Annotated[Finite, Field(ge=0)] | None = None
    true_cfg_scale: Annotated[Finite, Field(ge=0)] | None = None
    negative_prompt: str | None = None
    num_inference_steps: int | None = None
    lora: str | None = None
    lora_scale: Annotated[Finite, Field(ge=-16, le=16)] | None = None
    stream_steps: bool | None = None


def parse(body: bytes) -> ImageRequest:
    """The request in a body.

    Raises:
        ApiError: 400, no JSON, or not of this form.
    """
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_no_number, object_pairs_hook=_once)
    except ApiError:
        raise
    except (ValueError, RecursionError) as error:
        raise invalid(None, f"the body is no JSON: {str(error)[:200]}", "invalid_json") from None
    if not isinstance(found, dict):
        raise invalid(None, f"the body is {_kind(found)}; an object with a prompt is expected", "invalid_json")
    try:
        return ImageRequest.model_validate(_flat(found))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        # Names as they came may be long, or no text at all.
        param = ascii(first["loc"][0])[1:-1][:60] if first["loc"] else None
        code = _CODES.get(first["type"], "invalid_value")
        message = {
            "unknown_parameter": f"there is no field {param}; there are {', '.join(ImageRequest.model_fields)}",
            "missing_required_parameter": f"the field {param} is missing",
        }.get(code, f"{param}: {first['msg']}")
        raise invalid(param, message, code) from None


def _kind(value: object) -> str:
    kinds = {list: "a list", str: "a string", bool: "a truth value", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a field is given twice")
    return found


def _flat(body: dict[str, Any]) -> dict[str, Any]:
    """All fields at the top level, whichever dialect they came in."""
    flat = {name: value for name, value in body.items() if name not in ENVELOPES}
    for envelope in ENVELOPES:
        inner = body.get(envelope)
        if inner is None:
            continue
        if not isinstance(inner, dict):
            raise invalid(envelope, f"{envelope} is {_kind(inner)}; an object is expected")
        for name, value in inner.items():
            if name not in EXTRAS:
                shown = ascii(name)[1:-1][:60]
                raise invalid(
                    f"{envelope}.{shown}", f"there is no field {shown} in {envelope}; there are {', '.join(EXTRAS)}",
                    "unknown_parameter",
                )
            if flat.setdefault(name, value) != value:
                raise invalid(f"{envelope}.{name}", f"{name} is given twice, with two values")
    return flat


def choose(request: ImageRequest, catalog: Catalog) -> Entry:
    """The bundle that a request asks for: by name, else the first one of its size, else the first.

    Raises:
        ApiError: 404, no bundle of that name; 400, none of that size.
    """
    sizes = {entry.name: entry.size for entry in catalog}
    size = None if request.size in (None, "auto") else request.size
    if request.model is not None:
        entry = catalog.get(request.model)
        if entry is None:
            raise ApiError(
                404, f"no bundle of this name is served; there are {', '.join(sizes)}", "model_not_found", "model"
            )
        if size not in (None, entry.size):
            raise invalid("size", f"{entry.name} makes images of {entry.size} only{_others(entry, sizes)}")
        return entry
    for entry in catalog:
        if size in (None, entry.size):
            return entry
    raise invalid("size", f"no bundle makes images of that size; served: {', '.join(dict.fromkeys(sizes.values()))}")


def _others(entry: Entry, sizes: dict[str, str]) -> str:
    others = [f"{name} of {size}" for name, size in sizes.items() if size != entry.size]
    return f"; there are also {', '.join(others)}" if others else ""


def jobs(request: ImageRequest, entry: Entry, loras: Sequence[str], limits: Limits) -> list[Job]:
    """The images of a request: image i has the seed plus i, as `jitexport generate` has it.

    Args:
        loras: names of the adapters that there are.

    Raises:
        ApiError: 400, what the bundle or this server does not do.
    """
    _check(request, entry, loras, limits)
    guidance, true = request.guidance_scale, request.true_cfg_scale
    if guidance is not None and true is None and entry.manifest.defaults.guidance.scale is None:
        guidance, true = None, guidance  # the only guidance that the model has, as `jitexport generate` has it
    try:
        none = [None, None]
        texts = [request.prompt, *none], [request.negative_prompt, *none]
        asked = entry.terms.request(*texts, {}, guidance, true, (0.0, 1.0), 1)
    except InputError as error:
        raise invalid(None, " ".join(line.strip() for line in str(error).splitlines())) from error
    if asked.negative is None and true is not None and true > 1:
        name = "guidance_scale" if request.true_cfg_scale is None else "true_cfg_scale"
        raise invalid(name, f"{name} needs a negative_prompt: without one there is no such guidance")
    seed = secrets.randbelow(2**32) if request.seed is None else request.seed
    stream = bool(request.stream)
    return [
        Job(
            bundle=entry.name, prompt=request.prompt, seed=(seed + i) % 2**64,
            negative_prompt=request.negative_prompt, guidance_scale=guidance, true_cfg_scale=true, lora=request.lora,
            lora_scale=1.0 if request.lora_scale is None else request.lora_scale,
            partial_images=(request.partial_images or 0) if stream else 0,
            steps=stream and bool(request.stream_steps), format=request.output_format or "png",
            compression=100 if request.output_compression is None else request.output_compression,
        )
        for i in range(request.n or 1)
    ]  # fmt: skip


def _check(request: ImageRequest, entry: Entry, loras: Sequence[str], limits: Limits) -> None:
    for name in ("prompt", "negative_prompt"):
        text = getattr(request, name) or ""
        if len(text) > limits.prompt:
            raise invalid(name, f"{name} has {len(text)} characters; at most {limits.prompt} are taken")
    if (request.n or 1) > limits.n:
        raise invalid("n", f"n is {request.n}; at most {limits.n} images a request are made")
    if request.num_inference_steps not in (None, entry.steps):
        raise invalid(
            "num_inference_steps", f"{entry.name} has {entry.steps} steps, built in; leave num_inference_steps out"
        )
    if request.output_compression is not None and request.output_format not in ("jpeg", "webp"):
        raise invalid("output_compression", "output_compression is of jpeg and webp; PNG loses nothing")
    if not request.stream and (request.partial_images or request.stream_steps):
        name = "partial_images" if request.partial_images else "stream_steps"
        raise invalid(name, f"{name} needs stream: true")
    if request.stream and request.response_format == "url":
        raise invalid("response_format", "a stream has its images inside: b64_json")
    if request.lora is None and request.lora_scale is not None:
        raise invalid("lora_scale", "lora_scale needs a lora")
    if request.lora is not None and request.lora not in loras:
        there = f"there are {', '.join(loras)}" if loras else "there are none (jitexport serve --loras FOLDER)"
        raise invalid("lora", f"no adapter of this name is served; {there}")
