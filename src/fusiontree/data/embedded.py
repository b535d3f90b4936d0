"""A corpus that is always there: the source of the running Python's standard library and its language reference.

Real code and real English, some 10 MB, under the Python Software Foundation's licence. It differs between versions of
Python, and is the same on every machine with the same one.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fusiontree.atomic import atomic_write
from fusiontree.errors import InputError

# Tests and installed packages are not the library; encodings are tables of characters, pydoc_data the topics once more.
_LEFT_OUT = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "idle_test",
    "lib-dynload",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}
_MIN_EVAL_DOCUMENTS = 8


class _Document(NamedTuple):
    source: str
    text: str

    @property
    def size(self) -> int:
        return len(self.text.encode())


def write_embedded_corpus(
    directory: str | os.PathLike[str], max_bytes: int | None = None, eval_share: float = 0.05
) -> tuple[Path, Path]:
    """Write `train.jsonl` and `eval.jsonl` (keys `text` and `source`) into `directory`.

    Documents are whole modules and whole reference topics, each in one of the two files, chosen by a hash of the name
    and so spread evenly over the library.

    Args:
        max_bytes: most bytes of text (UTF-8) in both files together; None = all there is.
        eval_share: share of the text for `eval.jsonl`, in (0, 1); no document of more than an eighth of it goes there,
            so that no single module makes up the evaluation.

    Returns:
        The two paths.

    Raises:
        InputError: impossible arguments, or an installation of Python that comes without its sources.
    """
    if not 0 < eval_share < 1:
        raise InputError(f"eval_share must lie between 0 and 1, got {eval_share}")
    documents = sorted(_documents(), key=lambda document: hashlib.sha256(document.source.encode()).digest())
    chosen, used = [], 0
    for document in documents:
        if max_bytes is None or used + document.size <= max_bytes:
            chosen.append(document)
            used += document.size
    held_out: set[str] = set()
    room = eval_share * used
    largest = room / _MIN_EVAL_DOCUMENTS
    for document in chosen:
        if document.size <= min(room, largest):
            held_out.add(document.source)
            room -= document.size
    if not held_out or len(held_out) == len(chosen):
        raise InputError(
            f"the standard library gives {len(chosen)} texts within {max_bytes} bytes, too few to hold "
            f"{eval_share:.0%} out; allow more bytes, or use a Python that comes with its sources"
        )
    train, evaluation = Path(directory) / "train.jsonl", Path(directory) / "eval.jsonl"
    _write(train, [document for document in chosen if document.source not in held_out])
    _write(evaluation, [document for document in chosen if document.source in held_out])
    return train, evaluation


def _documents() -> Iterator[_Document]:
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield _Document(f"reference/{name}", text)
    root = sysconfig.get_paths()["stdlib"]
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        for name in names:
            if name.endswith(".py"):
                path = Path(folder, name)
                text = _source_text(path)
                if text.strip():
                    yield _Document(path.relative_to(root).as_posix(), text)


def _source_text(path: Path) -> str:
    """A module's text in the encoding that it declares; empty where it cannot be read as text."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ""


def _write(path: Path, documents: list[_Document]) -> None:
    lines = [json.dumps(document._asdict(), ensure_ascii=False) + "\n" for document in documents]
    atomic_write(path, "".join(lines))
