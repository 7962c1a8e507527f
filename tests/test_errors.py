import inspect

import pytest

from jitexport import errors
from jitexport.errors import JitExportError

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, JitExportError)]


def test_message_says_what_was_found_what_was_expected_and_what_to_do():
    error = errors.InputError("bad size", found=3, expected="4", remedy="pass 4")
    assert str(error).splitlines() == ["bad size", "  found:    3", "  expected: 4", "  remedy:   pass 4"]
    assert (error.message, error.found, error.expected, error.remedy) == ("bad size", 3, "4", "pass 4")


def test_parts_that_are_not_given_take_no_line():
    assert str(JitExportError("only this")) == "only this"


def test_falsy_findings_are_shown():
    assert "found:    0" in str(JitExportError("no tokens", found=0))


@pytest.mark.parametrize(
    ("name", "parents", "exit_code"),
    [
        ("ScheduleError", (ValueError,), 2),
        ("InputError", (ValueError,), 2),
        ("NumericalError", (ArithmeticError,), 1),
        ("UnknownNameError", (ValueError,), 2),
        ("MissingDependencyError", (ImportError,), 3),
        ("ModelNotFoundError", (errors.ModelError,), 3),
        ("UnsupportedModelError", (errors.ModelError,), 3),
        ("BackendUnavailableError", (errors.BackendError,), 4),
        ("CompileError", (errors.BackendError,), 4),
        ("VerificationError", (errors.BackendError,), 4),
        ("BundleNotFoundError", (errors.BundleError,), 5),
        ("BundleExistsError", (errors.BundleError,), 5),
        ("ManifestError", (errors.BundleError,), 5),
        ("IntegrityError", (errors.BundleError,), 5),
        ("HostMismatchError", (errors.BundleError,), 5),
    ],
)
def test_tree_and_exit_codes(name, parents, exit_code):
    error = getattr(errors, name)
    assert all(issubclass(error, parent) for parent in (JitExportError, *parents))
    assert error.exit_code == exit_code


def test_the_drawn_tree_names_every_class():
    assert {c.__name__ for c in CLASSES} == {word for word in errors.__doc__.split() if word in dir(errors)}


@pytest.mark.parametrize("error", CLASSES, ids=lambda c: c.__name__)
def test_every_class_takes_the_same_parts(error):
    assert "remedy:   r" in str(error("m", found="f", expected="e", remedy="r"))
