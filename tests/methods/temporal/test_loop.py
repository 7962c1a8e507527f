"""Temporal methods in the loop: against diffusers' own, against loops written out here, and against each other."""

import math

import pytest
import torch
from diffusers import DiffusionPipeline, TaylorSeerCacheConfig

import jitexport
from jitexport import registry
from jitexport.building.reference import eager_pipeline
from jitexport.bundle.reading import read_manifest
from jitexport.errors import InputError
from jitexport.grid import gather_tokens
from jitexport.methods.temporal.taylor import Taylor
from jitexport.methods.temporal.teacache import COEFFICIENTS, DecidingTeaCache
from jitexport.models.sources import find_source, load_adapter
from jitexport.plan import CustomSchedule, make_cache, plan
from jitexport.verify import verify
from tests.compiled import compiled_engines
from tests.parity import seeded

CPU = torch.device("cpu")
PROMPT = "a red fox in the snow"
CACHES = [name for name in registry.CACHES if name != "teacache"]
NATIVE = CustomSchedule((10,), (1.0,))


def adapter_and_pipeline(folder, cache, custom=NATIVE, method="dense", batch=1, passes=1, **options):
    """The adapter of a tiny model, and its eager pipeline with a cache."""
    features = {"features": None if cache is None else make_cache(cache).features}
    adapter = load_adapter(find_source(str(folder)), torch.float32, features)
    made = plan(adapter, custom=custom, method=method, cache=cache)
    pipe = eager_pipeline(
        adapter, made.schedule, made.method, made.options, batch=batch, dtype="fp32", device=CPU, cache=made.cache,
        passes=passes, **options,
    )
    pipe.set_progress_bar_config(disable=True)
    return adapter, pipe


def pipeline(*model, **options):
    """The pipeline alone."""
    return adapter_and_pipeline(*model, **options)[1]


def latents(pipe, seed=0, **call):
    return pipe(PROMPT, generator=seeded(seed), output_type="latent", **call).images


