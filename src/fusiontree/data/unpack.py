"""Compressed and columnar files, unpacked once into the cache as lines that can be read one by one.

`.gz` and `.zst` become what they hold, `.parquet` and saved Arrow folders one JSON object a row. An unpacked file
belongs to a path, its size and its modification time; when they differ it is made anew. A file that ends too early
gives the lines before its end, a damaged one those of the gzip members or zstd frames before the damage, and then one
line that says so, which `records` counts as a fault of its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import BinaryIO

from fusiontree.data.line_index import cache_folder
from fusiontree.data.records import (
    DAMAGED_FILE,
    BadRecord,
    Content,
    Conversation,
    decode_row,
    fault_line,
)
from fusiontree.data.shards import LocalFile, ParquetShard
from fusiontree.data.text_stream import COMPRESSIONS, Damaged, compression_of, decompressed
from fusiontree.errors import InputError, first_line

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 20
_ARROW_FOLDER_FILES = ("state.json", "dataset_info.json")


def is_arrow_folder(path: str) -> bool:
    """Whether `datasets` saved a data set into this folder (`Dataset.save_to_disk`)."""
    return all(os.path.isfile(os.path.join(path, name)) for name in _ARROW_FOLDER_FILES)


def unpacked(path: str, text_key: str, cache_dir: str | None = None) -> str:
    """The file to read lines from: `path` itself, or the cache's unpacked copy of it, made if need be.

    Several processes may ask for one file at once: the first copy that is whole stays.

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
    column = "" if lines is _packed_lines else text_key
    place = hashlib.sha256(os.fsencode(os.path.realpath(path)) + b"\0" + column.encode()).hexdigest()[:24]
    content = hashlib.sha256(repr(stamp).encode()).hexdigest()[:16]
    # The ending says how the lines are to be read; that of a packed file is the second last.
    target = folder / f"{place}-{content}{'.txt' if is_text(path) else '.jsonl'}"
    if target.exists():
        return str(target)
    logger.info("unpacking %s, once", path)
    temporary = folder / f"{target.name}.{secrets.token_hex(4)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(temporary, "x+b") as output:
            lines(path, text_key, output)
        if _stamp(path) != stamp:
            raise InputError(f"{path} changed while it was being unpacked; wait until it is complete")
        # Not replaced: another process may have read and indexed its copy already.
        with suppress(FileExistsError):
            os.link(temporary, target)
        for old in folder.glob(f"{place}-*"):
            if old != target and not old.name.endswith(".tmp"):
                old.unlink(missing_ok=True)
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


#: (path, text_key, output): writes the lines of a file.
_Reader = Callable[[str, str, BinaryIO], None]


def _reader(path: str) -> _Reader | None:
    if os.path.isdir(path):
        return _arrow_rows
    with suppress(OSError), open(path, "rb") as file:
        head = file.read(8)
        if compression_of(head) or path.endswith(tuple(COMPRESSIONS)):
            return _packed_lines
        if head.startswith(b"PAR1") or path.endswith(".parquet"):
            return _parquet_rows
    return None


def _stamp(path: str) -> list[tuple[str, int, int]]:
    if not os.path.isdir(path):
        status = os.stat(path)
        return [("", status.st_size, status.st_mtime_ns)]
    with os.scandir(path) as entries:
        return sorted((e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in entries if e.is_file())


def _packed_lines(path: str, _: str, output: BinaryIO) -> None:
    """The text; where it is damaged, the whole lines that surely are right and then one that names the damage."""
    compression = COMPRESSIONS.get(os.path.splitext(path)[1].lower())
    try:
        with open(path, "rb") as file:
            for chunk in decompressed(path, iter(partial(file.read, _BLOCK_BYTES), b""), compression):
                output.write(chunk)
    except InputError as error:
        output.flush()
        good = error.good if isinstance(error, Damaged) else 0
        if good:
            with mmap(output.fileno(), 0, access=ACCESS_READ) as text:
                good = text.rfind(b"\n", 0, good) + 1
        output.truncate(good)
        output.seek(good)
        output.write(fault_line(BadRecord(DAMAGED_FILE, str(error))))


def _parquet_rows(path: str, text_key: str, output: BinaryIO) -> None:
    shard = ParquetShard(LocalFile(path), text_key=text_key)
    try:
        for value in shard.open():
            output.write(_as_line(shard.decode(value), text_key))
    except InputError as error:
        output.write(fault_line(BadRecord(DAMAGED_FILE, str(error))))


def _arrow_rows(path: str, text_key: str, output: BinaryIO) -> None:
    from datasets import load_from_disk

    try:
        rows = load_from_disk(path)
    except Exception as error:  # whatever a broken folder makes pyarrow or datasets raise
        raise InputError(f"the data set in {path} cannot be read: {first_line(error)}") from error
    if text_key in rows.column_names:
        rows = rows.select_columns([text_key])
    for row in rows:
        output.write(_as_line(decode_row(row, text_key), text_key))


def _as_line(content: Content, text_key: str) -> bytes:
    if isinstance(content, BadRecord):
        return fault_line(content)
    value = content.messages if isinstance(content, Conversation) else content
    return json.dumps({text_key: value}).encode() + b"\n"
