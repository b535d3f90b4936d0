"""Packed, columnar and plain text files hold the same records as JSONL, and say where they are damaged."""

from __future__ import annotations

import gzip
import json
import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonl_files import text_of, write_jsonl

import fusiontree.data.unpack as unpack
from fusiontree.config import InputError
from fusiontree.data.corpus import Corpus, resolve_paths
from fusiontree.data.records import BadRecord

TEXTS = [text_of(number) for number in range(30)]


def jsonl_bytes(texts=TEXTS) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def write_gzip(path):
    path.write_bytes(gzip.compress(jsonl_bytes()))


def write_zstd(path):
    half = len(jsonl_bytes()) // 2  # two frames, the cut in a line
    content = jsonl_bytes()
    path.write_bytes(b"".join(zstandard.compress(part) for part in (content[:half], content[half:])))


def write_parquet(path):
    pq.write_table(pa.table({"text": TEXTS, "other": list(range(30))}), path, row_group_size=7)


def write_arrow(path):
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(path))


def write_txt(path):
    path.write_text("".join(f"{text}\n" for text in TEXTS))


WRITERS = {
    "a.jsonl.gz": write_gzip,
    "a.jsonl.zst": write_zstd,
    "a.parquet": write_parquet,
    "arrow": write_arrow,
    "a.txt": write_txt,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_records_of_jsonl(tmp_path, name):
    WRITERS[name](tmp_path / name)
    (path,) = resolve_paths([f"{tmp_path}/{name}"], where="x")
    corpus = Corpus([path], txt_documents="line")
    assert [content for _, content in corpus.records()] == TEXTS
    assert [corpus.read(number) for number in (29, 3, 17)] == [TEXTS[number] for number in (29, 3, 17)]
    assert corpus.source(4) == f"{path}:5"
    if name != "a.txt":
        assert corpus.fingerprint() == Corpus([write_jsonl(tmp_path / "b.jsonl", lines())]).fingerprint() or name in (
            "a.parquet",
            "arrow",
        )


def lines():
    return [{"text": text} for text in TEXTS]


def test_a_txt_file_is_one_document_unless_lines_are_asked_for(tmp_path):
    (tmp_path / "book.txt").write_bytes(b"\xef\xbb\xbfOne line.\r\n\r\nAnother.\n")
    (tmp_path / "book.txt.gz").write_bytes(gzip.compress(b"One line.\n\nAnother.\n"))
    (tmp_path / "empty.txt").write_bytes(b" \n")
    (tmp_path / "latin.txt").write_bytes("déjà".encode("latin-1"))
    paths = resolve_paths([f"{tmp_path}/*"], where="x")
    whole = [content for _, content in Corpus(paths).records()]
    assert whole[:2] == ["One line.\r\n\r\nAnother.", "One line.\n\nAnother."]
    assert [content.kind for content in whole[2:]] == ["blank line", "not UTF-8"]
    assert [c for _, c in Corpus(paths[:1], txt_documents="line").records() if isinstance(c, str)] == [
        "One line.",
        "Another.",
    ]


def test_a_saved_data_set_in_a_glob_is_one_source(tmp_path):
    write_arrow(tmp_path / "saved")
    write_jsonl(tmp_path / "more.jsonl", [{"text": "x"}])
    assert resolve_paths([f"{tmp_path}/**"], where="x") == [f"{tmp_path}/more.jsonl", f"{tmp_path}/saved"]
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS})}).save_to_disk(str(tmp_path / "splits"))
    assert len(Corpus(resolve_paths([f"{tmp_path}/splits/train"], where="x"))) == 30
    with pytest.raises(InputError, match="splits is a folder; name the files in it"):
        resolve_paths([f"{tmp_path}/splits"], where="x")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("kept", [0.3, 0.7, 0.95])
