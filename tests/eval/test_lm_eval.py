"""Tasks of lm-evaluation-harness: our adapter against a model that reads row after row, token after token."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from fusiontree import HybridLanguageModel, InputError, load
from fusiontree.eval.lm_eval_adapter import FusionTreeLM, evaluate_harness
from tiny_models import save_tiny_model

WORDS = "the quick brown fox jumps over a lazy dog while seven silver birds sing about rivers".split()
TASKS = ["birds", "rivers", "songs"]
DEFAULTS = {"dataset_path": "json", "test_split": "test", "num_fewshot": 0}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A question with choices, a text to predict and a text to write, of quite different lengths."""
    folder, draw = tmp_path_factory.mktemp("tasks"), random.Random(0)

    def words(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))

    rows = [{"question": "" if i == 3 else words(60), "choices": [f" {words(4)}" for _ in range(3)]} for i in range(8)]
    documents = [{"text": words(80)} for _ in range(5)]
    data = {
        "birds": [row | {"answer": draw.randrange(3)} for row in rows],
        "rivers": documents,
        "songs": [{"start": words(40), "rest": words(3)} for _ in range(6)],
    }
    settings: dict[str, dict[str, Any]] = {
        "birds": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
            "num_fewshot": 0,
        },
        "rivers": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        "songs": {
            "output_type": "generate_until",
            "doc_to_text": "{{start}}",
            "doc_to_target": "{{rest}}",
            "generation_kwargs": {"until": ["e", "\n"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name in TASKS:
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in data[name]))
        own = {"task": name, "dataset_kwargs": {"data_files": {"test": str(file)}}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(DEFAULTS | settings[name] | own))
    return folder


class OneByOne(LM):
    """One row at a time, without a cache and without padding; keeps what it was asked."""

    def __init__(self, model: HybridLanguageModel) -> None:
        super().__init__()
        self.model, self.tokenizer = model, model.tokenizer
        self.asked: dict[str, tuple[list[Any], list[Any]]] = {}

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        logarithms = self.model(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
        total, is_greedy = 0.0, True
        for place, token in enumerate(continuation, start=len(context) - 1):
            total += logarithms[place, token].item()
            is_greedy &= logarithms[place].argmax().item() == token
        return total, is_greedy

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        answers = []
        for context, continuation in (request.args for request in requests):
            before = self.ids(context) or [self.tokenizer.eos_token_id]
            rest = self.ids(context + continuation)[len(before) :] if context else self.ids(continuation)
            answers.append(self.score(before, rest))
        self.asked["loglikelihood"] = (requests, answers)
        return answers

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        answers = [self.score([self.tokenizer.eos_token_id], self.ids(request.args[0]))[0] for request in requests]
        self.asked["loglikelihood_rolling"] = (requests, answers)
        return answers

    @torch.no_grad()
    def generate_until(self, requests: list[Any]) -> list[str]:
        answers = []
        for context, wanted in (request.args for request in requests):
            prompt, new, text = self.ids(context), [], ""
            while len(new) < wanted["max_gen_toks"] and not any(stop in text for stop in wanted["until"]):
                token = self.model(torch.tensor([prompt + new])).logits[0, -1, : len(self.tokenizer)].argmax().item()
                if token == self.tokenizer.eos_token_id:
                    break
                new.append(token)
                text = self.tokenizer.decode(new)
            ends = [text.find(stop) for stop in wanted["until"] if stop in text]
            # A character that is not whole at the end is not written.
            answers.append(text[: min(ends, default=len(text))].rstrip("\N{REPLACEMENT CHARACTER}"))
        self.asked["generate_until"] = (requests, answers)
        return answers


@pytest.fixture(scope="module")
def reference(eval_model: HybridLanguageModel, tasks: Path) -> tuple[OneByOne, dict[str, Any]]:
    slow = OneByOne(eval_model)
    manager = TaskManager(include_path=tasks, include_defaults=False)
    return slow, simple_evaluate(slow, tasks=TASKS, task_manager=manager, bootstrap_iters=1000)


@pytest.mark.parametrize("piece", [100, 2048])
def test_answers_are_those_of_one_row_at_a_time(
    eval_model: HybridLanguageModel, reference: tuple[OneByOne, dict[str, Any]], piece: int
) -> None:
    """With small pieces, some rows share a padded batch and others are read in pieces."""
    seen = []
    lm = FusionTreeLM(eval_model, piece=piece, progress=lambda done, total: seen.append((done, total)))
    requests, expected = reference[0].asked["loglikelihood"]
    lengths = {len(lm.tok_encode("".join(request.args))) for request in requests}
    assert min(lengths) < 50 and 100 < max(lengths)
    found = lm.loglikelihood(requests)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    # In batches sums are rounded otherwise, which is all the difference.
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-6)
    assert seen[-1] == (24, 24)
    requests, expected = reference[0].asked["loglikelihood_rolling"]
    assert lm.loglikelihood_rolling(requests) == pytest.approx(expected, rel=1e-6)
    requests, expected = reference[0].asked["generate_until"]
    assert lm.generate_until(requests) == expected
    assert len({len(text) for text in expected}) > 2


def test_drawing_without_a_temperature_is_at_1(eval_model: HybridLanguageModel) -> None:
    def written(**how: Any) -> str:
        wanted = {"until": [], "max_gen_toks": 20, "seed": 1} | how
        request = Instance("generate_until", {}, ("the quick brown", wanted), 0)
        return FusionTreeLM(eval_model).generate_until([request])[0]

    drawn = written(do_sample=True)
    assert drawn == written(do_sample=True, temperature=1.0)
    assert drawn != written(do_sample=False) == written()


def test_figures_are_those_of_the_reference(
    eval_model: HybridLanguageModel, reference: tuple[OneByOne, dict[str, Any]], tasks: Path
) -> None:
    found = evaluate_harness(eval_model, TASKS, name="tiny", folder=tasks, piece=100)
    wanted = reference[1]["results"]
    for name in TASKS:
        (result,) = found[name]
        assert result.task == name and result.samples == {"birds": 8, "rivers": 5, "songs": 6}[name]
        assert {f"{metric},none" for metric in result.metrics} <= wanted[name].keys()
        for metric, value in result.metrics.items():
            exact = wanted[name][f"{metric},none"]
            if metric == "word_perplexity":  # an exponential, which magnifies how sums are rounded
                value, exact = math.log(value), math.log(exact)
            assert value == (pytest.approx(exact, rel=1e-6) if name == "rivers" else exact)
    assert found["birds"][0].errors["acc"] == wanted["birds"]["acc_stderr,none"]
    assert found["birds"][0].shots == 0
    assert evaluate_harness(eval_model, ["birds"], name="tiny", folder=tasks, limit=2)["birds"][0].samples == 2


def test_a_learned_time_encoding_bounds_what_is_read(
    corpus: Path, tmp_path: Path, reference: tuple[OneByOne, dict[str, Any]]
) -> None:
    model = load(save_tiny_model(tmp_path, corpus / "tokenizer", srte_encoding="learned"), device="cpu")
    slow, lm = OneByOne(model), FusionTreeLM(model)
    requests = reference[0].asked["loglikelihood"][0]
    rows = [lm._encode_pair(*request.args) if request.args[0] else None for request in requests]
    longest = max((row for row in rows if row), key=lambda row: sum(map(len, row)))
    assert sum(map(len, longest)) > 97
    request = requests[rows.index(longest)]
    expected = slow.score(([*longest[0], *longest[1]])[-97 : -len(longest[1])], longest[1][:-1])[0]
    (answer,) = lm.loglikelihood([request])
    assert answer[0] < expected < 0  # the last token's logarithm lies between them
    assert all(len(text) > 0 for text in lm.generate_until(reference[0].asked["generate_until"][0]))
    documents = reference[0].asked["loglikelihood_rolling"][0]
    assert all(value < 0 for value in lm.loglikelihood_rolling(documents))


def test_what_cannot_be_run_is_a_sentence(eval_model: HybridLanguageModel, tasks: Path, tmp_path: Path) -> None:
    task = yaml.safe_load((tasks / "songs.yaml").read_text())
    lost = {"task": "lost", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "nowhere.jsonl")}}}
    (tmp_path / "lost.yaml").write_text(yaml.safe_dump(task | lost))
    (tmp_path / "code.yaml").write_text(yaml.safe_dump(task | {"task": "code", "unsafe_code": True}))
    beams = {"task": "beams", "generation_kwargs": {"until": ["\n"], "num_beams": 4}}
    (tmp_path / "beams.yaml").write_text(yaml.safe_dump(task | beams))
    with pytest.raises(InputError, match="the task 'lost' cannot be loaded: "):
        evaluate_harness(eval_model, ["lost"], name="tiny", folder=tmp_path)
    with pytest.raises(InputError, match="the task 'code' runs code that the model writes"):
        evaluate_harness(eval_model, ["code"], name="tiny", folder=tmp_path)
    with pytest.raises(InputError, match="the task asks for 'num_beams' in generating"):
        evaluate_harness(eval_model, ["beams"], name="tiny", folder=tmp_path)


@pytest.mark.slow  # it reads the harness's thousands of task files
def test_a_task_that_there_is_not(eval_model: HybridLanguageModel, tasks: Path) -> None:
    with pytest.raises(InputError, match=r"there is no task 'brids' in .* did you mean 'birds'"):
        evaluate_harness(eval_model, ["brids"], name="tiny", folder=tasks)
