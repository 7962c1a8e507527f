import json
import logging
import os
import shutil
import subprocess
import sys
from threading import Thread

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

import jitexport
from jitexport import machine
from jitexport.backends.eager import EagerBackend
from jitexport.errors import InputError
from jitexport.grid import unpack
from jitexport.models.sources import DEMO_FOLDER
from jitexport.plan import CustomSchedule
from jitexport.schedule import beta_sigmas
from tests import tiny
from tests.parity import seeded
from tests.test_sampler import released_loop

THREE = CustomSchedule((2, 1, 2), (0.35, 0.62, 1.0))
PROMPTS = ["a red fox", "the blue house in the snow", "green tree"]


@pytest.fixture(scope="module")
def pipe(make_bundle):
    """With the preset that draws everything: latents, noise and anchors."""
    return jitexport.load(make_bundle(preset="paper", custom=THREE))


@pytest.fixture(scope="module")
def pairs(make_bundle):
    """The same with two images an engine run."""
    return jitexport.load(make_bundle(preset="paper", custom=THREE, batch=2))


def latents(pipe, prompt="a red fox", seeds=(0,), **options):
    generator = seeded(*seeds) if seeds else None
    return pipe(prompt, generator=generator, output_type="latent", **options).images


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def different(a, b):
    return (a - b).abs().max() > 1e-3


# --- parity with diffusers ---


def theirs(
    folder, steps, sigmas=None, prompt="a red fox in the snow", size=(tiny.HEIGHT, tiny.WIDTH), text=10, seeds=(3,),
    **options,
):
    pipe = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if sigmas is not None:  # as they are, without the model's own shift
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        options["sigmas"] = list(sigmas[:-1])
    return pipe(
        prompt,
        height=size[0],
        width=size[1],
        num_inference_steps=steps,
        max_sequence_length=text,
        generator=seeded(*seeds),
        output_type="pt",
        **options,
    ).images


@pytest.mark.parametrize("model", ["tiny-flux", "tiny-schnell"])
def test_all_tokens_at_every_step_is_flux_pipeline(make_bundle, tiny_flux, tiny_schnell, model):
    """One stage at 100% on the model's own noise levels, from seed to pixels: with a fixed and a dynamic shift."""
    pipe = jitexport.load(make_bundle(model, method="dense", custom=CustomSchedule((6,), (1.0,))))
    found = pipe("a red fox in the snow", generator=seeded(3), output_type="pt").images
    folder = tiny_flux if model == "tiny-flux" else tiny_schnell
    close(found, theirs(folder, 6), 1e-4)


def test_guidance_is_flux_pipelines(make_bundle, tiny_flux):
    pipe = jitexport.load(make_bundle(method="dense", custom=CustomSchedule((6,), (1.0,))))
    found = pipe("a red fox in the snow", generator=seeded(3), guidance_scale=9.0, output_type="pt").images
    close(found, theirs(tiny_flux, 6, guidance_scale=9.0), 1e-4)
    assert (found - theirs(tiny_flux, 6)).abs().max() > 1e-3


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_jit_of_one_full_stage_is_flux_pipeline_on_its_noise_levels(make_bundle, tiny_flux, preset):
    pipe = jitexport.load(make_bundle(preset=preset, custom=CustomSchedule((6,), (1.0,))))
    sigmas = beta_sigmas(6, 1.4, 0.42 if preset == "paper" else 0.425)
    assert pipe.schedule.sigmas == pytest.approx(sigmas)
    found = pipe("a red fox in the snow", generator=seeded(3), output_type="pt").images
    close(found, theirs(tiny_flux, 6, sigmas), 1e-4)


def test_demo_model_is_flux_pipeline(make_bundle, tmp_path):
    """The bundled model, whatever its weights are at the moment: three ordinary steps."""
    folder = shutil.copytree(DEMO_FOLDER, tmp_path / "demo")
    pipe = jitexport.load(make_bundle(str(folder), method="dense", custom=CustomSchedule((3,), (1.0,))))
    prompt = "red apple on a blue background"
    found = pipe(prompt, generator=seeded(3), output_type="pt").images
    close(found, theirs(folder, 3, prompt=prompt, size=(256, 256), text=16), 1e-3)


