"""The ends of Python functions: which are held out, and what is predicted of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fusiontree import HybridLanguageModel, InputError, load
from fusiontree.eval.code import evaluate_code, held_out, similarity
from fusiontree.eval.texts import Texts
from tiny_models import save_tiny_model

SOURCE = '''\
import os

def one():
    return 1

class Bird:
    """Sings."""

    def sing(self, river):
        """About rivers."""
        song = river * 2

        # loudly
        @staticmethod
        def inner():
            a = 1
            return a
        return song

async def later(x):
    x += 1; y = x
    return (
        y
    )

def shared(): a = 1; return a
'''


def test_the_later_half_of_each_body_is_held_out() -> None:
    ends = [SOURCE[ending.start : ending.stop] for ending in held_out(SOURCE)]
    assert ends == ["\n        return song", "\n    return (\n        y\n    )"]
    # Of two statements the second, decorators included; what an outer function holds is its own.
    source = "def f():\n    a = 1\n    @a\n    def g(): pass\n"
    (ending,) = held_out(source)
    assert source[ending.start : ending.stop] == "\n    @a\n    def g(): pass"
    with pytest.raises(SyntaxError):
        held_out("def f(:")


@pytest.mark.parametrize(
    ("one", "other", "expected"), [("", "", 1), ("abc", "abc", 1), ("abc", "", 0), ("kitten", "sitting", 1 - 3 / 7)]
)
def test_similarity_is_that_of_levenshtein(one: str, other: str, expected: float) -> None:
    assert similarity(one, other) == pytest.approx(expected) == similarity(other, one)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("code")
    (folder / "a.py").write_bytes(SOURCE.replace("\n", "\r\n").encode())
    (folder / "b.py").write_text("def broken(:\n")
    (folder / "c.py").write_text("x = 1\n")
    return [str(folder / "*.py")]


def test_ends_are_predicted_from_all_that_stands_before_them(eval_model: HybridLanguageModel, files: list[str]) -> None:
    tokenizer = eval_model.tokenizer
    losses: list[float] = []
    written: list[tuple[str, str]] = []
    ids: list[int] = []
    place = 0
    for ending in held_out(SOURCE):
        ids += tokenizer(SOURCE[place : ending.start])["input_ids"]
        target = tokenizer(SOURCE[ending.start : ending.stop])["input_ids"]
        with torch.no_grad():
            logits = eval_model(torch.tensor([ids + target])).logits[0].log_softmax(-1)
            losses += [-logits[len(ids) - 1 + at, token].item() for at, token in enumerate(target)]
            said = list(ids)
            line = SOURCE[ending.start : ending.stop].split("\n")[1]
            for _ in range(2 * len(tokenizer(f"\n{line}\n")["input_ids"]) + 8):
                said.append(int(eval_model(torch.tensor([said])).logits[0, -1, :300].argmax()))
        text = tokenizer.decode(said[len(ids) :]).lstrip("\n").split("\n")[0].rstrip()
        written.append((text, line))
        ids += target
        place = ending.stop
    seen = []
    for piece in (16, 2048):
        report = evaluate_code(
            eval_model, Texts(files), name="tiny", piece=piece, progress=lambda done, total: seen.append((done, total))
        )
        assert (report.files, report.unreadable, report.functions, report.tokens) == (2, 1, 2, len(losses))
        assert report.loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)
        assert report.next_line_right == sum(text == line for text, line in written) / 2
        assert report.next_line_similarity == pytest.approx(sum(similarity(*pair) for pair in written) / 2)
    assert seen[-1] == (2, 2)


def test_a_line_that_is_known_is_written(tmp_path: Path, corpus: Path) -> None:
    """A model that learned one file by heart completes its functions."""
    text = "def sing():\n    a = 1\n    return a\n"
    (tmp_path / "song.py").write_text(text)
    model = load(save_tiny_model(tmp_path / "model", corpus / "tokenizer"), device="cpu")
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    report = evaluate_code(model, Texts([str(tmp_path / "song.py")]), name="tiny")
    assert (report.next_line_right, report.next_line_similarity) == (1, 1)
    assert report.loss < 0.1


def test_files_without_functions(eval_model: HybridLanguageModel, files: list[str]) -> None:
    with pytest.raises(InputError, match="none of the 2 files of code is Python and holds a function"):
        evaluate_code(eval_model, Texts([files[0].replace("*", "[bc]")]), name="tiny")
