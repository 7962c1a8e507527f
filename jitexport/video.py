"""Frames of a video as an MP4 file, or as a folder of numbered PNG files."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from jitexport import machine
from jitexport.errors import InputError, MissingDependencyError, OutputError
from jitexport.files import write_file, write_folder
from jitexport.png import encode_png

#: Frames per second where nobody says otherwise: HunyuanVideo's.
FPS = 24
#: Encoders and their options, the first that the library has. H.264 plays everywhere; MPEG-4 part 2 nearly so.
ENCODERS = {
    "libx264": {"crf": "18", "preset": "medium"},  # differences to the frames are hard to see
    "mpeg4": {"flags": "+qscale", "global_quality": "236"},  # quantizer 2 of 31, in units of 118
}
_BT709 = 1  # of matrix, primaries and transfer function alike (ITU-T H.273)
_LIMITED = 1  # luma 16 to 235, which players expect


@dataclass(frozen=True)
class Frames:
    """Frames in one of the forms in which pipelines give them.

    Attributes:
        pixels: [F, H, W, 3] uint8, of torch or numpy; [F, 3, H, W] of torch in [0, 1] (`output_type` "pt");
            [F, H, W, 3] of numpy in [0, 1] ("np").

    Raises:
        InputError: another shape or type, no frames, or values outside [0, 1] (NaN included).
    """

    pixels: Tensor | np.ndarray

    def __post_init__(self) -> None:
        shape, channels = tuple(self.pixels.shape), self._channels
        if len(shape) != 4 or 0 in shape or shape[channels] != 3 or not (self._whole or self._floating):
            raise InputError(
                "no frames of a video", found=f"{type(self.pixels).__name__} {list(shape)} of {self.pixels.dtype}",
                expected="[F, H, W, 3] of uint8, or in [0, 1] a tensor [F, 3, H, W] or an array [F, H, W, 3]",
                remedy="give the frames of one video, without an axis of the batch",
            )
        if self._floating:
            low, high = self.pixels.min().item(), self.pixels.max().item()
            if not (low >= 0 and high <= 1):
                raise InputError(
                    "frames outside [0, 1]", found=f"{low:.4g} to {high:.4g}", expected="floating numbers in [0, 1]",
                    remedy="scale them, or give uint8",
                )

    def __len__(self) -> int:
        return len(self.pixels)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Each frame, [H, W, 3] uint8: only one at a time is converted."""
        for frame in self.pixels:
            if isinstance(frame, Tensor):
                frame = frame.detach().cpu()
                frame = (frame if self._whole else frame.float().permute(1, 2, 0)).numpy()
            yield frame if self._whole else (frame * 255).round().astype(np.uint8)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        shape = [n for axis, n in enumerate(self.pixels.shape) if axis not in (0, self._channels)]
        return shape[0], shape[1]

    @property
    def _whole(self) -> bool:
        return self.pixels.dtype in (torch.uint8, np.uint8)

    @property
    def _floating(self) -> bool:
        if isinstance(self.pixels, Tensor):
            return self.pixels.is_floating_point()
        return np.issubdtype(self.pixels.dtype, np.floating)

    @property
    def _channels(self) -> int:
        """The axis of colours."""
        return 1 if isinstance(self.pixels, Tensor) and not self._whole else 3


# --- MP4 -------------------------------------------------------------------------------------------------------------


def encode_mp4(frames: Tensor | np.ndarray, fps: float = FPS) -> bytes:
    """Frames as the bytes of an MP4 file: H.264 where the library has an encoder for it, in BT.709 colours.

    Colours are stored at half the resolution (4:2:0), which needs even sizes: of a frame with an odd number of rows or
    columns the last one is repeated.

    Args:
        frames: of one video, as `Frames` takes them.
        fps: frames per second.

    Raises:
        InputError: no frames, or no frame rate.
        MissingDependencyError: PyAV is not installed.
        OutputError: the encoder failed.
    """
    av = _av()
    pictures, rate = Frames(frames), _rate(fps)
    height, width = pictures.size
    stream = io.BytesIO()
    try:
        with av.open(stream, "w", format="mp4") as container:
            track = _track(av, container, rate, height + height % 2, width + width % 2)
            for number, picture in enumerate(pictures):
                frame = av.VideoFrame.from_ndarray(np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), "edge"))
                frame = frame.reformat(
                    format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG", threads=machine.cpus(),
                    interpolation=av.video.reformatter.Interpolation.BICUBIC
                    | av.video.reformatter.Interpolation.ACCURATE_RND,
                )
                frame.pts, frame.time_base = number, 1 / rate
                container.mux(track.encode(frame))
            container.mux(track.encode(None))  # what the encoder still holds
    except av.error.FFmpegError as error:
        raise OutputError(
            f"{len(pictures)} frames of {width} x {height} could not be encoded", found=error,
            expected="an encoder of PyAV that takes them", remedy="another size, or numbered PNG files",
        ) from error
    return stream.getvalue()


def write_mp4(path: Path, frames: Tensor | np.ndarray, fps: float = FPS) -> None:
    """Write frames as an MP4 file in one step: see `encode_mp4` and `files.write_file`.

    Raises:
        InputError, MissingDependencyError, OutputError: as there.
    """
    write_file(path, encode_mp4(frames, fps))


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise MissingDependencyError(
            "writing MP4 needs the library PyAV (av)", found=error,
            remedy="pip install 'jitexport[video]', or write numbered PNG files",
        ) from error
    return av


def _rate(fps: float) -> Fraction:
    """Frames per second as a fraction of small numbers; 23.976 and the like stay what they are.

    Raises:
        InputError: no positive number.
    """
    if math.isfinite(fps) and (rate := Fraction(fps).limit_denominator(1001)) > 0:
        return rate
    raise InputError("no frame rate", found=fps, expected="a positive number of frames per second")


def _track(av: Any, container: Any, rate: Fraction, height: int, width: int) -> Any:
    """A video stream of the first encoder that the library has."""
    encoder = next(name for name in ENCODERS if name in av.codecs_available)
    track = container.add_stream(encoder, rate=rate, options=ENCODERS[encoder])
    track.width, track.height, track.pix_fmt = width, height, "yuv420p"
    context = track.codec_context
    context.thread_count = machine.cpus()
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    context.color_range = _LIMITED
    return track


# --- numbered PNG files ----------------------------------------------------------------------------------------------


def frame_name(number: int) -> str:
    """The file of frame `number`, counted from 0; FFmpeg knows these names as frame-%04d.png."""
    return f"frame-{number:04d}.png"


def is_frame(name: str) -> bool:
    """Whether `frame_name` gives this name to some frame; only such files are replaced."""
    return re.fullmatch(r"frame-\d{4,}\.png", name) is not None


def write_frames(folder: Path, frames: Tensor | np.ndarray) -> list[Path]:
    """Write each frame as a PNG file into a folder, in one step: all frames are there, or what was before.

    The folder is made; one that is empty, or holds nothing but frames, is replaced.

    Returns:
        The files, in the frames' order.

    Raises:
        InputError: no frames, no parent folder, or a folder with other files.
        OutputError: the disk is full or cannot be written.
    """
    pictures = Frames(frames)
    content = ((frame_name(i), encode_png(Image.fromarray(picture))) for i, picture in enumerate(pictures))
    write_folder(folder, content, is_frame)
    return [folder / frame_name(i) for i in range(len(pictures))]
