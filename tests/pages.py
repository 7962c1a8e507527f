"""Markdown pages as tests read them: code blocks, links, headings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)(?: +title=\"(?P<title>[^\"]*)\")? *$")
_HEADING = re.compile(r"^#{1,6} +(?P<text>.+?) *#* *$")
_LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\((?P<target>[^()\s]+(?:\([^()]*\))?[^()\s]*)\)")
_CODE = re.compile(r"`[^`]*`")


@dataclass(frozen=True)
class Block:
    """A fenced block of code: its language, its title ("" for none), its text, and the line that it starts at."""

    page: Path
    language: str
    title: str
    text: str
    line: int

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """What people read: the README, and everything under docs."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """A page's fenced blocks."""
    found: list[Block] = []
    opened: re.Match[str] | None = None
    inside: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if opened is None:
            opened, inside = _FENCE.match(line), []
        elif line.strip() == "```":
            text = "".join(f"{part.removeprefix(opened['indent'])}\n" for part in inside)
            found.append(Block(page, opened["language"], opened["title"] or "", text, number - len(inside)))
            opened = None
        else:
            inside.append(line)
    assert opened is None, f"{page}: a block of code that does not end"
    return found


def prose(page: Path) -> list[tuple[int, str]]:
    """A page's lines outside of blocks of code, with their numbers."""
    kept, inside = [], False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if line.lstrip().startswith("```"):
            inside = not inside
        elif not inside:
            kept.append((number, line))
    return kept


def links(page: Path) -> list[tuple[int, str]]:
    """Targets of a page's links and pictures, with the numbers of their lines."""
    return [
        (number, match["target"])
        for number, line in prose(page) for match in _LINK.finditer(_CODE.sub(lambda code: "x" * len(code[0]), line))
    ]


def anchors(page: Path) -> set[str]:
    """What links may name behind a "#": the headings as GitHub and the site both write them."""
    found: set[str] = set()
    for _, line in prose(page):
        if heading := _HEADING.match(line):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading["text"])
            slug = re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-")
            found.add(next(s for s in (slug, *(f"{slug}-{i}" for i in range(1, 100))) if s not in found))
    return found


def titled(page: str) -> dict[str, str]:
    """The text of each block of a page in docs that has a title."""
    return {block.title: block.text for block in blocks(ROOT / "docs" / page) if block.title}
