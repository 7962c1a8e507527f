"""The program: `jitexport`, or `python -m jitexport`."""

from __future__ import annotations

import sys
from contextlib import suppress


def run() -> None:
    """Run the command line as a process of its own."""
    from jitexport import processes  # which imports nothing that Python has not imported already

    # `python -m` puts the working directory first, where a random.py of the user's would be run.
    sys.path[:] = processes.import_paths()
    from jitexport import interrupts

    interrupts.default()  # no KeyboardInterrupt before or after what follows
    try:
        with interrupts.watched():
            from jitexport.cli import main  # takes a moment, in which a signal may come

            main()
    except interrupts.Interrupted as stop:  # before or after the command itself
        with suppress(AttributeError, OSError, ValueError):  # there may be no standard error
            sys.stderr.write("interrupted\n")
        sys.exit(128 + stop.number)


if __name__ == "__main__":
    run()
