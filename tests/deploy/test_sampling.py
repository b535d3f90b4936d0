"""Choosing tokens: the published rules, as transformers' own processors apply them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fusiontree import InputError
from fusiontree.deploy import sampling
from fusiontree.deploy.sampling import SamplingOptions, TokenSampler, choose_tokens
from fusiontree.deploy.text import StopText

VOCABULARY = 2000


def kept_by_transformers(scores: torch.Tensor, options: SamplingOptions) -> set[int]:
    ids = torch.zeros(1, 1, dtype=torch.long)
    scores = TemperatureLogitsWarper(options.temperature)(ids, scores[None].clone())
    if options.top_k is not None:
        scores = TopKLogitsWarper(options.top_k)(ids, scores)
    if options.top_p < 1:
        scores = TopPLogitsWarper(options.top_p)(ids, scores)
    if options.min_p > 0:
        scores = MinPLogitsWarper(options.min_p)(ids, scores)
    return set(scores[0].isfinite().nonzero()[:, 0].tolist())


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_the_tokens_that_can_be_drawn_are_those_of_transformers(scale: float) -> None:
    """Many rows at once, each with options of its own; flat distributions need more candidates than are looked at."""
    generator = torch.Generator().manual_seed(0)
    options = [
        SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        for temperature in (0.5, 1.5)
        for top_k in (None, 1, 30, 900, 5000)
        for top_p in (1.0, 0.9, 0.3)
        for min_p in (0.0, 0.05)
    ]
    logits = torch.randn(len(options), VOCABULARY, generator=generator) * scale
    restricted = sampling._restricted(logits, options)
    for row, scores, one in zip(restricted, logits, options, strict=True):
        ours, theirs = set(row.isfinite().nonzero()[:, 0].tolist()), kept_by_transformers(scores, one)
        assert len(ours ^ theirs) <= 1, one  # the last token of a sum of probabilities, by rounding
        top = scores.argmax().item()
        assert top in ours


def test_the_penalty_for_repetition_is_that_of_transformers() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1))
    sampler = TokenSampler(SamplingOptions(repetition_penalty=1.7), [3, 4, 4, 9], 50, "cpu")
    sampler.note(20)
    ours = logits[0].clone()
    sampler.change(ours)
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[3, 4, 4, 9, 20]]), logits.clone())
    assert torch.equal(ours, theirs[0])


def test_presence_frequency_and_bias_are_added_up() -> None:
    options = SamplingOptions(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={2: -100.0, 7: 3.0})
    sampler = TokenSampler(options, [5], 10, "cpu")
    for token in (7, 7, 1):
        sampler.note(token)
    scores = torch.zeros(10)
    sampler.change(scores)
    expected = torch.tensor([0, -0.75, -100, 0, 0, 0, 0, 3 - 1.0, 0, 0])
    assert torch.equal(scores, expected)


def test_a_row_chooses_the_same_beside_others() -> None:
    logits = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(2))
    options = [
        SamplingOptions(temperature=1.0, top_p=0.9, seed=1),
        SamplingOptions(repetition_penalty=2.0),
        SamplingOptions(temperature=0.8, top_k=5, seed=3),
    ]
    together = choose_tokens(logits, [TokenSampler(one, [1], VOCABULARY, "cpu") for one in options])
    for number, one in enumerate(options):
        alone = choose_tokens(logits[number : number + 1], [TokenSampler(one, [1], VOCABULARY, "cpu")])
        assert alone == [together[number]]


def test_a_row_without_numbers_has_no_choice_and_leaves_the_others_theirs() -> None:
    logits = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(2))
    logits[1, 3], logits[2, 5] = torch.nan, torch.inf
    logits[3, :5] = -torch.inf  # tokens that cannot come
    for options in (SamplingOptions(logprobs=1), SamplingOptions(temperature=1.0, top_p=0.9, seed=1)):
        together = choose_tokens(logits, [TokenSampler(options, [1], VOCABULARY, "cpu") for _ in range(4)])
        assert together[1:3] == [None, None]
        for row in (0, 3):
            alone = choose_tokens(logits[row : row + 1], [TokenSampler(options, [1], VOCABULARY, "cpu")])
            assert alone == [together[row]] and alone != [None]


def test_ids_past_the_vocabulary_are_never_chosen() -> None:
    logits = torch.zeros(2, 20)
    logits[:, 15:] = 100
    options = SamplingOptions(temperature=1.0, seed=0, logprobs=20)
    choices = choose_tokens(logits, [TokenSampler(one, [], 15, "cpu") for one in (options, SamplingOptions())])
    assert all(choice.token < 15 for choice in choices)
    assert len(choices[0].likeliest) == 15


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"min_p": -0.1}, "min_p must lie between 0 and 1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"presence_penalty": float("nan")}, "presence_penalty must be a finite number"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty must be a finite number"),
        ({"logit_bias": {-1: 0.0}}, "token ids are 0 or more, got -1"),
        ({"logit_bias": {1: float("inf")}}, "the bias of token 1 must be a finite number"),
        ({"logprobs": 21}, "logprobs must lie between 0 and 20"),
        ({"stop": ("",)}, "a stop string is empty"),
        ({"stop": ("a",) * 17}, "at most 16 stop strings"),
    ],
)
def test_options_out_of_range(fields: dict, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        SamplingOptions(**fields)


@settings(deadline=None, max_examples=300)
@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_a_stop_is_found_however_the_text_is_cut(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    results = []
    for way in (pieces, list(text), [text]):
        stop = StopText(stops)
        shown = "".join(map(stop.push, way)) + stop.finish()
        assert not any(one in shown for one in stops)
        results.append((shown, stop.stopped))
    assert results[0] == results[1] == results[2]
    assert text.startswith(results[0][0])
    assert results[0][1] == any(one in text for one in stops)
