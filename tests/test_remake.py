"""Results and the code they measure: the table has every file, ages come from git, and commands remake their files."""

import json
import os
import shlex
import subprocess

import pytest
import typer.main

from tests.scripting import script

remake = script("remake")
DOCS = remake.ROOT / "docs"
LISTED = [file for result in remake.RESULTS for file in result.files]
COMMANDS = [command for result in remake.RESULTS for command in result.commands]


# --- the table ---


def test_every_result_is_in_the_table_once():
    there = [f"{folder}/{p.name}" for folder in ("results", "images") for p in (DOCS / folder).iterdir()]
    assert sorted(LISTED) == sorted(set(there) - {"results/README.md"})
    names = [result.name for result in remake.RESULTS]
    assert len(set(names)) == len(names)


def test_what_is_measured_and_what_is_written_exist():
    for result in remake.RESULTS:
        assert all((remake.ROOT / path).exists() for path in result.measures), result.name
        assert result.stdout is None or result.stdout in result.files
        assert bool(result.commands) != bool(result.by_hand), result.name


@pytest.mark.parametrize("command", [*dict.fromkeys(COMMANDS), *remake.BUNDLES.values()])
def test_commands_are_of_scripts_and_verbs_that_take_their_options(command):
    program, first, *rest = shlex.split(command)
    options = {word for word in rest if word.startswith("--")}
    if program == "python":
        known = (remake.ROOT / first).read_text()
        known += (remake.ROOT / "scripts/demo_model/comparison.py").read_text() if "usual_arguments" in known else ""
        assert all(f'"{option}"' in known for option in options)
    else:
        from jitexport.cli.program import app

        verb = typer.main.get_command(app).commands[first]
        assert options <= {name for parameter in verb.params for name in parameter.opts}


def test_bundles_that_commands_name_are_built_first():
    for result in remake.RESULTS:
        words = {word for command in result.commands for word in shlex.split(command)}
        assert set(result.bundles) == {word for word in words if word.startswith("engines/")}, result.name


def test_the_page_has_the_list():
    page = (DOCS / "results" / "README.md").read_text()
    assert f"{remake.BEGIN}\n{remake.listed()}\n{remake.END}" in page, "run `python scripts/remake.py --write-list`"


def test_results_that_were_measured_say_when():
    for result in remake.RESULTS:
        if not result.files[0].startswith("images/"):
            assert remake.recorded(result).date.startswith("2026-"), result.name


# --- records and ages ---


class Repository:
    """A repository of git with code and results."""

    def __init__(self, root):
        self.root = root
        for folder in ("code", "docs/results"):
            (root / folder).mkdir(parents=True)
        self.git("init", "-q")

    def git(self, *arguments, day="2026-01-10"):
        names = {f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        dates = {f"GIT_{who}_DATE": f"{day}T12:00:00Z" for who in ("AUTHOR", "COMMITTER")}
        command = ["git", "-C", str(self.root), *arguments]
        environment = os.environ | names | dates
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()

    def change(self, name, text, day):
        (self.root / name).write_text(text)
        self.git("add", "-A")
        self.git("commit", "-qm", f"change of {name}", day=day)
        return self.git("rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path)


def of(file, **more):
    return remake.Result("a", (f"results/{file}",), "something", ("code",), **more)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("a.txt", "$ x\n1 ms\ndate 2026-01-11, commit abc1234def, cpu AMD EPYC, "
                  "cpu_class AVX512 with bf16, int8, threads 2"),
        ("a.md", "# A\n\n- date: 2026-01-11\n- commit: abc1234def\n- cpu: AMD EPYC\n"
                 "- cpu_class: AVX512 with bf16, int8\n"),
        ("a.json", json.dumps({"conditions": {
            "date": "2026-01-11", "commit": "abc1234def", "cpu": "AMD EPYC", "cpu_class": "AVX512 with bf16, int8"}})),
        ("a.csv", "date,cpu,commit\n2026-01-09,old,x\n"
                  '2026-01-11,"AMD EPYC (AVX512 with bf16, int8), 2 threads",abc1234def\n'),
    ],
)  # fmt: skip
def test_files_say_when_where_and_on_which_commit(repository, file, text):
    (repository.root / "docs" / "results" / file).write_text(text)
    wanted = remake.Record("2026-01-11", "AMD EPYC", "AVX512 with bf16, int8", "abc1234def")
    assert remake.recorded(of(file), repository.root) == wanted


def test_what_files_do_not_say_is_not_made_up(repository):
    (repository.root / "docs" / "results" / "a.txt").write_text("date 2026-01-11, commit not recorded, threads 2\n")
    assert remake.recorded(of("a.txt"), repository.root) == remake.Record("2026-01-11")
    (repository.root / "docs" / "results" / "a.json").write_text('{"date": "2026-01-11T10:00:00", "rows": []}')
    assert remake.recorded(of("a.json"), repository.root) == remake.Record("2026-01-11")
    assert remake.recorded(of("a.png"), repository.root) == remake.Record()


def test_a_result_is_older_than_what_was_changed_after_its_commit(repository):
    first = repository.change("code/a.py", "1", "2026-01-10")
    repository.change("docs/results/a.txt", f"date 2026-01-10, commit {first[:12]}\n", "2026-01-11")
    assert remake.age(of("a.txt"), repository.root).older is False
    repository.change("code/a.py", "2", "2026-01-12")
    found = remake.age(of("a.txt"), repository.root)
    assert found.older and "change of code/a.py" in found.why
    head = repository.git("rev-parse", "HEAD")
    repository.change("docs/results/a.txt", f"date 2026-01-12, commit {head}\n", "2026-01-12")
    assert remake.age(of("a.txt"), repository.root).older is False


