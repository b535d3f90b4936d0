"""A stand-in for W&B's server on this machine: it keeps each run's history as the client sends it, by line number."""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.histories: dict[str, list[str]] = {}
        self.exit_codes: list[int] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up when it is done is no error."""

    def rows(self) -> list[dict[str, Any]]:
        """Of the only run, without W&B's own keys."""
        (history,) = self.histories.values()
        return [{k: v for k, v in json.loads(line).items() if k[0] != "_"} for line in history]

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        name = re.findall(r"(?:query|mutation)\s+(\w+)", query)[0]
        if name == "RunResumeStatus":
            bucket = self._resumed(variables["name"]) if variables["name"] in self.histories else None
            return {"model": {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}, "bucket": bucket}}
        if name == "UpsertBucket":
            is_new = variables["name"] not in self.histories
            self.histories.setdefault(variables["name"], [])
            project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
            bucket = {"id": "b", "name": variables["name"], "displayName": "n", "config": "{}", "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/{file}"} for file in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if name == "Viewer":
            return {"viewer": {"id": "u", "entity": "e", "username": "e", "flags": "{}", "teams": {"edges": []}}}
        return {"serverInfo": {"features": []}} if name == "ServerFeaturesQuery" else {}

    def _resumed(self, run: str) -> dict[str, Any]:
        history = self.histories[run]
        return {
            "id": "b",
            "name": run,
            "displayName": "n",
            "notes": "",
            "tags": [],
            "config": "{}",
            "historyLineCount": len(history),
            "historyTail": json.dumps(history[-1:]),
            "eventsTail": "[]",
            "logLineCount": 0,
            "eventsLineCount": 0,
            "wandbConfig": '{"t": 1}',
            "summaryMetrics": history[-1] if history else "{}",
        }

    def receive(self, run: str, stream: dict[str, Any]) -> None:
        sent = stream.get("files", {}).get("wandb-history.jsonl")
        if sent:
            history, first = self.histories[run], sent["offset"]
            history[first : first + len(sent["content"])] = sent["content"]
        if stream.get("complete"):
            self.exit_codes.append(stream["exitcode"])


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def log_message(self, *arguments: Any) -> None:
        """Quietly."""

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            content = gzip.decompress(content)
        answer: dict[str, Any] = {}
        if self.path == "/graphql":
            asked = json.loads(content)
            answer = {"data": self.server.answer(asked["query"], asked.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            self.server.receive(self.path.split("/")[-2], json.loads(content))
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_POST


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    server = WandbServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
