"""All scripts: what they import exists, and names are unique, by which they and the tests find each other."""

import sys
from collections import Counter

import pytest

from tests.scripting import SCRIPTS, script

FILES = sorted(p.relative_to(SCRIPTS).with_suffix("") for p in SCRIPTS.rglob("*.py"))


def test_names_are_unique():
    assert [name for name, count in Counter(path.name for path in FILES).items() if count > 1] == []
    assert not {path.name for path in FILES} & sys.stdlib_module_names


@pytest.mark.parametrize("path", [str(path) for path in FILES])
def test_what_a_script_imports_exists(path):
    module = script(path)
    assert module.__doc__ and str(module.__file__) == str(SCRIPTS / f"{path}.py")
