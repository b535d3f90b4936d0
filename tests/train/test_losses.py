"""The composite loss: additive over rows, alive in the gates, and equal to its formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from fusiontree.data.batch import Batch
from fusiontree.data.tokenizer import load_tokenizer
from fusiontree.errors import InputError
from fusiontree.models import HybridLanguageModel, HybridLanguageModelConfig
from fusiontree.models.gate_stats import GateStats
from fusiontree.models.layout import shift_labels
from fusiontree.train.losses import (
    TERMS,
    HybridModelLoss,
    StepTotals,
    coefficients_at,
    load_balance_sum,
    negative_entropy_sum,
)
from fusiontree.train.settings import LossSettings
from fusiontree.train.teacher import Teacher, check_vocabulary, load_teacher

VOCABULARY = 40


def tiny_model(seed: int = 0, **fields: object) -> HybridLanguageModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_layers": 3, "num_heads": 2, "global_heads": 1, "window_size": 4}
    sizes |= {"mamba_head_dim": 8, "mamba_state_size": 4, "gate_rank": 4, "srte_rank": 4, "vocab_size": VOCABULARY}
    model = HybridLanguageModel(HybridLanguageModelConfig(**(sizes | fields))).train()
    for layer in model.layers:  # gates that have left one half, by different amounts in each row
        torch.nn.init.normal_(layer.gate.down.weight, std=3.0)
        torch.nn.init.normal_(layer.gate.up.weight, std=1.0)
    return model


def packed_batch(rows: int = 4, tokens: int = 18) -> Batch:
    """Rows that count unequal numbers of labels: documents start anywhere, one row ends in padding."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, VOCABULARY, (rows, tokens), generator=generator)
    positions = torch.arange(tokens).repeat(rows, 1)
    positions[0, 5:] = torch.arange(tokens - 5)
    positions[1, 2:] = torch.arange(tokens - 2)
    positions[1, 9:] = torch.arange(tokens - 9)
    labels = input_ids.clone()
    labels[2, 7:] = -100
    return Batch(input_ids, labels, positions)


def part(batch: Batch, rows: slice) -> Batch:
    return Batch(batch.input_ids[rows], batch.labels[rows], batch.position_ids[rows])


