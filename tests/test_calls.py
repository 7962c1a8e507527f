"""The call as diffusers' users make it: arguments, callbacks, interrupts, what other code has set, and bad numbers."""

import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

import jitexport
from jitexport.arguments import shown
from jitexport.errors import InputError, NumericalError
from jitexport.plan import CustomSchedule
from tests import tiny

THREE = CustomSchedule((2, 1, 2), (0.35, 0.62, 1.0))
DENSE = {"method": "dense", "custom": CustomSchedule((3,), (1.0,))}


@pytest.fixture(scope="module")
def pipe(make_bundle):
    return jitexport.load(make_bundle(preset="paper", custom=THREE))


@pytest.fixture(scope="module")
def pairs(make_bundle):
    return jitexport.load(make_bundle(preset="paper", custom=THREE, batch=2))


@pytest.fixture(scope="module")
def schnell(make_bundle):
    return jitexport.load(make_bundle("tiny-schnell", **DENSE))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def latents(pipe, prompt="a red fox", seed=0, **options):
    return pipe(prompt, generator=seeded(seed), output_type="latent", **options).images


# --- arguments -------------------------------------------------------------------------------------------------------

OWN = {
    "height": tiny.HEIGHT, "width": tiny.WIDTH, "num_inference_steps": 5, "max_sequence_length": tiny.TEXT_TOKENS,
    "negative_prompt": None, "true_cfg_scale": 1.0, "joint_attention_kwargs": {}, "ip_adapter_image": None,
    "callback_on_step_end_tensor_inputs": ["latents"], "return_dict": True, "prompt_2": None, "prompt_embeds": None,
}  # fmt: skip


def test_the_bundles_own_values_are_taken(pipe):
    expected = latents(pipe)
    assert torch.equal(latents(pipe, **OWN), expected)
    assert torch.equal(latents(pipe, height=np.int64(tiny.HEIGHT), sigmas=list(pipe.schedule.sigmas[:-1])), expected)
    assert torch.equal(latents(pipe, height=None, negative_prompt="", num_inference_steps=None), expected)
    (images,) = pipe("a red fox", generator=seeded(), output_type="latent", return_dict=False)
    assert torch.equal(images, expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"height": 1024}, f"built for height={tiny.HEIGHT}"),
        ({"width": 31.5}, f"built for width={tiny.WIDTH}"),
        ({"num_inference_steps": 50}, "built for num_inference_steps=5"),
        ({"max_sequence_length": 512}, "built for max_sequence_length=10"),
        ({"sigmas": [1.0, 0.5]}, "noise levels built in"),
        ({"negative_prompt": "ugly"}, "needs classifier-free guidance"),
        ({"negative_prompt": "ugly", "true_cfg_scale": 1}, "needs classifier-free guidance"),
        ({"negative_prompt": ["ugly", "dull"], "true_cfg_scale": 4}, "one negative prompt per prompt"),
        ({"negative_prompt": 3, "true_cfg_scale": 4}, "negative_prompt must be a string"),
        ({"true_cfg_scale": "4"}, "finite number"),
        ({"true_cfg_scale": -1}, "finite number"),
        ({"guidance_interval": (0.5, 0.2)}, "two shares of the steps"),
        ({"guidance_interval": 0.5}, "two shares of the steps"),
        ({"prompt_3": "a"}, "no text encoder for prompt_3"),
        ({"negative_prompt_3": "a", "true_cfg_scale": 4}, "no text encoder for negative_prompt_3"),
        ({"joint_attention_kwargs": {"scale": 0.5}}, "load_lora"),
        ({"ip_adapter_image": np.zeros(3)}, "image adapters"),
        ({"promt": "x"}, "no argument of this name: promt"),
        ({"guidance_scale": "3.5"}, "finite number"),
        ({"guidance_scale": "3.5"}, "found: +'3.5'"),
        ({"guidance_scale": 1e300}, "finite number"),
        ({"guidance_scale": True}, "finite number"),
        ({"num_images_per_prompt": "2"}, "whole number"),
        ({"num_images_per_prompt": True}, "whole number"),
        ({"num_images_per_prompt": np.int64(0)}, "whole number"),
        ({"output_type": None}, "unknown output_type"),
        ({"return_dict": torch.zeros(2)}, "return_dict must be"),
        ({"output_type": np.zeros(2)}, "unknown output_type"),
        ({"callback_on_step_end": 3}, "must be a function"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "cannot have"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, "cannot have"),
        ({"latents": torch.full((1, 96, 16), float("nan"))}, "latents hold NaN"),
        ({"latents": torch.zeros(1, 96, 16, device="meta")}, "latents do not fit"),
        ({"prompt_2": ["a", "b"]}, "one prompt_2 per prompt"),
        ({"prompt_embeds": torch.zeros(1, 10, 32)}, "not both"),
        ({"prompt": None}, "string or a list"),
        ({"prompt": {"a": 1}}, "string or a list"),
        ({"prompt": b"a fox"}, "string or a list"),
        ({"prompt": np.array("a")}, "string or a list"),
        ({"prompt": "a \ud800 fox"}, "half a surrogate pair"),
        ({"prompt": ["fine", "\udcff"]}, "half a surrogate pair"),
    ],
)
def test_others_are_refused_by_what_the_bundle_has(pipe, given, message):
    with pytest.raises(InputError, match=message):
        pipe(**({"prompt": "a red fox"} | given))


