"""What a type checker says of a user's code: the public API has true types, and mistakes are found before they run."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

RIGHT = """
import torch

import jitexport

result = jitexport.build("demo", speedup=4, custom=jitexport.CustomSchedule((4, 3), (0.5, 1.0)))
reveal_type(result)  # BuildResult
reveal_type(result.path)  # Path
reveal_type(result.manifest.host.threads)  # int | None
pipe = jitexport.load(result.path, device="cpu", verify="size", threads=2)
reveal_type(pipe)  # Pipeline
reveal_type(pipe("a fox", generator=torch.Generator(), output_type="pt"))  # PipelineOutput
reveal_type(pipe(["a fox", "an owl"], return_dict=False))  # tuple[Any]
reveal_type(pipe.schedule.sigmas)  # tuple[float, ...]
reveal_type(jitexport.EngineBundle.open(result.path))  # EngineBundle
reveal_type(jitexport.__version__)  # str
error: Exception = jitexport.JitExportError("no")
"""

WRONG = """
import jitexport

jitexport.build("demo", speedup="4x")  # arg-type
jitexport.build("demo", weights="copy")  # arg-type
jitexport.build("demo", speed=4)  # call-arg
pipe = jitexport.load(3)  # arg-type
pipe("a fox", output_type="jpg")  # call-overload
pipe("a fox").pictures  # attr-defined
pipe("a fox", return_dict=False).images  # attr-defined
jitexport.compile("demo")  # attr-defined
"""


def checked(code: str, folder: Path) -> dict[int, str]:
    """{line: what mypy says of it}, by the project's own settings and cache: the package is checked but once."""
    file = folder / "user.py"
    file.write_text(code)
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", "--no-color-output", str(file)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )
    assert run.returncode in (0, 1), run.stderr
    found = re.findall(r"(?m)^.*user\.py:(\d+): (?:error|note): (.*)$", run.stdout)
    assert len(found) == len(run.stdout.splitlines()), run.stdout  # nothing else is said of anything
    first: dict[int, str] = {}
    for line, message in found:  # notes come behind an error
        first.setdefault(int(line), message)
    return first


def commented(code: str) -> dict[int, str]:
    """{line: the comment behind it}."""
    lines = enumerate(code.splitlines(), start=1)
    return {number: line.partition("  # ")[2] for number, line in lines if "  # " in line}


def test_the_public_names_have_true_types(tmp_path):
    found = {
        line: re.sub(r"\b(?:\w+\.)+(?=\w)", "", re.fullmatch(r'Revealed type is "(.*)"', message)[1])
        for line, message in checked(RIGHT, tmp_path).items()
    }
    assert found == commented(RIGHT)


def test_mistakes_are_found(tmp_path):
    found = {line: message.rpartition("[")[2].rstrip("]") for line, message in checked(WRONG, tmp_path).items()}
    assert found == commented(WRONG)
