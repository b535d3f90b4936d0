"""Files and texts for the tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path


def write_jsonl(path: Path, lines: list[object]) -> str:
    """One line each: str and bytes as they are, everything else as JSON."""
    encoded = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode("utf-8")
        for line in lines
    ]
    path.write_bytes(b"".join(line + b"\n" for line in encoded))
    return str(path)


def text_of(number: int) -> str:
    """A text that no other number has, of 1 to some 40 words."""
    return f"document {number} says " + " ".join(f"word{number * k % 101}" for k in range(number * 7 % 40))
