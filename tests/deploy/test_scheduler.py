"""Continuous batching: a row's text is its own, whatever joins, leaves or was read before."""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from fusiontree import HybridLanguageModel, InputError, load
from fusiontree.deploy.sampling import SamplingOptions
from fusiontree.deploy.scheduler import Scheduler, SchedulerSettings
from fusiontree.deploy.sequences import Delta, Sequence
from fusiontree.deploy.slots import program_rows, state_bytes
from fusiontree.eval.near_ties import compare_greedy
from tiny_models import save_tiny_model

MODELS: dict[str, dict[str, Any]] = {
    "default": {},
    "mamba 1": {"mamba_version": 1},
    "grouped": {"num_kv_heads": 2},
    "no global heads": {"global_heads": 0},
    "pruned": {"num_layers": 3, "layer_branches": ["both", "mamba", "attention"]},
    "learned": {"srte_encoding": "learned"},
}


@pytest.fixture(scope="module", params=MODELS)
def any_model(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: Any) -> HybridLanguageModel:
    folder = save_tiny_model(tmp_path_factory.mktemp("model"), corpus / "tokenizer", **MODELS[request.param])
    return load(folder, device="cpu")


class Client:
    """Submits prompts and keeps what comes back."""

    def __init__(self, model: HybridLanguageModel, **settings: Any) -> None:
        self.model = model
        self.scheduler = Scheduler(model, model.tokenizer, SchedulerSettings(**({"prefill_piece": 8} | settings)))
        self.deltas: dict[Sequence, list[Delta]] = {}

    def submit(self, prompt: list[int], new: int = 12, **fields: Any) -> Sequence:
        options = SamplingOptions(max_new_tokens=new, **fields.pop("options", {}))
        deltas: list[Delta] = []
        sequence = Sequence(prompt, options, deltas.append, **fields)
        self.deltas[sequence] = deltas
        self.scheduler.submit(sequence)
        return sequence

    def run(self) -> None:
        while not self.scheduler.is_idle:
            self.scheduler.step()

    def ids_alone(self, prompt: list[int], new: int) -> list[int]:
        sequence = Client(self.model).submit_and_run(prompt, new)
        return sequence.generated

    def submit_and_run(self, prompt: list[int], new: int = 12, **fields: Any) -> Sequence:
        sequence = self.submit(prompt, new, **fields)
        self.run()
        return sequence

    def text(self, sequence: Sequence) -> str:
        return "".join(delta.text for delta in self.deltas[sequence])


def draw_prompt(draw: random.Random, length: int) -> list[int]:
    return [draw.randrange(4, 300) for _ in range(length)]


def test_rows_that_join_and_leave_at_random_change_nothing_for_the_others(any_model: HybridLanguageModel) -> None:
    draw, client = random.Random(3), Client(any_model, max_rows=4, prefix_bytes=200_000)
    shared, sequences = draw_prompt(draw, 16), []
    for _ in range(16):
        prompt = (shared if draw.random() < 0.4 else []) + draw_prompt(draw, draw.randint(1, 20))
        sequences.append(client.submit(prompt, draw.randint(1, 20)))
        for _ in range(draw.randint(0, 3)):
            client.scheduler.step()
        if draw.random() < 0.2:
            draw.choice(sequences).cancel()
    client.run()
    assert client.scheduler.state_bytes == 0 and client.scheduler.counts.peak_rows == 4
    verdicts: Counter[str] = Counter()
    for sequence in sequences:
        alone = client.ids_alone(sequence.prompt, sequence.options.max_new_tokens)
        if sequence.finish_reason == "cancelled":
            alone = alone[: len(sequence.generated)]
        verdicts[compare_greedy(any_model, sequence.prompt, sequence.generated, alone)] += 1
    print(dict(verdicts))
    assert verdicts["different"] == 0 and verdicts["equal"] >= 13
    reasons = Counter(sequence.finish_reason for sequence in sequences)
    assert reasons["length"] >= 8 and reasons["cancelled"] >= 1


