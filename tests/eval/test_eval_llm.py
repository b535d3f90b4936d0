"""Perplexity against the plain definition of it, and the texts that it is taken on."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pytest
import torch

from fusiontree import HybridLanguageModel, InputError
from fusiontree.artifacts import EvalReport, PositionLoss
from fusiontree.eval.eval_llm import evaluate_perplexity
from fusiontree.eval.figures import plot_perplexity_by_position
from fusiontree.eval.texts import Texts

DOCUMENTS = ["the quick brown fox " * 12, "a lazy dog", "x", "seven silver birds sing about rivers " * 5]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """The first two documents as JSONL with bad lines between, each other one as a text file."""
    rows = [json.dumps({"text": DOCUMENTS[0]}), "{broken", '{"other": 1}', "", json.dumps({"text": DOCUMENTS[1]})]
    (tmp_path / "a.jsonl").write_text("\n".join(rows) + "\n")
    for index, name in ((2, "b.txt"), (3, "c.md")):
        (tmp_path / name).write_text(DOCUMENTS[index])
    return [str(tmp_path / "a.jsonl"), str(tmp_path / "*.txt"), str(tmp_path / "c.md")]


def definition(model: HybridLanguageModel) -> list[list[float]]:
    """Loss of every token but the first of each document, from one forward pass over it alone."""
    losses = []
    for text in DOCUMENTS:
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].log_softmax(-1)
        losses.append((-logits.gather(1, ids[0, 1:, None]))[:, 0].tolist())
    return losses


@pytest.mark.parametrize("piece", [16, 2048])
def test_perplexity_is_that_of_the_definition(eval_model: HybridLanguageModel, files: list[str], piece: int) -> None:
    expected = [loss for document in definition(eval_model) for loss in document]
    report = evaluate_perplexity(eval_model, Texts(files), name="tiny", piece=piece)
    assert report.tokens == len(expected)
    assert report.loss == pytest.approx(sum(expected) / len(expected), abs=1e-5)
    assert report.perplexity == pytest.approx(math.exp(report.loss))
    first = [loss for document in definition(eval_model) for loss in document[:63]]
    assert report.by_position[0].model_dump() == {
        "start": 0,
        "end": 64,
        "tokens": len(first),
        "loss": pytest.approx(sum(first) / len(first), abs=1e-5),
    }
    assert sum(bucket.tokens for bucket in report.by_position) == report.tokens
    given = sum(len(eval_model.tokenizer.decode(eval_model.tokenizer(t)["input_ids"][:1]).encode()) for t in DOCUMENTS)
    # "x" is one token: nothing of it is predicted.
    assert report.settings["bytes"] == sum(len(text.encode()) for text in DOCUMENTS) - given
    assert report.settings["bits_per_byte"] == pytest.approx(
        sum(expected) / math.log(2) / report.settings["bytes"], rel=1e-5
    )
    assert report.settings["documents"] == 3
    assert report.settings["skipped"] == {"broken JSON": 1, "missing key": 1, "shorter than two tokens": 1}


def test_what_was_skipped_is_named(
    eval_model: HybridLanguageModel, files: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    evaluate_perplexity(eval_model, Texts(files), name="tiny")
    assert "2 records skipped" in caplog.text
    assert "a.jsonl:2" in caplog.text and "a.jsonl:3" in caplog.text


def test_it_stops_after_the_tokens_asked_for(eval_model: HybridLanguageModel, files: list[str]) -> None:
    seen = []
    report = evaluate_perplexity(
        eval_model, Texts(files), name="tiny", max_tokens=5, progress=lambda read, tokens: seen.append((read, tokens))
    )
    assert report.tokens == len(definition(eval_model)[0])
    assert seen[-1] == (len(DOCUMENTS[0]), report.tokens)


def test_autocast_is_near_float32(eval_model: HybridLanguageModel, files: list[str]) -> None:
    exact = evaluate_perplexity(eval_model, Texts(files), name="tiny")
    rounded = evaluate_perplexity(eval_model, Texts(files), name="tiny", mixed_precision="bf16")
    assert rounded.loss != exact.loss
    assert rounded.loss == pytest.approx(exact.loss, rel=0.02)
    assert rounded.settings["mixed_precision"] == "bf16"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("empty.txt", b" \n", r"--data: .*empty.txt cannot be used: empty text"),
        ("latin.txt", b"caf\xe9", r"--data: .*latin.txt cannot be used: not UTF-8, byte 0xe9 at place 4"),
        ("empty.jsonl", b"", r"--data: .*empty.jsonl holds no record at all"),
        ("keys.jsonl", b'{"content": "a"}\n', r"--data: none of the 1 records .*keys.jsonl .*missing key"),
        ("blank.jsonl", b'{"text": " "}\n', r"--data: none of the 1 records .*empty text"),
    ],
)
def test_files_without_text(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        Texts([str(tmp_path / name)], where="--data")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--data: .*missing.txt does not exist"):
        Texts([str(tmp_path / "missing.txt")], where="--data")
    with pytest.raises(InputError, match=r"--data: no file matches .*\*.txt"):
        Texts([str(tmp_path / "*.txt")], where="--data")


def test_the_picture_needs_no_display_and_shows_any_report(tmp_path: Path) -> None:
    for buckets, loss in ((1, 3.0), (1, 2.5), (12, 2.5)):  # the first leaves the axis nothing to span
        ranges = [
            PositionLoss(start=0 if i == 0 else 32 << i, end=64 << i, tokens=10, loss=3.0 - 0.1 * i)
            for i in range(buckets)
        ]
        report = EvalReport(
            model="m", data=["d"], tokens=10 * buckets, loss=loss, perplexity=math.exp(loss), by_position=ranges
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            path = plot_perplexity_by_position(report, tmp_path / "new" / f"{buckets}.png")
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 5000
