"""Damaged bundles: files with other bytes, fewer files or more, links, and manifests that say something else."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from outcomes import Outcome, bundle_files

import jitexport
from jitexport import registry
from jitexport.bundle import EngineBundle
from jitexport.bundle.manifest import DIGEST_NAME, FILE_NAME, digest_line
from jitexport.bundle.reading import read_manifest
from jitexport.errors import JitExportError

# --- damaged files ---------------------------------------------------------------------------------------------------


@contextmanager
def counting_loads(backend: str) -> Iterator[list[str]]:
    """Names of the engines that the backend is asked to open meanwhile."""
    kind = type(registry.backend(backend))
    opened: list[str] = []
    real = kind.load

    def load(self: Any, spec: Any, *rest: Any) -> Any:
        opened.append(spec.name)
        return real(self, spec, *rest)

    with mock.patch.object(kind, "load", load):
        yield opened


def expect_refusal(outcome: Outcome, bundle: Path, backend: str, what: str, verify: str = "full") -> None:
    """Load a damaged bundle: one of the package's errors, and no engine opened."""
    with counting_loads(backend) as opened:
        try:
            jitexport.load(bundle, verify=verify)
            ending = "loaded"
        except JitExportError as error:
            ending = "" if str(error) and error.remedy else f"{type(error).__name__} without a remedy"
        except Exception as error:
            ending = f"{type(error).__name__}: {error}"
    outcome.record(not ending and not opened, f"{what}: {ending or 'refused'}, {len(opened)} engines opened")


def expect_only_full(outcome: Outcome, bundle: Path, backend: str, path: Path) -> None:
    """A bundle with a link to the right bytes: loads with all digests; not with sizes only, the manifest's aside."""
    try:
        jitexport.load(bundle)
        ending = ""
    except JitExportError as error:
        ending = str(error)
    outcome.record(not ending, f"{path.name} a link to its own bytes: {ending}")
    if path.name not in (FILE_NAME, DIGEST_NAME):
        expect_refusal(outcome, bundle, backend, f"{path.name} a link, sizes only", verify="size")


