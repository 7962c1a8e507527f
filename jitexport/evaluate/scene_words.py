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

OBJECTS: tuple[str, ...] = (
    *("red apple", "owl", "frog", "pizza", "dolphin", "mushroom", "pig face", "tiger face", "penguin", "hamburger"),
    *("watermelon", "sunflower", "cat face", "dog face", "bear", "panda", "koala", "lion", "cow face", "rabbit face"),
    *("fox", "monkey face", "elephant", "horse", "unicorn", "zebra", "giraffe", "camel", "turtle", "snake"),
    *("crab", "octopus", "butterfly", "lady beetle", "spider", "fish", "whale", "shark", "rose", "tulip"),
    *("cactus", "banana", "grapes", "lemon", "pineapple", "strawberry", "cherries", "peach", "tomato", "carrot"),
    *("broccoli", "bread", "doughnut", "cookie", "birthday cake", "egg", "french fries", "hot dog", "taco", "sushi"),
    *("ice cream", "rocket", "airplane", "sailboat", "automobile", "locomotive", "helicopter", "balloon", "snowman"),
    *("rainbow", "star", "ringed planet", "volcano", "house", "castle", "palm tree", "four leaf clover", "maple leaf"),
    *("snail", "jellyfish", "flamingo", "parrot", "peacock", "avocado", "eggplant", "pretzel", "cheese wedge"),
    *("teapot", "umbrella", "wrapped gift", "trophy", "soccer ball", "guitar", "crown", "gem stone", "key"),
    *("alarm clock", "anchor", "light bulb", "camera"),
)

_FRUITS = ("red apple", "watermelon", "banana", "grapes", "lemon", "pineapple", "strawberry", "cherries", "peach")
_VEGETABLES = ("tomato", "carrot", "broccoli", "eggplant")
_DESSERTS = ("doughnut", "cookie", "birthday cake", "ice cream")
_BIRDS = ("owl", "penguin", "flamingo", "parrot", "peacock")
_SEA_ANIMALS = ("dolphin", "octopus", "crab", "fish", "whale", "shark", "jellyfish")
_FLOWERS = ("sunflower", "rose", "tulip")

#: What words that leave the object open stand for.
KINDS: dict[str, tuple[str, ...]] = {
    "fruit": _FRUITS,
    "vegetable": _VEGETABLES,
    "dessert": _DESSERTS,
    "food": (
        *(*_FRUITS, *_VEGETABLES, *_DESSERTS, "pizza", "mushroom", "hamburger", "bread", "egg", "french fries"),
        *("hot dog", "taco", "sushi", "avocado", "pretzel", "cheese wedge"),
    ),
    "bird": _BIRDS,
    "sea animal": _SEA_ANIMALS,
    "animal": (
        *(*_BIRDS, *_SEA_ANIMALS, "frog", "pig face", "tiger face", "cat face", "dog face", "bear", "panda", "koala"),
        *("lion", "cow face", "rabbit face", "fox", "monkey face", "elephant", "horse", "unicorn", "zebra", "giraffe"),
        *("camel", "turtle", "snake", "butterfly", "lady beetle", "spider", "snail"),
    ),
    "flower": _FLOWERS,
    "plant": (*_FLOWERS, "cactus", "palm tree", "four leaf clover", "maple leaf"),
    "vehicle": ("rocket", "airplane", "sailboat", "automobile", "locomotive", "helicopter"),
    "building": ("house", "castle"),
    "thing": OBJECTS,
}

#: The word a caption uses for each texture; confetti comes after the background.
TEXTURES: dict[str, str] = {
    "plain": "plain",
    "stripes": "striped",
    "dots": "dotted",
    "gradient": "shaded",
    "confetti": "with confetti",
}

COUNT_WORDS = {2: "two", 3: "three"}
OPEN_WORDS = {"thing": "something", "food": "something to eat"}  # besides "a thing", "a food", which nobody says

#: Plurals that follow no rule.
IRREGULAR = {
    **{word: word for word in ("fish", "sushi", "broccoli", "grapes", "cherries", "fries", "jellyfish")},
    "leaf": "leaves",
    "bread": "breads",
}


def article(text: str) -> str:
    """The indefinite article before a text."""
    return "an" if text[0] in "aeio" or text.startswith("umbrella") else "a"


def plural(term: str) -> str:
    """ "fox" -> "foxes": the last word in the plural."""
    *before, word = term.split()
    if word in IRREGULAR:
        word = IRREGULAR[word]
    elif word.endswith(("x", "s", "sh", "ch", "to")):
        word += "es"
    elif word.endswith("y") and word[-2] not in "aeiou":
        word = word[:-1] + "ies"
    else:
        word += "s"
    return " ".join((*before, word))
