"""Bundles on a Hugging Face hub: `push` uploads one, `pull` downloads one and checks it before it is put in place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jitexport import registry
from jitexport.bundle.manifest import DIGEST_NAME, FILE_NAME, Manifest
from jitexport.bundle.reading import EngineBundle, check_files, read_manifest
from jitexport.bundle.staging import Staging
from jitexport.errors import BundleError, BundleNotFoundError, InputError, TrustError, needed


def push(
    bundle: str | os.PathLike[str], repo_id: str, *, private: bool = True, endpoint: str | None = None
) -> str:
    """Upload a bundle into a hub repository, in place of what is there.

    Args:
        bundle: the bundle's directory; it is checked in full first.
        repo_id: "owner/name"; made where it does not exist.
        private: of a repository that is made.
        endpoint: address of the hub; huggingface_hub's own setting by default.

    Returns:
        The address of the new commit.

    Raises:
        BundleError: the bundle fails its checks, or the hub cannot be reached or refuses.
        MissingDependencyError: huggingface_hub is not installed.
    """
    hub = _library()
    _check_id(repo_id)
    opened = EngineBundle.open(bundle, "full")
    names = [FILE_NAME, DIGEST_NAME, *(entry.path for entry in opened.manifest.files)]
    with _asking(hub, repo_id):
        api = hub.HfApi(endpoint=endpoint)
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=opened.path, delete_patterns="*", commit_message="Upload engine bundle",
            allow_patterns=[_literal(name) for name in names],
        )
    return str(commit.commit_url)


def pull(
    repo_id: str,
    output: str | os.PathLike[str] | None = None,
    *,
    trust: bool = False,
    revision: str | None = None,
    replace: bool = False,
    endpoint: str | None = None,
) -> Path:
    """Download a bundle. Only declared files are asked for, and every byte is checked before it is put in place.

    Args:
        repo_id: "owner/name".
        output: the bundle's directory; engines/<name> by default.
        trust: engines are native code, and running them is running a program of the repository's owner. Nothing but
            the manifest is downloaded without this, unless the backend's engines hold no code.
        revision: branch, tag or commit; a commit's digits pin the bundle.
        replace: replace an existing bundle.
        endpoint: address of the hub; huggingface_hub's own setting by default.

    Raises:
        TrustError: the engines are native code, and `trust` is not set.
        BundleError: the hub cannot be reached or has no such bundle, or the bundle fails its checks; nothing is left
            then, and an existing bundle is untouched.
        MissingDependencyError: huggingface_hub is not installed.
    """
    hub = _library()
    _check_id(repo_id)
    target = Path(output) if output is not None else Path("engines") / repo_id.split("/")[1]
    with Staging(target, replace=replace) as staging:
        scratch = staging.path / ".download"  # the library keeps files of its own beside what it downloads

        def fetch(name: str) -> None:
            with _asking(hub, repo_id):
                got = hub.hf_hub_download(repo_id, name, revision=revision, local_dir=scratch, endpoint=endpoint)
            place = staging.path / name
            place.parent.mkdir(parents=True, exist_ok=True)
            Path(got).rename(place)

        for name in (FILE_NAME, DIGEST_NAME):
            fetch(name)
        manifest = read_manifest(staging.path)
        _check_trust(manifest, repo_id, trust)
        for entry in manifest.files:
            fetch(entry.path)
        shutil.rmtree(scratch)
        check_files(staging.path, manifest, "full")
        staging.commit()
    return target


def local(path: str | os.PathLike[str]) -> Path:
    """Where a bundle lies: an existing path as it is, a hub id as its copy in the cache, made at the first use.

    The caller trusts the owner: see `pull`. The cache is jitexport/ in XDG_CACHE_HOME or ~/.cache.

    Raises:
        BundleError: see `pull`.
    """
    if os.path.exists(path) or not is_id(os.fspath(path)):
        return Path(path)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = home / "jitexport" / os.fspath(path).replace("/", "--")
    return target if target.exists() else pull(os.fspath(path), target, trust=True)


def is_id(text: str) -> bool:
    """Whether a text could be a repository's name, "owner/name"."""
    owner, _, name = text.partition("/")
    return bool(owner and name) and "/" not in name and not text.startswith((".", "~"))


def _library() -> Any:
    with needed("bundles on a hub need huggingface_hub", "build"):
        import huggingface_hub
    return huggingface_hub


def _check_id(repo_id: str) -> None:
    if not is_id(repo_id):
        raise InputError("no hub repository", found=repo_id, expected="owner/name")


def _check_trust(manifest: Manifest, repo_id: str, trust: bool) -> None:
    if trust or not registry.backend(manifest.backend).native:
        return
    raise TrustError(
        f"the engines of {repo_id} are native code", found=f"backend {manifest.backend}, without trust",
        expected="that you trust the owner as you would to run a program",
        remedy="pass trust=True (command line: --trust), or build the bundle yourself",
    )


def _literal(name: str) -> str:
    """A file name as a pattern that matches nothing else."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


@contextmanager
def _asking(hub: Any, repo_id: str) -> Iterator[None]:
    """Turn whatever the hub library raises into one answer with its words in it."""
    try:
        yield
    except Exception as error:
        missing = isinstance(error, (hub.errors.RepositoryNotFoundError, hub.errors.EntryNotFoundError))
        offline_entry = isinstance(error, hub.errors.LocalEntryNotFoundError)  # also when the hub cannot be reached
        kind = BundleNotFoundError if missing and not offline_entry else BundleError
        offline = " (HF_HUB_OFFLINE is set)" if hub.constants.HF_HUB_OFFLINE else ""
        lines = str(error).strip().splitlines() or ["no message"]
        raise kind(
            f"the hub did not give or take {repo_id}{offline}", found=f"{type(error).__name__}: {lines[0]}",
            expected="a reachable hub, a bundle in the repository, and the right to it",
            remedy="check the name and the network, `hf auth login`; or ship the bundle with `jitexport pack`",
        ) from error
