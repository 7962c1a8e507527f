"""The kernels in compiled code: by Inductor, in engines, and on weights that change."""

import re
from contextlib import suppress
from functools import partial

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from jitexport import registry
from jitexport.building.reference import eager_pipeline, probe_inputs
from jitexport.kernels import native
from jitexport.kernels.attention import Stream, attention
from jitexport.kernels.linear import linear, quantize
from jitexport.models.flux import FluxAdapter
from jitexport.plan import CustomSchedule, plan
from jitexport.specs import DTYPES
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


def having(*sets):
    return {name: True for chosen in sets for name in chosen.features}


@pytest.mark.parametrize(
    ("has", "dtypes", "reason"),
    [
        (having(native.AVX2), (torch.float32, torch.bfloat16), None),
        (having(native.AVX2, native.AVX512) | {"avx512_f": True}, (torch.bfloat16,), None),
        (having(native.AVX2, native.AVX512) | {"avx512_f": True, "avx512_vnni": False}, (), "lacks avx512_vnni"),
        (having(native.AVX2) | {"fma3": False}, (), "lacks fma3"),
        (having(native.AVX2, native.AVX512) | {"avx512_f": True, "amx_tile": True}, (), "AMX"),
        ({}, (), "avx2"),
    ],
)
def test_machines_are_told_apart(monkeypatch, has, dtypes, reason):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert native.missing() is None if reason is None else reason in native.missing()
    with native.native_kernels():
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            assert native.wanted(torch.zeros(1, dtype=dtype)) == (dtype in dtypes)
        assert not native.wanted(torch.zeros(1, device="meta"))
    assert not native.wanted(torch.zeros(1))


def test_lowerings_may_come_late(monkeypatch):
    """Modules with kernels are imported with the models that need them, perhaps after the first compilation."""
    taught = []
    monkeypatch.setattr(native, "instructions", lambda: (native.AVX2, ""))
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
        assert '#include "' not in text and "struct F32" in text and "using Floats" in text


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
    assert f"Attention<{'Quantized' if int8 else 'Plain<uint16_t>'}, uint16_t, 64>{{" in code
    assert "Attention<" not in other
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
    assert "Attention<Plain<uint16_t>, uint16_t, 64>{" in code
    assert "Linear<Plain<uint16_t>, uint16_t, false, uint16_t>" in code
    for found, expected in zip(out, plain, strict=True):
        assert relative(found, expected) < 0.01


def test_a_mask_and_rotation_of_the_first_tokens(normal):
    """Angles for both images, a mask of each, and one of both."""
    needs_kernels()
    angles = normal(1, 40, 32, seed=3).float()

    def function(x, lengths):
        hidden = torch.arange(70) >= lengths[:, None]
        whole = attention([Stream(x, x, x)], angles.cos(), angles.sin(), mask=hidden * -1e30)
        return whole, attention([Stream(whole, x, x)], mask=hidden[1:] * -1e30)

    inputs = normal(2, 70, 1, 64), torch.tensor([70, 50])
    out, code = compiled(function, *inputs, kernels=True)
    assert code.count("Attention<Plain<uint16_t>, uint16_t, 64>{") == 2
    for found, expected in zip(out, function(*inputs), strict=True):
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
    assert "Linear<Quantized, uint16_t, true, uint16_t>" in code
    assert "Linear<Quantized, uint16_t, false, float>" in code
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


def stage_engine(folder, dtype, quantization=None):
    """A tiny model's adapter, and its one stage: specification and inputs."""
    model = tiny.save_flux(folder / "model", guidance=True, channels=64)
    adapter = FluxAdapter.from_folder(model, DTYPES[dtype], {"quantization": quantization})
    made = plan(adapter, custom=CustomSchedule((2,), (1.0,)), method="dense", dtype=dtype)
    pipe = eager_pipeline(adapter, made.schedule, made.method, made.options, batch=1, dtype=dtype, device=CPU)
    with torch.no_grad():
        spec, inputs = next(probe for probe in probe_inputs(pipe) if probe[0].name == "stage0")
    return adapter, spec, inputs