def test_released_preset_is_the_released_recipe_around_diffusers_transformer(make_bundle, tiny_flux):
    """Given anchors, noise and latents, the loop of `test_sampler` around diffusers' own transformer."""
    steps, tokens = (3, 2, 3), (33, 59, 96)
    pipe = jitexport.load(make_bundle(preset="released", custom=CustomSchedule(steps, (0.35, 0.62, 1.0))))
    generator = torch.Generator().manual_seed(5)
    anchors = torch.randperm(96, generator=generator)[:33].sort().values
    start, noise = torch.randn(2, 96, 16, generator=generator).unbind(0)
    reference = FluxPipeline.from_pretrained(tiny_flux, dtype=torch.float32)
    with torch.no_grad():
        embeds, pooled, text_ids = reference.encode_prompt("a red fox", None, max_sequence_length=10)
    ids = FluxPipeline._prepare_latent_image_ids(1, *tiny.GRID, "cpu", torch.float32)
    sigmas = beta_sigmas(8, 1.4, 0.425)

    @torch.no_grad()
    def velocity(y, active, stage, step):
        return reference.transformer(
            hidden_states=y[None], timestep=torch.tensor([sigmas[step]]), guidance=torch.tensor([3.5]),
            pooled_projections=pooled, encoder_hidden_states=embeds, txt_ids=text_ids, img_ids=ids[active],
            return_dict=False,
        )[0][0]  # fmt: skip

    expected = released_loop(tiny.GRID, sigmas, list(zip(steps, tokens, strict=True)), start, noise, anchors, velocity)
    found = latents(pipe, latents=start[None], noise=noise[None], anchors=anchors[None])
    close(found[0], expected, 1e-4)


# --- seeds and batches ---


def test_same_seed_same_image_other_seed_other_image(pipe):
    assert torch.equal(latents(pipe, seeds=[1]), latents(pipe, seeds=[1]))
    assert different(latents(pipe, seeds=[1]), latents(pipe, seeds=[2]))
    assert different(latents(pipe, seeds=None), latents(pipe, seeds=None))


def test_global_random_state_is_left_alone(pipe):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a = latents(pipe, seeds=None)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(0)
    assert different(a, latents(pipe, seeds=None))


@pytest.fixture
def spied(monkeypatch):
    """Anchor sets of every stage, as a pipeline's method makes them."""

    def spy(pipe):
        seen, lifter = [], pipe.method.lifter

        def record(anchors, **how):
            seen.append(anchors.clone())
            return lifter(anchors, **how)

        monkeypatch.setattr(pipe.method, "lifter", record)
        return seen

    return spy


