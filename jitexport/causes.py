"""What the machine refused, behind what a library made of it: memory, threads, a temporary folder.

Libraries wrap such errors in their own, or only quote their words; without a look behind them a bundle that is whole
would be called damaged because memory ran out.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from jitexport.errors import JitExportError, ResourceError

#: Words of the C library, C++, PyTorch's allocator, GCC, the dynamic linker, safetensors and CUDA.
_MEMORY = (
    "Cannot allocate memory", "can't allocate memory", "out of memory", "std::bad_alloc", "bad allocation",
    "virtual memory exhausted", "MemoryError", "Killed signal terminated program", "failed to map segment",
    "cannot enable executable stack", "memory allocation of",
)  # fmt: skip
_THREADS = ("can't start new thread", "Resource temporarily unavailable")
_NO_TEMPORARY = "No usable temporary directory"
_MOST_WORDS = 300


@contextmanager
def explained(doing: str) -> Iterator[None]:
    """Turn errors that come from the machine's limits into ones that say so.

    Args:
        doing: what is done inside, as "loading the bundle".

    Raises:
        ResourceError: memory, threads or a temporary folder were refused.
    """
    try:
        yield
    except ResourceError:
        raise
    except Exception as error:
        if (made := resource_error(error, doing)) is not None:
            raise made from error
        raise


def resource_error(error: BaseException, doing: str) -> ResourceError | None:
    """The machine's refusal behind an error; None where there is none."""
    for link in chain(error):
        words = str(link)  # of this package's errors: with what was found
        number = link.errno if isinstance(link, OSError) else None
        if isinstance(link, MemoryError) or number == errno.ENOMEM or (line := _line(words, _MEMORY)):
            found = _line(words, _MEMORY) or words or type(link).__name__
            return ResourceError(
                f"memory ran out while {doing}", found=found[:_MOST_WORDS],
                expected="enough memory for the model, and for each compiler about 1 GB more",
                remedy="build with --jobs 1; or give the process more memory (ulimit -v, the container's limit)",
            )
        if line := _line(words, _THREADS):
            return ResourceError(
                f"the system refused a thread or process while {doing}", found=line[:_MOST_WORDS],
                remedy="raise the limit of processes (ulimit -u, the container's pids) or of memory (ulimit -v)",
            )
        if isinstance(link, FileNotFoundError) and (line := _line(words, (_NO_TEMPORARY,))):
            return ResourceError(
                f"there is no temporary folder, which was needed while {doing}", found=line[:_MOST_WORDS],
                expected="a writable folder",
                remedy="set TMPDIR to one, or mount one at /tmp (docker run --tmpfs /tmp)",
            )
    return None


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on; also errors that are told as what was found."""
    seen: list[BaseException] = []
    waiting = [error]
    while waiting:
        link = waiting.pop(0)
        if any(link is other for other in seen):
            continue
        seen.append(link)
        yield link
        found = link.found if isinstance(link, JitExportError) else None
        waiting += [e for e in (link.__cause__, link.__context__, found) if isinstance(e, BaseException)]


def _line(words: str, marks: tuple[str, ...]) -> str:
    """The first line with one of the marks in it."""
    return next((line.strip() for line in words.splitlines() if any(mark in line for mark in marks)), "")
