"""Other checkpoints for a bundle: all of the same model is taken, and every mixture of two refused."""

import inspect
import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file

import jitexport
from jitexport.checkpoints import compare_configs
from jitexport.errors import InputError, MissingDependencyError, ModelError, ModelNotFoundError
from jitexport.models import folders
from jitexport.models.flux_names import aliases
from jitexport.plan import CustomSchedule

DENSE = {"method": "dense", "custom": CustomSchedule((3,), (1.0,))}


@pytest.fixture(scope="module")
def bundle(make_bundle):
    return make_bundle(**DENSE)


@pytest.fixture
def pipe(bundle):
    return jitexport.load(bundle)


@pytest.fixture
def copied(tiny_flux, tmp_path):
    return shutil.copytree(tiny_flux, tmp_path / "model")


def unchanged(pipe, bundle):
    others = jitexport.load(bundle).weights.tensors
    return all(torch.equal(tensor, others[name]) for name, tensor in pipe.weights.tensors.items())


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def other_transformer(folder, **options):
    config = dict(FluxTransformer2DModel.load_config(folder / "transformer")) | options
    FluxTransformer2DModel.from_config(config).save_pretrained(folder / "transformer")


def edit_tokenizer(folder):
    path = folder / "tokenizer_2" / "tokenizer.json"
    raw = json.loads(path.read_text())
    vocabulary = raw["model"]["vocab"]
    vocabulary["fox"], vocabulary["dog"] = vocabulary["dog"], vocabulary["fox"]
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: other_transformer(f, guidance_embeds=False), "transformer.guidance_embeds: false instead of true"),
        (lambda f: other_transformer(f, num_single_layers=1), "transformer.num_single_layers: 1 instead of 2"),
        (lambda f: other_transformer(f, num_layers=2), "transformer.num_layers"),
        (lambda f: other_transformer(f, attention_head_dim=8, num_attention_heads=4, axes_dims_rope=[2, 2, 4]),
         "transformer.attention_head_dim"),
        (lambda f: edit(f / "transformer" / "config.json", axes_dims_rope=[6, 4, 6]), "transformer.axes_dims_rope"),
        (lambda f: edit(f / "vae" / "config.json", scaling_factor=0.5), "vae.scaling_factor: 0.5 instead of 0.4"),
        (lambda f: edit(f / "vae" / "config.json", shift_factor=None), "vae.shift_factor"),
        (lambda f: edit(f / "text_encoder" / "config.json", num_attention_heads=4), "text_encoder.num_attention_heads"),
        (lambda f: edit(f / "text_encoder_2" / "config.json", layer_norm_epsilon=1e-3), "text_encoder_2.layer_norm"),
        (lambda f: edit(f / "scheduler" / "scheduler_config.json", shift=3.0), "scheduler.shift: 3.0 instead of 2.0"),
        (edit_tokenizer, "tokenizer_2: another vocabulary"),
    ],
)  # fmt: skip
def test_another_model_is_refused_by_what_differs(pipe, bundle, copied, change, message):
    change(copied)
    with pytest.raises(InputError, match=message):
        pipe.load_checkpoint(copied)
    assert unchanged(pipe, bundle)


def test_where_a_model_was_saved_and_by_what_is_no_difference(pipe, bundle, copied):
    edit(copied / "transformer" / "config.json", _diffusers_version="0.1", _name_or_path="elsewhere")
    edit(copied / "text_encoder" / "config.json", transformers_version="4.0", dtype="bfloat16")
    pipe.load_checkpoint(copied)
    assert unchanged(pipe, bundle)


def test_differences_are_named_on_both_sides():
    own = {"vae": {"a": [1, 2], "b": 1, "only": 1}, "unet": {}}
    assert compare_configs(own, {"vae": {"a": (1, 2), "b": 2, "_x": 3}}) == [
        "unet: only one of both has it", "vae.b: 2 instead of 1",
    ]  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_weights_that_are_not_finite(make_bundle, copied, value, quantization):
    bundle = make_bundle(**DENSE, quantization=quantization)
    pipe = jitexport.load(bundle)
    path = copied / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["single_transformer_blocks.0.attn.to_q.weight"][3, 4] = value
    save_file(state, path, {"format": "pt"})
    with pytest.raises(InputError, match="NaN or infinite"):
        pipe.load_checkpoint(copied)
    assert unchanged(pipe, bundle)


