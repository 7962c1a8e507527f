"""The site's pages that are not in this folder, and links that lead out of it.

README.md, CONTRIBUTING.md and CHANGELOG.md are pages of the site as they are: nothing is written twice. Their links,
and those of all other pages, are written for whoever reads the repository. The site has pages and results; a source
file it can only name.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

#: Files of the repository that are pages: {path: page}.
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}

LINK = re.compile(r"(?P<picture>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^()\s]+)\)")
CODE = re.compile(r"(^ *```.*?^ *```|`[^`\n]*`)", re.DOTALL | re.MULTILINE)


def on_files(files: Files, *, config: Any, **_: Any) -> Files:
    """Adds the pages that lie outside."""
    root = Path(config.config_file_path).parent
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(root / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Turns a page's links, outside of code, into the site's."""
    root, here = Path(config.config_file_path).parent, page.file.src_uri
    source = next((source for source, made in OUTSIDE.items() if made == here), f"docs/{here}")
    parts = CODE.split(markdown)
    # Links may have code in their text, so code is put aside and not cut at.
    aside = {f"\x00{i}\x00": part for i, part in enumerate(parts) if i % 2}
    text = "".join(f"\x00{i}\x00" if i % 2 else part for i, part in enumerate(parts))
    text = LINK.sub(lambda link: site_link(link, root, source, here), text)
    return re.sub("\x00\\d+\x00", lambda mark: aside[mark[0]], text)


def site_link(link: re.Match[str], root: Path, source: str, here: str) -> str:
    """A link of the file `source` in the repository `root` as the site's page `here` has it."""
    target, hash_, anchor = link["target"].partition("#")
    if not target or re.match(r"[a-z]+:", target):
        return link[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if (root / path / "README.md").is_file():
        path = f"{path}/README.md"
    if path in OUTSIDE or (path.startswith("docs/") and not (root / path).is_dir()):
        goal = OUTSIDE.get(path, path.removeprefix("docs/"))
        moved = posixpath.relpath(goal, posixpath.dirname(here) or ".")
        return f"{link['picture']}[{link['text']}]({moved}{hash_}{anchor})"
    return link["text"] if path in link["text"] else f"{link['text']} (`{path}`)"
