"""LoRA adapters, merged into the shared weights: W + scale * alpha / r * B A.

Merged weights cost nothing per step, and no engine is built again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from jitexport.errors import InputError, MissingDependencyError, ModelNotFoundError

_DOWN, _UP, _ALPHA = ".lora_A.weight", ".lora_B.weight", ".alpha"
_METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's configuration in a safetensors file


@dataclass(frozen=True)
class LowRank:
    """A change of one weight [out, in]: factor * up @ down, with up [out, r] and down [r, in]."""

    down: Tensor
    up: Tensor
    factor: float

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight it belongs to."""
        return self.up.shape[0], self.down.shape[1]

    def delta(self, scale: float, device: torch.device) -> Tensor:
        """The change at a scale, fp32."""
        return (scale * self.factor) * (self.up.to(device, torch.float32) @ self.down.to(device, torch.float32))


def read_lora(source: str | Path | Mapping[str, Tensor]) -> dict[str, LowRank]:
    """Read an adapter in diffusers' PEFT format, or one of those that diffusers converts to it (kohya, x-flux, ...).

    Args:
        source: a safetensors file, a folder with one, or a state dict.

    Returns:
        Changes by full weight name, "<component>.<name>.weight".

    Raises:
        ModelNotFoundError: no such file, or it cannot be read.
        InputError: keys that are no low-rank pairs of linear layers.
        MissingDependencyError: another format than PEFT's needs the `build` extra.
    """
    if isinstance(source, Mapping):
        state, metadata = dict(source), {}
    else:
        state, metadata = _read_file(Path(source))
    if not any(key.endswith(_DOWN) for key in state):
        state = _convert(state)
    return _pairs(state, metadata)


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise ModelNotFoundError(
                f"{path} must hold one adapter", found=f"{len(files)} safetensors files", remedy="name the file"
            )
        path = files[0]
    try:
        with safe_open(path, framework="pt") as file:
            raw = (file.metadata() or {}).get(_METADATA)
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        return state, json.loads(raw) if raw else {}
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelNotFoundError(
            f"cannot read the adapter {path}", found=error, expected="a safetensors file with LoRA weights"
        ) from error


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    try:
        from diffusers.loaders import FluxLoraLoaderMixin
    except ImportError as error:
        raise MissingDependencyError(
            "converting this adapter's format needs diffusers", found=error, remedy="pip install 'jitexport[build]'"
        ) from error
    try:
        converted, alphas = FluxLoraLoaderMixin.lora_state_dict(state, return_alphas=True)
    except Exception as error:  # the converters raise whatever an unexpected key leads to
        raise InputError("unknown adapter format", found=f"{type(error).__name__}: {error}") from error
    return converted | {k: torch.as_tensor(v) for k, v in (alphas or {}).items()}


def _pairs(state: dict[str, Tensor], metadata: dict[str, Any]) -> dict[str, LowRank]:
    changes: dict[str, LowRank] = {}
    used: set[str] = set()
    for key, down in state.items():
        if not key.endswith(_DOWN):
            continue
        module = key.removesuffix(_DOWN)
        up = state.get(module + _UP)
        if up is None or up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
            raise InputError(
                f"{module} is no low-rank pair of a linear layer",
                found=f"A {tuple(down.shape)}, B {None if up is None else tuple(up.shape)}",
                expected="A [r, in] and B [out, r]",
            )
        alpha = state.get(module + _ALPHA)
        factor = float(alpha) / down.shape[0] if alpha is not None else _factor(module, down.shape[0], metadata)
        changes[weight_name(module)] = LowRank(down, up, factor)
        used |= {key, module + _UP, module + _ALPHA}
    if rest := sorted(set(state) - used):
        raise InputError(
            "the adapter holds more than low-rank changes of linear layers",
            found=", ".join(rest[:3]),
            expected="pairs of lora_A and lora_B weights",
        )
    if not changes:
        raise InputError("the adapter is empty")
    return changes


def _factor(module: str, rank: int, metadata: dict[str, Any]) -> float:
    """alpha / r, or alpha / sqrt(r) with rank-stabilised scaling, from PEFT's configuration; 1 where there is none."""
    component, _, name = module.partition(".")
    config = {k.removeprefix(f"{component}."): v for k, v in metadata.items() if k.startswith(f"{component}.")}
    if not config:
        return 1.0
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if name == pattern or name.endswith(f".{pattern}"):
            alpha = value
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def weight_name(module: str) -> str:
    """Full name of a module's weight; text encoders' names lost a level in transformers 5."""
    if module.startswith("text_encoder.text_model."):
        module = "text_encoder." + module.removeprefix("text_encoder.text_model.")
    return module + ".weight"
