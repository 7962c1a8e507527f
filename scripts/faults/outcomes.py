"""What all faults share: how they are counted, and how a bundle is looked at."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from jitexport.bundle import EngineBundle
from jitexport.errors import BundleError

PROMPTS = ("red apple on a blue background", "a cat", "green tree", "yellow house near the river")


@dataclass
class Outcome:
    """What a kind of fault came to: cases tried, those that ended as they must, and the others in words."""

    name: str
    cases: int = 0
    held: int = 0
    failures: list[str] = field(default_factory=list)
    note: str = ""

    def record(self, held: bool, otherwise: str) -> None:
        self.cases += 1
        self.held += held
        if not held:
            self.failures.append(otherwise)


def bundle_files(bundle: Path) -> list[Path]:
    return sorted(p for p in bundle.rglob("*") if p.is_file())


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def opens(path: Path) -> bool:
    """Whether a bundle is whole; anything but this package's errors is passed on."""
    try:
        EngineBundle.open(path)
        return True
    except BundleError:
        return False
