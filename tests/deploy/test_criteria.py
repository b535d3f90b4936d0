"""What each criterion measures, on models made by hand so that the answer is known, and what costs do to a plan."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fusiontree import HybridLanguageModel, HybridLanguageModelConfig
from fusiontree.artifacts import PrunePlan
from fusiontree.deploy import prune_plan
from fusiontree.deploy.budget import CostModel
from fusiontree.deploy.calibration import Calibration, CalibrationText
from fusiontree.deploy.costs import Cost
from fusiontree.deploy.criteria import HEAD_PARTS, ablation_scores, branches, gate_evidence, trained_scores
from fusiontree.deploy.cuts import Cuts, Removal
from fusiontree.deploy.plan_settings import PlanSettings
from fusiontree.deploy.prune_plan import make_plan
from tiny_models import TINY

ALL = ("both",) * 3
LOGITS = (-2.0, 1.0, 0.2)  # of the layers' gates


def text_of(model: HybridLanguageModel) -> CalibrationText:
    """What the model itself writes: it is best as it is."""
    torch.manual_seed(0)
    first = torch.arange(32)[:, None] + 5
    ids = model.generate(first, max_new_tokens=39, do_sample=True, top_k=0, eos_token_id=None)
    return CalibrationText(ids, torch.arange(40).expand(32, -1).contiguous())


@pytest.fixture(scope="module")
def model() -> HybridLanguageModel:
    """Random branches; gates that say the same of every token: those of `LOGITS`."""
    torch.manual_seed(0)
    made = HybridLanguageModel(HybridLanguageModelConfig(**(TINY | {"num_layers": 3}))).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
        for block, logit in zip(made.layers, LOGITS, strict=True):
            # z's first channel is huge, so that the one tanh that reads it says 1.
            block.alignment.in_proj.bias[0] = 1e4
            block.gate.up.weight.zero_()[0, 0] = 1
            block.gate.down.weight.zero_()[:, 0] = logit
    return made


@pytest.fixture(scope="module")
def text(model: HybridLanguageModel) -> CalibrationText:
    return text_of(model)


@pytest.fixture(scope="module")
def costs(model: HybridLanguageModel) -> CostModel:
    """Of set seconds: each branch takes a tenth of the parent's time."""
    return costs_of(model, mamba=0.1, attention=0.1)


def costs_of(model: HybridLanguageModel, *, mamba: float, attention: float) -> CostModel:
    blank = CostModel(model.config, model.dtype, 64, Cost(1, 1, 1, 1.0, 1.0), {})
    whole = blank.cost(Cuts(tuple(block.branch for block in model.layers)))
    branch_seconds = {"mamba": (mamba, mamba), "attention": (attention, attention)}
    seconds = {(kind, name): found for name, found in branch_seconds.items() for kind in ("both", name)}
    return replace(blank, parent=whole, seconds=seconds)


def plan_for(model, text, costs, **settings) -> PrunePlan:
    whole = {"heads": False, "freeze_gates": 0.0}
    chosen = PlanSettings(**(whole | {"context": 64, "rounds": 1, "is_verified": False} | settings))
    return make_plan(model, text, chosen, source="by hand", costs=costs)


def removed(plan: PrunePlan) -> list[tuple[int, str]]:
    return [(step.layer, step.branch) for step in plan.steps]


def test_gates_take_the_branch_to_which_they_give_least(model, text, costs) -> None:
    plan = plan_for(model, text, costs, criterion="gate", targets={"decode": 1.4})
    assert removed(plan) == [(0, "mamba"), (1, "attention"), (2, "attention")]
    for layer, logit in zip(plan.layers, LOGITS, strict=True):
        assert layer.evidence["gate_mean"] == pytest.approx(torch.tensor(logit).sigmoid().item(), abs=1e-6)
        assert layer.evidence["gate_std"] == pytest.approx(0, abs=1e-3)


