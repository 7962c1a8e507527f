"""The manifest: what is written can be read, and whatever else is read gives this package's own errors."""

import copy
import json
import random
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jitexport.bundle.manifest import FILE_NAME, Manifest, parse_manifest
from jitexport.errors import JitExportError, ManifestError
from tests.scripting import script

damage = script("faults/damage")


@pytest.fixture(scope="module")
def text(built: Path) -> str:
    return (built / FILE_NAME).read_text()


def refused(raw: object) -> str:
    with pytest.raises(ManifestError) as caught:
        parse_manifest(json.dumps(raw), "it")
    return str(caught.value)


def test_round_trip(text):
    manifest = parse_manifest(text, "it")
    assert isinstance(manifest, Manifest)
    assert manifest.to_json() == text
    assert manifest.size == sum(f.size for f in manifest.files) > 0


@pytest.mark.parametrize("junk", ["", "{", "[]", "null", "1", '"text"', "[" * 100_000, b"\xff\xfe", "1" * 10_000])
def test_junk_is_refused(junk):
    with pytest.raises(ManifestError):
        parse_manifest(junk, "it")


@pytest.mark.parametrize("version", [0, 1, 2, 3, 5, "4", 1.5, True, None, [1]])
def test_only_the_known_format_version(text, version):
    assert "another format" in refused(json.loads(text) | {"format_version": version})


def test_reasons_are_of_what_a_build_chooses(text):
    raw = json.loads(text)
    assert parse_manifest(json.dumps(raw | {"chosen": {"dtype": "why"}}), "it").chosen == {"dtype": "why"}
    assert parse_manifest(json.dumps({k: v for k, v in raw.items() if k != "chosen"}), "it").chosen == {}
    assert refused(raw | {"chosen": {"colour": "why"}}) and refused(raw | {"chosen": {"dtype": 1}})


def test_every_field_is_needed_and_no_other_is_taken(text):
    raw = json.loads(text)
    for key in raw.keys() - {"chosen"}:  # which bundles had none of
        assert refused({k: v for k, v in raw.items() if k != key})
    assert "extra" in refused(raw | {"extra": 1})


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../x", "a/../b", "", ".", "a//b", "a/", "a\\b", "a\x00b", "a\nb", FILE_NAME, "manifest.sha256"],
)
def test_unsafe_paths_are_refused(text, path):
    raw = json.loads(text)
    for place in ("files", "weights", "tokenizers"):
        changed = copy.deepcopy(raw)
        changed[place][0]["path"] = path
        assert refused(changed)
    changed = copy.deepcopy(raw)
    changed["engines"][0]["directory"] = path
    assert refused(changed)


def edit(raw, *path, to):
    changed = copy.deepcopy(raw)
    node = changed
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = to
    return changed


def test_contradictions_are_refused(text):
    raw = json.loads(text)
    assert "the geometry is" in refused(edit(raw, "geometry", "grid", to=[12, 9]))
    wider = raw["geometry"] | {"width": 36, "grid": [12, 9], "latent_shape": [4, 24, 18]}
    assert "the grid has" in refused(edit(raw, "model", "settings", "width", to=36) | {"geometry": wider})
    assert "engine" in refused(edit(raw, "model", "configs", "transformer", "axes_dims_rope", to=[4, 6, 5]))
    assert "has these configurations" in refused(edit(raw, "model", "configs", "vae", to={}))
    assert "unknown model family" in refused(edit(raw, "model", "family", to="NonesuchPipeline"))
    constant = {"name": "table", "shape": [1, 3], "dtype": "fp32", "per_step": True}
    assert "one value per step" in refused(edit(raw, "constants", to=[constant]))
    assert "tokenizers give" in refused(edit(raw, "tokenizers", 0, "length", to=9))
    assert "engine" in refused(edit(raw, "batch", to=2))
    assert "engine" in refused(edit(raw, "dtype", to="bf16" if raw["dtype"] == "fp32" else "fp32"))
    assert "declared twice" in refused(edit(raw, "files", to=[*raw["files"], raw["files"][0]]))
    assert "used but not declared" in refused(edit(raw, "files", to=raw["files"][1:]))
    assert "the schedule needs" in refused(edit(raw, "engines", to=raw["engines"][1:]))
    *levels, last = raw["schedule"]["sigmas"]
    assert "of which the last is 0" in refused(edit(raw, "schedule", "sigmas", to=[last, *levels]))
    assert "strictly decreasing" in refused(edit(raw, "schedule", "sigmas", to=[*levels[::-1], last]))
    assert "ends of the stages" in refused(edit(raw, "schedule", "ends", to=[0.5]))
    assert refused(edit(raw, "schedule", "stages", 0, "tokens", to=7))


def test_seeded_mutations_give_only_our_errors(text):
    rng = random.Random(0)
    kept = 0
    for _ in range(500):
        with suppress(JitExportError):
            kept += parse_manifest(damage.mutated_json(json.loads(text), rng), "it") is not None
    assert kept < 250  # names and free text may change; most of the rest may not


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_value_anywhere_gives_only_our_errors(text, data):
    raw = json.loads(text)
    node, key = raw, data.draw(st.sampled_from(sorted(raw)))
    while isinstance(node[key], (dict, list)) and node[key] and data.draw(st.booleans()):
        node = node[key]
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
    node[key] = data.draw(JSON)
    with suppress(JitExportError):
        parse_manifest(json.dumps(raw), "it")


@given(st.binary() | st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_gives_only_our_errors(junk):
    with pytest.raises(ManifestError):
        parse_manifest(junk, "it")


def test_the_format_page_names_every_field_and_shows_each_in_its_example(text):
    page = Path(__file__).parents[2].joinpath("docs", "bundle-format.md").read_text()
    table, example = page.split("## manifest.json")[1].split("```json")
    shown = json.loads(example.split("```")[0])
    raw = json.loads(text)
    assert shown.keys() == raw.keys()
    for name, value in raw.items():
        assert f"`{name}`" in table
        inner, other = (v[0] if isinstance(v, list) and v else v for v in (value, shown[name]))
        if isinstance(inner, dict) and name not in ("tied", "chosen"):
            assert inner.keys() == other.keys()
            assert all(f"`{key}`" in table for key in inner)


def test_no_folder_of_the_building_machine_is_told(text, tiny_flux):
    assert str(tiny_flux.parent) not in text
