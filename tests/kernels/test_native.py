"""The kernels in compiled code: by Inductor, in engines, and on weights that change."""

import re
from contextlib import suppress
from functools import partial

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from jitexport import registry
from jitexport.build import eager_pipeline, probe_inputs
from jitexport.kernels import native
from jitexport.kernels.attention import Stream, attention
from jitexport.kernels.linear import linear, quantize
from jitexport.models.flux import FluxAdapter
from jitexport.plan import CustomSchedule, plan
from tests import tiny
from tests.kernels.conftest import needs_kernels, relative

CPU = torch.device("cpu")


def compiled(function, *inputs, kernels):
    """The result of a compiled function, and the code that Inductor made of it."""
    torch.compiler.reset()

    def run():
        with torch.no_grad():
            return torch.compile(function, options={"fx_graph_cache": False})(*inputs)

    if not kernels:
        out, code = run_and_get_code(run)
    else:
        with native.native_kernels():
            out, code = run_and_get_code(run)
    return out, "\n".join(code)


def test_other_machines_are_told_apart(monkeypatch):
    everything = dict.fromkeys(native.INSTRUCTIONS, True)
    for has, reason in [
        (everything, None),
        (everything | {"avx512_vnni": False}, "avx512_vnni"),
        ({}, "avx512_bf16"),
        (everything | {"amx_tile": True}, "AMX"),
    ]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has)
        assert native.missing() is None if reason is None else reason in native.missing()
        with native.native_kernels():
            assert native.wanted(torch.zeros(1).bfloat16()) == (reason is None)
            assert not native.wanted(torch.zeros(1))
        assert not native.wanted(torch.zeros(1).bfloat16())


def test_lowerings_may_come_late(monkeypatch):
    """Modules with kernels are imported with the models that need them, perhaps after the first compilation."""
    taught = []
    monkeypatch.setattr(native, "missing", lambda: None)
    monkeypatch.setattr(
        "torch._inductor.lowering.register_lowering", lambda operator, **_: lambda low: taught.append((operator, low))
    )
    monkeypatch.setattr(native, "_lowerings", {})
    for name in ("first", "second"):
        native.lowers(name)(len)
        for _ in range(2):
            with native.native_kernels():
                assert taught[-1] == (name, len)
    assert len(taught) == 2


def test_headers_are_whole():
    for name in ("attention.h", "linear.h"):
        text = native.source(name)
        assert '#include "' not in text and "struct BF16" in text


@pytest.mark.parametrize("int8", [False, True])
def test_views_of_one_buffer_and_other_layouts(normal, int8):
    """q, k and v from one fused projection, of which k lies in memory by heads."""
    needs_kernels()

    def function(x, w):
        q, k, v = (x @ w).unflatten(-1, (3, 2, 64)).unbind(2)
        k = k.transpose(1, 2).contiguous().transpose(1, 2)
        return attention([Stream(q, k, v)], int8=int8).flatten(2) * 2

    x, w = normal(2, 70, 32), normal(32, 384, seed=1)
    out, code = compiled(function, x, w, kernels=True)
    plain, other = compiled(function, x, w, kernels=False)
    assert f"Attention<{'Int8' if int8 else 'BF16'}, 64>{{" in code and "Attention<" not in other
    assert relative(out, plain) < 0.04


def test_one_buffer_as_several_inputs(normal):
    """The same tensor, and parts of one that lie in memory as they are taken."""
    needs_kernels()
    angles = normal(1, 70, 32, seed=3).float()

    def function(x, y, w):
        q, k, v = y.unbind(0)
        streams = [Stream(x, x, x, w, w), Stream(q, k, v, w, w)]
        return attention(streams, angles.cos(), angles.sin()), linear([x.flatten(2), v[:, :30].flatten(2)], wide)

    inputs = normal(2, 30, 1, 64), normal(3, 2, 40, 1, 64, seed=1), normal(64, seed=2)
    wide = normal(64, 128, seed=4)
    out, code = compiled(function, *inputs, kernels=True)
    plain, _ = compiled(function, *inputs, kernels=False)
    assert "Attention<BF16, 64>{" in code and "Linear<BF16, false, uint16_t>" in code
    for found, expected in zip(out, plain, strict=True):
        assert relative(found, expected) < 0.01


