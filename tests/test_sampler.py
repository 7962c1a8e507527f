import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from diffusers.utils.torch_utils import randn_tensor

from jitexport.grid import TokenGrid, gather_tokens
from jitexport.methods.dense import Dense
from jitexport.methods.jit import JiT
from jitexport.sampler import draw, sample
from jitexport.schedule import StageSchedule, beta_sigmas, make_stages, uniform_sigmas

GRID = TokenGrid((6, 4))
LATENT = (3, 12, 8)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def schedule(steps, ratios, tokens=24):
    n = sum(steps)
    return StageSchedule(make_stages(tokens, steps, ratios), beta_sigmas(n, 1.4, 0.42))


SPARSE = schedule([2, 1, 2], [0.35, 0.62, 1.0])
FULL = schedule([5], [1.0])
DENSE = Dense(GRID, Dense.options("default"))


def jit(preset="paper"):
    return JiT(GRID, JiT.options(preset))


def model(stage, where):
    """A velocity that depends on everything that it may: the tokens, all of them together, places and step."""
    places = GRID.coordinates()[where].float().sum(-1, keepdim=True)

    def run(action, tokens, step):
        assert action == "stage"
        mixed = torch.tanh(tokens.roll(1, -1) + 0.1 * places) + tokens.mean(1, keepdim=True)
        return [mixed * (1 + 0.05 * step)]

    return run


# --- draws ---


def test_first_draw_is_diffusers():
    """One seed starts both pipelines at the same latents."""
    drawn = draw(jit(), SPARSE, LATENT, 2, [seeded(3)])
    latents = randn_tensor((1, *LATENT), generator=seeded(3))
    assert torch.equal(drawn.latents, FluxPipeline._pack_latents(latents, 1, *LATENT))


def test_every_image_draws_from_its_own_generator():
    together = draw(jit(), SPARSE, LATENT, 2, [seeded(s) for s in range(3)])
    for s in range(3):
        alone = draw(jit(), SPARSE, LATENT, 2, [seeded(s)])
        for name in ("latents", "noise", "anchors"):
            assert torch.equal(getattr(together, name)[s], getattr(alone, name)[0])
    assert together.latents.shape == together.noise.shape == (3, 24, 12)
    assert together.anchors.shape == (3, 8)


def test_one_generator_goes_on_from_image_to_image():
    generator = seeded(0)
    drawn = draw(jit(), SPARSE, LATENT, 2, [generator, generator])
    assert not torch.equal(drawn.latents[0], drawn.latents[1])
    assert not torch.equal(drawn.latents[0], drawn.noise[0])


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    draw(jit(), SPARSE, LATENT, 2, [seeded(0)])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("method", "stages"), [(DENSE, FULL), (jit(), FULL)])
def test_nothing_is_drawn_that_is_not_needed(method, stages):
    drawn = draw(method, stages, LATENT, 2, [seeded(0)])
    assert drawn.noise is None and drawn.anchors is None


# --- the loop ---


def run(method, stages, drawn, begin_stage=model, on_step=None):
    return sample(method, stages, drawn, begin_stage, on_step)


def test_dense_is_a_plain_euler_loop():
    drawn = draw(DENSE, FULL, LATENT, 2, [seeded(0)])
    y, evaluate = drawn.latents, model(None, torch.arange(GRID.tokens)[None])
    for i in range(5):
        y = y + (FULL.sigmas[i + 1] - FULL.sigmas[i]) * evaluate("stage", y, i)[0]
    torch.testing.assert_close(run(DENSE, FULL, drawn), y, atol=1e-6, rtol=0)


@pytest.mark.parametrize("preset", JiT.presets)
def test_jit_of_one_full_stage_is_dense(preset):
    drawn = draw(DENSE, FULL, LATENT, 2, [seeded(0), seeded(1)])
    torch.testing.assert_close(run(jit(preset), FULL, drawn), run(DENSE, FULL, drawn), atol=1e-6, rtol=0)


def test_stages_get_their_token_counts_places_and_steps():
    seen = []

    def begin_stage(stage, where):
        assert where.shape == (2, stage.tokens)

        def evaluate(action, tokens, step):
            assert tokens.shape == (2, stage.tokens, 12)
            seen.append((stage.index, step))
            return [tokens]

        return evaluate

    run(jit(), SPARSE, draw(jit(), SPARSE, LATENT, 2, [seeded(0), seeded(1)]), begin_stage)
    assert seen == [(2, 0), (2, 1), (1, 2), (0, 3), (0, 4)]


