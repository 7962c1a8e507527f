"""Packed bundles: there and back unchanged; whatever else an archive may hold is refused and leaves nothing."""

import io
import json
import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jitexport import errors
from jitexport.bundle import EngineBundle, archive
from jitexport.bundle.archive import pack, unpack
from jitexport.bundle.manifest import DIGEST_NAME, FILE_NAME, digest_line
from jitexport.cli import app

zstandard = pytest.importorskip("zstandard")

Member = tuple[tarfile.TarInfo, bytes]


@pytest.fixture(scope="module")
def packed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "tiny.tar.zst"
    assert pack(built, path) == path.stat().st_size
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def members(packed: Path) -> list[Member]:
    raw = zstandard.ZstdDecompressor().stream_reader(packed.read_bytes()).read()
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        return [(m, tar.extractfile(m).read()) for m in tar]


def write(path: Path, files: list[Member], tail: bytes = b"", form: int = tarfile.USTAR_FORMAT) -> Path:
    raw = b"".join(info.tobuf(form, "utf-8", "strict") + data + bytes(-len(data) % 512) for info, data in files)
    path.write_bytes(zstandard.ZstdCompressor().compress(raw + bytes(1024) + tail))
    return path


def entry(name: str, data: bytes = b"x", **fields) -> Member:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def refuses(path: Path, tmp_path: Path, error: type[Exception], match: str | None = None) -> None:
    folder = tmp_path / "out"
    folder.mkdir(exist_ok=True)
    with pytest.raises(error, match=match) as caught:
        unpack(path, folder / "bundle")
    assert caught.value.remedy
    assert list(folder.iterdir()) == []


def test_there_and_back(built, packed, tmp_path):
    assert unpack(packed, tmp_path / "new" / "bundle") == tmp_path / "new" / "bundle"
    assert content(tmp_path / "new" / "bundle") == content(built)
    assert EngineBundle.open(tmp_path / "new" / "bundle").manifest == EngineBundle.open(built).manifest
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["bundle"]


def test_the_same_bundle_gives_the_same_bytes(built, packed, tmp_path):
    shutil.copytree(built, tmp_path / "copy")
    pack(tmp_path / "copy", tmp_path / "again.tar.zst")
    assert (tmp_path / "again.tar.zst").read_bytes() == packed.read_bytes()


def test_tar_can_read_it(built, packed):
    assert {m.name: data for m, data in members(packed)} == content(built)


def test_an_existing_bundle_is_kept_unless_it_may_be_replaced(packed, bundle):
    with pytest.raises(errors.BundleExistsError):
        unpack(packed, bundle)
    (bundle / "weights" / "vae.safetensors").unlink()
    unpack(packed, bundle, replace=True)
    EngineBundle.open(bundle)


def test_an_existing_archive_is_kept_unless_it_may_be_replaced(built, tmp_path):
    path = tmp_path / "x.tar.zst"
    path.write_text("mine")
    with pytest.raises(errors.BundleExistsError):
        pack(built, path)
    assert path.read_text() == "mine"
    pack(built, path, replace=True)
    assert unpack(path, tmp_path / "bundle")


def test_a_damaged_bundle_is_not_packed(bundle, tmp_path):
    (bundle / "weights" / "vae.safetensors").write_bytes(b"x")
    with pytest.raises(errors.SizeError):
        pack(bundle, tmp_path / "x.tar.zst")
    assert not (tmp_path / "x.tar.zst").exists()


def test_an_archive_does_not_go_into_its_own_bundle(bundle):
    with pytest.raises(errors.InputError, match="inside"):
        pack(bundle, bundle / "weights" / "x.tar.zst")
    EngineBundle.open(bundle)


def test_a_folder_that_cannot_be_written(built, tmp_path):
    with pytest.raises(errors.BundleError, match="cannot write"):
        pack(built, tmp_path / "none" / "x.tar.zst")


@pytest.mark.parametrize("name", ["/tmp/evil", "../evil", "a/../../evil", "evil", "weights/evil", ".", "manifest.json"])
def test_undeclared_and_outside_names(packed, tmp_path, name):
    files = members(packed)
    refuses(write(tmp_path / "x", [*files[:2], entry(name), *files[2:]]), tmp_path, errors.BundleError)
    refuses(write(tmp_path / "x", [*files, entry(name)]), tmp_path, errors.UndeclaredFileError)
    refuses(write(tmp_path / "x", [entry(name), *files]), tmp_path, errors.BundleError)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, b"K", b"L", b"x", b"S"],
)
def test_only_plain_files(packed, tmp_path, kind):
    files = members(packed)
    bad = entry(files[2][0].name, b"", type=kind, linkname="/etc/passwd")
    refuses(write(tmp_path / "x", [*files[:2], bad, *files[2:]]), tmp_path, errors.ArchiveError)


def test_long_headers_are_not_read_into_memory(packed, tmp_path):
    files = members(packed)
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        long = write(tmp_path / "x", [*files[:2], entry("n" * 100_000), *files[2:]], form=form)
        refuses(long, tmp_path, errors.ArchiveError, "no bundle may hold")


