"""From an adapter to changes of a bundle's weights, checked against them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from jitexport.errors import InputError
from jitexport.lora.changes import Change, Decomposed, Difference, Hadamard, Kronecker, LowRank
from jitexport.lora.parts import Group, collect
from jitexport.lora.reading import read_adapter
from jitexport.lora.strengths import Strengths
from jitexport.models.naming import Naming, Resolver, Target

Shape = tuple[int, ...]


def read_lora(
    source: str | Path | Mapping[str, Tensor], naming: Naming, shapes: Mapping[str, Shape]
) -> dict[str, Change]:
    """Read an adapter for a model.

    Args:
        source: a safetensors file, a folder with one, or a state dict of tensors or NumPy arrays.
        naming: names of the model's family.
        shapes: of all the model's weights, by full name.

    Returns:
        Changes by full name of the weight that they change.

    Raises:
        ModelNotFoundError: no such file, or it cannot be read.
        InputError: anything that is not understood, or does not fit the model.
    """
    stored = read_adapter(source)
    if not stored.tensors:
        raise InputError("the adapter is empty")
    resolver = Resolver(naming, shapes)
    strengths = Strengths(stored)
    changes: dict[str, Change] = {}
    for group in collect(stored.tensors, resolver):
        for name, change in _of_group(group, resolver, strengths, shapes).items():
            if name in changes:
                raise InputError(
                    f"two parts of the adapter change {name}", found=group.name, expected="a change of each weight"
                )
            changes[name] = change
    return changes


def _of_group(
    group: Group, resolver: Resolver, strengths: Strengths, shapes: Mapping[str, Shape]
) -> dict[str, Change]:
    """All changes that a group of parts makes. Each part is used, or an error."""
    parts = dict(group.tensors)
    component = group.target.modules[0].partition(".")[0]
    alpha = _scalar(group, parts.pop("alpha")) if "alpha" in parts else None

    def factor(rank: int | None) -> float:
        return strengths.factor(group.name, resolver.local_name(group.name), component, alpha, rank)

    up_bias = parts.pop("up_bias", None)
    magnitude = parts.pop("magnitude", None)
    difference = parts.pop("difference", None)
    bias_difference = parts.pop("bias_difference", None)
    made: dict[str, list[Change]] = {"weight": [], "bias": []}
    change = _product_change(group, parts, factor)
    if parts:
        raise InputError(
            f"{group.name} is of no kind that is known", found=", ".join(sorted(group.keys[p] for p in parts))[:500]
        )
    if change is None and (alpha is not None or magnitude is not None or up_bias is not None):
        left = [p for p in ("alpha", "magnitude", "up_bias") if p in group.keys]
        raise InputError(
            f"{group.name} is no low-rank pair of a linear layer",
            found=", ".join(group.keys[p] for p in left), expected="matrices beside them",
        )
    if change is not None and magnitude is None and strengths.decomposed(component):
        raise InputError(f"{group.name} lacks its DoRA magnitude", expected="one, because use_dora is set")
    if change is not None:
        made["weight"].append(change if magnitude is None else _decomposed(group, change, magnitude))
    if difference is not None:
        made["weight"].append(Difference(difference))
    if up_bias is not None:
        if magnitude is not None or not isinstance(change, LowRank):
            raise InputError(f"a bias of {group.name} beside DoRA has no meaning", found=group.keys["up_bias"])
        made["bias"].append(Difference(up_bias, change.factor))
    if bias_difference is not None:
        made["bias"].append(Difference(bias_difference))
    found: dict[str, Change] = {}
    for leaf, ones in made.items():
        if len(ones) > 1:
            raise InputError(f"{group.name} changes its {leaf} in two ways", found=", ".join(group.keys.values())[:500])
        if ones:
            found |= _split(group, leaf, ones[0], shapes)
    return found


def _product_change(group: Group, parts: dict[str, Tensor], factor: Callable[[int | None], float]) -> Change | None:
    """LoRA, LoHa or LoKr of a group, whose parts it takes; None where there is none of them."""
    if "down" in parts or "up" in parts:
        down, up = parts.pop("down", None), parts.pop("up", None)
        if down is None or up is None or down.ndim != 2 or up.ndim != 2 or up.shape[1] != down.shape[0]:
            raise InputError(
                f"{group.name} is no low-rank pair of a linear layer",
                found=f"A {_shape(down)}, B {_shape(up)}", expected="A [r, in] and B [out, r]",
            )
        return LowRank(down, up, factor(_rank(group, down.shape[0])))
    if any(part.startswith("hada_") for part in parts):
        four = [parts.pop(f"hada_{p}", None) for p in ("w1_a", "w1_b", "w2_a", "w2_b")]
        found = [t for t in four if t is not None and t.ndim == 2]
        if len(found) == 4:
            a1, b1, a2, b2 = found
            if a1.shape == a2.shape and b1.shape == b2.shape and a1.shape[1] == b1.shape[0]:
                return Hadamard(a1, b1, a2, b2, factor(_rank(group, b1.shape[0])))
        raise InputError(
            f"{group.name} is no LoHa of a linear layer", found=", ".join(map(_shape, four)),
            expected="w1_a and w2_a [out, r], w1_b and w2_b [r, in]",
        )
    if any(part.startswith("lokr_") for part in parts):
        w1, w2 = _kronecker_side(group, parts, "w1"), _kronecker_side(group, parts, "w2")
        ranks = {side[1].shape[0] for side in (w1, w2) if len(side) == 2}
        if len(ranks) > 1:
            raise InputError(f"{group.name} is no LoKr of a linear layer", found=f"ranks {sorted(ranks)}")
        return Kronecker(w1, w2, factor(_rank(group, ranks.pop()) if ranks else None))
    return None


def _kronecker_side(group: Group, parts: dict[str, Tensor], side: str) -> list[Tensor]:
    whole, a, b = (parts.pop(f"lokr_{side}{end}", None) for end in ("", "_a", "_b"))
    given = [t for t in (whole, a, b) if t is not None]
    fits = len(given) == (1 if whole is not None else 2) and all(t.ndim == 2 and t.numel() for t in given)
    if not fits or (len(given) == 2 and given[0].shape[1] != given[1].shape[0]):
        raise InputError(
            f"{group.name} is no LoKr of a linear layer", found=", ".join(_shape(t) for t in given) or f"no {side}",
            expected=f"a matrix {side}, or {side}_a [m, r] and {side}_b [r, n]",
        )
    return given


def _decomposed(group: Group, inner: Change, magnitude: Tensor) -> Change:
    rows, columns = inner.shape
    shape = tuple(magnitude.shape)
    if shape in ((rows,), (rows, 1)):
        return Decomposed(inner, magnitude.flatten())
    if shape == (1, columns):
        return Decomposed(inner, magnitude.flatten(), by_column=True)
    raise InputError(
        f"the DoRA magnitude of {group.name} has another shape", found=shape,
        expected=f"{(rows,)}, {(rows, 1)} or {(1, columns)}",
    )


def _split(group: Group, leaf: str, change: Change, shapes: Mapping[str, Shape]) -> dict[str, Change]:
    """A change of a target's modules, by full name of their weights, each of the weight's shape."""
    target: Target = group.target
    names = [f"{module}.{leaf}" for module in target.modules]
    if missing := [name for name in names if name not in shapes]:
        raise InputError(f"the model has no {missing[0]}", found=group.name, remedy="use an adapter of this model")
    first = shapes[names[0]]
    expected = (sum(shapes[name][0] for name in names), *first[1:]) if first else first
    if change.shape != expected:
        raise InputError(f"{' and '.join(names)} has another shape", found=change.shape, expected=expected)
    if target.swapped:
        half = expected[0] // 2
        change = change.take(torch.arange(expected[0]).roll(-half))
    if len(names) == 1:
        return {names[0]: change}
    rows = torch.arange(expected[0])
    sizes = [shapes[name][0] for name in names]
    return {name: change.take(part) for name, part in zip(names, rows.split(sizes), strict=True)}


def _scalar(group: Group, alpha: Tensor) -> float:
    if alpha.numel() != 1:
        raise InputError(f"the alpha of {group.name} must be one number", found=tuple(alpha.shape))
    return float(alpha)


def _rank(group: Group, rank: int) -> int:
    if rank < 1:
        raise InputError(f"{group.name} has rank 0", expected="at least 1")
    return rank


def _shape(tensor: Tensor | None) -> str:
    return "None" if tensor is None else str(tuple(tensor.shape))
