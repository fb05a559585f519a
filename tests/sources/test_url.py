"""Plain URLs: resume, redirects, pins, sizes, against a server on 127.0.0.1."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.loopback.hub import Hub
from weightsmith.errors import (
    AccessError,
    IntegrityError,
    NotFoundError,
    UnsafeInputError,
    UsageError,
    WeightsmithError,
)
from weightsmith.sources import download, fetch, parse
from weightsmith.sources.source import Fetched

DATA = bytes(range(256)) * 9000  # 2.3 MB, more than two chunks


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "WAITS", (0.0, 0.0))


def get(hub: Hub, tmp_path: Path, name: str = "m.gguf", suffix: str = "") -> Fetched:
    into = tmp_path / "into"
    into.mkdir(exist_ok=True)
    return fetch(parse(f"{hub.endpoint}/plain/{name}{suffix}"), into, home=tmp_path / "home")


def ranges(hub: Hub) -> list[str | None]:
    return [request.headers.get("range") for request in hub.log]


def test_whole_file(hub: Hub, tmp_path: Path) -> None:
    hub.plain["m.gguf"] = DATA
    got = get(hub, tmp_path, suffix="?signature=SECRET")
    assert (got.files[0].size, got.files[0].sha256) == (len(DATA), hashlib.sha256(DATA).hexdigest())
    assert (tmp_path / "into" / "m.gguf").read_bytes() == DATA
    assert "SECRET" not in str(got.origin)
    assert not any(b"SECRET" in path.read_bytes() for path in (tmp_path / "home").rglob("*") if path.is_file())
    assert hub.log[0].headers["accept-encoding"] == "identity"
    assert "authorization" not in hub.log[0].headers


def test_a_cut_transfer_goes_on_where_it_stopped(hub: Hub, tmp_path: Path) -> None:
    hub.plain["m.gguf"] = DATA
    hub.faults.cut, hub.faults.cuts = 700_000, 2
    assert get(hub, tmp_path).files[0].sha256 == hashlib.sha256(DATA).hexdigest()
    last = len(DATA) - 1
    assert ranges(hub) == [f"bytes=0-{download.CHUNK - 1}", f"bytes=700000-{last}", f"bytes=1400000-{last}"]


def test_resume_by_a_later_run(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "CHUNK", 1_000_000)
    monkeypatch.setattr(download, "CONNECTIONS", 1)
    hub.plain["m.gguf"] = DATA
    hub.faults.match, hub.faults.status = "plain", 503

    def fail_later(request: object) -> None:
        hub.faults.times = 99 if len(hub.log) > 2 else 0

    hub.faults.on_request = fail_later
    with pytest.raises(WeightsmithError, match="2000000 bytes of this file are kept") as caught:
        get(hub, tmp_path)
    assert caught.value.exit_code == 1
    assert not (tmp_path / "into" / "m.gguf").exists()
    hub.faults.on_request, hub.faults.times = None, 0
    hub.log.clear()
    assert get(hub, tmp_path).files[0].sha256 == hashlib.sha256(DATA).hexdigest()
    assert ranges(hub) == [f"bytes=2000000-{len(DATA) - 1}"]


def test_a_changed_file_is_never_spliced(hub: Hub, tmp_path: Path) -> None:
    hub.plain["m.gguf"] = DATA
    hub.faults.cut, hub.faults.cuts = 1000, 1
    other = DATA[::-1]

    def change(request: object) -> None:
        if len(hub.log) == 2:
            hub.plain["m.gguf"] = other

    hub.faults.on_request = change
    assert get(hub, tmp_path).files[0].sha256 == hashlib.sha256(other).hexdigest()


@pytest.mark.parametrize("fault", ["ranges", "etag"])
def test_servers_that_cannot_resume(hub: Hub, tmp_path: Path, fault: str) -> None:
    hub.plain["m.gguf"] = DATA
    setattr(hub.faults, fault, False)
    hub.faults.cut, hub.faults.cuts = 1000, 1
    assert get(hub, tmp_path).files[0].sha256 == hashlib.sha256(DATA).hexdigest()


def test_kept_bytes_that_changed_are_fetched_again(hub: Hub, tmp_path: Path) -> None:
    hub.plain["m.gguf"] = DATA
    hub.faults.cut, hub.faults.cuts = 1000, 3
    hub.faults.on_request = lambda r: setattr(hub.faults, "times", 99 if len(hub.log) > 1 else 0)
    hub.faults.status = 503
    with pytest.raises(WeightsmithError, match="stopped"):
        get(hub, tmp_path)
    part = next((tmp_path / "home").rglob("data.part"))
    part.write_bytes(b"x" * (len(DATA) + 5))
    hub.faults = type(hub.faults)()
    assert get(hub, tmp_path).files[0].sha256 == hashlib.sha256(DATA).hexdigest()


def test_pin(hub: Hub, tmp_path: Path) -> None:
    hub.plain["m.gguf"] = DATA
    with pytest.raises(IntegrityError, match="is pinned"):
        get(hub, tmp_path, suffix=f"#sha256={'0' * 64}")
    assert not list((tmp_path / "home").rglob("data.part"))
    got = get(hub, tmp_path, suffix=f"#sha256={hashlib.sha256(DATA).hexdigest()}")
    assert got.origin["pinned"] is True


@pytest.mark.parametrize(
    ("status", "kind"), [(401, AccessError), (403, AccessError), (404, NotFoundError), (410, NotFoundError)]
)
def test_refusals(hub: Hub, tmp_path: Path, status: int, kind: type[WeightsmithError]) -> None:
    hub.faults.status, hub.faults.times, hub.faults.match = status, 1, "plain"
    with pytest.raises(kind):
        get(hub, tmp_path)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_failures_are_tried_again(hub: Hub, tmp_path: Path, status: int) -> None:
    hub.plain["m.gguf"] = DATA
    hub.faults.status, hub.faults.times, hub.faults.match = status, 2, "plain"
    assert get(hub, tmp_path).files[0].size == len(DATA)


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://127.0.0.1/x.gguf", "http://example.org/x.gguf"])
def test_redirects_to_elsewhere_are_refused(hub: Hub, tmp_path: Path, to: str) -> None:
    hub.faults.plain_redirect = to
    with pytest.raises(WeightsmithError):
        get(hub, tmp_path)
    assert len(hub.log) == 1, "refused at once, not tried again"


def test_redirect_within_the_rules(hub: Hub, tmp_path: Path) -> None:
    hub.plain["target.gguf"] = DATA
    hub.faults.plain_redirect = f"http://localhost:{hub.port}/plain/target.gguf"
    assert get(hub, tmp_path).files[0].path == "m.gguf"


def test_redirect_loop_ends(hub: Hub, tmp_path: Path) -> None:
    hub.faults.plain_redirect = f"{hub.endpoint}/plain/m.gguf"
    with pytest.raises(WeightsmithError):
        get(hub, tmp_path)
    assert len(hub.log) < 20


def test_only_weights(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(UnsafeInputError):
        get(hub, tmp_path, "m.bin")
    assert hub.log == []


def test_encoded_answers_are_refused(hub: Hub, tmp_path: Path) -> None:
    hub.plain["m.gguf"] = DATA
    hub.faults.encoding = "gzip"
    with pytest.raises(WeightsmithError, match="encoding"):
        get(hub, tmp_path)


def test_options_that_do_not_go_with_a_url(hub: Hub, tmp_path: Path) -> None:
    source = parse(f"{hub.endpoint}/plain/m.gguf")
    with pytest.raises(UsageError):
        fetch(source, tmp_path, revision="main", home=tmp_path)
    with pytest.raises(UsageError):
        fetch(source, tmp_path, include=["*"], home=tmp_path)
    with pytest.raises(NotFoundError, match="offline"):
        fetch(source, tmp_path, offline=True, home=tmp_path)
