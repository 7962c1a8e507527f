import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import jitexport
from jitexport import quant, registry
from jitexport.build import build
from jitexport.building.comparing import compare
from jitexport.building.request import check_request
from jitexport.bundle.reading import read_manifest
from jitexport.errors import BackendUnavailableError, InputError
from jitexport.flops import meta_adapter, step_cost
from jitexport.models.flux import FluxAdapter
from jitexport.plan import CustomSchedule
from jitexport.quant import KINDS, QuantizedLinear, quantize, quantize_linears
from tests.backends.test_lora import picture
from tests.lora.test_pipeline import adapter as lora

CPU = torch.device("cpu")
SCHEDULE = CustomSchedule((2, 2), (0.35, 1.0))
#: Relative errors of a layer on normal numbers; fp8 keeps 3 bits of a mantissa, int8 7 bits of the row's largest.
ERROR = {"int8": 0.02, "fp8": 0.05}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(a, b):
    return compare([a], [b])[0]


# --- rows ---


@given(
    rows=st.lists(
        st.lists(st.floats(-1e4, 1e4, width=32), min_size=5, max_size=5), min_size=1, max_size=4
    )
)
def test_int8_rows_are_within_half_a_unit_of_their_values(rows):
    values = torch.tensor(rows)
    small, scale = quantize(values, "int8")
    assert small.dtype == torch.int8 and scale.shape == (len(rows), 1)
    assert small.abs().max() <= 127
    assert ((small.float() * scale - values).abs() <= 0.5001 * scale).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_of_a_row_is_kept_and_rows_do_not_see_each_other(kind):
    values = normal(6, 32) * torch.logspace(-6, 6, 6)[:, None]
    small, scale = quantize(values, kind)
    dtype, largest = KINDS[kind]
    assert small.dtype == dtype and (small.float().abs().amax(dim=1) == largest).all()
    for i in range(6):
        alone, its = quantize(values[i : i + 1], kind)
        assert torch.equal(alone.float()[0], small.float()[i]) and torch.equal(its[0], scale[i])


def test_fp8_rows_keep_three_bits_of_the_mantissa():
    values = normal(14, 32) * torch.logspace(-3, 3, 14)[:, None]
    small, scale = quantize(values, "fp8")
    assert ((small.float() * scale - values).abs() <= values.abs() / 16 + scale * 2**-9).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_stay_zeros(kind):
    small, scale = quantize(torch.zeros(2, 16), kind)
    assert not small.float().any() and scale.isfinite().all()


# --- layers ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 64), (1, 1, 64)])
def test_a_quantized_layer_is_close_to_the_layer(kind, dtype, shape):
    torch.manual_seed(0)
    linear = nn.Linear(64, 48).to(dtype)
    x = normal(*shape).to(dtype)
    layer = QuantizedLinear(linear, kind)
    assert layer(x).dtype == dtype
    expected = F.linear(x.float(), linear.weight.float(), linear.bias.float())
    assert 0 < relative(layer(x), expected) < ERROR[kind]


def test_an_int8_product_is_exact_up_to_its_scales():
    torch.manual_seed(0)
    linear = nn.Linear(512, 16, bias=False)
    layer, x = QuantizedLinear(linear, "int8"), normal(4, 512)
    rows, scale = quantize(x, "int8")
    weight = layer.weight.double() * layer.weight_scale.double()[:, None]
    torch.testing.assert_close(layer(x).double(), (rows.double() * scale.double()) @ weight.T, rtol=1e-5, atol=1e-6)


def test_layers_keep_their_names_and_only_the_chosen_change():
    model = nn.ModuleDict({"a": nn.ModuleDict({"to_q": nn.Linear(16, 16)}), "norm": nn.Linear(16, 16)})
    bias = model["a"]["to_q"].bias
    quantize_linears(model, "int8", lambda name: name.startswith("a."))
    assert dict(model.named_parameters()).keys() == {
        "a.to_q.weight", "a.to_q.weight_scale", "a.to_q.bias", "norm.weight", "norm.bias",
    }
    assert model["a"]["to_q"].bias is bias and type(model["norm"]) is nn.Linear