def test_numbers_and_texts_of_numpy(pipe):
    options = {"output_type": "latent"}
    found = pipe(
        np.array(["a red fox"]), num_images_per_prompt=np.int64(2), guidance_scale=np.float32(5),
        generator=[seeded(0), seeded(1)], **options,
    ).images  # fmt: skip
    for i in range(2):
        assert torch.equal(found[i : i + 1], latents(pipe, seed=i, guidance_scale=5.0))


def test_schnells_documented_call(schnell):
    """Guidance 0, as its model card has it, and nothing else."""
    found = latents(schnell, guidance_scale=0.0, num_inference_steps=3, max_sequence_length=10)
    assert torch.equal(found, latents(schnell))
    with pytest.raises(InputError, match="takes no guidance"):
        latents(schnell, guidance_scale=3.5)


def test_embeddings_instead_of_prompts(pairs):
    prompts = ["a red fox", "the blue house", "green tree"]
    chunks = [pairs.engines["text"](*pairs.tokenize(pair)) for pair in (prompts[:2], [prompts[2]] * 2)]
    embeds, pooled = (torch.cat([a, b[:1]]) for a, b in zip(*chunks, strict=True))
    generators = [seeded(i) for i in range(3)]
    expected = pairs(prompts, generator=generators, output_type="latent").images
    generators = [seeded(i) for i in range(3)]
    found = pairs(
        prompt_embeds=embeds, pooled_prompt_embeds=pooled, generator=generators, output_type="latent"
    ).images
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    for wrong in ({"prompt_embeds": embeds}, {"prompt_embeds": embeds[:, :9], "pooled_prompt_embeds": pooled},
                  {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled[:2]}):  # fmt: skip
        with pytest.raises(InputError, match="do not fit"):
            pairs(**wrong)


