"""Streams: whatever the documents lie in, every one comes once an epoch, in one order, readable from anywhere."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import time
from itertools import islice

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
import zstandard
from http_files import Fault, file_server
from jsonl_files import text_of, write_jsonl
from pyarrow import parquet

from fusiontree.data import DataSettings, build_loader, records
from fusiontree.data.corpus import Corpus
from fusiontree.data.lazy import LazyDataset
from fusiontree.data.loader import Loader
from fusiontree.data.order import Place, PlainOrder
from fusiontree.data.ordered import OrderedSource
from fusiontree.data.records import BadRecord
from fusiontree.data.remote import Patience
from fusiontree.data.report import DataReport
from fusiontree.data.settings import STREAMING_PRESETS
from fusiontree.data.streaming import StreamEntry, StreamingDataset, StreamingSource, open_streams
from fusiontree.data.tokenizer import DocumentEncoder, separator_id_of
from fusiontree.errors import InputError

TEXTS = [text_of(number) for number in range(100)]
JSONL = "".join(json.dumps({"text": text, "n": number}) + "\n" for number, text in enumerate(TEXTS)).encode()
BEGIN = Place()
PLAIN = "".join(text + "\n" for text in TEXTS).encode()


def in_file_order(records: LazyDataset) -> OrderedSource:
    return OrderedSource(records, PlainOrder(len(records), None), num_workers=0, endless=False)


def zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


def parquet_bytes(texts: list[object], *, rows: int = 30, name: str = "text", kind=None) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"n": list(range(len(texts))), name: pa.array(texts, kind)})
    parquet.write_table(table, sink, row_group_size=rows)
    return sink.getvalue().to_pybytes()


FILES = {
    "a.jsonl": JSONL,
    "a.jsonl.gz": gzip.compress(JSONL),
    "a.jsonl.zst": zstd(JSONL),
    "a.json.gz": gzip.compress(JSONL[:5000]) + gzip.compress(JSONL[5000:]),
    "a.txt": PLAIN.replace(b"\n", b"\r\n"),
    "a.txt.gz": gzip.compress(PLAIN.removesuffix(b"\n")),
    "a.txt.zst": zstd(PLAIN),
    "a.parquet": parquet_bytes(TEXTS),
}


@pytest.fixture
def server():
    with file_server() as running:
        yield running


@pytest.fixture
def encoder(tokenizer) -> DocumentEncoder:
    return DocumentEncoder(tokenizer, separator_id_of(tokenizer, "eos"))


@pytest.fixture
def make(encoder):
    def build(*entries, **options) -> StreamingSource:
        known = {"seed": 5, "endless": True, "shuffle_block": 8, "timeout": 1.0, "tries": 5, "pause": 0.01}
        entries = [entry if isinstance(entry, StreamEntry) else StreamEntry(entry) for entry in entries]
        given = {**known, **options}
        patience = Patience(**{key: given.pop(key) for key in ("timeout", "tries", "pause") if key in given})
        opening = {key: given.pop(key) for key in ("seed", "shuffle_block", "where") if key in given}
        return StreamingSource(open_streams(entries, patience=patience, **opening), encoder, **given)

    return build


@pytest.fixture
def two_files(tmp_path):
    """The 60 documents and 4 other lines of the fixture `corpus`, and one document more."""
    first = [{"text": text} for text in TEXTS[:35]]
    first[10:10] = ["{broken", ""]
    second = [{"text": text} for text in TEXTS[35:61]]
    second[5:5] = [{"title": "no text"}, {"text": "  "}]
    return [write_jsonl(tmp_path / "first.jsonl", first), write_jsonl(tmp_path / "second.jsonl", second)]


def plain(found) -> list[tuple[Place, object, str]]:
    return [
        (place, content if isinstance(content, BadRecord) else content.tolist(), source)
        for place, content, source, *_ in found
    ]


def one_epoch(source: StreamingSource, start: Place = BEGIN) -> list[tuple[Place, object, str]]:
    return plain(itertools.takewhile(lambda record: record.place.epoch == start.epoch, source.read(start)))


def texts_of(found, encoder) -> list[str]:
    return [encoder.tokenizer.decode(ids[:-1]) for _, ids, _ in found if not isinstance(ids, BadRecord)]


@pytest.mark.parametrize("name", FILES)
def test_all_formats_give_the_same_texts_here_and_behind_a_url(tmp_path, server, make, encoder, name):
    (tmp_path / name).write_bytes(FILES[name])
    local = one_epoch(make(str(tmp_path / name), seed=None))
    assert texts_of(local, encoder) == TEXTS
    assert one_epoch(make(server.add(name, FILES[name]), seed=None)) == local
    (tmp_path / "plain.jsonl").write_bytes(JSONL)
    assert one_epoch(make(str(tmp_path / name))) == one_epoch(make(str(tmp_path / "plain.jsonl")))
    assert list(StreamingDataset([StreamEntry(str(tmp_path / name))])) == TEXTS


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_folder_as_a_data_set(tmp_path, make, encoder, kind):
    for number in range(3):
        texts = TEXTS[number * 20 : number * 20 + 20]
        content = parquet_bytes(texts) if kind == "parquet" else b"".join(JSONL.splitlines(True)[number * 20 :][:20])
        (tmp_path / f"train-{number}.{kind}").write_bytes(content)
    ordered = one_epoch(make(str(tmp_path), seed=None))
    assert texts_of(ordered, encoder) == TEXTS[:60]
    shuffled = make(str(tmp_path))
    whole = plain(islice(shuffled.read(Place()), 150))
    assert sorted(texts_of(whole[:60], encoder)) == sorted(texts_of(whole[60:120], encoder)) == sorted(TEXTS[:60])
    for position in (0, 1, 25, 59, 60):
        assert plain(islice(shuffled.read(Place(0, position)), 30)) == whole[position : position + 30]
    identity = shuffled.identity()
    assert make(str(tmp_path)).identity() == identity
    os.utime(tmp_path / f"train-0.{kind}", (1, 1))
    assert make(str(tmp_path)).identity() != identity


def test_a_folders_missing_columns_split_and_configuration(tmp_path, make):
    (tmp_path / "train.parquet").write_bytes(parquet_bytes(["a", None, " "], name="body"))
    found = one_epoch(make(StreamEntry(str(tmp_path), text_key="body"), seed=None))
    assert [(content.kind, source) for _, content, source in found[1:]] == [
        (records.NOT_A_STRING, f"{tmp_path}/train:2"),
        (records.EMPTY_TEXT, f"{tmp_path}/train:3"),
    ]
    (_, missing, _), *_ = one_epoch(make(str(tmp_path), seed=None))
    assert missing == BadRecord(records.MISSING_KEY, "no column 'text', keys seen: 'n', 'body'")
    for entry in (StreamEntry(str(tmp_path), split="nope"), StreamEntry(str(tmp_path), config="nope")):
        with pytest.raises(InputError, match=f"^streams: {tmp_path} cannot be streamed: .*nope"):
            make(entry)


def test_a_folder_with_a_broken_file_says_what_to_do(tmp_path, make):
    (tmp_path / "train.jsonl").write_bytes(JSONL + b"{broken\n")
    with pytest.raises(InputError, match=r"train cannot be read: .*; name the files in it, such as .*\*\.jsonl"):
        one_epoch(make(str(tmp_path)))


class FlakyDataSet:
    """What `datasets` gives for a data set of the hub, whose connection breaks again and again."""

    column_names = None
    num_shards = 2

    def __init__(self, breaks, texts=TEXTS[:40], begin=0) -> None:
        self.breaks, self.texts, self.begin = breaks, texts, begin

    def shard(self, num_shards, index):
        half = len(self.texts) // num_shards
        return FlakyDataSet(self.breaks, self.texts[index * half : (index + 1) * half])

    def skip(self, count):
        return FlakyDataSet(self.breaks, self.texts, count)

    def __iter__(self):
        for text in self.texts[self.begin :]:
            if self.breaks and self.breaks.pop(0):
                raise ConnectionError("broken pipe")
            yield {"text": text}


def test_a_data_set_of_the_hub_is_read_on_where_its_connection_broke(make, monkeypatch, encoder):
    breaks = [random.Random(0).random() < 0.3 for _ in range(60)]
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return FlakyDataSet(breaks)

    class Hub:
        def dataset_info(self, name, *, revision, timeout):
            return type("Info", (), {"sha": f"commit of {name} {revision}"})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("fusiontree.data.streaming.HfApi", Hub)
    source = make(StreamEntry("user/data@v1", "en", "validation"), seed=None, tries=20, pause=0)
    assert texts_of(one_epoch(source), encoder) == TEXTS[:40]
    assert not breaks
    pinned = {"split": "validation", "streaming": True, "revision": "commit of user/data v1"}
    assert asked == [(("user/data", "en"), pinned)]
    other = make(StreamEntry("user/data@v2", "en", "validation"), seed=None)
    assert other.identity()["data"] != source.identity()["data"]
    breaks[:] = [True] * 100
    with pytest.raises(
        InputError, match=r"user/data@v1/en/validation\[0\] cannot be read: broken pipe, after 20 tries"
    ):
        one_epoch(source)


def test_an_unknown_name_is_explained(make, monkeypatch):
    class Hub:
        def dataset_info(self, *_, **__):
            raise ConnectionError("no network")

    monkeypatch.setattr("fusiontree.data.streaming.HfApi", Hub)
    with pytest.raises(InputError, match=r"^streams: no/such is no file or folder here, .* \(no network\); check"):
        make("no/such")
    with pytest.raises(InputError, match="^streams: a/b/c is no file or folder here and no hub name; a file's name"):
        make("a/b/c")


def test_a_stream_holds_what_the_lazy_mode_holds(two_files, make, encoder):
    lazy = in_file_order(LazyDataset(Corpus(two_files), encoder))
    expected = plain(lazy.read(Place()))
    assert plain(make(*two_files, seed=None, endless=False).read(Place())) == expected
    shuffled = plain(make(*two_files, endless=False).read(Place()))
    assert [record[1:] for record in shuffled] != [record[1:] for record in expected]
    assert sorted(str(record[1:]) for record in shuffled) == sorted(str(record[1:]) for record in expected)


def test_a_saved_data_set_is_a_stream_too(tmp_path, make):
    datasets.Dataset.from_dict({"text": TEXTS[:30], "n": range(30)}).save_to_disk(str(tmp_path / "saved"))
    write_jsonl(tmp_path / "first.jsonl", [{"text": text} for text in TEXTS[:30]])
    expected = plain(make(f"{tmp_path}/first.jsonl", seed=None, endless=False).read(Place()))
    for path in ("saved", "save*"):
        stream = make(f"{tmp_path}/{path}", seed=None, endless=False)
        assert plain(stream.read(Place())) == expected
        assert plain(stream.read(Place(0, 11))) == expected[11:]


def test_a_saved_data_set_has_its_own_split_and_no_configuration(tmp_path, make):
    saved = datasets.Dataset.from_dict({"text": TEXTS[:5]})
    saved.save_to_disk(str(tmp_path / "bare"))
    datasets.Dataset(saved.data, split="test").save_to_disk(str(tmp_path / "test"))
    for name, split, label in (("bare", None, "bare"), ("test", None, "test/test"), ("test", "test", "test/test")):
        stream = make(StreamEntry(f"{tmp_path}/{name}", split=split), seed=None)
        assert next(stream.read(Place())).source == "" and stream.dataset.shards[0].name == f"{tmp_path}/{label}"
    with pytest.raises(InputError, match=f"^streams: {tmp_path}/test holds the split test, and train is asked for"):
        make(StreamEntry(f"{tmp_path}/test", split="train"))
    with pytest.raises(InputError, match=f"^streams: config en is of no use to {tmp_path}/bare, .*: leave it out"):
        make(StreamEntry(f"{tmp_path}/bare", config="en"))


def test_every_epoch_has_its_own_order_and_the_seed_decides_it(two_files, make):
    def first_epochs(count, **options) -> list[list[str]]:
        found = [str(record[1:]) for record in plain(islice(make(*two_files, **options).read(Place()), 65 * count))]
        return [found[start : start + 65] for start in range(0, len(found), 65)]

    epochs = first_epochs(4)
    assert first_epochs(4) == epochs
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1
    assert first_epochs(1, seed=6)[0] != epochs[0]
    unshuffled = first_epochs(2, seed=None)
    assert unshuffled[0] == unshuffled[1]


def test_records_are_mixed_within_blocks_alone_and_every_block_differently(tmp_path, make):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": str(number)} for number in range(52)])
    dataset = make(path, shuffle_block=10).dataset
    order = [int(text) for text in dataset]
    blocks = [order[start : start + 10] for start in range(0, 52, 10)]
    assert [sorted(block) for block in blocks] == [
        list(range(begin, min(begin + 10, 52))) for begin in range(0, 52, 10)
    ]
    assert len({tuple(number % 10 for number in block) for block in blocks[:5]}) == 5


def test_files_are_permuted_and_each_is_read_in_sequence(tmp_path, make):
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {n}"} for n in range(3)]) for name in "abcdef"]
    dataset = make(str(tmp_path / "*.jsonl"), paths[2], shuffle_block=1).dataset
    orders = set()
    for epoch in range(5):
        texts = [record.decode() for record in dataset.records(epoch)]
        assert len(texts) == 18 and all(
            texts[i : i + 3] == [f"{texts[i][0]} {n}" for n in range(3)] for i in range(0, 18, 3)
        )
        orders.add(tuple(text[0] for text in texts[::3]))
    assert len(orders) == 5


@pytest.mark.parametrize("shuffle_block", [1, 8, 1000])
def test_reading_from_any_place_gives_the_same_rest(two_files, make, shuffle_block):
    def build() -> StreamingSource:
        return make(*two_files, shuffle_block=shuffle_block)

    whole = plain(islice(build().read(Place()), 140))
    for number in range(0, 100, 3):
        place = whole[number][0]
        assert plain(islice(build().read(place._replace(offset=3)), 40)) == whole[number : number + 40]


def test_reading_from_any_place_of_all_formats(tmp_path, server, make):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    entries = [str(tmp_path / name) for name in FILES] + [server.add(name, content) for name, content in FILES.items()]
    whole = plain(islice(make(*entries, shuffle_block=50).read(Place()), 1700))
    for position in (0, 99, 100, 101, 777, 1599, 1650):
        start = whole[position][0]
        assert plain(islice(make(*entries, shuffle_block=50).read(start), 20)) == whole[position : position + 20]


def test_what_is_read_over_is_not_decoded(two_files, make, monkeypatch):
    decoded = []

    def decode(line, text_key):
        decoded.append(line)
        return "text"

    monkeypatch.setattr("fusiontree.data.shards.decode_record", decode)
    source = make(*two_files, endless=False, shuffle_block=4)
    assert len(list(source.read(Place(0, 60)))) == len(decoded) == 5


@pytest.mark.parametrize("ranges", ["yes", "ignored"])
@pytest.mark.parametrize("name", FILES)
def test_a_failing_server_gives_what_a_healthy_one_gives(server, make, name, ranges):
    expected = one_epoch(make(server.add(name, FILES[name])))
    generator = random.Random(name)
    faults = [Fault()]  # asked for the identity
    for number in range(8):
        kind = generator.choice(["drop", "end", "status"]) if number else "stall"
        after = len(FILES[name]) * generator.randrange(100) // 100
        faults.append(Fault(status=generator.choice([500, 503])) if kind == "status" else Fault(kind, after))
    server.add(name, FILES[name], faults=faults, ranges=ranges)
    source = make(f"{server.address}/{name}", tries=12)
    source.identity()
    assert one_epoch(source) == expected
    assert one_epoch(source, Place(1)) == one_epoch(make(f"{server.address}/{name}"), Place(1))


@pytest.mark.parametrize("fault", [Fault(status=500), Fault("drop"), Fault("end"), Fault("stall")])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_server_that_stays_down_ends_the_stream_in_time(server, make, name, fault):
    source = make(server.add(name, FILES[name], always=fault), timeout=0.2, tries=3)
    begun = time.monotonic()
    with pytest.raises(InputError, match=rf"{server.address}/{name} cannot be read: .*once it can be reached"):
        list(source.read(Place()))
    assert time.monotonic() - begun < 5


def test_a_url_that_is_not_there_ends_at_once(server, make):
    source = make(f"{server.address}/none.jsonl")
    for use in (source.identity, lambda: list(source.read(Place()))):
        with pytest.raises(InputError, match=r"none.jsonl cannot be read: the server answered 404 Not Found; check"):
            use()
    assert len(server.requests) == 2


def test_content_that_a_server_sends_packed_under_a_plain_name(server, make, encoder):
    url = server.add("a.jsonl", gzip.compress(JSONL), headers={"Content-Encoding": "gzip"})
    assert texts_of(one_epoch(make(url, seed=None)), encoder) == TEXTS


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.zst", "a.parquet"])
def test_a_complete_file_with_cut_off_content_is_no_silent_end(tmp_path, server, make, name):
    cut = FILES[name][:-20]
    (tmp_path / name).write_bytes(cut)
    for path in (str(tmp_path / name), server.add(name, cut)):
        with pytest.raises(InputError, match=rf"{name} (is cut off|cannot be read as parquet)"):
            one_epoch(make(path))


BAD_LINES = [
    b"{broken",
    b"",
    b"[1]",
    b'{"title": 1}',
    b'{"text": 1}',
    b'{"text": null}',
    b'{"text": " "}',
    b'{"text": "\xff"}',
    b'{"text": "\\ud800"}',
    b'\xef\xbb\xbf{"text": "with a mark"}\r',
]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd])
def test_bad_lines_are_the_same_as_in_the_lazy_mode(tmp_path, make, encoder, pack):
    lines = [
        line for number, line in enumerate(BAD_LINES) for line in (line, json.dumps({"text": TEXTS[number]}).encode())
    ]
    path = write_jsonl(tmp_path / "a.jsonl", lines)
    lazy = plain(in_file_order(LazyDataset(Corpus([path]), encoder)).read(Place()))
    packed = tmp_path / {bytes: "b.jsonl", gzip.compress: "b.jsonl.gz", zstd: "b.jsonl.zst"}[pack]
    packed.write_bytes(pack((tmp_path / "a.jsonl").read_bytes()))
    found = plain(make(str(packed), seed=None, endless=False).read(Place()))
    assert [record[:2] for record in found] == [record[:2] for record in lazy]
    assert [source for *_, source in found] == [source.replace(path, str(packed)) for *_, source in lazy]
    assert len({content.kind for _, content, _ in found if isinstance(content, BadRecord)}) == 8


def test_bad_lines_of_text_and_bad_rows_of_parquet(tmp_path, make):
    (tmp_path / "a.txt").write_bytes(b"good\n\n  \n\xff\n{not json, still good\n")
    found = one_epoch(make(str(tmp_path / "a.txt"), seed=None))
    kinds = [(content.kind, source) for _, content, source in found if isinstance(content, BadRecord)]
    blank = records.BLANK_LINE
    assert kinds == [(kind, f"{tmp_path}/a.txt:{line}") for kind, line in [(blank, 2), (blank, 3), ("not UTF-8", 4)]]
    values = [b"good", None, b"  ", b"", b"\xff", b"good too"]
    content = parquet_bytes(values, kind=pa.binary(), rows=4)
    table = parquet.read_table(pa.BufferReader(content))
    text = pa.Array.from_buffers(pa.string(), 6, table["text"].combine_chunks().buffers())
    parquet.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    found = one_epoch(make(str(tmp_path / "a.parquet"), seed=None))
    kinds = [(content.kind, source) for _, content, source in found if isinstance(content, BadRecord)]
    expected = [("not a string", 2), ("empty text", 3), ("empty text", 4), ("not UTF-8", 5)]
    assert kinds == [(kind, f"{tmp_path}/a.parquet:{row}") for kind, row in expected]
    for key, column, kind in [("text", "body", "missing key"), ("n", "text", "not a string")]:
        (tmp_path / "b.parquet").write_bytes(parquet_bytes(["a"] * 5, name=column))
        found = one_epoch(make(StreamEntry(str(tmp_path / "b.parquet"), text_key=key)))
        assert [content.kind for _, content, _ in found] == [kind] * 5
        resumed = one_epoch(make(StreamEntry(str(tmp_path / "b.parquet"), text_key=key), shuffle_block=1), Place(0, 3))
        assert len(resumed) == 2


def test_a_line_that_is_too_long_is_a_bad_record(tmp_path, make, monkeypatch):
    monkeypatch.setattr("fusiontree.data.text_stream.split_lines.__defaults__", (100,))
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b" * 100}, {"text": "c"}])
    found = one_epoch(make(path, seed=None))
    assert [(content.kind, source) for _, content, source in found if isinstance(content, BadRecord)] == [
        (records.TOO_LONG, f"{path}:2")
    ]


def make_loader(source, **options) -> Loader:
    known = {"batch_size": 3, "length": 32, "pad_id": 1, "on_bad_record": "skip"}
    return Loader(source, **{**known, **options})


def test_the_loader_counts_once_and_resumes_anywhere(two_files, make):
    loader = make_loader(make(*two_files))
    states, batches = [], []
    for batch in islice(loader, 70):
        batches.append(batch)
        states.append(json.loads(json.dumps(loader.state_dict())))
    report: DataReport = loader.report()
    assert loader.epoch >= 2
    assert report.blank_lines == 1
    assert {kind: skipped.count for kind, skipped in report.skipped.items()} == {
        "broken JSON": 1,
        "missing key": 1,
        "empty text": 1,
    }
    assert report.skipped["broken JSON"].examples[0].startswith(f"{two_files[0]}:11: ")
    for step in range(0, 60, 7):
        again = make_loader(make(*two_files))
        again.load_state_dict(states[step])
        for batch, expected in zip(islice(again, 5), batches[step + 1 : step + 6], strict=True):
            assert torch.equal(batch.input_ids, expected.input_ids) and torch.equal(batch.labels, expected.labels)


def test_a_checkpoint_of_another_stream_is_refused(two_files, make, tmp_path):
    state = make_loader(make(*two_files)).state_dict()
    for changed, problem in [
        ({"seed": 6}, "seed"),
        ({"shuffle_block": 9}, "shuffle_block differs"),
    ]:
        with pytest.raises(InputError, match=f"does not fit this run: .*({problem})"):
            make_loader(make(*two_files, **changed)).load_state_dict(state)
    for others in (two_files[:1], two_files[::-1], [StreamEntry(path, text_key="n") for path in two_files]):
        with pytest.raises(InputError, match="the files' contents"):
            make_loader(make(*others)).load_state_dict(state)
    make_loader(make(*two_files)).load_state_dict(state)
    os.utime(two_files[0], (1, 1))
    with pytest.raises(InputError, match="the files' contents"):
        make_loader(make(*two_files)).load_state_dict(state)


def test_the_identity_of_a_url_is_what_its_server_says(server, make):
    url = server.add("a.jsonl", JSONL)
    identity = make(url).identity()
    assert make(url + "?signature=other").identity() == identity
    server.add("a.jsonl", JSONL, etag='"two"')
    assert make(url).identity() != identity


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, make):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a" * 1000}] * 3000)
    reading = make(path).read(Place())
    next(reading)
    write_jsonl(tmp_path / "a.jsonl", [{"text": "b" * 1000}] * 3001)
    with pytest.raises(InputError, match=f"{path} has changed since this run began to read it"):
        list(reading)


def test_an_endless_stream_holds_something(tmp_path, make):
    (tmp_path / "empty.jsonl").write_bytes(b"")
    with pytest.raises(InputError, match="no record at all"):
        list(make(str(tmp_path / "empty.jsonl")).read(Place()))
    assert list(make(str(tmp_path / "empty.jsonl"), endless=False).read(Place())) == []


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("none.jsonl", "does not exist"),
        ("*.jsonl", "no file matches"),
        ("a.csv", "must end in .jsonl"),
        ("http://localhost/a.bz2", "must end in .jsonl"),
        (StreamEntry("a.jsonl", config="en"), "config en is of no use to the file a.jsonl"),
    ],
)
def test_entries_that_cannot_be_used(tmp_path, make, monkeypatch, entry, problem):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_bytes(b"text\n")
    with pytest.raises(InputError, match=problem):
        make(entry)
    with pytest.raises(InputError, match="streams is empty"):
        make()
    with pytest.raises(InputError, match="shuffle_block must be at least 1"):
        make("a.csv", shuffle_block=0)


def test_documents_are_int32(two_files, make):
    _, content, *_ = next(make(two_files[0], seed=None).read(Place()))
    assert isinstance(content, np.ndarray) and content.dtype == np.int32


def streaming_loader(settings, tokenizer, **changes):
    return build_loader(settings, tokenizer, **{"batch_size": 1, "max_seq_length": 16, "seed": 3} | changes)


def learnt_tokens(loader, batches: int) -> list[int]:
    return [t for batch in islice(loader, batches) for t in batch.input_ids[batch.labels >= 0].tolist()]


def test_streams_are_mixed_by_their_weights_and_resume_in_any_round(tmp_path, tokenizer):
    paths = [
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {number}"} for number in range(count)])
        for name, count in (("many", 50), ("few", 7))
    ]
    settings = DataSettings(
        data_mode="hf_streaming",
        hf_streaming_sources=({"path": paths[0], "weight": 0.8}, {"path": paths[1], "weight": 0.2}),
        shuffle_block=4,
    )
    loader = streaming_loader(settings, tokenizer, max_seq_length=64)
    ids = [t for batch in islice(loader, 60) for t in batch.input_ids.flatten().tolist()]
    texts = tokenizer.decode(ids).split(tokenizer.eos_token)[:-1]
    assert abs(sum(text.startswith("few") for text in texts) / len(texts) - 0.2) < 0.02
    few = [text for text in texts if text.startswith("few")]
    assert all(len(set(few[start : start + 7])) == 7 for start in range(0, len(few) - 7, 7))
    again = streaming_loader(settings, tokenizer, max_seq_length=64)
    again.load_state_dict(loader.state_dict())
    assert learnt_tokens(again, 3) == learnt_tokens(loader, 3)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, "data.hf_streaming_sources is empty: name at least one file, URL or data set"),
        (
            {"train_paths": "a.jsonl", "hf_streaming_preset": "wikipedia_only"},
            "data.hf_streaming_preset and data.train_paths are both given",
        ),
        ({"train_paths": "none.jsonl"}, "data.train_paths: none.jsonl does not exist"),
        ({"train_sources": ({"paths": ("a.jsonl", "b.jsonl")},)}, "each source names one path or glob"),
        ({"train_sources": ({"paths": ()},)}, "each source names one path or glob"),
    ],
)
def test_what_to_stream_is_named_once(tokenizer, changes, problem):
    with pytest.raises(InputError, match=problem):
        streaming_loader(DataSettings(data_mode="hf_streaming", **changes), tokenizer)


def test_presets_name_sets_of_the_hub_and_say_when_it_is_out_of_reach(tokenizer, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for preset, entries in STREAMING_PRESETS.items():
        assert all(entry.path.count("/") == 1 and entry.config for entry in entries)
        with pytest.raises(InputError, match=f"{entries[0].path} is no file or folder here, and the hub did not"):
            streaming_loader(DataSettings(data_mode="hf_streaming", hf_streaming_preset=preset), tokenizer)


def test_sources_of_equal_weight_come_equally_often_whatever_their_sizes(tmp_path, tokenizer):
    many = write_jsonl(tmp_path / "many.jsonl", [{"text": f"many {number}"} for number in range(300)])
    few = write_jsonl(tmp_path / "few.jsonl", [{"text": f"few {number}"} for number in range(10)] + ["{broken"])
    settings = DataSettings(data_mode="hf_streaming", hf_streaming_sources=({"path": many}, {"path": few}))
    loader = streaming_loader(settings, tokenizer, max_seq_length=64)
    ids = [t for batch in islice(loader, 40) for t in batch.input_ids.flatten().tolist()]
    texts = tokenizer.decode(ids).split(tokenizer.eos_token)[:-1]
    assert abs(sum(text.startswith("few") for text in texts) / len(texts) - 0.48) < 0.04
    assert loader.report().reasons() == "1 broken JSON"  # once, however often it comes round
