import pytest
import torch
from diffusers import FluxPipeline
from hypothesis import given
from hypothesis import strategies as st

from jitexport.errors import ScheduleError
from jitexport.grid import TokenGrid, gather_tokens, pack, scatter_tokens, unpack

shapes = st.lists(st.integers(1, 7), min_size=2, max_size=3).map(tuple)


@given(shapes)
def test_coordinates_are_row_major(shape):
    grid = TokenGrid(shape)
    coordinates = grid.coordinates()
    assert grid.tokens == len(coordinates)
    expected = torch.stack(torch.unravel_index(torch.arange(grid.tokens), shape), dim=-1)
    assert torch.equal(coordinates, expected)


@given(shapes)
def test_unflatten_puts_token_n_at_its_coordinates(shape):
    grid = TokenGrid(shape)
    y = torch.arange(2 * grid.tokens * 3).view(2, grid.tokens, 3)
    field = grid.unflatten(y)
    assert field.shape == (2, *shape, 3)
    n = grid.tokens // 2
    assert torch.equal(field[(1, *grid.coordinates()[n].tolist())], y[1, n])


@pytest.mark.parametrize("shape", [(), (4,), (0, 4), (4, -1), (2, 2, 2, 2), (2.5, 2)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ScheduleError, match="token grid needs positive sizes"):
        TokenGrid(shape)


@given(st.data())
def test_gather_of_scatter_is_the_identity(data):
    """S^T S = I, and S changes nothing else."""
    n = data.draw(st.integers(1, 20))
    m = data.draw(st.integers(1, n))
    seed = data.draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(n, generator=generator)[:m] for _ in range(3)])
    y = torch.randn(3, n, 2, generator=generator)
    u = torch.randn(3, m, 2, generator=generator)
    kept = y.clone()
    scattered = scatter_tokens(y, index, u)
    assert torch.equal(gather_tokens(scattered, index), u)
    assert torch.equal(y, kept)
    for b in range(3):
        others = [i for i in range(n) if i not in index[b].tolist()]
        assert torch.equal(scattered[b, others], y[b, others])
        assert torch.equal(scattered[b, index[b]], u[b])


@pytest.mark.parametrize(("h", "w"), [(2, 3), (5, 1), (4, 4)])
def test_packing_is_that_of_diffusers(h, w):
    latents = torch.randn(2, 4, 2 * h, 2 * w)
    tokens = pack(latents, 2)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 4, 2 * h, 2 * w))
    assert torch.equal(unpack(tokens, TokenGrid((h, w)), 2), latents)
    assert torch.equal(FluxPipeline._unpack_latents(tokens, 8 * h, 8 * w, 4), latents)


def test_packing_of_other_patches_inverts():
    latents = torch.randn(1, 3, 6, 9)
    assert torch.equal(unpack(pack(latents, 3), TokenGrid((2, 3)), 3), latents)
    assert torch.equal(pack(latents, 1)[0, 10], latents[0, :, 1, 1])


def test_half_the_sides():
    assert TokenGrid((6, 4)).halved() == TokenGrid((3, 2)) and TokenGrid((5, 6, 4)).halved() == TokenGrid((5, 3, 2))
    for shape in [(5, 4), (4, 5), (2, 3, 4)]:
        with pytest.raises(ScheduleError, match="even number"):
            TokenGrid(shape).halved()