def test_a_prompt_for_the_second_encoder_is_diffusers(make_bundle, tiny_flux):
    from diffusers import FluxPipeline

    pipe = jitexport.load(make_bundle(**DENSE))
    options = {"prompt_2": "the blue house", "output_type": "pt", "num_inference_steps": 3, "height": tiny.HEIGHT,
               "width": tiny.WIDTH, "max_sequence_length": 10, "guidance_scale": 3.5}  # fmt: skip
    theirs = FluxPipeline.from_pretrained(tiny_flux)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs("a red fox", generator=seeded(), **options).images
    torch.testing.assert_close(pipe("a red fox", generator=seeded(), **options).images, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", ["0", str(2**64 - 1)])
def test_seeds_of_comfyui_on_the_command_line(make_bundle, tmp_path, seed):
    from typer.testing import CliRunner

    from jitexport.cli import app

    path = tmp_path / "x.png"
    arguments = ["generate", str(make_bundle(**DENSE)), "a red fox", "-o", str(path), "--seed", seed]
    result = CliRunner().invoke(app, [*arguments, "--num-images", "2"])
    assert result.exit_code == 0 and (tmp_path / "x-1.png").is_file()


def test_values_in_messages_are_short_and_plain():
    class Odd:
        def __repr__(self):
            raise ValueError

    assert shown("\ud800" * 3) == "'" + "\\ud800" * 3 + "'"
    assert len(shown("x" * 10**6)) < 210 and len(shown(["x" * 10**6])) < 210
    assert shown(Odd()) == "Odd (ValueError in its repr)"


@pytest.mark.parametrize("path", [None, 7, "", b"engines", "a\0b", ["x"]])
def test_what_is_no_path(pipe, path):
    for use in (jitexport.load, pipe.load_checkpoint, lambda p: pipe.load_checkpoint("x", base=p or 0)):
        with pytest.raises(InputError, match="must be a path"):
            use(path)


@pytest.mark.parametrize("device", ["abacus", object(), 1.5, "cpu:x"])
def test_what_is_no_device(make_bundle, device):
    with pytest.raises(InputError, match="unknown device"):
        jitexport.load(make_bundle(**DENSE), device=device)


# --- callbacks and interrupts ----------------------------------------------------------------------------------------


def interrupted_after(step):
    def callback(pipe, i, timestep, tensors):
        seen.append(tensors["latents"])
        pipe._interrupt = i == step
        return tensors

    seen = []
    return callback, seen


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_an_interrupt_skips_the_steps_that_are_left(pipe, step):
    """In the middle of a stage and at its end; the image is that of the latents so far, as in diffusers."""
    callback, seen = interrupted_after(step)
    found = latents(pipe, callback_on_step_end=callback)
    assert len(seen) == step + 1
    assert torch.equal(found, seen[-1])
    assert not pipe.interrupt
    assert torch.equal(latents(pipe), latents(pipe))  # the next call runs all of its steps


def test_an_interrupt_is_that_of_diffusers(make_bundle, tiny_flux):
    from diffusers import FluxPipeline

    options = {"output_type": "pt", "num_inference_steps": 3, "height": tiny.HEIGHT, "width": tiny.WIDTH,
               "max_sequence_length": 10, "guidance_scale": 3.5}  # fmt: skip
    theirs = FluxPipeline.from_pretrained(tiny_flux)
    theirs.set_progress_bar_config(disable=True)
    images = [
        p("a red fox", generator=seeded(), callback_on_step_end=interrupted_after(1)[0], **options).images
        for p in (theirs, jitexport.load(make_bundle(**DENSE)))
    ]
    torch.testing.assert_close(images[1], images[0], atol=1e-4, rtol=0)


def test_an_interrupt_holds_for_all_chunks_of_its_call(pairs):
    callback, seen = interrupted_after(1)
    found = latents(pairs, ["a red fox"] * 3, callback_on_step_end=callback)
    assert len(seen) == 2 and len(found) == 3
    assert torch.equal(found[2:], pairs.draw([seeded()] * 3).latents[2:])  # not begun


def test_other_threads_calls_go_on(pipe):
    expected = latents(pipe, seed=1)
    inside, done, found = threading.Event(), threading.Event(), {}

    def other():
        def wait(_, i, timestep, tensors):
            if i == 0:
                inside.set()
                done.wait(60)

        found["other"] = latents(pipe, seed=1, callback_on_step_end=wait)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(60)
    callback, seen = interrupted_after(0)
    latents(pipe, callback_on_step_end=callback)
    done.set()
    thread.join()
    assert len(seen) == 1
    assert torch.equal(found["other"], expected)


def test_a_stop_button_in_another_thread_stops_what_runs(pipe):
    steps = []

    def callback(_, i, timestep, tensors):
        steps.append(i)
        thread = threading.Thread(target=lambda: setattr(pipe, "_interrupt", True))
        thread.start()
        thread.join()

    latents(pipe, callback_on_step_end=callback)
    assert steps == [0]
    pipe._interrupt = True  # no call runs: nothing to stop, and nothing is kept
    assert not pipe._interrupt


class Halve(PipelineCallback):
    """A callback in diffusers' own form."""

    tensor_inputs = ["latents"]  # noqa: RUF012 - as diffusers' own

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        assert pipeline.num_timesteps == 5 and pipeline.guidance_scale == 3.5
        if step_index == self.config.cutoff_step_index:
            callback_kwargs["latents"] = callback_kwargs["latents"] * 0.5
        return callback_kwargs


class Look(PipelineCallback):
    tensor_inputs = ["latents", "prompt_embeds"]  # noqa: RUF012 - as diffusers' own

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        assert callback_kwargs["prompt_embeds"].shape == (1, 10, 32)
        return callback_kwargs


def test_diffusers_callback_objects(pipe):
    def by_hand(_, i, timestep, tensors):
        return {"latents": tensors["latents"] * 0.5} if i == 1 else {}

    expected = latents(pipe, callback_on_step_end=by_hand)
    halve = Halve(cutoff_step_ratio=None, cutoff_step_index=1)
    assert torch.equal(latents(pipe, callback_on_step_end=halve), expected)
    several = MultiPipelineCallbacks([halve, Look(cutoff_step_ratio=1.0, cutoff_step_index=None)])
    assert torch.equal(latents(pipe, callback_on_step_end=several), expected)


def test_a_callback_sees_the_predicted_image_and_which_tokens_ran(pipe):
    seen = []

    def look(pipe, step, timestep, tensors):
        assert list(tensors) == names
        seen.append((tensors["places"].shape[1], pipe.decode(tensors["clean"])))

    names = ["clean", "places"]
    final = pipe.decode(latents(pipe, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names))
    assert [tokens for tokens, _ in seen] == [s.tokens for s in pipe.schedule.stages for _ in range(s.steps)]
    assert torch.equal(seen[-1][1], final)
    assert not torch.equal(seen[0][1], final)


def test_callbacks_may_write_in_place_and_keep_what_they_are_given(pipe):
    kept = []

    def in_place(_, i, timestep, tensors):
        kept.append(tensors["latents"])
        if i == 1:
            tensors["latents"] *= 0.5

    def by_hand(_, i, timestep, tensors):
        return {"latents": tensors["latents"] * 0.5} if i == 1 else {}

    found = latents(pipe, callback_on_step_end=in_place)
    assert torch.equal(found, latents(pipe, callback_on_step_end=by_hand))
    kept[0] *= 2  # an ordinary tensor


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1], "table of tensors"),
        ({"latents": "x"}, "another shape"),
        ({"latents": torch.full((1, 96, 16), float("inf"))}, "NaN or infinite"),
        ({"prompt_embeds": torch.zeros(1, 10, 32)}, "other prompt_embeds"),
    ],
)
def test_what_a_callback_may_not_return(pipe, answer, message):
    with pytest.raises(InputError, match=message):
        latents(
            pipe, callback_on_step_end=lambda *_: answer,
            callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        )


