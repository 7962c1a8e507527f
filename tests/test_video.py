"""Videos are read back: frames, sizes, rate, colours. They are written whole or not at all."""

import io
import os
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from jitexport import files, video
from jitexport.errors import InputError, MissingDependencyError, OutputError
from jitexport.files import check_writable_folder
from jitexport.video import encode_mp4, frame_name, is_frame, write_frames, write_mp4
from tests.test_files import in_namespace, unchangeable

av = pytest.importorskip("av")

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (128, 128, 128), (255, 200, 40)]


def patches(frames=5, height=32, width=112):
    """Fields of plain colours, which move by one field a frame: [F, H, W, 3] uint8."""
    row = np.repeat(np.array(COLOURS, dtype=np.uint8), -(-width // len(COLOURS)), axis=0)[:width]
    return np.stack([np.broadcast_to(np.roll(row, 16 * i, axis=0), (height, width, 3)) for i in range(frames)])


def read(data):
    """All frames as [F, H, W, 3], converted as the file says that they are, and the stream's properties."""
    with av.open(io.BytesIO(data)) as container:
        track = container.streams.video[0]
        frames = list(container.decode(track))
        context = track.codec_context
        pixels = [f.to_ndarray(format="rgb24", src_colorspace="ITU709", src_color_range="MPEG") for f in frames]
        about = {
            "codec": context.name, "format": context.pix_fmt, "rate": track.average_rate,
            "times": [f.time for f in frames], "streams": len(container.streams),
            "colours": (context.colorspace, context.color_primaries, context.color_trc, context.color_range),
        }  # fmt: skip
    return np.stack(pixels), about


@pytest.mark.parametrize("fps", [24, 23.976, 30.0, 12])
def test_an_mp4_holds_every_frame_at_its_time(fps):
    pixels = patches()
    found, about = read(encode_mp4(pixels, fps))
    assert found.shape == pixels.shape and about["streams"] == 1
    assert (about["codec"], about["format"]) == ("h264", "yuv420p")
    assert float(about["rate"]) == pytest.approx(fps, rel=1e-6)
    times = np.array(about["times"])
    assert times - times[0] == pytest.approx(np.arange(5) / fps, abs=1e-4)


def test_24_frames_per_second_by_default():
    assert read(encode_mp4(patches(2)))[1]["rate"] == Fraction(24)


def test_colours_come_back_and_the_file_says_how_they_are_meant():
    """The middle of each field, where neither the coarser colours nor the edges of neighbours reach."""
    pixels = patches()
    found, about = read(encode_mp4(pixels))
    assert about["colours"] == (1, 1, 1, 1)  # BT.709 throughout, limited range
    middle = np.s_[:, 8:24, 8::16]
    assert np.abs(found[middle].astype(int) - pixels[middle]).max() <= 6


def test_detail_comes_back():
    """Smooth structure that moves, as of a picture and not of a test card."""
    x, y, t = np.arange(96), np.arange(64)[:, None], np.arange(8)[:, None, None]
    wave = 127.5 + 100 * np.sin((x + 2 * t) / 9) * np.cos(y / 7)
    pixels = np.stack([wave, wave * 0.8 + 10, wave * 0.6 + 60], axis=-1).round().astype(np.uint8)
    assert np.abs(read(encode_mp4(pixels))[0].astype(float) - pixels).mean() < 2


@pytest.mark.parametrize(("height", "width"), [(31, 33), (31, 32), (32, 33), (1, 1)])
def test_odd_sizes_repeat_the_last_row_or_column(height, width):
    pixels = np.full((3, height, width, 3), 90, dtype=np.uint8)
    pixels[:, :, -1] = 200
    found, _ = read(encode_mp4(pixels))
    assert found.shape == (3, height + height % 2, width + width % 2, 3)
    assert np.abs(found[:, :height, -1].astype(int) - 200).max() <= 6
    assert found[:, -1, 0].mean() == pytest.approx(found[:, height - 1, 0].mean(), abs=3)


def test_all_forms_of_frames_make_the_same_file(tmp_path):
    pixels = patches()
    floats = pixels.astype(np.float32) / 255
    forms = [
        torch.tensor(pixels), torch.tensor(floats).permute(0, 3, 1, 2), floats,
        torch.tensor(floats, dtype=torch.float64).permute(0, 3, 1, 2).requires_grad_(),
    ]  # fmt: skip
    expected = encode_mp4(pixels)
    for form in forms:
        assert encode_mp4(form) == expected
        for path, picture in zip(write_frames(tmp_path / "frames", form), pixels, strict=True):
            assert np.array_equal(np.array(Image.open(path)), picture)


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((4, 8, 8), np.uint8), np.zeros((0, 8, 8, 3), np.uint8), np.zeros((4, 8, 8, 4), np.uint8),
        np.zeros((4, 8, 8, 3), np.int64), torch.zeros(4, 8, 8, 3), torch.zeros(1, 4, 3, 8, 8),
    ],
)  # fmt: skip
def test_what_are_no_frames_is_refused(frames, tmp_path):
    for write in (lambda: write_mp4(tmp_path / "a.mp4", frames), lambda: write_frames(tmp_path / "a", frames)):
        with pytest.raises(InputError, match="no frames of a video") as caught:
            write()
        assert str(list(frames.shape)) in caught.value.found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [-0.01, 1.5, float("nan")])
