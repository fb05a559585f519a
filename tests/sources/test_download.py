"""The downloader: chunks, resuming, what a server may do wrong. Against a server on 127.0.0.1."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.loopback.hub import Hub
from weightsmith.errors import IntegrityError, UnsafeInputError, UnsupportedError, WeightsmithError
from weightsmith.sources import chunks, connection, download
from weightsmith.sources.chunks import Board, Chunk, Journal, cut
from weightsmith.sources.connection import Client, Passing, wait_asked
from weightsmith.sources.download import Remote

ROOT = Path(__file__).resolve().parents[2]
STEP = 50_000
DATA = random.Random(1).randbytes(20 * STEP + 17)
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(autouse=True)
def _small_and_hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "WAITS", (0.0, 0.0))
    monkeypatch.setattr(download, "CHUNK", STEP)


def remote(hub: Hub, **more: Any) -> Remote:
    hub.plain.setdefault("m.gguf", DATA)
    known = Remote(f"{hub.endpoint}/plain/m.gguf", "the file", size=len(DATA), identity=SHA256)
    return replace(known, **more)


def ranges(hub: Hub) -> set[str | None]:
    return {request.headers.get("range") for request in hub.log}


def every_chunk() -> set[str]:
    return {f"bytes={chunk.start}-{chunk.stop - 1}" for chunk in cut(len(DATA), STEP)}


def test_chunks_on_several_connections_make_the_file(hub: Hub, tmp_path: Path) -> None:
    hub.faults.pace = 0.002
    got = download.download(remote(hub, git="sha1"), tmp_path / "data.part")
    assert (tmp_path / "data.part").read_bytes() == DATA
    assert got.sha256 == SHA256
    assert got.git == hashlib.sha1(b"blob %d\0" % len(DATA) + DATA).hexdigest()
    assert ranges(hub) == every_chunk()
    assert hub.served == len(DATA)
    assert 1 < len({request.client for request in hub.log}) <= download.CONNECTIONS, "connections are used again"


@pytest.mark.parametrize("size", [0, 1, STEP - 1, STEP, STEP + 1])
def test_sizes_around_a_chunk(hub: Hub, tmp_path: Path, size: int) -> None:
    hub.plain["m.gguf"] = DATA[:size]
    got = download.download(remote(hub, size=size, identity="x"), tmp_path / "data.part")
    assert got.sha256 == hashlib.sha256(DATA[:size]).hexdigest()
    assert (tmp_path / "data.part").read_bytes() == DATA[:size]


def test_cuts_everywhere_cost_only_what_was_under_way(hub: Hub, tmp_path: Path) -> None:
    hub.faults.cut, hub.faults.cuts = 7_001, 90
    assert download.download(remote(hub), tmp_path / "data.part").sha256 == SHA256
    assert hub.served == len(DATA), "a chunk that breaks off goes on where it stopped"


def test_a_kept_chunk_is_believed_only_after_a_check(hub: Hub, tmp_path: Path) -> None:
    part = tmp_path / "data.part"
    download.download(remote(hub), part)
    hub.log.clear()
    with open(part, "r+b") as file:
        file.seek(3 * STEP + 5)
        file.write(b"\0\1\2\3")
    journal = chunks.journal_path(part)
    journal.write_text(journal.read_text() + "[50000, 1000")  # torn by a kill
    assert download.download(remote(hub), part).sha256 == SHA256
    assert ranges(hub) == {f"bytes={3 * STEP}-{4 * STEP - 1}"}
    hub.log.clear()
    assert download.download(remote(hub), part).sha256 == SHA256
    assert hub.log == []


def test_a_part_of_another_file_is_dropped(hub: Hub, tmp_path: Path) -> None:
    part = tmp_path / "data.part"
    download.download(remote(hub), part)
    hub.plain["m.gguf"] = DATA[::-1]
    got = download.download(remote(hub, identity="other"), part)
    assert got.sha256 == hashlib.sha256(DATA[::-1]).hexdigest()


def test_no_ranges_means_one_stream(hub: Hub, tmp_path: Path) -> None:
    hub.faults.ranges = False
    hub.faults.cut, hub.faults.cuts = 1000, 2
    got = download.download(remote(hub), tmp_path / "data.part")
    assert (got.sha256, (tmp_path / "data.part").read_bytes()) == (SHA256, DATA)


def test_a_file_that_changes_under_way_begins_anew(hub: Hub, tmp_path: Path) -> None:
    def change(request: object) -> None:
        if len(hub.log) == 6:
            hub.plain["m.gguf"] = DATA[::-1]

    hub.faults.on_request = change
    got = download.download(remote(hub, identity=None, size=None), tmp_path / "data.part")
    assert got.sha256 == hashlib.sha256(DATA[::-1]).hexdigest()
    assert any("if-range" in request.headers for request in hub.log)


@pytest.mark.parametrize("ranges", [True, False])
def test_another_size_than_listed(hub: Hub, tmp_path: Path, ranges: bool) -> None:
    hub.faults.longer, hub.faults.ranges = 5, ranges
    with pytest.raises(IntegrityError, match=f"{len(DATA) + 5} bytes, {len(DATA)} are listed"):
        download.download(remote(hub), tmp_path / "data.part")


@pytest.mark.parametrize("status", [429, 503])
def test_the_server_says_how_long_to_wait(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(Board, "pause", lambda self, seconds: waited.append(seconds))
    remote(hub)
    hub.faults.status, hub.faults.times, hub.faults.retry_after = status, 1, "7"
    assert download.download(remote(hub), tmp_path / "data.part").sha256 == SHA256
    assert waited == [7.0]


def test_a_server_of_two_connections_gets_two(hub: Hub, tmp_path: Path) -> None:
    """A connection that brings nothing is given up alone; the others finish."""
    busy: list[int] = []
    remote(hub)

    def admit(request: Any) -> bool:
        with hub.counting:
            if len(busy) < 2 and request.client not in busy:
                busy.append(request.client)
            return request.client in busy

    hub.faults.gate, hub.faults.status = admit, 503
    hub.faults.pace = 0.003
    assert download.download(remote(hub), tmp_path / "data.part").sha256 == SHA256


def test_a_server_that_is_gone_says_what_is_kept(hub: Hub, tmp_path: Path) -> None:
    hub.faults.on_request = lambda request: setattr(hub.faults, "times", 999 if len(hub.log) > 9 else 0)
    hub.faults.status = 503
    remote(hub)
    with pytest.raises(WeightsmithError, match="HTTP 503") as caught:
        download.download(remote(hub), tmp_path / "data.part")
    noted = [json.loads(line) for line in chunks.journal_path(tmp_path / "data.part").read_text().splitlines()[1:]]
    kept = sum(stop - start for start, stop, _ in noted)
    assert kept >= STEP
    assert "Run the same command again; " in str(caught.value)
    assert int(str(caught.value).split("again; ")[1].split()[0]) <= kept
    hub.faults, hub.served = type(hub.faults)(), 0
    assert download.download(remote(hub), tmp_path / "data.part").sha256 == SHA256
    assert hub.served == len(DATA) - kept, "what is kept is not fetched twice"


def test_redirects_keep_the_secret_at_home(hub: Hub, tmp_path: Path) -> None:
    cdn = Hub()
    try:
        cdn.plain["m.gguf"] = DATA
        hub.faults.plain_redirect = f"{cdn.endpoint}/plain/m.gguf?signature=1"
        secret = {"Authorization": "Bearer hf_x"}
        assert download.download(remote(hub, secret=secret), tmp_path / "data.part").sha256 == SHA256
        assert all(r.headers.get("authorization") == "Bearer hf_x" for r in hub.log)
        assert len(hub.log) <= download.CONNECTIONS, "the signed address is asked for once, not for each chunk"
        assert cdn.log
        assert not any("authorization" in r.headers for r in cdn.log)
    finally:
        cdn.close()


def test_a_signed_address_that_expires_is_asked_for_again(hub: Hub, tmp_path: Path) -> None:
    cdn = Hub()
    try:
        cdn.plain["m.gguf"] = DATA
        hub.faults.plain_redirect = f"{cdn.endpoint}/plain/m.gguf"
        cdn.faults.gate = lambda request: len(cdn.log) not in (9, 14)
        cdn.faults.status = 403
        assert download.download(remote(hub), tmp_path / "data.part").sha256 == SHA256
        assert 1 < len(hub.log) <= 3 * download.CONNECTIONS
    finally:
        cdn.close()


def test_the_journal_survives_any_tail(tmp_path: Path) -> None:
    part = tmp_path / "p"
    part.write_bytes(b"x" * 30)
    journal = Journal(part, {"size": 30})
    journal.add(Chunk(0, 10), "a")
    journal.close()
    whole = chunks.journal_path(part).read_bytes()
    for length in range(len(whole) + 1):
        chunks.journal_path(part).write_bytes(whole[:length])
        part.write_bytes(b"x" * 30)
        again = Journal(part, {"size": 30})
        again.close()
        assert again.known in ({}, {Chunk(0, 10): "a"})
        assert part.exists() == bool(again.known)
    assert not Journal(part, {"size": 31}).known


@given(st.integers(0, 10_000), st.integers(1, 3_000))
def test_chunks_cover_a_file_once(size: int, step: int) -> None:
    found = cut(size, step)
    assert [byte for chunk in found for byte in range(chunk.start, chunk.stop)] == list(range(size))


def test_waits_that_servers_ask_for() -> None:
    soon = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 50))
    assert wait_asked({"Retry-After": "12"}) == 12
    assert 40 < (wait_asked({"Retry-After": soon}) or 0) <= 50
    assert wait_asked({"RateLimit": '"resolvers";r=0;t=120'}) == 120
    assert wait_asked({"Retry-After": "99999999"}) == connection.MAX_WAIT
    assert wait_asked({"Retry-After": "Mon, 01 Jan 1990 00:00:00 GMT"}) == 0
    assert wait_asked({"Retry-After": "soon"}) is None
    assert wait_asked({}) is None


def test_https_goes_through_the_proxy_and_the_token_through_the_tunnel_only(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[bytes] = []
    server = socket.create_server(("127.0.0.1", 0))

    def refuse() -> None:
        peer, _ = server.accept()
        heard.append(peer.recv(65536))
        peer.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
        peer.close()

    thread = threading.Thread(target=refuse)
    thread.start()
    monkeypatch.setenv("https_proxy", f"http://user:pa%40ss@127.0.0.1:{server.getsockname()[1]}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(Passing, match="no connection"):
        Client().get("https://hub.example.org/x", {}, {"Authorization": "Bearer hf_x"})
    thread.join()
    server.close()
    assert heard[0].startswith(b"CONNECT hub.example.org:443 ")
    assert b"Proxy-Authorization: Basic dXNlcjpwYUBzcw==" in heard[0]
    assert b"hf_x" not in heard[0]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_chunks_come_over_tls_through_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The certificate is checked against the host that was asked for, not against the proxy."""
    host, key, certificate = "hub.example.org", tmp_path / "key", tmp_path / "certificate"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={host}"]
    make += ["-addext", f"subjectAltName=DNS:{host}", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(make, check=True, capture_output=True)
    hub = Hub()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    hub.server.socket = context.wrap_socket(hub.server.socket, server_side=True)
    heard: list[bytes] = []
    proxy = tunnel(hub.port, heard)
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy}")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    connection._trust.cache_clear()
    try:
        far = remote(hub, url=f"https://{host}/plain/m.gguf", secret={"Authorization": "Bearer hf_x"})
        assert download.download(far, tmp_path / "data.part").sha256 == SHA256
        assert len(heard) <= download.CONNECTIONS, "a tunnel is used again"
        assert all(words.startswith(b"CONNECT hub.example.org:443 ") and b"hf_x" not in words for words in heard)
        assert all(request.headers["authorization"] == "Bearer hf_x" for request in hub.log)
        with pytest.raises(WeightsmithError, match="certificate is not trusted"):
            download.download(replace(far, url="https://other.example.org/plain/m.gguf"), tmp_path / "other.part")
    finally:
        connection._trust.cache_clear()
        hub.close()


