"""Results and pictures in docs/: which are older than the code they measure, and their commands, run again.

    python scripts/remake.py                       # which are older; exit code 1 if any is
    python scripts/remake.py --list                # all of them, with command, date and machine
    python scripts/remake.py --run                 # remake all that are older, one after the other
    python scripts/remake.py --run in-turns peers  # remake these

The table of results is scripts/results.py. A result is older than its code if git knows commits that changed the code
after the commit that the result was measured on; or, where none is recorded or it had changes of its own, after the day
it was measured on; or, for pictures that say neither, after the day they came to the repository. Whatever commands keep
from run to run is thrown away first, and bundles that they measure are built anew. Nothing else may run meanwhile.
"""

import argparse
import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from bench.harness import MORE_TO_DO, command, parser, said
from results import BUNDLES, RESULTS, SCRATCH, Result

from jitexport import machine
from jitexport.console import err, out
from jitexport.files import write_file
from jitexport.profile.measure import conditions

ROOT = Path(__file__).parents[1]
NOT_RECORDED = "not recorded"
#: The list in docs/results/README.md stands between these.
BEGIN, END = "<!-- list: scripts/remake.py -->", "<!-- end of list -->"


# --- what results say of themselves -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """When, where and on which commit a result was measured; `NOT_RECORDED` where it does not say."""

    date: str = NOT_RECORDED
    cpu: str = NOT_RECORDED
    cpu_class: str = NOT_RECORDED
    commit: str = NOT_RECORDED


def recorded(result: Result, root: Path = ROOT) -> Record:
    """What the first file says that says anything; pictures say nothing."""
    for name in result.files:
        path = root / "docs" / name
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            facts = {k: v for k, v in content.items() if isinstance(v, str)} | content.get("conditions", {})
            facts["date"] = facts.get("date", NOT_RECORDED)[:10]
            return Record(**{f.name: facts.get(f.name) or NOT_RECORDED for f in fields(Record)})
        if path.suffix == ".csv":
            return _of_table(path.read_text(encoding="utf-8"))
        if path.suffix in (".txt", ".md"):
            return _of_text(path.read_text(encoding="utf-8"))
    return Record()


def _of_table(text: str) -> Record:
    """Of the newest row; its processor is "NAME (CLASS), 2 threads", in older rows without the class."""
    newest = max(csv.DictReader(text.splitlines()), key=lambda row: row["date"])
    cpu = re.match(r"(.+?)(?: \((.+)\))?, \d+ threads$", newest["cpu"])
    name, kind = cpu.groups() if cpu else (newest["cpu"], None)
    return Record(newest["date"], name, kind or NOT_RECORDED, newest["commit"])


def _of_text(text: str) -> Record:
    """From "date 2026-11-21, commit ..., cpu ..., cpu_class ..., threads 2", or a list with a fact a line."""
    patterns = {
        "date": r"\bdate:? (\d{4}-\d\d-\d\d)",
        "cpu": r"\bcpu:? ([^,\n]+)",
        "cpu_class": r"\bcpu_class:? (.+?)(?=, threads|, commit|\. |\n|$)",
        "commit": r"\bcommit:? ([0-9a-f]{7,40}(?:-dirty)?)",
    }
    found = {name: re.search(pattern, text) for name, pattern in patterns.items()}
    return Record(**{name: match[1] for name, match in found.items() if match})


# --- age --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Age:
    """Whether a result is older than its code.

    Attributes:
        older: None where nothing is known.
        why: in words.
    """

    older: bool | None
    why: str


def git(*arguments: str, root: Path = ROOT) -> str:
    """Output of a command of git.

    Raises:
        SystemExit: there is no git, or no checkout.
    """
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        raise SystemExit("git is needed to tell the age of results, and is not installed") from None
    if done.returncode:
        raise SystemExit(f"git {arguments[0]}: {done.stderr.strip()}")
    return done.stdout


def age(result: Result, root: Path = ROOT) -> Age:
    """Of a result by the commits that changed what it measures."""
    known = recorded(result, root)
    if known.commit != NOT_RECORDED and not known.commit.endswith("-dirty") and _has(known.commit, root):
        since, limit = f"commit {known.commit}", [f"{known.commit}..HEAD"]
    elif known.date != NOT_RECORDED:
        since, limit = known.date, [f"--since={known.date}T23:59:59Z"]
    elif date := git("log", "-1", "--format=%cs", "--", *(f"docs/{file}" for file in result.files), root=root).strip():
        since, limit = f"{date}, when it came to the repository", [f"--since={date}T23:59:59Z"]
    else:
        return Age(None, "says neither commit nor date, and git does not know it")
    lines = git("log", "--format=%h %s", *limit, "--", *result.measures, root=root).splitlines()
    if not lines:
        return Age(False, f"nothing changed it since {since}")
    return Age(True, f"commits that changed it since {since}: {len(lines)}, the last {lines[0]}")


def _has(commit: str, root: Path) -> bool:
    """Whether git knows a commit; a copy without history does not."""
    done = subprocess.run(["git", "-C", str(root), "cat-file", "-e", f"{commit}^{{commit}}"], capture_output=True)
    return done.returncode == 0


# --- remaking ---------------------------------------------------------------------------------------------------------


def why_not(result: Result) -> str | None:
    """Why a result cannot be remade here; None if it can."""
    if not result.commands:
        return f"by hand: {result.by_hand}"
    here = machine.cpu_class()
    if result.cpu_class is not None and result.cpu_class != here:
        return f"belongs to CPUs with {result.cpu_class}, and this one has {here}"
    return None


def words_of(line: str) -> list[str]:
    """A command of the table as this process runs it."""
    name, *rest = shlex.split(line)
    programs = {"python": [sys.executable], "jitexport": [sys.executable, "-m", "jitexport"]}
    return [*programs[name], *rest]