def test_layers_with_and_without_bias_in_one_graph(normal):
    needs_kernels()
    weight, scale = quantize(normal(128, 64, seed=1), "int8")
    back, its = quantize(normal(64, 128, seed=2), "int8")

    def function(x, bias):
        x = x[:, 1:].flatten(0, 1)  # a view with an offset
        y = linear([x], weight, bias, scale[:, 0], gelu=True)
        return x + linear([y[:, :64], y[:, 64:]], back, None, its[:, 0], wide=True)

    inputs = normal(2, 30, 64, seed=3), normal(128, seed=4)
    out, code = compiled(function, *inputs, kernels=True)
    assert "Linear<Int8, true, uint16_t>" in code and "Linear<Int8, false, float>" in code
    assert relative(out, compiled(function, *inputs, kernels=False)[0]) < 0.01


def test_shapes_that_do_not_fit_go_by_operators(normal):
    needs_kernels()
    weight, scale = quantize(normal(40, 64, seed=1), "int8")
    function = lambda x: linear([x], weight, None, scale[:, 0])  # noqa: E731
    _, code = compiled(function, normal(30, 64), kernels=True)
    assert "Linear<" not in code
    x, norm = normal(1, 30, 2, 64), normal(64, seed=1)
    for streams in (
        [Stream(*[x[..., :32]] * 3)],
        [Stream(x, x, x.float())],
        [Stream(x, x, x, norm.float(), norm)],
        [Stream(x, x, x, norm, norm), Stream(x, x, x)],
    ):
        # PyTorch's operators may refuse what the kernel must not be given.
        with suppress(RuntimeError):
            _, code = compiled(lambda s=streams: attention(s), kernels=True)
            assert "Attention<" not in code


@pytest.mark.parametrize(("backend", "quantization"), [("aoti", "int8"), ("inductor", None)])
def test_engines_run_the_kernels_on_weights_that_change(tmp_path, caplog, backend, quantization):
    needs_kernels()
    model = tiny.save_flux(tmp_path / "model", guidance=True, channels=64)
    adapter = FluxAdapter.from_folder(model, torch.bfloat16, {"quantization": quantization})
    made = plan(adapter, custom=CustomSchedule((2,), (1.0,)), method="dense", dtype="bf16")
    pipe = eager_pipeline(adapter, made.schedule, made.method, made.options, batch=1, dtype="bf16", device=CPU)
    stage = made.schedule.engines[0].name
    with torch.no_grad():
        spec, inputs = next(probe for probe in probe_inputs(pipe) if probe[0].name == stage)
    directory = tmp_path / "engine"
    directory.mkdir()
    with torch.inference_mode(False), torch.no_grad():
        registry.backend(backend).build(spec, adapter.module(stage), inputs, directory)
    libraries = [p.read_bytes() for p in directory.rglob("*.so")]
    assert any(b"jitexport" in code and b"Attention" in code for code in libraries)
    kind = b"BF16" if quantization is None else b"Int8"
    assert any(re.search(rb"6LinearI\w*?4" + kind, code) for code in libraries)

    def run(kind, weights):
        made = partial(FluxAdapter.from_configs, adapter.configs, adapter.settings(), torch.bfloat16)
        with torch.no_grad():
            return registry.backend(kind).load(spec, directory, weights, lambda: made().module(stage), CPU)(inputs)[0]

    weights = dict(adapter.tensors())
    others = {n: w.flip(0).contiguous() if "blocks" in n and w.dim() == 2 else w for n, w in weights.items()}
    first, second = (run("eager", w) for w in (weights, others))
    assert relative(run(backend, weights), first) < 0.02
    assert relative(run(backend, others), second) < 0.02 < relative(first, second)
    assert "compiled again" not in caplog.text  # by inductor, whose cache knows the operators
