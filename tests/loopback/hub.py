"""A hub on 127.0.0.1 that speaks the part of the Hugging Face API that a download uses, with faults on demand.

    GET  /api/models/ORG/NAME[/revision/REV]     {_id, id, author, createdAt, sha, gated, cardData}
    GET  /api/models/ORG/NAME/tree/SHA           [{type, path, size, oid, lfs?}], in pages
    HEAD /ORG/NAME/resolve/SHA/PATH              X-Repo-Commit, ETag, X-Linked-Etag, X-Linked-Size
    GET  same                                    the bytes, with Range and If-Range
    the same below /api/datasets and /datasets   repositories that were added as "datasets/ORG/NAME"
    GET  /plain/NAME                             the same for plain URL downloads
    POST, PUT                                    what an upload uses, see uploads.py

Every request is kept in `log` (method, path, headers), so that a test can say what was asked and what was sent along.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.loopback.uploads import UploadHandler, Uploads, body_of

BLOCK = 64 << 10
LFS_FROM = 64  # files of this many bytes and more are "large files", known by their SHA-256


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Commit:
    """The files of one commit; its name is a hash of them."""

    files: dict[str, bytes]

    @property
    def sha(self) -> str:
        text = json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in sorted(self.files.items())})
        return hashlib.sha1(text.encode()).hexdigest()


@dataclass
class Repo:
    """A repository: commits by hash, branches by name, and who may read it."""

    commits: dict[str, Commit]
    refs: dict[str, str]
    gated: bool = False
    private: bool = False
    accepted: set[str] = field(default_factory=set)  # tokens whose owner accepted the licence
    licence: str = "apache-2.0"
    created: str | None = None  # when it was made; the hub's own answer for all without one
    author: str | None = None
    number: str | None = "0"  # the hub's `_id`


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    port: int
    client: int = 0  # the port that the other side speaks from: one for each connection


@dataclass
class Faults:
    """What goes wrong. cut: bytes after which a body breaks off, `cuts` times. corrupt: path -> bytes really sent.

    status: answers this instead, `times` times, to requests that `match`. on_request: called before each answer.
    """

    cut: int | None = None
    cuts: int = 0
    corrupt: dict[str, bytes] = field(default_factory=dict)
    status: int = 0
    times: int = 0
    match: str = ""
    on_request: Callable[[Request], None] | None = None
    redirect: str | None = None  # resolve answers 302 to this prefix
    ranges: bool = True
    etag: bool = True
    tree: list[dict[str, Any]] | None = None  # listing to send instead of the true one
    plain_redirect: str | None = None
    encoding: str | None = None
    retry_after: str = "0"
    longer: int = 0  # bytes that a file has more than it should, by what the server announces
    gate: Callable[[Request], bool] | None = None  # whether a request is answered; else it gets `status`
    pace: float = 0.0  # seconds before each block of a body


class Hub:
    """The server. `endpoint` is its address; `tokens` are the ones it accepts."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.plain: dict[str, bytes] = {}
        self.renamed: dict[str, str] = {}  # repositories that answer under another name
        self.moved: dict[str, str] = {}  # names that redirect (307) to another, or to another server
        self.created: str | None = None  # when every repository was made
        self.tokens: set[str] = set()
        self.counting = threading.Lock()
        self.log: list[Request] = []
        self.served = 0  # bytes of file bodies that were handed to the network
        self.faults = Faults()
        self.uploads = Uploads()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def port(self) -> int:
        return int(self.server.server_address[1])

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, repo: str, files: dict[str, bytes], **options: Any) -> str:
        """Make `repo` with one commit on main, or add a commit to it and move main; returns the commit."""
        commit = Commit(files)
        known = self.repos.setdefault(repo, Repo({}, {}, **options))
        known.commits[commit.sha] = commit
        known.refs["main"] = commit.sha
        return commit.sha

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(UploadHandler, BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            request = Request(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, hub.port)
            request.client = self.client_address[1]
            sent = body_of(self) if self.command in ("POST", "PUT") else b""
            hub.log.append(request)
            faults = hub.faults
            if faults.on_request:
                faults.on_request(request)
            if faults.gate is not None and not faults.gate(request):
                self.send(faults.status, b"", {"Retry-After": faults.retry_after})
                return
            if faults.times and faults.match in self.path:
                faults.times -= 1
                self.send(faults.status, b"", {"Retry-After": faults.retry_after})
                return
            for old, new in hub.moved.items():
                if f"/{old}/" in f"{self.path}/":
                    away = new.startswith("http")
                    self.send(307, b"", {"Location": new + self.path if away else self.path.replace(old, new, 1)})
                    return
            parts = [unquote(part) for part in urlsplit(self.path).path.split("/")[1:]]
            if self.command in ("POST", "PUT"):
                self.upload(parts, sent)
            elif parts[0] == "plain":
                self.plain_file(parts[1])
            elif parts[:2] == ["api", "models"] and len(parts) >= 4:
                self.api(f"{parts[2]}/{parts[3]}", parts[4:])
            elif parts[:2] == ["api", "datasets"] and len(parts) >= 4:
                self.api(f"datasets/{parts[2]}/{parts[3]}", parts[4:])
            elif parts[0] == "datasets" and len(parts) > 5 and parts[3] == "resolve":
                self.resolve("/".join(parts[:3]), parts[4], "/".join(parts[5:]))
            elif len(parts) > 4 and parts[2] == "resolve":
                self.resolve(f"{parts[0]}/{parts[1]}", parts[3], "/".join(parts[4:]))
            else:
                self.send(404, b"")

        def token(self) -> str | None:
            value = self.headers.get("Authorization", "")
            return value.removeprefix("Bearer ") if value else None

        def repo(self, name: str, *, files: bool) -> Repo | None:
            """The repository if the caller may see it; else the refusal is already sent."""
            token, repo = self.token(), hub.repos.get(name)
            if token is not None and token not in hub.tokens:
                self.send(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
            elif repo is None or (repo.private and token not in repo.accepted):
                self.refuse(404 if token else 401, "RepoNotFound")
            elif files and repo.gated and token not in repo.accepted:
                self.refuse(403 if token else 401, "GatedRepo")
            else:
                return repo
            return None

        def refuse(self, status: int, code: str, **headers: str) -> None:
            self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": code, **headers})

        def commit(self, repo: Repo, revision: str) -> Commit | None:
            found = repo.commits.get(repo.refs.get(revision, revision))
            if found is None:
                self.refuse(404, "RevisionNotFound")
            return found

        def api(self, name: str, rest: list[str]) -> None:
            repo = self.repo(name, files=False)
            if repo is None:
                return
            revision = rest[1] if len(rest) > 1 else "main"
            commit = self.commit(repo, revision)
            if commit is None:
                return
            if rest[:1] == ["tree"]:
                self.tree(commit)
                return
            gated = "manual" if repo.gated else False
            card = {"license": repo.licence}
            name = name.removeprefix("datasets/")
            info = {
                "_id": repo.number,
                "id": hub.renamed.get(name, name),
                "author": repo.author,
                "createdAt": repo.created or hub.created,
                "sha": commit.sha,
                "gated": gated,
                "private": repo.private,
                "cardData": card,
                "siblings": [],
            }
            self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

        def tree(self, commit: Commit) -> None:
            entries = hub.faults.tree
            if entries is None:
                entries = [tree_entry(path, data) for path, data in commit.files.items()]
            start = int((urlsplit(self.path).query.rpartition("cursor=")[2] or "0") if "cursor=" in self.path else 0)
            page, headers = entries[start : start + 3], {"Content-Type": "application/json"}
            if start + 3 < len(entries):
                base = self.path.partition("?")[0]
                headers["Link"] = f'<{hub.endpoint}{base}?recursive=true&cursor={start + 3}>; rel="next"'
            self.send(200, json.dumps(page).encode(), headers)

        def resolve(self, name: str, revision: str, path: str) -> None:
            repo = self.repo(name, files=True)
            if repo is None:
                return
            commit = self.commit(repo, revision)
            if commit is None:
                return
            data = commit.files.get(path)
            if data is None:
                self.refuse(404, "EntryNotFound", **{"X-Repo-Commit": commit.sha})
                return
            entry = tree_entry(path, data)
            etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
            headers = {"X-Repo-Commit": commit.sha, "X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{etag}"'}
            if hub.faults.redirect is not None:
                self.send(302, b"", {**headers, "Location": f"{hub.faults.redirect}/plain/{etag}"})
                return
            self.body(hub.faults.corrupt.get(path, data), {**headers, "ETag": f'"{etag}"'})

        def plain_file(self, name: str) -> None:
            if hub.faults.plain_redirect is not None and name != "target.gguf":
                self.send(302, b"", {"Location": hub.faults.plain_redirect})
            elif name not in hub.plain:
                self.send(404, b"")
            else:
                data = hub.plain[name]
                self.body(data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"'} if hub.faults.etag else {})

        def body(self, data: bytes, headers: dict[str, str]) -> None:
            status, start, stop = 200, 0, len(data)
            if hub.faults.longer:
                data = data + b"x" * hub.faults.longer
                stop = len(data)
            asked, condition = self.headers.get("Range"), self.headers.get("If-Range")
            if asked and hub.faults.ranges and condition in (None, headers.get("ETag")):
                first, _, last = asked.removeprefix("bytes=").partition("-")
                start, stop = int(first), min(int(last) + 1 if last else stop, stop)
                if start >= len(data):
                    self.send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
                    return
                status = 206
                headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
            if hub.faults.encoding:
                headers = {**headers, "Content-Encoding": hub.faults.encoding}
            self.send(status, data[start:stop], headers, counted=True)

        def send(
            self, status: int, data: bytes, headers: dict[str, str] | None = None, *, counted: bool = False
        ) -> None:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "HEAD":
                return
            faults, end = hub.faults, len(data)
            if faults.cut is not None and faults.cuts > 0 and len(data) > faults.cut and status in (200, 206):
                faults.cuts -= 1
                end = faults.cut
                self.close_connection = True
            try:
                for start in range(0, end, BLOCK):
                    if faults.pace:
                        time.sleep(faults.pace)
                    block = data[start : min(start + BLOCK, end)]
                    self.wfile.write(block)
                    if counted:
                        with hub.counting:
                            hub.served += len(block)
            except ConnectionError:
                self.close_connection = True  # whoever asked is gone

    Handler.hub = hub
    return Handler


def tree_entry(path: str, data: bytes) -> dict[str, Any]:
    """What the hub lists for one file."""
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_sha1(data)}
    if len(data) >= LFS_FROM:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry
