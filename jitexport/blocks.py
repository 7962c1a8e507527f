"""A module's repeated blocks: the functions that it names as `regions`, and what makes two blocks alike.

See `jitexport.regions`, which compiles each kind once, and `jitexport.flops`, which counts each kind once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

#: What tells blocks of one make apart from others, beside their modules and tensors.
PLAIN = (bool, int, float, str, tuple, type(None))


def tensors_of(module: nn.Module, *, every_name: bool = False) -> dict[str, Tensor]:
    """Parameters and buffers by name; those with several names under the first one, or under each."""
    tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=not every_name))
    return tensors | dict(module.named_buffers(remove_duplicate=not every_name))


def make_of(block: nn.Module) -> Iterator[tuple[Any, ...]]:
    """What a block is made of: the names, classes and plain attributes of its modules, the names of its tensors."""
    for name, part in block.named_modules():
        plain = sorted((key, repr(value)) for key, value in vars(part).items() if isinstance(value, PLAIN))
        yield (name, type(part), *plain)
    yield tuple(tensors_of(block))


@contextmanager
def calls_through(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Calls of the module's regions go to function(name, region, block, *tensors)."""
    instance = vars(module)
    regions: Sequence[str] = module.regions  # type: ignore[assignment]  # names, of which torch knows nothing
    before = {name: instance[name] for name in regions if name in instance}

    def through(name: str, region: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: function(name, region, *given)

    instance |= {name: through(name, getattr(module, name)) for name in regions}
    try:
        yield
    finally:
        for name in regions:
            del instance[name]
        instance |= before
