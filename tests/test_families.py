"""The script that builds every method for every backend: what it finds out about tiny models."""

import pytest

from tests.scripting import script

families = script("families")


def test_errors_are_those_of_bundles_in_a_process_of_their_own(tiny_flux, tmp_path):
    pytest.importorskip("onnxruntime")
    (error,) = families.errors(tiny_flux, "jit", ["onnx"], tmp_path)
    assert 0 < float(error) < 1e-5


def test_methods_that_do_not_fit_say_so(tmp_path):
    from tests import tiny_hunyuan_video15, tiny_qwen_image

    videos = tiny_hunyuan_video15.save_hunyuan_video15(tmp_path / "videos")
    assert families.errors(videos, "ralu", ["aoti", "onnx"], tmp_path) == ["resolution changes are for images", "-"]
    odd = tiny_qwen_image.save(tmp_path / "odd")
    assert "even number of token rows" in families.errors(odd, "bottleneck", ["onnx"], tmp_path)[0]
