"""The `lazy` mode: records read and tokenised when their turn comes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from fusiontree.data.corpus import Corpus
from fusiontree.data.records import BadRecord
from fusiontree.data.tokenizer import DocumentEncoder


class LazyDataset(Dataset):
    """Tokenised records by number: `dataset[i]` is the int32 ids of record i, or why there are none.

    Nothing but the open files is held in memory. `__getitems__` reads and tokenises many records at once, which is what
    a `DataLoader` calls.
    """

    def __init__(self, corpus: Corpus, encoder: DocumentEncoder) -> None:
        self.corpus = corpus
        self.encoder = encoder

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, record: int) -> np.ndarray | BadRecord:
        return self.__getitems__([record])[0]

    def __getitems__(self, records: Sequence[int]) -> list[np.ndarray | BadRecord]:
        return self.encoder.records([self.corpus.read(record) for record in records])

    @property
    def num_bytes(self) -> int:
        return self.corpus.num_bytes

    def source(self, record: int) -> str:
        """`file:line` of a record."""
        return self.corpus.source(record)

    def damage(self) -> list[tuple[str, BadRecord]]:
        return self.corpus.damage()

    def identity(self) -> dict[str, object]:
        return {"data": self.corpus.fingerprint(), **self.encoder.identity()}
