"""Scenes and captions: what is drawn is drawn again, captions are true, and held-out combinations stay out."""

from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from jitexport.evaluate.demo import DemoData
from jitexport.evaluate.scene_words import COLOURS, KINDS, OBJECTS, TEXTURES
from jitexport.evaluate.scenes import (
    QUARTER,
    SIZE,
    Background,
    Request,
    Scene,
    Thing,
    caption_words,
    draw_request,
    draw_scene,
    draw_scene_for,
    held_out,
    held_out_colours,
    pair_held_out,
    parse,
    render,
    render_background,
    scene_prompts,
    write_caption,
)

SEEDS = range(400)


def drawn(seed: int, **options) -> tuple[Scene, Request, str]:
    rng = np.random.default_rng((5, seed))
    scene = draw_scene(rng, count=1 + seed % 3, **options)
    request = draw_request(scene, rng)
    return scene, request, write_caption(request, rng)


@pytest.fixture(scope="module")
def sprites() -> dict[str, Image.Image]:
    return DemoData().sprites


def test_a_seed_makes_the_same_scene_caption_and_picture(sprites):
    assert [drawn(seed) for seed in range(20)] == [drawn(seed) for seed in range(20)]
    scene = drawn(3)[0]
    first, second = np.array(render(scene, sprites)), np.array(render(scene, sprites))
    assert first.shape == (SIZE, SIZE, 3) and (first == second).all()
    assert (first != np.array(render(drawn(4)[0], sprites))).any()


def test_captions_are_true_and_say_what_their_request_says():
    for seed in SEEDS:
        scene, request, text = drawn(seed)
        assert request.accepts(scene), (request, scene)
        assert parse(text) == request, text
        assert parse(write_caption(request)) == request


def test_captions_fit_the_models_text_and_vocabulary():
    words, longest = set(caption_words()), 0
    for seed in SEEDS:
        said = drawn(seed)[2].replace(",", "").split()
        assert set(said) <= words
        longest = max(longest, len(said))
    hardest = Request(("birthday cake", "cat face", "red apple"), "purple", "gradient")
    assert max(longest, len(write_caption(hardest).split())) <= 14  # of 16 tokens two begin and end the text


@pytest.mark.parametrize(
    ("text", "request_"),
    [
        ("fox and pizza on a blue background", Request(("fox", "pizza"), "blue")),
        ("two owls on a shaded green background", Request(("owl", "owl"), "green", "gradient")),
        ("A fruit on a red background.", Request(("fruit",), "red")),
        ("something to eat", Request(("food",))),
        ("a picture of an owl on a shaded background", Request(("owl",), None, "gradient")),
        ("three foxes with a plain orange background", Request(("fox",) * 3, "orange", "plain")),
        ("fox, two strawberries", Request(("fox", "strawberry", "strawberry"))),
        ("something to eat with a plain background", Request(("food",), None, "plain")),
    ],
)
def test_captions_are_read(text, request_):
    assert parse(text) == request_


@pytest.mark.parametrize(
    "text",
    ["", "a dragon", "four owls", "owl on a turquoise background", "two owls and two foxes", "owl on background"],
)
def test_other_texts_are_no_captions(text):
    assert parse(text) is None


def test_a_request_accepts_what_it_says_and_nothing_else():
    def scene(*names: str, colour: str = "red", texture: str = "plain") -> Scene:
        return Scene(tuple(Thing(name, 0, 0, 100, False) for name in names), Background(colour, texture, 0))

    request = parse("fox and a fruit on a red background")
    assert request.accepts(scene("fox", "lemon")) and request.accepts(scene("banana", "fox", texture="gradient"))
    for wrong in (scene("fox"), scene("fox", "owl"), scene("lemon", "banana"), scene("fox", "lemon", "lemon")):
        assert not request.accepts(wrong)
    assert not request.accepts(scene("fox", "lemon", colour="blue"))
    # A wide term must not take the object that a narrow one needs, whatever their order.
    assert parse("something to eat and a fruit").accepts(scene("lemon", "pizza"))
    assert not parse("something to eat and a fruit").accepts(scene("owl", "lemon"))


