"""One fixed way from JSONL text to rows of tokens, the same for every model of a comparison.

A byte-level BPE is trained on the training file; all documents are joined in file order, each followed by the end
token, and the stream is cut into rows. The order of the rows is a permutation drawn from the seed, anew per epoch.
Shapes: R rows, B batch, T tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from records import file_lock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_TOKEN = "<|endoftext|>"
END_ID = 0


@dataclass(frozen=True)
class Rows:
    """Packed rows.

    input_ids [R, T] int64; position_ids [R, T] int64, 0 at a row's first token and at a document's;
    labels [R, T] int64, unshifted, -100 where a document or a row begins and on padding.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def select(self, index: torch.Tensor | slice) -> Rows:
        return Rows(self.input_ids[index], self.position_ids[index], self.labels[index])

    def to(self, device: str) -> Rows:
        return Rows(self.input_ids.to(device), self.position_ids.to(device), self.labels.to(device))


def read_texts(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines if line.strip()]


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of `vocab_size` tokens over `texts`; token 0 ends a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _stream(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    documents = [[*encoding.ids, END_ID] for encoding in tokenizer.encode_batch(texts)]
    return np.concatenate([np.asarray(ids, dtype=np.int32) for ids in documents])


def load_streams(train: Path, valid: Path, *, vocab_size: int, cache: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """Token streams of both files and a fingerprint of the two.

    The tokenizer is trained on `train` once and the streams are kept in `cache`, under the contents they came from;
    processes that start together wait for the first.

    Returns:
        int32 arrays of tokens, every document closed by `END_ID`; 12 hexadecimal digits over both.
    """
    source = hashlib.sha256(f"{vocab_size}\n".encode() + train.read_bytes() + valid.read_bytes()).hexdigest()[:12]
    cache.mkdir(parents=True, exist_ok=True)
    (cache / ".gitignore").write_text("*\n", encoding="utf-8")
    stored = cache / f"{source}.npz"
    with file_lock(cache / "lock"):
        if not stored.exists():
            train_texts = read_texts(train)
            tokenizer = train_tokenizer(train_texts, vocab_size)
            partial = stored.with_suffix(".partial.npz")
            np.savez(partial, train=_stream(tokenizer, train_texts), valid=_stream(tokenizer, read_texts(valid)))
            partial.replace(stored)
    with np.load(stored) as arrays:
        streams = arrays["train"], arrays["valid"]
    fingerprint = hashlib.sha256(streams[0].tobytes() + streams[1].tobytes()).hexdigest()[:12]
    return *streams, fingerprint


def pack(stream: np.ndarray, length: int) -> Rows:
    """Cut `stream` into rows of `length`; the last row is filled up with end tokens that are not counted."""
    count = -(-len(stream) // length)
    tokens = np.full(count * length, END_ID, dtype=np.int64)
    tokens[: len(stream)] = stream
    tokens = tokens.reshape(count, length)
    starts = np.zeros_like(tokens, dtype=bool)
    starts[:, 0] = True
    starts[:, 1:] = tokens[:, :-1] == END_ID
    places = np.arange(length)[None]
    positions = places - np.maximum.accumulate(np.where(starts, places, 0), axis=1)
    labels = np.where(starts, -100, tokens)
    labels.reshape(-1)[len(stream) :] = -100
    return Rows(*(torch.from_numpy(array) for array in (tokens, positions, labels)))


def batches(rows: Rows, batch_size: int, *, seed: int) -> Iterator[Rows]:
    """Endless batches [B, T]: every epoch its own permutation of the rows, a ragged end dropped."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for start in range(0, len(rows) - batch_size + 1, batch_size):
            yield rows.select(order[start : start + batch_size])