def tunnel(to: int, heard: list[bytes]) -> int:
    """A proxy that leads every CONNECT to the local port `to`; returns its own."""
    server = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def serve() -> None:
        while True:
            peer, _ = server.accept()
            heard.append(peer.recv(65536))
            far = socket.create_connection(("127.0.0.1", to))
            peer.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            for one, other in ((peer, far), (far, peer)):
                threading.Thread(target=pump, args=(one, other), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return int(server.getsockname()[1])


def test_other_kinds_of_proxy_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "socks5://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(UnsupportedError, match="socks5"):
        Client().get("https://hub.example.org/x", {})


def test_redirects_into_this_machine_are_refused_from_outside() -> None:
    with pytest.raises(UnsafeInputError):
        connection.check_url("http://127.0.0.1/x", from_loopback=False)


_CHILD = """
import sys
from pathlib import Path
from weightsmith.sources import download
download.CHUNK, download.WAITS = int(sys.argv[4]), (0.0, 0.0)
size, sha256 = int(sys.argv[2]), sys.argv[3]
got = download.download(download.Remote(sys.argv[1], "f", size=size, identity=sha256), Path(sys.argv[5]))
print(got.sha256)
"""


def killed_again_and_again(hub: Hub, part: Path, kills: int, *, seed: int) -> None:
    """Kill the puller at random bytes; the file comes out right, and little is fetched twice."""
    random_, step = random.Random(seed), 100_000
    data = random_.randbytes(16_000_017)
    sha256 = hashlib.sha256(data).hexdigest()
    hub.plain["m.gguf"] = data
    hub.faults.pace = 0.008
    command = [sys.executable, "-c", _CHILD, f"{hub.endpoint}/plain/m.gguf", str(len(data)), sha256, str(step)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = 0
    for _ in range(kills):
        begun, wanted = hub.served, random_.randrange(1, len(data) // kills)
        child = subprocess.Popen([*command, str(part)], env=env, stdout=subprocess.DEVNULL)
        while child.poll() is None and hub.served - begun < wanted:
            time.sleep(0.001)
        if child.poll() is None:
            os.kill(child.pid, signal.SIGKILL)
            done += 1
        child.wait()
    hub.faults.pace = 0
    last = subprocess.run([*command, str(part)], env=env, capture_output=True, text=True, check=True)
    assert last.stdout.strip() == sha256
    assert part.read_bytes() == data
    assert done > kills // 2
    assert hub.served <= len(data) + done * download.CONNECTIONS * step, "at most one chunk for each connection"


def test_killed_at_random_bytes(hub: Hub, tmp_path: Path) -> None:
    killed_again_and_again(hub, tmp_path / "data.part", 8, seed=8)


@pytest.mark.slow
def test_killed_twenty_times(hub: Hub, tmp_path: Path) -> None:
    killed_again_and_again(hub, tmp_path / "data.part", 20, seed=20)


def test_an_interrupt_ends_at_once_and_keeps_what_came(hub: Hub, tmp_path: Path) -> None:
    hub.plain["m.gguf"] = DATA
    hub.faults.pace = 0.2
    part = tmp_path / "data.part"
    command = [sys.executable, "-c", _CHILD, f"{hub.endpoint}/plain/m.gguf", str(len(DATA)), SHA256, str(STEP)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([*command, str(part)], env=env, stderr=subprocess.DEVNULL)
    while hub.served < 5 * STEP:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=20) != 0
    assert json.loads(chunks.journal_path(part).read_text().splitlines()[1])