def test_a_failure_in_the_middle_takes_the_old_checkpoint_back(pipe, bundle, tiny_flux, copied, monkeypatch):
    write, written = pipe.weights._write, []

    def fail(name, value):
        if len(written) == 20:
            raise KeyboardInterrupt
        written.append(name)
        write(name, value + 1)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipe.weights, "_write", fail)
        pipe.load_checkpoint(copied)
    assert len(written) == 20 and unchanged(pipe, bundle)


# --- one file --------------------------------------------------------------------------------------------------------


def in_the_authors_names(state):
    """A state dict of diffusers' transformer, in the names that its authors use."""
    modules = {f"transformer.{name.rpartition('.')[0]}" for name in state}
    written = {}
    for theirs, target in aliases(modules).items():
        if target.partial or not theirs.startswith("transformer."):
            continue
        for leaf in ("weight", "bias"):
            parts = [state.get(f"{module.removeprefix('transformer.')}.{leaf}") for module in target.modules]
            if parts[0] is not None:
                value = torch.cat(parts)
                value = torch.cat(value.chunk(2)[::-1]) if target.swapped else value
                name = "scale" if theirs.endswith("_norm") else leaf
                written[f"{theirs.removeprefix('transformer.')}.{name}"] = value.contiguous()
    return written


@pytest.fixture(scope="module")
def tuned(tiny_flux, tmp_path_factory):
    """A transformer with other weights, as a folder, and in one file in the authors' names."""
    folder = shutil.copytree(tiny_flux, tmp_path_factory.mktemp("tuned") / "folder")
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    state = {name: value * 1.1 for name, value in load_file(path).items()}
    save_file(state, path, {"format": "pt"})
    save_file(in_the_authors_names(state), folder.parent / "tuned.safetensors")
    return folder, folder.parent / "tuned.safetensors"


def test_the_file_is_what_diffusers_converts_too(tuned):
    """The yardstick of the fixture: diffusers' own conversion, with the width that it has built in made the model's."""
    folder, path = tuned
    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    assert source.count("inner_dim = 3072") == 1
    names = dict(vars(single_file_utils))
    exec(source.replace("inner_dim = 3072", "inner_dim = 32"), names)
    theirs = names["convert_flux_transformer_checkpoint_to_diffusers"](load_file(path))
    expected = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert theirs.keys() == expected.keys()
    for name, value in theirs.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_file_with_a_base_is_the_folder(pipe, tuned, tiny_flux, tmp_path, prefix):
    folder, path = tuned
    save_file({prefix + key: value for key, value in load_file(path).items()}, tmp_path / "x.safetensors")
    pipe.load_checkpoint(folder)
    expected = {name: tensor.clone() for name, tensor in pipe.weights.tensors.items()}
    pipe.load_checkpoint(tiny_flux)
    pipe.load_checkpoint(tmp_path / "x.safetensors", base=tiny_flux)
    assert all(torch.equal(pipe.weights.tensors[name], value) for name, value in expected.items())


def test_a_bundle_is_built_from_a_file(tuned, tiny_flux, make_bundle):
    folder, path = tuned
    built = jitexport.load(make_bundle(str(path), base=str(tiny_flux), **DENSE))
    expected = jitexport.load(make_bundle(str(folder), **DENSE))
    assert built.weights.tensors.keys() == expected.weights.tensors.keys()
    assert all(torch.equal(t, expected.weights.tensors[n]) for n, t in built.weights.tensors.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("img_in.weight"), "1 missing tensors: transformer.x_embedder.weight"),
        (lambda s: s.update({"vae.decoder.x.weight": torch.zeros(2)}), "1 unknown tensors: vae.decoder.x.weight"),
        (lambda s: s.update({"img_in.weight_scale": torch.zeros(2)}), "unknown tensors: img_in.weight_scale"),
        (lambda s: s.update({"img_in.weight": torch.zeros(3, 3)}), "does not fit"),
        (lambda s: s.update({"img_in.weight": torch.zeros_like(s["img_in.weight"]).char()}), "does not fit"),
        (lambda s: s.update({"x_embedder.weight": s["img_in.weight"].clone()}), "twice"),
    ],
)
def test_files_of_other_models_are_refused(pipe, bundle, tuned, tiny_flux, tmp_path, change, message):
    state = load_file(tuned[1])
    change(state)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=message):
        pipe.load_checkpoint(tmp_path / "x.safetensors", base=tiny_flux)
    assert unchanged(pipe, bundle)


