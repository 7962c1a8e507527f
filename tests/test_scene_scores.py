"""The finder and the scores: right on true scenes, and wrong where the picture is."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from jitexport.evaluate.demo import DemoData
from jitexport.evaluate.finder import Finder
from jitexport.evaluate.scene_scores import SceneFeatures, band_energies, diversity, most_matched, score
from jitexport.evaluate.scene_words import TEXTURES
from jitexport.evaluate.scenes import Background, Scene, Thing, draw_scene_for, parse, render

NAMES = ("fox", "pizza", "owl", "lemon", "guitar", "panda")


@pytest.fixture(scope="module")
def sprites() -> dict[str, Image.Image]:
    sprites = DemoData().sprites
    return {name: sprites[name] for name in NAMES}


@pytest.fixture(scope="module")
def finder(sprites) -> Finder:
    return Finder(sprites)


def scene(*things: Thing, colour: str = "blue", texture: str = "plain") -> Scene:
    return Scene(things, Background(colour, texture, 3))


FOX, PIZZA = Thing("fox", 8, 12, 110, False), Thing("pizza", 128, 120, 124, True)
OWL = Thing("owl", 140, 4, 104, False)
TWO = "fox and pizza on a blue background"


def test_objects_are_found_where_they_are(finder, sprites):
    seen = finder(render(scene(FOX, PIZZA), sprites))
    assert seen.names == ("fox", "pizza") and seen.colour == "blue" and seen.texture == "plain"
    assert seen.unexplained < 0.01
    for found in seen.objects:
        true = FOX if found.thing.name == "fox" else PIZZA
        assert found.thing.mirrored == true.mirrored
        assert (found.thing.left, found.thing.top, found.thing.side) == pytest.approx(
            (true.left, true.top, true.side), abs=8
        )


@pytest.mark.parametrize("texture", TEXTURES)
def test_backgrounds_are_told(finder, sprites, texture):
    for colour in ("white", "black", "green", "orange"):
        seen = finder(render(scene(FOX, OWL, colour=colour, texture=texture), sprites))
        assert (seen.names, seen.colour, seen.texture) == (("fox", "owl"), colour, texture)


def test_a_right_picture_has_full_marks(finder, sprites):
    result = score(finder, parse(TWO), render(scene(FOX, PIZZA), sprites))
    assert result.right and result.objects == 1 and result.count_right and result.clean
    assert result.colour_right is True and result.texture_right is None
    assert result.sharpness == pytest.approx(1, abs=0.1)


def test_what_is_missing_or_too_much_is_seen(finder, sprites):
    missing = score(finder, parse(TWO), render(scene(FOX), sprites))
    assert missing.objects == 0.5 and not missing.count_right and missing.clean and not missing.right
    more = score(finder, parse(TWO), render(scene(FOX, PIZZA, OWL), sprites))
    assert more.objects == 1 and not more.count_right and not more.clean and not more.right
    other = score(finder, parse(TWO), render(scene(FOX, OWL), sprites))
    assert other.objects == 0.5 and other.count_right and not other.clean
    twice = score(finder, parse("two foxes"), render(scene(FOX, Thing("fox", 140, 120, 104, True)), sprites))
    assert twice.right
    assert not score(finder, parse("two foxes"), render(scene(FOX, PIZZA), sprites)).right


def test_wrong_backgrounds_are_seen(finder, sprites):
    request = parse("fox and pizza on a shaded blue background")
    assert score(finder, request, render(scene(FOX, PIZZA, texture="gradient"), sprites)).right
    assert score(finder, request, render(scene(FOX, PIZZA, texture="plain"), sprites)).texture_right is False
    assert score(finder, request, render(scene(FOX, PIZZA, colour="red"), sprites)).colour_right is False


def test_unknown_things_and_blends_are_not_clean(finder, sprites):
    picture = render(scene(FOX, PIZZA), sprites)
    ImageDraw.Draw(picture).ellipse((150, 10, 240, 90), fill=(20, 120, 40))
    assert not score(finder, parse(TWO), picture).clean
    blend = Image.blend(render(scene(FOX), sprites), render(scene(Thing("guitar", 8, 12, 110, False)), sprites), 0.5)
    result = score(finder, parse("fox"), blend)
    assert not result.right


def test_noise_holds_no_objects(finder):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8))
    assert finder(noise).names == ()


def test_blur_lowers_sharpness_and_fine_structure(finder, sprites):
    picture = render(scene(FOX, PIZZA), sprites)
    soft = picture.filter(ImageFilter.GaussianBlur(3))
    assert score(finder, parse(TWO), soft).sharpness < 0.85
    assert band_energies(soft)[0] < band_energies(picture)[0] - 0.5
    assert band_energies(soft)[3] == pytest.approx(band_energies(picture)[3], abs=0.15)


def test_narrow_terms_come_before_wide_ones():
    assert most_matched(["lemon", "pizza"], ["food", "fruit"]) == 2
    assert most_matched(["fox", "lemon"], ["food", "fruit"]) == 1
    assert most_matched([], ["fox"]) == 0
    assert most_matched(["fox", "fox", "owl"], ["fox"]) == 1


def test_open_prompts_are_more_diverse_than_one_picture(sprites):
    features = SceneFeatures()
    rng = np.random.default_rng(0)
    all_sprites = DemoData().sprites
    scenes = [draw_scene_for(parse("something to eat on a red background"), rng) for _ in range(4)]
    open_ = np.stack([features(render(one, all_sprites)) for one in scenes])
    same = np.stack([open_[0]] * 4)
    assert diversity(same[None]) == 0 < diversity(open_[None])