def test_an_image_of_a_batch_is_that_seed_alone(pipe, pairs, spied):
    """Three images in runs of two: the last run is padded."""
    seen_alone, seen_pairs = spied(pipe), spied(pairs)
    together = latents(pairs, PROMPTS, seeds=(7, 8, 9))
    for i, (prompt, seed) in enumerate(zip(PROMPTS, (7, 8, 9), strict=True)):
        close(together[i : i + 1], latents(pipe, prompt, seeds=(seed,)))
    assert len(seen_pairs) == 2 * 3 and len(seen_alone) == 3 * 3
    for i in range(3):
        for stage in range(3):
            alone = seen_alone[3 * i + stage][0]
            assert torch.equal(seen_pairs[3 * (i // 2) + stage][i % 2], alone)
            assert len(alone.unique()) == (33, 59, 96)[stage]


def test_one_generator_goes_on_from_image_to_image(pipe, pairs):
    prompts = ["a red fox"] * 3
    first = latents(pipe, seeds=(4,))
    on = [p(prompts, generator=seeded(4)[0], output_type="latent").images for p in (pipe, pairs)]
    close(on[0][:1], first)
    close(on[0], on[1])
    assert different(on[0][0], on[0][1])


def test_images_of_a_prompt_stand_side_by_side(pipe, pairs):
    for p in (pipe, pairs):
        both = latents(p, PROMPTS[:2], seeds=(0, 1, 2, 3), num_images_per_prompt=2)
        close(both, latents(p, [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]], seeds=(0, 1, 2, 3)))


def test_calls_from_threads_do_not_disturb_each_other(pipe):
    found = {}

    def work(seed):
        found[seed] = latents(pipe, seeds=(seed,))

    threads = [Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        close(found[seed], latents(pipe, seeds=(seed,)))


# --- arguments ---


def test_prompts_matter(pipe):
    assert different(latents(pipe, "a red fox"), latents(pipe, "the blue house under the tree"))


def test_guidance_matters_and_has_a_default(pipe):
    assert torch.equal(latents(pipe), latents(pipe, guidance_scale=3.5))
    assert different(latents(pipe), latents(pipe, guidance_scale=8.0))
    assert latents(pipe, guidance_scale=0).isfinite().all()


def test_a_model_without_guidance_refuses_one(make_bundle):
    pipe = jitexport.load(make_bundle("tiny-schnell", custom=THREE))
    assert latents(pipe).isfinite().all()
    with pytest.raises(InputError, match="takes no guidance"):
        latents(pipe, guidance_scale=3.5)


def test_the_callers_draws_are_used(pipe, pairs):
    drawn = pipe.draw(seeded(1, 2))
    given = {"latents": drawn.latents, "noise": drawn.noise, "anchors": drawn.anchors}
    expected = latents(pairs, PROMPTS[:2], seeds=(1, 2))
    for p in (pipe, pairs):
        close(latents(p, PROMPTS[:2], seeds=None, **given), expected)
        close(latents(p, PROMPTS[:2], seeds=(5, 6), **given), expected)
    unpacked = {k: unpack(given[k], pipe.geometry.grid, 2) for k in ("latents", "noise")}
    close(latents(pairs, PROMPTS[:2], seeds=None, **(given | unpacked)), expected)


@pytest.mark.parametrize("name", ["latents", "noise", "anchors"])
def test_each_of_the_callers_draws_matters_alone(pipe, name):
    mine, others = pipe.draw(seeded(1)), pipe.draw(seeded(2))
    changed = latents(pipe, seeds=(1,), **{name: getattr(others, name)})
    assert different(changed, latents(pipe, seeds=(1,)))
    close(latents(pipe, seeds=(1,), **{name: getattr(mine, name)}), latents(pipe, seeds=(1,)))


def test_anchors_in_any_order_are_the_same_set(pipe):
    """Up to the tokens that lie equally near to two of them."""
    anchors = pipe.draw(seeded(1)).anchors
    assert latents(pipe, anchors=anchors.flip(1)).isfinite().all()


def test_output_types(pipe):
    def images(kind):
        return pipe(PROMPTS[:2], generator=seeded(0, 1), output_type=kind).images

    pt, array, pil, y = images("pt"), images("np"), images("pil"), images("latent")
    assert pt.shape == (2, 3, tiny.HEIGHT, tiny.WIDTH) and pt.min() >= 0 and pt.max() <= 1
    np.testing.assert_array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert [(i.mode, i.size) for i in pil] == [("RGB", (tiny.WIDTH, tiny.HEIGHT))] * 2
    np.testing.assert_array_equal(np.array(pil[1]), (array[1] * 255).round().astype(np.uint8))
    assert y.shape == (2, 96, 16) and y.dtype == torch.float32
    close(torch.cat([pipe.decode(one[None]) for one in y]), pt)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": []}, "string or a list"),
        ({"prompt": [1]}, "string or a list"),
        ({"prompt": ["a", None]}, "string or a list"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"num_images_per_prompt": 1.5}, "num_images_per_prompt"),
        ({"output_type": "jpeg"}, "unknown output_type"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_scale": float("inf")}, "guidance_scale"),
        ({"generator": []}, "one generator per image"),
        ({"generator": seeded(0, 1)}, "one generator per image"),
        ({"generator": 42}, r"torch\.Generator"),
        ({"generator": [42]}, r"torch\.Generator"),
        ({"latents": torch.zeros(1, 95, 16)}, "latents do not fit"),
        ({"latents": torch.zeros(2, 96, 16)}, "latents do not fit"),
        ({"latents": torch.zeros(1, 4, 16, 24)}, "latents do not fit"),
        ({"latents": torch.zeros(1, 96, 16, dtype=torch.int64)}, "latents do not fit"),
        ({"latents": np.zeros((1, 96, 16), dtype=np.float32)}, "latents do not fit"),
        ({"noise": torch.zeros(1, 96, 15)}, "noise do not fit"),
        ({"anchors": torch.zeros(1, 33, dtype=torch.int64)}, "anchors do not fit"),  # one index, 33 times
        ({"anchors": torch.arange(32)[None]}, "anchors do not fit"),
        ({"anchors": torch.arange(33)[None].int()}, "anchors do not fit"),
        ({"anchors": torch.arange(33)[None] - 1}, "anchors do not fit"),
        ({"anchors": torch.arange(33)[None] + 64}, "anchors do not fit"),
        ({"anchors": list(range(33))}, "anchors do not fit"),
    ],
)
def test_wrong_arguments_are_refused(pipe, change, message):
    with pytest.raises(InputError, match=message):
        pipe(**({"prompt": "a red fox"} | change))


def test_long_prompts_are_cut_with_a_warning(pipe, caplog):
    long = "a red fox under the green tree near the house in the snow"
    with caplog.at_level(logging.WARNING, logger="jitexport"):
        latents(pipe)
        assert not caplog.records
        found = latents(pipe, long)
    assert [r.getMessage() for r in caplog.records] == [f"prompt of 57 characters cut to 8 and 10 tokens: {long!r}"]
    close(found, latents(pipe, long + " on on on"))


# --- callbacks and progress ---


def test_callback_sees_every_step_of_every_chunk(pairs):
    calls = []

    def callback(pipe, step, timestep, tensors):
        assert pipe is pairs and tensors["latents"].shape == (2, 96, 16)
        calls.append((step, timestep))

    latents(pairs, PROMPTS, seeds=(0, 1, 2), callback_on_step_end=callback)
    assert calls == [(i, pairs.schedule.sigmas[i] * 1000) for i in range(5)] * 2


def test_callback_may_change_the_latents(pipe):
    def last(_, step, timestep, tensors):
        return {"latents": torch.full_like(tensors["latents"], 2.0)} if step == 4 else {}

    def middle(_, step, timestep, tensors):
        return {"latents": tensors["latents"] * 0.5} if step == 1 else {}

    found = latents(pipe, callback_on_step_end=last)
    assert torch.equal(found, torch.full_like(found, 2.0))
    assert different(latents(pipe, callback_on_step_end=middle), latents(pipe))


def test_callback_may_not_change_their_shape(pipe):
    with pytest.raises(InputError, match="another shape"):
        latents(pipe, callback_on_step_end=lambda *_: {"latents": torch.zeros(1, 95, 16)})


def test_an_exception_in_a_callback_ends_the_call(pipe):
    steps = []

    def stop(_, step, timestep, tensors):
        steps.append(step)
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        latents(pipe, callback_on_step_end=stop)
    assert steps == [0, 1, 2]
    assert latents(pipe).isfinite().all()  # and the pipeline goes on working


def test_progress_bar_is_on_stderr_and_can_be_switched_off(make_bundle, capsys, monkeypatch):
    pipe = jitexport.load(make_bundle(custom=THREE))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    pipe.set_progress_bar_config(disable=False)
    latents(pipe)
    shown = capsys.readouterr()
    assert "denoising" in shown.err and shown.out == ""
    pipe.set_progress_bar_config(disable=True)
    latents(pipe)
    assert capsys.readouterr() == ("", "")


def test_a_cut_prompt_is_logged_once_and_not_whole(pairs, caplog):
    with caplog.at_level(logging.WARNING, logger="jitexport"):
        latents(pairs, ["fox " * 10_000, "fox " * 10_000], seeds=(1, 2, 3, 4), num_images_per_prompt=2)
    (record,) = caplog.records
    assert "40000 characters" in record.getMessage() and len(record.getMessage()) < 300


def test_nothing_is_shown_where_stderr_is_no_terminal(pipe, capsys):
    latents(pipe)
    assert capsys.readouterr() == ("", "")


# --- loading ---


def test_bf16(make_bundle, pipe):
    """The same images up to bf16's rounding."""
    half = jitexport.load(make_bundle(preset="paper", custom=THREE, dtype="bf16"))
    assert half.dtype == torch.bfloat16
    found, expected = latents(half), latents(pipe)
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_load_takes_a_device(make_bundle):
    assert jitexport.load(make_bundle(custom=THREE), device="cpu").device == torch.device("cpu")
    with pytest.raises(InputError, match="unknown device"):
        jitexport.load(make_bundle(custom=THREE), device="abacus")


# --- compiled ---


@pytest.mark.slow
def test_compiled_engines_make_the_eager_images(make_bundle, aoti_bundle):
    eager = jitexport.load(make_bundle(custom=CustomSchedule((2, 2), (0.35, 1.0))))
    compiled = jitexport.load(aoti_bundle)
    for seed, prompt in enumerate(PROMPTS):
        close(latents(compiled, prompt, (seed,)), latents(eager, prompt, (seed,)), 1e-3)
        options = {"generator": seeded(seed), "output_type": "pt"}
        found = compiled(prompt, **options).images
        close(found, eager(prompt, **(options | {"generator": seeded(seed)})).images, 1e-3)


@pytest.mark.slow
def test_a_fresh_process_runs_a_compiled_bundle_without_model_code_or_compiler(aoti_bundle, make_bundle, tmp_path):
    code = f"""
import sys, torch
known = set(sys.modules)  # some versions of torch bring torch.export with them
import jitexport
from jitexport import machine
from jitexport.backends.eager import EagerBackend
pipe = jitexport.load({str(aoti_bundle)!r})
y = pipe("a red fox", generator=torch.Generator().manual_seed(0), output_type="latent").images
images = pipe("a red fox").images
torch.save(y, {str(tmp_path / "y.pt")!r})
import json; print(json.dumps(sorted(set(sys.modules) - known)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    loaded = json.loads(run.stdout)
    unwanted = ("diffusers", "transformers", "huggingface_hub", "scipy", "torch.export", "torch._inductor")
    assert [name for name in loaded if name.split(".")[0] in unwanted or name.startswith(unwanted[-2:])] == []
    close(torch.load(tmp_path / "y.pt"), latents(jitexport.load(aoti_bundle)))


# --- threads ---


@pytest.fixture
def threads_seen(monkeypatch, make_bundle):
    """Loads a bundle; the list has the number of threads that each engine was opened or run on."""
    seen = []
    original = EagerBackend.load

    def load(self, *arguments):
        run = original(self, *arguments)
        seen.append(torch.get_num_threads())

        def watched(inputs):
            seen.append(torch.get_num_threads())
            return run(inputs)

        return watched

    monkeypatch.setattr(EagerBackend, "load", load)

    def opened(**options):
        pipe = jitexport.load(make_bundle(custom=CustomSchedule((1, 1), (0.5, 1.0))), **options)
        pipe("a fox", generator=torch.Generator().manual_seed(0))
        found, seen[:] = set(seen), []
        return found

    return opened


@pytest.mark.parametrize(
    ("set_to", "processors", "asked", "expected"),
    [(5, 8, None, 5), (5, 2, None, 2), (5, 2, 3, 3), (2, 8, 6, 6), (1, 8, None, 1)],
)
def test_threads_of_a_call(threads_seen, monkeypatch, set_to, processors, asked, expected):
    """Torch's setting within what the process may have, or what the caller asked for; torch's setting stays."""
    monkeypatch.setattr(machine, "cpus", lambda: processors)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(set_to)
        assert threads_seen(threads=asked) == {expected}
        assert torch.get_num_threads() == set_to
    finally:
        torch.set_num_threads(before)


def test_a_setting_after_loading_counts(make_bundle, monkeypatch):
    monkeypatch.setattr(machine, "cpus", lambda: 8)
    pipe = jitexport.load(make_bundle(custom=CustomSchedule((1,), (1.0,))))
    seen = []
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        pipe("a fox", callback_on_step_end=lambda *_: seen.append(torch.get_num_threads()))
    finally:
        torch.set_num_threads(before)
    assert seen == [4]


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", True])
def test_numbers_of_threads_that_are_none(make_bundle, threads):
    with pytest.raises(InputError, match="threads"):
        jitexport.load(make_bundle(custom=CustomSchedule((1,), (1.0,))), threads=threads)


# --- classifier-free guidance ---


def guided_pair(folder, prompts, negative):
    return theirs(folder, 4, prompt=prompts, negative_prompt=negative, true_cfg_scale=3.0, seeds=(3, 4))


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("negative", ["a blue house", ""])
def test_guidance_by_a_negative_prompt_is_flux_pipelines(tiny_flux, make_bundle, passes, negative):
    """With the second pass in a run of its own, and beside the first."""
    bundle = make_bundle(custom=CustomSchedule((4,)), method="dense", batch=2, passes=passes)
    pipe = jitexport.load(bundle)
    prompts = ["a red fox", "the green tree near the river"]
    found = pipe(prompts, negative_prompt=negative, true_cfg_scale=3.0, generator=seeded(3, 4), output_type="pt").images
    close(found, guided_pair(tiny_flux, prompts, [negative] * 2), atol=1e-4)


def test_negative_prompts_may_be_one_for_each_prompt(tiny_flux, make_bundle):
    pipe = jitexport.load(make_bundle(custom=CustomSchedule((4,)), method="dense", batch=2, passes=1))
    negative = ["a dog", "snow"]
    prompts = PROMPTS[:2]
    found = pipe(prompts, negative_prompt=negative, true_cfg_scale=3.0, generator=seeded(3, 4), output_type="pt").images
    close(found, guided_pair(tiny_flux, prompts, negative), atol=1e-4)


@pytest.mark.parametrize("passes", [1, 2])
def test_an_interval_leaves_out_second_passes(make_bundle, passes):
    """None of the steps is the image without guidance, all of them the guided one, some of them another."""
    pipe = jitexport.load(make_bundle(custom=THREE, passes=passes))

    def image(**options):
        return latents(pipe, **options)

    guided = {"negative_prompt": "a dog", "true_cfg_scale": 3.0}
    whole, without = image(**guided), image()
    assert different(whole, without)
    assert torch.equal(image(**guided, guidance_interval=(0.2, 0.2)), without)
    assert torch.equal(image(**guided, guidance_interval=(0.0, 1.0)), whole)
    part = image(**guided, guidance_interval=(0.4, 1.0))
    assert different(part, whole) and different(part, without)


def test_both_ways_of_running_two_passes_give_one_image(make_bundle):
    guided = {"negative_prompt": "a dog", "true_cfg_scale": 3.0}
    one, two = (latents(jitexport.load(make_bundle(custom=THREE, passes=n)), **guided) for n in (1, 2))
    close(one, two)


def test_a_scale_without_a_negative_prompt_is_warned_of(pipe, caplog):
    with caplog.at_level(logging.WARNING):
        assert torch.equal(latents(pipe, true_cfg_scale=4.0), latents(pipe))
    assert "without a negative prompt" in caplog.text
