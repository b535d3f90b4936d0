"""A server on this machine that answers with some bytes, and fails in the ways that real ones do."""

from __future__ import annotations

import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer, after `after` bytes of its body: "drop" (reset), "end" (closed in good order,
    short of its Content-Length) or "stall"; or a `status` instead of a body, or another `etag`."""

    kind: str = ""
    after: int = 0
    status: int = 200
    etag: str = ""


@dataclass
class Served:
    """One file, and how it is served; `faults` are used up answer by answer, then all is well.

    Attributes:
        ranges: "yes", "ignored" (always all of it), "short" (only a part of what was asked for) or "wrong" (from
            another byte).
        chunked: without a length, in chunks.
        always: a fault of every answer.
    """

    content: bytes
    etag: str = '"one"'
    ranges: str = "yes"
    chunked: bool = False
    faults: list[Fault] = field(default_factory=list)
    always: Fault | None = None
    headers: dict[str, str] = field(default_factory=dict)


class FileServer:
    """Attributes:
    files: by path, which may be added to at any time.
    requests: (path, Range header or None) of every request so far.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.files: dict[str, Served] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.closing = threading.Event()

    def add(self, name: str, content: bytes, **options) -> str:
        self.files[f"/{name}"] = Served(content, **options)
        return f"{self.address}/{name}"


@contextmanager
def file_server() -> Iterator[FileServer]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_) -> None:
            pass

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            server.requests.append((path, self.headers.get("Range")))
            self.close_connection = True
            served = server.files.get(path)
            if served is None:
                self.send_error(404)
                return
            if location := served.headers.get("Location"):
                self.send_response(302)
                self.send_header("Location", location)
                self.send_header("Connection", "close")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            fault = served.always or (served.faults.pop(0) if served.faults else Fault())
            if fault.status != 200:
                self.send_error(fault.status)
                return
            self._send(served, fault)

        def _send(self, served: Served, fault: Fault) -> None:
            content = served.content
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(asked[1]) if asked and served.ranges != "ignored" else 0
            if start and start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if start and served.ranges == "wrong":
                start -= 1
            stop = start + 70_000 if start and served.ranges == "short" else len(content)
            body = content[start:stop]
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(content)}")
            self.send_header("ETag", fault.etag or served.etag)
            if served.chunked:
                self.send_header("Transfer-Encoding", "chunked")
            else:
                self.send_header("Content-Length", str(len(body)))
            for name, value in served.headers.items():
                self.send_header(name, value)
            self.end_headers()
            sent = body[: fault.after] if fault.kind else body
            try:
                if served.chunked:
                    for begin in range(0, len(sent), 1000):
                        piece = sent[begin : begin + 1000]
                        self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                    if not fault.kind:
                        self.wfile.write(b"0\r\n\r\n")
                else:
                    self.wfile.write(sent)
                self.wfile.flush()
            except OSError:  # the client has seen enough
                return
            if fault.kind == "stall":
                server.closing.wait(30)
            if fault.kind == "drop":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_) -> None:  # a connection that was dropped on purpose
            pass

    http = Quiet(("127.0.0.1", 0), Handler)
    server = FileServer(f"http://127.0.0.1:{http.server_address[1]}")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        http.shutdown()
        thread.join()
        http.server_close()