def test_held_out_combinations_are_never_drawn_for_training_and_always_when_asked_for():
    for seed in SEEDS:
        scene, other = drawn(seed)[0], drawn(seed, from_held_out=True)[0]
        assert not held_out(scene.names, scene.background.colour)
        assert held_out(other.names, other.background.colour)


def test_a_tenth_of_the_pairs_is_held_out():
    pairs = list(combinations(OBJECTS, 2))
    assert sum(pair_held_out(*pair) for pair in pairs) == pytest.approx(len(pairs) / 10, rel=0.12)
    assert all(pair_held_out(a, b) == pair_held_out(b, a) for a, b in pairs[:200])
    assert not any(pair_held_out(name, name) for name in OBJECTS)
    colours = held_out_colours()
    assert list(colours) == list(OBJECTS)
    assert {list(colours.values()).count(colour) for colour in COLOURS} == {2, 3}


def test_the_bundled_model_has_pictures_of_all_objects():
    captions = DemoData().captions
    assert set(OBJECTS) <= set(captions["names"])
    assert {name: tuple(rgb) for name, rgb in captions["colours"].items()} == COLOURS


def test_one_object_fills_the_picture_and_several_have_a_quarter_each():
    places: dict[int, set[tuple]] = {1: set(), 2: set(), 3: set()}
    for seed in SEEDS:
        things = drawn(seed)[0].things
        places[len(things)].add(tuple((thing.left, thing.top, thing.side) for thing in things))
    assert places[1] == {((0, 0, SIZE),)}
    quarters = {(left, top, QUARTER) for left in (0, QUARTER) for top in (0, QUARTER)}
    for count in (2, 3):
        assert all(set(several) < quarters and len(set(several)) == count for several in places[count])
    assert len(places[2]) == 12 and len(places[3]) > 12


def test_scenes_for_a_request_are_what_it_says_and_differ():
    rng = np.random.default_rng(0)
    for text in ("two fruits on a shaded background", "an animal", "fox, owl and a vehicle on a blue background"):
        request = parse(text)
        scenes = [draw_scene_for(request, rng) for _ in range(30)]
        assert all(request.accepts(scene) for scene in scenes)
        assert len({scene.names for scene in scenes}) >= 3 and len({scene.background.seed for scene in scenes}) > 20


def test_prompts_are_of_held_out_and_trained_combinations_in_turn():
    prompts = scene_prompts(40)
    assert prompts == scene_prompts(40) and len({prompt.text for prompt in prompts}) > 35
    for prompt in prompts:
        assert parse(prompt.text) == prompt.request
    assert [prompt.held_out for prompt in prompts[:4]] == [True, False, True, False]
    named = [p for p in prompts if p.request.colour and all(term in OBJECTS for term in p.request.terms)]
    trained = [p for p in named if not p.held_out]
    assert trained and not any(held_out(p.request.terms, p.request.colour) for p in trained)
    assert any(held_out(p.request.terms, p.request.colour) for p in named if p.held_out)


def test_kinds_hold_known_objects_only():
    assert all(set(names) <= set(OBJECTS) for names in KINDS.values())
    assert not set(KINDS) & set(OBJECTS)


@pytest.mark.parametrize("texture", TEXTURES)
@pytest.mark.parametrize("colour", COLOURS)
def test_most_of_a_background_has_tones_of_its_colour(colour, texture):
    rgb = np.array(render_background(Background(colour, texture, 1)), dtype=float)
    base = np.array(COLOURS[colour])
    assert np.abs(rgb - base).max(axis=2).mean() < 55
    assert (rgb.std(axis=(0, 1)).max() > 4) == (texture != "plain")
    other = np.array(render_background(Background(colour, texture, 2)))
    assert (rgb == other).all() == (texture == "plain")
