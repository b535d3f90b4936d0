"""Where each line of a file begins, computed once, kept in a cache folder and memory-mapped from there.

Building reads the file in blocks and writes the offsets as it goes, so memory stays flat however long the file is.
An index belongs to a path and is built anew when the file's size or modification time differs.

File format, little-endian: a header of 64 bytes (magic, then size in bytes, modification time in ns, number of lines,
SHA-256 of the content), then lines + 1 offsets of 8 bytes: each line's first byte, and the file's size.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import logging
import os
import secrets
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fusiontree.cache import user_cache_folder
from fusiontree.errors import InputError

logger = logging.getLogger(__name__)

_MAGIC = b"FTLINES1"
_HEADER = struct.Struct("<8sQqQ32s")
_BLOCK_BYTES = 1 << 22
_NEWLINE = ord("\n")


@dataclass(frozen=True)
class LineIndex:
    """The lines of one file as they were when it was indexed.

    Attributes:
        path: the file that is read; `index_path`: its offsets; `name`: the file that it was made from, for messages.
        size: bytes; mtime_ns: modification time; lines: number of lines, a last one without newline included.
        sha256: of the content, 32 bytes.
    """

    path: str
    index_path: str
    name: str
    size: int
    mtime_ns: int
    lines: int
    sha256: bytes

    def offsets(self) -> np.ndarray:
        """uint64 [lines + 1], memory-mapped: line i is bytes offsets[i] to offsets[i + 1], its newline included."""
        return np.memmap(self.index_path, dtype="<u8", mode="r", offset=_HEADER.size, shape=(self.lines + 1,))


def index_lines(path: str, cache_dir: str | None = None, *, name: str | None = None, whole: bool = False) -> LineIndex:
    """The index of `path`, from the cache when the file has not changed since.

    Args:
        name: what to call the file, if not by its path.
        whole: take the file for one line.
        cache_dir: where indexes are kept; None = `$FUSIONTREE_CACHE`, else `fusiontree` in the user's cache folder,
            else (that is not writable) a folder that lasts as long as the process.

    Raises:
        InputError: the file cannot be read, changes while it is read, or the given `cache_dir` cannot be written.
    """
    place = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]
    index_path = os.path.join(cache_folder(cache_dir), place + (".whole" if whole else ".lines"))
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            found = _read_header(path, index_path)
            if not found or (found.size, found.mtime_ns) != (status.st_size, status.st_mtime_ns):
                found = _build(path, index_path, file, whole)
            return found if name is None else replace(found, name=name)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_header(path: str, index_path: str) -> LineIndex | None:
    try:
        with open(index_path, "rb") as file:
            header = file.read(_HEADER.size)
            length = os.fstat(file.fileno()).st_size
    except OSError:
        return None
    if len(header) < _HEADER.size:
        return None
    magic, size, mtime_ns, lines, sha256 = _HEADER.unpack(header)
    if magic != _MAGIC or length != _HEADER.size + 8 * (lines + 1):
        return None
    return LineIndex(path, index_path, path, size, mtime_ns, lines, sha256)


def _build(path: str, index_path: str, file: BinaryIO, whole: bool) -> LineIndex:
    before = os.fstat(file.fileno())
    if before.st_size > 1 << 30:
        logger.info("indexing %s (%.1f GB), once", path, before.st_size / 1e9)
    digest = hashlib.sha256()
    lines = -1  # the first offset, 0, ends no line
    # A name of this process alone: several ranks may index the same file at once, and the last one stays.
    temporary = Path(f"{index_path}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as output:
            output.write(bytes(_HEADER.size))
            for offsets in _offsets(path, file, digest, whole):
                output.write(offsets.astype("<u8").tobytes())
                lines += len(offsets)
            after = os.fstat(file.fileno())
            if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                raise InputError(f"{path} changed while it was being indexed; wait until it is complete")
            output.seek(0)
            output.write(_HEADER.pack(_MAGIC, before.st_size, before.st_mtime_ns, lines, digest.digest()))
        os.replace(temporary, index_path)
    except OSError as error:
        raise InputError(
            f"the line index of {path} cannot be written to {temporary.parent}: {error.strerror or error}; "
            "set data.cache_dir to another folder"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return LineIndex(path, index_path, path, before.st_size, before.st_mtime_ns, lines, digest.digest())


def _offsets(path: str, file: BinaryIO, digest: hashlib._Hash, whole: bool) -> Iterator[np.ndarray]:
    """0, then where each line ends (or the whole), block by block; the content goes into `digest`."""
    yield np.zeros(1, dtype=np.int64)
    position = 0
    last: int | None = _NEWLINE
    while True:
        try:
            block = file.read(_BLOCK_BYTES)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
        if not block:
            break
        digest.update(block)
        if not whole:
            yield np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == _NEWLINE) + (position + 1)
        position += len(block)
        last = None if whole else block[-1]
    if last != _NEWLINE:  # the last line has no newline of its own
        yield np.array([position])


def cache_folder(cache_dir: str | None) -> str:
    """The folder that `index_lines` means by `cache_dir`."""
    return os.path.expanduser(cache_dir) if cache_dir is not None else _default_cache_dir()


def _default_cache_dir() -> str:
    folder = str(user_cache_folder())
    return folder if os.environ.get("FUSIONTREE_CACHE") else _this_or_a_temporary(folder)


@functools.cache
def _this_or_a_temporary(folder: str) -> str:
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        temporary = tempfile.mkdtemp(prefix="fusiontree-")
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        logger.warning("%s cannot be written (%s); line indexes go to %s", folder, error.strerror, temporary)
        return temporary