def engine_of(backend, adapter, spec, inputs, directory):
    directory.mkdir()
    with torch.inference_mode(False), torch.no_grad():
        registry.backend(backend).build(spec, adapter.module(spec.name), inputs, directory)


@pytest.mark.parametrize(
    ("backend", "dtype", "quantization"),
    [("aoti", "fp32", None), ("aoti", "bf16", None), ("aoti", "bf16", "int8"), ("inductor", "fp32", "int8")],
)
def test_engines_run_the_kernels_on_weights_that_change(tmp_path, caplog, backend, dtype, quantization):
    needs_kernels()
    if DTYPES[dtype] not in native.instructions()[0].dtypes:
        pytest.skip(f"the kernels for this CPU are not for {dtype}")
    adapter, spec, inputs = stage_engine(tmp_path, dtype, quantization)
    directory = tmp_path / "engine"
    engine_of(backend, adapter, spec, inputs, directory)
    assert native.read_record(directory) == f"attention, linear ({native.instructions()[0].name})"
    libraries = [p.read_bytes() for p in directory.rglob("*.so")]
    assert any(b"jitexport" in code and b"Attention" in code for code in libraries)
    kinds = (b"F32", b"BF16") if quantization is None else (b"Int16", b"Int8")
    assert any(re.search(rb"6LinearI\w*?" + kind, code) for code in libraries for kind in kinds)

    def run(kind, weights):
        made = partial(FluxAdapter.from_configs, adapter.configs, adapter.settings(), DTYPES[dtype])
        with torch.no_grad():
            module = lambda: made().module(spec.name)  # noqa: E731
            return registry.backend(kind).load(spec, directory, weights, module, CPU)(inputs)[0]

    weights = dict(adapter.tensors())
    others = {n: w.flip(0).contiguous() if "blocks" in n and w.dim() == 2 else w for n, w in weights.items()}
    first, second = (run("eager", w) for w in (weights, others))
    close = 0.02 if quantization or dtype == "bf16" else 1e-5
    assert relative(run(backend, weights), first) < close
    assert relative(run(backend, others), second) < close < relative(first, second)
    assert "compiled again" not in caplog.text  # by inductor, whose cache knows the operators


@pytest.mark.parametrize("backend", ["aoti", "inductor"])
def test_kernels_that_do_not_compile_are_left_out(tmp_path, caplog, monkeypatch, backend):
    """As by a version of torch that takes templates otherwise."""
    needs_kernels()
    dtype = "bf16" if torch.bfloat16 in native.instructions()[0].dtypes else "fp32"
    adapter, spec, inputs = stage_engine(tmp_path, dtype)
    monkeypatch.setattr(native, "source", lambda header: "this is no C++;")
    engine_of(backend, adapter, spec, inputs, tmp_path / "engine")
    assert "compiled without the kernels attention, linear" in caplog.text
    assert native.read_record(tmp_path / "engine") is None
    caplog.clear()
    weights = dict(adapter.tensors())
    engine = registry.backend(backend).load(
        spec, tmp_path / "engine", weights, lambda: adapter.module(spec.name), CPU
    )
    with torch.no_grad():
        assert relative(engine(inputs)[0], adapter.module(spec.name)(*inputs)) < 0.02
    assert "compiled again" not in caplog.text


def test_what_fails_without_kernels_fails(monkeypatch):
    def compiler():
        raise RuntimeError("no compiler")

    with pytest.raises(RuntimeError, match="no compiler"):
        native.compile_with_kernels(compiler, "stage0")


def test_kernels_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("JITEXPORT_KERNELS", "0")
    assert "JITEXPORT_KERNELS" in native.missing()


def test_kernels_can_be_asked_for_where_matrix_units_are_faster(monkeypatch):
    has = dict.fromkeys(("amx_tile", "avx512_f", "avx2", *native.AVX512.features), True)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: has)
    monkeypatch.delenv("JITEXPORT_KERNELS", raising=False)
    assert "AMX" in native.missing()
    monkeypatch.setenv("JITEXPORT_KERNELS", "1")
    assert native.instructions() == (native.AVX512, "")
    has["avx512_vnni"] = False
    assert "avx512_vnni" in native.missing()
