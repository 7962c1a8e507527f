import math
from itertools import pairwise, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from scipy.integrate import solve_ivp

from jitexport.errors import InputError
from jitexport.grid import TokenGrid, gather_tokens
from jitexport.lifting import blur_matrix, mean_matrix, nearest_anchor, reflect, separable
from jitexport.methods.base import Draws
from jitexport.methods.jit import (
    JiT,
    activate,
    first_anchors,
    importance,
    microflow,
    microflow_target,
    structural_mask,
)
from jitexport.schedule import Stage, StageSchedule, make_stages, number, uniform_sigmas
from tests.scripting import script

#: Even, odd, non-square, tiny, one-row and video grids.
SHAPES = [(8, 8), (7, 7), (5, 9), (3, 2), (1, 6), (6, 1), (1, 1), (2, 5, 3), (3, 4, 4), (1, 3, 3)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_anchors(grid, m, batch=2, seed=0):
    """Indices in no particular order."""
    generator = seeded(seed)
    return torch.stack([torch.randperm(grid.tokens, generator=generator)[:m] for _ in range(batch)])


def jit(shape, preset="paper", **changes):
    return JiT(TokenGrid(shape), JiT.options(preset) | changes)


def some(tokens):
    """Active counts worth trying on a grid."""
    return sorted({1, max(1, tokens // 3), max(1, int(tokens * 0.62)), tokens})


CASES = [(shape, m) for shape in SHAPES for m in some(math.prod(shape))]


# --- first anchors (B.1) ---


@pytest.mark.parametrize("shape", SHAPES)
def test_structural_tokens_are_the_even_grid_and_the_border(shape):
    expected = [
        (row % 2 == 0 and column % 2 == 0) or row in (0, shape[-2] - 1) or column in (0, shape[-1] - 1)
        for *_, row, column in product(*map(range, shape))
    ]
    assert structural_mask(TokenGrid(shape)).tolist() == expected


@pytest.mark.parametrize(("shape", "m"), CASES)
def test_first_anchors_are_exactly_m_and_structural_first(shape, m):
    grid = TokenGrid(shape)
    structural = set(structural_mask(grid).nonzero().flatten().tolist())
    for seed in range(3):
        anchors = first_anchors(grid, m, seeded(seed)).tolist()
        assert len(set(anchors)) == len(anchors) == m
        assert anchors == sorted(anchors) and anchors[0] >= 0 and anchors[-1] < grid.tokens
        assert structural.issubset(anchors) if m >= len(structural) else structural.issuperset(anchors)


def test_the_seed_decides_the_random_part():
    grid = TokenGrid((12, 12))
    for m in (30, 100):  # dropped, filled
        assert torch.equal(first_anchors(grid, m, seeded(1)), first_anchors(grid, m, seeded(1)))
        assert not torch.equal(first_anchors(grid, m, seeded(1)), first_anchors(grid, m, seeded(2)))


def test_random_fill_and_drop_reach_every_token():
    grid = TokenGrid((6, 6))
    structural = structural_mask(grid).sum().item()
    drawn = [first_anchors(grid, structural + 2, seeded(s)).tolist() for s in range(60)]
    assert set().union(*drawn) == set(range(36))
    kept = [set(first_anchors(grid, structural - 2, seeded(s)).tolist()) for s in range(60)]
    assert set.intersection(*kept) == set()


@pytest.mark.parametrize(
    ("shape", "ratio", "kept"),
    [
        ((31, 30, 53), 0.32, "some"),  # 480p at 7x: 32.2% are structural
        ((31, 30, 53), 0.35, "all"),
        ((31, 45, 80), 0.32, "all"),  # 720p: 29.6%
    ],
)
def test_first_anchors_of_video(shape, ratio, kept):
    """121 frames are 31 of latents. What is dropped or filled in is drawn from all frames alike."""
    grid = TokenGrid(shape)
    m, mask = int(grid.tokens * ratio), structural_mask(grid)
    frame = structural_mask(TokenGrid(shape[1:]))
    assert torch.equal(mask.view(shape[0], -1), frame.expand(shape[0], -1))
    anchors = first_anchors(grid, m, seeded(1))
    active = torch.zeros_like(mask).index_fill_(0, anchors, True)
    assert len(anchors) == active.sum() == m and (anchors.diff() > 0).all()
    if kept == "some":
        assert m < mask.sum() and not (active & ~mask).any()
    else:
        assert m > mask.sum() and active[mask].all()
    changed = (active != mask).view(shape[0], -1).sum(1).double()
    expected = abs(m - mask.sum().item()) / shape[0]
    assert (changed - expected).abs().max() < 5 * expected**0.5  # of random counts


# --- interpolation operator (Algorithm 2) ---


def reference_lift(shape, anchors, u, sigma, radius):
    """Algorithm 2 as it is written: a loop over tokens, a dense Gaussian kernel in fp64, a mask. For one image."""
    points = list(product(*map(range, shape)))
    nearest = []
    for p in points:
        distances = [math.dist(p, points[a]) for a in anchors]
        nearest.append(distances.index(min(distances)))  # the first of equal ones
    field = np.array([u[j] for j in nearest], dtype=np.float64)
    axis = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = np.array(1.0)
    for _ in shape:
        kernel = np.multiply.outer(kernel, axis)
    kernel /= kernel.sum()
    blurred = np.stack(
        [ndimage.correlate(c.reshape(shape), kernel, mode="mirror").reshape(-1) for c in field.T], axis=1
    )
    active = np.isin(np.arange(len(points)), anchors)
    return np.where(active[:, None], field, blurred)


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize(("shape", "m"), CASES)
def test_lifter_is_algorithm_2(shape, m, preset):
    method = jit(shape, preset)
    anchors = random_anchors(method.grid, m)
    u = torch.randn(2, m, 3, generator=seeded(1))
    sigma, radius = method.blur_radius(m / method.grid.tokens)
    lifted = method.lifter(anchors)(u)
    for b in range(2):
        expected = reference_lift(shape, anchors[b].tolist(), u[b].numpy(), sigma, radius)
        np.testing.assert_allclose(lifted[b].numpy(), expected, atol=2e-6)


@pytest.mark.parametrize(("shape", "m"), CASES)
def test_lifter_leaves_anchors_bit_exact(shape, m):
    """S^T (S u + I(u)) = u: the interpolation is zero on anchors (eq. 18 to 21)."""
    method = jit(shape)
    anchors = random_anchors(method.grid, m)
    u = torch.randn(2, m, 3, generator=seeded(1)) * 1e3
    assert torch.equal(gather_tokens(method.lifter(anchors)(u), anchors), u)


@pytest.mark.parametrize(("shape", "m"), CASES)
def test_a_constant_stays_constant(shape, m):
    method = jit(shape)
    lifted = method.lifter(random_anchors(method.grid, m))(torch.full((2, m, 1), 3.0))
    torch.testing.assert_close(lifted, torch.full_like(lifted, 3.0), rtol=1e-6, atol=0)


def test_the_lifter_is_linear():
    lift = jit((6, 5)).lifter(random_anchors(TokenGrid((6, 5)), 9))
    u, v = torch.randn(2, 2, 9, 3, generator=seeded(2)).unbind(0)
    torch.testing.assert_close(lift(2 * u - 3 * v), 2 * lift(u) - 3 * lift(v), rtol=0, atol=1e-5)


def test_images_of_a_batch_do_not_mix():
    method = jit((5, 6))
    anchors = random_anchors(method.grid, 10, batch=3)
    u = torch.randn(3, 10, 2, generator=seeded(3))
    together = method.lifter(anchors)(u)
    for b in range(3):
        torch.testing.assert_close(method.lifter(anchors[b : b + 1])(u[b : b + 1])[0], together[b], atol=1e-6, rtol=0)


def test_ties_go_to_the_lowest_position_in_the_list():
    grid = TokenGrid((1, 5))  # token 2 lies between 1 and 3
    assert nearest_anchor(grid, torch.tensor([[1, 3]]))[0].tolist() == [0, 0, 0, 1, 1]
    assert nearest_anchor(grid, torch.tensor([[3, 1]]))[0].tolist() == [1, 1, 0, 0, 0]


@given(st.data())
def test_nearest_anchor_against_a_loop(data):
    """Every token with every anchor, on grids of two and three axes; the first of equally near anchors wins."""
    shape = data.draw(st.tuples(*[st.integers(1, 6)] * data.draw(st.integers(2, 3))))
    grid = TokenGrid(shape)
    m = data.draw(st.integers(1, grid.tokens))
    anchors = random_anchors(grid, m, batch=1, seed=data.draw(st.integers(0, 99)))
    points = list(product(*map(range, shape)))
    expected = []
    for p in points:
        squared = [sum((x - y) ** 2 for x, y in zip(p, points[a], strict=True)) for a in anchors[0].tolist()]
        expected.append(squared.index(min(squared)))
    assert nearest_anchor(grid, anchors, at_once=data.draw(st.integers(1, 2000)))[0].tolist() == expected


def test_nearest_anchor_is_exact_on_a_large_video_grid():
    """The last token of 120 x 80 x 80 with all others: distances there are the largest that a key must hold."""
    grid = TokenGrid((120, 80, 80))
    anchors = torch.arange(0, grid.tokens, 4099)[None]
    rows = torch.tensor([0, 1, 399_999, grid.tokens - 1])
    points = grid.coordinates()
    squared = (points[rows][:, None] - points[anchors[0]][None]).square().sum(-1)
    assert nearest_anchor(grid, anchors)[0, rows].tolist() == squared.numpy().argmin(-1).tolist()  # numpy: the first


@pytest.mark.parametrize(("shape", "m"), [((64, 64), 1433), ((5, 20, 30), 40), ((1, 50), 1)])
def test_nearest_anchor_is_the_minimum_over_all_distances(shape, m):
    """At the size of FLUX's first stage, two images at once, with anchors in any order."""
    grid = TokenGrid(shape)
    anchors = torch.stack([torch.randperm(grid.tokens, generator=seeded(s))[:m] for s in range(2)])
    points = grid.coordinates().numpy()
    for found, mine in zip(nearest_anchor(grid, anchors), anchors.numpy(), strict=True):
        squared = sum((points[:, None, i] - points[mine][None, :, i]) ** 2 for i in range(len(shape)))
        assert np.array_equal(found.numpy(), squared.argmin(-1))  # numpy: the first


def test_nearest_anchor_of_100_000_tokens_needs_no_distance_matrix():
    """35,000 anchors: all distances would be 3.5 billion numbers, the keys here are at most 8 million at once."""
    grid = TokenGrid((25, 64, 64))
    anchors = torch.randperm(grid.tokens, generator=seeded(0))[:35_840].sort().values[None]
    found = nearest_anchor(grid, anchors)[0]
    points = grid.coordinates()
    rows = torch.randint(grid.tokens, (50,), generator=seeded(1))
    squared = (points[rows][:, None] - points[anchors[0]][None]).square().sum(-1)
    assert found[rows].tolist() == squared.numpy().argmin(-1).tolist()
    assert torch.equal(found[anchors[0]], torch.arange(35_840))


@pytest.mark.parametrize("n", [1, 2, 3, 10])
def test_reflection_is_numpys(n):
    padded = np.pad(np.arange(n), 25, mode="reflect")
    assert reflect(torch.arange(-25, n + 25), n).tolist() == padded.tolist()


@given(st.integers(1, 40), st.floats(0.1, 10), st.integers(0, 30))
def test_blur_rows_sum_to_one(n, sigma, radius):
    matrix = blur_matrix(n, sigma, radius)
    assert matrix.shape == (n, n) and (matrix >= 0).all()
    torch.testing.assert_close(matrix.sum(1), torch.ones(n), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("preset", "rho", "sigma", "radius"),
    [
        ("paper", 0.35, 0.4 * 0.35**-0.5, 3),  # 0.68
        ("paper", 1.0, 0.4, 2),
        ("paper", 1e-4, 40.0, 120),
        ("released", 0.35, 1.0, 3),  # clamped to [1, 10]; kernel 2 * ceil(3 sigma) + 1 = 7
        ("released", 0.1, 0.4 * 0.1**-0.5, 4),
        ("released", 1e-4, 10.0, 30),
    ],
)
def test_width_of_the_blur(preset, rho, sigma, radius):
    assert jit((8, 8), preset).blur_radius(rho) == (pytest.approx(sigma), radius)


# --- importance-guided token activation ---


@pytest.mark.parametrize("shape", [(8, 8), (7, 5), (2, 3), (1, 4), (1, 1)])
def test_importance_is_the_local_variance(shape):
    """The released code's 3 x 3 mean: zero padding, padding counted, mean over channels."""
    grid = TokenGrid(shape)
    u = torch.randn(2, grid.tokens, 5, generator=seeded(4))
    field = u.transpose(1, 2).unflatten(2, shape)

    def mean(x):
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=True)

    expected = (mean(field**2) - mean(field) ** 2).mean(1).flatten(1)
    found = importance(grid, tuple(mean_matrix(n, 3) for n in shape), u)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_importance_of_video_has_a_window_in_time_too():
    grid = TokenGrid((3, 4, 5))
    u = torch.randn(1, grid.tokens, 2, generator=seeded(5))
    field = u.transpose(1, 2).unflatten(2, grid.shape)
    mean = F.avg_pool3d(field**2, 3, 1, 1) - F.avg_pool3d(field, 3, 1, 1) ** 2
    found = importance(grid, tuple(mean_matrix(n, 3) for n in grid.shape), u)
    torch.testing.assert_close(found, mean.mean(1).flatten(1), atol=1e-6, rtol=0)


@given(st.data())
def test_activation_takes_exactly_the_most_important(data):
    """Few distinct values make many ties: equal importance, lowest index first."""
    n = data.draw(st.integers(1, 30))
    have = data.draw(st.integers(1, n))
    m = data.draw(st.integers(have, n))
    anchors = torch.randperm(n, generator=seeded(data.draw(st.integers(0, 99))))[:have][None]
    values = data.draw(st.lists(st.integers(-2, 2), min_size=n, max_size=n))
    active, new = activate(anchors, torch.tensor([values], dtype=torch.float32), m)
    inactive = set(range(n)) - set(anchors[0].tolist())
    expected = sorted(inactive, key=lambda i: (-values[i], i))[: m - have]
    assert new[0].tolist() == expected
    assert active[0].tolist() == sorted({*anchors[0].tolist(), *expected})
    assert active.shape == (1, m)
    appended, again = activate(anchors, torch.tensor([values], dtype=torch.float32), m, ascending=False)
    assert torch.equal(again, new) and appended[0].tolist() == [*anchors[0].tolist(), *expected]


def test_activation_is_per_image():
    anchors = torch.tensor([[0, 1], [2, 3]])
    active, new = activate(anchors, torch.tensor([[9.0, 9, 0, 1, 2], [5.0, 1, 9, 9, 4]]), 3)
    assert new.tolist() == [[4], [0]]
    assert active.tolist() == [[0, 1, 4], [0, 2, 3]]


# --- deterministic micro-flow ---


def test_target_is_the_prior_noised_to_the_current_level():
    prior, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    torch.testing.assert_close(microflow_target(prior, noise, 0.3), 0.7 * prior + 0.3 * noise)
    assert torch.equal(microflow_target(prior, noise, 1.0), noise)
    assert torch.equal(microflow_target(prior, noise, 0.0), prior)


def test_exact_microflow_reaches_its_target():
    y, target = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert torch.equal(microflow(y, target, jit((4, 4)).settings.microflow_weight), target)


def test_relaxed_microflow_goes_a_third_of_the_way():
    y, target = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    weight = jit((4, 4), "released").settings.microflow_weight
    assert weight == pytest.approx(1 / 3)
    torch.testing.assert_close(microflow(y, target, weight), (2 * y + target) / 3)
    assert jit((4, 4), "released", relax_steps=5).settings.microflow_weight == pytest.approx(0.2)


@pytest.mark.parametrize("share", [0.1, 1 / 3, 0.9, 0.999])
def test_closed_form_is_the_integral_of_the_micro_flow(share):
    """Q dy/dt = (y* - Q y) / (T - t) on [T - delta, T], integrated over a share of the interval."""
    y, target = np.array([0.7, -2.0, 0.0]), np.array([1.5, 0.4, -3.0])
    end, delta = 0.4, 0.07
    solution = solve_ivp(
        lambda t, y: (target - y) / (end - t), (end - delta, end - delta + share * delta), y, rtol=1e-9, atol=1e-12
    )
    found = microflow(torch.tensor(y), torch.tensor(target), share)
    np.testing.assert_allclose(found.numpy(), solution.y[:, -1], atol=1e-6)


# --- the method ---


def test_presets_have_the_published_values():
    assert JiT.presets[0] == "default"
    paper, released = JiT.options("paper"), JiT.options("released")
    assert paper["timesteps"] == {"kind": "beta", "alpha": 1.4, "beta": 0.42}
    assert (paper["microflow"], paper["window"]) == ("exact", 3)
    assert (paper["blur_scale"], paper["blur_sigma_range"]) == (0.4, None)
    assert released["timesteps"] == {"kind": "beta", "alpha": 1.4, "beta": 0.425}
    assert (released["microflow"], released["relax_steps"]) == ("relaxed", 3)
    assert (released["order"], paper["order"], JiT.options("default")["order"]) == (
        "activation", "ascending", "ascending",
    )
    assert (released["blur_scale"], released["blur_sigma_range"], released["window"]) == (0.4, (1.0, 10.0), 3)
    for published in (paper, released):
        assert (published["noise"], published["importance"]) == ("fresh", "velocity")


def test_unknown_options_and_presets_are_refused():
    with pytest.raises(InputError, match="unknown JiT preset") as caught:
        JiT.options("fast")
    assert "paper" in caught.value.expected
    with pytest.raises(InputError, match="unknown JiT option"):
        jit((4, 4), colour="red")


def start(method, m, batch=2, channels=3, seed=0):
    n = method.grid.tokens
    latents, noise = torch.randn(2, batch, n, channels, generator=seeded(seed)).unbind(0)
    return method.start(Draws(latents, noise, random_anchors(method.grid, m, batch, seed)), Stage(1, m, 1))


@pytest.mark.parametrize(("shape", "m"), [((5, 7), 12), ((2, 3), 2), ((2, 3, 4), 9), ((4, 4), 16)])
def test_anchors_move_as_euler_says_and_the_others_with_the_lifted_velocity(shape, m):
    """Eq. 17 with eq. 18 to 21."""
    method = jit(shape)
    state = start(method, m)
    u = torch.randn(2, m, 3, generator=seeded(1))
    after = method.step(state, u, 0.9, 0.7)
    assert torch.equal(method.tokens(after), method.tokens(state) + (0.7 - 0.9) * u)
    torch.testing.assert_close(after.clean, method.tokens(state) - 0.9 * u)
    again = method.step(after, v := torch.randn(2, m, 3, generator=seeded(2)), 0.7, 0.4)
    moved = method.latents(state) + (0.7 - 0.9) * state.lift(u)
    torch.testing.assert_close(method.latents(after), moved, rtol=0, atol=1e-6)
    torch.testing.assert_close(method.latents(again), moved + (0.4 - 0.7) * state.lift(v), rtol=0, atol=1e-6)
    for now in (state, after, again):
        assert torch.equal(gather_tokens(method.latents(now), now.lift.anchors), method.tokens(now))


def test_changed_latents_are_what_a_sparse_stage_goes_on_from():
    method = jit((5, 7))
    u, other = torch.randn(2, 12, 3, generator=seeded(1)), torch.randn(2, 35, 3, generator=seeded(2))
    state = method.with_latents(method.step(start(method, 12), u, 0.9, 0.7), other)
    assert torch.equal(method.latents(state), other)
    assert torch.equal(method.tokens(state), gather_tokens(other, state.lift.anchors))
    after = method.step(state, u, 0.7, 0.6)
    torch.testing.assert_close(method.latents(after), other - 0.1 * state.lift(u), rtol=0, atol=1e-6)


def test_state_is_kept_in_fp32():
    method = jit((4, 4))
    after = method.step(start(method, 5), torch.randn(2, 5, 3).bfloat16(), 1.0, 0.5)
    assert {t.dtype for t in (after.active, after.velocity, after.clean, method.latents(after))} == {torch.float32}


@pytest.mark.parametrize("preset", JiT.presets)
@pytest.mark.parametrize("shape", [(6, 6), (5, 7), (3, 2), (2, 3, 3)])
def test_transition_activates_the_most_important_and_moves_only_them(shape, preset):
    method = jit(shape, preset)
    n = method.grid.tokens
    few, more = n // 3, int(n * 0.7)
    state = method.step(start(method, few), torch.randn(2, few, 3, generator=seeded(9)), 0.9, 0.6)
    after = method.transition(state, Stage(0, more, 1), 0.6)
    weight = 1 / 3 if preset == "released" else 1.0
    prior = state.lift(state.clean)
    signal = prior if preset == "default" else state.lift(state.velocity)
    y, now_all = method.latents(state), method.latents(after)
    score = importance(method.grid, tuple(mean_matrix(n, 3) for n in shape), signal)
    for b in range(2):
        old, now = set(state.lift.anchors[b].tolist()), set(after.lift.anchors[b].tolist())
        assert old < now and len(now) == more
        new = sorted(now - old)
        left = sorted(set(range(n)) - now)
        assert left and score[b, new].min() >= score[b, left].max()
        target = 0.4 * prior[b, new] + 0.6 * state.noise[b, new]
        expected = (1 - weight) * y[b, new] + weight * target
        torch.testing.assert_close(now_all[b, new], expected, atol=1e-6, rtol=0)
        rest = [i for i in range(n) if i not in new]
        assert torch.equal(now_all[b, rest], y[b, rest])
    assert torch.equal(after.lift.nearest, nearest_anchor(method.grid, after.lift.anchors))


def draw_or_all(method, schedule, generator):
    anchors = method.draw_anchors(schedule, generator)
    return torch.arange(method.grid.tokens)[None] if anchors is None else anchors[None]


def continuous(tokens, ratios):
    stages = make_stages(tokens, [1] * len(ratios), ratios)
    return StageSchedule(stages, uniform_sigmas(len(stages)))


sides = st.integers(1, 9)


@given(sides, sides, st.lists(st.floats(0.05, 0.95), min_size=1, max_size=3), st.integers(0, 99))
def test_anchor_sets_are_nested_and_of_exactly_int_of_their_share(h, w, ratios, seed):
    method = jit((h, w))
    n = h * w
    counts = sorted({max(1, int(n * r)) for r in [*ratios, 1.0]})
    generator = seeded(seed)
    schedule = StageSchedule(number([(m, 1) for m in counts]), uniform_sigmas(len(counts)))
    first = schedule.stages[0]
    draws = Draws(
        torch.randn(1, n, 2, generator=generator),
        torch.randn(1, n, 2, generator=generator),
        draw_or_all(method, schedule, generator),
    )
    state, seen = method.start(draws, first), [set(draws.anchors[0].tolist())]
    for i, m in enumerate(counts[1:], start=2):
        state = method.step(state, torch.randn(1, counts[i - 2], 2, generator=generator), 0.9, 0.8)
        state = method.transition(state, Stage(len(counts) - i, m, 1), 0.8)
        seen.append(set(state.lift.anchors[0].tolist()))
    assert [len(s) for s in seen] == counts
    assert all(a < b for a, b in pairwise(seen))
    assert seen[-1] == set(range(n))


def test_places_are_the_coordinates_of_the_active_tokens():
    method = jit((4, 6))
    state = start(method, 7)
    points = method.grid.coordinates()
    for b in range(2):
        assert torch.equal(method.places()[method.where(state)][b], points[state.lift.anchors[b]])
        assert torch.equal(method.tokens(state)[b], method.latents(state)[b, state.lift.anchors[b]])


def test_randomness_is_only_asked_for_where_tokens_are_left_out():
    method = jit((4, 4))
    sparse, full = (continuous(16, ratios) for ratios in ([0.35, 1.0], [1.0]))
    assert method.noise_fields(sparse) == 1 and method.draw_anchors(sparse, seeded()).shape == (5,)
    assert method.noise_fields(full) == 0 and method.draw_anchors(full, seeded()) is None


def test_the_initial_noise_needs_no_draw_and_is_the_microflows():
    method = jit((4, 4), "default")
    schedule = continuous(16, [0.35, 1.0])
    assert method.noise_fields(schedule) == 0
    latents = torch.randn(1, 16, 3, generator=seeded(1))
    anchors = method.draw_anchors(schedule, seeded(2))
    state = method.start(Draws(latents, None, anchors[None]), schedule.stages[0])
    clean = torch.randn(1, 16, 3, generator=seeded(3))
    # A perfect velocity for anchors: then new tokens lie where dense sampling has them, but for the lifted prior.
    state = method.step(state, (latents - clean)[:, anchors], 1.0, 0.7)
    after = method.transition(state, schedule.stages[1], 0.7)
    expected = 0.7 * latents + 0.3 * method.lifter(anchors[None])(clean[:, anchors])
    torch.testing.assert_close(method.latents(after), expected, atol=1e-5, rtol=0)


def test_nearest_map_and_blur_are_made_once_a_stage(monkeypatch):
    from jitexport.methods import jit as module

    calls = []
    monkeypatch.setattr(module, "nearest_anchor", lambda *a: calls.append("nearest") or nearest_anchor(*a))
    monkeypatch.setattr(module, "blur_matrix", lambda *a: calls.append("blur") or blur_matrix(*a))
    method = jit((4, 4))
    state = start(method, 5)
    for _ in range(4):
        state = method.step(state, torch.randn(2, 5, 3), 0.9, 0.8)
    assert calls.count("nearest") == 1 and calls.count("blur") == 2


@pytest.mark.parametrize("preset", ["default", "released"])
def test_memory_of_a_whole_run_is_a_few_videos(preset):
    """From the draw to the last stage, beside latents and noise: the same number of latents for any number of frames.

    All distances of tokens and anchors would be 111 latents on the smaller grid, and twice that on the other.
    """
    peaks = []
    for frames in (7, 14):
        method = jit((frames, 30, 53), preset)
        n, generator = method.grid.tokens, seeded()
        counts = [int(n * share) for share in (0.32, 0.6, 1.0)]
        latents, noise = torch.randn(2, 1, n, 32, generator=generator).unbind(0)
        with torch.inference_mode(), script("bench/scale").Living() as living:
            anchors = first_anchors(method.grid, counts[0], generator)[None]
            state = method.start(Draws(latents, noise, anchors), Stage(2, counts[0], 1))
            for number, (before, m) in enumerate(pairwise(counts)):
                state = method.step(state, torch.randn(1, before, 32, generator=generator), 0.9, 0.8)
                state = method.transition(state, Stage(1 - number, m, 1), 0.8)
        peaks.append(living.peak / latents.nbytes)
    assert max(peaks) < 10 and peaks[1] == pytest.approx(peaks[0], rel=0.02)


def test_separable_applies_each_matrix_along_its_axis():
    a, b = torch.randn(2, 2), torch.randn(3, 3)
    y = torch.randn(1, 6, 4)
    expected = torch.einsum("ij,kl,bjlc->bikc", a, b, y.view(1, 2, 3, 4)).reshape(1, 6, 4)
    torch.testing.assert_close(separable(TokenGrid((2, 3)), (a, b), y), expected)


@pytest.mark.parametrize(
    "change",
    [
        {"microflow": "sideways"},
        {"relax_steps": 0},
        {"blur_scale": 0.0},
        {"blur_sigma_range": (3.0, 1.0)},
        {"window": 4},
        {"noise": "white"},
        {"importance": "colour"},
        {"colour": "red"},
    ],
)
def test_options_without_a_meaning_are_refused(change):
    with pytest.raises(InputError):
        JiT(TokenGrid((4, 4)), JiT.options("paper") | change)
