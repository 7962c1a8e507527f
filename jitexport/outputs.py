"""Where images and videos are written: PNG files, MP4 files, and folders of frames."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jitexport.errors import InputError
from jitexport.files import check_writable, check_writable_folder, write_file
from jitexport.png import encode_png

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


def numbered(output: Path, count: int) -> list[Path]:
    """Where each of several images goes."""
    return [output if count == 1 else output.with_name(f"{output.stem}-{i}{output.suffix}") for i in range(count)]


def check_output(output: Path, frames: int | None, fps: float | None) -> None:
    """Refuse a file that an image, or a video of some frames, is not written to.

    Raises:
        InputError: the name's ending is of something else, or there are no frames a second in it.
    """
    kind = output.suffix.lower()
    if frames is None and kind != ".png":
        raise InputError("images are written as PNG", found=output.name, expected="a name that ends with .png")
    if frames is not None and kind not in (".mp4", ""):
        raise InputError(
            "videos are written as MP4, or as a folder of frames", found=output.name,
            expected="a name that ends with .mp4, or has no ending", remedy="-o video.mp4",
        )
    if fps is not None and kind != ".mp4":
        raise InputError("--fps is of MP4 files", found=output.name, remedy="leave it out")


def check_place(path: Path) -> None:
    """Find out whether `write_output` can write there.

    Raises:
        InputError, OutputError: it cannot; see `jitexport.files`.
    """
    if path.suffix:
        return check_writable(path)
    from jitexport import video

    check_writable_folder(path, video.is_frame)


def write_output(path: Path, image: Image.Image | Tensor, fps: float | None) -> None:
    """Write a PIL image as PNG, or a video's frames [F, 3, H, W] as MP4 or as a folder of PNG files.

    Raises:
        InputError, MissingDependencyError, OutputError: see `write_file` and `jitexport.video`.
    """
    from PIL.Image import Image as Picture

    if isinstance(image, Picture):
        return write_file(path, encode_png(image))
    from jitexport import video

    if path.suffix.lower() == ".mp4":
        return video.write_mp4(path, image, fps or video.FPS)
    video.write_frames(path, image)
