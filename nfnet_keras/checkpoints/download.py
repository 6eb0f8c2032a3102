"""Fetching a file over HTTP: resumed where it broke off, and handed over only once its checksum holds."""

import contextlib
import dataclasses
import email.utils
import errno
import hashlib
import http.client
import io
import json
import os
import re
import shutil
import socket
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime

from nfnet_keras.checkpoints.manifest import Checksum
from nfnet_keras.version import __version__

_BLOCK = 1 << 18
_MEBIBYTE = 1 << 20
_LONGEST_WAIT = 60.0
_LOCAL = ("localhost", "127.0.0.1")
# By trust: the Hugging Face hub puts the SHA-256 of a large file into the first; an ETag may be any hash.
_STATEMENTS = ("X-Linked-Etag", "ETag", "x-amz-meta-sha256")
# What a second try a moment later does not mend.
_LASTING = (socket.gaierror, ConnectionRefusedError, ssl.SSLCertVerificationError, http.client.InvalidURL)


class DownloadError(OSError):
    """A file could not be fetched, or not be trusted. The message says what happened, where, and what to do."""


@dataclasses.dataclass(frozen=True)
class FetchedFile:
    """A file whose checksum held.

    `source` is "publisher" if the checksum was known beforehand, "server" if the server stated it.
    """

    path: str
    algorithm: str
    checksum: str
    source: str


class _PassingError(Exception):
    """A try that failed in a way that the next may not."""

    def __init__(self, what: str, wait: float | None = None):
        super().__init__(what)
        self.wait = wait


def _error(what: str, url: str) -> DownloadError:
    return DownloadError(
        f"{what} ({url}). The file can also be fetched by hand and its path passed as `weights` (`--weights` on the "
        "command line)."
    )