def test_same_seed_same_image_and_other_seed_another():
    images = [run(jit(), SPARSE, draw(jit(), SPARSE, LATENT, 2, [seeded(s)])) for s in (5, 5, 6)]
    assert torch.equal(images[0], images[1])
    assert (images[0] - images[2]).abs().max() > 0.1


class Spy(JiT):
    """Records the anchors of every stage."""

    def __init__(self, *args):
        super().__init__(*args)
        self.anchors = []

    def lifter(self, anchors, **how):
        self.anchors.append(anchors.clone())
        return super().lifter(anchors, **how)


def test_an_image_of_a_batch_is_that_seed_alone():
    together = Spy(GRID, JiT.options("paper"))
    images = run(together, SPARSE, draw(together, SPARSE, LATENT, 2, [seeded(s) for s in range(4)]))
    for s in range(4):
        alone = Spy(GRID, JiT.options("paper"))
        image = run(alone, SPARSE, draw(alone, SPARSE, LATENT, 2, [seeded(s)]))
        torch.testing.assert_close(images[s], image[0], atol=1e-5, rtol=0)
        assert len(alone.anchors) == 3
        for a, b in zip(together.anchors, alone.anchors, strict=True):
            assert torch.equal(a[s], b[0])


def test_on_step_sees_every_step_and_may_change_the_latents():
    calls = []

    def on_step(i, sigma, look):
        calls.append((i, sigma))
        return torch.zeros_like(look.latents()) if i == 4 else None

    image = run(jit(), SPARSE, draw(jit(), SPARSE, LATENT, 2, [seeded(0)]), on_step=on_step)
    assert calls == [(i, SPARSE.sigmas[i + 1]) for i in range(5)]
    assert torch.equal(image, torch.zeros_like(image))


@pytest.mark.parametrize("method", [DENSE, jit()])
def test_a_step_shows_its_places_and_the_clean_latents_that_it_predicts(method):
    schedule = SPARSE if method.name == "jit" else FULL
    looks, latents = [], []
    drawn = draw(method, schedule, LATENT, 2, [seeded(0)])

    def on_step(i, sigma, look):
        latents.append(look.latents())
        looks.append((look.places(), look.clean()))

    image = sample(method, schedule, drawn, model, on_step)
    assert [places.shape[1] for places, _ in looks] == [s.tokens for s in schedule.stages for _ in range(s.steps)]
    assert torch.equal(looks[-1][1], image)  # the last step goes to the end
    sigmas = schedule.sigmas
    for i in set(range(schedule.nfe)) - {schedule.steps_of(s).start for s in schedule.stages}:
        # Within a stage, what runs moves on a line to what was predicted.
        places, clean = looks[i]
        before, after, clean = (gather_tokens(y, places) for y in (latents[i - 1], latents[i], clean))
        rate = (sigmas[i] - sigmas[i + 1]) / sigmas[i]
        torch.testing.assert_close(after, before + rate * (clean - before), atol=1e-5, rtol=1e-5)


