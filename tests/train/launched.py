"""Runs of several real processes, started as their users start them."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import yaml

import warm

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}


def torchrun(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*warm.torchrun(), *command],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def write(sections: dict[str, Any], path: Path) -> str:
    path.write_text(yaml.safe_dump(sections))
    return str(path)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def started_by_hand(*commands: list[str]) -> list[subprocess.Popen[str]]:
    """A process for each command, without a launcher that would end the others."""
    port, processes = free_port(), []
    for rank, command in enumerate(commands):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        place |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(len(commands)))
        processes.append(
            subprocess.Popen(
                [warm.python(), *command],
                env=ENVIRONMENT | place,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def by_hand(*commands: list[str]) -> tuple[list[int], list[str]]:
    """Exit codes and errors of `started_by_hand` processes."""
    processes = started_by_hand(*commands)
    shown = [process.communicate(timeout=110)[1] for process in processes]
    return [process.returncode for process in processes], shown
