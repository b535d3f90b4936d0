"""Tasks in texts, against one plain pass over each document and the likeliest token at every place of an answer."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from fusiontree import HybridLanguageModel, InputError, load
from fusiontree.artifacts import AnswerStatistics, TaskReport
from fusiontree.data.augment import MIN_TOKENS, LongContextTasks
from fusiontree.eval.text_tasks import evaluate_tasks
from fusiontree.eval.texts import Texts
from tiny_models import save_tiny_model

ENGLISH = "The river runs past the old mill. Two boats lie there! "
DOCUMENTS = [
    ENGLISH * 3,
    "too short",
    ENGLISH * 12,
    "学而时习之，不亦说乎？有朋自远方来，不亦乐乎？" * 2,
    *(f"Number {i}. " + ENGLISH * 2 for i in range(6)),
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS), encoding="utf-8")
    return Texts([str(path)])


Definition = dict[str, list[tuple[int, list[bool], list[float]]]]
"""Of each kind: distance, and for each of the answer's tokens whether it is the likeliest one, and its loss."""


def augmented(tokenizer, seed: int = 0, kinds: tuple[float, float] = (1.0, 1.0)):
    """(ids, answers) of each document that carries tasks."""
    writer = LongContextTasks(
        needle_in_haystack_prob=kinds[0],
        structured_task_prob=kinds[1],
        seed=seed,
        encode=lambda text: tokenizer(text)["input_ids"],
        decode=tokenizer.decode,
    )
    for number, text in enumerate(DOCUMENTS):
        # All is marked as read, so that what is not so marked afterwards is an answer.
        signed, answers = writer.write(~np.array(tokenizer(text)["input_ids"], dtype=np.int32), 0, number)
        if answers:
            places = [place for answer in answers for place in range(answer.start, answer.stop)]
            assert places == np.flatnonzero(signed >= 0).tolist()
            yield torch.from_numpy(np.where(signed < 0, ~signed, signed)).long(), answers


def definition(model: HybridLanguageModel, **options) -> Definition:
    found: Definition = defaultdict(list)
    for ids, answers in augmented(model.tokenizer, **options):
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        for answer in answers:
            before, target = logits[answer.start - 1 : answer.stop - 1], ids[answer.start : answer.stop]
            losses = -before.log_softmax(-1).gather(1, target[:, None])[:, 0]
            found[answer.kind].append((answer.distance, (before.argmax(-1) == target).tolist(), losses.tolist()))
    return found