def test_in_the_transformer_it_is_the_blocks_that_change(tiny_flux):
    whole, small = (
        FluxAdapter.from_folder(tiny_flux, torch.float32, {"quantization": kind}) for kind in (None, "int8")
    )
    tensors = dict(small.tensors())
    changed = {name for name, t in whole.tensors() if tensors[name].dtype != t.dtype}
    assert changed == {
        name for name, t in whole.tensors()
        if "transformer_blocks." in name and name.endswith(".weight") and "norm" not in name
    }
    assert set(tensors) == {name for name, _ in whole.tensors()} | {f"{name}_scale" for name in changed}
    assert step_cost(meta_adapter(small, "fp32"), "fp32") == step_cost(meta_adapter(whole, "fp32"), "fp32")


# --- bundles ---


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_a_quantized_bundle_are_close_to_the_others(make_bundle, kind):
    plain = jitexport.load(make_bundle(custom=SCHEDULE))
    small = jitexport.load(make_bundle(custom=SCHEDULE, quantization=kind))
    assert 0 < relative(picture(small), picture(plain)) < 4 * ERROR[kind]


def test_compiled_engines_agree_and_share_the_small_weights(make_bundle):
    options = {"custom": CustomSchedule((2,), (1.0,)), "quantization": "int8", "dtype": "bf16"}
    path = make_bundle(backend="aoti", **options)
    manifest = read_manifest(path)
    assert manifest.precision == "bf16 + int8"
    assert json.loads(manifest.to_json())["model"]["settings"]["quantization"] == "int8"
    pipe, eager = jitexport.load(path), jitexport.load(make_bundle(**options))
    name = "transformer.transformer_blocks.0.attn.to_q.weight"
    assert pipe.weights.tensors[name].dtype == torch.int8
    assert relative(picture(pipe), picture(eager)) < 0.05


def test_an_adapter_comes_and_goes(make_bundle):
    small = jitexport.load(make_bundle(custom=SCHEDULE, quantization="int8"))
    plain = jitexport.load(make_bundle(custom=SCHEDULE))
    before, tensors = picture(small), {k: v.clone() for k, v in small.weights.tensors.items()}
    state = lora(plain)
    for pipe in (small, plain):
        pipe.load_lora(state)
    change = relative(picture(small), before)
    assert change > 0.01 and relative(picture(small), picture(plain)) < change
    small.unload_lora()
    assert torch.equal(picture(small), before)
    assert all(torch.equal(small.weights.tensors[k], v) for k, v in tensors.items())


def test_a_checkpoint_is_quantized_as_it_comes(make_bundle, tiny_flux):
    small = jitexport.load(make_bundle(custom=SCHEDULE, quantization="int8"))
    before = picture(small)
    small.load_checkpoint(tiny_flux)
    assert torch.equal(picture(small), before)


def test_its_name_says_it(tmp_path, tiny_flux, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = build(str(tiny_flux), backend="eager", dtype="fp32", custom=CustomSchedule((1,), (1.0,)), quantization="fp8")
    assert made.path.name == "tiny-flux-custom-fp8"


# --- refusals ---


def test_unknown_kinds_are_refused(tiny_flux):
    with pytest.raises(InputError, match=r"int4[\s\S]*int8 or fp8"):
        check_request("eager", "bf16", 1, "cpu", None, "int4")
    with pytest.raises(InputError, match="int4"):
        FluxAdapter.from_folder(tiny_flux, torch.float32, {"quantization": "int4"})


def test_backends_without_quantization_say_so():
    with pytest.raises(BackendUnavailableError, match=r"onnx has no int8[\s\S]*--quant"):
        check_request("onnx", "fp32", 1, "cpu", None, "int8")


def test_so_they_do_where_the_models_own_settings_ask_for_it(tmp_path, tiny_flux):
    model = tmp_path / "model"
    shutil.copytree(tiny_flux, model)
    settings = json.loads((model / "jitexport.json").read_text())
    (model / "jitexport.json").write_text(json.dumps(settings | {"quantization": "int8"}))
    options = {"backend": "onnx", "dtype": "fp32", "custom": SCHEDULE, "output": tmp_path / "bundle"}
    with pytest.raises(BackendUnavailableError, match=r"onnx has no int8[\s\S]*setting"):
        build(str(model), **options)
    with pytest.raises(BackendUnavailableError, match="onnx has no int8"):
        build(str(tiny_flux), settings={"quantization": "int8"}, **options)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("capability", "kinds"), [((8, 0), {"int8"}), ((8, 9), {"int8", "fp8"}), ((9, 0), {"int8", "fp8"})]
)
def test_fp8_needs_ada_or_hopper(monkeypatch, capability, kinds):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert set(quant.available(torch.device("cuda"))) == kinds
    assert set(registry.backend("aoti").quantizations(torch.device("cuda"))) == kinds