def _check_address(url: str, origin: str = "") -> None:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise _error("only http and https addresses are fetched", url)
    if origin.startswith("https:") and parts.scheme == "http" and parts.hostname not in _LOCAL:
        raise _error("the server redirects from https to http, where anyone on the way can change the file", url)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to safe addresses and keeps their headers: the checksum may stand on any of them."""

    def __init__(self):
        self.headers = []

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        _check_address(newurl, req.full_url)
        self.headers.append(headers)
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    def stated(self, last: http.client.HTTPMessage) -> str | None:
        """The SHA-256 that the chain of responses states."""
        for name in _STATEMENTS:
            for headers in (*self.headers, last):
                value = headers.get(name, "").strip().strip('"').lower()
                if re.fullmatch(r"[0-9a-f]{64}", value):
                    return value
        return None


@dataclasses.dataclass
class _Part:
    """The unfinished file, and beside it what tells whether the server still has the same one."""

    path: str
    resumed: bool = False

    @property
    def size(self) -> int:
        return os.path.getsize(self.path) if os.path.exists(self.path) else 0

    def state(self, url: str, known: bool) -> dict | None:
        """What was noted of the file, if a download from `url` can go on; `known`: there is a checksum without it."""
        try:
            with open(f"{self.path}.json", encoding="utf-8") as file:
                state = json.load(file)
            checkable = state["sha256"] or known
            usable = checkable and state["url"] == url and state["validator"] and 0 < self.size <= state["size"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return state if usable else None

    def begin(self, url: str, headers: http.client.HTTPMessage, size: int | None, stated: str | None) -> None:
        """Starts from nothing."""
        etag = headers.get("ETag", "")
        # A weak ETag may stay the same when bytes change.
        validator = etag if etag.startswith('"') else headers.get("Last-Modified")
        # Emptied before the note changes: a kill between the two must not join old bytes to the new note.
        with open(self.path, "wb"):
            pass
        with open(f"{self.path}.json", "w", encoding="utf-8") as file:
            json.dump({"url": url, "validator": validator, "size": size, "sha256": stated}, file)
        self.resumed = False

    def clear(self) -> None:
        for path in (self.path, f"{self.path}.json"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)


class _Progress:
    """One line on stderr: kept up to date on a terminal, written once elsewhere."""

    def __init__(self, show: bool, name: str):
        self.name, self.show = name, show
        self.live = show and sys.stderr.isatty()
        self.announced, self.shown = False, 0.0

    def update(self, done: int, size: int | None, last: bool = False) -> None:
        if self.show and not self.live and not self.announced:
            self.announced = True
            amount = "size unknown" if size is None else _readable(size)
            print(f"downloading {self.name}, {amount}", file=sys.stderr, flush=True)
        if self.live and (last or time.monotonic() - self.shown > 0.2):
            self.shown = time.monotonic()
            of = "" if size is None else f" of {_readable(size)}, {100 * done // size} %"
            print(f"\rdownloading {self.name}: {_readable(done)}{of} ", end="\n" if last else "", file=sys.stderr)
            sys.stderr.flush()


def _readable(size: int) -> str:
    for unit, power, digits in (("GB", 1e9, 2), ("MB", 1e6, 0), ("kB", 1e3, 0)):
        if size >= power:
            return f"{size / power:.{digits}f} {unit}"
    return f"{size} B"


def digest(path: str | os.PathLike[str], algorithm: str) -> str:
    """Computes a file's checksum.

    Args:
        path: The file.
        algorithm: A name that `hashlib` knows.

    Returns:
        Hexadecimal digits.

    Example:

    >>> digest(os.devnull, "md5")
    'd41d8cd98f00b204e9800998ecf8427e'
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def _judge(error: Exception, url: str) -> Exception:
    """What a failed connection means: `_PassingError`, or an error that ends the download."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    text = "no answer in time" if isinstance(cause, TimeoutError) else str(cause) or type(cause).__name__
    passing = (ConnectionError, TimeoutError, http.client.HTTPException, ssl.SSLError)
    if isinstance(cause, passing) and not isinstance(cause, _LASTING):
        return _PassingError(f"the connection broke: {text}")
    return _error(f"the server cannot be reached: {text}", url)


def _refused(error: urllib.error.HTTPError, url: str) -> Exception:
    """What an HTTP error means, as for `_judge`."""
    what = f"the server answered {error.code} {error.reason}"
    if error.code < 500 and error.code not in (408, 425, 429):
        return _error(what, url)
    wait = None
    if after := error.headers.get("Retry-After"):
        with contextlib.suppress(ValueError, TypeError):
            if after.strip().isdigit():
                wait = float(after)
            else:
                wait = (email.utils.parsedate_to_datetime(after) - datetime.now(UTC)).total_seconds()
    if wait is not None and wait > _LONGEST_WAIT:
        return _error(f"{what} and asks to come back in {wait:.0f} s", url)
    return _PassingError(what, None if wait is None else max(wait, 0.0))


def _full(what: str, path: str) -> DownloadError:
    return DownloadError(errno.ENOSPC, f"{what}; make room, or name a folder on another disk in KERAS_HOME", path)


def _same_file(state: dict, start: int, response: http.client.HTTPResponse, stated: str | None) -> bool:
    """Whether a partial answer goes on where the part ends, in the file that it began with."""
    expected = f"bytes {start}-{state['size'] - 1}/{state['size']}"
    etag = response.headers.get("ETag", "")
    changed = etag.startswith('"') and state["validator"].startswith('"') and etag != state["validator"]
    return response.headers.get("Content-Range") == expected and stated == state["sha256"] and not changed


@dataclasses.dataclass
class _Download:
    url: str
    part: _Part
    checksum: Checksum | None
    line: _Progress
    timeout: float
    retries: int
    sleep: Callable[[float], None]

    def whole(self) -> str | None:
        """Tries until the part is whole; returns the SHA-256 that the server states."""
        failures, furthest = 0, self.part.size
        while True:
            try:
                return self._attempt()
            except _PassingError as error:
                # A long download over a bad line breaks often; what counts is whether it gets on.
                if self.part.size >= furthest + _MEBIBYTE:
                    failures, furthest = 0, self.part.size
                failures += 1
                if failures > self.retries:
                    raise _error(f"gave up after {failures} tries: {error}", self.url) from None
                self.sleep(2.0 ** (failures - 1) if error.wait is None else error.wait)

    def _attempt(self) -> str | None:
        state = self.part.state(self.url, self.checksum is not None)
        start = self.part.size if state else 0
        if state and start == state["size"]:
            self.part.resumed = True
            return state["sha256"]
        redirects = _Redirects()
        with self._open(state, start, redirects) as response:
            stated = redirects.stated(response.headers)
            if response.status != 206:
                start, size = 0, self._begin(response, stated)
            elif state and _same_file(state, start, response, stated):
                size, self.part.resumed = state["size"], True
            else:
                raise self._exchanged()
            self._receive(response, start, size)
        return stated

    def _open(self, state: dict | None, start: int, redirects: _Redirects) -> http.client.HTTPResponse:
        request = urllib.request.Request(self.url, headers={"User-Agent": f"nfnet-keras/{__version__}"})
        if state:
            request.add_header("Range", f"bytes={start}-")
            request.add_header("If-Range", state["validator"])
        try:
            return urllib.request.build_opener(redirects).open(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            with error:
                raise (self._exchanged() if error.code == 416 and state else _refused(error, self.url)) from None
        except DownloadError:
            raise
        except (OSError, http.client.HTTPException) as error:
            raise _judge(error, self.url) from None

    def _exchanged(self) -> _PassingError:
        self.part.clear()
        return _PassingError("the server has another file than before", 0.0)

    def _begin(self, response: http.client.HTTPResponse, stated: str | None) -> int | None:
        """Looks at an answer that starts from the first byte; returns the length that it announces."""
        if response.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
            raise _error("the server sent a web page and not the file; a login or proxy may stand between", self.url)
        if stated is None and self.checksum is None:
            raise _error("the server states no SHA-256, so the file cannot be checked", self.url)
        length = response.headers.get("Content-Length", "")
        size = int(length) if length.isdigit() else None
        if size == 0:
            raise _error("the server sent an empty file", self.url)
        self.part.begin(self.url, response.headers, size, stated)
        return size

    def _receive(self, response: http.client.HTTPResponse, done: int, size: int | None) -> None:
        path = self.part.path
        free = shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free
        if size is not None and free < size - done:
            raise _full(f"no room: {_readable(size - done)} are to come, {_readable(free)} are free", path)
        self.line.update(done, size)
        with open(path, "ab", buffering=0) as file:
            while size is None or done < size:
                try:
                    block = response.read1(_BLOCK if size is None else min(_BLOCK, size - done))
                except (OSError, http.client.HTTPException) as error:
                    raise _judge(error, self.url) from None
                if not block:
                    break
                _write(file, block, path)
                done += len(block)
                self.line.update(done, size)
            os.fsync(file.fileno())
        if size is not None and done < size:
            raise _PassingError(f"the connection broke after {_readable(done)} of {_readable(size)}")
        if done == 0:
            raise _error("the server sent an empty file", self.url)
        self.line.update(done, size, last=True)

    def checked(self, target: str) -> FetchedFile:
        """Brings the whole part to its place, if it is right."""
        clean = False
        while True:
            stated = self.whole()
            checksum = self.checksum or Checksum("sha256", stated, "server")
            wanted = checksum.value.lower()
            found = digest(self.part.path, checksum.algorithm)
            if found == wanted:
                os.replace(self.part.path, target)
                self.part.clear()
                return FetchedFile(target, checksum.algorithm, found, checksum.source)
            self.part.clear()
            # A joined file may be wrong where the server's is right.
            if clean or not self.part.resumed:
                what = f"wrong checksum, the file is removed: its {checksum.algorithm} is {found}, not {wanted}"
                raise _error(what, self.url)
            clean, self.part.resumed = True, False


def _write(file: io.RawIOBase, block: bytes, path: str) -> None:
    view = memoryview(block)
    try:
        while view:
            view = view[file.write(view) :]
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _full("the disk is full", path) from None


def fetch(
    url: str,
    target: str | os.PathLike[str],
    checksum: Checksum | None = None,
    *,
    progress: bool = True,
    timeout: float = 30.0,
    retries: int = 4,
    sleep: Callable[[float], None] = time.sleep,
) -> FetchedFile:
    """Fetches a file. It appears under its name only when it is whole and its checksum holds.

    What has come is kept in `target` + ".part"; a later call goes on from there if the server still has the same file.
    Proxies are taken from the environment (`http_proxy`, `https_proxy`, `no_proxy`). One process at a time may fetch to
    one target.

    Args:
        url: An http or https address; https is not left for http.
        target: Where the file shall be. One that is there is replaced.
        checksum: What it must have. Without one (or without a value) the server must state a SHA-256 in its headers.
        progress: Whether to tell of it on stderr.
        timeout: Seconds without a byte after which a connection counts as broken.
        retries: How often in a row a broken connection or a busy server is tried again, after 1, 2, 4, ... seconds
            or what the server asks for.
        sleep: What waits.

    Returns:
        The file and the checksum that held.

    Raises:
        DownloadError: If the file cannot be fetched, written or checked.

    Example:

    >>> fetch("file:///etc/hostname", "hostname")
    Traceback (most recent call last):
    ...
    nfnet_keras.checkpoints.download.DownloadError: only http and https addresses are fetched (file:///etc/hostname)
    """
    target = os.fspath(target)
    _check_address(url)
    checksum = checksum if checksum and checksum.value else None
    line = _Progress(progress, os.path.basename(urllib.parse.urlsplit(url).path) or url)
    try:
        os.makedirs(os.path.dirname(os.path.abspath(target)), exist_ok=True)
        return _Download(url, _Part(f"{target}.part"), checksum, line, timeout, retries, sleep).checked(target)
    except DownloadError:
        raise
    except OSError as error:
        raise DownloadError(error.errno, f"cannot write the file ({error.strerror or error})", target) from None
