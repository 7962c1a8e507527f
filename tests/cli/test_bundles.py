"""The verb inspect; verify, pack, unpack, push and pull have their tests in tests/bundle."""

import json


def test_inspect(run, bundle):
    code, out, err = run("inspect", bundle)
    assert (code, err) == (0, "") and "…" not in out
    out = " ".join(out.split())
    for text in ("tiny-flux", "48 x 32 pixels", "jit, preset default", "eager, fp32", "jitexport build --model tiny"):
        assert text in out
    for engine in ("text", "condition", "stage1", "stage0", "decode"):
        assert engine in out


def test_inspect_as_json_is_the_manifest(run, bundle):
    code, out, err = run("inspect", bundle, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads((bundle / "manifest.json").read_text())
