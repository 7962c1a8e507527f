"""Inductor's compilers: one that works, and commands for paths with spaces, of the cache, of torch or of Python.

Torch builds a command as one text and splits it as a shell would. In torch 2.13 it quotes the folders of headers, and
neither sources nor what is made nor the folders of libraries.
"""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import takewhile
from pathlib import Path
from typing import Any
from unittest import mock

INSTALL_COMPILER = "install g++ (Debian, Ubuntu: apt-get install g++)"


#: By name, in the order of preference, behind the one that the environment names.
COMPILERS = ("g++", "clang++")


def compilers() -> list[str]:
    """Paths of the C++ compilers that there are, as they are preferred."""
    named = [os.environ.get("CXX"), *COMPILERS]
    return list(dict.fromkeys(path for name in named if name and (path := shutil.which(name))))


def cpp_compiler() -> str | None:
    """Path of the C++ compiler that Inductor is to use: that of CXX, else g++, else clang++; None where none works."""
    return next((path for path in compilers() if compiler_problem(path) is None), None)


def passed_over() -> str:
    """What is wrong with the compilers that come before the one that is used; empty where there are none."""
    bad = takewhile(lambda path: compiler_problem(path) is not None, compilers())
    return "; ".join(f"{path}: {compiler_problem(path)}" for path in bad)


def without_compiler() -> str:
    """What was found where no compiler works."""
    return passed_over() or "neither g++ nor clang++ on PATH"


@functools.cache
def compiler_problem(path: str) -> str | None:
    """Why what a compiler makes cannot be used, or None.

    A library that brings a C++ library of its own crashes the process that torch opens it in.
    """
    if sys.platform != "linux":
        return None
    with tempfile.TemporaryDirectory(prefix="jitexport-") as folder:
        library = Path(folder, "trial.so")
        command = [path, "-x", "c++", "-shared", "-fPIC", "-o", str(library), "-"]
        try:
            subprocess.run(command, input=TRIAL, text=True, check=True, capture_output=True, timeout=60)
        except (subprocess.SubprocessError, OSError):
            return "it cannot make a shared library"
        made = library.read_bytes()
    return None if b"libstdc++.so" in made or b"libc++.so" in made else "it links the C++ library statically"


TRIAL = """
#include <new>
int* trial() { return new int; }
"""


@contextmanager
def quoted_paths() -> Iterator[None]:
    """Commands that torch makes inside are right for any path, and of a compiler that works.

    Ordinary paths and compilers give the same text as before.
    """
    from torch._inductor import config

    chosen = cpp_compiler()
    # Torch's own choice is CXX, or g++: the first.
    other = config.patch({"cpp.cxx": (None, chosen)}) if chosen and chosen != compilers()[0] else nullcontext()
    with other, _quoted():
        yield


@contextmanager
def _quoted() -> Iterator[None]:
    from torch._inductor.cpp_builder import CppBuilder

    original = CppBuilder.__init__

    def init(
        self: Any, name: str, sources: str | list[str], BuildOption: Any, output_dir: str = ""
    ) -> None:
        original(self, name, sources, BuildOption, output_dir)
        if sys.platform != "win32" and not BuildOption.get_use_relative_path():
            quote_command(self, [sources] if isinstance(sources, str) else sources, BuildOption)

    with mock.patch.object(CppBuilder, "__init__", init):
        yield


def quote_command(builder: Any, sources: Sequence[str], options: Any) -> None:
    """Quote the paths in the parts of a builder's command that torch leaves bare."""
    bare, quoted = " ".join(sources), " ".join(map(shlex.quote, sources))
    builder._sources_args = replace_end(builder._sources_args, bare, quoted)
    builder._output = replace_end(builder._output, builder._target_file, shlex.quote(builder._target_file))
    folders = options.get_libraries_dirs()
    if builder._libraries_dirs_args == "".join(f"-L{folder} " for folder in folders):
        builder._libraries_dirs_args = "".join(f"-L{shlex.quote(folder)} " for folder in folders)
    header = options.precompiled_header
    if header and builder._include_dirs_args.startswith(f"-include {header} "):
        rest = builder._include_dirs_args.removeprefix(f"-include {header} ")
        builder._include_dirs_args = f"-include {shlex.quote(header)} {rest}"


def replace_end(text: str, bare: str, quoted: str) -> str:
    """A text that ends with something bare, with that quoted; other texts, as of a torch that quotes, as they are."""
    return text.removesuffix(bare) + quoted if bare and text.endswith(bare) and not text.endswith(quoted) else text


def vector_extensions() -> None:
    """Find out what vector extensions the compiler has, for whoever asks torch later in this process."""
    with quoted_paths():
        from torch._inductor.cpu_vec_isa import valid_vec_isa_list

        valid_vec_isa_list()
