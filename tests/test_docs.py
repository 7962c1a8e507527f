"""What README and docs say is so: links lead somewhere, commands exist, examples fit the package and run.

Pages in docs/results are records of what was run: their links are checked, their commands are those of their day.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest
import typer

import jitexport
from jitexport.cli import app
from jitexport.plan import CustomSchedule
from tests.conftest import QUICK
from tests.pages import ROOT, Block, anchors, blocks, links, pages, prose, titled

ALL = pages()
WRITTEN = [page for page in ALL if page.parent.name != "results"]
BLOCKS = [block for page in WRITTEN for block in blocks(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]

GROUP = typer.main.get_command(app)
#: Where commands stand: shells, units of systemd.
SHELLS = ("bash", "ini", "sh")

#: Files that the pages have one write.
TOYS = {
    title for page in ("family", "backend", "method", "kernel") for title in titled(f"adding-a-{page}.md")
    if "," not in title and title != "jitexport/registry.py"
}  # fmt: skip


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# --- links and paths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ALL, ids=name)
def test_links_lead_to_files_and_headings(page):
    wrong = []
    for line, target in links(page):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        goal = (page.parent / path).resolve() if path else page
        if not goal.exists() or not goal.is_relative_to(ROOT):
            wrong.append(f"{name(page)}:{line}: no file {target}")
        elif anchor and (goal.suffix != ".md" or anchor not in anchors(goal)):
            wrong.append(f"{name(page)}:{line}: no heading {target}")
    assert not wrong, "\n".join(wrong)


def test_links_and_headings_are_found_at_all(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A *new* `page`: 1.5\n\n[a](b.md#c) ![d `e`](f.png), `[x](x.md)`\n```\n[x](x.md)\n```\n## A\n")
    assert links(page) == [(3, "b.md#c"), (3, "f.png")]
    assert anchors(page) == {"a-new-page-15", "a"}


@pytest.mark.parametrize("page", [p for p in WRITTEN if p.name != "CHANGELOG.md"], ids=name)
def test_paths_of_the_repository_exist(page):
    text = re.sub(r"\]\([^)]*\)", "]", page.read_text(encoding="utf-8"))
    named = re.findall(r"(?<![\w./-])(?:scripts|tests|jitexport)/[\w/-]*[\w-]+\.(?:py|sh|h|md|html)\b", text)
    missing = sorted({path for path in named if not (ROOT / path).is_file()} - TOYS)
    assert not missing


@pytest.mark.parametrize("page", [p for p in WRITTEN if p.name != "CHANGELOG.md"], ids=name)
def test_scripts_named_without_a_folder_exist(page):
    """`python scripts/x.py` is above; here "`x.py`, `y.py`" in the same breath as a folder."""
    for _, line in prose(page):
        for folder, rest in re.findall(r"`(scripts/(?:\w+/)?)\w+\.py`((?:, `\w+\.py`)+)", line):
            for script in re.findall(r"`(\w+\.py)`", rest):
                assert (ROOT / folder / script).is_file(), f"{name(page)}: {folder}{script}"


def test_the_architecture_names_every_module_once():
    package = ROOT / "jitexport"
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.+?`) \|", page, re.MULTILINE)
    named = [path.rstrip("/") for cell in cells for path in re.findall(r"`([\w/.]+)`", cell)]
    there = {path.name for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert len(named) == len(set(named))
    assert [path for path in named if not (package / path).exists()] == []
    assert sorted(there - {path.split("/")[0] for path in named} - {"__init__.py", "__main__.py", "_version.py"}) == []


# --- commands ---------------------------------------------------------------------------------------------------------


def commands(block: Block) -> list[list[str]]:
    """The command lines of ours in a block, as words behind `jitexport`."""
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        for match in re.finditer(r"(?:^\s*|[/;]\s*|\bdo\s+)jitexport\s+(?P<rest>[a-z-].*)", line):
            words = shlex.split(match["rest"], comments=True)
            ends = [i for i, word in enumerate(words) if word in (";", "|", "||", "&&", ">", "2>")]
            found.append(words[: min(ends, default=len(words))])
    return found


def parse(words: list[str]) -> None:
    """As the program reads them, without running anything."""
    with typer.Context(GROUP, info_name="jitexport") as context:
        verb, command, rest = GROUP.resolve_command(context, list(words))
        command.make_context(verb, rest, parent=context)


SHOWN = [
    pytest.param(words, id=f"{block}-{words[0]}")
    for block in BLOCKS if block.language in SHELLS for words in commands(block)
]


@pytest.mark.parametrize("words", SHOWN)
def test_command_lines_are_understood(words):
    parse(words)


def test_command_lines_that_are_not_understood_are_noticed():
    block = Block(ROOT / "x.md", "bash", "", "jitexport plan --speedup 4  # fast\njitexport plan --nonesuch\n", 1)
    good, bad = commands(block)
    parse(good)
    assert good == ["plan", "--speedup", "4"]
    for words in (bad, ["nonesuch"], ["plan", "--speedup", "many"], ["generate"]):
        with pytest.raises(typer.BadParameter.__base__):  # what the program ends with 2 for
            parse(words)
    assert len(SHOWN) > 30


@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_verbs_and_options_in_the_text_exist(page):
    """`jitexport build [--batch 4]`, with brackets and placeholders: verbs and options only."""
    for line, text in prose(page):
        for verb, rest in re.findall(r"`jitexport ([a-z][a-z-]*)\b([^`]*)`", text):
            assert verb in GROUP.commands, f"{name(page)}:{line}: no command {verb}"
            known = {o for p in GROUP.commands[verb].params for o in (*p.opts, *p.secondary_opts)}
            unknown = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", rest)) - known
            assert not unknown, f"{name(page)}:{line}: {verb} has no {sorted(unknown)}"


# --- Python -----------------------------------------------------------------------------------------------------------


def tree(block: Block) -> ast.Module:
    """An example; a line for the registry is an entry of a table."""
    return ast.parse(f"{{{block.text}}}" if ", in " in block.title else block.text, str(block))


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_examples_compile_and_name_what_there_is(block):
    parsed = tree(block)
    compile(parsed, str(block), "exec")
    toys = {title.removesuffix(".py").replace("/", ".") for title in TOYS}
    pipelines = set()
    for node in ast.walk(parsed):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jitexport") and node.module not in toys:
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{block}: {node.module} has no {alias.name}"
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("jitexport.load("):
            pipelines |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    for node in ast.walk(parsed):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "jitexport":
                assert node.attr in jitexport.__all__, f"{block}: jitexport.{node.attr} is no public name"
            elif node.value.id in pipelines:
                assert hasattr(jitexport.Pipeline, node.attr), f"{block}: a pipeline has no {node.attr}"
        if isinstance(node, ast.Call):
            check_arguments(block, node, pipelines)


def check_arguments(block: Block, call: ast.Call, pipelines: set[str]) -> None:
    """Keywords of calls of ours."""
    called = {
        "jitexport.load": jitexport.load, "jitexport.build": jitexport.build,
        **{pipe: jitexport.Pipeline.__call__ for pipe in pipelines},
        **{f"{pipe}.load_lora": jitexport.Pipeline.load_lora for pipe in pipelines},
        **{f"{pipe}.load_checkpoint": jitexport.Pipeline.load_checkpoint for pipe in pipelines},
    }.get(ast.unparse(call.func))  # fmt: skip
    if called is not None:
        unknown = {k.arg for k in call.keywords if k.arg} - inspect.signature(called).parameters.keys()
        assert not unknown, f"{block}: {ast.unparse(call.func)} takes no {sorted(unknown)}"


@pytest.mark.parametrize("page", ["README.md", "docs/use.md"])
def test_the_lines_of_use_run(page, make_bundle, tmp_path, monkeypatch):
    """As they stand, on a tiny bundle instead of the demo model's."""
    bundle = make_bundle(custom=CustomSchedule((2, 2), (0.5, 1.0)))
    example = next(b for b in blocks(ROOT / page) if b.language == "python")
    assert '"engines/demo-4x"' in example.text
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {}
    exec(compile(example.text.replace('"engines/demo-4x"', repr(str(bundle))), page, "exec"), space)
    assert [image.size for image in space["images"]] == [(32, 48)] * 2
    if page == "README.md":
        assert sorted(path.name for path in tmp_path.iterdir()) == ["image-0.png", "image-1.png"]


# --- the day's work ---------------------------------------------------------------------------------------------------


def test_the_quick_set_has_modules_of_every_part():
    tests = ROOT / "tests"
    assert all((tests / module).is_file() for module in QUICK)
    parts = {path.parent.relative_to(tests).parts[:1] for path in tests.rglob("test_*.py")}
    left_out = parts - {Path(module).parent.parts[:1] for module in QUICK}
    assert left_out == {("backends",), ("kernels",)}  # compilers


def test_the_readme_fits_on_two_screens():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 100
