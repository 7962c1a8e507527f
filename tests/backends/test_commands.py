"""Inductor's commands are right for paths with spaces, and the same as torch's for others."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import jitexport
from jitexport import registry
from jitexport.backends.commands import compiler_problem, compilers, cpp_compiler, quoted_paths, replace_end
from jitexport.build import build
from jitexport.doctor import examine
from jitexport.plan import CustomSchedule

cpp_builder = pytest.importorskip("torch._inductor.cpp_builder")


def command(folder: str, header: str | None = None, **options) -> str:
    made = cpp_builder.BuildOptionsBase(
        compiler="g++", include_dirs=[f"{folder}/include"], libraries_dirs=[f"{folder}/lib"], libraries=["torch"],
        **options
    )
    made.precompiled_header = header
    return cpp_builder.CppBuilder("engine", [f"{folder}/a.cpp", f"{folder}/b.o"], made, folder).get_command_line()


@pytest.mark.parametrize("options", [{}, {"compile_only": True}, {"precompiling": True}], ids=str)
@pytest.mark.parametrize("folder", ["/a b/é", "/it's/$HOME", '/a "b"/[c]'])
def test_every_path_is_one_word(folder, options):
    with quoted_paths():
        if options.get("precompiling"):
            made = cpp_builder.BuildOptionsBase(compiler="g++", **options)
            text = cpp_builder.CppBuilder("engine", f"{folder}/a.h", made, folder).get_command_line()
            assert f"{folder}/a.h" in shlex.split(text)
            return
        words = shlex.split(command(folder, f"{folder}/head.h", **options))
    wanted = {f"{folder}/a.cpp", f"{folder}/b.o", f"-I{folder}/include", f"{folder}/head.h"}
    wanted |= {f"{folder}/engine.o"} if options else {f"{folder}/engine.so", f"-L{folder}/lib"}
    assert wanted <= set(words)


def test_ordinary_paths_give_torchs_own_command():
    """By which torch finds what it has compiled before."""
    before = command("/usr/lib/x", "/usr/head.h")
    with quoted_paths():
        assert command("/usr/lib/x", "/usr/head.h") == before
    assert command("/a b") != shlex.join(shlex.split(command("/a b")))  # it is switched off again


def test_a_torch_that_quotes_is_left_alone():
    assert replace_end("-o '/a b/x'", "/a b/x", "'/a b/x'") == "-o '/a b/x'"
    assert replace_end("-o /a b/x", "/a b/x", "'/a b/x'") == "-o '/a b/x'"
    assert replace_end("", "", "''") == ""


@pytest.fixture
def static(tmp_path) -> Path:
    """A compiler that puts the C++ library into what it makes, as some that come with other software do."""
    path = tmp_path / "static-g++"
    path.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} "$@" -static-libstdc++\n')
    path.chmod(0o755)
    return path


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="for g++ on Linux")
def test_a_compiler_whose_libraries_crash_torch_is_passed_over(static, monkeypatch):
    monkeypatch.setenv("CXX", str(static))
    assert compiler_problem(str(static)) == "it links the C++ library statically"
    assert cpp_compiler() == shutil.which("g++")
    with quoted_paths():
        assert cpp_builder.get_cpp_compiler() == shutil.which("g++")
    assert f"{static}: it links the C++ library statically" in examine()["machine"]["compiler"]

    monkeypatch.setenv("PATH", str(static.parent))  # there is no other
    assert cpp_compiler() is None
    assert "statically" in registry.backend("aoti").cannot_build(torch.device("cpu"), None)


def test_what_is_no_compiler_is_passed_over(tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert sys.platform != "linux" or compiler_problem(str(broken)) == "it cannot make a shared library"
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    assert str(tmp_path / "none") not in compilers()


def test_torchs_own_compiler_keeps_its_name(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    before = cpp_builder.get_cpp_compiler()
    with quoted_paths():
        assert cpp_builder.get_cpp_compiler() == before


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The libraries of this interpreter under a path with a space, as in a virtual environment there."""
    link = tmp_path_factory.mktemp("virtual environment") / "site packages"
    link.symlink_to(Path(torch.__file__).parent.parent)
    return link


@pytest.mark.parametrize("backend", ["aoti", "inductor"])
def test_a_build_where_every_path_has_a_space(backend, tiny_flux, site, tmp_path):
    """Output, temporary folder, torch itself; in a process of its own, which imports torch from there."""
    target, scratch = tmp_path / "out put 'é' [x]", tmp_path / "tmp é folder"
    scratch.mkdir()
    home = Path(jitexport.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "jitexport", "build", "--model", tiny_flux, "--backend", backend, "--dtype", "fp32",
         "--steps", "1", "--jobs", "1", "-o", target],
        env=os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{home}", "TMPDIR": str(scratch)}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"next: jitexport generate {shlex.quote(str(target))} " in done.stdout
    image = jitexport.load(target)("a fox", generator=torch.Generator().manual_seed(0), output_type="pt").images
    eager = build(
        str(tiny_flux), output=tmp_path / "eager", backend="eager", dtype="fp32", custom=CustomSchedule((1,), (1.0,))
    ).path
    expected = jitexport.load(eager)("a fox", generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert torch.allclose(image, expected, atol=1e-3)