def test_rows_are_those_of_transformers_generate(model: HybridLanguageModel) -> None:
    draw, client = random.Random(5), Client(model)
    sequences = [client.submit(draw_prompt(draw, length), 16) for length in (1, 7, 8, 9, 30)]
    client.run()
    for sequence in sequences:
        ids = torch.tensor([sequence.prompt])
        expected = model.generate(ids, max_new_tokens=16, do_sample=False, suppress_tokens=list(range(300, 320)))
        verdict = compare_greedy(model, sequence.prompt, sequence.generated, expected[0, ids.shape[1] :].tolist())
        assert verdict != "different"


def test_rows_outgrow_their_class_and_go_on(model: HybridLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusiontree.deploy.slots._SHORTEST_CLASS", 16)
    draw, client = random.Random(6), Client(model)
    sequences = [client.submit(draw_prompt(draw, length), 55) for length in (3, 15, 16, 17, 70)]
    client.run()
    monkeypatch.undo()
    for sequence in sequences:
        alone = client.ids_alone(sequence.prompt, 55)
        assert compare_greedy(model, sequence.prompt, sequence.generated, alone) != "different"


def test_a_draw_does_not_depend_on_the_neighbours(model: HybridLanguageModel) -> None:
    draw, prompt = random.Random(4), [5, 6, 7, 8]
    options = {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 11}
    alone = Client(model).submit_and_run(prompt, 20, options=options)
    client = Client(model)
    for number in range(4):
        client.submit(draw_prompt(draw, 5), 20, options={"temperature": 1.5, "seed": number})
    beside = client.submit_and_run(prompt, 20, options=options)
    assert beside.generated == alone.generated


def test_memory_decides_how_many_run(model: HybridLanguageModel) -> None:
    row = state_bytes(model.config, torch.float32, 1024)
    client = Client(model, state_bytes=3 * row)
    sequences = [client.submit([5, 6, 7, number], 40) for number in range(4, 12)]
    client.run()
    assert client.scheduler.counts.peak_rows == 3
    assert client.scheduler.counts.peak_bytes <= 3 * row
    assert all(sequence.finish_reason == "length" for sequence in sequences)
    with pytest.raises(InputError, match=r"whose state takes [\d,]+ bytes, but the budget of states is"):
        client.submit([5] * 20, 10_000)
    assert client.submit_and_run([5] * 20, 8).finish_reason == "length"


def test_the_idle_rows_of_compiled_steps_count(model: HybridLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program is for 1, 2, 4 or 8 rows here; whatever runs, the buffers stay within the budget."""
    monkeypatch.setattr(type(model), "decodes_compiled", True)
    budget = 6 * state_bytes(model.config, torch.float32, 1024)
    client = Client(model, state_bytes=budget, max_rows=8)
    draw = random.Random(2)
    for _ in range(8):
        client.submit(draw_prompt(draw, 9), 5)
    client.run()
    assert 1 < client.scheduler.counts.peak_rows <= 3
    assert client.scheduler.counts.peak_bytes <= budget
    assert all(deltas[-1].finish_reason == "length" for deltas in client.deltas.values())


def test_the_bytes_of_a_row_are_those_of_its_tensors(any_model: HybridLanguageModel) -> None:
    from fusiontree import HybridCache

    cache = HybridCache(any_model.config, capacity=70)
    with torch.no_grad():
        any_model(torch.tensor([[5, 6, 7]]), past_key_values=cache)
    assert cache.nbytes == state_bytes(any_model.config, torch.float32, 70)


def test_reading_on_from_a_snapshot_on_the_grid_repeats_the_same_bits(any_model: HybridLanguageModel) -> None:
    draw = random.Random(7)
    shared = draw_prompt(draw, 37)
    first, second = shared + draw_prompt(draw, 9), shared + draw_prompt(draw, 20)
    settings = {"prefix_bytes": 10**7, "snapshot_interval": 16}
    warm, cold = Client(any_model, **settings), Client(any_model, **settings)
    warm.submit_and_run(first, 2)
    hit, miss = warm.submit_and_run(second, 20), cold.submit_and_run(second, 20)
    assert (hit.cached_tokens, miss.cached_tokens) == (32, 0)
    assert (warm.scheduler.prefixes.counts.hits, warm.scheduler.prefixes.counts.misses) == (1, 1)
    kept = [client.scheduler.prefixes.find(second) for client in (warm, cold)]
    assert [one.tokens for one in kept] == [57, 57]
    assert torch.equal(kept[0].logits, kept[1].logits)
    states = [client.scheduler.prefixes.restore(one, 57) for client, one in zip((warm, cold), kept, strict=True)]
    for ours, theirs in zip(*(state.layers for state in states), strict=True):
        assert ours.tensors().keys() == theirs.tensors().keys()
        assert all(torch.equal(tensor, theirs.tensors()[name]) for name, tensor in ours.tensors().items())
    assert hit.generated == miss.generated
    # The same prompt once more needs no reading at all.
    again = warm.submit_and_run(second, 20)
    assert again.cached_tokens == 57 and again.generated == hit.generated


def test_a_snapshot_on_the_way_has_no_logits_of_the_one_it_goes_on_from(model: HybridLanguageModel) -> None:
    prompt = draw_prompt(random.Random(3), 24)
    warm = Client(model, prefix_bytes=10**7, snapshot_interval=16)
    warm.submit_and_run(prompt[:8], 2)  # ends on the grid, and is kept with its logits
    warm.submit_and_run(prompt, 2)  # goes on from there, and leaves a snapshot of 16 tokens
    found = warm.scheduler.prefixes.find([*prompt[:16], 1])
    assert found is not None and found.tokens == 16 and found.logits is None
    assert warm.submit_and_run(prompt[:16], 12).generated == Client(model).submit_and_run(prompt[:16], 12).generated


def test_snapshots_off_the_grid_are_as_good_up_to_rounding(model: HybridLanguageModel) -> None:
    draw = random.Random(8)
    first = draw_prompt(draw, 13)  # its end lies off the grid of 8
    longer = first + draw_prompt(draw, 30)
    warm, cold = Client(model, prefix_bytes=10**7, snapshot_interval=8), Client(model)
    warm.submit_and_run(first, 2)
    hit, miss = warm.submit_and_run(longer, 1, options={"logprobs": 20}), None
    assert hit.cached_tokens == 13
    miss = cold.submit_and_run(longer, 1, options={"logprobs": 20})
    ours, theirs = (dict(client.deltas[one][-1].choices[0].likeliest) for client, one in ((warm, hit), (cold, miss)))
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[token] - theirs[token]) for token in ours) < 1e-4
    # What was read off the grid leaves no snapshots that claim to be exact.
    lengths = {snapshot.tokens for snapshot in warm.scheduler.prefixes._snapshots.values()}
    assert lengths == {8, 13, 43}


def test_a_conversation_goes_on_from_where_it_ended(model: HybridLanguageModel) -> None:
    client = Client(model, prefix_bytes=10**7)
    first = client.submit_and_run([5, 6, 7, 8, 9], 10, keep_state=True)
    said = [*first.prompt, *first.generated]
    then = client.submit_and_run([*said, 11, 12], 10)
    assert then.cached_tokens == len(said) - 1
    found = client.scheduler.prefixes.find(said)
    assert found is not None and [part.tokens for part in found.path()] == [5, 14]  # which shares the prompt's keys
    alone = client.ids_alone(then.prompt, 10)
    assert compare_greedy(model, then.prompt, then.generated, alone) != "different"


def test_snapshots_share_their_keys_and_go_by_least_recent_use(model: HybridLanguageModel) -> None:
    draw = random.Random(9)
    client = Client(model, prefix_bytes=10**9, snapshot_interval=8)
    prompts = [draw_prompt(draw, 80) for _ in range(3)]
    sizes = []
    for prompt in prompts:
        client.submit_and_run(prompt, 1)
        sizes.append(client.scheduler.prefixes.nbytes)
    keys = 2 * model.config.num_layers * 2 * model.config.head_dim * 4  # bytes of one token's global keys and values
    fixed = state_bytes(model.config, torch.float32, 0) - keys
    assert sizes[0] == 10 * fixed + 80 * keys + 320 * 4
    store = client.scheduler.prefixes
    store.budget = sizes[0] * 2
    client.submit_and_run(prompts[0], 1)  # now the latest used
    client.submit_and_run([*prompts[0], 5], 1)
    assert store.nbytes <= store.budget and store.counts.evictions > 0
    assert store.find(prompts[0]) is not None
    found = store.find(prompts[1])
    assert found is None or found.tokens < 80  # used least recently, from its end on
    # What is larger than the budget is not kept, and does no harm.
    store.budget = 10
    assert client.submit_and_run(draw_prompt(draw, 20), 3).finish_reason == "length"
    assert len(store) == 0 and store.nbytes == 0


def test_forks_share_the_keys_of_what_they_both_begin_with(model: HybridLanguageModel) -> None:
    draw = random.Random(10)
    shared, ends = draw_prompt(draw, 80), [draw_prompt(draw, 8) for _ in range(2)]
    client = Client(model, prefix_bytes=10**9, snapshot_interval=8)
    for end in ends:
        client.submit_and_run([*shared, *end], 1)
    separate = []
    for end in ends:
        apart = Client(model, prefix_bytes=10**9, snapshot_interval=8)
        apart.submit_and_run([*shared, *end], 1)
        separate.append(apart.scheduler.prefixes.nbytes)
    keys = 2 * model.config.num_layers * 2 * model.config.head_dim * 4  # bytes of one token's global keys and values
    fixed = state_bytes(model.config, torch.float32, 0) - keys
    assert client.scheduler.prefixes.nbytes == sum(separate) - 10 * fixed - 80 * keys
    kept = [client.scheduler.prefixes.find([*shared, *end]) for end in ends]
    assert kept[0].parent is kept[1].parent and kept[0].parent.tokens == 80


def test_prompts_of_a_group_are_read_once(model: HybridLanguageModel) -> None:
    client, group = Client(model), object()
    prompt = list(range(5, 45))
    sequences = [client.submit(prompt, 8, group=group, options={"temperature": 1.0, "seed": seed}) for seed in range(4)]
    client.run()
    assert client.scheduler.counts.prompt_tokens == len(prompt)
    for seed, sequence in enumerate(sequences):
        alone = Client(model).submit_and_run(prompt, 8, options={"temperature": 1.0, "seed": seed})
        assert sequence.generated == alone.generated


def test_short_prompts_are_read_side_by_side(any_model: HybridLanguageModel) -> None:
    draw, shapes = random.Random(8), []
    client = Client(any_model, prefill_piece=32, snapshot_interval=32, prefix_bytes=10_000_000)
    hook = any_model.embed_tokens.register_forward_hook(lambda module, given, output: shapes.append(output.shape[:2]))
    # A piece of 32 holds four of at most eight tokens; beside ten and one, two would be mostly padding.
    sequences = [client.submit(draw_prompt(draw, length), 10) for length in (5, 8, 7, 6, 10, 1, 2, 40)]
    follower = client.submit([*sequences[6].prompt, 9], 10)  # goes on from the one before, as soon as that was read
    client.scheduler.step()
    client.scheduler.step()
    hook.remove()
    assert [tuple(shape) for shape in shapes if shape[1] > 1][:2] == [(4, 8), (2, 10)]
    again = [client.submit(sequence.prompt, 10) for sequence in sequences]
    client.run()
    for sequence, other in zip(sequences, again, strict=True):
        alone = client.ids_alone(sequence.prompt, 10)
        for found in (sequence, other):
            assert compare_greedy(any_model, sequence.prompt, found.generated, alone) != "different"
    assert [other.cached_tokens for other in again[:4]] == [5, 8, 7, 6] and follower.cached_tokens == 2


def test_what_is_cancelled_or_late_ends_wherever_it_is(model: HybridLanguageModel) -> None:
    client = Client(model, max_rows=2)
    decoding = client.submit([5, 6], 1000)
    client.scheduler.step()
    reading = client.submit(list(range(5, 205)), 1000)
    client.scheduler.step()
    waiting = client.submit([7, 8], 1000)
    late = client.submit([7, 8], 1000, deadline=time.monotonic())
    client.scheduler.step()
    assert late.finish_reason == "timeout"
    for sequence in (decoding, reading, waiting):
        assert sequence.finish_reason is None
        sequence.cancel()
    client.scheduler.step()
    assert [one.finish_reason for one in (decoding, reading, waiting)] == ["cancelled"] * 3
    assert client.scheduler.is_idle and client.scheduler.state_bytes == 0
    assert [client.deltas[one][-1].finish_reason for one in (decoding, reading, waiting)] == ["cancelled"] * 3
    assert client.submit_and_run([5, 6], 3).finish_reason == "length"


def test_stop_strings_end_a_text_before_them(model: HybridLanguageModel) -> None:
    client = Client(model)
    whole = client.text(client.submit_and_run([5, 6, 7], 60))
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    ended = client.submit([5, 6, 7], 60, options={"stop": ("no such text", stop)})
    client.run()
    assert ended.finish_reason == "stop"
    assert client.text(ended) == whole[: whole.index(stop)]


def test_log_probabilities_are_the_models_own(model: HybridLanguageModel) -> None:
    client, prompt = Client(model), [5, 6, 7, 8, 9]
    options = {"temperature": 0.7, "seed": 1, "logprobs": 3, "logit_bias": {40: 5.0}, "repetition_penalty": 1.3}
    sequence = client.submit_and_run(prompt, 6, options=options)
    choices = [choice for delta in client.deltas[sequence] for choice in delta.choices]
    assert [choice.token for choice in choices] == sequence.generated
    with torch.no_grad():
        logits = model(torch.tensor([prompt + sequence.generated])).logits[0, len(prompt) - 1 : -1, :300]
    for row, choice in zip(logits.log_softmax(-1), choices, strict=True):
        assert choice.logprob == pytest.approx(float(row[choice.token]), abs=1e-4)
        top = row.topk(3)
        assert [token for token, _ in choice.likeliest] == top.indices.tolist()
        assert [value for _, value in choice.likeliest] == pytest.approx(top.values.tolist(), abs=1e-4)


def test_settings_that_cannot_be(model: HybridLanguageModel) -> None:
    for fields, sentence in (
        ({"max_rows": 0}, "max_rows must be at least 1, got 0"),
        ({"prefix_bytes": -1}, "prefix_bytes must be 0 or more"),
        ({"prefill_piece": 7}, "snapshot_interval must be a multiple of prefill_piece 7, got 1024"),
    ):
        with pytest.raises(InputError, match=sentence):
            SchedulerSettings(**fields)
    with pytest.raises(InputError, match="logit_bias: there is no token 300, the last one is 299"):
        Client(model).submit([5], options={"logit_bias": {300: 1.0}})


@pytest.mark.parametrize("most", [1, 2, 5, 8, 64, 100, 1000])
def test_compiled_steps_come_in_few_sizes(most: int) -> None:
    sizes = {program_rows(rows, most) for rows in range(1, most + 1)}
    assert len(sizes) <= 4 and min(sizes) == 1 and max(sizes) == most
    assert all(rows <= program_rows(rows, most) for rows in range(1, most + 1))


def test_warming_up_says_which_program_it_is_at(model: HybridLanguageModel) -> None:
    seen: list[tuple[int, ...]] = []
    Client(model, max_rows=64).scheduler.warm_up(lambda *given: seen.append(given))
    assert seen == [(1, 4, 1), (2, 4, 4), (3, 4, 16), (4, 4, 64)]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_steps_of_several_rows_change_nothing(corpus: Path, tmp_path: Path) -> None:
    model = load(save_tiny_model(tmp_path, corpus / "tokenizer"), device="cpu")
    draw = random.Random(10)
    prompts = [draw_prompt(draw, length) for length in (2, 9, 17)]
    alone = [Client(model).submit_and_run(prompt, 16).generated for prompt in prompts]
    model.compile_decoding()
    client = Client(model, prefill_piece=512, max_rows=4)
    client.scheduler.warm_up()
    programs = dict(model._decoding_program._programs)
    sequences = [client.submit(prompt, 16) for prompt in prompts]  # as four rows, of which one is idle
    client.run()
    assert client.scheduler.counts.peak_rows == 3
    assert model._decoding_program._programs == programs  # all of them were there
    for sequence, expected in zip(sequences, alone, strict=True):
        assert (
            compare_greedy(load(tmp_path, device="cpu"), sequence.prompt, sequence.generated, expected) != "different"
        )