def run_command(line: str, root: Path) -> str:
    """Standard output of a command, run again as long as it says that there is more to do.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    while True:
        err.print(f"$ {line}", soft_wrap=True)
        done = subprocess.run(words_of(line), cwd=root, stdout=subprocess.PIPE, text=True, env=environment)
        if done.returncode == 0:
            return done.stdout
        if done.returncode != MORE_TO_DO:
            raise subprocess.CalledProcessError(done.returncode, line)


def remake(result: Result, root: Path = ROOT) -> None:
    """Run a result's commands, and keep the output of the last one where the table says so.

    Raises:
        subprocess.CalledProcessError: one failed; files that it did not write are as before.
    """
    for line in result.commands:
        printed = run_command(line, root)
    if result.stdout is not None:
        facts = "" if "commit " in printed else said(conditions()) + "\n"
        target = root / "docs" / result.stdout
        write_file(target, f"$ {result.commands[-1]}\n{printed.rstrip()}\n{facts}".encode())


def remake_all(chosen: Sequence[Result], root: Path = ROOT) -> list[str]:
    """Build the bundles that are needed, remake results, and write the list anew; the names of those that failed."""
    failed, possible, broken = [], [], set()
    shutil.rmtree(root / SCRATCH, ignore_errors=True)
    (root / SCRATCH).mkdir(parents=True)
    for result in chosen:
        if reason := why_not(result):
            err.print(f"{result.name} left out: {reason}", soft_wrap=True)
        else:
            possible.append(result)
    for path in dict.fromkeys(path for result in possible for path in result.bundles):
        try:
            run_command(BUNDLES[path], root)
        except subprocess.CalledProcessError as error:
            err.print(f"{path} was not built: exit code {error.returncode}")
            broken.add(path)
    for result in possible:
        try:
            if missing := broken.intersection(result.bundles):
                raise FileNotFoundError(f"without {', '.join(sorted(missing))}")
            remake(result, root)
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            err.print(f"{result.name} was not remade: {error}", soft_wrap=True)
            failed.append(result.name)
    write_list(root)
    return failed


# --- reports ----------------------------------------------------------------------------------------------------------


def listed(root: Path = ROOT) -> str:
    """All results as a table of Markdown, for docs/results/README.md."""
    lines = ["| files | what they show | made by | measured | code, in jitexport/ |", "|---|---|---|---|---|"]
    for result in RESULTS:
        known = recorded(result, root)
        files = "<br>".join(f"[{Path(f).name}]({os.path.relpath(f, 'results')})" for f in result.files)
        made = result.by_hand or "<br>".join(f"`{line}`" for line in result.commands)
        code = ", ".join(f"`{path.removeprefix('jitexport/')}`" for path in result.measures)
        where = f"date: {known.date}<br>CPU: {known.cpu}<br>class: {known.cpu_class}<br>commit: {known.commit}"
        lines.append(f"| {files} | {result.shows} | {made} | {where} | {code} |")
    return "\n".join(lines)


def write_list(root: Path = ROOT) -> None:
    """Put the list into docs/results/README.md.

    Raises:
        SystemExit: the page has no place for it.
    """
    page = root / "docs" / "results" / "README.md"
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{page} has no place for the list: it stands between {BEGIN} and {END}")
    before, rest = text.split(BEGIN, 1)
    write_file(page, f"{before}{BEGIN}\n{listed(root)}\n{END}{rest.split(END, 1)[1]}".encode())


def rows(results: Iterable[Result], root: Path = ROOT) -> list[dict[str, Any]]:
    """What is known of results, for machines."""
    return [
        asdict(result) | {"recorded": asdict(recorded(result, root)), "age": asdict(age(result, root))}
        for result in results
    ]


def show(found: Sequence[dict[str, Any]], everything: bool) -> None:
    """Print all results, or those that are older or of unknown age; commands as they can be copied."""
    for row in found:
        older = {True: "older than its code", False: "as new as its code", None: "of unknown age"}[row["age"]["older"]]
        if not everything and row["age"]["older"] is False:
            continue
        known = row["recorded"]
        out.print(f"{row['name']}: {older}; {row['age']['why']}", soft_wrap=True)
        out.print(f"    measured {known['date']}, {known['cpu']}, class {known['cpu_class']}", soft_wrap=True)
        if everything:
            for line in row["commands"] or [row["by_hand"]]:
                out.print(f"    {line}", soft_wrap=True)


def options() -> argparse.ArgumentParser:
    """The command line."""
    arguments = parser(__doc__)
    arguments.add_argument("--run", nargs="*", metavar="NAME", help="remake these; without names all that are older")
    arguments.add_argument("--list", action="store_true", help="show all, with their commands")
    arguments.add_argument("--write-list", action="store_true", help="write the list in docs/results/README.md anew")
    arguments.add_argument("--json", action="store_true", help="print all as JSON")
    return arguments


def main() -> int:
    arguments = options()
    args = arguments.parse_args()
    by_name = {result.name: result for result in RESULTS}
    if args.run is not None:
        if unknown := sorted(set(args.run) - by_name.keys()):
            arguments.error(f"no such result: {', '.join(unknown)}; there are {', '.join(by_name)}")
        chosen = [by_name[name] for name in args.run] or [r for r in RESULTS if age(r).older is not False]
        failed = remake_all(chosen)
        return int(bool(failed))
    if args.write_list:
        write_list()
        return 0
    found = rows(RESULTS)
    if args.json:
        print(json.dumps({"command": command(), "results": found}, indent=1))
    else:
        show(found, args.list)
    return 0 if args.list else int(any(row["age"]["older"] for row in found))


if __name__ == "__main__":
    sys.exit(main())
