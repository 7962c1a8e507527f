"""`python -m jitexport.cli`, as `python -m jitexport`."""

from jitexport.__main__ import run

run()