@pytest.mark.parametrize("commit", ["not recorded", "{first}-dirty", "0123456789ab"])
def test_without_a_commit_that_git_knows_the_day_counts(repository, commit):
    first = repository.change("code/a.py", "1", "2026-01-10")
    text = f"date 2026-01-11, commit {commit.format(first=first[:12])}\n"
    repository.change("docs/results/a.txt", text, "2026-01-20")
    assert remake.age(of("a.txt"), repository.root).older is False
    repository.change("code/a.py", "2", "2026-01-12")
    assert remake.age(of("a.txt"), repository.root).older


def test_a_picture_is_as_old_as_its_file_in_git(repository):
    repository.change("docs/results/a.png", "a picture", "2026-01-11")
    repository.change("code/a.py", "1", "2026-01-10")
    assert remake.age(of("a.png"), repository.root).older is False
    repository.change("code/a.py", "2", "2026-01-12")
    assert remake.age(of("a.png"), repository.root).older
    (repository.root / "docs" / "results" / "new.png").write_text("not in git")
    assert remake.age(of("new.png"), repository.root).older is None


def test_no_repository_is_an_error(tmp_path):
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "results" / "a.txt").write_text("date 2026-01-11\n")
    with pytest.raises(SystemExit, match="git log"):
        remake.age(of("a.txt"), tmp_path)


# --- remaking ---

SCRIPT = """
import sys
from pathlib import Path
count = Path("out/remake/count")
count.write_text(count.read_text() + "x" if count.exists() else "x")
if len(count.read_text()) < int(sys.argv[1]): sys.exit(75)
if sys.argv[2] == "fail": sys.exit(3)
print("a figure")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "results" / "README.md").write_text(f"before\n{remake.BEGIN}\n{remake.END}\nafter\n")
    (tmp_path / "docs" / "results" / "a.txt").write_text("the last one, date 2026-01-11\n")
    (tmp_path / "work.py").write_text(SCRIPT)
    monkeypatch.setattr(remake, "BUNDLES", {})
    return tmp_path


def run(folder, monkeypatch, result):
    monkeypatch.setattr(remake, "RESULTS", (result,))
    failed = remake.remake_all([result], folder)
    return failed, (folder / "docs" / "results" / "a.txt").read_text()


def test_output_is_kept_with_command_and_conditions(folder, monkeypatch):
    (folder / "out" / "remake").mkdir(parents=True)
    (folder / "out" / "remake" / "old").write_text("of older code")
    failed, text = run(folder, monkeypatch, of("a.txt", commands=("python work.py 1 x",), stdout="results/a.txt"))
    first, second, conditions = text.splitlines()
    assert not failed and (first, second) == ("$ python work.py 1 x", "a figure")
    assert "cpu_class" in conditions and not (folder / "out" / "remake" / "old").exists()
    page = (folder / "docs" / "results" / "README.md").read_text()
    assert page.startswith("before\n") and page.endswith("\nafter\n") and "`python work.py 1 x`" in page
    assert remake.conditions()["date"] in page


def test_what_has_more_to_do_is_run_again(folder, monkeypatch):
    failed, text = run(folder, monkeypatch, of("a.txt", commands=("python work.py 3 x",), stdout="results/a.txt"))
    assert not failed and "a figure" in text and (folder / "out" / "remake" / "count").read_text() == "xxx"


def test_a_failure_is_said_and_changes_nothing(folder, monkeypatch, capsys):
    failing = of("a.txt", commands=("python work.py 1 fail",), stdout="results/a.txt")
    failed, text = run(folder, monkeypatch, failing)
    assert failed == ["a"] and text == "the last one, date 2026-01-11\n"
    assert "exit status 3" in capsys.readouterr().err


def test_a_bundle_that_cannot_be_built_fails_what_needs_it(folder, monkeypatch, capsys):
    monkeypatch.setattr(remake, "BUNDLES", {"engines/demo-4x": "python work.py 1 fail"})
    needs = of("a.txt", commands=("python work.py 1 engines/demo-4x",), stdout="results/a.txt")
    failed, text = run(folder, monkeypatch, needs)
    err = capsys.readouterr().err
    assert failed == ["a"] and "the last one" in text and "without engines/demo-4x" in err


def test_what_cannot_be_remade_here_is_left_out(folder, monkeypatch, capsys):
    other = of("a.txt", commands=("python work.py 1 x",), stdout="results/a.txt", cpu_class="an abacus")
    by_hand = of("a.txt", by_hand="with a pencil")
    for result, reason in ((other, "an abacus"), (by_hand, "with a pencil")):
        failed, text = run(folder, monkeypatch, result)
        assert not failed and "the last one" in text and reason in capsys.readouterr().err


def test_the_command(monkeypatch, capsys):
    def call(*argv):
        monkeypatch.setattr("sys.argv", ["remake.py", *argv])
        try:
            return remake.main(), *capsys.readouterr()
        except SystemExit as stopped:
            return stopped.code, *capsys.readouterr()

    code, out, _ = call("--json")
    found = {row["name"]: row for row in json.loads(out)["results"]}
    assert code == int(any(row["age"]["older"] for row in found.values()))
    assert found["in-turns-avx2"]["recorded"]["cpu_class"] == "AVX2" and found["peers"]["commands"]
    code, out, _ = call("--list")
    assert code == 0 and all(name in out for name in found)
    assert found["kernels"]["commands"][0] in out
    code, _, err = call("--run", "magic")
    assert code == 2 and "no such result: magic" in err and "in-turns" in err
