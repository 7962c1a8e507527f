#!/usr/bin/env bash
# Installs what the tests need and runs them; arguments go to pytest.
source "$(dirname "$0")/setup.sh" dev

ruff check jitexport scripts tests docs
mypy
# Two processes: most of the time goes into compilers that use one core. A file's tests share what they built, and what
# takes longest comes first, as the folders stand.
python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
