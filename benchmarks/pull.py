"""How fast a file comes from a server on this machine, hashed, beside huggingface_hub's own download of it, not hashed.

    python -m benchmarks.pull [--size 1000] [--times 3]

The server has a process for each connection and sends the file with sendfile, so the network costs nothing and what is
measured is the client: `sources.download` (ranges, hash of each chunk and of the whole, flushed to disk) and
`hf_hub_download` in plain HTTP (one stream, no hash), each in a process of its own, interleaved. curl, if it is there,
is what the machine can do.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import socketserver
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from benchmarks.measure import machine, median, repeat, run_checked

_COMMIT = "1" * 40
_OURS = """
import sys, time
from pathlib import Path
from weightsmith.sources import download
begun = time.perf_counter()
url, size, sha256 = sys.argv[1], int(sys.argv[2]), sys.argv[3]
got = download.download(download.Remote(url, "f", size=size, identity=sha256), Path(sys.argv[4]) / "data.part")
assert got.sha256 == sha256
print("transfer", time.perf_counter() - begun)
"""
_THEIRS = """
import sys, time
from huggingface_hub import hf_hub_download
begun = time.perf_counter()
hf_hub_download("org/model", "model.safetensors", revision="1" * 40, cache_dir=sys.argv[1])
print("transfer", time.perf_counter() - begun)
"""


class _Server(socketserver.ForkingMixIn, socketserver.TCPServer):
    """A process for each connection, so that the server is no bottleneck of Python's making."""

    allow_reuse_address = True
    request_queue_size = 64


def serve(file: Path) -> _Server:
    """Serve `file` as the one file of one repository."""
    size, sha256 = file.stat().st_size, hashlib.file_digest(file.open("rb"), "sha256").hexdigest()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            if "/resolve/" not in self.path:
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            first = int(asked[1]) if asked else 0
            last = int(asked[2]) if asked and asked[2] else size - 1
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            for key, value in (("X-Repo-Commit", _COMMIT), ("ETag", f'"{sha256}"'), ("X-Linked-Size", str(size))):
                self.send_header(key, value)
            self.send_header("Content-Length", str(last + 1 - first))
            self.end_headers()
            self.wfile.flush()
            with open(file, "rb") as source:
                while body and first <= last:
                    first += os.sendfile(self.connection.fileno(), source.fileno(), first, last + 1 - first)

    server = _Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1000, help="MB")
    parser.add_argument("--times", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pull-") as name:
        folder = Path(name)
        file = folder / "served"
        with open(file, "wb") as sink:
            for _ in range(options.size):
                sink.write(os.urandom(1_000_000))
        sha256 = hashlib.file_digest(file.open("rb"), "sha256").hexdigest()
        server = serve(file)
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        url = f"{endpoint}/org/model/resolve/{_COMMIT}/model.safetensors"
        into, log = folder / "into", folder / "log"
        env = {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        env |= {"HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        size = str(file.stat().st_size)
        commands = {
            "weightsmith, hashed": [sys.executable, "-c", _OURS, url, size, sha256, str(into)],
            "hf_hub_download, not hashed": [sys.executable, "-c", _THEIRS, str(into)],
        }
        if shutil.which("curl"):
            commands["curl, not hashed"] = ["curl", "-s", "-o", str(into / "curl"), url]
        inside: dict[str, list[float]] = {title: [] for title in commands}

        def contestant(title: str):  # type: ignore[no-untyped-def]
            def go():  # type: ignore[no-untyped-def]
                done = run_checked(commands[title], log, env=env)
                told = re.search(r"transfer ([\d.]+)", log.read_text())
                inside[title].append(float(told[1]) if told else done.seconds)
                return done

            return go

        def before() -> None:
            shutil.rmtree(into, ignore_errors=True)
            into.mkdir()
            os.sync()

        runs = repeat(options.times, {title: contestant(title) for title in commands}, before)
        server.shutdown()
    print(f"{machine()}; {options.size} MB, {options.times} runs each, interleaved; median seconds, largest peak\n")
    print("| contestant | process s | transfer s | MB/s of transfer | peak RSS MB |\n|---|---|---|---|---|")
    for title, all_runs in runs.items():
        middle, transfer = median(all_runs), sorted(inside[title])[len(inside[title]) // 2]
        speed, peak = options.size / transfer, middle.peak_rss / 1e6
        print(f"| {title} | {middle.seconds:.2f} | {transfer:.2f} | {speed:.0f} | {peak:.0f} |")


if __name__ == "__main__":
    main()
