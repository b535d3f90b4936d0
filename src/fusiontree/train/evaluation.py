"""Token loss on held-out text: over packed batches while training, over whole documents for a report.

Autocast is the caller's: both functions compute in whatever context they are called in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from fusiontree.artifacts import PositionLoss
from fusiontree.artifacts.evaluation import perplexity_of
from fusiontree.data.batch import Batch
from fusiontree.data.tokenizer import DocumentEncoder, token_bytes
from fusiontree.errors import InputError, NonFiniteError
from fusiontree.models import HybridCache, HybridLanguageModel
from fusiontree.models.layout import IGNORE_INDEX, count_labels
from fusiontree.ops.cross_entropy import token_cross_entropy

FIRST_BUCKET = 64
"""Tokens of the first position bucket; each later one ends at twice its start."""

_CHUNK = 256  # tokens whose logits exist at a time

_SizedT = TypeVar("_SizedT", bound=Sized)


@dataclass(frozen=True)
class TokenLoss:
    """Mean loss over predicted tokens."""

    loss: float
    """Nats per token."""
    tokens: int
    """Tokens predicted."""

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return perplexity_of(self.loss)


@dataclass(frozen=True)
class DocumentLoss(TokenLoss):
    """Mean loss over whole documents, each token predicted once from all before it."""

    documents: int
    """Documents with at least one predicted token."""
    bytes: int
    """UTF-8 bytes of the predicted text."""
    too_short: int = 0
    """Documents of fewer than two tokens, in which nothing can be predicted."""
    by_position: list[PositionLoss] = field(default_factory=list)
    """Loss by place in the document."""

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers: total bits / bytes of the predicted text."""
        return self.loss * self.tokens / math.log(2) / max(1, self.bytes)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside; the mode of before afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def evaluate_loader(
    model: nn.Module,
    loader: Iterable[Batch],
    max_batches: int | None = None,
    *,
    device: torch.device | None = None,
    reduce: Callable[[torch.Tensor], torch.Tensor] = torch.clone,
    stop: Callable[[], bool] = lambda: False,
) -> TokenLoss | None:
    """Loss over the batches of one pass.

    Args:
        model: returns `loss`, the mean over a batch's counted labels.
        max_batches: of each rank, whose batches are parts of the same rows (`Loader`); None = the whole pass.
        device: of the model; None = that of its first parameter.
        reduce: sum of a tensor over all ranks.
        stop: asked before each batch; True gives up.

    Returns:
        None when `stop` gave up.

    Raises:
        InputError: no label counts.
    """
    device = device or next(model.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64)
    with evaluation_mode(model):
        for batch in islice(loader, max_batches):
            if stop():
                return None
            batch = batch.to(device)
            output = model(input_ids=batch.input_ids, position_ids=batch.position_ids, labels=batch.labels)
            counted = count_labels(batch.labels, batch.position_ids)
            sums += torch.stack((output.loss.double() * counted, counted.double())).cpu()
    total, tokens = reduce(sums.to(device) if device.type != "mps" else sums).tolist()
    if tokens == 0:
        raise InputError("no token of the evaluation data can be predicted: its documents are empty or one token long")
    return TokenLoss(loss=total / tokens, tokens=int(tokens))


