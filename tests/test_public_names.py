"""Names and options that users write down. A change here is a change for them: make it on purpose, and say so."""

import subprocess
import sys

import pytest
import typer

import jitexport
from jitexport.cli import app

PUBLIC = [
    "BuildResult",
    "CustomSchedule",
    "EngineBundle",
    "JitExportError",
    "Pipeline",
    "PipelineOutput",
    "__version__",
    "build",
    "load",
]

SCHEDULE = {
    "--model",
    "--base",
    "--speedup",
    "--method",
    "--preset",
    "--cache",
    "--steps",
    "--ratios",
    "--height",
    "--width",
    "--frames",
    "--text-tokens",
    "--json",
}

OPTIONS = {
    "build": SCHEDULE
    | {"--backend", "--dtype", "--batch", "--output", "-o", "--device", "--target", "--weights", "--jobs", "--quant",
       "--passes", "--calibration", "--force"},
    "plan": SCHEDULE,
    "calibrate": SCHEDULE | {"--prompts", "--limit", "--dtype", "--device", "--output", "-o"},
    "generate": {
        "bundle", "prompt", "--output", "-o", "--seed", "--num-images", "--guidance", "--negative", "--true-cfg-scale",
        "--fps", "--trust", "--json",
    },
    "inspect": {"bundle", "--json"},
    "verify": {"bundle", "--json"},
    "pack": {"bundle", "--output", "-o", "--force", "--json"},
    "unpack": {"archive", "--output", "-o", "--force", "--json"},
    "push": {"bundle", "repo", "--public"},
    "pull": {"repo", "--output", "-o", "--trust", "--revision", "--force"},
    "profile": {"bundles", "--against", "--prompt", "--repeats", "--timeline", "--trace", "--json"},
    "evaluate": {
        "bundles", "--prompts", "--limit", "--seeds", "--reference", "--timed", "--output", "-o", "--json",
    },
    "serve": {
        "bundles", "--host", "--port", "--loras", "--memory", "--token-file", "--public-url", "--queue", "--timeout",
        "--drain", "--batch-wait", "--max-images", "--max-prompt", "--max-body", "--device", "--threads", "--trust",
        "--ray", "--json",
    },
    "doctor": {"--json"},
}


def options_of(command):
    return {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]}


def test_public_names():
    assert jitexport.__all__ == PUBLIC
    assert dir(jitexport) == sorted(PUBLIC)
    for name in PUBLIC:
        assert getattr(jitexport, name) is not None


def test_other_names_do_not_exist():
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        _ = jitexport.nonesuch


@pytest.mark.parametrize(
    "first", ["import jitexport.build", "jitexport.BuildResult", "from jitexport.build import BuildResult"]
)
def test_build_is_the_function_whatever_was_imported_first(first):
    code = (
        f"import jitexport; {first}; from jitexport import build; assert callable(build) and build is jitexport.build"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_commands_and_their_options():
    group = typer.main.get_command(app)
    found = {name: options_of(command) - {"--help"} for name, command in group.commands.items()}
    assert found == OPTIONS
    assert options_of(group) - {"--help"} == {"--version"}
