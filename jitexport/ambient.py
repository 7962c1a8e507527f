"""What other code in the process has set, and must not decide here: modes, autocast, the default device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def plain(*, inference: bool = False) -> Iterator[None]:
    """Neither gradients, nor autocast, nor a default device; of this thread only.

    The default dtype belongs to the whole process: whatever makes tensors here names theirs.

    Args:
        inference: run in inference mode. Tensors made in it cannot be changed outside of it, so whatever goes out is
            made, and whatever stays is written, without.
    """
    with ExitStack() as stack:
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(torch.no_grad())
        yield
