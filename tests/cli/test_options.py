"""Groups of options, as typer sees them and as verbs get them."""

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

import jitexport.cli
from jitexport.cli.options import Size, Stages, flat
from jitexport.errors import InputError
from jitexport.plan import CustomSchedule

SHARED = {"options", "progress", "wording"}


@dataclass(frozen=True)
class Pair:
    first: Annotated[int, typer.Option(min=1, help="One.")] = 1
    second: Annotated[str | None, typer.Option("--second", "-s", help="Two.")] = None


@pytest.fixture
def invoke():
    """Runs a verb with a group between two options of its own: (result, the verb's arguments)."""
    got = []

    def verb(
        name: Annotated[str, typer.Argument()],
        before: Annotated[bool, typer.Option("--before")] = False,
        pair: Pair = Pair(),
        after: Annotated[float, typer.Option()] = 2,
    ) -> None:
        """What it does."""
        got.append((name, before, pair, after))

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(flat(verb))
    return lambda *argv: (CliRunner().invoke(app, list(argv)), got)


def test_a_group_arrives_whole(invoke):
    result, got = invoke("n", "--second", "x", "--after", "3", "--first", "4", "--before")
    assert result.exit_code == 0 and got == [("n", True, Pair(4, "x"), 3.0)]


def test_defaults_are_those_of_the_group(invoke):
    assert invoke("n")[1] == [("n", False, Pair(), 2.0)]


def test_options_are_checked_as_if_they_were_the_verbs_own(invoke):
    wrong = {("n", "--first", "0"): "'--first'", ("n", "--pair", "1"): "No such option: --pair", (): "Missing argument"}
    for argv, said in wrong.items():
        result, got = invoke(*argv)
        assert result.exit_code == 2 and said in result.output and got == []


def test_help_has_a_groups_options_in_its_place(invoke):
    shown = invoke("--help")[0].output
    assert "What it does." in shown
    places = [shown.index(text) for text in ("--before", "--first", "-s, --second", "--after")]
    assert places == sorted(places)


def test_stages_are_a_schedule_or_none():
    assert Stages().custom() is None
    assert Stages("3,2").custom() == CustomSchedule((3, 2), None)
    assert Stages("3,2", "0.25,1").custom() == CustomSchedule((3, 2), (0.25, 1.0))
    with pytest.raises(InputError, match="--ratios needs --steps"):
        Stages(ratios="0.25,1").custom()


def test_sizes_are_named_as_models_name_them():
    assert Size(8, 16, text_tokens=4).settings() == {
        "height": 8, "width": 16, "frames": None, "max_sequence_length": 4,
    }  # fmt: skip


def test_verbs_import_no_other_verbs():
    files = [path for path in Path(jitexport.cli.__file__).parent.glob("*.py") if path.stem[0] != "_"]
    assert len(files) > len(SHARED)
    for path in files:
        if path.stem == "program":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jitexport.cli"):
                assert node.module.removeprefix("jitexport.cli.") in SHARED, path
