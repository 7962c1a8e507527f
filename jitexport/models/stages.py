"""What a stage engine makes of its transformer: all of it, or for a temporal method the part that a step needs.

A family's stage module embeds its tokens, says how its blocks are run, and hands both to `TransformerStage.act` as an
`Evaluation`. Which engine the module is for decides what becomes of them:

    features    engine      takes beside        gives beside the velocity
    none        stage<k>
    residual    stage<k>                        residual of all blocks [B, m, D]
                skip<k>     residual
    deltas      stage<k>                        front_delta [B, T + m, D], rear_delta [B, m, D]
                front<k>    rear_delta
                rear<k>     front_delta

So a family knows nothing of temporal methods, and they know nothing of families. `indicator<k>` gives the first block's
modulated input [B, m, D] in place of a velocity, by which TeaCache decides while it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jitexport.errors import UnknownNameError
from jitexport.models.layers import TransformerPart
from jitexport.schedule import COMPUTED
from jitexport.specs import EngineSpec, TensorSpec

INDICATOR = "indicator"


@dataclass(frozen=True)
class Evaluation:
    """A transformer that is about to be run on the active tokens.

    Attributes:
        image, text: embedded tokens, [B, m, D] and [B, T, D].
        depth: number of blocks.
        half: number of blocks in front of the place where the transformer is cut in two.
        blocks: (from, up to, image, text) -> image and text behind these blocks.
        output: image behind the last block -> velocity [B, m, C].
        first_input: image -> what the first block's attention sees of it, normalised and modulated.
    """

    image: Tensor
    text: Tensor
    depth: int
    half: int
    blocks: Callable[[int, int, Tensor, Tensor], tuple[Tensor, Tensor]]
    output: Callable[[Tensor], Tensor]
    first_input: Callable[[Tensor], Tensor]

    def all_blocks(self) -> Tensor:
        """The image behind all blocks."""
        return self.blocks(0, self.depth, self.image, self.text)[0]


def in_turn(block: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """`Evaluation.blocks` of blocks that all take and give image and text: (number, image, text) -> image and text."""

    def blocks(start: int, stop: int, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        for i in range(start, stop):
            image, text = block(i, image, text)
        return image, text

    return blocks


Act = Callable[[Evaluation, Sequence[Tensor]], Tensor | tuple[Tensor, ...]]


def whole(e: Evaluation, kept: Sequence[Tensor]) -> Tensor:
    """The velocity."""
    return e.output(e.all_blocks())


def whole_with_residual(e: Evaluation, kept: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """And what all blocks together added to the image."""
    image = e.all_blocks()
    return e.output(image), image - e.image


def skip(e: Evaluation, kept: Sequence[Tensor]) -> Tensor:
    """No block: what they added is given. The output layer is modulated for this step."""
    (residual,) = kept
    return e.output(e.image + residual)


def whole_with_deltas(e: Evaluation, kept: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """And what the front and the rear blocks added, text before image; nothing reads the text behind the last block."""
    image, text = e.blocks(0, e.half, e.image, e.text)
    last, _ = e.blocks(e.half, e.depth, image, text)
    return e.output(last), torch.cat([text - e.text, image - e.image], dim=1), last - image


def front(e: Evaluation, kept: Sequence[Tensor]) -> Tensor:
    """The front blocks; what the rear ones added is given."""
    (delta,) = kept
    image, _ = e.blocks(0, e.half, e.image, e.text)
    return e.output(image + delta)


def rear(e: Evaluation, kept: Sequence[Tensor]) -> Tensor:
    """The rear blocks; what the front ones added is given."""
    (delta,) = kept
    words = e.text.shape[1]
    image, _ = e.blocks(e.half, e.depth, e.image + delta[:, words:], e.text + delta[:, :words])
    return e.output(image)


def indicator(e: Evaluation, kept: Sequence[Tensor]) -> Tensor:
    """What the first block sees."""
    return e.first_input(e.image)


#: {features: {action: what an engine for it does}}
ACTS: dict[str | None, dict[str, Act]] = {
    None: {COMPUTED: whole},
    "residual": {COMPUTED: whole_with_residual, "skip": skip, INDICATOR: indicator},
    "deltas": {COMPUTED: whole_with_deltas, "front": front, "rear": rear},
}
#: {action: the tensors that its engine takes beside a stage's own inputs}
TAKES = {"skip": ("residual",), "front": ("rear_delta",), "rear": ("front_delta",)}


def act_of(engine: str, features: str | None) -> Act:
    """What the module of an engine does, by its name without the number.

    Raises:
        UnknownNameError: no such engine, or none with these features.
    """
    action = engine.rstrip("0123456789")
    known = ACTS.get(features, {})
    if action not in known:
        raise UnknownNameError(
            "unknown engine", found=f"{engine}, features {features}", expected=", ".join(known) or f"one of {[*ACTS]}"
        )
    return known[action]


def kept_specs(features: str | None, rows: int, tokens: int, words: int, width: int, dtype: str) -> list[TensorSpec]:
    """What a computed step's engine gives beside the velocity.

    Args:
        rows, tokens, words, width: R, m, T and D.
    """
    shapes = {
        "residual": {"residual": (rows, tokens, width)},
        "deltas": {"front_delta": (rows, words + tokens, width), "rear_delta": (rows, tokens, width)},
    }
    return [TensorSpec(name, shape, dtype) for name, shape in shapes.get(features or "", {}).items()]


def engine_spec(action: str, index: int, inputs: Sequence[TensorSpec], features: str | None) -> EngineSpec:
    """The engine of an action at a token count.

    Args:
        inputs: of the engine that does it all: the tokens [R, m, C] first, the text as `context` [R, T, D] among them.
    """
    tokens = inputs[0]
    context = next(spec for spec in inputs if spec.name == "context")
    (rows, m, _), (_, words, width) = tokens.shape, context.shape
    kept = kept_specs(features, rows, m, words, width, tokens.dtype)
    velocity = TensorSpec("velocity", tokens.shape, tokens.dtype)
    name = f"{action}{index}"
    if action == COMPUTED:
        return EngineSpec(name, tuple(inputs), (velocity, *kept))
    if action == INDICATOR:
        return EngineSpec(name, tuple(inputs), (TensorSpec("modulated", (rows, m, width), tokens.dtype),))
    beside = [spec for spec in kept if spec.name in TAKES[action]]
    return EngineSpec(name, (*inputs, *beside), (velocity,))


class TransformerStage(TransformerPart):
    """Base of the modules of stage engines: see the module's docstring.

    Args:
        act: what this engine does.
    """

    def __init__(self, transformer: nn.Module, act: Act = whole) -> None:
        super().__init__(transformer)
        self.act = act
