"""Tokens on disk give the batches of the files, and belong to them alone."""

from __future__ import annotations

import json
import os
import random
from itertools import islice

import pytest
from jsonl_files import text_of, write_jsonl
from test_loader import as_lists

import fusiontree.data.static as static
from fusiontree.config import InputError
from fusiontree.data import DataSettings, LazyDataset, LongContextDataset, build_loader
from fusiontree.data.corpus import Corpus
from fusiontree.data.static import tokenise
from fusiontree.data.tokenizer import DocumentEncoder


@pytest.fixture
def records(corpus, tokenizer) -> LazyDataset:
    return LazyDataset(Corpus(corpus), DocumentEncoder(tokenizer, tokenizer.eos_token_id))


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(static, "_SHARD_BYTES", 1500)


def contents(dataset) -> list:
    return [
        item if isinstance(item, tuple) else item.tolist() for item in dataset.__getitems__(list(range(len(dataset))))
    ]


@pytest.mark.parametrize("processes", [1, 2])
def test_shards_hold_what_the_files_give(records, tmp_path, processes):
    steps = list(tokenise(records, tmp_path / "tokens", vocab_size=400, processes=processes))
    assert steps[-1][0] == steps[-1][1] > 3
    dataset = LongContextDataset(tmp_path / "tokens", records.identity())
    assert contents(dataset) == contents(records)
    assert [dataset.source(n) for n in (10, 42)] == [records.source(n) for n in (10, 42)]


@pytest.mark.parametrize("vocab_size", [400, 100_000])
def test_ids_that_are_not_learnt_keep_their_sign_in_either_width(records, tmp_path, vocab_size, monkeypatch):
    plain = LazyDataset.__getitems__
    monkeypatch.setattr(
        LazyDataset,
        "__getitems__",
        lambda self, numbers: [i if isinstance(i, tuple) else ~i for i in plain(self, numbers)],
    )
    list(tokenise(records, tmp_path / "tokens", vocab_size=vocab_size))
    assert contents(LongContextDataset(tmp_path / "tokens")) == contents(records)


def test_an_interruption_leaves_whole_shards_and_goes_on_with_the_rest(records, tmp_path):
    folder = tmp_path / "tokens"
    steps = tokenise(records, folder, vocab_size=400)
    for _ in range(3):
        next(steps)
    steps.close()
    with pytest.raises(InputError, match=r"lacks \d+ of \d+ shards: run .fusiontree data tokenise. again"):
        LongContextDataset(folder)
    (folder / "shard-00001.ids.1234.tmp").write_bytes(b"half")
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.ids")}
    first, shards = next(steps := tokenise(records, folder, vocab_size=400))
    assert first == len(times) == 2 < shards
    list(steps)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert contents(LongContextDataset(folder)) == contents(records)
    assert not list(folder.glob("*.tmp"))


def test_batches_and_resume_are_those_of_the_lazy_mode(make_loader, records, corpus, tokenizer, tmp_path):
    list(tokenise(records, tmp_path / "train", vocab_size=400))
    expected = as_lists(islice(make_loader(), 30))
    for settings in ({"paths": corpus}, {"paths": ()}):  # with its files, and without them

        def loader(settings=settings, **more):
            return build_loader(
                DataSettings(data_mode="static", static_dir=str(tmp_path), train_paths=settings["paths"], **more),
                tokenizer,
                batch_size=3,
                max_seq_length=32,
                seed=5,
            )

        static_loader = loader()
        assert as_lists(islice(static_loader, 30)) == expected
        assert static_loader.report().reasons() == make_report(make_loader)
        draw, state, done = random.Random(1), None, 0
        while done < 30:
            again = loader(num_workers=draw.choice([0, 1]))
            if state:
                again.load_state_dict(json.loads(json.dumps(state)))
            count = draw.randint(1, 12)
            assert (
                as_lists(islice(again, count)) == (expected[done : done + count] + as_lists([]))[:count]
                or done + count > 30
            )
            done, state = done + count, again.state_dict()
        # The places mean the same in both modes.
        lazy = make_loader()
        first = loader()
        list(islice(first, 7))
        lazy.load_state_dict(first.state_dict())
        assert as_lists(islice(lazy, 3)) == expected[7:10]


def make_report(make_loader) -> str:
    loader = make_loader()
    list(islice(loader, 30))
    return loader.report().reasons()


def test_tokens_of_something_else_are_refused(records, corpus, tokenizer, tmp_path):
    list(tokenise(records, tmp_path / "train", vocab_size=400))

    def load(**changes):
        settings = {"data_mode": "static", "static_dir": str(tmp_path), "train_paths": corpus} | changes
        return build_loader(DataSettings(**settings), tokenizer, batch_size=1, max_seq_length=32)

    load()
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": text_of(1)}])
    for changes, problem in [
        ({"train_paths": other}, "are not those of this run: the files' contents"),
        ({"train_paths": corpus[::-1]}, "their order"),
        ({"document_separator": None}, "data.document_separator differs"),
        ({"document_separator": None, "train_paths": ()}, "data.document_separator differs"),
        (
            {"static_dir": str(tmp_path / "none")},
            "none/train holds no tokens: make them with .fusiontree data tokenise",
        ),
        ({"static_dir": None}, "data.static_dir is not set"),
    ]:
        with pytest.raises(InputError, match=problem):
            load(**changes)
    with pytest.raises(InputError, match="are not those of this run"):
        list(tokenise(LazyDataset(Corpus([other]), records.encoder), tmp_path / "train", vocab_size=400))


def test_damage_is_found(records, tmp_path):
    folder = tmp_path / "tokens"
    list(tokenise(records, folder, vocab_size=400))
    ids = folder / "shard-00002.ids"
    content = ids.read_bytes()
    ids.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(InputError, match=r"shard-00002.ids is damaged"):
        contents(LongContextDataset(folder))
    ids.write_bytes(content[:-2])
    with pytest.raises(InputError, match=r"shard-00002.ids is cut off or damaged"):
        contents(LongContextDataset(folder))
    os.remove(folder / "shard-00003.json")
    with pytest.raises(InputError, match="lacks 1 of"):
        LongContextDataset(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="manifest.json cannot be read"):
        LongContextDataset(folder)
