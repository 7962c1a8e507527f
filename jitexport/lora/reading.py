"""Adapters as they are stored: tensors, and the settings beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from jitexport.arguments import is_tensor
from jitexport.errors import InputError, ModelNotFoundError

METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's configuration in a safetensors file
CONFIG = "adapter_config.json"  # where PEFT keeps it beside the file
PEFT_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class Stored:
    """An adapter as it is stored.

    Attributes:
        tensors: by key, all of them floating-point and finite, in memory of their own.
        header: the safetensors file's own metadata.
        configs: PEFT's settings by component; under "" those that hold for all of them.
    """

    tensors: dict[str, Tensor]
    header: Mapping[str, str] = field(default_factory=dict)
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def read_adapter(source: str | Path | Mapping[str, Tensor]) -> Stored:
    """An adapter of a safetensors file, of a folder with one, or of a state dict of tensors or NumPy arrays.

    Raises:
        ModelNotFoundError: no such file, or it cannot be read.
        InputError: values that are no finite floating-point tensors, or settings that are no JSON objects.
    """
    if isinstance(source, Mapping):
        stored = Stored({_key(k): _tensor(k, v) for k, v in source.items()})
    elif isinstance(source, str | Path) and str(source) and "\0" not in str(source):
        stored = _read_file(Path(source))
    else:
        raise InputError(
            "an adapter is a safetensors file, a folder with one, or a state dict",
            found=f"{type(source).__name__} {str(source)[:50]!r}",
        )
    for key, tensor in stored.tensors.items():
        _check_values(key, tensor)
    return stored


def _read_file(path: Path) -> Stored:
    try:
        path = _only_file(path) if path.is_dir() else path
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelNotFoundError(
            f"cannot read the adapter {path}", found=error, expected="a safetensors file with LoRA weights"
        ) from error
    configs: dict[str, dict[str, Any]] = {}
    if METADATA in header:
        for name, value in _json_object(header[METADATA], f"{METADATA} in {path}").items():
            component, _, setting = name.partition(".")
            configs.setdefault(component, {})[setting] = value
    beside = path.parent / CONFIG
    if beside.is_file():
        try:
            text = beside.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ModelNotFoundError(f"cannot read {beside}", found=error) from error
        configs[""] = _json_object(text, str(beside))
    return Stored(tensors, header, configs)


def _only_file(folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    peft = [file for file in files if file.name == PEFT_FILE]
    if len(files) != 1 and not peft:
        raise ModelNotFoundError(
            f"{folder} must hold one adapter", found=f"{len(files)} safetensors files", remedy="name the file"
        )
    return (peft or files)[0]


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON", found=error) from error
    if not isinstance(value, dict):
        raise InputError(f"{where} is no JSON object", found=type(value).__name__)
    return value


def _key(key: object) -> str:
    if not isinstance(key, str):
        raise InputError("an adapter's keys must be strings", found=f"{type(key).__name__} {str(key)[:50]}")
    return key


def _tensor(key: str, value: object) -> Tensor:
    """A copy, so that the caller may change theirs, and an ordinary tensor whatever mode theirs was made in."""
    if isinstance(value, np.ndarray | np.floating | float | int) and not isinstance(value, bool):
        array = np.array(value)
        if array.dtype.kind not in "fiu":
            raise InputError(f"{key[:200]} is no tensor of numbers", found=f"NumPy array of {array.dtype}")
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
    if not is_tensor(value):
        found = f"{value.layout} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"{key[:200]} is no tensor of numbers", found=found)
    return value.detach().clone()


def _check_values(key: str, tensor: Tensor) -> None:
    scalar = tensor.numel() == 1 and tensor.dtype in (torch.int64, torch.int32)  # a whole-numbered alpha
    if not tensor.is_floating_point() and not scalar:
        raise InputError(f"{key[:200]} is no floating-point tensor", found=tensor.dtype)
    if not bool(tensor.to(torch.float32).isfinite().all()):
        raise InputError(
            f"{key[:200]} holds NaN or infinite numbers", found=f"{tuple(tensor.shape)}, {tensor.dtype}",
            remedy="the adapter is damaged, or overflowed when it was trained or converted",
        )
