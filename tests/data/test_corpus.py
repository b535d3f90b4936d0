from __future__ import annotations

import os
import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonl_files import write_jsonl

from fusiontree.config import InputError
from fusiontree.data.corpus import Corpus, resolve_paths
from fusiontree.data.line_index import index_lines


@given(content=st.lists(st.sampled_from([b"\n", b"a", b"\r\n", b"long line ", b"\x00\xff"]), max_size=60).map(b"".join))
@settings(max_examples=50)
def test_index_cuts_lines_as_python_does(content, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    path = folder / "f"
    path.write_bytes(content)
    index = index_lines(str(path), str(folder))
    offsets = index.offsets()
    lines = [content[offsets[i] : offsets[i + 1]] for i in range(index.lines)]
    assert lines == content.splitlines(keepends=True) if b"\r" not in content else b"".join(lines) == content
    assert index.lines == content.count(b"\n") + (content[-1:] not in (b"", b"\n"))


def test_lines_longer_than_a_read_block(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"x" * 9_000_000 + b"\ny\n" + b"z" * 5_000_000)
    assert index_lines(str(path), str(tmp_path)).offsets().tolist() == [0, 9_000_001, 9_000_003, 14_000_003]


def test_index_is_reused_until_the_file_changes(tmp_path):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"text": "one"}])
    cache = tmp_path / "cache"
    first = index_lines(str(path), str(cache))
    made = os.stat(first.index_path).st_ino
    assert index_lines(str(path), str(cache)) == first
    assert os.stat(first.index_path).st_ino == made

    write_jsonl(path, [{"text": "two"}])  # the same size
    os.utime(path, ns=(0, first.mtime_ns + 1))
    changed = index_lines(str(path), str(cache))
    assert changed.sha256 != first.sha256
    write_jsonl(path, [{"text": "one"}, {"text": "two"}])
    assert index_lines(str(path), str(cache)).lines == 2
    assert [name for name in os.listdir(cache) if name.endswith(".tmp")] == []


@pytest.mark.parametrize("damage", [b"", b"short", b"x" * 200])
def test_a_damaged_index_is_built_anew(tmp_path, damage):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    index = index_lines(path, str(tmp_path))
    with open(index.index_path, "wb") as file:
        file.write(damage)
    assert index_lines(path, str(tmp_path)) == index
    assert index.offsets().tolist()[-1] == os.path.getsize(path)


def test_an_unwritable_cache_dir_is_an_error_that_names_it(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}])
    blocked = write_jsonl(tmp_path / "blocked", ["a file"])
    with pytest.raises(InputError, match="cannot be written to .*blocked.*; set data.cache_dir"):
        index_lines(path, blocked)


def test_without_a_writable_home_the_index_goes_to_a_temporary_folder(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("FUSIONTREE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", write_jsonl(tmp_path / "no_folder", ["a file"]))
    index = index_lines(write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}]))
    assert index.offsets()[1] > 0
    assert "line indexes go to" in caplog.text


def test_records_are_read_from_anywhere(tmp_path):
    first = write_jsonl(tmp_path / "a.jsonl", [{"text": "0"}, "", {"text": "2"}])
    empty = write_jsonl(tmp_path / "b.jsonl", [])
    last = write_jsonl(tmp_path / "c.jsonl", [{"text": "学而时习之"}])
    corpus = Corpus([first, empty, last])
    assert len(corpus) == 4
    assert corpus.read(3) == "学而时习之"
    assert corpus.read(2) == "2"
    assert corpus.read(1).kind == "blank line"
    assert corpus.source(3) == f"{last}:1"
    assert corpus.source(2) == f"{first}:3"
    with pytest.raises(IndexError):
        corpus.read(4)


def test_more_files_than_may_be_open_at_once(tmp_path):
    paths = [write_jsonl(tmp_path / f"{i:03}.jsonl", [{"text": f"text {i}"}]) for i in range(150)]
    corpus = Corpus(paths)
    before = len(os.listdir("/proc/self/fd"))
    for record in np.random.default_rng(0).permutation(150):
        assert corpus.read(record) == f"text {record}"
    assert len(os.listdir("/proc/self/fd")) - before <= 2 * 64
    del corpus
    assert len(os.listdir("/proc/self/fd")) <= before


def test_another_process_opens_the_files_itself(tmp_path):
    corpus = Corpus([write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}])])
    corpus.read(0)
    assert len(pickle.dumps(corpus)) < 2000
    assert pickle.loads(pickle.dumps(corpus)).read(0) == "one"


def test_memory_stays_flat_as_a_file_grows(tmp_path):
    def peak(lines: int) -> int:
        path = tmp_path / f"{lines}.jsonl"
        path.write_bytes(b'{"text": "some words in a line"}\n' * lines)
        tracemalloc.start()
        corpus = Corpus([str(path)])
        assert corpus.read(lines - 1) == "some words in a line"
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    small, large = peak(150_000), peak(1_500_000)  # 5 and 50 MB
    assert large < 1.2 * small


