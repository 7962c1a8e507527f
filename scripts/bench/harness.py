"""What the benchmarks share: arguments, conditions, turns beside matrix products, tables, reports, runs in pieces."""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import torch

from jitexport.console import PlainConsole, Table, err
from jitexport.files import write_file
from jitexport.profile.measure import Timing, conditions, in_turns, matmul_rate, now
from jitexport.specs import DTYPE_NAMES

CPU = torch.device("cpu")
PROMPT = "red apple on a blue background"
MORE_TO_DO = 75  # EX_TEMPFAIL: the same command goes on where this one stopped

Facts = dict[str, Any]


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Of a script whose text says everything."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def command() -> str:
    """The command line that this process was started by, as it is written from the repository's root."""
    root, script = Path(__file__).parents[2], Path(sys.argv[0]).resolve()
    name = script.relative_to(root) if script.is_relative_to(root) else script.name
    return shlex.join(["python", str(name), *sys.argv[1:]])


def facts(*packages: str) -> Facts:
    """What stands beside figures: command, date, CPU and its class, commit, versions; None for what is not installed.

    Args:
        packages: whose versions are told beside torch's and Python's.
    """
    found: Facts = {"command": command()} | conditions()
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def said(known: Facts) -> str:
    """Facts as a line."""
    return ", ".join(f"{name} {value}" for name, value in known.items() if value is not None)


def timed(run: Callable[[], object], repeats: int, device: torch.device = CPU) -> Timing:
    """Seconds of a run over repeats, after one that is not counted."""
    run()
    return repeated(run, repeats, device)


def repeated(run: Callable[[], object], repeats: int, device: torch.device = CPU) -> Timing:
    """Seconds of a run over repeats, all of which count."""
    seconds = []
    for _ in range(repeats):
        start = now(device)
        run()
        seconds.append(now(device) - start)
    return Timing.of(seconds)


def medians(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """Median and least seconds of each way, taken in turns."""
    return {name: (statistics.median(s), min(s)) for name, s in in_turns(ways, rounds).items()}


class Products:
    """Rates of a CPU's matrix products of a dtype, beside what is measured meanwhile."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.rates: list[float] = []  # FLOP/s

    def __enter__(self) -> "Products":
        self.rates.append(matmul_rate(self.dtype, CPU))
        return self

    def __exit__(self, *raised: object) -> None:
        self.rates.append(matmul_rate(self.dtype, CPU))

    @property
    def best(self) -> float:
        """The ceiling of this run, FLOP/s."""
        return max(self.rates)

    def facts(self) -> Facts:
        """The rates as a fact."""
        name = f"{DTYPE_NAMES[self.dtype]} products before and after, GFLOP/s"
        return {name: ", ".join(f"{rate / 1e9:.0f}" for rate in self.rates)}


def show(known: Facts, rows: Sequence[Facts], columns: Mapping[str, Callable[[Facts], str]], *, as_json: bool,
         title: str | None = None) -> None:  # fmt: skip
    """Print rows: for machines as they are, for people as a table with the facts below it.

    Args:
        columns: the table's headings, and the text of a row under each; text is left, numbers right.
    """
    if as_json:
        print(json.dumps({"conditions": known, "rows": list(rows)}, indent=1))
        return
    table = Table(title=title)
    cells = {heading: [text(row) for row in rows] for heading, text in columns.items()}
    for heading, texts in cells.items():
        numbers = all(text[:1].isdigit() for text in texts)
        table.add_column(heading, justify="right" if numbers else "left")
    for row in zip(*cells.values(), strict=True):
        table.add_row(*row)
    console = PlainConsole(width=120)
    console.print(table)
    console.print(said(known), soft_wrap=True)


def write(folder: Path, name: str, report: Facts, page: str | None = None) -> None:
    """Write a report as NAME.json and, where there is one, its page as NAME.md, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"json": json.dumps(report, indent=1) + "\n"} | ({} if page is None else {"md": page})
    for suffix, text in files.items():
        write_file(folder / f"{name}.{suffix}", text.encode())


class Pieces:
    """A run that begins nothing after some seconds, and is started again for what is left."""

    def __init__(self, seconds: float) -> None:
        self.until = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds; none or fewer when they are over."""
        return self.until - time.monotonic()

    def stop(self, what: str, names: Iterable[str]) -> NoReturn:
        """Say what is left, and exit with `MORE_TO_DO`."""
        names = list(names)
        err.print(f"{len(names)} {what} left, from {names[0]} on: run the same command again")
        sys.exit(MORE_TO_DO)
