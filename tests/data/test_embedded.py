from __future__ import annotations

import json

import pytest

from fusiontree.config import InputError
from fusiontree.data import DataSettings, build_loader, train_bpe, write_embedded_corpus


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_train_and_eval_are_real_disjoint_and_sized_as_asked(tmp_path):
    train, evaluation = write_embedded_corpus(tmp_path, max_bytes=1_000_000, eval_share=0.1)
    documents = read(train) + read(evaluation)
    sources = [document["source"] for document in documents]
    texts = [document["text"] for document in documents]
    assert len(set(sources)) == len(sources)
    assert len(set(texts)) > 0.99 * len(texts)
    sizes = [sum(len(document["text"].encode()) for document in read(path)) for path in (train, evaluation)]
    assert 0.95e6 < sum(sizes) <= 1e6
    assert 0.08 < sizes[1] / sum(sizes) <= 0.1
    assert not any({"test", "tests", "idle_test", "site-packages"} & set(source.split("/")) for source in sources)
    assert any(source.startswith("reference/") for source in sources)
    assert any("import " in text for text in texts)


def test_it_is_the_same_every_time(tmp_path):
    first = [path.read_bytes() for path in write_embedded_corpus(tmp_path / "a", max_bytes=300_000)]
    assert first == [path.read_bytes() for path in write_embedded_corpus(tmp_path / "b", max_bytes=300_000)]


def test_the_whole_library_is_some_megabytes(tmp_path):
    train, evaluation = write_embedded_corpus(tmp_path)
    assert train.stat().st_size > 4_000_000
    assert len(read(evaluation)) >= 8


@pytest.mark.parametrize("arguments", [{"eval_share": 0.0}, {"eval_share": 1.0}, {"max_bytes": 10}])
def test_impossible_sizes(tmp_path, arguments):
    with pytest.raises(InputError):
        write_embedded_corpus(tmp_path, **arguments)


def test_from_nothing_to_batches(tmp_path):
    train, evaluation = write_embedded_corpus(tmp_path, max_bytes=200_000)
    tokenizer = train_bpe([str(train)], 512, tmp_path / "bpe")
    settings = DataSettings(train_paths=str(train), eval_paths=str(evaluation))
    for split in ("train", "eval"):
        loader = build_loader(settings, tokenizer, split=split, batch_size=2, max_seq_length=64)
        assert next(iter(loader)).input_ids.shape == (2, 64)
        assert loader.report().total_skipped == 0
