"""Prompts as token ids: templates, padding, cutting, and what a tokenizer reads of a prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer as FastTokenizer
from torch import Tensor

#: Text in straight or curly double quotes.
QUOTED = re.compile(r'"(.*?)"|“(.*?)”')


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as its `tokenizers` JSON, which pads and cuts to `length`, and what it is given.

    Attributes:
        name: its folder in the pipeline.
        length: tokens that the text engine takes.
        template: what stands around a prompt, with {} in its place.
        empty: what stands for a prompt without text.
        quoted: whether it reads only what a prompt has in quotation marks, each as `Text "..."`; nothing where there
            is none.
        mask: whether the text engine also takes which tokens are not padding, as its next input.
    """

    name: str
    json: str
    length: int
    template: str = "{}"
    empty: str = ""
    quoted: bool = False
    mask: bool = False

    def reader(self) -> Reader:
        """What encodes prompts."""
        return Reader(self, FastTokenizer.from_str(self.json))


@dataclass(frozen=True)
class Encoded:
    """Token ids [B, L], int64, 1 where they are no padding and 0 elsewhere [B, L], and the prompts that were cut."""

    ids: Tensor
    mask: Tensor
    cut: Sequence[str]


@dataclass(frozen=True)
class Reader:
    """A tokenizer that is ready to encode."""

    tokenizer: Tokenizer
    fast: FastTokenizer

    def text(self, prompt: str) -> str:
        """What the tokenizer is given for a prompt."""
        tokenizer = self.tokenizer
        if tokenizer.quoted:
            prompt = "".join(f'Text "{text}". ' for text in dict.fromkeys(a or b for a, b in QUOTED.findall(prompt)))
        before, _, after = tokenizer.template.partition("{}")
        return f"{before}{prompt or tokenizer.empty}{after}"

    def encode(self, prompts: Sequence[str]) -> Encoded:
        """Ids and masks of prompts."""
        texts = [self.text(prompt) for prompt in prompts]
        encodings = self.fast.encode_batch(texts)
        cut = [prompt for prompt, encoding in zip(prompts, encodings, strict=True) if encoding.overflowing]
        ids, mask = (
            torch.tensor([getattr(e, part) for e in encodings], dtype=torch.int64, device="cpu")
            for part in ("ids", "attention_mask")
        )
        if self.tokenizer.quoted:  # without quotations not even the end of a text
            mask = mask * torch.tensor([[bool(text)] for text in texts], device="cpu")
        return Encoded(ids, mask, cut)