def test_repeated_missing_and_altered_files(packed, tmp_path):
    files = members(packed)
    refuses(write(tmp_path / "x", [*files, files[-1]]), tmp_path, errors.UndeclaredFileError, "repeated")
    refuses(write(tmp_path / "x", files[:-1]), tmp_path, errors.MissingFileError)
    name, data = files[2][0].name, files[2][1]
    refuses(write(tmp_path / "x", [*files[:2], entry(name, data + b"x"), *files[3:]]), tmp_path, errors.SizeError)
    other = bytes([data[0] ^ 1]) + data[1:]
    refuses(write(tmp_path / "x", [*files[:2], entry(name, other), *files[3:]]), tmp_path, errors.DigestError)


def test_a_changed_manifest(packed, tmp_path):
    files = members(packed)
    text = files[0][1].replace(b"fp32", b"bf16", 1)
    refuses(write(tmp_path / "x", [entry(FILE_NAME, text), *files[1:]]), tmp_path, errors.ManifestError)
    refuses(write(tmp_path / "x", files[1:]), tmp_path, errors.ArchiveError, "no packed bundle")


def test_files_in_each_others_way(packed, tmp_path):
    files = members(packed)
    raw = json.loads(files[0][1])
    first = raw["files"][0]
    raw["files"].insert(1, {**first, "path": f"{first['path']}/inner"})
    text = json.dumps(raw).encode()
    name, data = next((m.name, d) for m, d in files if m.name == first["path"])
    own = [entry(FILE_NAME, text), entry(DIGEST_NAME, digest_line(text))]
    inner = [*own, entry(name, data), entry(f"{name}/inner", data)]
    refuses(write(tmp_path / "x", inner), tmp_path, errors.ArchiveError, "each other's way")


def test_more_after_the_end(packed, tmp_path):
    refuses(write(tmp_path / "x", members(packed), tail=b"x" * 10_000), tmp_path, errors.ArchiveError, "after its end")
    (tmp_path / "y").write_bytes(packed.read_bytes() * 2)
    refuses(tmp_path / "y", tmp_path, errors.ArchiveError)
    (tmp_path / "y").write_bytes(packed.read_bytes() + b"garbage")
    refuses(tmp_path / "y", tmp_path, errors.ArchiveError)


def test_bombs(packed, tmp_path, monkeypatch):
    zeros = zstandard.ZstdCompressor(level=19).compress(bytes(200_000_000))
    assert len(zeros) < 20_000
    (tmp_path / "zeros").write_bytes(zeros)
    refuses(tmp_path / "zeros", tmp_path, errors.ArchiveError)
    huge = write(tmp_path / "x", [entry(FILE_NAME, bytes(100_000_000))])  # a "manifest" above the limit
    refuses(huge, tmp_path, errors.ArchiveError, "no packed bundle")
    wide = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    ).stream_reader(bytes(2**28)).read()
    (tmp_path / "wide").write_bytes(wide)
    refuses(tmp_path / "wide", tmp_path, errors.ArchiveError, "damaged")
    monkeypatch.setattr(archive.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    refuses(packed, tmp_path, errors.BundleError, "no room")


def test_damaged_archives(packed, tmp_path):
    """Bit flips anywhere and cuts: refused, or (a bit that means nothing to zstd) exactly the same bundle."""
    rng = random.Random(0)
    whole = packed.read_bytes()
    wanted = None
    for i in range(60):
        broken = bytearray(whole)
        if i % 3:
            broken[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        else:
            del broken[rng.randrange(len(whole)) :]
        (tmp_path / "x").write_bytes(broken)
        try:
            unpack(tmp_path / "x", tmp_path / "out")
        except errors.BundleError:
            assert not (tmp_path / "out").exists()
        else:
            wanted = wanted or {m.name: data for m, data in members(packed)}
            assert content(tmp_path / "out") == wanted
            shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("junk", [b"", b"PK\x03\x04", b"\x28\xb5\x2f\xfd", bytes(10_000)])
def test_what_is_no_archive(tmp_path, junk):
    (tmp_path / "x").write_bytes(junk)
    refuses(tmp_path / "x", tmp_path, errors.ArchiveError)


def test_no_archive_at_all(tmp_path):
    refuses(tmp_path / "none", tmp_path, errors.BundleNotFoundError)
    refuses(tmp_path, tmp_path, errors.BundleNotFoundError)


def test_without_the_library(built, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    for call in (lambda: pack(built, tmp_path / "x"), lambda: unpack(tmp_path / "x", tmp_path / "y")):
        with pytest.raises(errors.MissingDependencyError, match=r"jitexport\[pack\]"):
            call()


def test_command_line(built, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["pack", str(built)])
    assert (done.exit_code, done.stdout) == (0, "tiny.tar.zst\n")
    done = CliRunner().invoke(app, ["unpack", "tiny.tar.zst", "--json"])
    assert (done.exit_code, json.loads(done.stdout)) == (0, {"bundle": "tiny"})
    EngineBundle.open("tiny")
    with pytest.raises(errors.InputError, match="no name"):
        unpack(Path("tiny"))


def test_the_tar_program_can_read_it(packed, built, tmp_path):
    if not (shutil.which("tar") and shutil.which("zstd")):
        pytest.skip("needs tar and zstd")
    subprocess.run(["tar", "--zstd", "-xf", packed, "-C", tmp_path], check=True)
    EngineBundle.open(tmp_path)
