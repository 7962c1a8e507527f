import json
import shutil
import sys

import pytest
import torch

from jitexport.errors import MissingDependencyError, ModelNotFoundError, UnsupportedModelError
from jitexport.models.flux import FluxAdapter
from jitexport.models.sources import DEMO_FOLDER, config_adapter, download, find_source, load_adapter


def test_registered_names():
    assert find_source("demo").folder == DEMO_FOLDER
    assert find_source("flux").hub_id == "black-forest-labs/FLUX.1-dev"
    assert find_source("flux-schnell").hub_id == "black-forest-labs/FLUX.1-schnell"


def test_a_folder_is_named_after_itself(tiny_flux, monkeypatch):
    assert find_source(str(tiny_flux)).name == "tiny-flux"
    monkeypatch.chdir(tiny_flux)
    source = find_source(".")
    assert source.name == "tiny-flux" and source.hub_id is None


def test_a_folder_may_be_given_from_home(tiny_flux, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_flux.parent))
    assert find_source("~/tiny-flux").folder == tiny_flux


def test_a_folder_that_looks_like_a_hub_id_is_a_folder(tiny_flux, tmp_path, monkeypatch):
    shutil.copytree(tiny_flux, tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    source = find_source("owner/name")
    assert source.folder is not None and source.hub_id is None


def test_hub_ids():
    source = find_source("owner/Model-1")
    assert (source.name, source.hub_id, source.folder) == ("Model-1", "owner/Model-1", None)


@pytest.mark.parametrize("model", ["nonesuch", "./a/b", "/nowhere/at-all", "~/nonesuch", "a/b/c", ""])
def test_what_is_none_of_these_is_answered_with_what_would_do(model):
    with pytest.raises(ModelNotFoundError, match="no such model") as caught:
        find_source(model)
    assert caught.value.found == model
    assert "demo" in caught.value.expected and "folder" in caught.value.expected and "hub id" in caught.value.expected


def test_loading_a_folder(tiny_flux):
    adapter = load_adapter(find_source(str(tiny_flux)), torch.bfloat16, {"height": 16})
    assert isinstance(adapter, FluxAdapter) and adapter.geometry.height == 16
    assert {p.dtype for p in adapter.components["transformer"].parameters()} == {torch.bfloat16}


def test_the_bundled_model_loads():
    """Whatever its weights are: 256 x 256 pixels, 1024 tokens, 16 text tokens, guidance."""
    adapter = load_adapter(find_source("demo"), torch.bfloat16)
    geometry = adapter.geometry
    assert (geometry.height, geometry.width, geometry.grid.shape) == (256, 256, (32, 32))
    assert geometry.text_tokens == 16 and adapter.defaults.guidance.scale == 3.5


def test_a_folder_without_an_index_is_no_pipeline(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"model_index\.json"):
        load_adapter(find_source(str(tmp_path)), torch.float32)


@pytest.mark.parametrize("index", [{"_class_name": "StableDiffusionPipeline"}, {}])
def test_other_pipelines_are_refused(tmp_path, index):
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedModelError, match="no model family") as caught:
        load_adapter(find_source(str(tmp_path)), torch.float32)
    assert "FluxPipeline" in caught.value.expected


@pytest.mark.parametrize("text", ["not JSON", "[]", ""])
def test_a_damaged_index_is_refused(tmp_path, text):
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(UnsupportedModelError, match="JSON"):
        load_adapter(find_source(str(tmp_path)), torch.float32)


def test_offline_hub_says_where_it_looked_and_what_to_do(monkeypatch, tmp_path):
    """The suite runs with HF_HUB_OFFLINE=1, so nothing is asked of a network."""
    from huggingface_hub.constants import HF_HUB_CACHE

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFoundError, match="nobody/nothing") as caught:
        download(find_source("nobody/nothing"))
    text = str(caught.value)
    assert "HF_HUB_OFFLINE is set" in text
    assert str(HF_HUB_CACHE) in caught.value.expected
    assert "hf download nobody/nothing --local-dir" in caught.value.remedy
    assert "jitexport build --model FOLDER" in caught.value.remedy


def test_a_downloaded_model_is_used(tiny_flux, monkeypatch):
    asked = {}

    def snapshot_download(repo, allow_patterns):
        asked[repo] = allow_patterns
        return str(tiny_flux)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    adapter = load_adapter(find_source("owner/name"), torch.float32)
    assert adapter.geometry.grid.shape == (12, 8)
    assert list(asked) == ["owner/name"] and "model_index.json" in asked["owner/name"]


@pytest.mark.parametrize("library", ["diffusers", "huggingface_hub"])
def test_missing_libraries_are_answered_with_the_extra(tiny_flux, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, "jitexport.models.flux", raising=False)
    model = str(tiny_flux) if library == "diffusers" else "owner/name"
    with pytest.raises(MissingDependencyError) as caught:
        load_adapter(find_source(model), torch.float32)
    assert caught.value.remedy == "pip install 'jitexport[build]'"


def test_planning_needs_no_weights_where_the_configuration_is_known():
    adapter = config_adapter(find_source("flux-schnell"), torch.bfloat16, {"height": 512, "width": None})
    assert adapter.geometry.grid.shape == (32, 64)
    assert all(p.is_meta for p in adapter.components["transformer"].parameters())


def test_planning_reads_a_folder(tiny_flux):
    assert config_adapter(find_source(str(tiny_flux)), torch.float32).geometry.grid.shape == (12, 8)
