"""The scenes that the demo model is about, and what captions say of them.

A scene is one object that fills the picture, or two or three that each fill one of its quarters, mirrored or not, on
a background of one of ten colours, plain or shaded. A caption says as much of it as one likes:

    fox on a blue background                something to eat
    two owls on a shaded green background   a fruit on a red background

Training draws scenes of one object (COUNT_SHARES), as many as two cores can teach: see `scripts/demo_model/train.py`.

What it leaves out is free. `Request` is what a caption means; `parse` reads it from the text. A request names every
object, be it by a word as wide as "animal": what it does not name is not there.

Everything is drawn from a NumPy generator that the caller gives, so that the same seed makes the same scenes. Drawing
a scene needs no pictures; `render` does, and takes them as RGBA squares of any size.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, cycle, permutations
from zlib import crc32

import numpy as np
from PIL import Image

from jitexport.evaluate.scene_words import COLOURS, COUNT_WORDS, KINDS, OBJECTS, OPEN_WORDS, TEXTURES, article, plural

SIZE = 256  # pixels a side of a rendered scene, and the unit of places

TEXTURE_SHARES = (0.6, 0.4)
SHADE = 0.34  # how far a shaded background's end is from its colour
COUNT_SHARES = (1.0, 0.0, 0.0)  # of one, two, three objects
MOST_OBJECTS = len(COUNT_SHARES)
QUARTER = SIZE // 2  # pixels a side of an object's canvas among others; one alone has SIZE

HELD_OUT_SEED = 0
PROMPTS_SEED = 17


@dataclass(frozen=True)
class Thing:
    """An object in a scene, by its square canvas: pixels of SIZE."""

    name: str
    left: float
    top: float
    side: float
    mirrored: bool


@dataclass(frozen=True)
class Background:
    """A background; `seed` decides the direction in which it is shaded."""

    colour: str
    texture: str
    seed: int


@dataclass(frozen=True)
class Scene:
    """What is in a picture."""

    things: tuple[Thing, ...]
    background: Background

    @property
    def names(self) -> tuple[str, ...]:
        """The objects' names, sorted."""
        return tuple(sorted(thing.name for thing in self.things))


@dataclass(frozen=True)
class Request:
    """What a caption asks for: a name or a kind for each object, sorted; None where it leaves the background open."""

    terms: tuple[str, ...]
    colour: str | None = None
    texture: str | None = None

    def accepts_names(self, names: Sequence[str]) -> bool:
        """Whether the objects are those that are asked for: each term has one object, and none is left over."""
        return len(names) == len(self.terms) and any(
            all(fits(name, term) for name, term in zip(order, self.terms, strict=True)) for order in permutations(names)
        )

    def accepts(self, scene: Scene) -> bool:
        """Whether a scene is what the caption says."""
        background = scene.background
        return (
            self.accepts_names(scene.names)
            and self.colour in (None, background.colour)
            and self.texture in (None, background.texture)
        )


def fits(name: str, term: str) -> bool:
    """Whether an object may be called `term`, a name or a kind."""
    return name == term or name in KINDS.get(term, ())


# --- what is held out of training -------------------------------------------------------------------------------------


def held_out_colours() -> dict[str, str]:
    """The background colour that each object is never trained on; each colour for two or three objects."""
    order = random.Random(HELD_OUT_SEED).sample(OBJECTS, len(OBJECTS))
    held_out = dict(zip(order, cycle(COLOURS), strict=False))
    return {name: held_out[name] for name in OBJECTS}


_HELD_OUT_COLOURS = held_out_colours()


def pair_held_out(first: str, second: str) -> bool:
    """Whether two objects are never trained on together: one pair in ten, by a checksum of their names."""
    return first != second and crc32("|".join(sorted((first, second))).encode()) % 10 == 0


def held_out(names: Sequence[str], colour: str) -> bool:
    """Whether objects on a colour hold a combination that is never trained on."""
    return any(_HELD_OUT_COLOURS[name] == colour for name in names) or any(
        pair_held_out(*pair) for pair in combinations(names, 2)
    )


# --- drawing scenes ---------------------------------------------------------------------------------------------------


def draw_scene(rng: np.random.Generator, *, from_held_out: bool = False, count: int | None = None) -> Scene:
    """A scene of the training data, or with `from_held_out` one that holds a combination which is kept from it.

    Args:
        count: number of objects; drawn by COUNT_SHARES if None.
    """
    count = int(rng.choice(MOST_OBJECTS, p=COUNT_SHARES)) + 1 if count is None else count
    while True:
        names, colour = draw_names(rng, count), str(rng.choice(list(COLOURS)))
        if held_out(names, colour) == from_held_out:
            break
    return _arranged(names, colour, None, rng)


