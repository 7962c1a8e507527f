import math

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxPosEmbed

from jitexport.grid import TokenGrid
from jitexport.positions import Rotary


@pytest.mark.parametrize("axes", [(16, 56, 56), (4, 6, 6)])
def test_tables_are_those_of_flux(axes):
    """Text at the origin, image tokens at (0, row, column); diffusers repeats each angle, we do not."""
    positions = TokenGrid((5, 7)).coordinates()[None]
    ids = torch.zeros(3 + 35, 3)
    ids[3:, 1:] = positions[0]
    cos, sin = Rotary(axes, 10000.0, 3).tables(positions)
    expected_cos, expected_sin = FluxPosEmbed(10000, axes)(ids)
    assert cos.shape == sin.shape == (1, 38, sum(axes) // 2)
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close(cos[0].repeat_interleave(2, -1), expected_cos, atol=1e-6, rtol=0)
    torch.testing.assert_close(sin[0].repeat_interleave(2, -1), expected_sin, atol=1e-6, rtol=0)


def test_each_image_has_its_own_positions():
    positions = torch.tensor([[[0, 1], [2, 3]], [[4, 0], [0, 0]]])
    rotary = Rotary((4, 6, 6), 10000.0, 1)
    both = rotary.tables(positions)
    for i in range(2):
        for table, alone in zip(both, rotary.tables(positions[i : i + 1]), strict=True):
            assert torch.equal(table[i], alone[0])
    assert not torch.equal(both[0][0], both[0][1])


def test_gathered_tables_are_those_of_the_places():
    places, where = TokenGrid((5, 7)).coordinates() + 0.5, torch.tensor([[0, 7, 34], [33, 3, 3]])
    for text_tokens in (0, 3):
        rotary = Rotary((4, 6, 6), 10000.0, text_tokens)
        gathered = rotary.gather(rotary.tables(places[None]), where)
        for found, expected in zip(gathered, rotary.tables(places[where]), strict=True):
            assert torch.equal(found, expected)


def test_three_axes_are_taken_as_they_are():
    cos, _ = Rotary((2, 2, 2), 10000.0, 0).tables(torch.tensor([[[1, 2, 3]]]))
    torch.testing.assert_close(cos[0, 0], torch.tensor([1.0, 2.0, 3.0]).cos())


def test_angles_are_exact_at_large_positions():
    """100,003 / 100 has no exact fp32 value: an angle in fp32 would put the cosine off by about 1e-5."""
    cos, _ = Rotary((2, 4), 10000.0, 0).tables(torch.tensor([[[0, 100_003]]]))
    assert cos[0, 0, 2].item() == pytest.approx(math.cos(1000.03), abs=1e-7)