# --- against no cache ---


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(("method", "custom"), [("dense", NATIVE), ("jit", CustomSchedule((3, 3, 4), (0.3, 0.6, 1.0)))])
def test_all_steps_computed_are_the_same_image(tiny_flux, cache, method, custom):
    every = pipeline(tiny_flux, f"{cache}:every=1", custom, method)
    assert every.schedule.computed == tuple(range(10))
    torch.testing.assert_close(latents(every), latents(pipeline(tiny_flux, None, custom, method)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("cache", CACHES)
def test_cheaper_steps_run_what_they_say_and_make_a_near_image(tiny_flux, cache):
    pipe = pipeline(tiny_flux, f"{cache}:every=2,warmup=1")
    ran = []
    for name, engine in pipe.engines.items():
        pipe.engines[name] = Counted(engine, ran)
    found = latents(pipe)
    cheaper = [a for a in pipe.schedule.actions if a not in ("stage", "forecast")]
    assert [name for name in ran if name not in ("text", "condition", "decode")] == [
        f"{action}0" for action in pipe.schedule.actions if action != "forecast"
    ]
    assert len(cheaper) == (4 if pipe.cache.features else 0)
    whole = latents(pipeline(tiny_flux, None))
    assert 0 < (found - whole).norm() / whole.norm() < 0.2


class Counted:
    """An engine that says when it runs."""

    def __init__(self, engine, ran):
        self.engine, self.ran, self.spec, self.device = engine, ran, engine.spec, engine.device

    def __call__(self, *inputs):
        self.ran.append(self.spec.name)
        return self.engine(*inputs)


@pytest.mark.parametrize("cache", CACHES)
def test_an_image_of_a_batch_is_that_seed_alone(tiny_flux, cache):
    pipe = pipeline(tiny_flux, f"{cache}:every=2", CustomSchedule((3, 3, 4), (0.3, 0.6, 1.0)), "jit", batch=2)
    together = pipe([PROMPT, "the blue house"], generator=seeded(3, 4), output_type="latent").images
    alone = pipe(["the blue house"], generator=seeded(4), output_type="latent").images
    torch.testing.assert_close(together[1], alone[0], atol=1e-5, rtol=0)


# --- against diffusers ---


@pytest.mark.parametrize(("interval", "before", "order"), [(3, 2, 1), (2, 3, 1), (3, 2, 0), (4, 1, 1)])
def test_taylor_by_steps_is_diffusers_lite_mode(tiny_flux, interval, before, order):
    """Where diffusers computes the last step too, as we always do."""
    steps = before + 2 + 2 * interval
    reference = DiffusionPipeline.from_pretrained(tiny_flux)
    reference.set_progress_bar_config(disable=True)
    reference.transformer.enable_cache(
        TaylorSeerCacheConfig(
            cache_interval=interval, disable_cache_before_step=before, max_order=order, use_lite_mode=True,
            taylor_factors_dtype=torch.float32,
        )
    )
    with torch.no_grad():
        expected = reference(
            PROMPT, height=48, width=32, num_inference_steps=steps, guidance_scale=3.5, max_sequence_length=10,
            generator=seeded(7)[0], output_type="latent",
        ).images
    computed = [i for i in range(steps) if i < before or (i - before - 1) % interval == 0]
    assert computed[-1] == steps - 1
    cache = f"taylor:variable=step,order={order},computed={'+'.join(map(str, computed))}"
    pipe = pipeline(tiny_flux, cache, CustomSchedule((steps,), (1.0,)))
    assert pipe.schedule.computed == tuple(computed)
    torch.testing.assert_close(latents(pipe, 7, guidance_scale=3.5), expected, atol=1e-5, rtol=1e-5)


class Opened:
    """diffusers' transformer, opened at both ends of its blocks: see TeaCache's release, and TaylorSeer's lite form."""

    def __init__(self, folder):
        self.pipe = DiffusionPipeline.from_pretrained(folder)
        self.pipe.set_progress_bar_config(disable=True)
        self.model = self.pipe.transformer
        self.number = -1
        self.steps = 0
        self.blocks = []  # (input, output) of the block stack, of computed steps
        self.model.register_forward_hook(self._replace, with_kwargs=True)
        self.model.x_embedder.register_forward_hook(lambda _, args, out: setattr(self, "embedded", out))
        self.model.transformer_blocks[0].norm1.register_forward_hook(self._seen)
        self.model.norm_out.register_forward_hook(self._last, with_kwargs=True)

    def _seen(self, module, args, out):
        self.modulated = out[0]

    def _last(self, module, args, kwargs, out):
        self.stack, self.temb = args[0], args[1]

    def _replace(self, module, args, kwargs, out):
        """Every step runs all blocks; what becomes of it is up to `velocity`."""
        self.number += 1
        u = self.velocity(self.number, self.embedded, self.stack, self.modulated)
        return (u,)

    def output(self, image):
        return self.model.proj_out(self.model.norm_out(image, self.temb))

    @torch.no_grad()
    def run(self, steps, seed, guidance=3.5):
        self.steps = steps
        return self.pipe(
            PROMPT, height=48, width=32, num_inference_steps=steps, guidance_scale=guidance, max_sequence_length=10,
            generator=seeded(seed)[0], output_type="latent",
        ).images


def test_taylorseer_forecasts_the_residual_of_the_block_stack(tiny_flux):
    computed, sigmas = [0, 1, 2, 4, 7, 9], pipeline(tiny_flux, None).schedule.sigmas
    opened, known = Opened(tiny_flux), []

    def velocity(i, embedded, stack, modulated):
        if i in computed:
            known.append((sigmas[i], stack - embedded))
            return opened.output(stack)
        (s0, r0), (s1, r1) = known[-2:]
        return opened.output(embedded + r1 + (r1 - r0) / (s1 - s0) * (sigmas[i] - s1))

    opened.velocity = velocity
    expected = opened.run(10, 5)
    pipe = pipeline(tiny_flux, "taylorseer:computed=0+1+2+4+7+9")
    torch.testing.assert_close(latents(pipe, 5), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("threshold", [0.02, 0.3, 1e9])
def test_teacache_decides_as_the_release_does(tiny_flux, threshold):
    """Its rule, written out: first and last step computed, else while the rescaled change adds up to the threshold."""
    coefficients = COEFFICIENTS["FluxPipeline"]
    opened, state, decided = Opened(tiny_flux), {"sum": 0.0, "previous": None, "residual": None}, []

    def velocity(i, embedded, stack, modulated):
        if i in (0, opened.steps - 1):
            calculate, state["sum"] = True, 0.0
        else:
            change = ((modulated - state["previous"]).abs().mean() / state["previous"].abs().mean()).item()
            state["sum"] += sum(c * change ** (4 - k) for k, c in enumerate(coefficients))
            calculate = state["sum"] >= threshold
            state["sum"] = 0.0 if calculate else state["sum"]
        state["previous"] = modulated
        decided.append(calculate)
        if calculate:
            state["residual"] = stack - embedded
        return opened.output(embedded + state["residual"])

    opened.velocity = velocity
    expected = opened.run(10, 5)
    ours = []
    deciding = DecidingTeaCache(threshold, coefficients, lambda step, computed: ours.append(computed))
    pipe = pipeline(tiny_flux, "teacache:every=1", further=("skip", "indicator"))
    pipe.cache = deciding
    found = latents(pipe, 5)
    assert ours == decided
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_delta_dit_is_exact_at_computed_steps_and_reuses_deltas_elsewhere(tiny_flux):
    """With the same tokens again, the kept half gives the same velocity as the whole."""
    pipe = pipeline(tiny_flux, "delta-dit:every=2")
    condition, _ = pipe.prepare([PROMPT])
    where = torch.arange(96)[None]
    inputs, tokens = pipe.stage_inputs(where, condition), torch.randn(1, 96, 16, generator=seeded(0)[0])
    whole, front, rear = (pipe.engines[f"{name}0"] for name in ("stage", "front", "rear"))
    u, of_front, of_rear = whole(*inputs(whole.spec, tokens, 3))
    for engine, delta in ((front, of_rear), (rear, of_front)):
        torch.testing.assert_close(engine(*inputs(engine.spec, tokens, 3, delta))[0], u, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(engine(*inputs(engine.spec, tokens, 3, 2 * delta))[0], u, atol=1e-3)


# --- with JiT's stages ---


def test_old_anchors_keep_their_history_and_new_ones_get_it_lifted(tiny_flux):
    pipe = pipeline(tiny_flux, "taylor:every=2", CustomSchedule((3, 4), (0.3, 1.0)), "jit")
    method = pipe.method
    draws = pipe.draw(seeded(0))
    before = method.start(draws, pipe.schedule.stages[0])
    u = torch.randn(before.active.shape, generator=seeded(1)[0])
    before = method.step(before, u, 1.0, 0.9)
    after = method.transition(before, pipe.schedule.stages[1], 0.9)
    carried = method.carry(before, after)(torch.cat([u, 2 * u]))
    assert torch.equal(gather_tokens(carried[:1], before.lift.anchors), u)
    torch.testing.assert_close(carried[0], before.lift(u)[0])
    torch.testing.assert_close(carried[1], 2 * carried[0])


def test_a_line_is_followed_through_stages(tiny_flux, monkeypatch):
    """A velocity that is linear in the noise level is integrated as if every step were computed, however far."""
    monkeypatch.setattr(Taylor, "most_amplified", math.inf)
    custom, line = CustomSchedule((4, 4, 5), (0.3, 0.6, 1.0)), "taylor:computed=0+2+4+6+8+10"
    cached, plain = (pipeline(tiny_flux, cache, custom, "jit") for cache in (line, None))
    sigmas = plain.schedule.sigmas
    for pipe in (cached, plain):
        for name in [n for n in pipe.engines if n.startswith("stage")]:
            pipe.engines[name] = Line(pipe.engines[name], pipe, sigmas)
    assert cached.schedule.computed == (0, 2, 4, 6, 8, 10, 12)
    torch.testing.assert_close(latents(cached), latents(plain), atol=1e-5, rtol=0)


class Line:
    """A stage's engine whose velocity is 0.3 - 0.8 sigma; sigma is found by the modulation of the step."""

    def __init__(self, engine, pipe, sigmas):
        self.spec, self.device, self.sigmas = engine.spec, engine.device, sigmas
        self.place = [s.name for s in engine.spec.inputs].index("modulation")
        self.known = pipe.prepare([PROMPT])[0].per_step["modulation"]

    def __call__(self, *inputs):
        distances = (self.known - inputs[self.place]).flatten(1).norm(dim=1)
        sigma = self.sigmas[int(distances.argmin())]
        return [torch.full_like(inputs[0], 0.3 - 0.8 * sigma)]


# --- with a second pass ---


@pytest.fixture(scope="module")
def tiny_sd3(tmp_path_factory):
    from tests import tiny_sd3

    return tiny_sd3.save_sd3(tmp_path_factory.mktemp("models") / "sd3", medium35=True)


@pytest.mark.parametrize("cache", ["taylor:every=2", "taylorseer:every=2,warmup=1", "delta-dit:every=2"])
def test_guided_images_are_the_same_in_one_run_or_two(tiny_sd3, cache):
    call = {"guidance_scale": 4.0, "negative_prompt": "a dog"}
    one, both = (pipeline(tiny_sd3, cache, CustomSchedule((6,), (1.0,)), passes=passes) for passes in (1, 2))
    torch.testing.assert_close(latents(one, **call), latents(both, **call), atol=1e-5, rtol=1e-5)
    unguided = latents(one, guidance_scale=1.0)
    torch.testing.assert_close(unguided, latents(both, guidance_scale=1.0), atol=1e-5, rtol=1e-5)
    assert (latents(one, **call) - unguided).abs().max() > 1e-3


def test_a_cache_of_features_needs_the_second_pass_at_all_steps(tiny_sd3):
    call = {"guidance_scale": 4.0, "guidance_interval": (0.0, 0.5)}
    with pytest.raises(InputError, match="of which the cache would know nothing"):
        latents(pipeline(tiny_sd3, "taylorseer:every=2", CustomSchedule((6,), (1.0,))), **call)
    assert latents(pipeline(tiny_sd3, "taylor:every=2", CustomSchedule((6,), (1.0,))), **call).isfinite().all()


# --- as bundles ---


@pytest.mark.parametrize(
    ("method", "custom"),
    [
        ("jit", CustomSchedule((2, 3, 3), (0.3, 0.6, 1.0))), ("ralu", CustomSchedule((2, 2, 3))),
        ("bottleneck", CustomSchedule((2, 2, 3))), ("ras", CustomSchedule((9,), (0.25,))),
    ],
)
@pytest.mark.parametrize("cache", CACHES)
def test_bundles_of_every_combination(make_bundle, cache, method, custom):
    path = make_bundle(method=method, custom=custom, cache=f"{cache}:every=2,warmup=1")
    manifest = read_manifest(path)
    pipe = jitexport.load(path)
    assert manifest.cache.name == cache and pipe.cache.name == cache
    assert manifest.model.settings["features"] == pipe.cache.features
    schedule = manifest.schedule.schedule()
    assert schedule == pipe.schedule and len(schedule.computed) < schedule.nfe
    assert {f"{action}{stage.index}" for action, stage in schedule.runs} < {e.name for e in manifest.engines}
    images = pipe(PROMPT, generator=seeded(0), output_type="pt").images
    assert images.isfinite().all()
    assert verify(path).passed


@pytest.mark.parametrize("cache", ["taylorseer:every=2,warmup=1", "delta-dit:every=2", "taylor:every=2"])
@pytest.mark.parametrize("backend", ["aoti", "onnx"])
def test_compiled_engines_make_the_eager_ones_images(tiny_flux, backend, cache, tmp_path):
    """Engines of all actions in both stages; whole compiled bundles with a cache are built for ToCa."""
    adapter, pipe = adapter_and_pipeline(tiny_flux, cache, CustomSchedule((2, 4), (0.4, 1.0)), "jit")
    actions = {stage.engine(action) for action, stage in pipe.schedule.runs}
    expected = latents(pipe)
    pipe.engines |= compiled_engines(backend, pipe, adapter, tmp_path, actions.__contains__)
    found = latents(pipe)
    assert actions <= pipe.engines.keys() and not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