def step_gradients(
    model: HybridLanguageModel, loss: HybridModelLoss, micro_batches: list[Batch]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Gradients and terms of one optimizer step over the micro-batches."""
    model.zero_grad()
    totals = StepTotals.of(StepTotals.local(micro_batches))
    terms = torch.zeros(len(TERMS))
    for batch in micro_batches:
        output = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            labels=batch.labels,
            output_hidden_states=loss.needs_hidden_states,
        )
        share = loss(output, batch, totals, model.lm_head.weight)
        share.total.backward()
        terms += share.terms
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, terms


@pytest.mark.parametrize("cuts", [(2, 2), (1, 3), (1, 1, 1, 1)])
@pytest.mark.parametrize("distilling", [False, True])
def test_cutting_a_step_into_micro_batches_changes_no_gradient(cuts: tuple[int, ...], distilling: bool) -> None:
    settings = LossSettings(
        load_balance_coeff=0.5,
        entropy_reg_coeff=0.3,
        gate_margin=0.001,
        **({"distillation_coeff": 0.7, "hidden_coeff": 0.4, "teacher": "unused"} if distilling else {}),
    )
    loss = HybridModelLoss(settings, Teacher(tiny_model(seed=9), VOCABULARY) if distilling else None)
    model, batch = tiny_model(), packed_batch()
    whole, whole_terms = step_gradients(model, loss, [batch])
    ends = [sum(cuts[: i + 1]) for i in range(len(cuts))]
    micro_batches = [part(batch, slice(end - size, end)) for size, end in zip(cuts, ends, strict=True)]
    cut, cut_terms = step_gradients(model, loss, micro_batches)
    torch.testing.assert_close(cut_terms, whole_terms, rtol=1e-5, atol=1e-6)
    assert cut.keys() == whole.keys()
    for name, gradient in whole.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(cut[name], gradient, rtol=1e-4, atol=1e-5 * max(scale, 1e-3), msg=name)


def test_lm_term_is_the_sum_over_counted_labels_divided_by_their_number() -> None:
    model, batch = tiny_model(), packed_batch()
    _, terms = step_gradients(
        model, HybridModelLoss(LossSettings()), [part(batch, slice(0, 1)), part(batch, slice(1, 4))]
    )
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids).logits
    expected = F.cross_entropy(logits.flatten(0, 1), shift_labels(batch.labels, batch.position_ids).flatten())
    assert terms[0].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("term", ["load_balance_coeff", "entropy_reg_coeff"])
def test_each_gate_term_reaches_the_gates(term: str) -> None:
    model, batch = tiny_model(), packed_batch()
    coefficients = {"load_balance_coeff": 0.0, "entropy_reg_coeff": 0.0, "gate_margin": 0.0}
    without, _ = step_gradients(model, HybridModelLoss(LossSettings(**coefficients)), [batch])
    with_term, _ = step_gradients(model, HybridModelLoss(LossSettings(**(coefficients | {term: 1.0}))), [batch])
    for layer in range(3):
        name = f"layers.{layer}.gate.down.weight"
        assert (with_term[name] - without[name]).abs().max() > 1e-5


def stats(mean: list[list[float]], entropy: list[list[float]], tokens: list[float], active: list[bool]) -> GateStats:
    return GateStats(torch.tensor(mean), torch.tensor(entropy), torch.tensor(tokens), torch.tensor(active))


def test_load_balance_is_a_hinge_around_the_target() -> None:
    # layer means by row; the third layer has no working gate and counts nowhere
    value = stats([[0.5, 0.62], [0.3, 0.54], [1.0, 0.0]], [[0.0, 0.0]] * 3, [5.0, 5.0], [True, True, False])
    rows = [(0.0 + 0.15) / 2, (0.07 + 0.0) / 2]
    assert load_balance_sum(value, target=0.5, margin=0.05).item() == pytest.approx(sum(rows), abs=1e-6)


def test_entropy_weights_rows_by_their_tokens() -> None:
    value = stats([[0.5, 0.5]] * 3, [[0.6, 0.2], [0.4, 0.0], [9.0, 9.0]], [3.0, 1.0], [True, True, False])
    assert negative_entropy_sum(value).item() == pytest.approx(-(0.5 * 3 + 0.1 * 1), abs=1e-6)


def test_without_a_working_gate_the_gate_terms_vanish() -> None:
    value = stats([[0.9, 0.1]], [[0.3, 0.3]], [4.0, 4.0], [False])
    assert load_balance_sum(value, target=0.5, margin=0.0).item() == 0
    assert negative_entropy_sum(value).item() == 0


def test_distillation_is_t_squared_kl_over_counted_tokens() -> None:
    student, teacher, batch = tiny_model(0), tiny_model(5), packed_batch()
    settings = LossSettings(distillation_coeff=1.0, distillation_temperature=3.0, teacher="unused")
    _, terms = step_gradients(student, HybridModelLoss(settings, Teacher(teacher, VOCABULARY)), [batch])
    with torch.no_grad():
        logits = [m(input_ids=batch.input_ids, position_ids=batch.position_ids).logits for m in (student, teacher)]
    counts = shift_labels(batch.labels, batch.position_ids) != -100
    log_student, log_teacher = (F.log_softmax(x[counts] / 3.0, -1) for x in logits)
    kl = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
    assert terms[3].item() == pytest.approx(9 * kl.mean().item(), rel=1e-4)
    assert terms[3].item() > 1e-3


def test_hidden_states_are_compared_layer_by_layer_and_come_nearer() -> None:
    batch, teacher, ends = packed_batch(), tiny_model(5).eval(), []
    read = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "output_hidden_states": True}
    for coefficient in (0.0, 1.0):
        student = tiny_model(0)
        with torch.no_grad():
            mine, theirs = (torch.stack(model(**read).hidden_states[1:]) for model in (student, teacher))
        by_hand = ((mine - theirs).square().sum(-1) / theirs.square().sum(-1)).mean().item()
        weights = {"distillation_coeff": 1.0 - coefficient, "hidden_coeff": coefficient}
        loss = HybridModelLoss(LossSettings(**weights, teacher="unused"), Teacher(teacher, VOCABULARY))
        optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
        for step in range(15):
            _, terms = step_gradients(student, loss, [batch])
            optimizer.step()
            if step == 0:
                assert terms[4].item() == pytest.approx(by_hand if coefficient else 0.0, rel=1e-5)
                assert (terms[3].item() > 0) == (coefficient == 0)
        with torch.no_grad():
            mine = torch.stack(student(**read).hidden_states[1:])
        ends.append(((mine - theirs).square().sum(-1) / theirs.square().sum(-1)).mean().item())
    assert ends[1] < 0.8 * by_hand and ends[1] < 0.9 * ends[0]


def test_hidden_states_need_a_teacher_of_the_same_layers() -> None:
    config = tiny_model().config
    Teacher(tiny_model(3, layer_branches=["mamba", "both", "attention"]), VOCABULARY).require_layers_of(config)
    with pytest.raises(
        InputError, match=r"teacher big has 3 layers of width 32, the student .* 3 layers of width 16: "
    ):
        Teacher(tiny_model(hidden_size=32), VOCABULARY, "big").require_layers_of(config)
    llama = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2)
    with pytest.raises(InputError, match="but the teacher llama is a LlamaForCausalLM"):
        Teacher(LlamaForCausalLM(llama), VOCABULARY, "llama").require_layers_of(config)


def test_gates_are_let_go_linearly() -> None:
    settings = LossSettings(load_balance_coeff=0.4, entropy_reg_coeff=0.1, commit_from=0.5, commit_coeff=0.3)
    found = [coefficients_at(step, 20, settings) for step in (1, 10, 15, 20)]
    assert [one["load_balance"] for one in found] == pytest.approx([0.4, 0.4, 0.2, 0.0])
    assert [one["entropy"] for one in found] == pytest.approx([0.1, 0.1, -0.1, -0.3])
    turned = coefficients_at(20, 20, LossSettings(entropy_reg_coeff=0.1, commit_from=0.0))
    assert turned["entropy"] == pytest.approx(-0.1)
    assert coefficients_at(20, 20, LossSettings(load_balance_coeff=0.4))["load_balance"] == 0.4


def test_a_model_distilled_from_itself_has_nothing_to_learn() -> None:
    model = tiny_model()
    settings = LossSettings(distillation_coeff=1.0, hidden_coeff=1.0, teacher="unused")
    _, terms = step_gradients(model, HybridModelLoss(settings, Teacher(tiny_model(), VOCABULARY)), [packed_batch()])
    assert abs(terms[3].item()) < 1e-5 and abs(terms[4].item()) < 1e-5


def test_other_architectures_can_teach(corpus, tmp_path) -> None:
    tokenizer = load_tokenizer(str(corpus / "tokenizer"))
    llama = LlamaConfig(
        vocab_size=320, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(llama).save_pretrained(tmp_path / "teacher")
    check_vocabulary(str(tmp_path / "teacher"), tokenizer, 320)
    teacher = load_teacher(str(tmp_path / "teacher"), tokenizer, torch.device("cpu"))
    assert teacher.vocabulary == len(tokenizer.get_vocab())
    batch = packed_batch()
    # Documents packed into one row do not see each other in the teacher either.
    alone = Batch(batch.input_ids[:1, 5:], batch.labels[:1, 5:], batch.position_ids[:1, 5:])
    torch.testing.assert_close(teacher.hidden_states(batch)[:1, 5:], teacher.hidden_states(alone), atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="another vocabulary"):
        check_vocabulary(str(tmp_path / "teacher"), tokenizer, 384)
    (tmp_path / "teacher" / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="the tokenizer in .* cannot be loaded"):
        check_vocabulary(str(tmp_path / "teacher"), tokenizer, 320)
    with pytest.raises(InputError, match=r"loss\.teacher: there is no folder .*no-such"):
        check_vocabulary(str(tmp_path / "no-such"), tokenizer, 320)


def test_no_teacher_is_unpickled(corpus, tmp_path) -> None:
    folder = tmp_path / "teacher"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=320, **sizes))
    llama.config.save_pretrained(folder)
    torch.save(llama.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be loaded as a causal LM"):
        load_teacher(str(folder), load_tokenizer(str(corpus / "tokenizer")), torch.device("cpu"))


def test_entropy_coefficient_raises_the_entropy_of_the_gates() -> None:
    """Both runs differ in the coefficient alone."""
    found = []
    for coefficient in (0.0, 1.0):
        model, batch = tiny_model(), packed_batch()
        loss = HybridModelLoss(LossSettings(load_balance_coeff=0.0, entropy_reg_coeff=coefficient))
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(15):
            _, terms = step_gradients(model, loss, [batch])
            optimizer.step()
        found.append(-terms[2].item())
    assert found[1] > found[0] + 0.02
    assert found[1] < math.log(2)
