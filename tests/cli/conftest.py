import os
import subprocess
import sys

import pytest

from jitexport.plan import CustomSchedule


@pytest.fixture(scope="session")
def bundle(make_bundle):
    return make_bundle(custom=CustomSchedule((2, 2), (0.5, 1.0)), command=("jitexport", "build", "--model", "tiny"))


@pytest.fixture
def shell():
    """Runs a command line in a process of its own."""

    def call(*argv):
        return subprocess.run(
            [sys.executable, "-m", "jitexport.cli", *map(str, argv)], capture_output=True, text=True, env=os.environ
        )

    return call
