"""The bytes of a file behind a URL, whatever happens on the way.

A body that breaks off, stalls or ends early is asked for again from the next byte on, as are answers of a server that
is overloaded or being restarted. A server that cannot begin in the middle sends all of it, and what is already known is
dropped. So the bytes come once and in order, and all of them come from one version of the file.
"""

from __future__ import annotations

import functools
import logging
import random
import re
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass

import httpx2 as httpx

from fusiontree.errors import InputError, first_line

logger = logging.getLogger(__name__)

_LONGEST_PAUSE_S = 60.0
# Of the 4xx, those that say "later" rather than "no": request timeout, too early, too many requests.
_PASSING_STATUS = (408, 425, 429)
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)")


@dataclass(frozen=True)
class Patience:
    """How long to bear with a server.

    With the defaults, a server that is down is given up after 4 minutes when it refuses connections and after 9 when it
    does not answer: less than the 10 minutes that other processes of a training usually wait for this one.

    Attributes:
        timeout: seconds to wait for a connection and for each next piece of a body.
        tries: requests in a row that bring nothing new before it is given up.
        pause: seconds before the second of them, doubled before each further one up to a minute, each shortened by up
            to half at random so that many processes do not come back all at once.
    """

    timeout: float = 30.0
    tries: int = 10
    pause: float = 1.0

    def __post_init__(self) -> None:
        if self.timeout <= 0 or self.tries < 1 or self.pause < 0:
            raise InputError(
                f"timeout must be above 0, tries at least 1 and pause at least 0, got {self.timeout:g}, {self.tries} "
                f"and {self.pause:g}"
            )


@dataclass(frozen=True)
class Version:
    """What a server says of a file's content; None where it says nothing."""

    length: int | None
    etag: str | None
    last_modified: str | None

    def contradicts(self, other: Version) -> bool:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return any(None not in pair and pair[0] != pair[1] for pair in pairs)


class Backoff:
    """Counts tries that brought nothing new, and waits before the next one.

    Args:
        name: what is asked for, for messages.
    """

    # A generator of its own: drawing from the global one would change what a seeded program draws next.
    _random = random.Random()

    def __init__(self, name: str, patience: Patience) -> None:
        self._name = name
        self._patience = patience
        self._failures = 0
        self._progress = False

    def progress(self) -> None:
        """The try at hand brought something new."""
        self._progress = True

    def failed(self, reason: str) -> None:
        """Wait for the next try.

        Raises:
            InputError: that was the last one.
        """
        self._failures = 0 if self._progress else self._failures + 1
        self._progress = False
        if self._failures >= self._patience.tries:
            tries = f"{self._failures} {'try' if self._failures == 1 else 'tries in a row'}"
            raise InputError(
                f"{self._name} cannot be read: {reason}, after {tries}; "
                "once it can be reached, training goes on from its last checkpoint"
            )
        longest = min(_LONGEST_PAUSE_S, self._patience.pause * 2 ** max(0, self._failures - 1))
        pause = longest * self._random.uniform(0.5, 1.0)
        logger.warning(
            "%s: %s; try %d of %d in %.1f s", self._name, reason, self._failures + 1, self._patience.tries, pause
        )
        time.sleep(pause)


class _Interrupted(Exception):
    """A try that failed in a way that may pass."""