def test_a_file_that_changes_after_indexing_is_noticed(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    corpus = Corpus([path])
    corpus.read(0)
    with open(path, "ab") as file:
        file.write(b'{"text": "three"}\n')
    with pytest.raises(InputError, match="a.jsonl has changed since"):
        corpus.read(1)
    os.remove(path)
    with pytest.raises(InputError, match="a.jsonl"):
        Corpus([path])


def test_paths_and_globs(tmp_path, monkeypatch):
    for name in ("b", "a", "sub/c", "[odd]"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / f"{name}.jsonl", [])
    os.symlink(tmp_path / "a.jsonl", tmp_path / "z.jsonl")
    monkeypatch.chdir(tmp_path)
    assert resolve_paths(["b.jsonl", "*.jsonl"], where="x") == ["b.jsonl", "[odd].jsonl", "a.jsonl"]
    assert resolve_paths(["**/*.jsonl"], where="x")[-1] == "sub/c.jsonl"
    assert resolve_paths(["[odd].jsonl"], where="x") == ["[odd].jsonl"]


def test_links_that_lead_back_make_no_glob_endless(tmp_path, monkeypatch):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    for name in ("x", "deep/er/y", ".hidden/z"):
        write_jsonl(tmp_path / f"{name}.jsonl", [])
    for name in ("a", "b", "deep/c"):
        os.symlink(tmp_path, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    expected = [f"{tmp_path}/deep/er/y.jsonl", f"{tmp_path}/x.jsonl"]
    assert resolve_paths([f"{tmp_path}/**/*.jsonl"], where="x") == expected
    assert resolve_paths([f"{tmp_path}/**/e*/**/*.jsonl"], where="x") == expected[:1]
    assert resolve_paths(["**/*.jsonl"], where="x") == ["deep/er/y.jsonl", "x.jsonl"]
    assert resolve_paths(["d*/**/*.jsonl"], where="x") == ["deep/c/x.jsonl", "deep/er/y.jsonl"]
    assert len(resolve_paths(["**"], where="x")) == 2


def test_paths_that_cannot_be(tmp_path):
    os.symlink("loop", tmp_path / "loop")
    os.symlink("nowhere", tmp_path / "dangling.jsonl")
    os.mkfifo(tmp_path / "pipe")
    for patterns, problem in [
        ([], "x is empty: name at least one file"),
        ([""], "x holds an empty name"),
        ([f"{tmp_path}/none.jsonl"], r"x: .*/none.jsonl does not exist"),
        ([f"{tmp_path}/none*.json"], r"x: no file matches .*/none\*.json"),
        ([str(tmp_path)], r"is a folder; name the files in it, such as .*/\*.jsonl"),
        ([f"{tmp_path}/loop"], "cannot be read"),
        ([f"{tmp_path}/*.jsonl"], "dangling.jsonl does not exist"),
        ([f"{tmp_path}/pipe"], "is a pipe or a device, where a file is needed"),
    ]:
        with pytest.raises(InputError, match=problem):
            resolve_paths(patterns, where="x")


def test_files_that_are_no_jsonl_are_recognised(tmp_path):
    text = '{"text": "a"}\n' * 10
    for content, problem in [
        (text.encode("utf-16"), "UTF-16 text: convert it to UTF-8"),
        (b"ARROW1" + bytes(10), "a bare Arrow file"),
    ]:
        path = tmp_path / "f.jsonl"
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"f.jsonl is .*{problem}"):
            Corpus([str(path)])


def test_a_corpus_without_any_text_says_why(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["", {"body": "x"}, {"body": "y"}, "{"])
    with pytest.raises(InputError) as caught:
        Corpus([path]).require_text(where="data.train_paths")
    assert str(caught.value) == (
        f"data.train_paths: none of the 3 records of {path} can be used: 2 missing key, 1 broken JSON "
        f"(first {path}:2: missing key, no key 'text', keys seen: 'body')"
    )
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"text": "déjà vu"}\n'.encode("latin-1"))
    with pytest.raises(InputError, match="1 not UTF-8 .*latin.jsonl:1: not UTF-8, byte 0xe9 at column 12.*iconv"):
        Corpus([str(latin)]).require_text(where="x")
    with pytest.raises(InputError, match="holds no record at all"):
        Corpus([write_jsonl(tmp_path / "empty.jsonl", ["", " "])]).require_text(where="x")


def test_the_fingerprint_follows_the_content_alone(tmp_path):
    def fingerprint(name: str, lines: list, **options: str) -> str:
        return Corpus([write_jsonl(tmp_path / name, lines)], **options).fingerprint()

    one = fingerprint("a", [{"text": "one"}])
    assert one == fingerprint("b", [{"text": "one"}])
    assert one != fingerprint("b", [{"text": "two"}])
    assert one != fingerprint("b", [{"text": "one"}], text_key="body")
