"""From a stream of bytes to lines: decompressed on the way, nothing held but the line at hand."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from itertools import chain
from typing import Protocol

import zstandard

from fusiontree.data.records import MAX_RECORD_BYTES, BadRecord, too_long
from fusiontree.errors import InputError

# What is handed to a decompressor at a time, which bounds what comes back: zstd packs up to 2**17 zeros into 4 bytes.
_PIECE_BYTES = 1 << 12
_MAX_ZSTD_WINDOW_BYTES = 1 << 31  # of `zstd --long=31`; taken only where a file asks for it
_HEAD_BYTES = 8

_MAGIC = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


# First bytes of files that are no JSONL, with what to do about them.
_FOREIGN = (
    (b"BZh", "bzip2-compressed: unpack it first (bunzip2 -k)"),
    (b"\xfd7zXZ", "xz-compressed: unpack it first (unxz -k)"),
    (b"PK\x03\x04", "a zip archive: unpack it first"),
    (b"PAR1", "a parquet file, though its name does not say so: rename it to .parquet"),
    (b"ARROW1", "a bare Arrow file: name the folder that Dataset.save_to_disk has written"),
    (b"\xff\xfe", "UTF-16 text: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)"),
    (b"\xfe\xff", "UTF-16 text: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)"),
)


class Damaged(InputError):
    """Packed content that cannot be what was packed.

    Attributes:
        good: bytes of text that are as they were packed: before a cut all, before damage those of the members or frames
            in front of it, because it is noticed anywhere behind where it begins.
    """

    def __init__(self, message: str, good: int) -> None:
        super().__init__(message)
        self.good = good


class _Decompressor(Protocol):
    """One gzip member or one zstd frame; a file may hold several."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


def compression_of(head: bytes) -> str | None:
    """ "gzip" or "zstd", by the first bytes of a file; a zstd file may begin with a frame to skip."""
    if head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5:
        return "zstd"
    return next((kind for kind, magic in _MAGIC.items() if head.startswith(magic)), None)


def check_is_text(name: str, head: bytes) -> None:
    """Refuse what is visibly no UTF-8 text by its first bytes, at least 8 of them where there are as many.

    Raises:
        InputError: it is compressed, an archive, parquet, Arrow or UTF-16; says what to do.
    """
    for magic, description in _FOREIGN:
        if head.startswith(magic):
            raise InputError(f"{name} is {description}")


def split_lines(chunks: Iterator[bytes], limit: int = MAX_RECORD_BYTES) -> Iterator[bytes | BadRecord]:
    """Lines without their newline; one of more than `limit` bytes is read over and gives its length instead.

    As in an index of lines, a newline at the very end begins no further line.
    """
    held: list[bytes] = []
    size = 0
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        size += len(first)
        if size <= limit:
            held.append(first)
        else:
            held.clear()
        if not others:
            continue
        yield b"".join(held) if size <= limit else too_long(size, limit)
        last = others.pop()
        for line in others:
            yield line if len(line) <= limit else too_long(len(line), limit)
        held, size = [last], len(last)
        if size > limit:
            held.clear()
    if size:
        yield b"".join(held) if size <= limit else too_long(size, limit)


def whole(chunks: Iterator[bytes], limit: int = MAX_RECORD_BYTES) -> Iterator[bytes | BadRecord]:
    """All of it as one record, if it holds anything; of more than `limit` bytes its length instead."""
    held: list[bytes] = []
    size = 0
    for chunk in chunks:
        size += len(chunk)
        held.append(chunk)
        if size > limit:
            held.clear()
    if size:
        yield b"".join(held) if size <= limit else too_long(size, limit)


def decompressed(name: str, chunks: Iterator[bytes], compression: str | None) -> Iterator[bytes]:
    """The text in `chunks`, in pieces of bounded size.

    What is compressed is known by its first bytes, because a server may send a plain name packed ("Content-Encoding").

    Args:
        name: of the file, for messages.
        compression: what its name promises: "gzip", "zstd" or None.

    Raises:
        InputError: the content is not what the name promises or visibly no text.
        Damaged: it is damaged or cut off.
    """
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= _HEAD_BYTES:
            break
    found = compression_of(head)
    everything = chain((head,), chunks)
    if found is not None:
        return _unpacked(name, everything, found)
    if compression is not None:
        problem = f"begins with {head[:4]!r}" if head else "is empty"
        raise InputError(f"{name} is not {compression}-compressed: it {problem}; fetch or pack it again")
    check_is_text(name, head)
    return everything


def _unpacked(name: str, chunks: Iterator[bytes], compression: str) -> Iterator[bytes]:
    decompressor: _Decompressor | None = None
    given = begin = 0  # bytes of text handed out, and before the member or frame at hand
    for chunk in chunks:
        for start in range(0, len(chunk), _PIECE_BYTES):
            piece = chunk[start : start + _PIECE_BYTES]
            while piece:
                if decompressor is None:
                    # Some programs fill a gzip file up with zeros.
                    piece = piece.lstrip(b"\0") if compression == "gzip" else piece
                    if not piece:
                        break
                    decompressor, begin = _new_decompressor(compression), given
                try:
                    text = decompressor.decompress(piece)
                except (zlib.error, zstandard.ZstdError) as error:
                    raise Damaged(f"{name} is damaged: {error}; fetch or pack it again", begin) from error
                if text:
                    given += len(text)
                    yield text
                piece = b""
                if decompressor.eof:
                    piece, decompressor = decompressor.unused_data, None
    if decompressor is not None:
        raise Damaged(f"{name} is cut off: it ends amid its {compression} data; fetch or pack it again", given)


def _new_decompressor(compression: str) -> _Decompressor:
    if compression == "gzip":
        return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    return zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW_BYTES).decompressobj()