def _arranged(names: Sequence[str], colour: str, texture: str | None, rng: np.random.Generator) -> Scene:
    """Objects at drawn places, on a background of which the rest is drawn."""
    texture = texture or str(rng.choice(list(TEXTURES), p=TEXTURE_SHARES))
    background = Background(colour, texture, int(rng.integers(2**31)))
    places = draw_places(rng, len(names))
    things = [
        Thing(name, *place, bool(rng.random() < 0.5))
        for name, place in zip(names, places, strict=True)
    ]
    return Scene(tuple(things), background)


def draw_scene_for(request: Request, rng: np.random.Generator) -> Scene:
    """A true scene of a request, held-out combinations included: what the request leaves open is drawn."""
    names = [str(rng.choice(KINDS[term])) if term in KINDS else term for term in request.terms]
    colour = request.colour or str(rng.choice(list(COLOURS)))
    return _arranged(names, colour, request.texture, rng)


def draw_names(rng: np.random.Generator, count: int) -> list[str]:
    """Objects of a scene: of several ones two or all are the same in one scene of five."""
    names = [OBJECTS[index] for index in rng.choice(len(OBJECTS), count, replace=False)]
    if count > 1 and rng.random() < 0.2:
        same = int(rng.integers(2, count + 1))
        names[:same] = [names[0]] * same
    return names


