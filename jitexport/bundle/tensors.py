"""Tensors of safetensors files, mapped into memory."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

#: Names of dtypes in the format.
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU, in the file's own pages; not to be written to.

    safetensors reads and checks the header. The tensors lie behind it without gaps and are mapped by torch: with
    safetensors' own `get_tensor`, each load would keep some 30 bytes a tensor for good (versions 0.5 to 0.8).

    Raises:
        SafetensorError: it is no safetensors file.
        OSError: it cannot be read.
        KeyError: a dtype that torch does not have.
    """
    tensors = {}
    with safe_open(path, framework="pt") as file, path.open("rb") as raw:
        at = 8 + int.from_bytes(raw.read(8), "little")
        pages = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
        for name in file.offset_keys():
            entry = file.get_slice(name)
            dtype, shape = DTYPES[entry.get_dtype()], torch.Size(entry.get_shape())
            end = at + shape.numel() * dtype.itemsize
            part = pages[at:end]
            aligned = part if at % dtype.itemsize == 0 else part.clone()  # few writers pad, and none has to
            tensors[name] = aligned.view(dtype).view(shape)
            at = end
    return tensors
