"""A step of decoding as one program: what a compiled or captured step must leave as it was."""

from __future__ import annotations

import shutil

import pytest
import torch
from tiny import tiny_model, token_ids
from transformers import GenerationConfig

import fusiontree.models.decoding as decoding
from fusiontree import HybridCache
from fusiontree.errors import InputError

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def plain_step(step, inputs, cache):
    """In place of a compiler: the step as it is written."""
    return step


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(decoding, "_compiled", plain_step)


def pair_of_states(model, **inputs):
    ids = token_ids(2, 9)
    return [model(ids, past_key_values=HybridCache(model.config, 48), **inputs).past_key_values for _ in range(2)]


def assert_equal_states(one: HybridCache, other: HybridCache) -> None:
    assert (one.seen, one.max_length, one.max_position, one.even) == (
        other.seen,
        other.max_length,
        other.max_position,
        other.even,
    )
    ours, theirs = one.state(), other.state()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], **TOLERANCE)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mamba_version": 1},
        {"global_heads": 0},
        {"global_heads": 4},
        {"layer_branches": ["mamba", "attention"], "layer_gates": [False, True]},
        {"layer_branches": ["both", "constant"], "layer_gates": [False, True]},
        {"layer_branches": ["mamba", "mamba"]},
        {"layer_heads": [{"mamba": 1, "local": 0}, {"global": 0}]},
        {"layer_branches": ["mamba", "attention"], "layer_gates": [False, False], "layer_merges": ["hz", "hz"]},
        {"srte_encoding": "learned"},
        {"mlp": "aligned", "layer_gates": [True, False]},
        {
            "mlp": "aligned",
            "layer_branches": ["mamba", "attention"],
            "layer_gates": [False, False],
            "layer_merges": ["z", "hz"],
        },
    ],
    ids=str,
)
@pytest.mark.parametrize("padded", [False, True])
@torch.inference_mode()
def test_steps_as_a_program_equal_steps(uncompiled, settings, padded):
    model = tiny_model(**settings)
    mask = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])} if padded else {}
    usual, program = pair_of_states(model, **mask)
    tokens = token_ids(2, 12)
    expected = [model(tokens[:, t : t + 1], past_key_values=usual) for t in range(12)]
    model.compile_decoding()
    for t, wanted in enumerate(expected):
        found = model(tokens[:, t : t + 1], past_key_values=program)
        torch.testing.assert_close(found.logits, wanted.logits, **TOLERANCE)
        torch.testing.assert_close(found.gate_stats.mean, wanted.gate_stats.mean, **TOLERANCE)
        assert found.gate_stats.active.tolist() == wanted.gate_stats.active.tolist()
    assert len(model._decoding_program._programs) == 1
    assert_equal_states(program, usual)


@pytest.mark.parametrize(
    "settings", [{}, {"attention_type": "pyramidal"}, {"global_heads": 0}, {"global_heads": 4}], ids=str
)
@torch.inference_mode()
def test_a_program_reads_little_more_than_what_is_filled(monkeypatch, settings):
    """From within the window to beyond it, in buffers with more room."""
    slots = []

    def recorded(step, inputs, cache):
        def run(inputs, states):
            slots.append(len(inputs.slots))
            return step(inputs, states)

        return run

    monkeypatch.setattr(decoding, "_compiled", recorded)
    model = tiny_model(**{"window_size": 100} | settings)
    ids, tokens = token_ids(2, 9), token_ids(2, 130)
    usual, program = (model(ids, past_key_values=HybridCache(model.config, 256)).past_key_values for _ in range(2))
    expected = [model(tokens[:, t : t + 1], past_key_values=usual).logits for t in range(130)]
    model.compile_decoding()
    for t, wanted in enumerate(expected):
        found = model(tokens[:, t : t + 1], past_key_values=program)
        torch.testing.assert_close(found.logits, wanted, **TOLERANCE)
    assert_equal_states(program, usual)
    assert slots == [64] * 55 + [128] * 64 + [192] * 11


