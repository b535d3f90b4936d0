"""Generating text: the same text whatever the way to it, and nothing but whole characters on the way."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusiontree import HybridLanguageModel, InputError, generate, load
from fusiontree.deploy.runtime import InferenceRuntime, SchedulerSettings
from fusiontree.deploy.text import TextDecoder
from tiny_models import save_tiny_model

PROMPTS = ["the quick brown fox", "a lazy dog while seven silver birds sing about rivers", "学而"]
SAMPLING = {"temperature": 0.9, "top_k": 200, "top_p": 0.95, "seed": 7}


@pytest.fixture(scope="module")
def runtime(model: HybridLanguageModel) -> InferenceRuntime:
    return InferenceRuntime(model)


def test_greedy_takes_the_likeliest_token_each_time(model: HybridLanguageModel) -> None:
    (text,) = generate(model, PROMPTS[:1], max_new_tokens=8)
    ids = model.tokenizer(PROMPTS[0])["input_ids"]
    for _ in range(8):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[
                0, -1, :300
            ]  # the embeddings past the tokenizer's 300 are padding
        ids.append(int(logits.argmax()))
    decoder = TextDecoder(model.tokenizer, ids[:-8])
    assert text == "".join([*map(decoder.push, ids[-8:]), decoder.finish()])


@pytest.mark.parametrize("options", [{}, SAMPLING], ids=["greedy", "sampled"])
def test_a_prompt_alone_gives_what_it_gives_in_a_batch(runtime: InferenceRuntime, options: dict) -> None:
    together = runtime.generate(PROMPTS, max_new_tokens=12, **options)
    seed = options.get("seed")
    for index, prompt in enumerate(PROMPTS):
        alone = options | ({"seed": seed + index} if seed is not None else {})
        assert runtime.generate(prompt, max_new_tokens=12, **alone) == [together[index]]


@pytest.mark.parametrize("options", [{}, SAMPLING], ids=["greedy", "sampled"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_stream_is_the_text(runtime: InferenceRuntime, prompt: str, options: dict) -> None:
    pieces = list(runtime.stream(prompt, max_new_tokens=24, **options))
    assert len(pieces) > 1
    assert "".join(pieces) == runtime.generate(prompt, max_new_tokens=24, **options)[0]


def test_seeds_decide_and_other_random_state_is_left_alone(runtime: InferenceRuntime) -> None:
    before = torch.get_rng_state()
    first = runtime.generate(PROMPTS[0], max_new_tokens=12, **SAMPLING)
    assert torch.equal(torch.get_rng_state(), before)
    assert runtime.generate(PROMPTS[0], max_new_tokens=12, **SAMPLING) == first
    assert runtime.generate(PROMPTS[0], max_new_tokens=12, **(SAMPLING | {"seed": 8})) != first
    same, other = runtime.generate([PROMPTS[0]] * 2, max_new_tokens=12, **SAMPLING)
    assert same != other
    torch.manual_seed(3)
    unseeded = runtime.generate(PROMPTS[0], max_new_tokens=12, temperature=1.0)
    assert runtime.generate(PROMPTS[0], max_new_tokens=12, temperature=1.0) != unseeded
    torch.manual_seed(3)
    assert runtime.generate(PROMPTS[0], max_new_tokens=12, temperature=1.0) == unseeded


def test_draws_follow_the_models_probabilities(model: HybridLanguageModel) -> None:
    """600 first tokens against the softmax of the logits, at temperature 2 among the 12 likeliest."""
    ids = model.tokenizer(PROMPTS[0])["input_ids"]
    with torch.no_grad():
        top = (model(torch.tensor([ids])).logits[0, -1, :300] / 2).topk(12)
    expected: dict[str, float] = {}
    for token, probability in zip(top.indices.tolist(), top.values.softmax(0).tolist(), strict=True):
        decoder = TextDecoder(model.tokenizer, ids)
        text = decoder.push(token) or decoder.finish()  # parts of characters all look alike
        expected[text] = expected.get(text, 0) + probability
    runtime = InferenceRuntime(model, settings=SchedulerSettings(prefix_bytes=10**6))  # which reads the prompt once
    options = {"max_new_tokens": 1, "temperature": 2.0, "top_k": 12, "seed": 0}
    drawn: dict[str, float] = {}
    for text in runtime.generate([PROMPTS[0]] * 600, **options):
        drawn[text] = drawn.get(text, 0) + 1 / 600
    assert len(expected) > 2
    for text, probability in expected.items():
        assert drawn.get(text, 0) == pytest.approx(probability, abs=4 * (probability / 600) ** 0.5)
    assert sum(drawn.values()) == pytest.approx(1)


def test_top_p_leaves_the_unlikely_out(model: HybridLanguageModel) -> None:
    texts = generate(model, [PROMPTS[0]] * 20, max_new_tokens=6, temperature=1.0, top_p=1e-6, seed=1)
    assert set(texts) == set(generate(model, PROMPTS[0], max_new_tokens=6))


def test_ids_that_no_token_has_are_never_chosen(tiny_folder: Path) -> None:
    model = load(tiny_folder, device="cpu")
    with torch.no_grad():
        # Every id of the padding becomes the likeliest of all.
        model.lm_head.weight[300:] = 50 * model.lm_head.weight[:300].abs().max() * torch.randn(20, 32).sign()
    runtime = InferenceRuntime(model)
    assert len("".join(runtime.generate(PROMPTS, max_new_tokens=20))) > 20


def test_beams_are_those_of_transformers_that_reads_all_anew(model: HybridLanguageModel) -> None:
    """Without a state there is nothing to reorder wrongly. Ids that no token has, likely ones here, are barred."""
    barred, ends = list(range(300, model.config.vocab_size)), model.tokenizer.eos_token_id
    texts = generate(model, PROMPTS, num_beams=4, max_new_tokens=8)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
        settings = {"suppress_tokens": barred, "eos_token_id": ends, "pad_token_id": ends, "use_cache": False}
        found = model.generate(ids, num_beams=4, max_new_tokens=8, do_sample=False, **settings)
        new = [token for token in found[0, ids.shape[1] :].tolist() if token != ends]
        decoder = TextDecoder(model.tokenizer, ids[0].tolist())
        assert text == "".join([*map(decoder.push, new), decoder.finish()])


def test_a_text_ends_at_the_end_token(tiny_folder: Path) -> None:
    model = load(tiny_folder, device="cpu")
    runtime = InferenceRuntime(model)
    with torch.no_grad():
        text = runtime.generate(PROMPTS[0], max_new_tokens=12)[0]
        ids = model.generate(
            torch.tensor([model.tokenizer(PROMPTS[0])["input_ids"]]),
            max_new_tokens=12,
            do_sample=False,
            suppress_tokens=list(range(len(model.tokenizer), model.config.vocab_size)),  # as the runtime does
        )[0, -12:]
    model.generation_config.eos_token_id = [int(ids[6]), 299]
    ended = runtime.generate([PROMPTS[0], PROMPTS[1]], max_new_tokens=12)[0]
    assert text.startswith(ended) and len(ended) < len(text)
    assert "".join(runtime.stream(PROMPTS[0], max_new_tokens=12)) == ended


def test_long_prompts_are_read_in_pieces_with_the_same_result(model: HybridLanguageModel) -> None:
    prompts = [" ".join(PROMPTS) * 6, PROMPTS[0]]
    whole = generate(model, prompts, max_new_tokens=10)
    pieces = InferenceRuntime(model, settings=SchedulerSettings(prefill_piece=16))
    assert pieces.generate(prompts, max_new_tokens=10) == whole


def test_leaving_a_stream_ends_its_generation(runtime: InferenceRuntime) -> None:
    with runtime.stream(PROMPTS[0], max_new_tokens=100_000) as stream:
        next(stream)
        assert runtime.scheduler.running == 1
    assert runtime.scheduler.is_idle and list(stream) == []
    forgotten = runtime.stream(PROMPTS[0], max_new_tokens=100_000)
    next(forgotten)
    del forgotten
    assert runtime.generate(PROMPTS[0], max_new_tokens=2) and runtime.scheduler.is_idle


def test_streams_of_one_runtime_run_together(runtime: InferenceRuntime) -> None:
    alone = [runtime.generate(prompt, max_new_tokens=16)[0] for prompt in PROMPTS]
    streams = [runtime.stream(prompt, max_new_tokens=16) for prompt in PROMPTS]
    texts = [""] * len(streams)
    for pieces in itertools.zip_longest(*streams, fillvalue=""):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    assert texts == alone


def test_errors_inside_a_stream_reach_every_reader(runtime: InferenceRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments, **options):
        raise RuntimeError("out of memory")

    first, second = runtime.stream(PROMPTS[0]), runtime.stream(PROMPTS[1])
    next(first)
    with monkeypatch.context() as patch:
        patch.setattr(runtime.model, "backbone", fail)
        for stream in (first, second):
            with pytest.raises(RuntimeError, match="out of memory"):
                list(stream)
    assert runtime.scheduler.is_idle and runtime.scheduler.state_bytes == 0
    assert runtime.generate(PROMPTS[0], max_new_tokens=4)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature must be a finite number of at least 0"),
        ({"temperature": float("nan")}, "temperature must be a finite number of at least 0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, "top_p must lie above 0"),
        ({"top_p": 1.5}, "top_p must lie above 0"),
        ({"seed": 2**63}, "seed must lie between"),
        ({"num_beams": 0}, "num_beams must be at least 1"),
        ({"num_beams": 2, "temperature": 0.5}, "set temperature to 0"),
    ],
)
def test_options_out_of_range(runtime: InferenceRuntime, options: dict, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        runtime.generate(PROMPTS, **options)


def test_prompts_that_cannot_be_read(runtime: InferenceRuntime, learned_folder: Path) -> None:
    assert runtime.generate([]) == []
    with pytest.raises(InputError, match="the prompt is empty: give at least one character"):
        runtime.generate("")
    with pytest.raises(InputError, match="prompt 2 is empty"):
        runtime.generate(["the", ""])
    learned = InferenceRuntime(load(learned_folder, device="cpu"))
    with pytest.raises(InputError, match=r"has 100 tokens, .*time encoding \(SRTE\) ends after 96 positions"):
        learned.generate("\n" * 100)
    with pytest.raises(InputError, match="prompt 2 has 100 tokens"):
        learned.generate(["a", "\n" * 100], max_new_tokens=4)
    with pytest.raises(InputError, match="has 90 tokens and 8 new ones are asked for.* at most 7 new ones"):
        learned.generate("\n" * 90, max_new_tokens=8)
    learned.generate("\n" * 90, max_new_tokens=7)


def test_a_model_without_a_tokenizer_needs_one(tmp_path: Path, corpus: Path, model: HybridLanguageModel) -> None:
    bare = load(save_tiny_model(tmp_path, None), device="cpu")
    with pytest.raises(InputError, match="holds no tokenizer: pass the one"):
        generate(bare, "the")
    assert generate(bare, "the", tokenizer=model.tokenizer, max_new_tokens=4)


@settings(deadline=None, max_examples=60)
@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=40), st.text(max_size=8))
def test_any_text_streams_in_whole_characters(model: HybridLanguageModel, text: str, prompt: str) -> None:
    text = text.replace("\N{REPLACEMENT CHARACTER}", "?").encode("utf-8", "ignore").decode()
    prompt = prompt.encode("utf-8", "ignore").decode()
    tokenizer = model.tokenizer
    decoder = TextDecoder(tokenizer, tokenizer(prompt)["input_ids"])
    pieces = [decoder.push(token) for token in tokenizer(text)["input_ids"]]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "".join([*pieces, decoder.finish()]) == text


def test_a_character_cut_off_at_the_end_is_left_out(model: HybridLanguageModel) -> None:
    ids = model.tokenizer("a好")["input_ids"]
    decoder = TextDecoder(model.tokenizer, [])
    assert "".join([*map(decoder.push, ids[:-1]), decoder.finish()]) == "a"
