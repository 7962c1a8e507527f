"""The C++ kernels behind a C interface, compiled once a session."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jitexport.build import compare
from jitexport.kernels import native

HARNESS = """
#include "attention.h"
#include "linear.h"
using namespace jitexport;
using I = int64_t;

template <class Kind, int D>
void attend(const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* out, I b, I l, I h, int threads) {
  Attention<Kind, D>::run({q, l, h, D}, {k, l, h, D}, {v, l, h, D}, out, b, 1 / std::sqrt(float(D)), threads);
}
extern "C" void attention(
    bool int8, const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* out, I b, I l, I h, I d,
    int threads) {
  const auto run = d == 64 ? int8 ? attend<Int8, 64> : attend<BF16, 64> : int8 ? attend<Int8, 128> : attend<BF16, 128>;
  run(q, k, v, out, b, l, h, threads);
}

template <bool GELU, class Out>
void layer(
    const uint16_t* x, const int8_t* w, const float* s, const uint16_t* b, void* out, I r, I k, I n, int threads) {
  Linear<GELU, Out>{r, k, n}.run(x, w, s, b, static_cast<Out*>(out), threads);
}
extern "C" void linear(
    bool gelu, bool wide, const uint16_t* x, const int8_t* w, const float* s, const uint16_t* b, void* out, I r, I k,
    I n, int threads) {
  const auto run = gelu ? wide ? layer<true, float> : layer<true, uint16_t>
                        : wide ? layer<false, float> : layer<false, uint16_t>;
  run(x, w, s, b, out, r, k, n, threads);
}
"""


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    assert tensor is None or tensor.is_contiguous()
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


@dataclass(frozen=True)
class Kernels:
    library: ctypes.CDLL

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *, int8: bool, threads: int = 2) -> Tensor:
        assert {t.dtype for t in (q, k, v)} == {torch.bfloat16}
        out = torch.full_like(q, torch.nan)
        batch, tokens, heads, channels = map(ctypes.c_int64, q.shape)
        self.library.attention(int8, *map(pointer, (q, k, v, out)), batch, tokens, heads, channels, threads)
        return out

    def linear(
        self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, *, gelu: bool, wide: bool, threads: int = 2
    ) -> Tensor:
        assert (x.dtype, weight.dtype, scale.dtype) == (torch.bfloat16, torch.int8, torch.float32)
        dtype = torch.float32 if wide else torch.bfloat16
        out = torch.full((len(x), len(weight)), torch.nan, dtype=dtype)
        sizes = map(ctypes.c_int64, (*x.shape, len(weight)))
        self.library.linear(gelu, wide, *map(pointer, (x, weight, scale, bias, out)), *sizes, threads)
        return out


def relative(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    return compare([a], [b])[0]


def needs_kernels() -> None:
    if reason := native.missing():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    needs_kernels()
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "harness.cpp").write_text(HARNESS)
    compiler = shutil.which("g++") or shutil.which("clang++")
    headers = Path(native.__file__).parent
    subprocess.run(
        [compiler, "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-Wall", "-Werror", f"-I{headers}",
         # Inductor's -ffast-math is left out: at link time GCC 12 makes it change the whole process's arithmetic.
         # GCC 12 warns of its own headers.
         "-Wno-unknown-pragmas", "-Wno-uninitialized", "-Wno-maybe-uninitialized", "harness.cpp", "-o", "harness.so"],
        check=True, cwd=folder,
    )  # fmt: skip
    return Kernels(ctypes.CDLL(str(folder / "harness.so")))


@pytest.fixture(scope="session")
def normal() -> Callable[..., Tensor]:
    """Normal numbers in bf16, the same for the same shape and seed."""

    def make(*shape: int, seed: int = 0) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()

    return make