def evaluate_documents(
    model: HybridLanguageModel,
    tokenizer: Any,
    documents: Iterable[tuple[str, str]],
    *,
    piece: int = 2048,
    max_tokens: int | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> DocumentLoss:
    """Loss over whole documents, every token once and with the document's full context.

    A document longer than `piece` is read in pieces, the state carried on in a `HybridCache`; shorter ones share a
    packed row. The first token of a document has nothing before it and is not predicted.

    Args:
        documents: (text, where it came from).
        piece: tokens of one forward pass; changes memory and speed, not the result.
        max_tokens: stop after the document that reaches this many predicted tokens; None = all documents.
        progress: called with the tokens predicted so far.

    Raises:
        InputError: no token can be predicted, `piece` is below 2, or the model's logits are not finite.
    """
    encode = DocumentEncoder(tokenizer, separator_id=None)
    sums = np.zeros(64)
    counts = np.zeros(64, dtype=np.int64)
    totals = {"documents": 0, "bytes": 0, "too_short": 0}

    def encoded() -> Iterator[np.ndarray]:
        for text, ids in encoded_documents(encode, documents, max_tokens):
            if len(ids) < 2:
                totals["too_short"] += 1
                continue
            totals["documents"] += 1
            # Without an opening token of its own the document's first token is given, and so are its bytes.
            given = 0 if encode.prefix else token_bytes(tokenizer, int(ids[0]))
            totals["bytes"] += len(text.encode("utf-8")) - given
            yield ids

    with evaluation_mode(model):
        for row in packed_rows(encoded(), piece):
            for positions, losses in _row_losses(model, row, piece):
                buckets = bucket_of(positions)
                np.add.at(sums, buckets, losses)
                np.add.at(counts, buckets, 1)
                progress(int(counts.sum()))
    tokens = int(counts.sum())
    if tokens == 0:
        raise InputError("no token of the evaluation data can be predicted: its documents are empty or one token long")
    by_position = [
        PositionLoss(**bucket_range(bucket), tokens=int(counts[bucket]), loss=float(sums[bucket] / counts[bucket]))
        for bucket in np.flatnonzero(counts).tolist()
    ]
    return DocumentLoss(loss=float(sums.sum() / tokens), tokens=tokens, by_position=by_position, **totals)


def bucket_of(positions: np.ndarray) -> np.ndarray:
    """Number of the bucket that each position or distance lies in."""
    return np.ceil(np.log2((positions + 1) / FIRST_BUCKET)).clip(min=0).astype(np.int64)


def bucket_range(bucket: int) -> dict[str, int]:
    """The bucket's first position as `start`, the first behind it as `end`."""
    return {"start": 0 if bucket == 0 else FIRST_BUCKET << (bucket - 1), "end": FIRST_BUCKET << bucket}


def encoded_documents(
    encode: DocumentEncoder, documents: Iterable[tuple[str, str]], max_tokens: int | None
) -> Iterator[tuple[str, np.ndarray]]:
    """(text, int32 ids) up to the document that reaches `max_tokens` tokens that can be predicted; None = all."""
    predictable = 0
    for text, _ in documents:
        (ids,) = encode([text])
        yield text, ids
        predictable += max(0, len(ids) - 1)
        if max_tokens is not None and predictable >= max_tokens:
            return


def packed_rows(documents: Iterable[_SizedT], piece: int) -> Iterator[list[_SizedT]]:
    """Group documents: each long one alone, short ones together as long as they fit into one piece.

    Raises:
        InputError: `piece` is below 2, before the first document is read.
    """
    if piece < 2:
        raise InputError(f"evaluation needs pieces of at least 2 tokens, got {piece}")
    waiting: list[_SizedT] = []
    for document in documents:
        if waiting and sum(map(len, waiting)) + len(document) > piece:
            yield waiting
            waiting = []
        waiting.append(document)
    if waiting:
        yield waiting


def _row_losses(
    model: HybridLanguageModel, row: list[np.ndarray], piece: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(positions, losses) of the predicted tokens of a row of whole documents, piece by piece."""
    positions = torch.cat([torch.arange(len(document)) for document in row])
    targets = torch.from_numpy(np.concatenate(row).astype(np.int64)).roll(-1)
    targets[positions.roll(-1) == 0] = IGNORE_INDEX  # a document's first token, and what follows the row
    for part, hidden in hidden_in_pieces(model, row, piece):
        losses = token_cross_entropy(hidden, model.lm_head.weight, targets[None, part].to(hidden.device))
        counted = targets[part] != IGNORE_INDEX
        yield (positions[part][counted] + 1).numpy(), check_finite(losses[0].cpu().double()[counted]).numpy()


def hidden_in_pieces(
    model: HybridLanguageModel, row: Sequence[np.ndarray], piece: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Reads a row of whole documents, `piece` tokens at a time and with the state of all before.

    Args:
        row: ids of each document.

    Returns:
        For each piece, which tokens of the row it is, and their hidden states [1, tokens, H].
    """
    ids = torch.from_numpy(np.concatenate(row).astype(np.int64))[None].to(model.device)
    positions = torch.cat([torch.arange(len(document)) for document in row])[None].to(model.device)
    length = ids.shape[1]
    cache = HybridCache(model.config) if length > piece else None
    for start in range(0, length, piece):
        part = slice(start, min(start + piece, length))
        yield (
            part,
            model.backbone(
                input_ids=ids[:, part],
                # A row of one document needs no positions, which would make the model look for boundaries in it.
                position_ids=positions[:, part] if len(row) > 1 else None,
                past_key_values=cache,
                use_cache=cache is not None,
            ).last_hidden_state,
        )


def logits_in_chunks(model: HybridLanguageModel, states: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """The logits of hidden states [n, H], few at a time, since all at once would take n times the vocabulary.

    Returns:
        For each chunk, which of the states it is, and their logits [.., V] in float32.
    """
    for start in range(0, len(states), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        yield chunk, check_finite(model.lm_head(states[chunk]).float())


def check_finite(values: torch.Tensor) -> torch.Tensor:
    """`values`: logits, or losses of them.

    Raises:
        NonFiniteError: they hold NaN or infinity.
    """
    if values.numel() and not math.isfinite(values.abs().amax()):
        raise NonFiniteError
    return values
