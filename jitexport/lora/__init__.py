"""Adapters, merged into the shared weights: W + scale * alpha / r * B A, and what else trainers write.

Merged weights cost nothing per step, and no engine is built again.

    read_adapter   files, folders and state dicts -> tensors and settings   (reading)
    collect        keys -> parts of changes, by the modules they belong to  (parts, with the family's names)
    changes        parts -> changes of weights, each with its own delta     (changes, strengths)

Nothing is dropped: a key that is not understood is refused by its name.
"""

from jitexport.lora.changes import Change
from jitexport.lora.merging import read_lora

__all__ = ["Change", "read_lora"]
