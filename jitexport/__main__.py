"""The program: `jitexport`, or `python -m jitexport`."""

from __future__ import annotations

import sys


def run() -> None:
    """Run the command line as a process of its own."""
    from jitexport import processes  # which imports nothing that Python has not imported already

    # `python -m` puts the working directory first, where a random.py of the user's would be run.
    sys.path[:] = processes.import_paths()
    from jitexport import interrupts

    try:
        with interrupts.watched():
            from jitexport.cli import main  # takes a moment, in which a signal may come

            main()
    except interrupts.Interrupted as stop:  # before or after the command itself
        print("interrupted", file=sys.stderr)
        sys.exit(128 + stop.number)
    finally:
        interrupts.default()  # while Python ends


if __name__ == "__main__":
    run()
