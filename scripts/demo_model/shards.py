"""Shards: scenes of the demo model's training, drawn, encoded and ready for the transformer.

With workers, processes draw the pictures of the shards that come next, and a thread encodes them, while the present
one is trained on.
"""

import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline
from PIL import Image
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from jitexport.evaluate.scenes import Scene, draw_request, draw_scene, render, write_caption

TEXT_TOKENS = 16
CAPTIONS_A_SCENE = 4
SCENES_A_TASK = 32  # of a worker
SHARDS_AHEAD = 2

Key = tuple[int, int]  # of a shard: the stage's number, the shard's number in it
Drawn = tuple[np.ndarray, np.ndarray, np.ndarray]  # RGB [S, H, W, 3], numbers of words for T5 and for CLIP [S, V, T]


@dataclass
class Shard:
    """Scenes, ready for the transformer. S scenes, N tokens, C channels, V captions a scene, T words a caption."""

    latents: torch.Tensor  # [S, N, C]
    t5_ids: torch.Tensor  # [S, V, T]
    clip_ids: torch.Tensor  # [S, V, T]

    @cached_property
    def detail(self) -> torch.Tensor:
        """Log of the variance of the latents around each token: [S, N]."""
        return local_detail(self.latents)


# --- drawing ----------------------------------------------------------------------------------------------------------


def scene_and_captions(
    key: Sequence[int], count: int = CAPTIONS_A_SCENE, from_held_out: bool = False
) -> tuple[Scene, list[str]]:
    """The scene of a key, a tuple of numbers, and captions that are true of it."""
    rng = np.random.default_rng(list(key))
    scene = draw_scene(rng, from_held_out=from_held_out)
    return scene, [write_caption(draw_request(scene, rng), rng) for _ in range(count)]


def padding_tokenizer(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """What is inside of a tokenizer, set to captions of TEXT_TOKENS words: many times faster, and light to send."""
    fast = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    fast.enable_truncation(TEXT_TOKENS)
    fast.enable_padding(length=TEXT_TOKENS, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    return fast


def caption_ids(tokenizer: Tokenizer, captions: list[list[str]]) -> np.ndarray:
    """Numbers of the words of each scene's captions: [S, V, T]."""
    encoded = tokenizer.encode_batch([text for several in captions for text in several])
    return np.array([one.ids for one in encoded], dtype=np.int64).reshape(len(captions), -1, TEXT_TOKENS)


@dataclass(frozen=True)
class Artist:
    """Draws scenes; one is sent to each worker."""

    sprites: Mapping[str, Image.Image]
    t5: Tokenizer
    clip: Tokenizer

    def draw(
        self,
        keys: Sequence[tuple[int, ...]],
        captions: int = CAPTIONS_A_SCENE,
        from_held_out: bool = False,
    ) -> Drawn:
        """The scenes of some keys: pictures and their captions."""
        drawn = [scene_and_captions(key, captions, from_held_out) for key in keys]
        texts = [captions for _, captions in drawn]
        pictures = np.stack([np.array(render(scene, self.sprites)) for scene, _ in drawn])
        return pictures, caption_ids(self.t5, texts), caption_ids(self.clip, texts)


_artists: list[Artist] = []  # of this process, if it is a worker


def _start_worker(artist: Artist) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # workers are as many as there are cores
    _artists.append(artist)


def _work(keys: list[tuple[int, ...]]) -> Drawn:
    return _artists[0].draw(keys)


# --- making -----------------------------------------------------------------------------------------------------------


class ShardMaker:
    """Makes the shards of a run, each of `size` scenes.

    With `workers`, a shard that is asked for has the next ones made meanwhile.
    """

    def __init__(
        self, artist: Artist, encode: Callable[[Iterable[Drawn]], Shard], seed: int, size: int, workers: int = 0
    ):
        self.artist, self.encode, self.seed, self.size = artist, encode, seed, size
        self.pool: ProcessPoolExecutor | None = None
        if workers:
            # Forked, before the device is used: a process that imports the libraries itself takes up to a minute where
            # many do so at once. Drawing needs numpy, Pillow and tokenizers alone.
            self.pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start_worker, (artist,))
            self.pool.submit(os.getpid)  # starts them all
        self.thread = ThreadPoolExecutor(1)
        self.ordered: dict[Key, Future[Shard]] = {}
        self.made: tuple[Key, Shard] | None = None

    def __call__(self, key: Key) -> Shard:
        """A shard, as soon as it is there; the last one is kept."""
        if self.made is None or self.made[0] != key:
            self.made = None  # not two in memory
            stage, number = key
            if self.pool is None:
                self.made = key, self.encode(map(self.artist.draw, self._tasks(key)))
            else:
                self.ordered = {other: shard for other, shard in self.ordered.items() if other >= key}
                for following in range(number, number + 1 + SHARDS_AHEAD):
                    self.order((stage, following))
                self.made = key, self.ordered.pop(key).result()
        return self.made[1]

    def order(self, key: Key) -> None:
        """Have a shard made in the background, after those that were ordered before; needs workers."""
        if key not in self.ordered:
            drawn = self.pool.map(_work, self._tasks(key))
            self.ordered[key] = self.thread.submit(self.encode, drawn)

    def ready(self, key: Key) -> bool:
        """Whether asking for a shard would not wait for workers."""
        return self.pool is None or (key in self.ordered and self.ordered[key].done())

    def close(self) -> None:
        """End the workers; shards that are still being made are lost."""
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)
            self.thread.shutdown(wait=True, cancel_futures=True)

    def _tasks(self, key: Key) -> list[list[tuple[int, ...]]]:
        stage, number = key
        keys = [(self.seed, stage, index) for index in range(number * self.size, (number + 1) * self.size)]
        return [keys[start : start + SCENES_A_TASK] for start in range(0, len(keys), SCENES_A_TASK)]


# --- encoding ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode_shard(vae: AutoencoderKL, at_once: int, drawn: Iterable[Drawn]) -> Shard:
    """The shard of scenes that were drawn in parts, on the autoencoder's device; it takes `at_once` pictures."""
    latents, t5_ids, clip_ids = [], [], []
    for pictures, for_t5, for_clip in drawn:
        latents += [
            encode_pictures(vae, pictures[start : start + at_once]) for start in range(0, len(pictures), at_once)
        ]
        t5_ids.append(for_t5)
        clip_ids.append(for_clip)
    ids = (on_device(np.concatenate(numbers), vae.device) for numbers in (t5_ids, clip_ids))
    return Shard(torch.cat(latents), *ids)


def on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array as a tensor on a device, without waiting for what that has still to do."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: np.ndarray) -> torch.Tensor:
    """Normalised, packed latents of RGB pictures [B, H, W, 3]: [B, N, C], on the autoencoder's device."""
    pixels = on_device(pictures, vae.device).permute(0, 3, 1, 2).float() / 127.5 - 1  # [B, 3, H, W]
    latents = vae.encode(pixels).latent_dist.mode()
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    return FluxPipeline._pack_latents(latents, *latents.shape)


def local_detail(latents: torch.Tensor) -> torch.Tensor:
    """Log of the variance in the 3 x 3 tokens around each token, mean over channels: [P, N, C] -> [P, N]."""
    side = math.isqrt(latents.shape[1])
    grid = latents.transpose(1, 2).unflatten(2, (side, side))  # [P, C, H, W]

    def mean(x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

    variance = (mean(grid.square()) - mean(grid).square()).mean(1).flatten(1)
    return variance.clamp_min(1e-4).log()
