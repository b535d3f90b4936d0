"""A model of random weights with a tokenizer that knows every byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusiontree import HybridLanguageModel, load
from tiny_models import save_tiny_model


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSIONTREE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def eval_folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), corpus / "tokenizer")


@pytest.fixture(scope="session")
def eval_model(eval_folder: Path) -> HybridLanguageModel:
    return load(eval_folder, device="cpu")
