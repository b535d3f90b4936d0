"""Passkeys in text: the grid against rows read whole, and its picture."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from fusiontree import HybridLanguageModel, InputError
from fusiontree.artifacts import PasskeyReport
from fusiontree.eval.needle import PasskeyTask
from fusiontree.eval.passkeys import FILLER, MARKER, evaluate_passkeys
from fusiontree.eval.texts import Texts
from fusiontree.plots import plot_passkeys


@pytest.fixture(scope="module")
def guesser(eval_model: HybridLanguageModel) -> HybridLanguageModel:
    """Says nothing but digits, so that it finds some passkeys of one by chance."""
    model = copy.deepcopy(eval_model)
    digits = [model.tokenizer(digit)["input_ids"][-1] for digit in "0123456789"]
    others = [id for id in range(model.config.vocab_size) if id not in digits]
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.lm_head.weight[others] = 0
        model.lm_head.weight[digits] *= 3
    return model


@torch.no_grad()
def expected_grid(
    model: HybridLanguageModel, lengths: list[int], depths: list[float], rows: int, filler: str
) -> list[list[float]]:
    """Row by row, the whole of it at once."""
    tokenizer, grid = model.tokenizer, []
    for depth in depths:
        grid.append([])
        for length in lengths:
            task = PasskeyTask(
                length=length,
                depth=depth,
                digits=1,
                marker=tuple(tokenizer(MARKER)["input_ids"]),
                alphabet=[tokenizer(digit)["input_ids"][-1] for digit in "0123456789"],
            )
            batch = task.batch(range(rows), seed=0, filler=torch.tensor(tokenizer(filler)["input_ids"]))
            assert tokenizer.decode(batch.input_ids[0]).count("pass key is: ") == 2
            said = [model(row[None]).logits[0, -2].argmax() for row in batch.input_ids]
            grid[-1].append(sum(int(one == row[-1]) for one, row in zip(said, batch.input_ids, strict=True)) / rows)
    return grid


@pytest.mark.parametrize("piece", [40, 4096])
def test_the_grid_is_that_of_rows_read_alone(guesser: HybridLanguageModel, piece: int, tmp_path: Path) -> None:
    seen = []
    report = evaluate_passkeys(
        guesser,
        name="tiny",
        lengths=[64, 96],
        depths=[0.0, 0.5, 1.0],
        rows=10,
        digits=1,
        piece=piece,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert report.right == expected_grid(guesser, [64, 96], [0.0, 0.5, 1.0], 10, FILLER)
    assert len({share for row in report.right for share in row}) > 1
    assert seen[-1] == (60, 60) and report.filler == []
    path = plot_passkeys(report, tmp_path / "new" / "grid.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_passkeys_are_hidden_in_the_texts_given(guesser: HybridLanguageModel, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over a lazy dog " * 20)
    report = evaluate_passkeys(
        guesser, name="tiny", lengths=[96], depths=[0.3], rows=10, digits=1, texts=Texts([str(text)])
    )
    assert report.filler == [str(text)]
    assert report.right == expected_grid(guesser, [96], [0.3], 10, text.read_text())


def test_what_cannot_hold_passkeys(eval_model: HybridLanguageModel, tmp_path: Path) -> None:
    def evaluated(**changes: object) -> PasskeyReport:
        return evaluate_passkeys(
            eval_model, **({"name": "tiny", "lengths": [96], "depths": [0.5], "rows": 1} | changes)
        )

    with pytest.raises(InputError, match="a row of 20 tokens is too short for a marker of"):
        evaluated(lengths=[20])
    with pytest.raises(InputError, match="`depth` must lie between 0"):
        evaluated(depths=[1.5])
    (tmp_path / "marked.txt").write_text(FILLER + MARKER)
    with pytest.raises(InputError, match="holds the marker"):
        evaluated(texts=Texts([str(tmp_path / "marked.txt")]))
    words = Tokenizer(WordLevel({"<unk>": 0, "fox": 1}, unk_token="<unk>"))
    with pytest.raises(InputError, match="the tokenizer of tiny has no token for each digit"):
        evaluated(tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>"))
