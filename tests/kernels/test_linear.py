import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from jitexport.kernels.linear import MOST_INPUTS, gelu_tanh, linear, quantize
from tests.kernels.conftest import DTYPES, relative


def test_gelu_is_pytorchs_and_stays_finite():
    y = torch.linspace(-30, 30, 1001)
    torch.testing.assert_close(gelu_tanh(y), F.gelu(y, approximate="tanh"), rtol=1e-5, atol=1e-6)
    assert gelu_tanh(torch.tensor([-1e4, 1e4])).tolist() == [0.0, 1e4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_layers_of_pytorchs_operators(normal, dtype, gelu, wide):
    x, w, b = (normal(*s, seed=i).to(dtype) for i, s in enumerate([(2, 20, 48), (32, 48), (32,)]))
    out = linear([x[..., :16], x[..., 16:]], w, b, gelu=gelu, wide=wide)
    y = F.linear(x.float(), w.float(), b.float())
    assert out.shape == (2, 20, 32) and out.dtype == (torch.float32 if wide else dtype)
    assert relative(out, F.gelu(y, approximate="tanh") if gelu else y) < 0.004
    assert linear([-1000 * x.abs()], w, b, gelu=gelu).isfinite().all()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gelu", [False, True])
def test_8_bit_layers_of_pytorchs_operators(normal, kind, dtype, gelu):
    x, w, b = normal(2, 10, 48).to(dtype), normal(32, 48, seed=1), normal(32, seed=2)
    weight, scale = quantize(w, kind)
    y = F.linear(x.float(), w.float(), b.float())
    wanted = F.gelu(y, approximate="tanh") if gelu else y
    for parts in ([x], [x[..., :16], x[..., 16:]]):
        out = linear(parts, weight, b, scale[:, 0], gelu=gelu)
        assert out.shape == (2, 10, 32) and out.dtype == dtype
        assert relative(out, wanted) < {"int8": 0.02, "fp8": 0.06}[kind]
    assert linear([x], weight, b, scale[:, 0], gelu=gelu, wide=True).dtype == torch.float32


@given(
    rows=st.integers(1, 80), parts=st.lists(st.integers(1, 5), min_size=1, max_size=3), outputs=st.integers(1, 4),
    bias=st.booleans(), int8=st.booleans(), gelu=st.booleans(), wide=st.booleans(), dtype=st.sampled_from(DTYPES),
)
@example(rows=24, parts=[4], outputs=1, bias=True, int8=True, gelu=True, wide=False, dtype=torch.bfloat16)  # blocks
@example(rows=1, parts=[4, 16], outputs=16, bias=False, int8=False, gelu=False, wide=True, dtype=torch.float32)
def test_the_kernel_is_the_layer(kernels, normal, rows, parts, outputs, bias, int8, gelu, wide, dtype):
    x = [normal(rows, 64 * inputs, seed=i).to(dtype) for i, inputs in enumerate(parts)]
    weight, scale = normal(64 * outputs, 64 * sum(parts), seed=10).to(dtype), None
    if int8:
        weight, scale = quantize(weight, "int8")
        scale = scale[:, 0].contiguous()
    b = normal(64 * outputs, seed=11).to(dtype) if bias else None
    out = kernels.linear(x, weight, b, scale, gelu=gelu, wide=wide)
    assert out.dtype == (torch.float32 if wide else dtype)
    x, weight = torch.cat(x, dim=1), weight.double()
    x, weight = (rounded(x.float(), kernels.top).double(), weight * scale[:, None]) if int8 else (x.double(), weight)
    wanted = F.linear(x, weight, None if b is None else b.double())
    wanted = F.gelu(wanted, approximate="tanh") if gelu else wanted
    assert relative(out, wanted) < (1e-6 if not int8 and dtype == torch.float32 else 0.004)
    torch.testing.assert_close(out.double(), wanted, rtol=0.01, atol=0.1)


def rounded(x, top):
    """Rows as whole numbers up to `top` and a scale for each row, by the kernel's steps, so that ties fall alike."""
    peak = x.abs().amax(dim=1, keepdim=True)
    return (x * (torch.full_like(peak, top) / peak)).round() * (peak / top)


def test_whole_numbers_are_exact(kernels):
    """Rows whose largest is that of the kernel's numbers have scale 1: nothing is rounded."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-kernels.top, kernels.top + 1, (30, 256), generator=generator)
    x[:, 0] = kernels.top
    weight = torch.randint(-127, 128, (128, 256), generator=generator, dtype=torch.int8)
    out = kernels.linear([x.float()], weight, None, torch.ones(128), gelu=False, wide=True)
    assert torch.equal(out, (x @ weight.T.long()).float())


def test_extremes_do_not_overflow(kernels):
    x = torch.full((7, MOST_INPUTS), 1e30).bfloat16()
    weight = torch.full((64, MOST_INPUTS), -127, dtype=torch.int8)
    out = kernels.linear([x], weight, None, torch.full((64,), 1e-30), gelu=False, wide=True)
    torch.testing.assert_close(out, torch.full((7, 64), -127.0 * MOST_INPUTS), rtol=0.01, atol=0)
    y = kernels.linear([x[:, :64].float()], torch.eye(64), None, None, gelu=True, wide=True)
    assert torch.equal(y, x[:, :64].float())
    y = kernels.linear([-x[:, :64].float()], torch.eye(64), None, None, gelu=True, wide=True)
    torch.testing.assert_close(y, torch.zeros(7, 64))
    nothing = torch.full((7, 64), torch.nan)
    assert kernels.linear([nothing], torch.eye(64), None, None, gelu=True, wide=True).isnan().all()
    assert not kernels.linear([0 * x], weight, None, torch.ones(64), gelu=True, wide=False).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("int8", [False, True])
def test_the_number_of_threads_does_not_matter(kernels, normal, int8, dtype):
    x, weight, scale = normal(100, 128).to(dtype), normal(192, 128, seed=1).to(dtype), None
    if int8:
        weight, scale = quantize(weight, "int8")
        scale = scale[:, 0].contiguous()
    one, three = (kernels.linear([x], weight, None, scale, gelu=True, wide=True, threads=n) for n in (1, 3))
    assert torch.equal(one, three)
