"""Token loss: on batches as the mean over labels, on documents once per token whatever the pieces."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fusiontree.data.loader import build_loader
from fusiontree.data.settings import DataSettings
from fusiontree.data.tokenizer import load_tokenizer
from fusiontree.errors import InputError
from fusiontree.models import HybridLanguageModel, HybridLanguageModelConfig
from fusiontree.models.layout import shift_labels
from fusiontree.train.evaluation import evaluate_documents, evaluate_loader

TEXTS = [
    "the quick brown fox",
    "seven silver birds sing about rivers and cities of glass " * 12,
    "a lazy dog",
    "over rivers " * 30,
    "fox",
]


@pytest.fixture(scope="module")
def tokenizer(corpus: Path):
    return load_tokenizer(str(corpus / "tokenizer"))


@pytest.fixture(scope="module")
def model(tokenizer) -> HybridLanguageModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "global_heads": 1, "window_size": 8}
    sizes |= {"mamba_head_dim": 8, "mamba_state_size": 4, "gate_rank": 4, "srte_rank": 4}
    return HybridLanguageModel(HybridLanguageModelConfig(vocab_size=320, **sizes)).eval()


def documents() -> list[tuple[str, str]]:
    return [(text, f"line {i}") for i, text in enumerate(TEXTS)]


def direct(model: HybridLanguageModel, tokenizer) -> tuple[list[float], list[int], int]:
    """Losses and positions of every predicted token, one document at a time, and the bytes predicted."""
    losses, positions, size = [], [], 0
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) < 2:
            continue
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        losses += F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").tolist()
        positions += range(1, len(ids))
        size += len(text.encode()) - len(tokenizer.decode(ids[:1]).encode())
    return losses, positions, size


@pytest.mark.parametrize("piece", [5, 16, 64, 4096])
def test_documents_are_scored_once_per_token_with_full_context(model, tokenizer, piece: int) -> None:
    losses, positions, size = direct(model, tokenizer)
    result = evaluate_documents(model, tokenizer, documents(), piece=piece)
    assert result.tokens == len(losses)
    assert result.loss == pytest.approx(sum(losses) / len(losses), abs=2e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.bytes == size
    assert result.bits_per_byte == pytest.approx(sum(losses) / math.log(2) / size, abs=1e-4)
    assert sum(bucket.tokens for bucket in result.by_position) == len(losses)
    for bucket in result.by_position:
        inside = [loss for loss, p in zip(losses, positions, strict=True) if bucket.start <= p < bucket.end]
        assert bucket.tokens == len(inside)
        assert bucket.loss == pytest.approx(sum(inside) / len(inside), abs=5e-5)
    assert [b.start for b in result.by_position] == sorted(b.start for b in result.by_position)


def test_bytes_of_a_character_that_tokens_share(tokenizer, model) -> None:
    ids = tokenizer("学", add_special_tokens=False)["input_ids"]
    assert len(ids) == 3  # a tokenizer of English: one token for each byte
    result = evaluate_documents(model, tokenizer, [("学", "line 1"), ("学x", "line 2")])
    assert (result.tokens, result.bytes) == (2 + 3, 2 + 3)


def test_evaluation_can_stop_early(model, tokenizer) -> None:
    whole = evaluate_documents(model, tokenizer, documents())
    part = evaluate_documents(model, tokenizer, documents(), max_tokens=30)
    assert 30 <= part.tokens < whole.tokens


def test_a_batch_evaluation_is_the_mean_over_all_labels(model, tokenizer, corpus: Path) -> None:
    settings = DataSettings(eval_paths=str(corpus / "eval.jsonl"), cache_dir=str(corpus / "cache"))
    loader = build_loader(settings, tokenizer, split="eval", batch_size=3, max_seq_length=40)
    total, counted = 0.0, 0
    for batch in loader:
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids).logits
        labels = shift_labels(batch.labels, batch.position_ids)
        total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        counted += int((labels != -100).sum())
    model.train()
    result = evaluate_loader(model, loader)
    assert model.training
    model.eval()
    assert result.tokens == counted
    assert result.loss == pytest.approx(total / counted, abs=1e-5)
    first = evaluate_loader(model, loader, max_batches=1)
    assert first.tokens < result.tokens
    assert evaluate_loader(model, loader, stop=lambda: True) is None


@pytest.mark.parametrize("max_batches", [1, 2, None])
def test_several_processes_evaluate_the_rows_of_one(model, tokenizer, corpus: Path, max_batches: int | None) -> None:
    settings = DataSettings(eval_paths=str(corpus / "eval.jsonl"), cache_dir=str(corpus / "cache"))

    def load(batch_size: int, rank: int = 0, world_size: int = 1):
        shape = {"batch_size": batch_size, "max_seq_length": 8}
        return build_loader(settings, tokenizer, split="eval", rank=rank, world_size=world_size, **shape)

    expected = evaluate_loader(model, load(6), max_batches)
    for world_size in (2, 3, 6):
        sums = torch.zeros(2, dtype=torch.float64)

        def reduce(local: torch.Tensor, sums: torch.Tensor = sums) -> torch.Tensor:
            """One rank after the other: the last one's result is that of all."""
            return sums.add_(local).clone()

        for rank in range(world_size):
            result = evaluate_loader(model, load(6 // world_size, rank, world_size), max_batches, reduce=reduce)
        assert result.tokens == expected.tokens
        assert result.loss == pytest.approx(expected.loss, rel=1e-5)


def test_nothing_to_predict_is_an_error(model, tokenizer) -> None:
    with pytest.raises(InputError, match="no token of the evaluation data can be predicted"):
        evaluate_documents(model, tokenizer, [("", "line 1")])
