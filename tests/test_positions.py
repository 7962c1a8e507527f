import math

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxPosEmbed

from jitexport.grid import TokenGrid
from jitexport.positions import Rotary


def flux(axes, text_tokens):
    """As FLUX.1 places its tokens: the text at the origin, the image's at (0, row, column)."""
    return Rotary(axes, 10000.0, grid_axes=(1, 2), text_tokens=text_tokens)


@pytest.mark.parametrize("axes", [(16, 56, 56), (4, 6, 6)])
def test_tables_are_those_of_flux(axes):
    """diffusers repeats each angle, we do not."""
    positions = TokenGrid((5, 7)).coordinates()
    ids = torch.zeros(3 + 35, 3)
    ids[3:, 1:] = positions
    tables = flux(axes, 3).tables(positions)
    expected = dict(zip(("cos", "sin"), FluxPosEmbed(10000, axes)(ids), strict=True))
    for name, table in tables.items():
        assert table.shape == (38, sum(axes) // 2) and table.dtype == torch.float32
        torch.testing.assert_close(table.repeat_interleave(2, -1), expected[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("text_tokens", [0, 3])
def test_gathered_tables_are_those_of_the_places(text_tokens):
    places, where = TokenGrid((5, 7)).coordinates() + 0.5, torch.tensor([[0, 7, 34], [33, 3, 3]])
    rotary = flux((4, 6, 6), text_tokens)
    gathered = rotary.gather(rotary.tables(places), where)
    assert [(name, tuple(t.shape)) for name, t in gathered.items()] == [
        (s.name, s.shape) for s in rotary.specs(2, 3, "bf16")
    ]
    for i in range(2):
        for name, expected in rotary.tables(places[where[i]]).items():
            assert torch.equal(gathered[name][i], expected)


def test_text_stands_where_the_family_puts_it():
    rotary = Rotary(
        (2, 2, 2), 10000.0, grid_axes=(0, 2), offset=(-1, 5), text_tokens=2, text_start=(7, 0, 1), text_step=(0, 1, 2)
    )
    angles = torch.tensor([[7.0, 0, 1], [7, 1, 3], [-1, 0, 5], [2, 0, 9]])
    tables = rotary.tables(torch.tensor([[0, 0], [3, 4]]))
    torch.testing.assert_close(tables["cos"], angles.cos())
    torch.testing.assert_close(tables["sin"], angles.sin())


def test_angles_are_exact_at_large_positions():
    """100,003 / 100 has no exact fp32 value: an angle in fp32 would put the cosine off by about 1e-5."""
    tables = Rotary((2, 4), 10000.0, grid_axes=(0, 1)).tables(torch.tensor([[0, 100_003]]))
    assert tables["cos"][0, 2].item() == pytest.approx(math.cos(1000.03), abs=1e-7)
