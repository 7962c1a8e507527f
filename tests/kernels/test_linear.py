import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from jitexport.kernels.linear import by_torch, gelu_tanh, linear_8bit, quantize
from tests.kernels.conftest import relative


def test_gelu_is_pytorchs_and_stays_finite():
    y = torch.linspace(-30, 30, 1001)
    torch.testing.assert_close(gelu_tanh(y), F.gelu(y, approximate="tanh"), rtol=1e-5, atol=1e-6)
    assert gelu_tanh(torch.tensor([-1e4, 1e4])).tolist() == [0.0, 1e4]


@given(
    rows=st.integers(1, 80), inputs=st.integers(1, 5), outputs=st.integers(1, 4), bias=st.booleans(),
    gelu=st.booleans(), wide=st.booleans(),
)
@example(rows=24, inputs=4, outputs=1, bias=True, gelu=True, wide=False)  # whole blocks
@example(rows=1, inputs=20, outputs=16, bias=False, gelu=False, wide=True)
def test_the_kernel_is_the_layer(kernels, normal, rows, inputs, outputs, bias, gelu, wide):
    x = normal(rows, 64 * inputs)
    weight, scale = quantize(normal(64 * outputs, 64 * inputs, seed=1), "int8")
    b = normal(64 * outputs, seed=2) if bias else None
    out = kernels.linear(x, weight, scale[:, 0].contiguous(), b, gelu=gelu, wide=wide)
    # Roundings of activations that lie between two numbers may differ.
    torch.testing.assert_close(out.float(), by_torch(x, weight, scale[:, 0], b, gelu), rtol=0.01, atol=0.1)
    assert relative(out, by_torch(x, weight, scale[:, 0], b, gelu)) < 0.004


def test_whole_numbers_are_exact(kernels):
    """Rows whose largest is 127 have scale 1: nothing is rounded."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (30, 256), generator=generator)
    x[:, 0] = 127
    weight = torch.randint(-127, 128, (128, 256), generator=generator, dtype=torch.int8)
    out = kernels.linear(x.bfloat16(), weight, torch.ones(128), None, gelu=False, wide=True)
    assert torch.equal(out, (x @ weight.T.long()).float())


def test_extremes_do_not_overflow(kernels):
    x = torch.full((7, 1024), 1e30).bfloat16()
    weight = torch.full((64, 1024), -127, dtype=torch.int8)
    out = kernels.linear(x, weight, torch.full((64,), 1e-30), None, gelu=False, wide=True)
    torch.testing.assert_close(out, torch.full((7, 64), -127.0 * 1024), rtol=0.01, atol=0)
    assert not kernels.linear(0 * x, weight, torch.ones(64), None, gelu=True, wide=False).any()


def test_the_number_of_threads_does_not_matter(kernels, normal):
    x = normal(100, 128)
    weight, scale = quantize(normal(192, 128, seed=1), "int8")
    one, three = (
        kernels.linear(x, weight, scale[:, 0].contiguous(), None, gelu=True, wide=True, threads=n) for n in (1, 3)
    )
    assert torch.equal(one, three)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gelu", [False, True])
def test_layers_of_pytorchs_operators(normal, kind, dtype, gelu):
    x, w, b = normal(20, 48), normal(32, 48, seed=1), normal(32, seed=2)
    weight, scale = quantize(w, kind)
    out = linear_8bit(x, weight, scale[:, 0], b, gelu=gelu, dtype=dtype)
    y = F.linear(x.float(), w.float(), b.float())
    assert out.dtype == dtype
    assert relative(out, F.gelu(y, approximate="tanh") if gelu else y) < {"int8": 0.02, "fp8": 0.06}[kind]