def test_a_file_needs_a_base_and_a_folder_none(pipe, tuned, tiny_flux, tmp_path):
    with pytest.raises(InputError, match="transformer only"):
        pipe.load_checkpoint(tuned[1])
    with pytest.raises(InputError, match="belongs to a checkpoint in one file"):
        pipe.load_checkpoint(tuned[0], base=tiny_flux)
    (tmp_path / "x.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelNotFoundError, match="cannot read"):
        pipe.load_checkpoint(tmp_path / "x.safetensors", base=tiny_flux)
    with pytest.raises(ModelError):
        pipe.load_checkpoint(tmp_path / "absent", base=None if (tmp_path / "absent").is_dir() else tiny_flux)
    with pytest.raises(InputError, match="transformer only"):
        jitexport.build(str(tuned[1]))
    with pytest.raises(InputError, match="belongs to a model in one file"):
        jitexport.build(str(tiny_flux), base=str(tiny_flux))


# --- layouts of folders ----------------------------------------------------------------------------------------------


def variant(folder):
    for path in folder.glob("*/*.safetensors"):
        path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))


def sharded(folder):
    for component in (FluxTransformer2DModel, AutoencoderKL):
        part = folder / ("vae" if component is AutoencoderKL else "transformer")
        model = component.from_pretrained(part)
        for file in part.glob("*.safetensors"):
            file.unlink()
        model.save_pretrained(part, max_shard_size="20KB")
        assert len(list(part.glob("*-of-*.safetensors"))) > 1


def sharded_variant(folder):
    part = folder / "transformer"
    model = FluxTransformer2DModel.from_pretrained(part)
    for file in part.glob("*.safetensors"):
        file.unlink()
    model.save_pretrained(part, max_shard_size="20KB", variant="fp16")
    assert not list(part.glob("*.safetensors.index.json"))


def both(folder):
    """An ordinary file beside a variant: it is the one that counts."""
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    zeros = {name: torch.zeros_like(value) for name, value in load_file(path).items()}
    save_file(zeros, path.with_name("diffusion_pytorch_model.fp16.safetensors"))


def links(folder):
    """As in the hub's cache: names that are links to blobs."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for i, path in enumerate(p for p in sorted(folder.rglob("*")) if p.is_file()):
        path.rename(blobs / str(i))
        path.symlink_to(blobs / str(i))


@pytest.mark.parametrize("layout", [variant, sharded, sharded_variant, both, links])
def test_layouts_that_are_read(pipe, bundle, copied, layout):
    layout(copied)
    pipe.load_checkpoint(copied)
    assert unchanged(pipe, bundle)


def test_two_variants_and_no_ordinary_file(pipe, copied):
    variant(copied)
    path = copied / "transformer" / "diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(path, path.with_name("diffusion_pytorch_model.bf16.safetensors"))
    with pytest.raises(ModelNotFoundError, match="several variants"):
        pipe.load_checkpoint(copied)


@pytest.mark.parametrize("part", ["transformer", "text_encoder_2"])
def test_weights_quantized_by_another_library(pipe, copied, part):
    edit(copied / part / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ModelError, match="quantized by another library") as error:
        pipe.load_checkpoint(copied)
    assert error.value.exit_code == 3 and "--quant int8" in str(error.value)


@pytest.mark.parametrize("name", ["T5Tokenizer", "CLIPTokenizer"])
def test_a_tokenizer_without_a_vocabulary(pipe, copied, name):
    """transformers would make one that knows no word."""
    tokenizer = copied / "tokenizer_2"
    for file in tokenizer.iterdir():
        file.unlink()
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    with pytest.raises(ModelNotFoundError, match="no vocabulary"):
        pipe.load_checkpoint(copied)


def test_a_slow_tokenizer_names_the_libraries(pipe, copied, monkeypatch):
    monkeypatch.setattr(folders, "_installed", lambda name: False)
    tokenizer = copied / "tokenizer_2"
    for file in tokenizer.iterdir():
        file.unlink()
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    (tokenizer / "spiece.model").write_bytes(b"\n")
    with pytest.raises(MissingDependencyError, match="pip install sentencepiece protobuf") as error:
        pipe.load_checkpoint(copied)
    assert error.value.exit_code == 3
