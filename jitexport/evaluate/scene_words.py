"""What scenes are made of, and the words that captions have for it: see `jitexport.evaluate.scenes`."""

from __future__ import annotations

COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (24, 24, 28),
    "red": (214, 72, 66),
    "green": (88, 168, 104),
    "blue": (84, 136, 214),
    "yellow": (244, 208, 96),
    "purple": (150, 104, 190),
    "pink": (244, 168, 196),
    "orange": (240, 152, 80),
    "gray": (150, 154, 162),
}

#: Objects of the scenes, of the hundred of which there are pictures.
OBJECTS: tuple[str, ...] = (
    *("red apple", "banana", "strawberry", "lemon", "hamburger", "pizza", "doughnut", "birthday cake"),
    *("owl", "penguin", "fox", "frog", "panda", "cat face", "octopus", "crab"),
    *("rose", "sunflower", "rocket", "automobile", "sailboat", "star", "guitar", "house"),
)

_FRUITS = ("red apple", "banana", "strawberry", "lemon")
_DESSERTS = ("doughnut", "birthday cake")
_BIRDS = ("owl", "penguin")

#: What words that leave the object open stand for.
KINDS: dict[str, tuple[str, ...]] = {
    "fruit": _FRUITS,
    "dessert": _DESSERTS,
    "food": (*_FRUITS, *_DESSERTS, "hamburger", "pizza"),
    "bird": _BIRDS,
    "animal": (*_BIRDS, "fox", "frog", "panda", "cat face", "octopus", "crab"),
    "flower": ("rose", "sunflower"),
    "vehicle": ("rocket", "automobile", "sailboat"),
}

#: The word a caption uses for each texture.
TEXTURES: dict[str, str] = {
    "plain": "plain",
    "gradient": "shaded",
}

COUNT_WORDS = {2: "two", 3: "three"}
OPEN_WORDS = {"food": "something to eat"}  # besides "a food", which nobody says


def article(text: str) -> str:
    """The indefinite article before a text."""
    return "an" if text[0] in "aeio" else "a"


def plural(term: str) -> str:
    """ "fox" -> "foxes": the last word in the plural."""
    *before, word = term.split()
    if word.endswith(("x", "s", "sh", "ch")):
        word += "es"
    elif word.endswith("y") and word[-2] not in "aeiou":
        word = word[:-1] + "ies"
    else:
        word += "s"
    return " ".join((*before, word))
