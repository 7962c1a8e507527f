#!/usr/bin/env bash
# Installs what the tests need and runs them; arguments go to pytest.
source "$(dirname "$0")/setup.sh" dev

ruff check jitexport scripts tests
python -m pytest "$@"
