"""Where images and videos are written, and what is refused before."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jitexport.errors import InputError
from jitexport.outputs import check_output, check_place, numbered, write_output


def test_several_are_numbered():
    assert numbered(Path("a/fox.png"), 1) == [Path("a/fox.png")]
    assert numbered(Path("a/fox.png"), 2) == [Path("a/fox-0.png"), Path("a/fox-1.png")]
    assert numbered(Path("frames"), 2) == [Path("frames-0"), Path("frames-1")]


@pytest.mark.parametrize(
    ("name", "frames", "fps"), [("a.png", None, None), ("a.PNG", None, None), ("a.mp4", 9, 12.0), ("folder", 9, None)]
)
def test_endings_that_are_taken(name, frames, fps):
    check_output(Path(name), frames, fps)


@pytest.mark.parametrize(
    ("name", "frames", "fps", "said"),
    [
        ("a.jpg", None, None, "images are written as PNG"),
        ("a.mp4", None, None, "images are written as PNG"),
        ("a.png", 9, None, "videos are written as MP4"),
        ("a.png", None, 12.0, "--fps is of MP4 files"),
        ("folder", 9, 12.0, "--fps is of MP4 files"),
    ],
)
def test_endings_that_are_not(name, frames, fps, said):
    with pytest.raises(InputError, match=said):
        check_output(Path(name), frames, fps)


def test_an_image_is_a_file_and_frames_are_a_folder(tmp_path):
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    video = torch.rand(3, 3, 4, 6)
    for path, content in ((tmp_path / "a.png", image), (tmp_path / "frames", video)):
        check_place(path)
        write_output(path, content, None)
    assert np.array_equal(np.array(Image.open(tmp_path / "a.png")), np.array(image))
    frames = sorted((tmp_path / "frames").iterdir())
    assert len(frames) == 3 and {Image.open(path).size for path in frames} == {(6, 4)}


def test_a_video_is_an_mp4_at_its_rate(tmp_path):
    av = pytest.importorskip("av")
    write_output(tmp_path / "a.mp4", torch.rand(3, 3, 16, 32), 12.0)
    with av.open(str(tmp_path / "a.mp4")) as file:
        (track,) = file.streams.video
        assert (track.frames, float(track.average_rate), track.width, track.height) == (3, 12.0, 32, 16)


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    for path in (tmp_path / "none" / "a.png", tmp_path / "none" / "frames", tmp_path / "mine"):
        with pytest.raises(InputError):
            check_place(path)
