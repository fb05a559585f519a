"""skopeo reads the catalog where it lies, and carries an entry through Debian's docker-registry and back, bit for bit.

Both are Debian packages (`apt-get install skopeo docker-registry`); the registry listens on 127.0.0.1 only.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.oci.whole import blob, check_settled, put
from tests.tiny import write_llama
from weightsmith import oci
from weightsmith.catalog import Catalog

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = """
version: 0.1
log: {level: error}
storage: {filesystem: {rootdirectory: ROOT}}
http: {addr: ADDRESS}
"""

pytestmark = pytest.mark.skipif(not shutil.which("skopeo"), reason="skopeo is absent: apt-get install skopeo")


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    """The address of an empty registry."""
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("docker-registry is absent: apt-get install docker-registry")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    text = CONFIG.replace("ROOT", str(tmp_path / "registry")).replace("ADDRESS", address)
    (tmp_path / "registry.yml").write_text(text)
    command = [program, "serve", str(tmp_path / "registry.yml")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        try:
            for _ in range(200):
                try:
                    urllib.request.urlopen(f"http://{address}/v2/", timeout=5).close()
                    break
                except (urllib.error.URLError, ConnectionError):
                    if server.poll() is not None and server.stderr is not None:
                        pytest.fail(f"docker-registry does not start: {server.stderr.read()}")
                    time.sleep(0.05)
            else:
                pytest.fail("docker-registry does not answer")
            yield address
        finally:
            server.terminate()


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """A folder of safetensors, a GGUF file with an alias, a statement, names with dashes, an empty file twice."""
    catalog = Catalog(tmp_path / "home")
    catalog.add("tiny", "original", write_llama(tmp_path / "tiny"), licence="apache-2.0")
    more = {"deep/er/tokenizer.model": b"pieces", "README.md": b"words", "empty": b"", "empty_too": b""}
    entry = put(catalog, "tiny-2.5-b_x:q4_k_m", more=more, recipe={"target": "gguf:Q4_K_M"})
    with catalog.reserve("tiny-2.5-b_x", "prod") as reservation:
        reservation.link(entry)
    oci.attach(catalog.home, entry, artifact_type="application/vnd.test.v1", media_type="text/plain", data=b"good")
    return catalog


def skopeo(*args: str) -> bytes:
    command = ["skopeo", "--insecure-policy", *args]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def test_skopeo_reads_every_entry(catalog: Catalog) -> None:
    for entry in catalog.entries():
        where = f"oci:{catalog.home}:{entry.ref}"
        digest, data = oci.manifest_of(catalog.home, entry)
        assert skopeo("inspect", "--raw", where) == data
        config = json.loads(data)["config"]["digest"]
        assert skopeo("inspect", "--config", "--raw", where) == oci.read(catalog.home, config)
        (catalog.home.parent / "manifest").write_bytes(data)
        assert skopeo("manifest-digest", str(catalog.home.parent / "manifest")).decode().strip() == digest


def test_to_a_registry_and_back(catalog: Catalog, registry: str, tmp_path: Path) -> None:
    before = {path.name: path.stat() for path in (catalog.home / "blobs" / "sha256").iterdir()}
    for entry in catalog.entries():
        remote = f"docker://{registry}/models/{entry.name}:{entry.tag}"
        back = tmp_path / "back" / entry.name / entry.tag
        back.parent.mkdir(parents=True, exist_ok=True)
        skopeo("copy", "--preserve-digests", "--dest-tls-verify=false", f"oci:{catalog.home}:{entry.ref}", remote)
        digest, data = oci.manifest_of(catalog.home, entry)
        assert served(registry, entry.name, entry.tag) == (digest, data)
        skopeo("copy", "--preserve-digests", "--src-tls-verify=false", remote, f"oci:{back}:{entry.ref}")
        (descriptor,) = json.loads((back / "index.json").read_bytes())["manifests"]
        assert descriptor["digest"] == digest
        manifest: dict[str, Any] = json.loads(blob(back, descriptor))
        assert blob(back, manifest["config"]) == oci.read(catalog.home, manifest["config"]["digest"])
        files = {layer["annotations"]["org.cncf.model.filepath"]: blob(back, layer) for layer in manifest["layers"]}
        assert files == {file.path: (entry.folder / file.path).read_bytes() for file in entry.files}
    after = {path.name: path.stat() for path in (catalog.home / "blobs" / "sha256").iterdir()}
    assert {name: (s.st_ino, s.st_mtime_ns) for name, s in before.items()} == {
        name: (s.st_ino, s.st_mtime_ns) for name, s in after.items()
    }
    check_settled(catalog.home)


def served(registry: str, name: str, tag: str) -> tuple[str, bytes]:
    """Digest and bytes of a manifest as the registry gives them."""
    url = f"http://{registry}/v2/models/{name}/manifests/{tag}"
    request = urllib.request.Request(url, headers={"Accept": MANIFEST})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.headers["Docker-Content-Digest"], answer.read()
