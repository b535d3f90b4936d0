"""Bytes to lines: any cut into pieces gives the same, packed or not, and what is damaged is said."""

from __future__ import annotations

import gzip
import io
import random
import tracemalloc

import pytest
import zstandard

from fusiontree.data.records import TOO_LONG, BadRecord
from fusiontree.data.text_stream import decompressed, split_lines
from fusiontree.errors import InputError

TEXT = "".join(f"line {number} {'学而时习之 ' * (number % 7)}\n" for number in range(3000)).encode()
PACK = {"gzip": gzip.compress, "zstd": zstandard.ZstdCompressor().compress}


def pieces(content: bytes, size: int):
    return (content[start : start + size] for start in range(0, len(content), size))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    "content", [b"", b"a", b"\n", b"a\n", b"a\nb", b"\n\na\n\n", b"ab\r\nc\n\nlong line here\nend"]
)
def test_lines_are_those_of_an_ordinary_file(content, size):
    expected = [line.removesuffix(b"\n") for line in io.BytesIO(content)]
    assert list(split_lines(pieces(content, size))) == expected


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_a_line_that_is_too_long_is_one_bad_record(size):
    found = list(split_lines(pieces(b"ok\n123456\n12345\n1234567890\nend\n123456", size), limit=5))
    long = [BadRecord(TOO_LONG, f"a record of {length} bytes, where 5 are the most") for length in (6, 10, 6)]
    assert found == [b"ok", long[0], b"12345", long[1], b"end", long[2]]


def test_a_line_that_is_too_long_is_not_held():
    chunks = (bytes(1 << 16) for _ in range(1000))
    tracemalloc.start()
    (found,) = split_lines(chunks, limit=1 << 18)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(found, BadRecord) and str(1000 << 16) in found.detail
    assert most < 1 << 20


@pytest.mark.parametrize("compression", PACK)
@pytest.mark.parametrize("size", [1, 2, 5, 1000, 10**6])
def test_packed_content_in_any_pieces(compression, size):
    pack = PACK[compression]
    for content in (pack(TEXT), pack(TEXT[:5000]) + pack(b"") + pack(TEXT[5000:])):
        assert b"".join(decompressed("f", pieces(content, size), compression)) == TEXT
        assert b"".join(decompressed("f", pieces(content, size), None)) == TEXT
    assert b"".join(decompressed("f", pieces(pack(b""), size), compression)) == b""
    assert b"".join(decompressed("f", pieces(TEXT, size), None)) == TEXT


def test_a_gzip_file_filled_up_with_zeros():
    content = gzip.compress(TEXT) + bytes(10_000)
    assert b"".join(decompressed("f", pieces(content, 999), "gzip")) == TEXT


def test_a_zstd_file_with_frames_to_leave_out_and_a_long_window():
    skippable = b"\x50\x2a\x4d\x18\x05\x00\x00\x00hello"
    long = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    ).compressobj()
    content = long.compress(TEXT) + long.flush() + skippable + PACK["zstd"](TEXT)
    assert b"".join(decompressed("f", pieces(content, 999), "zstd")) == TEXT * 2


@pytest.mark.parametrize("compression", PACK)
def test_packed_content_that_is_cut_off_anywhere(compression):
    content = PACK[compression](TEXT)
    generator = random.Random(0)
    for cut in [8, 9, len(content) - 1, *(generator.randrange(8, len(content)) for _ in range(50))]:
        with pytest.raises(InputError, match=f"^f is cut off: it ends amid its {compression} data; fetch"):
            list(decompressed("f", pieces(content[:cut], 4000), compression))


@pytest.mark.parametrize("compression", PACK)
def test_packed_content_that_is_damaged(compression):
    content = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(TEXT))
    if compression == "gzip":
        content = bytearray(gzip.compress(TEXT))
    for position in (len(content) // 2, len(content) - (5 if compression == "gzip" else 1)):
        damaged = content.copy()
        damaged[position] ^= 0xFF
        with pytest.raises(InputError, match="^f is (damaged|cut off)"):
            list(decompressed("f", pieces(bytes(damaged), 4000), compression))
    with pytest.raises(InputError, match="^f is damaged"):
        list(decompressed("f", iter([bytes(content) + b"and more"]), compression))


@pytest.mark.parametrize(
    ("content", "compression", "problem"),
    [
        (b"", "gzip", "not gzip-compressed: it is empty"),
        (b"<!DOCTYPE html>", "zstd", "not zstd-compressed: it begins with b'<!DO'"),
        (b"PK\x03\x04....", None, "a zip archive"),
        (b"PAR1....", None, "a parquet file, though its name does not say so"),
        ("text".encode("utf-16"), None, "UTF-16"),
    ],
)
def test_what_is_not_what_its_name_says(content, compression, problem):
    for size in (1, 100):
        with pytest.raises(InputError, match=f"^f is {problem}"):
            decompressed("f", pieces(content, size), compression)


@pytest.mark.parametrize("compression", PACK)
def test_content_that_unpacks_to_a_thousand_times_its_size_is_not_held(compression):
    content = PACK[compression](bytes(200 << 20))
    tracemalloc.start()
    most = max(len(piece) for piece in decompressed("f", iter([content]), compression))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 140 << 20 and peak < 300 << 20