def draw_places(rng: np.random.Generator, count: int) -> list[tuple[float, float, float]]:
    """Canvases of `count` objects: left, top and side of each."""
    if count == 1:
        return [(0.0, 0.0, float(SIZE))]
    quarters = rng.choice(4, count, replace=False)
    return [(float(q % 2 * QUARTER), float(q // 2 * QUARTER), float(QUARTER)) for q in quarters]


# --- captions ---------------------------------------------------------------------------------------------------------


def draw_request(scene: Scene, rng: np.random.Generator) -> Request:
    """What a caption may say of a scene: six names of ten, kinds for the others, the background in part or whole."""

    def term(name: str) -> str:
        if rng.random() < 0.6:
            return name
        kinds = [kind for kind, names in KINDS.items() if name in names]
        return str(rng.choice(kinds)) if kinds else name

    terms = {name: term(name) for name in scene.names}  # the same word for the same object: "two owls"
    background = scene.background
    texture_said = rng.random() < (0.2 if background.texture == "plain" else 0.5)
    return Request(
        tuple(sorted(terms[name] for name in scene.names)),
        background.colour if rng.random() < 0.8 else None,
        background.texture if texture_said else None,
    )


def write_caption(request: Request, rng: np.random.Generator | None = None) -> str:
    """A caption for a request: the plain form, or with `rng` one of its variants in three cases of ten."""
    varied = rng is not None and rng.random() < 0.3
    variant = int(rng.integers(3)) if rng is not None and varied else None
    groups = list(Counter(request.terms).items())
    if rng is not None:
        rng.shuffle(groups)
    articles = len(groups) < 3 and variant == 0
    parts = [phrase(term, count, articles) for term, count in groups]
    text = ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]
    if variant == 1 and len(request.terms) == 1 and parts[0] not in OPEN_WORDS.values():
        text = f"a picture of {article(text)} {text}" if not text.startswith(("a ", "an ")) else f"a picture of {text}"
    return text + background_phrase(request, "with" if variant == 2 else "on")


def phrase(term: str, count: int, articles: bool) -> str:
    """One word group: "fox", "a fox", "two foxes", "something to eat"."""
    if count > 1:
        return f"{COUNT_WORDS[count]} {plural(term)}"
    if term in OPEN_WORDS:
        return OPEN_WORDS[term]
    return f"{article(term)} {term}" if articles or term in KINDS else term


def background_phrase(request: Request, preposition: str = "on") -> str:
    """What a caption says of the background, with the space before it; nothing if it says nothing."""
    if request.colour is None and request.texture is None:
        return ""
    adjective = TEXTURES[request.texture] if request.texture else None
    words = " ".join(word for word in (adjective, request.colour) if word)
    return f" {preposition} {article(words)} {words} background"


@dataclass(frozen=True)
class ScenePrompt:
    """A caption to evaluate with, what it means, whether it is of a held-out combination, and the image's seed."""

    text: str
    request: Request
    held_out: bool
    seed: int


def scene_prompts(count: int) -> list[ScenePrompt]:
    """`count` captions, of held-out combinations and of trained ones in turn; always the same ones."""
    prompts = []
    for index in range(count):
        rng = np.random.default_rng((PROMPTS_SEED, index))
        scene = draw_scene(rng, from_held_out=index % 2 == 0)
        request = draw_request(scene, rng)
        prompts.append(ScenePrompt(write_caption(request), request, index % 2 == 0, index))
    return prompts


_PLURALS = {plural(term): term for term in (*OBJECTS, *KINDS)}
_OPEN = {text: term for term, text in OPEN_WORDS.items()}
_TEXTURE_OF = {word: texture for texture, word in TEXTURES.items()}
_BACKGROUND = re.compile(
    r"(?P<objects>.+?)"
    rf"(?: (?:on|with) an? (?P<texture>{'|'.join(_TEXTURE_OF)})? ?(?P<colour>{'|'.join(COLOURS)})? ?background)?"
)


def parse(text: str) -> Request | None:
    """What a caption asks for, or None where it is no caption of a scene."""
    found = _BACKGROUND.fullmatch(" ".join(text.lower().strip(" .").split()))
    if found is None:
        return None
    terms: list[str] = []
    for part in re.split(r", and |, | and ", found["objects"].removeprefix("a picture of ")):
        read = _parse_phrase(part)
        if read is None:
            return None
        terms += read
    if len(terms) > MOST_OBJECTS:
        return None
    return Request(tuple(sorted(terms)), found["colour"], _TEXTURE_OF.get(found["texture"]))


def _parse_phrase(text: str) -> list[str] | None:
    if text in _OPEN:
        return [_OPEN[text]]
    word, _, rest = text.partition(" ")
    for count, name in COUNT_WORDS.items():
        if word == name:
            return [_PLURALS[rest]] * count if rest in _PLURALS else None
    name = rest if word in ("a", "an", "the", "one") else text
    return [name] if name in OBJECTS or name in KINDS else None


def caption_words() -> list[str]:
    """All words that captions are made of, sorted."""
    texts = [*OBJECTS, *KINDS, *_PLURALS, *COLOURS, *TEXTURES.values(), *OPEN_WORDS.values(), *COUNT_WORDS.values()]
    texts.append("a an the one picture of on with and background")
    return sorted({word for text in texts for word in text.split()})


# --- pictures ---------------------------------------------------------------------------------------------------------


def render(scene: Scene, sprites: Mapping[str, Image.Image]) -> Image.Image:
    """The picture of a scene: RGB, SIZE a side. `sprites` are the objects' square RGBA pictures."""
    picture = render_background(scene.background)
    for thing in scene.things:
        sprite, left, top = placed(thing, sprites[thing.name])
        picture.paste(sprite, (left, top), sprite)
    return picture


def placed(thing: Thing, sprite: Image.Image) -> tuple[Image.Image, int, int]:
    """An object's picture as it stands in a scene, and where its upper left corner is."""
    side = round(thing.side)
    sprite = sprite.resize((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0)
    if thing.mirrored:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return sprite, round(thing.left), round(thing.top)


def accent(colour: str) -> np.ndarray:
    """The tone that a shaded background ends with: darker, of black lighter. RGB [3] in 0..255."""
    rgb = np.array(COLOURS[colour], dtype=np.float32)
    return rgb + SHADE * (255 - rgb) if colour == "black" else rgb * (1 - SHADE)


def render_background(background: Background) -> Image.Image:
    """The picture of a background: RGB, SIZE a side."""
    rng = np.random.default_rng(background.seed)
    base = np.array(COLOURS[background.colour], dtype=np.float32)
    if background.texture == "plain":
        return Image.new("RGB", (SIZE, SIZE), COLOURS[background.colour])
    mask = ramp(rng)  # [H, W] in 0..1
    change = accent(background.colour) - base
    rgb = np.empty((SIZE, SIZE, 3), dtype=np.uint8)
    for channel in range(3):  # one by one: loops over an axis of three are slow
        rgb[..., channel] = base[channel] + mask * change[channel] + np.float32(0.5)
    return Image.fromarray(rgb)


_ROW, _COLUMN = np.mgrid[:SIZE, :SIZE].astype(np.float32) + 0.5


def ramp(rng: np.random.Generator) -> np.ndarray:
    """A ramp from 0 to 1 across the picture in a random direction: [SIZE, SIZE]."""
    angle = rng.uniform(0, 2 * math.pi)
    along = _COLUMN * math.cos(angle) + _ROW * math.sin(angle)
    return (along - along.min()) / (along.max() - along.min())
