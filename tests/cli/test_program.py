"""The verbs together: help, wrong usage, errors and exit codes."""

import pytest
from typer.testing import CliRunner

import jitexport
from jitexport.cli import app

RUNNER = CliRunner()


def test_version():
    result = RUNNER.invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"jitexport {jitexport.__version__}\n")


def test_help_names_every_command():
    result = RUNNER.invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("build", "plan", "generate", "inspect", "profile", "doctor"):
        assert command in result.output


@pytest.mark.parametrize("command", ["build", "plan", "generate", "inspect", "profile", "doctor"])
def test_every_command_has_help(command):
    result = RUNNER.invoke(app, [command, "--help"])
    assert result.exit_code == 0 and "--json" in result.output


@pytest.mark.parametrize(
    "argv",
    [
        ["nonesuch"],
        ["build", "--nonesuch"],
        ["build", "--speedup", "21"],
        ["build", "--speedup", "0.5"],
        ["build", "--speedup", "fast"],
        ["build", "--batch", "0"],
        ["plan", "--height", "0"],
        ["generate"],
        ["generate", "bundle"],
        ["generate", "bundle", "a fox", "--num-images", "0"],
        ["generate", "bundle", "a fox", "--seed", "-1"],
        ["generate", "bundle", "a fox", "--seed", str(2**70)],
        ["generate", "bundle", "a fox", "--guidance", "-1"],
        ["generate", "bundle", "a fox", "--guidance", "nan"],
    ],
)
def test_wrong_usage_exits_with_2(run, argv):
    code, out, err = run(*argv)
    assert (code, out) == (2, "") and "Usage" in err


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["plan", "--ratios", "0.5,1"], 2, "--ratios needs --steps"),
        (["plan", "--model", "TINY", "--steps", "1;2"], 2, "comma-separated"),
        (["plan", "--model", "TINY", "--steps", "1,2", "--ratios", "1,0.5"], 2, "rise to 1"),
        (["plan", "--model", "TINY", "--height", "33"], 2, "image size"),
        (["plan", "--model", "TINY", "--method", "nonesuch"], 2, "unknown method"),
        (["plan", "--model", "TINY", "--preset", "nonesuch"], 2, "unknown JiT preset"),
        (["plan", "--model", "nonesuch"], 3, "no such model"),
        (["plan", "--model", "nobody/nothing"], 3, "HF_HUB_OFFLINE is set"),
        (["plan", "--model", "TMP"], 3, "not a diffusers pipeline"),
        (["build", "--model", "TINY", "--dtype", "fp8", "-o", "TMP/b"], 2, "unknown dtype"),
        (["build", "--model", "TINY", "--backend", "nonesuch", "-o", "TMP/b"], 2, "unknown backend"),
        (["build", "--model", "TINY", "--device", "abacus", "-o", "TMP/b"], 2, "unknown device"),
        (["build", "--model", "TINY", "--backend", "eager", "-o", "BUNDLE"], 5, "exists already"),
        (["generate", "TMP/none", "a fox", "-o", "TMP/a.png"], 5, "no bundle"),
        (["generate", "BUNDLE", "a fox", "-o", "TMP/a.jpg"], 2, "written as PNG"),
        (["inspect", "TMP"], 5, "no bundle"),
        (["profile", "BUNDLE", "--against", "magic"], 2, "unknown peer"),
    ],
)
def test_errors_go_to_stderr_with_their_exit_code(run, argv, code, message, bundle, tiny_flux, tmp_path):
    names = {"TINY": tiny_flux, "BUNDLE": bundle, "TMP": tmp_path}
    argv = [a.replace("TMP/", f"{tmp_path}/") if a.startswith("TMP/") else str(names.get(a, a)) for a in argv]
    found, out, err = run(*argv)
    assert (found, out) == (code, "")
    assert err.startswith("error: ") or "\nerror: " in err
    assert message in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_errors_in_a_real_process(shell, tmp_path):
    done = shell("inspect", tmp_path / "none")
    assert (done.returncode, done.stdout) == (5, "") and done.stderr.startswith("error: ")
    done = shell("plan", "--model", "flux", "--speedup", "21")
    assert (done.returncode, done.stdout) == (2, "")