def test_contributions_are_norms_of_what_the_gate_lets_through(model, text, costs) -> None:
    norms: dict[tuple[int, str], float] = {}

    def look(layer: int, name: str, weight: float):
        def hook(module, given, output) -> None:
            norms[layer, name] = (weight * output).norm(dim=-1).mean().item()

        return getattr(model.layers[layer], name).register_forward_hook(hook)

    gates = torch.tensor(LOGITS).sigmoid().tolist()
    weights = {"mamba": gates, "attention": [1 - gate for gate in gates]}
    hooks = [look(layer, name, weights[name][layer]) for name in weights for layer in range(3)]
    with torch.no_grad():
        model(text.input_ids, position_ids=text.position_ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    shares = {(layer, name): norm / sum(norms[layer, one] for one in weights) for (layer, name), norm in norms.items()}
    for layer, found in enumerate(gate_evidence(Calibration(model, text))):
        for name in weights:
            assert found[f"{name}_norm"] == pytest.approx(norms[layer, name], rel=1e-4)
            assert found[f"{name}_contribution"] == pytest.approx(shares[layer, name], rel=1e-4)
    assert max(shares.values()) > 0.6  # so that an order can be told
    plan = plan_for(model, text, costs, criterion="contribution", targets={"decode": 1.1})
    assert removed(plan) == [min(shares, key=lambda place: shares[place])]


def test_recall_adds_the_rise_of_text_that_is_read_twice(model, text) -> None:
    """The second reading's loss from the logits themselves, of the parent and without a branch."""

    def losses() -> tuple[float, float]:
        found = []
        for one in (text, text.read_twice()):
            with torch.no_grad():
                logits = model(one.input_ids, position_ids=one.position_ids, use_cache=False).logits
            start = one.input_ids.shape[1] // 2 if one is not text else 0
            predicted = logits[:, start:-1].flatten(0, 1)
            found.append(F.cross_entropy(predicted, one.input_ids[:, start + 1 :].flatten()).item())
        return found[0], found[1]

    calibration = Calibration(model, text, measures_recall=True)
    place = (0, "mamba")
    mean = calibration.mean_output(model.layers[0], "mamba", calibration.parent.inputs[0]).float()
    before = losses()
    handle = model.layers[0].mamba.register_forward_hook(lambda module, given, output: mean.expand(output.shape))
    after = losses()
    handle.remove()
    rises = [one - other for one, other in zip(after, before, strict=True)]
    assert abs(rises[1]) > 0.01
    assert ablation_scores(calibration, lambda what: None)[place] == pytest.approx(sum(rises), abs=2e-4)
    plain = ablation_scores(Calibration(model, text), lambda what: None)
    assert plain[place] == pytest.approx(rises[0], abs=2e-4)


def redundant_model() -> HybridLanguageModel:
    """Attention of the last token alone; the first two layers both lift the same half of the channels, which is what is
    predicted from, out of the noise of the other half. Either one does; the third adds something of its own."""
    torch.manual_seed(0)
    fields = {"num_layers": 3, "layer_branches": ["attention"] * 3, "layer_gates": [False] * 3}
    config = HybridLanguageModelConfig(**(TINY | fields | {"window_size": 1, "global_heads": 0}))
    made = HybridLanguageModel(config).eval()
    width = made.config.hidden_size
    signal = (torch.arange(width) < width // 2).float()
    with torch.no_grad():
        made.embed_tokens.weight.normal_()[:, width // 2 :] *= 4
        other = 0.8 * torch.randn(width, width) * signal[:, None] / width**0.5
        for block, weight in zip(made.layers, (3 * signal.diag(), 3 * signal.diag(), other), strict=True):
            block.attention.qkv_proj.weight.zero_()[2 * width :] = torch.eye(width)  # what it says are the values
            block.attention.out_proj.weight.copy_(weight)
            block.fusion_proj.weight.copy_(torch.eye(width))
            block.ln_output.weight.fill_(1)
            for parameter in (*block.residual_mlp.out_proj.parameters(), block.fusion_proj.bias):
                parameter.zero_()
        made.lm_head.weight.normal_(std=1.5 * (width // 2) ** -0.5)[:, width // 2 :] = 0
    return made


def test_removals_are_measured_again_after_each() -> None:
    """One of two branches that do the same costs little, and the other as much as both once it is gone."""
    model = redundant_model()
    text = text_of(model)
    alone = ablation_scores(Calibration(model, text), lambda what: None)
    first, second, third = (alone[layer, "attention"] for layer in range(3))
    assert first < second < third
    plan = plan_for(model, text, costs_of(model, mamba=0.0, attention=0.1), targets={"decode": 1.2}, empty_layers=True)
    assert removed(plan) == [(0, "attention"), (2, "attention")]
    calibration = Calibration(model, text)
    both = calibration.parent
    for layer in (0, 1):
        both = calibration.remove(both, Removal(layer, "attention"))
    assert plan.expected["loss_increase"] < both.rise_from(calibration.parent) - 0.1


@pytest.mark.parametrize("criterion", ["ablation", "recall", "gate", "random"])
def test_by_default_gates_that_say_nothing_are_frozen_and_heads_taken_where_that_is_measured(
    model, text, costs, criterion
) -> None:
    known = replace(costs, head_seconds=dict.fromkeys(HEAD_PARTS, (0.01, 0.01)), gate_seconds=(0.0, 0.0))
    chosen = {"criterion": criterion, "targets": {"decode": 1.05}, "context": 64, "is_verified": False}
    some = CalibrationText(text.input_ids[:6], text.position_ids[:6])
    plan = make_plan(model, some, PlanSettings(**chosen), source="by hand", costs=known)
    assert [layer.gate is not None for layer in plan.layers] == [True] * 3
    offered = [f"mamba_heads_{criterion}" in layer.evidence for layer in plan.layers]
    assert offered == [criterion in ("ablation", "recall")] * 3
    for step in (step for step in plan.steps if step.heads):
        assert set(step.heads) <= set(plan.layers[step.layer].heads[step.branch])


def test_by_default_a_model_without_heads_of_mamba_can_be_cut() -> None:
    torch.manual_seed(0)
    made = HybridLanguageModel(HybridLanguageModelConfig(**(TINY | {"mamba_version": 1}))).eval()
    text = CalibrationText(torch.arange(240).view(6, 40), torch.arange(40).expand(6, -1).contiguous())
    plan = make_plan(made, text, PlanSettings(targets={"parameters": 0.95}, context=16, rounds=1), source="by hand")
    assert plan.expected["parameters"] <= 0.95
    for layer in plan.layers:
        assert "local_heads_ablation" in layer.evidence and "mamba_heads_ablation" not in layer.evidence


def test_scalars_give_way_where_the_price_is(model, text) -> None:
    """Of two branches that never change, so that nothing but the price moves their scalars."""
    idle = copy.deepcopy(model)
    one, other = (2, "mamba"), (2, "attention")
    with torch.no_grad():
        for layer, name in (one, other):
            getattr(idle.layers[layer], name).out_proj.weight.zero_()
    calibration = Calibration(idle, text)
    for dear, cheap in ((one, other), (other, one)):
        prices = {place: float(place == dear) for place in branches(calibration)}
        found = trained_scores(calibration, prices, steps=8)
        assert found[dear] < 0.94 and found[cheap] == pytest.approx(0.9526, abs=1e-3)  # sigmoid(3), as at the start


def test_what_takes_no_time_is_not_cut_for_speed(model, text) -> None:
    """Seconds decide: with the costs of the two branches exchanged, other ones go."""
    for dear, cheap in (("mamba", "attention"), ("attention", "mamba")):
        plan = plan_for(model, text, costs_of(model, **{dear: 0.2, cheap: 1e-4}), targets={"decode": 1.6})
        assert [branch for _, branch in removed(plan)] == [dear, dear]
        assert plan.expected["decode"] == pytest.approx(1 / (1 - 2 * 0.2))


def test_the_evidence_holds_what_each_branch_costs(model, text, costs) -> None:
    plan = plan_for(model, text, costs, criterion="random", targets={"decode": 1.1})
    for name in ("mamba", "attention"):
        kinds = [*ALL]
        kinds[1] = "attention" if name == "mamba" else "mamba"
        rest = costs.cost(Cuts(tuple(kinds)))
        found = plan.layers[1].evidence
        assert found[f"{name}_parameters"] == costs.parent.parameters - rest.parameters > 0
        assert found[f"{name}_weight_bytes"] == 4 * found[f"{name}_parameters"]
        assert found[f"{name}_state_bytes"] == costs.parent.state_bytes - rest.state_bytes > 0
        assert (found[f"{name}_prefill_seconds"], found[f"{name}_decode_seconds"]) == pytest.approx((0.1, 0.1))
    assert plan.measured["processor"] and plan.measured["threads"] == torch.get_num_threads()


def test_one_lucky_time_is_no_proof(model, text, costs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut is timed again before its plan is made, and what the plan states is that second time."""
    times = [1.5, 1.0, 1.4, 1.3]
    timed: list[int] = []

    def measured(models, **settings) -> dict[str, Cost]:
        timed.append(sum(parameter.numel() for parameter in models["cut"].parameters()))
        parent = Cost(timed[-1], 1, 1, 1.0, 1.0)
        return {"parent": parent, "cut": replace(parent, decode_seconds=1 / times[len(timed) - 1])}

    monkeypatch.setattr(prune_plan, "measure_costs", measured)
    plan = plan_for(model, text, costs, criterion="gate", targets={"decode": 1.24}, is_verified=True)
    # By their costs two branches are enough.
    assert len(plan.steps) == 3
    assert timed[0] == timed[1] > timed[2] == timed[3] and len(timed) == 4
    assert plan.expected["decode"] == pytest.approx(1.3)
