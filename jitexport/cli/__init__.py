"""The command line. Data goes to stdout, everything else to stderr; exit codes come from `jitexport.errors`.

- `program`: the verbs together, and what becomes of errors and signals
- `options`: what several verbs take, and groups of it
- `planning`, `building`, `images`, `bundles`, `measuring`, `serving`: the verbs, a few lines over the library each
- `progress`, `wording`: bars, and text that several verbs print

No verb imports another, or anything heavy before it runs.
"""

from jitexport.cli.program import app, main

__all__ = ["app", "main"]
