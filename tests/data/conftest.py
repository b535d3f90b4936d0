"""Small files, a small tokenizer, and a cache of the tests' own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jsonl_files import text_of, write_jsonl

from fusiontree.data import DataSettings, Loader, build_loader, train_bpe

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FUSIONTREE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the shared data sets are not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    path = write_jsonl(folder / "train.jsonl", [{"text": text_of(number)} for number in range(200)])
    return train_bpe([path], 400, folder / "bpe", cache_dir=str(folder))


@pytest.fixture
def corpus(tmp_path) -> list[str]:
    """Two files with 60 documents in all, and some lines that are none."""
    first = [{"text": text_of(number)} for number in range(35)]
    first[10:10] = ["{broken", ""]
    second = [{"text": text_of(number)} for number in range(35, 60)]
    second[5:5] = [{"title": "no text"}, {"text": "  "}]
    return [write_jsonl(tmp_path / "first.jsonl", first), write_jsonl(tmp_path / "second.jsonl", second)]


MakeLoader = Callable[..., Loader]


@pytest.fixture
def make_loader(corpus, tokenizer) -> MakeLoader:
    def make(*, paths=None, split="train", batch_size=3, length=32, seed=5, rank=0, world_size=1, **settings) -> Loader:
        paths = paths or corpus
        return build_loader(
            DataSettings(train_paths=paths, eval_paths=paths, **settings),
            tokenizer,
            split=split,
            batch_size=batch_size,
            max_seq_length=length,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )

    return make
