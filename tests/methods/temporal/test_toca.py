"""ToCa: against a loop written out around diffusers' own modules, with attention frozen, and as bundles."""

import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline

import jitexport
from jitexport.bundle.reading import read_manifest
from jitexport.errors import InputError, UnsupportedModelError
from jitexport.flops import meta_adapter, step_cost
from jitexport.methods.temporal.toca import Kept, ToCa
from jitexport.models import flux, flux2_klein, layers, sd3
from jitexport.models.published import FLUX
from jitexport.models.sources import find_source, load_adapter
from jitexport.models.stages import check_features, exchanged
from jitexport.models.tokens import Cell, Refresh
from jitexport.plan import CustomSchedule, plan
from jitexport.schedule import COMPUTED, Step
from jitexport.specs import DTYPES
from tests.methods.temporal.test_loop import PROMPT, latents, pipeline
from tests.parity import seeded
from tests.tiny_families import SAVE

# --- the refresh engine of every family, where all tokens are refreshed ---

MODELS = [name for name in SAVE if name != "FLUX.1-4-steps"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return cache(lambda name: SAVE[name](root / name))


class Engines:
    """The engines of a model with all tokens and what they read, for tokens of any seed."""

    def __init__(self, folder, fresh):
        self.pipe = pipeline(folder, f"toca:every=2,warmup=1,fresh={fresh}", CustomSchedule((6,), (1.0,)))
        condition, _ = self.pipe.prepare([PROMPT])
        self.count, self.channels = self.pipe.geometry.grid.tokens, self.pipe.geometry.channels
        self._inputs = self.pipe.stage_inputs(torch.arange(self.count)[None], condition)

    def tokens(self, seed):
        return torch.randn(1, self.count, self.channels, generator=seeded(seed)[0])

    @torch.no_grad()
    def __call__(self, action, tokens, step, *beside):
        engine = self.pipe.engines[f"{action}0"]
        return engine(*self._inputs(engine.spec, tokens, step, *beside))


@pytest.mark.parametrize("family", MODELS)
def test_all_tokens_refreshed_with_the_same_attention_are_the_computed_step(folders, family):
    run = Engines(folders(family), fresh=1)
    tokens = run.tokens(0)
    u, attention, updates, scores = run(COMPUTED, tokens, 2)
    v, again, fresh = run("refresh", tokens, 2, attention, torch.zeros_like(updates), scores)
    assert torch.equal(u, v) and torch.equal(again, updates) and fresh.eq(1).all()
    assert not torch.allclose(run("refresh", tokens, 2, 2 * attention, updates, scores)[0], u, atol=1e-3)


@pytest.mark.parametrize("family", MODELS)
def test_a_refresh_is_a_computed_step_whose_attention_is_frozen(folders, family, monkeypatch):
    """At another step, so with its modulation and its gates: attention of the first step is played back in a second."""
    run = Engines(folders(family), fresh=1)
    found, real = [], layers.attention

    def recorded(*given, **options):
        found.append(real(*given, **options))
        return found[-1]

    def put(attention):
        for module in (layers, flux, flux2_klein, sd3):
            monkeypatch.setattr(module, "attention", attention)

    put(recorded)
    _, attention, updates, scores = run(COMPUTED, run.tokens(0), 0)
    again = iter(found)
    put(lambda *given, **options: next(again))
    u, _, expected, _ = run(COMPUTED, run.tokens(1), 3)
    assert next(again, None) is None
    v, refreshed, _ = run("refresh", run.tokens(1), 3, attention, updates, scores)
    torch.testing.assert_close(v, u, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(refreshed, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(refreshed, updates, atol=1e-2)


@pytest.mark.parametrize("family", MODELS)
def test_a_share_of_each_cell_is_refreshed(folders, family):
    run = Engines(folders(family), fresh=0.2)
    _, attention, updates, scores = run(COMPUTED, run.tokens(0), 0)
    adapter = load_adapter(find_source(str(folders(family))), torch.float32)
    cells = adapter.cells(adapter.configs)
    words = next(s for s in run.pipe.engines["stage0"].spec.inputs if s.name == "context").shape[1]
    lengths = [cell.length(run.count, words) for cell in cells]
    _, after, fresh = run("refresh", run.tokens(1), 1, attention, updates, scores)
    assert sum(lengths) == updates.shape[1] == scores.shape[1]
    for cell, points, chosen in zip(cells, scores.split(lengths, 1), fresh.split(lengths, 1), strict=True):
        count = cell.fresh(0.2, points.shape[1])
        assert chosen.sum() == count >= 1
        highest = points[0].sort(descending=True).values[:count]
        assert torch.equal(points[chosen == 1].sort(descending=True).values, highest)
        torch.testing.assert_close(points.square().sum(), torch.tensor(1.0))
    changed = (after != updates).any(dim=-1)
    assert torch.equal(changed, fresh == 1)


# --- against diffusers' modules ---


class ByHand:
    """ToCa around diffusers' own modules, token by token: a pipeline whose transformer is the loop below."""

    def __init__(self, folder, computed, every, share):
        self.pipe = DiffusionPipeline.from_pretrained(folder)
        self.pipe.set_progress_bar_config(disable=True)
        self.model = self.pipe.transformer
        self.model.forward = self.forward
        self.computed, self.every, self.share = computed, every, share
        self.number, self.refreshed = -1, 0
        self.known = {}  # (kind of block, number, stream): attention, update, score, age

    @torch.no_grad()
    def run(self, steps, seed):
        return self.pipe(
            PROMPT, height=48, width=32, num_inference_steps=steps, guidance_scale=3.5, max_sequence_length=10,
            generator=seeded(seed)[0], output_type="latent",
        ).images

    def forward(
        self, hidden_states, timestep, guidance, pooled_projections, encoder_hidden_states, txt_ids, img_ids, **_
    ):
        self.number += 1
        model = self.model
        image, text = model.x_embedder(hidden_states), model.context_embedder(encoder_hidden_states)
        temb = model.time_text_embed(timestep * 1000, guidance * 1000, pooled_projections)
        rotary = model.pos_embed(torch.cat([txt_ids, img_ids]))
        for i, block in enumerate(model.transformer_blocks):
            image, text = self.double(i, block, image, text, temb, rotary)
        x = torch.cat([text, image], dim=1)
        for i, block in enumerate(model.single_transformer_blocks):
            x = self.single(i, block, x, temb, rotary)
        return (model.proj_out(model.norm_out(x[:, text.shape[1] :], temb)),)

    def double(self, i, block, image, text, temb, rotary):
        norm, gate, shift, scale, mlp_gate = block.norm1(image, emb=temb)
        text_norm, text_gate, text_shift, text_scale, text_mlp_gate = block.norm1_context(text, emb=temb)
        found = values = (None, None)
        if self.number in self.computed:
            found = block.attn(hidden_states=norm, encoder_hidden_states=text_norm, image_rotary_emb=rotary)
            values = block.attn.to_v(norm), block.attn.add_v_proj(text_norm)
        weight = 0.4 * (1.5 - i / 27)

        def mlp(x):
            return block.ff(block.norm2(x) * (1 + scale[:, None]) + shift[:, None])

        def text_mlp(x):
            return block.ff_context(block.norm2_context(x) * (1 + text_scale[:, None]) + text_shift[:, None])

        image = image + gate[:, None] * self.attention(("double", i, "image"), found[0])
        text = text + text_gate[:, None] * self.attention(("double", i, "text"), found[1])
        image = image + mlp_gate[:, None] * self.update(("double", i, "image"), weight, values[0], mlp, image)
        text = text + text_mlp_gate[:, None] * self.update(("double", i, "text"), weight, values[1], text_mlp, text)
        return image, text

    def single(self, i, block, x, temb, rotary):
        norm, gate = block.norm(x, emb=temb)
        found = values = None
        if self.number in self.computed:
            found, values = block.attn(hidden_states=norm, image_rotary_emb=rotary), block.attn.to_v(norm)
        a = self.attention(("single", i), found)

        def both(norm, a):
            return block.proj_out(torch.cat([a, block.act_mlp(block.proj_mlp(norm))], dim=2))

        return x + gate[:, None] * self.update(("single", i), 1.6 * (1.5 - i / 27), values, both, norm, a)

    def attention(self, key, found):
        known = self.known.setdefault(key, {})
        if found is not None:
            known["attention"] = found
        return known["attention"]

    def update(self, key, weight, values, function, *inputs):
        known, count = self.known[key], inputs[0].shape[1]
        if self.number in self.computed:
            norms = values.unflatten(-1, (2, 16)).norm(dim=-1).mean(dim=-1)[0]
            known |= {"update": function(*inputs), "score": F.normalize(norms, dim=0), "age": [0] * count}
            return known["update"]
        points = [float(s) + 0.25 * age / self.every for s, age in zip(known["score"], known["age"], strict=True)]
        chosen = sorted(range(count), key=lambda t: -points[t])[: max(1, int(self.share * weight * count))]
        known["update"] = known["update"].clone()
        for t in range(count):
            known["age"][t] += 1
            if t in chosen:
                known["age"][t] = 0
                known["update"][:, t] = function(*(x[:, t : t + 1] for x in inputs))[:, 0]
                self.refreshed += 1
        return known["update"]


def test_the_loop_is_toca_around_diffusers_modules(tiny_flux):
    computed = [0, 3, 6, 9]
    by_hand = ByHand(tiny_flux, computed, every=3, share=0.3)
    expected = by_hand.run(10, 5)
    pipe = pipeline(tiny_flux, "toca:every=3,warmup=1,fresh=0.3")
    assert pipe.schedule.computed == tuple(computed)
    torch.testing.assert_close(latents(pipe, 5), expected, atol=1e-5, rtol=1e-5)
    assert by_hand.refreshed == 6 * (int(0.18 * 96) + 1 + int(0.72 * 106) + int(0.3 * 1.6 * (1.5 - 1 / 27) * 106))
    for other in ("fresh=0.5", "staleness=0"):  # each of them is seen in the image
        assert not torch.allclose(
            latents(pipeline(tiny_flux, f"toca:every=3,warmup=1,{other}{',fresh=0.3' * ('fresh' not in other)}"), 5),
            expected, atol=1e-4,
        )


# --- in the loop ---


def test_ages_count_the_steps_since_a_token_was_refreshed():
    """The oldest come first where scores are alike."""
    cache, seen = ToCa({"every": 4, "fresh": 0.25}), []
    cell = Cell("image", 1.0)

    def run(action, tokens, step, *kept):
        if action == COMPUTED:
            scores = torch.tensor([[0.40, 0.41, 0.39, 0.38]])
            return [tokens, torch.zeros(1, 4, 2), torch.zeros(1, 4, 2), scores]
        memo = Refresh(*kept, cells=[cell], share=0.25)
        memo.refreshed(torch.ones(1, 4, 2), torch.ones(1, 2), lambda x: x * step)
        updates, fresh = memo.tensors()
        seen.append(int(fresh.argmax()))
        assert fresh.sum() == 1 and torch.equal(updates[0, seen[-1]], torch.full((2,), float(step)))
        return [tokens, updates, fresh]

    history = cache.begin()
    for i in range(8):
        step = Step(i, 1 - i / 8, 1 - (i + 1) / 8, COMPUTED if i in (0, 7) else "refresh")
        u, history = cache.velocity(run, torch.zeros(1, 4, 3), step, history)
        assert isinstance(history, Kept) and u.shape == (1, 4, 3)
    # 0.25 / 4 for each step of age, beside scores that differ by 0.01: in turns, from the highest score on.
    assert seen == [1, 0, 2, 3, 1, 0]
    assert history.ages.eq(0).all()


def test_a_stage_begins_anew(tiny_flux):
    """What is cached is of other tokens; a stage begins with a computed step."""
    cache = ToCa()
    kept = Kept(*(torch.ones(1, 4, 2) for _ in range(4)))
    assert cache.carried(kept, lambda value: value) is None and cache.carried(kept, None) is None
    pipe = pipeline(tiny_flux, "toca:every=3,warmup=1", CustomSchedule((3, 3, 4), (0.3, 0.6, 1.0)), "jit")
    assert pipe.schedule.actions == (
        "stage", "refresh", "refresh", "stage", "refresh", "refresh", "stage", "refresh", "refresh", "stage",
    )
    sizes = [pipe.engines[f"refresh{k}"].spec.inputs[-1].shape[1] for k in (2, 1, 0)]
    tokens = [stage.tokens for stage in pipe.schedule.stages]
    assert sizes == [3 * (10 + m) for m in tokens]
    assert latents(pipe).isfinite().all()


@pytest.mark.parametrize("family", ["SD3", "SD3.5"])
def test_guided_images_are_the_same_in_one_run_or_two(folders, family):
    call = {"guidance_scale": 4.0, "negative_prompt": "a dog"}
    one, both = (
        pipeline(folders(family), "toca:every=3,warmup=1", CustomSchedule((7,), (1.0,)), passes=passes)
        for passes in (1, 2)
    )
    torch.testing.assert_close(latents(one, **call), latents(both, **call), atol=1e-5, rtol=1e-5)
    unguided = latents(one, guidance_scale=1.0)
    torch.testing.assert_close(unguided, latents(both, guidance_scale=1.0), atol=1e-5, rtol=1e-5)
    assert (latents(one, **call) - unguided).abs().max() > 1e-3


# --- sizes and costs ---


def test_the_state_of_flux_is_3_2_gigabytes():
    configs = FLUX["flux"].configs
    cells = flux.FluxAdapter.cells(configs)
    specs = exchanged("tokens:0.1", cells, rows=1, tokens=4096, words=512, width=3072, dtype="bf16")
    sizes = {name: math.prod(s.shape) * DTYPES[s.dtype].itemsize for name, s in specs.items()}
    assert sizes["attention"] == sizes["updates"] == sizes.pop("refreshed") == 57 * 4608 * 3072 * 2 == 1_613_758_464
    assert sizes["scores"] == sizes["fresh"] == 57 * 4608 * 4
    assert 3.22e9 < sum(sizes.values()) < 3.24e9


def test_shares_are_the_published_ones():
    """The release's rule for FLUX.1: 0.1 (1.5 - layer / 27), times 0.4 in double blocks and 1.6 in single ones."""
    cells = flux.FluxAdapter.cells(FLUX["flux"].configs)
    lengths = [cell.length(4096, 512) for cell in cells]
    counts = [cell.fresh(0.1, n) for cell, n in zip(cells, lengths, strict=True)]
    doubles = [int(0.1 * (1.5 - i / 27) * 0.4 * n) for i in range(19) for n in (512, 4096)]
    assert counts == doubles + [int(0.1 * (1.5 - i / 27) * 1.6 * 4608) for i in range(38)]
    assert 0.095 < sum(counts) / sum(lengths) < 0.105
    assert Cell("text", 0.1).fresh(0.1, 10) == 1 and Cell("text", 3.0).fresh(0.9, 10) == 10


def test_the_cost_of_a_refresh_is_that_of_a_few_tokens_mlps(tiny_flux):
    """And of the first and the last layer; counted by hand. It has no attention, so it grows with the tokens."""
    adapter = meta_adapter(load_adapter(find_source(str(tiny_flux)), torch.float32), "fp32", "tokens:0.1")
    cost, m, d = step_cost(adapter, "fp32", "refresh"), 2**17, 32
    layers_of = {"text": 2 * 4 * d * d, "image": 2 * 4 * d * d, "both": 4 * d * d + 5 * d * d}  # of a token
    lengths = {"text": 10, "image": m, "both": m + 10}
    counted = 2 * 2 * m * 16 * d
    for cell in adapter.cells(adapter.configs):
        counted += 2 * cell.fresh(0.1, lengths[cell.tokens]) * layers_of[cell.tokens]
    assert cost(m) == pytest.approx(counted, rel=1e-5) and cost.quadratic == 0


# --- what is refused ---


def test_a_family_without_cells_is_refused(tiny_flux, monkeypatch):
    monkeypatch.setattr(flux.FluxAdapter, "cells", classmethod(lambda cls, configs: ()))
    with pytest.raises(UnsupportedModelError, match=r"FluxPipeline .* a cache of tokens \(toca\)"):
        load_adapter(find_source(str(tiny_flux)), torch.float32, {"features": "tokens:0.1"})
    with pytest.raises(UnsupportedModelError, match="FluxPipeline"):
        adapter = load_adapter(find_source(str(tiny_flux)), torch.float32)
        plan(adapter, custom=CustomSchedule((6,)), method="dense", cache="toca:every=3")


@pytest.mark.parametrize(
    "features", ["tokens", "tokens:", "tokens:0", "tokens:1.5", "tokens:nan", "tokens:x", "residual:1", "pixels"]
)
def test_features_that_there_are_not(features):
    with pytest.raises(InputError, match="unknown features"):
        check_features(features, (Cell("image", 1.0),), "FluxPipeline")


@pytest.mark.parametrize("options", [{"fresh": 0}, {"fresh": 1.1}, {"fresh": "x"}, {"staleness": -1}, {"warmup": 0}])
def test_options_without_a_meaning(options):
    with pytest.raises(InputError, match="without a meaning"):
        ToCa(options)


# --- as bundles ---


@pytest.mark.parametrize("backend", ["aoti", "onnx"])
def test_compiled_bundles_make_the_eager_ones_images(make_bundle, backend):
    options = {"method": "dense", "custom": CustomSchedule((6,), (1.0,)), "cache": "toca:every=3,warmup=1,fresh=0.3"}
    paths = [make_bundle(backend=b, **options) for b in ("eager", backend)]
    expected, found = (
        jitexport.load(path)(PROMPT, generator=seeded(0), output_type="latent").images for path in paths
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    manifest = read_manifest(paths[1])
    assert manifest.model.settings["features"] == "tokens:0.3" and manifest.cache.options["fresh"] == 0.3
    engines = {entry.name: entry for entry in manifest.engines}
    assert [o.name for o in engines["stage0"].outputs] == ["velocity", "attention", "updates", "scores"]
    assert [o.name for o in engines["refresh0"].outputs] == ["velocity", "refreshed", "fresh"]
    assert all(entry.relative_error < 1e-4 for entry in manifest.engines)
