"""The arguments of a call, checked: what a bundle can take of diffusers' call, and what it has built in."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from jitexport.errors import InputError

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
TENSOR_INPUTS = ("latents", "prompt_embeds", "clean", "places")

#: Arguments of diffusers' call that no bundle has a use for; their defaults are taken, and nothing else.
WITHOUT_USE = {
    "ip_adapter_image": "engines have no image adapters",
    "ip_adapter_image_embeds": "engines have no image adapters",
    "negative_ip_adapter_image": "engines have no image adapters",
    "negative_ip_adapter_image_embeds": "engines have no image adapters",
    "joint_attention_kwargs": "an adapter's strength is given to load_lora",
}


@dataclass(frozen=True)
class BuiltIn:
    """What a bundle is built for, by the names of diffusers' arguments."""

    height: int
    width: int
    num_inference_steps: int
    sigmas: Sequence[float]
    max_sequence_length: int | None = None
    num_frames: int | None = None


def check_built_in(given: Mapping[str, Any], built: BuiltIn) -> None:
    """Take what is the bundle's own, or says nothing; refuse other values and unknown names.

    Raises:
        InputError: naming what the bundle has.
    """
    for name, value in given.items():
        if name in WITHOUT_USE:
            _check_without_use(name, value)
        elif name == "sigmas":
            _check_sigmas(value, built.sigmas)
        elif (own := vars(built).get(name)) is not None:
            if value is not None and (not is_whole(value) or int(value) != own):
                raise InputError(
                    f"this bundle is built for {name}={own}", found=shown(value), expected=own,
                    remedy=f"leave {name} out, or build a bundle for it",
                )
        else:
            known = ", ".join([*(n for n, own in vars(built).items() if own is not None), *WITHOUT_USE])
            raise InputError(f"no argument of this name: {name[:100]}", expected=f"those of the call, or {known}")


def _check_without_use(name: str, value: object) -> None:
    empty = isinstance(value, Mapping | list | tuple) and all(item in (None, "") for item in value)
    if not (value is None or (isinstance(value, str) and not value) or empty):
        raise InputError(f"{name}: {WITHOUT_USE[name]}", found=shown(value), remedy=f"leave {name} out")


def _check_sigmas(value: object, own: Sequence[float]) -> None:
    if value is None:
        return
    given = list(value) if isinstance(value, Sequence | np.ndarray | Tensor) and len(np.shape(value)) == 1 else []
    numbers = [float(v) for v in given if is_number(v) or isinstance(v, Tensor)]
    same = len(numbers) == len(own) == len(given)
    if not same or any(not math.isclose(a, b, abs_tol=1e-6) for a, b in zip(numbers, own, strict=True)):
        raise InputError(
            "this bundle has its noise levels built in", found=shown(value),
            expected=", ".join(f"{s:.6g}" for s in own), remedy="leave sigmas out",
        )


def check_prompts(name: str, value: object) -> list[str]:
    """One or several prompts as a list of strings that can be encoded.

    Raises:
        InputError: something else, or text with a half of a surrogate pair.
    """
    if isinstance(value, str):
        prompts = [value]
    elif isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim == 1):
        prompts = list(value)
    else:
        prompts = []
    if not prompts or not all(isinstance(p, str) for p in prompts):
        raise InputError(f"a {name} must be a string or a list of strings", found=shown(value))
    for prompt in prompts:
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"a {name} holds half a surrogate pair, which is no character",
                found=f"{prompt[error.start]!a} at {error.start}",
                remedy="decode the text as what it is: UTF-8, or UTF-16 in pairs",
            ) from error
    return [str(p) for p in prompts]


def check_path(name: str, value: object) -> Path:
    """A path of a file or folder.

    Raises:
        InputError: something else.
    """
    if not isinstance(value, str | os.PathLike) or not os.fspath(value) or "\0" in str(os.fspath(value)):
        raise InputError(f"{name} must be a path", found=shown(value))
    if not isinstance(os.fspath(value), str):
        raise InputError(f"{name} must be a path of text", found=shown(value))
    return Path(value)


def check_count(name: str, value: object) -> int:
    """A whole number of at least 1."""
    if not is_whole(value) or int(value) < 1:
        raise InputError(f"{name} must be a whole number of at least 1", found=shown(value))
    return int(value)


def check_number(name: str, value: object, *, least: float = -math.inf) -> float:
    """A finite number that fp32 can hold."""
    if not is_number(value) or not abs(float(value)) <= torch.finfo(torch.float32).max or float(value) < least:
        limit = "" if least == -math.inf else f" of at least {least:g}"
        raise InputError(f"{name} must be a finite number{limit}", found=shown(value))
    return float(value)


def check_tensor_inputs(callback: object, names: object) -> list[str]:
    """Which tensors a callback is given: its own `tensor_inputs` where it has them, as diffusers' objects do.

    Raises:
        InputError: a callback that cannot be called, or tensors that there are not.
    """
    if callback is not None and not callable(callback):
        raise InputError("callback_on_step_end must be a function", found=shown(callback))
    names = getattr(callback, "tensor_inputs", names)
    names = ["latents"] if names is None else names
    if not isinstance(names, list | tuple) or not all(isinstance(n, str) and n in TENSOR_INPUTS for n in names):
        raise InputError(
            "callback_on_step_end_tensor_inputs names tensors that a callback cannot have", found=shown(names),
            expected=f"some of {', '.join(TENSOR_INPUTS)}",
        )
    return list(names)


def check_generators(value: object, n: int) -> list[torch.Generator]:
    """One generator per image.

    Raises:
        InputError: something else.
    """
    generators = list(value) if isinstance(value, list | tuple) else [value] * n
    found = [g for g in generators if isinstance(g, torch.Generator)]
    if len(found) != len(generators):
        raise InputError("generator must be a torch.Generator, or a list of them", found=shown(value))
    if len(found) != n:
        raise InputError("one generator per image is needed", found=len(found), expected=n)
    return found


def is_tensor(value: object) -> TypeGuard[Tensor]:
    """Whether a value is a dense tensor with data."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta


def require_finite(name: str, value: Tensor, remedy: str | None = None) -> None:
    """Refuse NaN and infinity.

    Raises:
        InputError: there is some.
    """
    if not bool(value.isfinite().all()):
        raise InputError(
            f"{name} hold NaN or infinite numbers", found=f"{tuple(value.shape)}, {value.dtype}", remedy=remedy
        )


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number, NumPy's included, and no truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a real number, NumPy's included, and no truth value."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except (OverflowError, ValueError):
        return False


def shown(value: object) -> str:
    """A value in a message: short, strings in quotes, and in ASCII, because it may hold anything."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except Exception as error:  # whatever an object's own repr raises
        text = f"{type(value).__name__} ({type(error).__name__} in its repr)"
    text = f"{text[:200]}..." if len(text) > 200 else text
    return ascii(text) if isinstance(value, str) else text.encode("ascii", "backslashreplace").decode()
