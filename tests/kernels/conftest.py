"""The C++ kernels behind a C interface, compiled once a session."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jitexport.building.comparing import compare
from jitexport.kernels import native

HARNESS = """
#include "attention.h"
#include "linear.h"
using namespace jitexport;
using I = int64_t;

template <class Number, class Kind, int D>
void attend(
    const void* streams, const float* cos, const float* sin, I rotated, const float* mask, void* out, I b, I l, I h,
    int threads) {
  const auto s = static_cast<const Stream<Number>*>(streams);
  const float scale = 1 / std::sqrt(float(D));
  Attention<Kind, Number, D>{b, l, h, scale, 1e-6f, cos, sin, rotated, mask}.run(
      s, s + 2, s + 4, static_cast<Number*>(out), threads);
}
template <class Number, int D>
auto of_kind(bool quantized) {
  return quantized ? attend<Number, Quantized, D> : attend<Number, Plain<Number>, D>;
}
// Streams: two of queries, two of keys, two of values; l tokens in all.
extern "C" void attention(
    bool wide, bool quantized, const void* s, const float* cos, const float* sin, I rotated, const float* mask,
    void* out, I b, I l, I h, I d, int threads) {
  const auto run = wide ? d == 64 ? of_kind<float, 64>(quantized) : of_kind<float, 128>(quantized)
                        : d == 64 ? of_kind<uint16_t, 64>(quantized) : of_kind<uint16_t, 128>(quantized);
  run(s, cos, sin, rotated, mask, out, b, l, h, threads);
}

template <class Number, class Kind, bool GELU, class Out>
void layer(
    const void* x, const void* w, const float* s, const void* b, void* out, I r, I k, I n, int threads) {
  using Layer = Linear<Kind, Number, GELU, Out>;
  Layer{r, k, n}.run(
      static_cast<const Part<Number>*>(x), static_cast<const typename Layer::Weight*>(w), s,
      static_cast<const Number*>(b), static_cast<Out*>(out), threads);
}
template <class Number, class Kind>
auto of_result(bool gelu, bool wide) {
  return gelu ? wide ? layer<Number, Kind, true, float> : layer<Number, Kind, true, Number>
              : wide ? layer<Number, Kind, false, float> : layer<Number, Kind, false, Number>;
}
template <class Number>
auto of(bool quantized, bool gelu, bool wide) {
  return quantized ? of_result<Number, Quantized>(gelu, wide) : of_result<Number, Plain<Number>>(gelu, wide);
}
extern "C" void linear(
    bool fp32, bool quantized, bool gelu, bool wide, const void* x, const void* w, const float* s, const void* b,
    void* out, I r, I k, I n, int threads) {
  (fp32 ? of<float>(quantized, gelu, wide) : of<uint16_t>(quantized, gelu, wide))(x, w, s, b, out, r, k, n, threads);
}
extern "C" int top() { return Quantized::TOP; }
"""


DTYPES = (torch.float32, torch.bfloat16)


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    assert tensor is None or tensor.is_contiguous()
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


class CStream(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("norm", ctypes.c_void_p), ("tokens", ctypes.c_int64)]


class CPart(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("inputs", ctypes.c_int64)]


@dataclass(frozen=True)
class Kernels:
    library: ctypes.CDLL

    @property
    def top(self) -> int:
        """Largest magnitude of quantized activations."""
        return self.library.top()

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, *, int8: bool, threads: int = 2, split: int | None = None,
        norms: Sequence[tuple[Tensor, Tensor]] = ((None, None), (None, None)), cos: Tensor | None = None,
        sin: Tensor | None = None, mask: Tensor | None = None,
    ) -> Tensor:
        """Of all tokens, or of those before and from `split` on in streams of their own, with (q, k) norms of each."""
        assert len({t.dtype for t in (q, k, v)}) == 1 and q.dtype in DTYPES
        out = torch.full_like(q, torch.nan)
        batch, tokens, heads, channels = q.shape
        assert mask is None or (mask.shape == (batch, tokens) and mask.dtype == torch.float32)
        rotated = 0 if cos is None else cos.shape[1]
        split = tokens if split is None else split
        kept, streams = [], []
        for x, name in ((q, 0), (k, 1), (v, None)):
            for part, norm in zip((x[:, :split], x[:, split:]), norms, strict=True):
                kept.append(part.contiguous())
                weight = None if name is None else norm[name]
                streams.append(CStream(pointer(kept[-1]), pointer(weight), part.shape[1]))
        self.library.attention(
            q.dtype == torch.float32, int8, (CStream * 6)(*streams), pointer(cos), pointer(sin),
            ctypes.c_int64(rotated), pointer(mask), pointer(out),
            *map(ctypes.c_int64, (batch, tokens, heads, channels)), threads,
        )  # fmt: skip
        return out

    def linear(
        self, parts: Sequence[Tensor], weight: Tensor, bias: Tensor | None, scale: Tensor | None, *, gelu: bool,
        wide: bool, threads: int = 2,
    ) -> Tensor:
        dtype = parts[0].dtype
        assert {x.dtype for x in parts} == {dtype} and dtype in DTYPES
        assert weight.dtype == (dtype if scale is None else torch.int8)
        rows, outputs = len(parts[0]), len(weight)
        out = torch.full((rows, outputs), torch.nan, dtype=torch.float32 if wide else dtype)
        given = (CPart * len(parts))(*(CPart(pointer(x), x.shape[1]) for x in parts))
        self.library.linear(
            dtype == torch.float32, scale is not None, gelu, wide, given, *map(pointer, (weight, scale, bias, out)),
            *map(ctypes.c_int64, (rows, weight.shape[1], outputs)), threads,
        )  # fmt: skip
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
