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
    tokens:x    stage<k>                        attention [B, S', D], updates [B, S, D], scores [B, S] fp32
                refresh<k>  all three           refreshed, the updates after it; fresh [B, S] fp32, 1 where they are new

x is the share of the tokens that are refreshed, S and S' are the lengths of all cells: see `jitexport.models.tokens`.
So a family knows nothing of temporal methods, and they know nothing of families. `indicator<k>` gives the first block's
modulated input [B, m, D] in place of a velocity, by which TeaCache decides while it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jitexport.errors import InputError, UnknownNameError, UnsupportedModelError
from jitexport.models.layers import TransformerPart
from jitexport.models.tokens import Cell, Keep, Memo, Refresh
from jitexport.schedule import COMPUTED, Stage
from jitexport.specs import EngineSpec, TensorSpec

INDICATOR = "indicator"


@dataclass(frozen=True)
class Evaluation:
    """A transformer that is about to be run on the active tokens.

    Attributes:
        image, text: embedded tokens, [B, m, D] and [B, T, D].
        depth: number of blocks.
        half: number of blocks in front of the place where the transformer is cut in two.
        blocks: (from, up to, image, text) -> image and text behind these blocks; with a `Memo` behind these, blocks
            write into it or read from it.
        output: image behind the last block -> velocity [B, m, C].
        first_input: image -> what the first block's attention sees of it, normalised and modulated.
    """

    image: Tensor
    text: Tensor
    depth: int
    half: int
    blocks: Callable[..., tuple[Tensor, Tensor]]
    output: Callable[[Tensor], Tensor]
    first_input: Callable[[Tensor], Tensor]

    def all_blocks(self) -> Tensor:
        """The image behind all blocks."""
        return self.blocks(0, self.depth, self.image, self.text)[0]


def in_turn(block: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """`Evaluation.blocks` of blocks that all take and give image and text: (number, image, text) -> image and text."""

    def blocks(start: int, stop: int, image: Tensor, text: Tensor, *memo: Memo) -> tuple[Tensor, Tensor]:
        for i in range(start, stop):
            image, text = block(i, image, text, *memo)
        return image, text

    return blocks


def doubles_then_singles(
    half: int,
    double: Callable[..., tuple[Tensor, Tensor]],
    single: Callable[..., Tensor],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """`Evaluation.blocks` of FLUX's two kinds: blocks of image and text, then blocks of both in one buffer.

    Args:
        half: number of double blocks.
        double: (number, image, text) -> image and text.
        single: (number, from 0, text and image in one) -> the same.
    """
    doubles = in_turn(double)

    def blocks(start: int, stop: int, image: Tensor, text: Tensor, *memo: Memo) -> tuple[Tensor, Tensor]:
        image, text = doubles(start, min(stop, half), image, text, *memo)
        if stop <= half:
            return image, text
        x = torch.cat([text, image], dim=1)
        for i in range(max(start, half), stop):
            x = single(i - half, x, *memo)
        return x[:, text.shape[1] :], x[:, : text.shape[1]]

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


def whole_with_tokens(e: Evaluation, kept: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """And what all blocks added, token by token."""
    memo = Keep()
    image, _ = e.blocks(0, e.depth, e.image, e.text, memo)
    return (e.output(image), *memo.tensors(e.image.dtype))


@dataclass(frozen=True)
class RefreshTokens:
    """All blocks, of which attention is given, and of the MLPs' results all but a share.

    Attributes:
        cells, share: see `jitexport.models.tokens`.
    """

    cells: Sequence[Cell]
    share: float

    def __call__(self, e: Evaluation, kept: Sequence[Tensor]) -> tuple[Tensor, ...]:
        memo = Refresh(*kept, cells=self.cells, share=self.share)
        image, _ = e.blocks(0, e.depth, e.image, e.text, memo)
        return (e.output(image), *memo.tensors())


TOKENS, REFRESH = "tokens", "refresh"

#: {kind of features: {action: what an engine for it does}}
ACTS: dict[str | None, dict[str, Act]] = {
    None: {COMPUTED: whole},
    "residual": {COMPUTED: whole_with_residual, "skip": skip, INDICATOR: indicator},
    "deltas": {COMPUTED: whole_with_deltas, "front": front, "rear": rear},
    TOKENS: {COMPUTED: whole_with_tokens, REFRESH: RefreshTokens((), 1)},
}
#: {action: the tensors that its engine takes beside a stage's own inputs}
TAKES: dict[str, tuple[str, ...]] = {
    "skip": ("residual",), "front": ("rear_delta",), "rear": ("front_delta",),
    REFRESH: ("attention", "updates", "scores"),
}
#: {kind of features: {action: the tensors that its engine gives beside the velocity}}
GIVES: dict[str | None, dict[str, tuple[str, ...]]] = {
    "residual": {COMPUTED: ("residual",)},
    "deltas": {COMPUTED: ("front_delta", "rear_delta")},
    TOKENS: {COMPUTED: ("attention", "updates", "scores"), REFRESH: ("refreshed", "fresh")},
}


def kind_of(features: str | None) -> str | None:
    """Features without the share that some have."""
    return None if features is None else features.partition(":")[0]


def check_features(features: str | None, cells: Sequence[Cell], family: str) -> None:
    """Refuse features that there are not, or that a family's engines cannot hand on.

    Args:
        cells: of the family.

    Raises:
        InputError: no such features.
        UnsupportedModelError: not of this family.
    """
    kind = kind_of(features)
    known = [*(k for k in ACTS if k != TOKENS), f"{TOKENS}:SHARE, a share of them up to 1"]
    if kind not in ACTS or (features != kind) != (kind == TOKENS) or not 0 < share_of(features) <= 1:
        raise InputError("unknown features of stage engines", found=features, expected=f"one of {known}")
    if kind == TOKENS and not cells:
        raise UnsupportedModelError(
            f"the family {family} has no engines for a cache of tokens (toca)", found=f"features {features}",
            expected="a family that says which cells its blocks have", remedy="another cache, for example taylorseer",
        )


def share_of(features: str | None) -> float:
    """The share that features say; 1 where they say none, and 0 where it is no number."""
    _, colon, share = (features or "").partition(":")
    try:
        return float(share) if colon else 1.0
    except ValueError:
        return 0.0


def act_of(engine: str, features: str | None, cells: Sequence[Cell] = ()) -> Act:
    """What the module of an engine does, by its name without the number.

    Args:
        cells: of the family.

    Raises:
        UnknownNameError: no such engine, or none with these features.
    """
    action = engine.rstrip("0123456789")
    known = ACTS.get(kind_of(features), {})
    if action not in known:
        raise UnknownNameError(
            "unknown engine", found=f"{engine}, features {features}", expected=", ".join(known) or f"one of {[*ACTS]}"
        )
    return RefreshTokens(cells, share_of(features)) if action == REFRESH else known[action]


def exchanged(
    features: str | None, cells: Sequence[Cell], *, rows: int, tokens: int, words: int, width: int, dtype: str
) -> dict[str, TensorSpec]:
    """What engines of features hand on and take, by name.

    Args:
        cells: of the family.
        rows, tokens, words, width: R, m, T and D.
    """
    kind = kind_of(features)
    shapes: dict[str, tuple[int, ...]] = {}
    if kind == "residual":
        shapes = {"residual": (rows, tokens, width)}
    elif kind == "deltas":
        shapes = {"front_delta": (rows, words + tokens, width), "rear_delta": (rows, tokens, width)}
    elif kind == TOKENS:
        lengths = [cell.length(tokens, words) for cell in cells]
        all_cells = sum(lengths)
        attentions = sum(length * cell.attentions for length, cell in zip(lengths, cells, strict=True))
        shapes = {
            "attention": (rows, attentions, width), "updates": (rows, all_cells, width),
            "scores": (rows, all_cells), "refreshed": (rows, all_cells, width), "fresh": (rows, all_cells),
        }  # what is taken and given has another name each: a graph's tensors have names of their own
    exact = ("scores", "fresh")
    return {name: TensorSpec(name, shape, "fp32" if name in exact else dtype) for name, shape in shapes.items()}


def engine_spec(
    action: str, stage: Stage, inputs: Sequence[TensorSpec], features: str | None, cells: Sequence[Cell] = ()
) -> EngineSpec:
    """The engine of an action at a stage's token count.

    Args:
        inputs: of the engine that does it all: the tokens [R, m, C] first, the text as `context` [R, T, D] among them.
        cells: of the family.
    """
    tokens = inputs[0]
    context = next(spec for spec in inputs if spec.name == "context")
    (rows, m, _), (_, words, width) = tokens.shape, context.shape
    known = exchanged(features, cells, rows=rows, tokens=m, words=words, width=width, dtype=tokens.dtype)
    first = TensorSpec("velocity", tokens.shape, tokens.dtype)
    if action == INDICATOR:
        first = TensorSpec("modulated", (rows, m, width), tokens.dtype)
    taken = [known[name] for name in TAKES.get(action, ())]
    given = [known[name] for name in GIVES.get(kind_of(features), {}).get(action, ())]
    return EngineSpec(stage.engine(action), (*inputs, *taken), (first, *given))


class TransformerStage(TransformerPart):
    """Base of the modules of stage engines: see the module's docstring.

    Args:
        act: what this engine does.
    """

    regions: Sequence[str]

    def __init__(self, transformer: nn.Module, act: Act = whole) -> None:
        super().__init__(transformer)
        self.act = act
        if act is whole_with_tokens or isinstance(act, RefreshTokens):
            # Blocks then hand on more than tensors, and each refreshes another number of tokens: nothing to share.
            self.regions = ()
