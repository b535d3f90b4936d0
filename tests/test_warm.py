"""The server behind warm processes outlives whoever asks it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path

import warm


def test_an_executable_that_was_just_killed_costs_only_its_own_process() -> None:
    address = str(Path(warm.python()).with_name("socket"))
    request = {"command": ["-c", "pass"], "environment": dict(os.environ), "folder": os.getcwd()}
    for _ in range(5):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(address)
            socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
    done = subprocess.run([warm.python(), "-c", "print(6 * 7)"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "42\n")
