"""A transformer's weights in one safetensors file, in the names of its authors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from jitexport.errors import InputError, ModelNotFoundError
from jitexport.models.naming import Naming, Resolver, Target

_LEAVES = {"weight": "weight", "bias": "bias", "scale": "weight"}  # norms call their weight "scale"


def read_single_file(
    path: Path, naming: Naming, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> dict[str, Tensor]:
    """All tensors of a transformer by full name, each of them from the file, and all of the file's among them.

    Args:
        shapes: that the transformer's configuration calls for, by full name.

    Raises:
        ModelNotFoundError: no such file, or it is damaged.
        InputError: tensors that are missing, unknown, of another shape, or of 8 bits with scales of their own.
    """
    resolver = Resolver(naming, shapes)
    values: dict[str, Tensor] = {}
    unknown: list[str] = []
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                target, leaf = _find(resolver, key, shapes)
                if target is None or target.partial:
                    unknown.append(key)
                    continue
                for full, value in _split(key, target, leaf, file.get_tensor(key), shapes).items():
                    if full in values:
                        raise InputError(f"{path} has {full} twice", found=key)
                    values[full] = value.to(dtype)
    except (OSError, SafetensorError) as error:
        raise ModelNotFoundError(f"cannot read {path}", found=error, expected="a safetensors file") from error
    missing = sorted(shapes.keys() - values.keys())
    if unknown or missing:
        raise InputError(
            f"{path} is no checkpoint of this transformer",
            found="; ".join(
                f"{len(names)} {what} tensors: {', '.join(names[:3])}"
                for what, names in (("unknown", sorted(unknown)), ("missing", missing)) if names
            ),
            expected="the transformer that the base folder describes, and nothing beside it",
            remedy="another base, or a file with the transformer alone, not quantized",
        )  # fmt: skip
    return values


def _find(resolver: Resolver, key: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Target | None, str]:
    """The modules that a tensor of a file belongs to, and what the tensor is called in them."""
    name, _, leaf = key.rpartition(".")
    if leaf in _LEAVES:
        return resolver.find(name), _LEAVES[leaf]
    for module in (name, key):  # a table, which authors may have outside of the module that diffusers has it in
        target = resolver.find(module)
        if target is not None and f"{target.modules[0]}.{leaf}" in shapes:
            return target, leaf
    return None, leaf


def _split(
    key: str, target: Target, leaf: str, value: Tensor, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    names = [f"{module}.{leaf}" for module in target.modules]
    known = [shapes[name] for name in names if name in shapes]
    expected = (sum(shape[0] for shape in known), *known[0][1:]) if len(known) == len(names) else None
    if tuple(value.shape) != expected or not value.is_floating_point():
        raise InputError(
            f"{key} does not fit the transformer", found=f"{tuple(value.shape)}, {value.dtype}", expected=expected
        )
    if target.swapped:
        value = torch.cat(value.chunk(2)[::-1])
    return dict(zip(names, value.split([shape[0] for shape in known]), strict=True))
