"""Images at addresses: for a while, and not without end."""

from jitexport.serve.addresses import Addresses
from jitexport.serve.settings import Limits


def test_the_oldest_go_first():
    kept = Addresses(Limits(url_bytes=100))
    names = [kept.put(bytes([i]) * 40, "png") for i in range(3)]
    assert [kept.get(name) for name in names] == [None, (b"\x01" * 40, "image/png"), (b"\x02" * 40, "image/png")]
    assert len(set(names)) == 3


def test_they_expire(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    kept = Addresses(Limits(url_seconds=60))
    name = kept.put(b"a", "webp")
    now = 59.0
    assert kept.get(name) == (b"a", "image/webp")
    now = 61.0
    assert kept.get(name) is None