def test_values_that_are_no_colours_are_refused(value):
    frames = torch.zeros(2, 3, 8, 8)
    frames[1, 2, 3, 4] = value
    with pytest.raises(InputError, match=r"outside \[0, 1\]"):
        encode_mp4(frames)


@pytest.mark.parametrize("fps", [0, -24, float("nan"), float("inf"), 1e-9])
def test_what_is_no_frame_rate_is_refused(fps):
    with pytest.raises(InputError, match="no frame rate"):
        encode_mp4(patches(1), fps)


def test_without_the_library(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingDependencyError, match=r"jitexport\[video\]"):
        write_mp4(tmp_path / "a.mp4", patches(1))
    assert list(tmp_path.iterdir()) == []
    assert len(write_frames(tmp_path / "frames", patches(2))) == 2  # needs nothing more


def test_without_h264_mpeg4_is_taken(monkeypatch):
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    pixels = patches()
    found, about = read(encode_mp4(pixels))
    middle = np.s_[:, 8:24, 8::16]
    assert about["codec"] == "mpeg4" and about["rate"] == 24 and found.shape == pixels.shape
    assert np.abs(found[middle].astype(int) - pixels[middle]).max() <= 8


def test_an_encoder_that_fails_says_so_and_writes_nothing(monkeypatch, tmp_path):
    monkeypatch.setitem(video.ENCODERS, "libx264", {"crf": "18", "preset": "nonesuch"})
    with pytest.raises(OutputError, match="could not be encoded"):
        write_mp4(tmp_path / "a.mp4", patches(1))
    assert list(tmp_path.iterdir()) == []


def full_after(monkeypatch, times):
    """A disk that has no room for what comes after so many files."""
    calls = []

    def sync(handle):
        calls.append(handle)
        if len(calls) > times:
            raise OSError(28, os.strerror(28))

    monkeypatch.setattr(files, "sync", sync)