def flipped(path: Path, rng: random.Random) -> Path:
    """A copy of a file beside it, with one bit changed."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    other = path.with_name(path.name + ".flipped")
    other.unlink(missing_ok=True)
    other.write_bytes(content)
    return other


def put(path: Path, content: bytes) -> None:
    """Write a file anew: libraries of an earlier load stay mapped, and would crash if their file were cut."""
    path.unlink()
    path.write_bytes(content)


def bit_flips(bundle: Path, count: int, rng: random.Random) -> Outcome:
    """One bit of one file, then back; a file is as likely as any other, whatever its size."""
    outcome, backend = Outcome("bit flips"), read_manifest(bundle).backend
    for _ in range(count):
        path = rng.choice(bundle_files(bundle))
        content = path.read_bytes()
        at, bit = rng.randrange(len(content)), rng.randrange(8)
        put(path, content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        expect_refusal(outcome, bundle, backend, f"{path.name}, byte {at}, bit {bit}")
        put(path, content)
    jitexport.load(bundle)  # the copy is whole again, so the refusals were about the flips
    return outcome


def truncations(bundle: Path, count: int, rng: random.Random) -> Outcome:
    outcome, backend = Outcome("truncations"), read_manifest(bundle).backend
    for _ in range(count):
        path = rng.choice(bundle_files(bundle))
        content = path.read_bytes()
        length = rng.randrange(len(content))
        put(path, content[:length])
        expect_refusal(outcome, bundle, backend, f"{path.name} cut to {length}")
        put(path, content)
    jitexport.load(bundle)
    return outcome


def replacements(bundle: Path, count: int, rng: random.Random) -> list[Outcome]:
    """Deletions, swaps, extra files, and links, `count` of each.

    Links lead to the very bytes that were there, with which the bundle must load where digests are compared, and must
    be refused where they are not; then to bytes of which one bit is another.
    """
    backend = read_manifest(bundle).backend
    aside = bundle.with_name(bundle.name + ".aside")
    outcomes = [Outcome(n) for n in ("deletions", "swaps", "extra files", "symlinks", "hard links")]
    deletions, swaps, extras, symlinks, hard_links = outcomes
    for i in range(count):
        path = rng.choice(bundle_files(bundle))
        path.rename(aside)
        expect_refusal(deletions, bundle, backend, f"{path.name} deleted")
        for outcome, link in ((symlinks, path.symlink_to), (hard_links, path.hardlink_to)):
            link(aside)
            expect_only_full(outcome, bundle, backend, path)
            path.unlink()
            link(flipped(aside, rng))
            expect_refusal(outcome, bundle, backend, f"{path.name} a link to other bytes")
            path.unlink()
        aside.rename(path)

        other = rng.choice([p for p in bundle_files(bundle) if p.read_bytes() != path.read_bytes()])
        path.rename(aside), other.rename(path), aside.rename(other)
        expect_refusal(swaps, bundle, backend, f"{path.name} and {other.name} swapped")
        path.rename(aside), other.rename(path), aside.rename(other)

        extra = path.with_name(f"extra{i}")
        [extra.touch, extra.mkdir, lambda e=extra: os.mkfifo(e), lambda e=extra: e.symlink_to("/dev/zero")][i % 4]()
        expect_refusal(extras, bundle, backend, f"{extra.name} beside {path.name}")
        extra.rmdir() if i % 4 == 1 else extra.unlink()
    jitexport.load(bundle)
    return outcomes


# --- mutated manifests -----------------------------------------------------------------------------------------------

_VALUES = (
    None, True, False, 0, 1, -1, 2, 3, 10**6, -(10**30), 0.5, -1.5, 1e308, "", "x", "..", "/", "a/b", "fp32", "bf16",
    "int64", "\x00", "é" * 50, [], {}, [1], [[]], {"a": 1}, "engines/stage0", "weights/transformer.safetensors",
)


def mutated_json(raw: Any, rng: random.Random) -> bytes:
    """A JSON document with one to three random changes: of values, keys, list items, or of its text."""
    raw = copy.deepcopy(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        nodes = [n for n in _nodes(raw) if n]
        node = rng.choice(nodes)
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        donor = rng.choice(nodes)
        action = rng.randrange(7)
        if action == 0:
            del node[key]
        elif action == 1:
            node[key] = copy.deepcopy(rng.choice(list(donor.values()) if isinstance(donor, dict) else donor))
        elif action == 2 and isinstance(node, dict):
            node[rng.choice([f"{key}_", key.upper(), "", "extra"])] = node.pop(key)
        elif action == 3 and isinstance(node, list):
            node.insert(key, copy.deepcopy(node[key]))
        elif action == 4 and isinstance(node, list):
            rng.shuffle(node)
        elif action == 5 and isinstance(node[key], (int, float)):
            node[key] = node[key] * rng.choice((-1, 0, 2, 1.5)) + rng.choice((0, 1, -1))
        else:
            node[key] = rng.choice(_VALUES)
    text = bytearray(json.dumps(raw, indent=1).encode())
    if rng.random() < 0.1:
        start = rng.randrange(len(text))
        text[start : start + rng.randrange(20)] = rng.randbytes(rng.randrange(20))
    return bytes(text)


def _nodes(raw: Any) -> Iterator[Any]:
    """All objects and lists of a JSON document."""
    if isinstance(raw, (dict, list)):
        yield raw
        for value in raw.values() if isinstance(raw, dict) else raw:
            yield from _nodes(value)


def manifest_mutations(bundle: Path, count: int, rng: random.Random, loads: int = 500) -> Outcome:
    """Manifests that are changed and signed again, so that the schema and the loading code see them.

    What passes the schema is loaded, the first `loads` of them, as long as that opens only files that are unchanged.
    """
    outcome = Outcome("mutated manifests")
    text = (bundle / FILE_NAME).read_bytes()
    raw = json.loads(text)
    tally = {"loaded": 0, "opened": 0, "refused": 0}
    for i in range(count):
        changed = mutated_json(raw, rng)
        (bundle / FILE_NAME).write_bytes(changed)
        (bundle / DIGEST_NAME).write_bytes(digest_line(changed))
        ending = "opened"
        try:
            EngineBundle.open(bundle, "size")
            if tally["loaded"] < loads:
                jitexport.load(bundle, verify="size")
                ending = "loaded"
            held = True
        except JitExportError:
            ending, held = "refused", True
        except Exception as error:
            ending, held = f"{type(error).__name__}: {error}", False
        outcome.record(held, f"mutation {i}: {ending}")
        if held:
            tally[ending] += 1
    (bundle / FILE_NAME).write_bytes(text)
    (bundle / DIGEST_NAME).write_bytes(digest_line(text))
    jitexport.load(bundle)
    outcome.note = f"{tally['refused']} refused, {tally['loaded'] + tally['opened']} harmless (free text, for example)"
    return outcome
