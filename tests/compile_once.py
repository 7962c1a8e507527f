"""The C++ compiler of a run of tests: what one test has compiled is not compiled again by another.

Stands before g++ on PATH (`install`), for all processes of the run. A source with the same text, the same command line
but for its places, and the same headers gives the same object: it is copied. Torch's large header is compiled once for
each set of options. Inductor's own loops are optimised less than users have them. Everything else, and what is asked
of the compiler, goes to g++ as it is.

Runs without the libraries of tests: a process of it takes 20 ms.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

PREFIX = "#include <torch/csrc/inductor/"
#: Torch's notes on where it writes, which change nothing.
PLACES = re.compile(r"^// Triton kernels are embedded as comments in .*$", re.MULTILINE)

def install(environment: MutableMapping[str, str]) -> Path | None:
    """Put it before g++ on PATH; the folder of what it keeps, new, or None where there is no g++ or it stands already.

    Whoever installs it removes the folder.
    """
    real = shutil.which("g++")
    if real is None or "JITEXPORT_TESTS_COMPILED" in environment:
        return None
    folder = Path(tempfile.mkdtemp(prefix="jitexport-compiled-"))
    script = folder / "bin" / "g++"
    script.parent.mkdir()
    command = shlex.join([sys.executable, "-I", "-S", str(Path(__file__).resolve()), real, str(folder)])
    script.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    environment["PATH"] = f"{script.parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
    environment["JITEXPORT_TESTS_COMPILED"] = str(folder)
    return folder


def main(real: str, folder: Path, words: list[str]) -> int:
    """Run `real` with the words, or copy what it made of the same before; its exit status."""
    sources = [i for i, word in enumerate(words) if word.endswith(".cpp")]
    if len(sources) != 1 or "-o" not in words[:-1] or any(word.endswith((".o", ".a")) for word in words[:-1]):
        os.execv(real, [real, *words])
    at = words.index("-o") + 1
    source, target = Path(words[sources[0]]), Path(words[at])
    # Other than Inductor's own sources, or by names that are not in the command line: not for this.
    if target.suffix not in (".so", ".o") or not source.is_file() or 'include "' in (text := source.read_text()):
        os.execv(real, [real, *words])
    words = [light(word) for word in words]
    options = [word for i, word in enumerate(words) if i not in (sources[0], at)]
    key = digest(PLACES.sub("", text), *options, os.environ.get("LIBRARY_PATH", ""), os.environ.get("CPATH", ""))
    kept = folder / f"{key}{target.suffix}"
    if kept.is_file():
        shutil.copyfile(kept, target)
        target.chmod(0o755)
        return 0
    header = precompiled(real, folder, text, options)
    code = subprocess.run([real, *(["-include", str(header)] if header else []), *words]).returncode
    if code == 0:
        put(target, kept)
    return code


def light(word: str) -> str:
    """A word of a command line, with less optimising: half the time, for what means the same.

    Kernels of our own are compiled as users compile them: their sources are not Inductor's alone.
    """
    return "-O1" if word == "-O3" else word


def precompiled(real: str, folder: Path, text: str, options: list[str]) -> Path | None:
    """Torch's header that a source begins with, compiled for these options; None where it begins otherwise."""
    lines = (line for line in text.splitlines() if line.strip() and not line.startswith("//"))
    first = next(lines, "")
    if not first.startswith(PREFIX) or "-include" in options:
        return None
    options = [word for word in options if word not in ("-o", "-c", "-shared") and word[:2] not in ("-l", "-L")]
    header = folder / f"{digest(first, *options)}.h"
    with open(header.with_suffix(".lock"), "w") as lock:  # one process makes it, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = Path(f"{header}.gch")
        if not made.is_file():
            header.write_text(f"{first}\n")
            partial = Path(f"{header}.part")
            command = [real, *options, "-x", "c++-header", str(header), "-o", str(partial)]
            if subprocess.run(command, capture_output=True).returncode:
                return None  # the compiler tells what is wrong with the source itself
            partial.replace(made)
    return header


def put(made: Path, kept: Path) -> None:
    """Keep a copy; others may do the same at the same time."""
    handle, partial = tempfile.mkstemp(dir=kept.parent)
    os.close(handle)
    shutil.copyfile(made, partial)
    os.replace(partial, kept)


def digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:32]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]))