def test_an_mp4_is_written_over_in_one_step(monkeypatch, tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    with monkeypatch.context() as patched:
        full_after(patched, 0)
        with pytest.raises(OutputError, match="No space left"):
            write_mp4(path, patches(1))
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.mp4"]
    write_mp4(path, patches(3), 10)
    found, about = read(path.read_bytes())
    assert len(found) == 3 and about["rate"] == 10 and os.listdir(tmp_path) == ["a.mp4"]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("atomic", [True, False])
def test_frames_replace_frames_in_one_step(monkeypatch, tmp_path, atomic):
    if not atomic:
        monkeypatch.setattr(files, "exchange", lambda a, b: False)
    folder = tmp_path / "clip"
    write_frames(folder, patches(4))
    before = contents(folder)
    assert sorted(before) == [frame_name(i) for i in range(4)] == [f"frame-000{i}.png" for i in range(4)]
    with monkeypatch.context() as patched:
        full_after(patched, 2)
        with pytest.raises(OutputError, match="No space left"):
            write_frames(folder, 255 - patches(4))
    assert contents(folder) == before and os.listdir(tmp_path) == ["clip"]
    write_frames(folder, 255 - patches(3))
    assert sorted(contents(folder)) == [frame_name(i) for i in range(3)] and os.listdir(tmp_path) == ["clip"]
    assert np.array_equal(np.array(Image.open(folder / frame_name(2))), 255 - patches(3)[2])


def test_an_empty_folder_and_a_link_to_one(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert all(path.exists() for path in write_frames(tmp_path / "link", patches(2)))
    assert (tmp_path / "link").is_symlink() and len(contents(tmp_path / "real")) == 2


@pytest.mark.parametrize("stray", ["notes.txt", "frame-1.png", "frame-0000.png.bak"])
def test_folders_with_other_files_are_left_alone(tmp_path, stray):
    write_frames(tmp_path / "clip", patches(2))
    (tmp_path / "clip" / stray).write_text("mine")
    before = contents(tmp_path / "clip")
    with pytest.raises(InputError, match="holds other files") as caught:
        write_frames(tmp_path / "clip", patches(3))
    assert caught.value.found == stray and contents(tmp_path / "clip") == before


def test_what_is_no_folder_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="expected: a folder"):
        check_writable_folder(tmp_path / "file", is_frame)
    with pytest.raises(InputError, match="no such folder"):
        check_writable_folder(tmp_path / "none" / "clip", is_frame)
    with pytest.raises(OutputError, match="too long"):
        check_writable_folder(tmp_path / ("a" * 256), is_frame)
    check_writable_folder(tmp_path / "clip", is_frame)
    assert os.listdir(tmp_path) == ["file"]


def test_names_of_frames_sort_and_count_on():
    assert frame_name(12345) == "frame-12345.png" and is_frame(frame_name(12345)) and is_frame(frame_name(0))
    assert not is_frame("frame-0000.png\n") and not is_frame("a-frame-0000.png")


WRITE = """
import sys
from pathlib import Path
import numpy as np
from jitexport.errors import OutputError
from jitexport.video import write_frames, write_mp4
frames = np.random.default_rng(0).integers(0, 256, (24, 64, 64, 3), dtype=np.uint8)
for write, name in ((write_mp4, "a.mp4"), (write_frames, "clip")):
    try:
        write(Path(sys.argv[1]) / name, frames)
    except OutputError as error:
        print(name, error.found)
"""


def test_a_full_disk_keeps_nothing_half_written(tmp_path):
    """Room for two frames of 24, and for a part of the MP4."""
    script, place = tmp_path / "write.py", tmp_path / "full"
    script.write_text(WRITE)
    place.mkdir()
    done = in_namespace(
        f"mount -t tmpfs -o size=40k none '{place}'\nprintf old > '{place}/a.mp4'",
        f"'{sys.executable}' '{script}' '{place}'; ls -A '{place}'; cat '{place}/a.mp4'",
    )
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["a.mp4", "clip", "a.mp4", "old"], done.stderr
    assert all("No space left" in line for line in lines[:2])


def test_a_folder_without_the_right_to_write_is_refused_before_the_work(tmp_path):
    (tmp_path / "locked").mkdir()
    with unchangeable(tmp_path / "locked"), pytest.raises(OutputError, match="not permitted"):
        check_writable_folder(tmp_path / "locked" / "clip", is_frame)
