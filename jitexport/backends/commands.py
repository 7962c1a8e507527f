"""Inductor's compilers: which there is, and commands for paths with spaces, of the cache, of torch or of Python.

Torch builds a command as one text and splits it as a shell would. In torch 2.13 it quotes the folders of headers, and
neither sources nor what is made nor the folders of libraries.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

INSTALL_COMPILER = "install g++ (Debian, Ubuntu: apt-get install g++)"


def cpp_compiler() -> str | None:
    """Path of the C++ compiler that Inductor finds; None without one."""
    return shutil.which("g++") or shutil.which("clang++")


@contextmanager
def quoted_paths() -> Iterator[None]:
    """Commands that torch makes inside are right for any path. Ordinary paths give the same text as before."""
    from torch._inductor.cpp_builder import CppBuilder

    original = CppBuilder.__init__

    def init(
        self: Any, name: str, sources: str | Sequence[str], BuildOption: Any, output_dir: str = ""
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
