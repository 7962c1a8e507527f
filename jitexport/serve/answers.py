"""Answers in OpenAI's form: images, and the events of a stream."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jitexport.serve.catalog import Catalog, Entry
from jitexport.serve.errors import ApiError
from jitexport.serve.jobs import Finished, Job, Partial, Step


def usage(images: Sequence[Finished]) -> dict[str, Any]:
    """Tokens that were read and made."""
    text, image = images[0].text_tokens if images else 0, sum(i.image_tokens for i in images)
    return {
        "input_tokens": text,
        "input_tokens_details": {"text_tokens": text, "image_tokens": 0},
        "output_tokens": image,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": image},
        "total_tokens": text + image,
    }


def _own(job: Job, image: Finished) -> dict[str, Any]:
    """What OpenAI's form has no place for."""
    own = {"seed": job.seed, "batch": image.batch, "seconds": {k: round(v, 4) for k, v in image.seconds.items()}}
    return {"jitexport": own | ({"warnings": list(image.warnings)} if image.warnings else {})}


def images(
    jobs: Sequence[Job], made: Sequence[Finished], entry: Entry, address: Callable[[bytes, str], str] | None
) -> dict[str, Any]:
    """The body of an answer.

    Args:
        address: gives an image an address; None for images inside the answer.
    """
    data = []
    for job, image in zip(jobs, made, strict=True):
        given = {"url": address(image.data, job.format)} if address else {"b64_json": _text(image.data)}
        data.append(given | _own(job, image))
    return {
        "created": int(time.time()), "model": entry.name, "data": data, "size": entry.size, "background": "opaque",
        "output_format": jobs[0].format, "usage": usage(made),
    }  # fmt: skip


def event(job: Job, number: int, entry: Entry, what: Partial | Step | Finished) -> bytes:
    """An event of a stream.

    Args:
        number: of the image in its request.
    """
    if isinstance(what, Step):
        told = {
            "type": "jitexport.step", "step": what.step, "steps": what.steps, "action": what.action,
            "tokens": what.tokens, "of": what.of, "grid": what.grid, "detail": what.detail, "image_index": number,
        }  # fmt: skip
        return sse(told)
    about = {
        "created_at": int(time.time()), "size": entry.size, "quality": "auto", "background": "opaque",
        "output_format": job.format, "image_index": number,
    }  # fmt: skip
    if isinstance(what, Partial):
        kind = {"type": "image_generation.partial_image", "partial_image_index": what.index}
        return sse(kind | {"b64_json": _text(what.data)} | about)
    kind = {"type": "image_generation.completed", "b64_json": _text(what.data)}
    return sse(kind | about | {"usage": usage([what])} | _own(job, what))


def error_event(error: ApiError) -> bytes:
    """The end of a stream that fails in its middle."""
    return sse({"type": "error", **error.body()})


def sse(told: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return f"event: {told['type']}\ndata: {json.dumps(told, separators=(',', ':'))}\n\n".encode()


def models(catalog: Catalog, loaded: Callable[[str], bool]) -> dict[str, Any]:
    """The list of served bundles."""
    loras = list(catalog.loras())
    return {"object": "list", "data": [_model(entry, loaded(entry.name), loras) for entry in catalog]}


def _model(entry: Entry, loaded: bool, loras: Sequence[str]) -> dict[str, Any]:
    manifest, schedule = entry.manifest, entry.manifest.schedule
    guidance = manifest.defaults.guidance
    return {
        "id": entry.name, "object": "model", "created": entry.created, "owned_by": "jitexport",
        "jitexport": {
            "model": manifest.model.name, "size": entry.size, "steps": entry.steps, "batch": manifest.batch,
            "speedup": round(schedule.predicted_speedup, 2), "method": manifest.method.name,
            "stages": [{"steps": stage.steps, "tokens": stage.tokens} for stage in schedule.stages],
            "grid": manifest.geometry.grid, "backend": manifest.backend, "precision": manifest.precision,
            "guidance_scale": guidance.scale, "true_cfg_scale": guidance.true, "digest": entry.digest,
            "loaded": loaded, "loras": loras,
        },
    }  # fmt: skip


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
