"""Pictures as files' bytes, previews, and which tokens ran."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise

import torch
from PIL import Image
from torch import Tensor

from jitexport.grid import TokenGrid
from jitexport.png import encode_png
from jitexport.schedule import StageSchedule
from jitexport.serve.jobs import Format


def encode(image: Image.Image, form: Format, compression: int) -> bytes:
    """An image as the bytes of a file; PNG has the bytes that `jitexport generate` writes.

    Args:
        compression: quality of jpeg and webp, 0 to 100.
    """
    if form == "png":
        return encode_png(image)
    stream = io.BytesIO()
    image.save(stream, format=form.upper(), quality=compression)
    return stream.getvalue()


def preview_steps(schedule: StageSchedule, count: int) -> Sequence[int]:
    """After which steps a picture's previews are taken: at ends of stages, evenly, then in the widest gaps.

    The last step is none of them: its prediction is the picture. Where there are fewer other steps, there are fewer.
    """
    last = schedule.nfe - 1
    ends = [steps[-1].index for _, steps in schedule if steps[-1].index < last]
    if len(ends) > count:
        return [ends[(i + 1) * len(ends) // (count + 1)] for i in range(count)]
    while len(ends) < min(count, last):
        marks = [-1, *ends, last]
        gap, start = max((b - a, -a) for a, b in pairwise(marks))
        ends = sorted([*ends, -start + gap // 2])
    return ends


def detail(places: Tensor, grid: TokenGrid) -> list[str]:
    """For each image and each token of the grid a digit: 0 did not run, 1 ran, 2 ran as a part of a larger token.

    Methods number their places alike: the N tokens of the grid; then, where they run other resolutions, the N / 4
    cells of two by two tokens; then the grid's tokens once more.

    Args:
        places: [B, m].
    """
    n = grid.tokens
    found = torch.zeros((len(places), n), dtype=torch.uint8)
    places = places.cpu()
    for row, ran in zip(found, places, strict=True):
        row[ran[ran < n]] = 1
        if (ran >= n).any():
            cells = n // 4
            coarse = torch.zeros(cells, dtype=torch.uint8)
            coarse[ran[(ran >= n) & (ran < n + cells)] - n] = 2
            side = coarse.view(*(s // 2 for s in grid.shape))
            row |= side.repeat_interleave(2, 0).repeat_interleave(2, 1).flatten()
            row[ran[ran >= n + cells] - n - cells] = 1
    return ["".join(map(str, row.tolist())) for row in found]
