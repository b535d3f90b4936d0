"""A model of random weights with a tokenizer that knows every byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusiontree import HybridLanguageModel, load
from tiny_models import save_tiny_model


@pytest.fixture(scope="session")
def tiny_folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), corpus / "tokenizer")


@pytest.fixture(scope="session")
def learned_folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a learned time encoding of 96 positions."""
    return save_tiny_model(tmp_path_factory.mktemp("learned"), corpus / "tokenizer", srte_encoding="learned")


@pytest.fixture(scope="session")
def model(tiny_folder: Path) -> HybridLanguageModel:
    return load(tiny_folder, device="cpu")