# --- what other code has set -----------------------------------------------------------------------------------------


def set_dtype(dtype):
    torch.set_default_dtype(dtype)
    return lambda: torch.set_default_dtype(torch.float32)


def set_device(device):
    torch.set_default_device(device)
    return lambda: torch.set_default_device(None)


def enter(context):
    context.__enter__()
    return lambda: context.__exit__(None, None, None)


def deterministic():
    torch.use_deterministic_algorithms(True)
    return lambda: torch.use_deterministic_algorithms(False)


def global_seed():
    torch.manual_seed(7)
    return lambda: None


AMBIENT = {
    "float64": lambda: set_dtype(torch.float64),
    "float16": lambda: set_dtype(torch.float16),
    "bfloat16": lambda: set_dtype(torch.bfloat16),
    "meta device": lambda: set_device("meta"),
    "autocast": lambda: enter(torch.autocast("cpu", torch.bfloat16)),
    "grad": lambda: enter(torch.enable_grad()),
    "inference mode": lambda: enter(torch.inference_mode()),
    "deterministic": deterministic,
    "global seed": global_seed,
}


@pytest.mark.parametrize("model", ["jit", "ras"])
@pytest.mark.parametrize("name", AMBIENT)
def test_nothing_depends_on_what_other_code_has_set(make_bundle, name, model):
    """Neither loading, nor the image of a seed, nor what an adapter merges."""
    options = {"preset": "paper", "custom": THREE} if model == "jit" else {"method": "ras", "speedup": 2}
    bundle = make_bundle(**options)
    weight = "transformer.single_transformer_blocks.0.attn.to_q.weight"
    state = {f"{weight.removesuffix('.weight')}.lora_{ab}.weight": torch.ones(shape) * 0.1
             for ab, shape in (("A", (2, 32)), ("B", (32, 2)))}  # fmt: skip
    plain = jitexport.load(bundle)
    expected = latents(plain)
    plain.load_lora(state)
    undo = AMBIENT[name]()
    try:
        pipe = jitexport.load(bundle)
        found = latents(pipe)
        pipe.load_lora(state)
    finally:
        undo()
    assert torch.equal(found, expected)
    assert found.dtype == torch.float32 and not found.is_inference() and not found.requires_grad
    assert torch.equal(pipe.weights.tensors[weight], plain.weights.tensors[weight])
    found *= 0.5