class RemoteFile:
    """A file behind an http or https URL.

    Attributes:
        name: the URL without user, query and fragment, in which access keys may stand.
    """

    def __init__(self, url: str, patience: Patience) -> None:
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise InputError(f"{url} is no usable URL: {first_line(error)}") from error
        if not parsed.host:
            raise InputError(f"{url} is no usable URL: it names no host")
        self.url = url
        self.name = str(parsed.copy_with(userinfo=b"", query=None, fragment=None))
        self._patience = patience
        self._version: Version | None = None

    def version(self) -> Version:
        """What the server says of the content, asked for once.

        Raises:
            InputError: as `chunks`.
        """
        if self._version is not None:
            return self._version
        backoff = Backoff(self.name, self._patience)
        with self._client() as client:
            while self._version is None:
                try:
                    # Not HEAD: some servers refuse it, and signed URLs are signed for one method.
                    with self._response(client, 0):
                        pass
                except _Interrupted as error:
                    backoff.failed(str(error))
        return self._version

    def identity(self) -> list[object]:
        """Length, ETag and modification time, as far as the server tells them."""
        return list(astuple(self.version()))

    def chunks(self) -> Iterator[bytes]:
        """The content from its first byte to its last, in pieces of any size.

        Raises:
            InputError: the server has no such file or refuses it, the content is not that of an earlier try, or too
                many tries in a row brought nothing new.
        """
        position = 0
        backoff = Backoff(self.name, self._patience)
        with self._client() as client:
            while True:
                try:
                    for chunk in self._rest(client, position):
                        position += len(chunk)
                        backoff.progress()
                        yield chunk
                    return
                except _Interrupted as error:
                    backoff.failed(str(error))

    def _client(self) -> httpx.Client:
        # Ranges count the bytes that are sent, so nothing is to be compressed for the way.
        return httpx.Client(
            timeout=self._patience.timeout,
            follow_redirects=True,
            headers={"Accept-Encoding": "identity"},
            verify=_ssl_context(),
        )

    def _rest(self, client: httpx.Client, position: int) -> Iterator[bytes]:
        """What follows the first `position` bytes, all of it or an `_Interrupted`."""
        with self._response(client, position) as (response, begin):
            assert self._version is not None
            if response.status_code == 416:
                return
            known, received = position - begin, begin
            body = response.iter_raw()
            while True:
                # Around `next` alone: what happens to whoever takes the bytes is none of the connection's errors.
                with _passing_errors():
                    chunk = next(body, None)
                if chunk is None:
                    break
                received += len(chunk)
                new = chunk[known:]
                known -= len(chunk) - len(new)
                if new:
                    yield new
            length = self._version.length
            if received < (position if length is None else length):
                raise _Interrupted(f"the answer ended after {received} of {length or 'more'} bytes")

    @contextmanager
    def _response(self, client: httpx.Client, position: int) -> Iterator[tuple[httpx.Response, int]]:
        """An answer with content, and the byte that it begins with: `position`, or 0 where the server cannot."""
        headers = {"Range": f"bytes={position}-"} if position else {}
        with _passing_errors():
            try:
                request = client.build_request("GET", self.url, headers=headers)
                response = client.send(request, stream=True)
            except (httpx.UnsupportedProtocol, httpx.TooManyRedirects, httpx.InvalidURL) as error:
                raise InputError(f"{self.name} cannot be read: {first_line(error)}") from error
        try:
            yield response, self._check(response, position)
        finally:
            response.close()

    def _check(self, response: httpx.Response, position: int) -> int:
        """The byte that an answer begins with; notes the version of the first one."""
        status = response.status_code
        if status >= 500 or status in _PASSING_STATUS:
            raise _Interrupted(f"the server answered {status} {response.reason_phrase}".rstrip())
        begin, length = 0, _number(response.headers.get("Content-Length"))
        if position and status in (206, 416):
            found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            length = int(found[2]) if found and found[2] else None
            if status == 416 and length != position:
                raise self._changed()
            begin = int(found[1]) if found and found[1] else position
            if begin != position:
                raise _Interrupted(f"the server answered from byte {begin} on when asked for byte {position}")
        elif status != 200:
            raise InputError(
                f"{self.name} cannot be read: the server answered {status} {response.reason_phrase}".rstrip()
                + "; check the URL and whether it needs a key"
            )
        etag = response.headers.get("ETag")
        version = Version(length, etag and etag.removeprefix("W/"), response.headers.get("Last-Modified"))
        if self._version is None:
            self._version = version
        elif version.contradicts(self._version):
            raise self._changed()
        return begin

    def _changed(self) -> InputError:
        return InputError(
            f"{self.name} has changed since this run began to read it; start again, the data is no longer the same"
        )


@functools.cache
def _ssl_context() -> ssl.SSLContext:
    # Reading the certificates anew for each file takes longer than a small file does.
    return httpx.create_ssl_context()


def _number(value: str | None) -> int | None:
    return int(value) if value and value.isdecimal() else None


@contextmanager
def _passing_errors() -> Iterator[None]:
    """Errors of a connection, as `_Interrupted` with what they are in words."""
    try:
        yield
    except httpx.TimeoutException as error:
        raise _Interrupted("the server did not answer in time") from error
    except httpx.TransportError as error:
        raise _Interrupted(f"the connection failed ({first_line(error)})") from error