@pytest.fixture(scope="module")
def model(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> HybridLanguageModel:
    """Random, with a head that answers some questions, and of some answers all but the last token."""
    folder = save_tiny_model(tmp_path_factory.mktemp("head"), corpus / "tokenizer", tie_word_embeddings=False)
    model = load(folder, device="cpu")
    states, targets, needles, recalled = [], [], 0, 0
    for ids, answers in augmented(model.tokenizer):
        with torch.no_grad():
            hidden = model.backbone(input_ids=ids[None]).last_hidden_state[0]
        for answer in answers:
            stop = answer.stop
            if answer.kind == "needle" and needles < 3:
                needles += 1
                stop -= needles == 3  # of the third the last token is left out
            elif answer.kind == "recall" and recalled < 2:
                recalled += 1
            else:
                continue
            states.append(hidden[answer.start - 1 : stop - 1])
            targets.append(ids[answer.start : stop])
    hidden_MH, target_M = torch.cat(states), torch.cat(targets)
    assert needles == 3 and recalled == 2 and len(target_M) <= model.config.hidden_size
    one_hot_MV = torch.nn.functional.one_hot(target_M, model.config.vocab_size).float()
    with torch.no_grad():
        # Fewer tokens than dimensions: the head that gives each its own id a logit of 8 and every other 0 exists.
        model.lm_head.weight.copy_(8 * (torch.linalg.pinv(hidden_MH.double()) @ one_hot_MV.double()).T)
    return model


def assert_sums(shown: AnswerStatistics, expected: list[tuple[int, list[bool], list[float]]]) -> None:
    losses = [loss for _, _, losses in expected for loss in losses]
    assert (shown.answers, shown.tokens) == (len(expected), len(losses))
    assert shown.right == pytest.approx(sum(all(right) for _, right, _ in expected) / len(expected))
    assert shown.loss == pytest.approx(sum(losses) / len(losses), abs=1e-4)


@pytest.mark.parametrize("piece", [16, 300, 100_000])
def test_answers_are_scored_as_by_the_definition(model: HybridLanguageModel, texts: Texts, piece: int) -> None:
    expected = definition(model)
    report = evaluate_tasks(model, texts, name="tiny", piece=piece)
    assert [result.task for result in report.results] == ["needle", "recall", "copy"]
    for result in report.results:
        assert_sums(result, expected[result.task])
        assert sum(bucket.answers for bucket in result.by_distance) == result.answers
        for bucket in result.by_distance:
            assert bucket.end == max(64, 2 * bucket.start)
            assert_sums(bucket, [one for one in expected[result.task] if bucket.start <= one[0] < bucket.end])
    assert len(report.results[0].by_distance) > 1
    assert (report.documents, report.too_short, report.written) == (9, 1, ["needle", "structured"])
    assert report.tokens == sum(len(ids) for ids, _ in augmented(model.tokenizer))
    # Two needles are found; of a third all but the last token, which does not count.
    needles = [right for _, right, _ in expected["needle"]]
    assert sum(map(all, needles)) == 2
    assert any(all(right[:-1]) and not right[-1] for right in needles)
    assert 0 < report.results[1].right < 1


def test_one_task_alone_and_another_seed(model: HybridLanguageModel, texts: Texts) -> None:
    alone = evaluate_tasks(model, texts, ["needle"], name="tiny", seed=3)
    (result,) = alone.results
    expected = definition(model, seed=3, kinds=(1.0, 0.0))
    assert list(expected) == ["needle"]
    assert_sums(result, expected["needle"])
    structured = evaluate_tasks(model, texts, ["structured"], name="tiny", seed=3)
    assert {result.task for result in structured.results} == {"recall", "copy"}
    assert evaluate_tasks(model, texts, ["needle"], name="tiny").results != alone.results
    assert evaluate_tasks(model, texts, ["needle"], name="tiny", seed=3) == alone


def test_a_limit_counts_the_texts_alone(model: HybridLanguageModel, texts: Texts) -> None:
    first = len(model.tokenizer(DOCUMENTS[0])["input_ids"])
    seen = []

    def limited(max_tokens: int) -> TaskReport:
        return evaluate_tasks(
            model, texts, name="tiny", max_tokens=max_tokens, progress=lambda read, tokens: seen.append((read, tokens))
        )

    one = limited(first - 1)
    assert (one.documents, one.too_short) == (1, 0)
    assert seen == [(len(DOCUMENTS[0]), one.tokens)]
    assert limited(first + 30).documents == 2


def test_autocast_is_near_float32(model: HybridLanguageModel, texts: Texts) -> None:
    exact = evaluate_tasks(model, texts, name="tiny")
    rounded = evaluate_tasks(model, texts, name="tiny", mixed_precision="bf16")
    for one, other in zip(exact.results, rounded.results, strict=True):
        assert one.loss != other.loss
        assert other.loss == pytest.approx(one.loss, rel=0.05)


def test_texts_too_short_for_a_task(model: HybridLanguageModel, tmp_path: Path) -> None:
    (tmp_path / "short.jsonl").write_text('{"text": "the fox"}\n{"text": "a dog"}\n')
    with pytest.raises(InputError, match=f"none of the 2 documents of the evaluation data has the {MIN_TOKENS} tokens"):
        evaluate_tasks(model, Texts([str(tmp_path / "short.jsonl")]), name="tiny")


def test_bad_arguments(model: HybridLanguageModel, texts: Texts) -> None:
    with pytest.raises(InputError, match="tasks: there is no task 'needles'; did you mean 'needle'"):
        evaluate_tasks(model, texts, ["needles"], name="tiny")
    with pytest.raises(InputError, match="tasks names no task; there are needle and structured"):
        evaluate_tasks(model, texts, [], name="tiny")
    with pytest.raises(InputError, match="pieces of at least 2 tokens, got 1"):
        evaluate_tasks(model, texts, name="tiny", piece=1)