@pytest.mark.parametrize("kind", ["pt", "latent"])
def test_results_are_ordinary_tensors(pipe, kind):
    x = pipe("a red fox", output_type=kind).images
    x *= 0.5
    x.requires_grad_(True)
    (x**2).sum().backward()
    assert x.grad is not None


def test_a_command_without_stderr_does_its_work(make_bundle, tmp_path):
    bundle, path = str(make_bundle(**DENSE)), str(tmp_path / "x.png")
    shell = 'exec "$0" -c "from jitexport.cli import main; main()" "$@" 2>&-'
    command = ["sh", "-c", shell, sys.executable, "generate", bundle, "a fox", "-o", path]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    assert run.returncode == 0 and run.stdout.strip() == path


@pytest.mark.parametrize("stderr", ["None", "closed", "no isatty"])
def test_a_process_without_stderr(make_bundle, stderr):
    change = {
        "None": "sys.stderr = None",
        "closed": "sys.stderr.close()",
        "no isatty": "sys.stderr = type('Small', (), {'write': lambda self, text: None, 'flush': lambda self: None})()",
    }[stderr]
    code = (
        f"import sys; {change}; import jitexport; p = jitexport.load({str(make_bundle(**DENSE))!r});"
        "p('a fox'); p.set_progress_bar_config(disable=False); print(p('a fox').images[0].size)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.strip() == f"({tiny.WIDTH}, {tiny.HEIGHT})"


# --- numbers that are not finite -------------------------------------------------------------------------------------


def broken(pipe, name, value):
    """The pipeline with one weight changed, behind everybody's back."""
    with torch.no_grad():
        pipe.weights.tensors[name].fill_(value)
    return pipe


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("text_encoder.final_layer_norm.weight", "engine text"),
        ("transformer.norm_out.linear.bias", "engine condition"),
        ("transformer.proj_out.bias", "engine stage2 at step 1 of 5"),
        ("vae.decoder.conv_out.bias", "engine decode"),
    ],
)
@pytest.mark.parametrize("kind", ["pil", "pt"])
def test_an_image_that_is_not_finite_is_an_error(make_bundle, name, where, kind):
    pipe = broken(jitexport.load(make_bundle(preset="paper", custom=THREE)), name, float("nan"))
    with pytest.raises(NumericalError, match=where):
        pipe("a red fox", output_type=kind)
    if where == "engine decode":
        assert latents(pipe).isfinite().all()


def test_the_step_where_it_begins(make_bundle, monkeypatch):
    pipe = jitexport.load(make_bundle(preset="paper", custom=THREE))
    runs, engine = [], pipe.engines["stage1"]

    class Once:
        spec = engine.spec

        def __call__(self, *inputs):
            return [engine(*inputs)[0] * float("inf")]

    monkeypatch.setitem(pipe.engines, "stage1", Once())
    with pytest.raises(NumericalError, match="engine stage1 at step 3 of 5"):
        latents(pipe, callback_on_step_end=lambda *_: runs.append(1))
    assert len(runs) <= 5


def test_an_adapter_of_nonsense_strength_is_an_error_and_no_black_image(make_bundle):
    pipe = jitexport.load(make_bundle(**DENSE))
    module = "transformer.transformer_blocks.0.ff.net.0.proj"
    out, into = pipe.weights.tensors[f"{module}.weight"].shape
    state = {f"{module}.lora_A.weight": torch.ones(1, into), f"{module}.lora_B.weight": torch.ones(out, 1)}
    pipe.load_lora(state, scale=1e37)
    with pytest.raises(NumericalError, match="engine stage0 at step 1"):
        pipe("a red fox")
    pipe.unload_lora()
    assert latents(pipe).isfinite().all()
