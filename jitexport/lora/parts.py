"""Keys of adapters: which part of a change a tensor is, and of which modules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from jitexport.errors import InputError
from jitexport.models.naming import Resolver, Target

_ADAPTER = r"(?:\.(?!weight$|bias$)[\w-]+)?"  # the adapter's name, in saves of a whole PEFT model

#: (end of the key, part), the first that fits.
PARTS = [
    (re.compile(rf"{end}$"), part)
    for end, part in (
        (rf"\.lora_A{_ADAPTER}(?:\.weight)?", "down"),
        (rf"\.lora_B{_ADAPTER}(?:\.weight)?", "up"),
        (rf"\.lora_B{_ADAPTER}\.bias", "up_bias"),
        (r"\.lora_down\.weight", "down"),
        (r"\.lora_up\.weight", "up"),
        (r"\.lora_up\.bias", "up_bias"),
        (r"\.lora(?:_linear_layer)?\.down\.weight", "down"),
        (r"\.lora(?:_linear_layer)?\.up\.weight", "up"),
        (r"(?<=lora|ora1|ora2)\.down\.weight", "down"),  # XLabs: the module's own name ends with "lora"
        (r"(?<=lora|ora1|ora2)\.up\.weight", "up"),
        (r"\.alpha", "alpha"),
        (r"\.dora_scale", "magnitude"),
        (rf"\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?", "magnitude"),
        (r"\.diff", "difference"),
        (r"\.diff_b", "bias_difference"),
        (r"\.w_norm", "difference"),  # LyCORIS' names for norms
        (r"\.b_norm", "bias_difference"),
        (r"\.hada_(w[12]_[ab])", "hada_"),
        (r"\.lokr_(w[12](?:_[ab])?)", "lokr_"),
    )
]

#: (what a key ends with, why it is refused).
REFUSED = [
    (re.compile(end), why)
    for end, why in (
        (r"\.(lora_mid\.weight|hada_t[12]|lokr_t[12])$", "a Tucker decomposition, which belongs to convolutions"),
        (r"\.(oft_\w+|boft_\w+)(\.|$)", "OFT rotates weights"),
        (r"\.(a[12]|b[12])\.weight$", "GLoRA"),
        (r"\.(set_weight|reshape_weight)$", "it replaces a weight instead of changing it"),
        (r"\.modules_to_save(\.|$)", "it replaces a module instead of changing it"),
        (r"\.lora_embedding_[AB](\.|$)", "an adapter of an embedding"),
        (r"\.(lora_E|ranknum)(\.|$)", "AdaLoRA"),
        (r"\.vera_lambda_\w+(\.|$)", "VeRA"),
        (r"\.on_input$|\.ia3_l(\.|$)", "IA3"),
        (r"\.scalar$", "a learned factor beside alpha"),
        (r"\.(weight|bias)$", "it replaces a weight instead of changing it"),
    )
]  # fmt: skip


@dataclass
class Group:
    """All parts of the change of a target.

    Attributes:
        name: a module's name as the file has it.
        tensors: by part; `keys` their keys in the file.
    """

    name: str
    target: Target
    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)


def collect(tensors: Mapping[str, Tensor], resolver: Resolver) -> list[Group]:
    """Sort an adapter's tensors by the modules that they change.

    Raises:
        InputError: a key that is not understood, a module that the bundle does not have, or two tensors for one part.
    """
    groups: dict[Target, Group] = {}
    unknown: list[str] = []
    strange: list[str] = []
    constant: list[str] = []
    for key, tensor in tensors.items():
        split = split_key(key)
        if split is None:
            unknown.append(f"{key[:200]}{_reason(key)}")
            continue
        name, part = split
        target = resolver.find(name)
        if target is None:
            (constant if resolver.is_constant(name) else strange).append(key[:200])
            continue
        group = groups.setdefault(target, Group(name, target))
        if part in group.tensors:
            raise InputError(
                f"two tensors change the same weight, {', '.join(target.modules)}",
                found=f"{group.keys[part]} and {key}"[:500], expected="one adapter in one naming",
            )
        group.tensors[part], group.keys[part] = tensor, key
    if unknown:
        raise InputError(
            f"the adapter holds more than low-rank changes: {len(unknown)} of {len(tensors)} keys are not understood",
            found=_some(unknown), expected="LoRA, DoRA, LoHa, LoKr, or differences of weights, biases and norms",
        )
    if strange:
        raise InputError(
            f"{len(strange)} of {len(tensors)} weights are not the model's", found=_some(strange),
            expected="modules that this bundle has", remedy="use an adapter of this model",
        )
    if constant:
        raise InputError(
            f"{len(constant)} of {len(tensors)} weights are of layers whose results are constants of the bundle",
            found=_some(constant), expected="changes of layers that engines run",
            remedy="merge the adapter into the model (diffusers' fuse_lora), save it, and build a bundle of that",
        )
    return list(groups.values())


def split_key(key: str) -> tuple[str, str] | None:
    """(module's name in the file, part) of a key; None for one that is not understood."""
    for pattern, part in PARTS:
        match = pattern.search(key)
        if match and match.start():
            return key[: match.start()], part + "".join(match.groups())
    return None


def _reason(key: str) -> str:
    why = next((why for pattern, why in REFUSED if pattern.search(key)), None)
    return f" ({why})" if why else ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
