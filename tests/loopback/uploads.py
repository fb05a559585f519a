"""The part of the Hugging Face API that an upload uses, for `hub.py`'s handler.

    POST /api/repos/create                               {url}; 409 where there is one, 403 where no one may
    POST /api/validate-yaml                              {errors, warnings}
    POST /api/models/ORG/NAME/preupload/REV              {files: [{path, uploadMode, shouldIgnore, oid}]}
    POST /ORG/NAME.git/info/lfs/objects/batch            {objects: [{oid, size, actions?: {upload: {href}}}]}
    PUT  /lfs/SHA256                                     the bytes, which must have that hash; no token comes along
    POST /api/models/ORG/NAME/commit/REV                 header, file, lfsFile, deletedFile: {commitUrl, commitOid}
    POST /api/models/ORG/NAME/branch/NAME                a new branch

As on the real hub, an object that is stored is not asked for again, whoever sent it, and a commit of an object that is
not stored is refused. `may_write` are the tokens that may write; `lost` are bytes that a commit stores in place of
others, by path.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.loopback.hub import Hub

ATTRIBUTES = b"*.gguf filter=lfs diff=lfs merge=lfs -text\n"


@dataclass
class Uploads:
    """What was uploaded: objects by SHA-256, who may, messages of commits, and faults of storing."""

    objects: dict[str, bytes] = field(default_factory=dict)
    may_write: set[str] = field(default_factory=set)
    messages: list[str] = field(default_factory=list)
    lost: dict[str, bytes] = field(default_factory=dict)


class UploadHandler:
    """Answers POST and PUT; mixed into the handler of `hub.py`, which has the rest."""

    hub: Hub
    headers: Any
    rfile: Any
    path: str

    def do_POST(self) -> None:
        self.answer()  # type: ignore[attr-defined]

    def do_PUT(self) -> None:
        self.answer()  # type: ignore[attr-defined]

    def upload(self, parts: list[str], body: bytes) -> None:
        """Answer the request with path `parts`."""
        if parts[0] == "lfs":
            self._put(parts[1], body)
        elif parts[:2] == ["api", "validate-yaml"]:
            self._json(200, {"errors": [], "warnings": []})
        elif (token := self.token()) not in self.hub.uploads.may_write:  # type: ignore[attr-defined]
            self._refuse_write(token)
        elif parts == ["api", "repos", "create"]:
            self._create(json.loads(body), str(token))
        elif parts[:2] == ["api", "models"] and len(parts) > 5:
            self._write(f"{parts[2]}/{parts[3]}", parts[4], parts[5], body)
        elif parts[2:] == ["info", "lfs", "objects", "batch"]:
            self._batch(json.loads(body))
        else:
            self.send(404, b"")  # type: ignore[attr-defined]

    def _refuse_write(self, token: str | None) -> None:
        said = "You don't have the rights to write here" if token else "Invalid username or password."
        self.send(403 if token else 401, b"", {"X-Error-Message": said})  # type: ignore[attr-defined]

    def _json(self, status: int, value: Any) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})  # type: ignore[attr-defined]

    def _create(self, asked: dict[str, Any], token: str) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            self._json(409, {"error": "You already created this model repo"})
            return
        self.hub.add(name, {".gitattributes": ATTRIBUTES})
        repo = self.hub.repos[name]
        repo.private = asked.get("visibility") == "private"
        repo.accepted = {token}
        self._json(200, {"url": f"{self.hub.endpoint}/{name}", "name": name})

    def _write(self, name: str, verb: str, branch: str, body: bytes) -> None:
        repo = self.hub.repos.get(name)
        if repo is None:
            self.refuse(404, "RepoNotFound")  # type: ignore[attr-defined]
        elif verb == "branch":
            repo.refs.setdefault(branch, repo.refs["main"])
            self._json(200, {})
        elif branch not in repo.refs:
            self.refuse(404, "RevisionNotFound")  # type: ignore[attr-defined]
        elif verb == "preupload":
            self._preupload(repo.commits[repo.refs[branch]].files, json.loads(body)["files"])
        else:
            self._commit(name, repo, branch, [json.loads(line) for line in body.splitlines()])

    def _preupload(self, there: dict[str, bytes], files: list[dict[str, Any]]) -> None:
        from tests.loopback.hub import LFS_FROM, tree_entry

        found = []
        for file in files:
            entry = tree_entry(file["path"], there[file["path"]]) if file["path"] in there else None
            oid = None if entry is None else entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
            mode = "lfs" if file["size"] >= LFS_FROM else "regular"
            found.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json(200, {"files": found})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for one in asked["objects"]:
            known = one["oid"] in self.hub.uploads.objects
            action = {"upload": {"href": f"{self.hub.endpoint}/lfs/{one['oid']}?signature=s"}}
            objects.append({**one, **({} if known else {"actions": action})})
        self._json(200, {"transfer": "basic", "objects": objects})

    def _put(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self.send(400, b"", {"X-Error-Message": "not the object's hash"})  # type: ignore[attr-defined]
            return
        self.hub.uploads.objects[oid] = body
        self.send(200, b"")  # type: ignore[attr-defined]

    def _commit(self, name: str, repo: Any, branch: str, lines: list[dict[str, Any]]) -> None:
        from tests.loopback.hub import Commit

        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repo.refs[branch]):
            self._json(412, {"error": "A commit has happened since. Please refresh and try again."})
            return
        files = dict(repo.commits[repo.refs[branch]].files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif value["oid"] in self.hub.uploads.objects:
                files[value["path"]] = self.hub.uploads.objects[value["oid"]]
            else:
                self._json(400, {"error": f"no object {value['oid']}"})
                return
        commit = Commit(files | self.hub.uploads.lost)
        repo.commits[commit.sha] = commit
        repo.refs[branch] = commit.sha
        self.hub.uploads.messages.append(header["summary"])
        url = f"{self.hub.endpoint}/{name}/commit/{commit.sha}"
        self._json(200, {"success": True, "commitOid": commit.sha, "commitUrl": url})


def body_of(handler: Any) -> bytes:
    """The body of a request, by length or in chunks."""
    if handler.headers.get("Transfer-Encoding", "").lower() == "chunked":
        found = b""
        while size := int(handler.rfile.readline().split(b";")[0], 16):
            found += handler.rfile.read(size)
            handler.rfile.readline()
        handler.rfile.readline()
        return found
    data: bytes = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
    return data
