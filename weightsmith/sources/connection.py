"""HTTP/1.1 for bytes: kept-alive connections of one thread, redirects by rule, and failures sorted by what to do.

With the standard library's client (http.client), since a chunk of a file goes straight from the socket into a buffer
and from there to its place on disk. What is added is what a download needs and urllib has in no combinable form:

- a connection is used again, so that a further chunk costs neither a handshake nor a slow start;
- the headers that carry a token go to the host (scheme, name and port) that they were meant for; the first redirect to
  another one ends that for good;
- redirects lead to https only, from the outside never into this machine, and nowhere after a few;
- answers are sorted: `Passing` may pass by itself (with the seconds the server asks to wait), `Refused` will not.

https goes through the proxy of the environment (https_proxy, all_proxy, no_proxy; CONNECT, with name and password if
the proxy's address has them); this machine is asked directly. Bodies are asked for unencoded (`identity`).

Ref: RFC 9110, sections 10.2.3 (Retry-After), 14 (ranges), 15.4 (redirects); RFC 9112, section 9.3 (persistence).
"""

from __future__ import annotations

import base64
import contextlib
import functools
import http.client
import re
import socket
import ssl
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from urllib.parse import quote, unquote, urljoin, urlsplit

from weightsmith._version import __version__
from weightsmith.errors import UnsupportedError, WeightsmithError
from weightsmith.sources.source import bare_url, check_url, is_loopback

TIMEOUT = 60.0
MAX_REDIRECTS = 5
MAX_WAIT = 600.0  # seconds that a server may ask for
_DRAIN = 64 << 10  # a body up to this size is read to keep the connection
_REDIRECTS = (301, 302, 303, 307, 308)
_LIMIT = re.compile(r"r\s*=\s*0\s*;\s*t\s*=\s*(\d{1,6})")  # RateLimit: "resolvers";r=0;t=120
_AS_IS = "%/:?#[]@!$&'()*+,;=~"  # of a request target that is quoted already
_HTTP_ERRORS = (OSError, http.client.HTTPException)

Origin = tuple[str, str, int]


class Passing(Exception):  # noqa: N818  (a signal, not an error: whoever asks tries again)
    """The transfer stopped for a reason that may pass. wait: seconds the server asks for, None if it does not say."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class Refused(Exception):  # noqa: N818  (a signal: the source knows the words for it)
    """The server of `url` will not: status, and the hub's own X-Error-Code and X-Error-Message ("" elsewhere)."""

    def __init__(self, url: str, status: int, code: str = "", message: str = "") -> None:
        super().__init__(f"HTTP {status}")
        self.url, self.status, self.code, self.message = url, status, code, message


@dataclass(frozen=True, slots=True)
class Answer:
    """A response whose body was not read yet, and the URL that gave it after all redirects."""

    url: str
    response: http.client.HTTPResponse

    @property
    def status(self) -> int:
        """200 or 206."""
        return self.response.status

    def header(self, name: str) -> str | None:
        """A header of the response; None when it is absent."""
        return self.response.headers.get(name)

    def read_into(self, view: memoryview) -> int:
        """Read into `view` and return how many bytes; 0 at the end. Raises Passing when the connection breaks."""
        try:
            return self.response.readinto(view)
        except _HTTP_ERRORS as error:
            raise Passing(f"the connection broke ({type(error).__name__})") from error


