"""How well a model predicts text: perplexity, overall and by place in the document."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from fusiontree.artifacts import EvalReport
from fusiontree.deploy.loading import loaded_step
from fusiontree.errors import InputError
from fusiontree.eval.texts import Texts
from fusiontree.models import HybridLanguageModel
from fusiontree.train.evaluation import evaluate_documents

MEASURED = "each token predicted once from all of its document before it; a document's first token is not predicted"


def evaluate_perplexity(
    model: HybridLanguageModel,
    texts: Texts,
    *,
    name: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    piece: int = 2048,
    max_tokens: int | None = None,
    mixed_precision: Literal["bf16", "no"] = "no",
    progress: Callable[[int, int], None] = lambda read, tokens: None,
) -> EvalReport:
    """Perplexity of a model on whole documents, however long: state is carried from piece to piece.

    Args:
        model: as `fusiontree.load` returns it.
        texts: what to predict.
        name: of the model, for the report.
        tokenizer: the model's own if None.
        piece: tokens of one forward pass; changes memory and speed, not the result.
        max_tokens: stop after the document that reaches this many predicted tokens; None = all.
        mixed_precision: "bf16" computes under autocast, as training does.
        progress: called with the bytes of text read and the tokens predicted so far.

    Returns:
        The report; its `settings` say how it was measured, and hold `documents`, `bytes`, `bits_per_byte` (comparable
        between tokenizers), `seconds`, `tokens_per_second` and what was skipped.

    Raises:
        InputError: there is no tokenizer, no token can be predicted, or a document is longer than the model's learned
            time encoding.
    """
    tokenizer = tokenizer_for(model, tokenizer, name)
    started = time.perf_counter()
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=mixed_precision == "bf16"):
        result = evaluate_documents(
            model,
            tokenizer,
            texts,
            piece=piece,
            max_tokens=max_tokens,
            progress=lambda tokens: progress(texts.bytes_read, tokens),
        )
    seconds = time.perf_counter() - started
    return EvalReport(
        model=name,
        step=loaded_step(model),
        data=texts.paths,
        tokens=result.tokens,
        loss=result.loss,
        perplexity=result.perplexity,
        by_position=result.by_position,
        settings={
            "measured": MEASURED,
            "documents": result.documents,
            "bytes": result.bytes,
            "bits_per_byte": result.bits_per_byte,
            "skipped": {kind: entry.count for kind, entry in texts.report.skipped.items()}
            | ({"shorter than two tokens": result.too_short} if result.too_short else {}),
            "piece": piece,
            "max_tokens": max_tokens,
            "dtype": str(model.dtype).removeprefix("torch."),
            "mixed_precision": mixed_precision,
            "device": str(model.device),
            "seconds": round(seconds, 3),
            "tokens_per_second": round(result.tokens / seconds, 1),
        },
    )


def tokenizer_for(
    model: HybridLanguageModel, tokenizer: PreTrainedTokenizerBase | None, name: str
) -> PreTrainedTokenizerBase:
    """`tokenizer`, or the model's own if None.

    Raises:
        InputError: the model `name` has none.
    """
    found: PreTrainedTokenizerBase | None = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    if found is None:
        raise InputError(f"{name} holds no tokenizer to read texts with: save the one it was trained with there")
    return found