def test_a_file_that_ends_too_early_gives_what_it_holds_and_one_fault(tmp_path, name, kept):
    path = tmp_path / name
    texts = [f"{number} " + os.urandom(400).hex() for number in range(400)]
    content = jsonl_bytes(texts)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(content))
    elif name.endswith(".zst"):
        path.write_bytes(zstandard.compress(content))
    else:
        pq.write_table(pa.table({"text": texts}), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    contents = [content for _, content in Corpus([str(path)]).records()]
    assert contents[:-1] == texts[: len(contents) - 1]
    assert isinstance(contents[-1], BadRecord) and contents[-1].kind == "damaged file"
    if name != "a.parquet":
        assert len(contents) > 400 * kept - 150


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.ZstdCompressor(write_checksum=True).compress])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_of_a_damaged_file_no_record_is_read_that_was_not_written(tmp_path_factory, pack, data):
    """Members in front of the damaged one are right; within it nothing is known."""
    path = tmp_path_factory.mktemp("damaged") / ("a.jsonl.gz" if pack is gzip.compress else "a.jsonl.zst")
    texts = [f"document {number} " + "of words and words " * (number % 7) for number in range(60)]
    members = [pack(jsonl_bytes(texts[start : start + 20])) for start in (0, 20, 40)]
    content = bytearray(b"".join(members))
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    try:
        corpus = Corpus([str(path)])
    except InputError as error:
        assert bit < 8 * 8 and "a.jsonl" in str(error)  # no packed file any more, by its first bytes
        return
    contents = [content for _, content in corpus.records()]
    good = [content for content in contents if not isinstance(content, BadRecord)]
    assert good == texts[: len(good)]
    if contents != texts:  # a bit of a header, such as that of the time, may change nothing
        assert isinstance(contents[-1], BadRecord) and len(contents) == len(good) + 1
        assert corpus.damage() == [(corpus.source(len(good)), contents[-1])]
        assert len(good) >= (bit // 8 >= len(members[0])) * 20


def test_columns_of_a_parquet_file_that_hold_no_text_are_named(tmp_path):
    pq.write_table(pa.table({"text": ["a", None, ""], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    kinds = [getattr(content, "kind", content) for _, content in Corpus([f"{tmp_path}/a.parquet"]).records()]
    assert kinds == ["a", "not a string", "empty text"]
    missing = [content for _, content in Corpus([f"{tmp_path}/a.parquet"], text_key="body").records()]
    assert {content.kind for content in missing} == {"missing key"}
    numbers = [content for _, content in Corpus([f"{tmp_path}/a.parquet"], text_key="n").records()]
    assert {content.kind for content in numbers} == {"not a string"}


def test_a_packed_file_is_unpacked_once_and_again_when_it_changes(tmp_path):
    path, cache = tmp_path / "a.jsonl.gz", tmp_path / "cache"
    write_gzip(path)
    corpus = Corpus([str(path)], cache_dir=str(cache))
    unpacked = corpus.files[0].path
    made = os.stat(unpacked).st_ino
    assert os.stat(Corpus([str(path)], cache_dir=str(cache)).files[0].path).st_ino == made
    path.write_bytes(gzip.compress(jsonl_bytes(["new"])))
    again = Corpus([str(path)], cache_dir=str(cache))
    assert [content for _, content in again.records()] == ["new"]
    assert not os.path.exists(unpacked)
    assert not [name for name in os.listdir(cache) if name.endswith(".tmp")]
    blocked = write_jsonl(tmp_path / "file", ["x"])
    with pytest.raises(InputError, match=r"a.jsonl.gz cannot be unpacked into .*; set data.cache_dir"):
        Corpus([str(path)], cache_dir=blocked)


def test_a_record_too_long_to_hold_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("fusiontree.data.corpus.MAX_RECORD_BYTES", 100)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "short"}, {"text": "long" * 100}])
    first, second = (content for _, content in Corpus([path]).records())
    assert first == "short" and second.kind == "too long"


def test_processes_that_unpack_one_file_at_once_share_the_first_copy(tmp_path):
    path, cache = tmp_path / "a.jsonl.gz", tmp_path / "cache"
    write_gzip(path)
    first = Corpus([str(path)], cache_dir=str(cache))
    # The slower one has begun before the faster was done.
    real = unpack.os.path.exists
    copy = first.files[0].path
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unpack.Path, "exists", lambda self: False)
        second = Corpus([str(path)], cache_dir=str(cache))
    assert second.files[0].path == copy and real(copy)
    assert [content for _, content in first.records()] == TEXTS


def test_one_file_is_read_under_two_keys(tmp_path):
    pq.write_table(pa.table({"q": ["one", "two"], "a": ["three", "four"]}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"q": "one", "a": "three"}\n'))
    for name in ("a.parquet", "a.jsonl.gz"):
        both = [Corpus([str(tmp_path / name)], text_key=key) for key in ("q", "a")]
        assert [corpus.read(0) for corpus in both] == ["one", "three"]


def test_values_that_are_no_text_are_no_text_in_any_format(tmp_path):
    column = pa.array([b"h\xc3\xa9llo"], pa.binary())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    datasets.Dataset(pa.table({"text": column})).save_to_disk(str(tmp_path / "arrow"))
    for name in ("a.parquet", "arrow"):
        assert Corpus([str(tmp_path / name)]).read(0).kind == "not a string"
    broken = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\3\0\0\0\5\0\0\0"), pa.py_buffer(b"ok\xffok")]
    )
    pq.write_table(pa.table({"text": broken}), tmp_path / "b.parquet")
    contents = [getattr(content, "kind", content) for _, content in Corpus([str(tmp_path / "b.parquet")]).records()]
    assert contents == ["ok", "not UTF-8", "ok"]


def test_a_whole_text_that_is_cut_off_is_a_fault_and_no_text(tmp_path):
    packed = gzip.compress("".join(f"line {number} {os.urandom(99).hex()}\n" for number in range(9000)).encode())
    (tmp_path / "b.txt.gz").write_bytes(packed[: len(packed) // 2])
    (content,) = (content for _, content in Corpus([f"{tmp_path}/b.txt.gz"]).records())
    assert content.kind == "damaged file" and "cut off" in content.detail
    lines = [content for _, content in Corpus([f"{tmp_path}/b.txt.gz"], txt_documents="line").records()]
    assert len(lines) > 1000 and lines[-1].kind == "damaged file"


def test_a_zstd_file_may_begin_with_a_frame_to_skip(tmp_path):
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"size"
    (tmp_path / "a.jsonl.zst").write_bytes(skippable + zstandard.compress(jsonl_bytes()))
    assert [content for _, content in Corpus([f"{tmp_path}/a.jsonl.zst"]).records()] == TEXTS


def test_a_packed_line_too_long_to_hold_is_a_fault(tmp_path, monkeypatch):
    monkeypatch.setattr("fusiontree.data.corpus.MAX_RECORD_BYTES", 1 << 20)
    content = b'{"text": "' + b"x" * (5 << 20) + b'"}\n{"text": "after"}\n'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    first, second = (content for _, content in Corpus([f"{tmp_path}/a.jsonl.gz"]).records())
    assert first.kind == "too long" and second == "after"
