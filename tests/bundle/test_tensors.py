"""Mapped tensors are those that safetensors reads."""

import gc
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from jitexport.bundle.tensors import DTYPES, map_tensors


def sample(dtype):
    values = torch.randn(3, 5)
    return (values > 0) if dtype is torch.bool else (values * 10).to(dtype)


def test_equals_safetensors_for_every_dtype(tmp_path):
    tensors = {f"t{i}": sample(dtype) for i, dtype in enumerate(DTYPES.values())}
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.empty(0, 4), "odd": torch.ones(7, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    mapped, read = map_tensors(tmp_path / "a.safetensors"), load_file(tmp_path / "a.safetensors")
    assert mapped.keys() == read.keys()
    for name, tensor in read.items():
        assert mapped[name].dtype == tensor.dtype and mapped[name].shape == tensor.shape
        assert torch.equal(mapped[name].view(torch.uint8) if tensor.dim() else mapped[name],
                           tensor.view(torch.uint8) if tensor.dim() else tensor)  # fmt: skip


def test_tensors_that_are_not_aligned(tmp_path):
    """The format does not ask for it: here the header's length is odd."""
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    header += b" " * (1 - len(header) % 2)
    values = torch.tensor([1.5, -2.0])
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + values.numpy().tobytes())
    assert (8 + len(header)) % 4
    assert torch.equal(map_tensors(file)["a"], values)


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{}", b"\xff" * 64])
def test_what_is_no_safetensors_file(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises((SafetensorError, OSError)):
        map_tensors(tmp_path / "a.safetensors")


def test_nothing_is_kept(tmp_path):
    save_file({f"t{i}": torch.zeros(300, 1000 + i) for i in range(20)}, tmp_path / "a.safetensors")
    for _ in range(3):
        map_tensors(tmp_path / "a.safetensors")
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(50):
        map_tensors(tmp_path / "a.safetensors")
    gc.collect()
    assert sys.getallocatedblocks() - before < 500, "less than half an object a tensor"
