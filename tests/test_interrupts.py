"""Signals end a command with its own code and word, and leave neither files nor processes."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest

from jitexport import interrupts
from jitexport.interrupts import Interrupted, finishing, watched

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}

pytestmark = pytest.mark.usefixtures("listening")


@pytest.mark.parametrize("number", CODES)
def test_a_signal_is_raised_and_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as stopped, watched():
        signal.raise_signal(number)
    assert stopped.value.number == number and signal.getsignal(number) == before


def test_short_work_is_finished_first():
    done = []
    with pytest.raises(Interrupted), watched():
        with finishing():
            with finishing():
                signal.raise_signal(signal.SIGTERM)
                done.append("inner")
            done.append("outer")
        done.append("never")
    assert done == ["inner", "outer"]


class Last:
    """Something that a signal meets when it is deleted."""

    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


def test_what_python_drops_is_found_at_the_next_look(monkeypatch):
    dropped = []
    monkeypatch.setattr(sys, "unraisablehook", dropped.append)  # it would print a traceback
    with pytest.raises(Interrupted), watched():
        Last()
        interrupts.check()
        pytest.fail("the signal was lost")
    assert dropped == [] and sys.unraisablehook == dropped.append


def test_what_else_python_drops_is_told(monkeypatch):
    class Broken:
        def __del__(self):
            raise ArithmeticError

    dropped = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: dropped.append(what.exc_type))
    with watched():
        Broken()
    assert dropped == [ArithmeticError]


def test_a_watch_within_a_watch_finds_what_came_before(monkeypatch):
    """As the program's import of its commands, in whose callbacks Python drops exceptions."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    with pytest.raises(Interrupted), watched():
        Last()
        with watched():
            interrupts.check()
            pytest.fail("the signal was lost")


def test_a_second_signal_does_not_stop_the_cleaning():
    """As of who presses Ctrl-C twice: files are removed to the end."""
    done = []
    with pytest.raises(Interrupted), watched():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            done.append("cleaned")
    assert done == ["cleaned"]


def test_a_second_signal_counts_where_the_first_was_taken_for_a_failure():
    with pytest.raises(Interrupted), watched():
        with suppress(BaseException):  # as some libraries do
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the signal was lost")


def test_ignored_signals_stay_ignored():
    """As nohup and shells in scripts want it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with watched():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_children_and_their_children_are_ended():
    code = textwrap.dedent(
        """
        import subprocess, sys, time
        from jitexport import interrupts
        interrupts.adopt_orphans()
        inner = "import subprocess, sys; p = subprocess.Popen(['sleep', '600'], start_new_session=True); " \\
            "print(p.pid, flush=True); p.wait()"
        child = subprocess.Popen([sys.executable, "-c", inner], stdout=subprocess.PIPE, text=True)
        print(child.pid, child.stdout.readline(), flush=True)
        interrupts.end_children()
        """
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    pids = [int(pid) for pid in out.split()]
    assert len(pids) == 2 and not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def in_session(session: int) -> list[int]:
    """Processes of a session, and those that say in their environment that they came from there."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            marked = f"JITEXPORT_TEST={session}\0".encode() in (path / "environ").read_bytes()
        except OSError:
            continue
        if marked and alive(int(path.name)):
            found.append(int(path.name))
    return found


def interrupt(argv, when, number, **options):
    """Run a command, send it a signal when its standard error has a text, and wait: (code, stderr, what is left)."""
    mark = time.monotonic_ns()
    process = subprocess.Popen(
        [sys.executable, "-m", "jitexport", *map(str, argv)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        env=os.environ | {"JITEXPORT_TEST": str(mark)}, **options,
    )  # fmt: skip
    os.set_blocking(process.stderr.fileno(), True)
    seen = b""
    while when not in seen:
        piece = os.read(process.stderr.fileno(), 4096)
        assert piece, seen.decode()
        seen += piece
    process.send_signal(number)
    seen += process.stderr.read()
    code = process.wait()
    until = time.monotonic() + 20
    while (left := in_session(mark)) and time.monotonic() < until:
        time.sleep(0.1)
    return code, seen.decode(), left


@pytest.mark.parametrize(
    ("number", "when", "jobs"),
    [
        (signal.SIGINT, b"read the model", 1),
        (signal.SIGTERM, b"engine text", 1),
        (signal.SIGTERM, b"engine condition", 2),
        (signal.SIGINT, b"engine condition", 2),
    ],
)
def test_a_build_that_is_interrupted(tiny_flux, tmp_path, number, when, jobs):
    argv = ["build", "--model", tiny_flux, "--backend", "aoti", "--dtype", "fp32", "--steps", "1", "--jobs", jobs]
    code, stderr, left = interrupt([*argv, "-o", tmp_path / "deep" / "b"], when, number)
    assert code == CODES[number], stderr
    assert stderr.rstrip().endswith("interrupted") and "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == [] and left == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_existing_bundle_stays(tiny_flux, tmp_path, number):
    argv = ["build", "--model", tiny_flux, "--backend", "eager", "--steps", "1", "-o", tmp_path / "b"]
    subprocess.run([sys.executable, "-m", "jitexport", *map(str, argv)], check=True, capture_output=True)
    before = (tmp_path / "b" / "manifest.json").read_bytes()
    code, stderr, _ = interrupt([*argv, "--force"], b"weights", number)
    assert code == CODES[number], stderr
    assert (tmp_path / "b" / "manifest.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("delay", [0.0, 0.7, 1.4, 2.1])
def test_images_that_are_interrupted_at_any_time(make_bundle, tmp_path, delay):
    """Either the command ended before the signal came, or it ends by it; there is a whole image or none."""
    image = tmp_path / "a.png"
    argv = [sys.executable, "-m", "jitexport", "generate", make_bundle(), "a fox", "-o", image, "--num-images", "1"]
    process = subprocess.Popen(list(map(str, argv)), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    time.sleep(delay)
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate()[1].decode()
    assert process.returncode in (0, 143, -signal.SIGTERM), stderr
    assert "Traceback" not in stderr and {p.name for p in tmp_path.iterdir()} <= {"a.png"}
    if process.returncode == 143:
        assert stderr.rstrip().endswith("interrupted")
    if image.exists():
        from PIL import Image

        Image.open(image).load()
