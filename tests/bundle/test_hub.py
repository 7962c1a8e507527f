"""Bundles on a hub, against a stand-in on this machine that speaks as much of the hub's language as is needed."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
from typer.testing import CliRunner

import jitexport
from jitexport import errors, hub
from jitexport.backends.eager import EagerBackend
from jitexport.bundle import EngineBundle
from jitexport.bundle.manifest import FILE_NAME
from jitexport.cli import app

COMMIT = "0123456789abcdef" * 2 + "01234567"


class StandIn:
    """Repositories in memory, {id: {path: bytes}}, and the paths that were asked for."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None: ...

            def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
                self.send_response(status)
                for key, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(key.replace("_", "-"), value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def do_GET(self) -> None:
                owner, name, *rest = unquote(self.path.split("?")[0]).strip("/").split("/")
                if owner == "api":  # /api/models/<owner>/<name>/tree/main
                    files = stand_in.repos.get("/".join(rest[:2]), {})
                    tree = [{"type": "file", "path": p, "size": len(b), "oid": "0"} for p, b in files.items()]
                    self.answer(200, json.dumps(tree).encode())
                    return
                files = stand_in.repos.get(f"{owner}/{name}")
                path = "/".join(rest[2:])  # after resolve/<revision>
                if files is None or path not in files:
                    self.answer(404, X_Error_Code="RepoNotFound" if files is None else "EntryNotFound")
                    return
                if self.command == "GET":
                    stand_in.asked.append(path)
                digest = hashlib.sha256(files[path]).hexdigest()
                self.answer(200, files[path], ETag=f'"{digest}"', X_Repo_Commit=COMMIT)

            do_HEAD = do_GET

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                parts = self.path.split("?")[0].strip("/").split("/")
                repo = "/".join(parts[2:4])
                if parts[-1] == "create":
                    wanted = json.loads(body)
                    stand_in.repos.setdefault(f"{wanted['organization']}/{wanted['name']}", {})
                    self.answer(200, json.dumps({"url": "https://huggingface.co/me/tiny"}).encode())
                elif "preupload" in parts:
                    wanted = [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
                    self.answer(200, json.dumps({"files": wanted}).encode())
                elif "commit" in parts:
                    for line in map(json.loads, body.splitlines()):
                        value = line["value"]
                        if line["key"] == "file":
                            stand_in.repos[repo][value["path"]] = base64.b64decode(value["content"])
                        elif line["key"] == "deletedFile":
                            stand_in.repos[repo].pop(value["path"])
                    url = f"https://huggingface.co/{repo}/commit/{COMMIT}"
                    self.answer(200, json.dumps({"commitUrl": url, "commitOid": COMMIT}).encode())

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    stand_in = StandIn()
    thread = threading.Thread(target=stand_in.server.serve_forever, daemon=True)
    thread.start()
    yield stand_in
    stand_in.server.shutdown()
    stand_in.server.server_close()
    thread.join()


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def pushed(stand_in: StandIn, built: Path) -> StandIn:
    stand_in.repos["me/tiny"] = files(built) | {"README.md": b"# tiny", ".gitattributes": b""}
    return stand_in


def test_push_replaces_what_is_there(stand_in, built):
    stand_in.repos["me/tiny"] = {"engines/old.so": b"old"}
    assert "me/tiny" in hub.push(built, "me/tiny", endpoint=stand_in.url)
    assert stand_in.repos["me/tiny"] == files(built)


def test_pull_takes_the_declared_files_only(pushed, built, tmp_path):
    assert hub.pull("me/tiny", tmp_path / "new" / "tiny", endpoint=pushed.url) == tmp_path / "new" / "tiny"
    assert files(tmp_path / "new" / "tiny") == files(built)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["tiny"]
    assert sorted(pushed.asked) == sorted(files(built))
    EngineBundle.open(tmp_path / "new" / "tiny")


def test_native_engines_need_trust_before_they_are_downloaded(pushed, tmp_path, monkeypatch):
    monkeypatch.setattr(EagerBackend, "native", True)
    with pytest.raises(errors.TrustError, match="--trust"):
        hub.pull("me/tiny", tmp_path / "tiny", endpoint=pushed.url)
    assert sorted(pushed.asked) == [FILE_NAME, "manifest.sha256"]
    assert list(tmp_path.iterdir()) == []
    hub.pull("me/tiny", tmp_path / "tiny", trust=True, endpoint=pushed.url)
    EngineBundle.open(tmp_path / "tiny")


@pytest.mark.parametrize("name", [FILE_NAME, "weights/vae.safetensors"])
def test_changed_bytes_are_refused(pushed, built, bundle, name):
    changed = bytearray(pushed.repos["me/tiny"][name])
    changed[len(changed) // 2] ^= 1
    pushed.repos["me/tiny"][name] = bytes(changed)
    with pytest.raises(errors.BundleError, match=r"digest|published"):
        hub.pull("me/tiny", bundle, replace=True, endpoint=pushed.url)
    assert files(bundle) == files(built)
    assert [p.name for p in bundle.parent.iterdir()] == ["bundle"]


def test_what_is_not_there(pushed, tmp_path):
    with pytest.raises(errors.BundleNotFoundError, match="me/none"):
        hub.pull("me/none", tmp_path / "x", endpoint=pushed.url)
    del pushed.repos["me/tiny"]["weights/vae.safetensors"]
    with pytest.raises(errors.BundleNotFoundError):
        hub.pull("me/tiny", tmp_path / "x", endpoint=pushed.url)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_bundle_is_kept(pushed, bundle):
    with pytest.raises(errors.BundleExistsError, match="--force"):
        hub.pull("me/tiny", bundle, endpoint=pushed.url)
    assert pushed.asked == []


def test_without_a_network(built, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for call in (lambda: hub.pull("me/tiny", tmp_path / "x"), lambda: hub.push(built, "me/tiny")):
        with pytest.raises(errors.BundleError, match="HF_HUB_OFFLINE is set") as caught:
            call()
        assert "jitexport pack" in caught.value.remedy
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("repo", ["name", "/name", "owner/", "a/b/c", "../x"])
def test_what_is_no_repository(repo, tmp_path):
    with pytest.raises(errors.InputError, match="owner/name"):
        hub.pull(repo, tmp_path / "x")


def test_a_damaged_bundle_is_not_pushed(stand_in, bundle):
    (bundle / "weights" / "vae.safetensors").write_bytes(b"")
    with pytest.raises(errors.SizeError):
        hub.push(bundle, "me/tiny", endpoint=stand_in.url)
    assert stand_in.repos == {}


def test_load_takes_a_hub_id_with_trust_only(pushed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pull = hub.pull
    monkeypatch.setattr(hub, "pull", lambda *a, **k: pull(*a, **k, endpoint=pushed.url))
    with pytest.raises(errors.BundleNotFoundError, match="trust=True"):
        jitexport.load("me/tiny")
    assert pushed.asked == []
    assert jitexport.load("me/tiny", trust=True).engines
    asked = len(pushed.asked)
    assert jitexport.load("me/tiny", trust=True).engines
    assert len(pushed.asked) == asked, "the second time it comes from the cache"
    with pytest.raises(errors.BundleNotFoundError):
        jitexport.load(tmp_path / "none", trust=True)


def test_generate_takes_a_hub_id_with_trust_only(pushed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pull = hub.pull
    monkeypatch.setattr(hub, "pull", lambda *a, **k: pull(*a, **k, endpoint=pushed.url))
    refused = CliRunner().invoke(app, ["generate", "me/tiny", "a red fox"])
    assert isinstance(refused.exception, errors.BundleNotFoundError) and "--trust" in refused.exception.remedy
    assert pushed.asked == []
    made = CliRunner().invoke(app, ["generate", "me/tiny", "a red fox", "--trust", "-o", "fox.png"])
    assert made.stdout == "fox.png\n" and (tmp_path / "fox.png").stat().st_size
    assert FILE_NAME in pushed.asked


def test_command_line(pushed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", pushed.url)
    calls = []
    monkeypatch.setattr(hub, "pull", lambda *a, **k: calls.append((a, k)) or Path("engines/tiny"))
    monkeypatch.setattr(hub, "push", lambda *a, **k: calls.append((a, k)) or "url")
    assert CliRunner().invoke(app, ["pull", "me/tiny", "--trust", "--revision", "v1"]).stdout == "engines/tiny\n"
    assert CliRunner().invoke(app, ["push", "here", "me/tiny", "--public"]).stdout == "url\n"
    assert calls == [
        (("me/tiny", None), {"trust": True, "revision": "v1", "replace": False}),
        ((Path("here"), "me/tiny"), {"private": False}),
    ]