class Client:
    """The connections of one thread, one for each host it meets."""

    def __init__(self) -> None:
        self._open: dict[Origin, http.client.HTTPConnection] = {}

    def get(self, url: str, headers: Mapping[str, str], secret: Mapping[str, str] | None = None) -> Answer:
        """Ask for `url` and follow its redirects; `secret` headers stay with the host of `url`.

        Answers 200 and 206 are returned. Raises Passing, Refused, UnsafeInputError or UsageError (a redirect to where
        it must not lead) and WeightsmithError (endless redirects, an encoded body).
        """
        secret = dict(secret or {})
        for _ in range(MAX_REDIRECTS + 1):
            response = self._ask(url, {**headers, **secret})
            if response.status not in _REDIRECTS:
                return self._sorted(url, response)
            self._finish(url, response)
            target = urljoin(url, response.headers.get("Location") or "")
            check_url(target, from_loopback=is_loopback(url))
            if origin(target) != origin(url):
                secret = {}
            url = target
        raise WeightsmithError(f"redirected more than {MAX_REDIRECTS} times", path=bare_url(url))

    def drop(self, url: str) -> None:
        """Close the connection to the host of `url`, as after a body that was not read to its end."""
        connection = self._open.pop(origin(url), None)
        if connection is not None:
            connection.close()

    def close(self) -> None:
        """Close everything."""
        for connection in list(self._open.values()):
            connection.close()
        self._open.clear()

    def interrupt(self) -> None:
        """Wake the thread that waits for bytes here, from another one: it meets a broken connection."""
        for connection in list(self._open.values()):
            with contextlib.suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    def _ask(self, url: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
        key = origin(url)
        used_before = key in self._open
        connection = self._open.get(key) or _connect(url)
        self._open[key] = connection
        try:
            try:
                return _send(connection, url, headers)
            except (ConnectionError, http.client.BadStatusLine):
                connection.close()
                if not used_before:
                    raise
                return _send(connection, url, headers)  # the server had closed an idle connection
        except ssl.SSLCertVerificationError as error:
            self.drop(url)
            raise WeightsmithError(
                f"the server's certificate is not trusted ({error.verify_message})",
                path=bare_url(url),
                hint="Behind a proxy that opens TLS, name its certificate in SSL_CERT_FILE.",
            ) from error
        except _HTTP_ERRORS as error:
            self.drop(url)
            raise Passing(f"no connection ({type(error).__name__})") from error

    def _sorted(self, url: str, response: http.client.HTTPResponse) -> Answer:
        status = response.status
        if status in (200, 206):
            coding = response.headers.get("Content-Encoding", "identity")
            if coding != "identity":
                self.drop(url)
                raise WeightsmithError(f"the server insists on encoding {coding!r}", path=bare_url(url))
            return Answer(url, response)
        self._finish(url, response)
        if status in (408, 429) or status >= 500:
            raise Passing(f"HTTP {status}", wait_asked(dict(response.headers)))
        code, message = (response.headers.get(f"X-Error-{key}", "")[:300] for key in ("Code", "Message"))
        raise Refused(url, status, code, message)

    def _finish(self, url: str, response: http.client.HTTPResponse) -> None:
        """Read a body that nobody wants, if it is short, so that the connection can be used again."""
        try:
            response.read(_DRAIN)
            if not response.isclosed():
                self.drop(url)
        except _HTTP_ERRORS:
            self.drop(url)


def origin(url: str) -> Origin:
    """Scheme, host and port of a URL: who is asked."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def wait_asked(headers: Mapping[str, str]) -> float | None:
    """Seconds that a refusal asks to wait: Retry-After as a number or a date, or the hub's RateLimit; None without."""
    asked = (headers.get("Retry-After") or "").strip()
    seconds: float | None = None
    if asked.isascii() and asked.isdigit():
        seconds = float(asked[:9])
    elif asked:
        try:
            seconds = parsedate_to_datetime(asked).timestamp() - time.time()
        except (ValueError, OverflowError):
            seconds = None
    if seconds is None and (limit := _LIMIT.search(headers.get("RateLimit") or "")):
        seconds = float(limit[1])
    return None if seconds is None else min(max(seconds, 0.0), MAX_WAIT)


def _send(connection: http.client.HTTPConnection, url: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
    parts = urlsplit(url)
    target = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe=_AS_IS)
    sent = {"Accept-Encoding": "identity", "User-Agent": f"weightsmith/{__version__}", **headers}
    connection.request("GET", target, headers=sent)
    return connection.getresponse()


def _connect(url: str) -> http.client.HTTPConnection:
    """A connection that opens when it is used: direct to this machine, else over TLS and through the proxy, if any."""
    scheme, host, port = origin(url)
    if scheme == "http":  # only ever this machine, see `check_url`
        return http.client.HTTPConnection(host, port, timeout=TIMEOUT)
    proxies = urllib.request.getproxies()
    proxy = proxies.get("https") or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(host):
        return http.client.HTTPSConnection(host, port, timeout=TIMEOUT, context=_trust())
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    if parts.scheme != "http" or not parts.hostname:
        raise UnsupportedError(
            f"a proxy of kind {parts.scheme}://", path=bare_url(url), hint="An http:// proxy in https_proxy is known."
        )
    connection = http.client.HTTPSConnection(parts.hostname, parts.port or 80, timeout=TIMEOUT, context=_trust())
    allowed = {}
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        allowed["Proxy-Authorization"] = f"Basic {base64.b64encode(login).decode()}"
    connection.set_tunnel(host, port, headers=allowed)
    return connection


@functools.cache
def _trust() -> ssl.SSLContext:
    """The system's certificates (SSL_CERT_FILE and SSL_CERT_DIR count), else certifi's where the system has none."""
    context = ssl.create_default_context()
    if not context.cert_store_stats()["x509_ca"]:
        try:
            import certifi  # noqa: PLC0415  (there wherever huggingface_hub's own client is)
        except ImportError:
            return context
        context.load_verify_locations(certifi.where())
    return context
