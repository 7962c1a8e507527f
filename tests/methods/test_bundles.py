"""Every method through the whole path on the tiny model: build, load, images, verify."""

import pytest
import torch

import jitexport
from jitexport.bundle.reading import read_manifest
from jitexport.plan import CustomSchedule
from jitexport.verify import verify
from tests.parity import seeded

#: Method, schedule, and the token counts of the stage engines that it needs, all on 96 tokens.
CASES = {
    "ralu": (CustomSchedule((1, 2, 2)), {"stage2": 24, "stage1": 36, "stage0": 96}),
    "bottleneck": (CustomSchedule((1, 2, 2)), {"stage1": 24, "stage0": 96}),
    "ras": (CustomSchedule((7,), (0.25,)), {"stage1": 24, "stage0": 96}),
}


@pytest.fixture(scope="module", params=CASES)
def bundle(request, make_bundle):
    custom, _ = CASES[request.param]
    return request.param, make_bundle(method=request.param, custom=custom, batch=2)


def test_a_bundle_has_the_engines_that_the_schedule_needs(bundle):
    method, path = bundle
    manifest = read_manifest(path)
    engines = {e.name: e.inputs[0].shape for e in manifest.engines}
    stages = {name: shape[1] for name, shape in engines.items() if name.startswith("stage")}
    assert stages == CASES[method][1]
    assert ("preview" in engines) == (method == "ralu")
    assert manifest.method.name == method
    assert (manifest.schedule.preview_tflops > 0) == (method == "ralu")


def test_images_of_seeds_do_not_depend_on_their_neighbours(bundle):
    _, path = bundle
    pipe = jitexport.load(path)
    prompts = ["a red fox", "the blue house", "a green tree"]
    together = pipe(prompts, generator=seeded(0, 1, 2), output_type="pt").images
    assert together.shape == (3, 3, 48, 32) and together.isfinite().all()
    for i in range(3):
        alone = pipe(prompts[i], generator=seeded(i), output_type="pt").images
        torch.testing.assert_close(together[i], alone[0], atol=1e-4, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.01


def test_callers_draws_take_the_place_of_the_generators(bundle):
    _, path = bundle
    pipe = jitexport.load(path)
    drawn = pipe.draw(seeded(7))
    given = {"latents": drawn.latents} | ({} if drawn.noise is None else {"noise": drawn.noise})
    expected = pipe("a red fox", generator=seeded(7), output_type="latent").images
    assert torch.equal(pipe("a red fox", generator=seeded(8), output_type="latent", **given).images, expected)
    with pytest.raises(jitexport.JitExportError, match="draw no anchors"):
        pipe("a red fox", anchors=torch.zeros(1, 24, dtype=torch.int64))


def test_callbacks_see_every_step_at_full_size(bundle):
    _, path = bundle
    pipe = jitexport.load(path)
    seen = []

    def callback(pipeline, step, timestep, values):
        seen.append((step, tuple(values["latents"].shape)))
        return {}

    pipe("a red fox", generator=seeded(0), callback_on_step_end=callback)
    assert seen == [(i, (2, 96, 16)) for i in range(pipe.schedule.nfe)]


def test_verifies(bundle):
    _, path = bundle
    result = verify(path)
    assert result.passed and all(r.exact for r in result.engines)