def test_the_predicted_image_has_no_noise_where_tokens_have_not_run():
    """A model that knows the image: what it predicts from a third of the tokens is as smooth as the image is."""
    looks = []
    schedule, method = SPARSE, jit()
    drawn = draw(method, schedule, LATENT, 2, [seeded(0)])
    clean = torch.ones_like(drawn.latents)

    def begin_stage(stage, where):
        first = schedule.steps_of(stage).start
        return lambda action, tokens, step: [(tokens - gather_tokens(clean, where)) / schedule.sigmas[max(step, first)]]

    sample(method, schedule, drawn, begin_stage, lambda i, sigma, look: looks.append(look.clean()))
    for predicted in looks:
        torch.testing.assert_close(predicted, clean, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", [DENSE, jit()])
def test_changed_latents_are_what_the_next_step_starts_from(method):
    seen = []

    def begin_stage(stage, where):
        return lambda action, tokens, step: seen.append(tokens) or [torch.zeros_like(tokens)]

    drawn = draw(method, FULL, LATENT, 2, [seeded(0)])
    run(method, FULL, drawn, begin_stage, lambda i, sigma, look: torch.full_like(look.latents(), float(i)))
    assert [t.unique().tolist() for t in seen[1:]] == [[0.0], [1.0], [2.0], [3.0]]


def test_an_exception_in_on_step_ends_the_loop():
    def stop(i, sigma, look):
        if i == 2:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        run(jit(), SPARSE, draw(jit(), SPARSE, LATENT, 2, [seeded(0)]), on_step=stop)


# --- the released code's recipe, written again from its description ---


def released_loop(shape, sigmas, stages, y, noise, anchors, velocity):
    """One image, [N, C]: 3 x 3 mean with padding counted, blur clamped to [1, 10], one micro-flow step of three.

    Args:
        shape: of the grid.
        stages: (steps, tokens) of each stage.
        velocity: (tokens [m, C], their indices, stage number, step) -> [m, C].
    """
    height, width = shape
    n, channels = y.shape
    points = torch.tensor([[r, c] for r in range(height) for c in range(width)], dtype=torch.float64)

    def interpolate(values, active):
        distance = torch.cdist(points, points[active])
        nearest = torch.tensor([row.tolist().index(min(row)) for row in distance])
        image = values[nearest].T.reshape(channels, 1, height, width)
        sigma = min(max(0.4 * (len(active) / n) ** -0.5, 1.0), 10.0)
        radius = int(torch.ceil(torch.tensor(3 * sigma)))
        x = torch.arange(-radius, radius + 1).float()
        weights = torch.exp(-(x**2) / (2 * sigma**2))
        kernel = torch.outer(weights, weights) / weights.sum() ** 2
        image = F.conv2d(F.pad(image, [radius] * 4, mode="reflect"), kernel[None, None])
        full = image.reshape(channels, n).T.clone()
        full[active] = values
        return full

    def variance(field):
        image = field.T.reshape(1, channels, height, width)
        square = F.avg_pool2d(image**2, 3, stride=1, padding=1)
        return (square - F.avg_pool2d(image, 3, stride=1, padding=1) ** 2).mean(1).flatten()

    active, step, lifted, clean = anchors, 0, None, None
    for number, (steps, tokens) in enumerate(stages):
        if number:
            importance = variance(lifted)
            importance[active] = -torch.inf
            new = importance.topk(tokens - len(active)).indices
            structure = interpolate(clean, active)
            target = (1 - sigmas[step]) * structure[new] + sigmas[step] * noise[new]
            y = y.clone()
            y[new] += (target - y[new]) / 3
            active = torch.cat([active, new])  # ties go to the first in this order
        for _ in range(steps):
            u = velocity(y[active], active, number, step)
            lifted = interpolate(u, active) if tokens < n else torch.zeros_like(y).index_copy(0, active, u)
            clean = y[active] - sigmas[step] * u
            y = y + (sigmas[step + 1] - sigmas[step]) * lifted
            step += 1
    return y


@pytest.mark.parametrize("seed", range(3))
def test_released_preset_is_the_released_recipe(seed):
    generator = seeded(seed)
    anchors = torch.randperm(24, generator=generator)[:8].sort().values
    latents, noise = torch.randn(2, 24, 12, generator=generator).unbind(0)
    stages = schedule([3, 2, 3], [0.35, 0.62, 1.0])
    sigmas = beta_sigmas(8, 1.4, 0.425)
    expected = released_loop(
        GRID.shape,
        sigmas,
        [(s.steps, s.tokens) for s in stages.stages],
        latents,
        noise,
        anchors,
        lambda tokens, active, number, step: model(None, active[None])("stage", tokens[None], step)[0][0],
    )
    method = jit("released")
    drawn = draw(method, stages, LATENT, 2, [generator])
    drawn = type(drawn)(latents[None], noise[None], anchors[None])
    found = run(method, StageSchedule(stages.stages, sigmas), drawn)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_presets_differ():
    """What the comparison above could not tell apart if the presets were one."""
    drawn = draw(jit(), SPARSE, LATENT, 2, [seeded(0)])
    paper, released = run(jit("paper"), SPARSE, drawn), run(jit("released"), SPARSE, drawn)
    assert (paper - released).abs().max() > 0.01


def test_uniform_schedule_of_two_and_four_stages_runs():
    for steps, ratios in [([3, 3], [0.5, 1.0]), ([2, 2, 2, 2], [0.25, 0.5, 0.75, 1.0])]:
        stages = StageSchedule(make_stages(24, steps, ratios), uniform_sigmas(sum(steps)))
        image = run(jit(), stages, draw(jit(), stages, LATENT, 2, [seeded(0)]))
        assert image.shape == (1, 24, 12) and image.isfinite().all()
