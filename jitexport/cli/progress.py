"""How far a verb is, on stderr: a bar on a terminal, a line per step elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Self

from jitexport import interrupts
from jitexport.console import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    err,
    text_column,
)


def images_bar() -> Progress:
    """A bar that counts images."""
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    return Progress(text_column("{task.description}"), *columns, console=err)


class _OnTerminal:
    """A bar with one task, shown on a terminal only."""

    def __init__(self, bar: Progress, name: str) -> None:
        self._bar = bar
        self._task = bar.add_task(name)
        self._since = time.monotonic()

    def __enter__(self) -> Self:
        if err.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


class BuildProgress(_OnTerminal):
    """Of a build; see `jitexport.building.engines.Progress`."""

    def __init__(self) -> None:
        columns = SpinnerColumn(), text_column("{task.description}"), BarColumn(), MofNCompleteColumn()
        super().__init__(Progress(*columns, TimeElapsedColumn(), console=err), "build")
        self._steps: list[str] = []
        self._done: dict[str, float] = {}

    def begin(self, steps: Sequence[str]) -> None:
        """All steps, in order."""
        self._steps = list(steps)
        self._bar.update(self._task, total=len(self._steps))

    def step(self, name: str) -> None:
        """A step begins."""
        interrupts.check()
        index = self._steps.index(name)
        left = self._estimate(index)
        self._bar.update(self._task, completed=index, description=f"{name}{left}")
        if not err.is_terminal:
            err.print(f"[{index + 1}/{len(self._steps)}] {name}{left}")
        self._done[name] = time.monotonic()

    def note(self, text: str) -> None:
        """A line above the bar."""
        err.print(text, markup=False, highlight=False, soft_wrap=True)

    def _estimate(self, index: int) -> str:
        """Time left, from the engines that are done: they take most of it, and about the same each."""
        starts = [t for name, t in self._done.items() if name.startswith("engine")]
        if not starts:
            return ""
        each = (time.monotonic() - starts[0]) / len(starts)
        engines = sum(name.startswith("engine") for name in self._steps[index:])
        return f", about {each * engines:.0f} s left" if engines else ""


class EvaluationProgress(_OnTerminal):
    """Of an evaluation, by sources; see `jitexport.evaluate.evaluation.Progress`."""

    def __init__(self) -> None:
        columns = SpinnerColumn(), text_column("{task.description}"), BarColumn(), TimeElapsedColumn()
        super().__init__(Progress(*columns, text_column("left"), TimeRemainingColumn(), console=err), "evaluate")
        self._work = self._done = 0.0

    def begin(self, work: float) -> None:
        """The work ahead."""
        self._work = work
        self._bar.update(self._task, total=work)

    def step(self, name: str) -> None:
        """A source begins."""
        interrupts.check()
        self._bar.update(self._task, description=name)
        if not err.is_terminal:
            seconds = time.monotonic() - self._since
            left = seconds / self._done * (self._work - self._done) if self._done else 0
            estimate = f", about {left:.0f} s left" if left else ""
            err.print(f"{name}{estimate}")

    def advance(self, work: float) -> None:
        """So much is done."""
        self._done += work
        self._bar.advance(self._task, work)
