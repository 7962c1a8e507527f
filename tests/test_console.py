"""What is printed is data: brackets in it are brackets, whatever stream it goes to."""

import ast
import io
import subprocess
import sys
from pathlib import Path

import pytest

import jitexport
from jitexport import console
from jitexport.console import PlainConsole, Progress, Table, text_column
from jitexport.errors import OutputError
from tests.scripting import SCRIPTS

PACKAGE = Path(jitexport.__file__).parent
SOURCES = sorted([*PACKAGE.rglob("*.py"), *SCRIPTS.rglob("*.py")])
DATA = "out[bf16]/[/x] [red]a[/red] :smile: jitexport[onnx]"


@pytest.fixture
def plain(monkeypatch):
    """A console that writes as to a terminal, into a string."""
    made = PlainConsole()
    monkeypatch.setattr(made, "_file", io.StringIO())
    made._width = 200
    return made


def test_only_the_console_module_uses_rich():
    assert {"console.py", "building.py", "peers.py", "footprint.py"} <= {path.name for path in SOURCES}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "rich" for name in names):
                assert path == PACKAGE / "console.py", f"{path} uses rich by itself: take what you need from console.py"


def test_nobody_asks_for_markup():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "markup":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, path
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("from_markup", "render_markup"), path


def test_text_tables_titles_and_spinners_show_brackets(plain):
    table = Table(DATA, title=DATA)
    table.add_row(DATA)
    plain.print(DATA)
    plain.print(table)
    with plain.status(DATA) as status:
        assert status.renderable.text.plain == DATA
        status.update(DATA + "!")
        assert status.renderable.text.plain == DATA + "!"
    assert plain.file.getvalue().count(DATA) >= 4


def test_progress_bars_show_brackets(plain):
    bar = Progress(text_column("{task.description}"), console=plain)
    bar.add_task(DATA, total=1)
    plain.print(bar.get_renderable())
    assert DATA in plain.file.getvalue()


def test_loops_with_a_bar_show_brackets(plain, monkeypatch):
    monkeypatch.setattr(console, "err", plain)
    assert list(console.track(range(3), DATA)) == [0, 1, 2]
    assert DATA in plain.file.getvalue()


@pytest.mark.parametrize("stream", [None, "closed", "bare"])
def test_standard_error_may_be_gone(monkeypatch, stream, make_bundle):
    """As in a service without a console; a message lost there changes nothing, and pipelines load."""
    gone = io.StringIO()
    gone.close()

    class Bare:
        def write(self, text):
            raise OSError(28, "No space left on device")

        flush = write

    monkeypatch.setattr(sys, "stderr", {None: None, "closed": gone, "bare": Bare()}[stream])
    console.err.print(DATA)
    jitexport.load(make_bundle())


def test_output_that_cannot_be_written_is_an_error(monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    for write in (console.echo, console.out.print):
        with pytest.raises(OutputError, match="No space left"):
            write(DATA)


def program(*argv, **options):
    return subprocess.run([sys.executable, "-m", "jitexport", *map(str, argv)], capture_output=True, **options)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("argv", [["plan", "--model", "flux"], ["doctor", "--json"]])
def test_a_full_standard_output_in_a_real_process(argv):
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-m", "jitexport", *argv], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == OutputError.exit_code
    assert b"cannot write to standard output" in done.stderr and b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


def test_a_reader_that_has_gone_is_no_traceback(make_bundle):
    command = f"{sys.executable} -m jitexport inspect {make_bundle()} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True)
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr


def test_streams_that_were_closed_at_the_start(make_bundle, tmp_path):
    """Whatever is opened first would get their numbers, and what libraries print would land in it."""
    image = tmp_path / "a.png"
    command = f"exec {sys.executable} -m jitexport generate {make_bundle()} 'a fox' -o {image} --seed 1 0<&- 1>&- 2>&-"
    done = subprocess.run(["bash", "-c", command])
    assert done.returncode == 0 and image.read_bytes().startswith(b"\x89PNG")


def test_a_path_that_is_no_text_comes_out_as_its_bytes(make_bundle, tmp_path):
    name = bytes(tmp_path) + b"/caf\xe9.png"
    done = subprocess.run(
        [sys.executable, "-m", "jitexport", "generate", make_bundle(), "a fox", "-o", name, "--seed", "1"],
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == name + b"\n" and Path(name.decode(errors="surrogateescape")).exists()


def test_every_command_shows_bracketed_names(make_bundle, tmp_path):
    """Through real processes: built from a model and into a folder with names that look like markup."""
    target = tmp_path / "out[bf16] [x]"
    target.symlink_to(make_bundle())
    done = program("inspect", target)
    assert done.returncode == 0, done.stderr
    missing = program("inspect", tmp_path / "no[/such] [bold]one")
    assert missing.returncode == 5 and b"no[/such] [bold]one" in missing.stderr
