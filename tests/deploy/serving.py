"""A server in a process of its own, as users start it."""

from __future__ import annotations

import atexit
import json
import os
import queue
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import openai

import warm

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'developer' %}{{ raise_exception('nobody develops here') }}{% endif %}"
    "[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def add_template(folder: Path) -> Path:
    """Gives the tokenizer in `folder` a chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


class ServerProcess:
    """`fusiontree serve MODEL` with some more arguments; its log is kept line by line.

    Args:
        code: Python that runs before.
    """

    def __init__(self, model: Path, *arguments: str, code: str = "", **environment: str) -> None:
        command = ["-c", f"{code}\nimport sys\nfrom fusiontree.cli import main\nsys.exit(main(sys.argv[1:]))"]
        self.process = subprocess.Popen(
            [warm.python(), *command, "serve", str(model), "--port", "0", "--device", "cpu", *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        atexit.register(self.process.kill)  # should its test fail
        self.key = "none"
        self.lines: list[str] = []
        self._arrived: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self.wait_for("listening")["address"]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            self._arrived.put(line)
        self._arrived.put("")

    def wait_for(self, event: str, seconds: float = 120) -> dict[str, Any]:
        """The next record of the log with this event."""
        while True:
            line = self._arrived.get(timeout=seconds)
            if not line:
                raise AssertionError(f"the server has ended: {''.join(self.lines)}")
            if line.startswith("{") and json.loads(line)["event"] == event:
                return json.loads(line)

    def client(self, key: str | None = None, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key or self.key, **({"max_retries": 0} | options))

    def stop(self, how: int = signal.SIGTERM, seconds: float = 60) -> int:
        """Its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        code = self.process.wait(timeout=seconds)
        self._reader.join(timeout=seconds)
        return code
