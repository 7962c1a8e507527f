import shutil

import pytest
import torch

import jitexport
from jitexport.bundle.reading import read_manifest
from jitexport.errors import DigestError, InputError, MissingFileError, SizeError


def build(model, output, weights, dtype="fp32"):
    return jitexport.build(
        str(model),
        output=output,
        custom=jitexport.CustomSchedule((1, 1), (0.5, 1.0)),
        backend="eager",
        dtype=dtype,
        weights=weights,
    ).path


def image(pipe):
    return pipe("red apple", generator=torch.Generator().manual_seed(0), output_type="pt").images


@pytest.fixture(scope="module")
def model(tiny_flux, tmp_path_factory):
    """A copy of the model that tests may damage and mend."""
    return shutil.copytree(tiny_flux, tmp_path_factory.mktemp("referenced") / "model")


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    return build(model, tmp_path_factory.mktemp("bundles") / "referring", "reference")


def test_the_same_image_without_a_copy_of_the_weights(bundle, model, tmp_path):
    stored = build(model, tmp_path / "stored", "store")
    assert torch.equal(image(jitexport.load(bundle)), image(jitexport.load(stored)))
    manifests = [read_manifest(path) for path in (bundle, stored)]
    weights = [sum(f.size for f in m.files if f.path.startswith("weights/")) for m in manifests]
    assert weights[0] < 0.05 * weights[1]  # buffers that the model's files do not hold
    assert {r.component for r in manifests[0].references} >= {"transformer", "vae", "text_encoder", "text_encoder_2"}
    assert manifests[1].references == ()


def test_the_model_may_have_moved(bundle, model, tmp_path):
    moved = shutil.copytree(model, tmp_path / "moved")
    expected = image(jitexport.load(bundle))
    hidden = model.rename(model.with_name("hidden"))
    try:
        with pytest.raises(MissingFileError, match="model=FOLDER"):
            jitexport.load(bundle)
        assert torch.equal(image(jitexport.load(bundle, model=moved)), expected)
    finally:
        hidden.rename(model)


def test_changed_weights_are_refused(bundle, model):
    path = next((model / "transformer").glob("*.safetensors"))
    good = path.read_bytes()
    try:
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(DigestError, match="another digest"):
            jitexport.load(bundle)
        path.write_bytes(good[:-1])
        for verify in ("full", "size"):
            with pytest.raises(SizeError, match="another size"):
                jitexport.load(bundle, verify=verify)
    finally:
        path.write_bytes(good)


def test_files_of_another_dtype_cannot_be_referenced(model, tmp_path):
    with pytest.raises(InputError, match="cannot be referenced"):
        build(model, tmp_path / "bf16", "reference", dtype="bf16")
    assert not (tmp_path / "bf16").exists()
