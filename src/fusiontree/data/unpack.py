"""Compressed and columnar files, unpacked once into the cache as lines that can be read one by one.

`.gz` and `.zst` become what they hold, `.parquet` and saved Arrow folders one JSON object a row. An unpacked file
belongs to a path, its size and its modification time; when they differ it is made anew. A file that ends too early
gives the lines before its end and then one line that says so, which `records` counts as a fault of its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from fusiontree.data.line_index import cache_folder
from fusiontree.data.records import DAMAGED_MARK
from fusiontree.data.text_stream import MAGIC, decompressed
from fusiontree.errors import InputError, first_line

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 20
_ROWS_AT_ONCE = 256
_ARROW_FOLDER_FILES = ("state.json", "dataset_info.json")


def is_arrow_folder(path: str) -> bool:
    """Whether `datasets` saved a data set into this folder (`Dataset.save_to_disk`)."""
    return all(os.path.isfile(os.path.join(path, name)) for name in _ARROW_FOLDER_FILES)


def unpacked(path: str, text_key: str, cache_dir: str | None = None) -> str:
    """The file to read lines from: `path` itself, or the cache's unpacked copy of it, made if need be.

    Args:
        text_key: the one column that is kept of parquet and Arrow files.
        cache_dir: see `index_lines`.

    Raises:
        InputError: the file cannot be read, is not what its name says, or the cache cannot be written.
    """
    lines = _reader(path)
    if lines is None:
        return path
    try:
        stamp = _stamp(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    folder = Path(cache_folder(cache_dir))
    place = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:24]
    content = hashlib.sha256(repr((stamp, text_key)).encode()).hexdigest()[:16]
    # The ending says how the lines are to be read; that of a packed file is the second last.
    target = folder / f"{place}-{content}{'.txt' if is_text(path) else '.jsonl'}"
    if target.exists():
        return str(target)
    logger.info("unpacking %s, once", path)
    temporary = folder / f"{target.name}.{secrets.token_hex(4)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as output:
            for block in lines(path, text_key):
                output.write(block)
        if _stamp(path) != stamp:
            raise InputError(f"{path} changed while it was being unpacked; wait until it is complete")
        for old in folder.glob(f"{place}-*"):
            if not old.name.endswith(".tmp"):
                old.unlink(missing_ok=True)
        os.replace(temporary, target)
    except OSError as error:
        raise InputError(
            f"{path} cannot be unpacked into {folder}: {error.strerror or error}; set data.cache_dir to another folder"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return str(target)


def is_text(path: str) -> bool:
    """Whether a file holds bare text instead of JSON lines, by its name without the ending of a packed file."""
    return path.removesuffix(".gz").removesuffix(".zst").endswith(".txt")


_Reader = Callable[[str, str], Iterator[bytes]]


def _reader(path: str) -> _Reader | None:
    if os.path.isdir(path):
        return _arrow_rows
    with suppress(OSError), open(path, "rb") as file:
        head = file.read(4)
        if head.startswith(tuple(MAGIC.values())):
            return _packed_lines
        if head == b"PAR1" or path.endswith(".parquet"):
            return _parquet_rows
    return None


def _stamp(path: str) -> list[tuple[str, int, int]]:
    if not os.path.isdir(path):
        status = os.stat(path)
        return [("", status.st_size, status.st_mtime_ns)]
    with os.scandir(path) as entries:
        return sorted((e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in entries if e.is_file())


def _packed_lines(path: str, _: str) -> Iterator[bytes]:
    """The text up to the last whole line before any damage, then a line that names the damage."""
    pending: list[bytes] = []
    try:
        with open(path, "rb") as file:
            for chunk in decompressed(path, iter(partial(file.read, _BLOCK_BYTES), b""), None):
                whole, newline, rest = chunk.rpartition(b"\n")
                if newline:
                    yield b"".join([*pending, whole, newline])
                    pending = []
                pending.append(rest)
    except InputError as error:
        yield DAMAGED_MARK + str(error).encode() + b"\n"
        return
    yield b"".join(pending)


def _parquet_rows(path: str, text_key: str) -> Iterator[bytes]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [text_key] if text_key in names else names[:1]
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns):
                yield from map(_as_line, batch.to_pylist())
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        yield DAMAGED_MARK + first_line(error).encode() + b"\n"


def _arrow_rows(path: str, text_key: str) -> Iterator[bytes]:
    from datasets import Dataset, load_from_disk

    try:
        rows = load_from_disk(path)
    except Exception as error:  # whatever a broken folder makes pyarrow or datasets raise
        raise InputError(f"the data set in {path} cannot be read: {first_line(error)}") from error
    if not isinstance(rows, Dataset):
        raise InputError(f"{path} holds several splits: name the folder of one, such as {os.path.join(path, 'train')}")
    if text_key in rows.column_names:
        rows = rows.select_columns([text_key])
    yield from map(_as_line, rows)


def _as_line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=True, default=str).encode() + b"\n"