@torch.no_grad()
def test_what_is_no_step_runs_as_before_and_steps_go_on_from_it(uncompiled):
    model = tiny_model()
    usual, program = pair_of_states(model)
    calls = [
        {"input_ids": token_ids(2, 1)},
        {"input_ids": token_ids(2, 5)},
        {"input_ids": token_ids(2, 1), "output_hidden_states": True},
        {"input_ids": token_ids(2, 1), "position_ids": torch.tensor([[0], [15]])},
        {"input_ids": token_ids(2, 1)},
        {"input_ids": token_ids(2, 1), "output_gates": True},
        {"input_ids": token_ids(2, 30)},  # the buffers grow
        {"input_ids": token_ids(2, 1)},
    ]
    expected = [model(**call, past_key_values=usual) for call in calls]
    model.compile_decoding()
    for call, wanted in zip(calls, expected, strict=True):
        found = model(**call, past_key_values=program)
        torch.testing.assert_close(found.logits, wanted.logits, **TOLERANCE)
        assert (found.hidden_states is None) == (wanted.hidden_states is None)
        assert (found.gate_stats.details is None) == (wanted.gate_stats.details is None)
    assert_equal_states(program, usual)
    with torch.enable_grad():  # a gradient is not lost
        loss = model(token_ids(2, 1), past_key_values=program).logits.sum()
    loss.backward()
    assert model.lm_head.weight.grad is not None


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@torch._dynamo.config.patch(error_on_recompile=True)
def test_a_compiled_step_generates_the_same_tokens_until_weights_change(capfd):
    """The real compiler: once for each of two sets of weights, whatever room the state has, and it says nothing."""
    model = tiny_model(num_layers=1, layer_branches=["both"], window_size=100)
    ids, mask = token_ids(2, 9), torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    settings = GenerationConfig(
        min_new_tokens=64, max_new_tokens=64, do_sample=False, pad_token_id=0
    )  # more than a state begins with

    def scores() -> torch.Tensor:
        output = model.generate(
            ids, attention_mask=mask, generation_config=settings, return_dict_in_generate=True, output_scores=True
        )
        return torch.stack(output.scores)

    expected = scores()
    with torch.no_grad():
        model.layers[0].fusion_proj.weight.mul_(2)
    expected_after = scores()
    assert not torch.allclose(expected, expected_after, **TOLERANCE)
    with torch.no_grad():
        model.layers[0].fusion_proj.weight.div_(2)
    model.compile_decoding()
    torch.testing.assert_close(scores(), expected, **TOLERANCE)
    roomy = model(ids, attention_mask=mask, past_key_values=HybridCache(model.config, 600)).past_key_values
    tight = model(ids, attention_mask=mask, past_key_values=HybridCache(model.config, 20)).past_key_values
    with torch.no_grad():
        one, other = (model(token_ids(2, 1), past_key_values=state.clone()).logits for state in (roomy, tight))
        torch.testing.assert_close(one, other, **TOLERANCE)
        model.layers[0].fusion_proj.weight.mul_(2)
    torch.testing.assert_close(scores(), expected_after, **TOLERANCE)
    assert len(model._decoding_program._programs) == 2
    assert capfd.readouterr().err == ""


@torch.no_grad()
def test_modules_that_are_replaced_are_not_bypassed(uncompiled):
    model = tiny_model()
    model.compile_decoding()
    program = pair_of_states(model)[0]
    model(token_ids(2, 1), past_key_values=program)
    model.layers[0].fusion_proj = torch.nn.Linear(32, 32)
    model.lm_head = torch.nn.Linear(32, 70, bias=False)
    usual = program.clone()
    found = model(token_ids(2, 1), past_key_values=program).logits
    model._decoding_program = None
    torch.testing.assert_close(found, model(token_ids(2, 1), past_key_values=usual).logits, **TOLERANCE)
    assert found.shape == (2, 1, 70)


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"install g\+\+"):
        tiny_model().compile_decoding()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.inference_mode()
def test_a_captured_graph_equals_steps():
    model = tiny_model().cuda().to(torch.bfloat16)
    ids, tokens = token_ids(2, 9).cuda(), token_ids(2, 12).cuda()
    usual, program = (model(ids, past_key_values=HybridCache(model.config, 48)).past_key_values for _ in range(2))
    expected = [model(tokens[:, t : t + 1], past_key_values=usual).logits for t in range(12)]
    model.compile_decoding()
    for t, wanted in enumerate(expected):
        found = model(tokens[:, t : t + 1], past_key_values=program).logits
        torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)
