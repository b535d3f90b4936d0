"""From text files to batches of tokens.

    tokenizer = load_tokenizer("path/to/tokenizer")
    loader = build_loader(settings, tokenizer, batch_size=8, max_seq_length=512)
    for batch in loader: ...

Names are imported when first used, so that reading settings does not wait for the tokenizer libraries.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusiontree.data.batch import Batch
    from fusiontree.data.bpe import train_bpe
    from fusiontree.data.embedded import write_embedded_corpus
    from fusiontree.data.lazy import LazyDataset
    from fusiontree.data.loader import Loader, build_loader
    from fusiontree.data.opening import documents
    from fusiontree.data.report import DataReport
    from fusiontree.data.settings import DataSettings
    from fusiontree.data.static import LongContextDataset
    from fusiontree.data.streaming import StreamingDataset
    from fusiontree.data.tokenizer import load_tokenizer, vocab_size_of

__all__ = [
    "Batch",
    "DataReport",
    "DataSettings",
    "LazyDataset",
    "Loader",
    "LongContextDataset",
    "StreamingDataset",
    "build_loader",
    "documents",
    "load_tokenizer",
    "train_bpe",
    "vocab_size_of",
    "write_embedded_corpus",
]

_MODULES = {
    "Batch": "batch",
    "DataReport": "report",
    "DataSettings": "settings",
    "LazyDataset": "lazy",
    "Loader": "loader",
    "LongContextDataset": "static",
    "StreamingDataset": "streaming",
    "build_loader": "loader",
    "documents": "opening",
    "load_tokenizer": "tokenizer",
    "train_bpe": "bpe",
    "vocab_size_of": "tokenizer",
    "write_embedded_corpus": "embedded",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
