"""Prompts, their seeds, and where their images go: the layouts that GenEval's and T2I-CompBench's own tools read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jitexport.errors import InputError

#: GenEval makes 4 images a prompt, T2I-CompBench (in the JiT paper's set-up, B.5) one.
GENEVAL_SEEDS = 4

#: Image j of prompt i of a file has seed SEED_STRIDE * i + j: another noise for each image, whatever else is asked for.
SEED_STRIDE = 1000

#: For models other than the demo where no file is given.
BUILT_IN = (
    "a red fox asleep in fresh snow, morning light",
    "two blue cups and a yellow teapot on a wooden table",
    "an old lighthouse on a cliff above a stormy sea",
    "a shop window with the words OPEN LATE in neon letters",
    "a close portrait of an elderly fisherman with a grey beard",
    "a green bicycle leaning against a white brick wall",
    "a bowl of ramen with a halved egg, seen from above",
    "a narrow street in the rain at night, reflections of lanterns",
    "a paper model of a castle on a desk full of tools",
    "a hummingbird in front of a purple flower, shallow depth of field",
    "three hot-air balloons over a valley with morning fog",
    "a watercolour of a harbour with five sailing boats",
)

_LONGEST_NAME = 180  # characters of a prompt in a file name; file systems allow 255 bytes


@dataclass(frozen=True)
class Prompt:
    """A prompt and the seeds of its images. `line` is the prompt file's own line."""

    text: str
    seeds: tuple[int, ...]
    line: str = ""


@dataclass(frozen=True)
class PromptSet:
    """Prompts with as many seeds each, and the layout of their images.

    Attributes:
        name: file or built-in list that they are from.
        layout: "geneval": 00000/samples/0000.png beside 00000/metadata.jsonl; "t2i-compbench":
            samples/<prompt>_000000.png.
    """

    name: str
    layout: Literal["geneval", "t2i-compbench"]
    prompts: tuple[Prompt, ...]

    def __post_init__(self) -> None:
        if not self.prompts:
            raise InputError("no prompts", found=self.name, expected="at least one")

    @property
    def seeds(self) -> int:
        """Images of each prompt."""
        return len(self.prompts[0].seeds)

    @property
    def images(self) -> int:
        """Images in all."""
        return len(self.prompts) * self.seeds

    def __iter__(self) -> Iterator[tuple[str, int, str]]:
        """(prompt, seed, relative path of the image) of every image; the seeds of a prompt are neighbours."""
        for i, prompt in enumerate(self.prompts):
            for j, seed in enumerate(prompt.seeds):
                if self.layout == "geneval":
                    path = f"{i:05}/samples/{j:04}.png"
                else:
                    name = prompt.text[:_LONGEST_NAME].replace("/", " ").replace("\0", " ")
                    path = f"samples/{name}_{i * self.seeds + j:06}.png"
                yield prompt.text, seed, path

    def write_metadata(self, folder: Path) -> None:
        """What a scoring tool wants beside the images: GenEval's line of each prompt."""
        if self.layout != "geneval":
            return
        for i, prompt in enumerate(self.prompts):
            path = folder / f"{i:05}" / "metadata.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(prompt.line, encoding="utf-8")


def read_prompts(path: Path, *, limit: int | None = None, seeds: int | None = None) -> PromptSet:
    """Prompts of a file.

    `.jsonl` is GenEval's format: an object with "prompt" on each line, which is kept for its scoring tool. Anything
    else is text with one prompt a line, as T2I-CompBench has it: what follows a tab is not part of the prompt.

    Args:
        limit: take that many of the file's prompts, from its beginning.
        seeds: images of each prompt; 4 for GenEval, 1 otherwise, by default.

    Raises:
        InputError: no such file, or not in its format.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read prompts from {path}", found=error,
            expected="a text file with one prompt a line, or GenEval's evaluation_metadata.jsonl",
        ) from error
    geneval = path.suffix == ".jsonl"
    texts = [_geneval_prompt(path, n, line) if geneval else line.split("\t")[0].strip() for n, line in enumerate(lines)]
    return prompt_set(
        path.name, texts[:limit], lines=lines[:limit] if geneval else None,
        seeds=seeds or (GENEVAL_SEEDS if geneval else 1),
    )


def _geneval_prompt(path: Path, number: int, line: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path}, line {number + 1} is not GenEval's format", found=f"{type(error).__name__}: {error}",
            expected='a JSON object with "prompt" on every line',
        ) from None
    if not isinstance(prompt, str) or not prompt:
        raise InputError(f"{path}, line {number + 1} has no prompt", found=repr(prompt), expected="a text")
    return prompt


def prompt_set(name: str, texts: list[str], *, lines: list[str] | None = None, seeds: int = 1) -> PromptSet:
    """Prompts with the seeds that their places give them; `lines` makes it a GenEval set."""
    if seeds < 1 or seeds > SEED_STRIDE:
        raise InputError("images per prompt out of range", found=seeds, expected=f"1 to {SEED_STRIDE}")
    prompts = tuple(
        Prompt(text, tuple(SEED_STRIDE * i + j for j in range(seeds)), lines[i] if lines else "")
        for i, text in enumerate(texts)
    )
    return PromptSet(name, "geneval" if lines else "t2i-compbench", prompts)
