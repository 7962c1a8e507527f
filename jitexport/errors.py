"""The exceptions that jitexport raises on purpose.

    JitExportError
    ├── ScheduleError               a schedule or speed-up that cannot be realised        (also ValueError)
    ├── InputError                  a call with arguments that the pipeline cannot take   (also ValueError)
    ├── NumericalError              an image that would not be finite numbers             (also ArithmeticError)
    ├── MissingDependencyError      a library is absent; the message names the extra      (also ImportError)
    ├── UnknownNameError            a model, method or backend that is not registered     (also ValueError)
    ├── ModelError
    │   ├── ModelNotFoundError      no such folder, or a hub that cannot be reached
    │   └── UnsupportedModelError   a folder that no model family recognises
    ├── BackendError
    │   ├── BackendUnavailableError this machine cannot run or build with the backend
    │   ├── CompileError            exporting or compiling an engine failed
    │   └── VerificationError       an engine disagrees with the eager module
    ├── OutputError                 a file, or standard output, that cannot be written
    ├── ResourceError               memory, threads or a temporary folder that the machine refused
    └── BundleError
        ├── BundleNotFoundError     no bundle at the path
        ├── BundleExistsError       the target of a build is in use
        ├── ManifestError           manifest.json is absent, malformed or of another format version
        ├── IntegrityError          the files are not the ones that the manifest declares
        │   ├── MissingFileError    a declared file is not there or cannot be read
        │   ├── UndeclaredFileError a file or folder that the manifest does not declare
        │   ├── UnsafeFileError     a link, a device, or another thing that is no plain file
        │   ├── SizeError           a file has another size
        │   └── DigestError         a file has another sha256
        ├── ArchiveError            a packed bundle that is damaged or would write outside its folder
        ├── TrustError              native engines from a hub, and nobody said that they are trusted
        └── HostMismatchError       the bundle was built for another machine or another torch

Every message says what was found, what was expected and what to do. `exit_code` is what the command line returns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class JitExportError(Exception):
    """Base of all errors of this package: what happened, what was found and expected, and the remedy."""

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        found: object | None = None,
        expected: object | None = None,
        remedy: str | None = None,
    ) -> None:
        self.message = message
        self.found = found
        self.expected = expected
        self.remedy = remedy
        lines = [message]
        if found is not None:
            lines.append(f"  found:    {_shown(found)}")
        if expected is not None:
            lines.append(f"  expected: {expected}")
        if remedy is not None:
            lines.append(f"  remedy:   {remedy}")
        super().__init__("\n".join(lines))


def _shown(found: object) -> str:
    """Never nothing: some exceptions, as MemoryError, have no text, and an empty text is seen by its quotes."""
    return str(found) or (type(found).__name__ if isinstance(found, BaseException) else repr(found))


class ScheduleError(JitExportError, ValueError):
    """A stage schedule, or a speed-up to solve one for, that cannot be realised."""

    exit_code = 2


class InputError(JitExportError, ValueError):
    """Arguments of a call that the pipeline or an engine cannot take."""

    exit_code = 2


class NumericalError(JitExportError, ArithmeticError):
    """NaN or infinity where an image should be; the message names the engine and the step where it began."""


class UnknownNameError(JitExportError, ValueError):
    """A model, method or backend name that is not registered."""

    exit_code = 2


class MissingDependencyError(JitExportError, ImportError):
    """An optional library is absent."""

    exit_code = 3


@contextmanager
def needed(what: str, extra: str) -> Iterator[None]:
    """Around what imports libraries of an extra.

    Args:
        what: what needs them, for the message.
        extra: by its name in pyproject.toml.

    Raises:
        MissingDependencyError: one is absent.
    """
    try:
        yield
    except ImportError as error:
        raise MissingDependencyError(what, found=error, remedy=f"pip install 'jitexport[{extra}]'") from error


class ModelError(JitExportError):
    """A model that cannot be read."""

    exit_code = 3


class ModelNotFoundError(ModelError):
    """No model at the path, and no hub that has it within reach."""


class UnsupportedModelError(ModelError):
    """A model that no registered family recognises."""


class BackendError(JitExportError):
    """A backend that cannot build or run an engine."""

    exit_code = 4


class BackendUnavailableError(BackendError):
    """This machine lacks what the backend needs."""


class CompileError(BackendError):
    """Exporting or compiling an engine failed."""


class VerificationError(BackendError):
    """An engine's output disagrees with the eager module's."""


class OutputError(JitExportError):
    """A file, or standard output, that cannot be written."""

    exit_code = 6


class ResourceError(JitExportError):
    """Memory, threads or a temporary folder that the machine or a limit refused. Nothing else is wrong."""

    exit_code = 7


class BundleError(JitExportError):
    """A bundle that cannot be written or trusted."""

    exit_code = 5


class BundleNotFoundError(BundleError):
    """No bundle at the path."""


class BundleExistsError(BundleError):
    """The target of a build already exists, or another build writes to it."""


class ManifestError(BundleError):
    """manifest.json is absent, malformed, or of a format version that this package does not read."""


class IntegrityError(BundleError):
    """The files of a bundle are not the ones that its manifest declares."""


class MissingFileError(IntegrityError):
    """A declared file is not there, or cannot be read."""


class UndeclaredFileError(IntegrityError):
    """A file or folder that the manifest does not declare."""


class UnsafeFileError(IntegrityError):
    """A link, a device, or another thing that is no plain file of its own."""


class SizeError(IntegrityError):
    """A file has another size than the manifest declares."""


class DigestError(IntegrityError):
    """A file has another sha256 than the manifest declares."""


class ArchiveError(BundleError):
    """A packed bundle that is damaged, or that holds what no bundle may hold."""


class TrustError(BundleError):
    """Engines from a hub are native code, and the caller did not say that their owner is trusted."""


class HostMismatchError(BundleError):
    """The bundle's engines were compiled for another machine or another version of their runtime."""
