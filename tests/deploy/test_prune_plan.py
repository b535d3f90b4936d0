"""Planning on text that the model itself has written: nothing predicts that better than the model as it is, so every
removal costs something, and a branch that says the same of every token costs nothing."""

from __future__ import annotations

import copy
import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fusiontree import HybridCache, HybridLanguageModel, InputError, load
from fusiontree.artifacts import PrunePlan, RunManifest
from fusiontree.deploy import export, reference_parent
from fusiontree.deploy.budget import CostModel, blank, parse_targets, shortfall, sizes
from fusiontree.deploy.calibration import Calibration, CalibrationText, calibration_text
from fusiontree.deploy.criteria import CRITERIA, ablation_scores, head_order, trained_scores
from fusiontree.deploy.cuts import Cuts
from fusiontree.deploy.folding import fold
from fusiontree.deploy.plan_settings import PlanSettings
from fusiontree.deploy.prune_plan import make_plan
from tiny_models import save_tiny_model

WHOLE = {"heads": False, "freeze_gates": 0.0}  # branches alone
IDLE = (1, "attention")  # of which layer and branch the output never changes


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> HybridLanguageModel:
    model = load(save_tiny_model(tmp_path_factory.mktemp("parent"), None, num_layers=3), device="cpu")
    with torch.no_grad():
        attention = model.layers[IDLE[0]].attention
        attention.out_proj.weight.zero_()
        attention.out_proj.bias.normal_(generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture(scope="module")
def own_text(parent: HybridLanguageModel) -> CalibrationText:
    return text_of(parent)


def text_of(model: HybridLanguageModel) -> CalibrationText:
    torch.manual_seed(0)
    ids = model.generate(torch.full((48, 1), 5), max_new_tokens=39, do_sample=True, top_k=0, eos_token_id=None)
    return CalibrationText(ids, torch.arange(40).expand(48, -1).contiguous())


@pytest.fixture(scope="module")
def costs(parent: HybridLanguageModel) -> CostModel:
    return CostModel.measured(parent, context=64, rounds=1, progress=lambda what: None, heads=True, gates=True)


def loss_of(model: HybridLanguageModel, text: CalibrationText) -> float:
    with torch.no_grad():
        return model(text.input_ids, position_ids=text.position_ids, labels=text.input_ids).loss.item()


def plan_for(parent, text, costs, **settings) -> PrunePlan:
    settings = WHOLE | {"context": 64, "rounds": 1} | settings
    return make_plan(parent, text, PlanSettings(**settings), source="parent", costs=costs)


@pytest.mark.parametrize(
    ("criterion", "more"),
    [(name, {}) for name in CRITERIA]
    + [("ablation", {"empty_layers": True, "freeze_gates": 0.02}), ("recall", {"heads": True})],
)
def test_the_expected_loss_and_size_are_those_of_the_cut(parent, own_text, costs, criterion, more) -> None:
    before = {name: tensor.clone() for name, tensor in parent.state_dict().items()}
    plan = plan_for(parent, own_text, costs, criterion=criterion, targets={"parameters": 0.9}, **more)
    after = parent.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.requires_grad for parameter in parent.parameters())
    cut = reference_parent(parent, plan)
    assert plan.expected["parent_loss"] == pytest.approx(loss_of(parent, own_text), abs=1e-5)
    assert plan.expected["loss"] == pytest.approx(loss_of(cut, own_text), abs=1e-5)
    size = sum(p.numel() for p in fold(parent, plan).parameters())
    assert size / sum(p.numel() for p in parent.parameters()) == pytest.approx(plan.expected["parameters"])
    assert plan.expected["parameters"] <= 0.9
    assert "constant" not in plan.layer_branches or more
    for step in plan.steps:
        assert 0 <= step.layer < 3 and plan.layers[step.layer].has_constants


def test_what_frozen_gates_save_is_not_cut_from_branches(parent, own_text, costs) -> None:
    share = costs.reached(Cuts(("both",) * 3, frozen=frozenset(range(3))))["parameters"]
    assert share < 1
    plan = plan_for(parent, own_text, costs, targets={"parameters": share}, freeze_gates=99.0)
    assert all(layer.gate is not None for layer in plan.layers)
    assert plan.layer_branches == ["both"] * 3 and plan.steps == []
    assert plan.expected["parameters"] == pytest.approx(share)
    assert plan.expected["loss"] == pytest.approx(loss_of(reference_parent(parent, plan), own_text), abs=1e-5)
    with pytest.raises(InputError, match="gates=True"):
        replace(costs, gate_seconds=None).cost(Cuts(("both",) * 3, frozen=frozenset({0})))


def test_constants_are_the_means_after_the_cut(parent, own_text, costs) -> None:
    plan = plan_for(parent, own_text, costs, targets={"parameters": 0.8})
    cut = reference_parent(parent, plan)
    for index, layer in enumerate(plan.layers):
        if layer.constant is None:
            continue
        inputs: list[torch.Tensor] = []
        branch = "attention" if layer.keep == "mamba" else "mamba"
        module = getattr(cut.layers[index], branch)
        module.register_forward_pre_hook(lambda module, given, inputs=inputs: inputs.append(given))
        loss_of(cut, own_text)
        with torch.no_grad():
            # Given the cut model's own input, the parent's branch says on average what stands in for it.
            said = getattr(parent.layers[index], branch)(*inputs[0]).mean((0, 1))
        torch.testing.assert_close(said, torch.tensor(layer.constant), rtol=0, atol=1e-4)


def test_heads_that_never_change_go_for_nothing(parent) -> None:
    idle = {"mamba": [1, 6], "attention": [0, 3]}
    model = copy.deepcopy(parent)
    with torch.no_grad():
        for name, heads in idle.items():
            for head in heads:
                getattr(model.layers[2], name).out_proj.weight[:, 8 * head : 8 * head + 8] = 0
    text = text_of(model)
    order = head_order(Calibration(model, text))
    assert {step.heads for step in order[2, "mamba heads"][:2]} == {(1,), (6,)}
    assert order[2, "local heads"][0].heads == (0,) and order[2, "global heads"][0].heads == (3,)
    costs = CostModel.measured(model, context=64, rounds=1, progress=lambda what: None, heads=True)
    plan = plan_for(model, text, costs, targets={"max_loss_increase": 1e-6}, heads=True)
    for name, heads in idle.items():
        assert set(heads) <= set(plan.layers[2].heads[name])
        assert f"{len(plan.layers[2].heads[name])} of " in plan.layers[2].reason
    assert {
        head for step in plan.steps if step.layer == 2 and step.branch == "attention" for head in step.heads
    } == set(plan.layers[2].heads["attention"])
    assert plan.layer_branches[IDLE[0]] == "mamba"  # whole branches are candidates beside heads
    assert plan.expected["loss_increase"] <= 1e-6 and plan.expected["parameters"] < 1


def test_head_constants_are_means_and_savings_count_heads(parent, own_text, costs) -> None:
    calibration = Calibration(parent, own_text)
    order = head_order(calibration)
    assert {part for _, part in order} == {"mamba heads", "local heads", "global heads"}
    assert [sorted(sum((list(step.heads) for step in order[0, "global heads"]), []))] == [[2, 3]]
    removal = order[0, "mamba heads"][0]
    joint = calibration.remove(calibration.parent, removal)
    said: list[torch.Tensor] = []
    hook = parent.layers[0].mamba.out_proj.register_forward_pre_hook(lambda module, given: said.append(given[0]))
    loss_of(parent, own_text)
    hook.remove()
    (head,) = removal.heads
    mean = torch.cat(said).mean((0, 1))[8 * head : 8 * head + 8]
    torch.testing.assert_close(torch.tensor(joint.decisions[0].head_constants), mean, rtol=0, atol=1e-5)
    assert costs.saving(joint.cuts, order[0, "mamba heads"][1], ["parameters"]) > 0


def test_costs_of_what_was_not_measured_and_of_constant_gates(parent, own_text, costs) -> None:
    whole = Cuts(("both",) * 3)
    fewer = replace(whole, heads=frozenset({(0, "mamba", 2)}))
    assert costs.cost(fewer).parameters < costs.parent.parameters
    with pytest.raises(InputError, match="what mamba heads cost was not measured: .* heads=True"):
        replace(costs, head_seconds={}).cost(fewer)
    frozen = whole.with_frozen(1)
    assert costs.cost(whole).parameters == costs.parent.parameters
    assert costs.cost(frozen).parameters == sum(p.numel() for p in blank(parent, frozen).parameters())
    assert costs.cost(frozen).parameters < costs.parent.parameters


def test_a_branch_that_never_changes_is_the_first_to_go(parent, own_text, costs) -> None:
    plan = plan_for(parent, own_text, costs, targets={"parameters": 0.95})
    assert [(step.layer, step.branch) for step in plan.steps] == [IDLE]
    assert plan.expected["loss_increase"] == pytest.approx(0, abs=1e-5)


def test_what_the_branches_are_worth(parent, own_text) -> None:
    calibration = Calibration(parent, own_text)
    found = ablation_scores(calibration, lambda what: None)
    assert found[IDLE] == pytest.approx(0, abs=1e-5)
    assert all(rise > 1e-3 for place, rise in found.items() if place != IDLE)
    scalars = trained_scores(calibration, dict.fromkeys(found, 1.0), steps=30)
    assert scalars[IDLE] == min(scalars.values()) and all(0 < value < 1 for value in scalars.values())
    assert trained_scores(calibration, dict.fromkeys(found, 1.0), steps=30) == scalars


def test_more_of_the_loss_may_be_spent_than_asked_for_but_never_more_than_allowed(parent, own_text, costs) -> None:
    found = [
        plan_for(parent, own_text, costs, targets={"max_loss_increase": limit}, empty_layers=True)
        for limit in (0.01, 99.0)
    ]
    for plan, limit in zip(found, (0.01, 99.0), strict=True):
        assert plan.expected["loss_increase"] <= limit
    assert len(found[0].steps) < len(found[1].steps) == 6
    assert found[1].layer_branches == ["constant"] * 3


def test_an_impossible_budget_is_told_with_the_nearest(parent, own_text, costs) -> None:
    wanted = {"parameters": 0.75, "max_loss_increase": 0.001}
    sentence = (
        r"=0.75x, max_loss_increase=0.001 cannot be met: the nearest .* is parameters=0\.9\dx \(at \+0.*--empty-layers"
    )
    with pytest.raises(InputError, match=sentence):
        plan_for(parent, own_text, costs, targets=wanted)
    with pytest.raises(
        InputError, match=r"with one branch left in every layer it is parameters=0\.\d\dx; ask for less"
    ):
        # The smallest there is, within a hundredth; gates take the other branch of some layers.
        smallest = min(costs.reached(Cuts((kind,) * 3))["parameters"] for kind in ("mamba", "attention"))
        plan_for(parent, own_text, costs, criterion="gate", targets={"parameters": smallest + 0.01})
    with pytest.raises(InputError, match=r"without any branch it is parameters=0\.\d+x at best; ask for less$"):
        plan_for(parent, own_text, costs, criterion="gate", targets={"parameters": 0.01}, empty_layers=True)


@pytest.mark.parametrize("target", ["decode=1000x", "memory=0.001x"])
def test_what_is_out_of_reach_is_told_before_anything_is_measured(parent, own_text, costs, target) -> None:
    settings, said = PlanSettings(targets=parse_targets([target]), context=64, rounds=1), []
    name = target.split("=")[0]
    with pytest.raises(InputError, match=rf"{target} cannot be met: .*one step of its heads it is {name}=\d.* at best"):
        make_plan(parent, own_text, settings, source="parent", costs=costs, progress=said.append)
    assert said == []


def test_the_nearest_that_is_told_is_what_the_smallest_layers_come_to(parent, own_text, costs) -> None:
    def least(share: float) -> str:
        with pytest.raises(InputError) as error:
            plan_for(parent, own_text, costs, targets={"parameters": share})
        return re.search(r"parameters=(0\.\d+)x at best", str(error.value))[1]

    nearest = float(least(0.01))
    assert least(nearest - 0.01) == f"{nearest:.2f}"
    kinds = itertools.product(("mamba", "attention"), repeat=3)
    smallest = min(costs.reached(Cuts(found))["parameters"] for found in kinds)
    assert smallest <= nearest < smallest + 0.01
    # It takes the right branch of every layer; a criterion that takes others names the nearest that it comes to.
    with pytest.raises(InputError) as error:
        plan_for(parent, own_text, costs, targets={"parameters": nearest})
    named = float(re.search(r"it is parameters=(0\.\d+)x; ask", str(error.value))[1])
    assert plan_for(parent, own_text, costs, targets={"parameters": named}).expected["parameters"] <= named


def test_nothing_can_go_for_nothing(parent, own_text, costs) -> None:
    without_idle = fold(parent, plan_for(parent, own_text, costs, targets={"parameters": 0.95}))
    settings = PlanSettings(targets={"max_loss_increase": 1e-4}, context=64, rounds=1, **WHOLE)
    with pytest.raises(
        InputError, match=r"max_loss_increase=0.0001 cannot be met: the cheapest .*; allow max_loss_increase=\d\.\d+$"
    ) as error:
        make_plan(without_idle, own_text, settings, source="without the idle branch")
    enough = float(str(error.value).rpartition("=")[2])
    settings = replace(settings, targets={"max_loss_increase": enough})
    assert len(make_plan(without_idle, own_text, settings, source="without the idle branch").steps) >= 1


def test_where_nothing_is_to_spare_that_is_said(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "bare", None, num_layers=2, layer_branches=["mamba"] * 2, mamba_version=1)
    model = load(folder, device="cpu")
    for targets in ({"max_loss_increase": 9.0}, {"parameters": 0.999, "max_loss_increase": 9.0}):
        settings = PlanSettings(targets=targets, context=64, rounds=1, heads=True)
        with pytest.raises(InputError, match="no layer has anything to spare|with one branch left") as error:
            make_plan(model, text_of(model), settings, source="bare")
        assert "inf" not in str(error.value) and "--empty-layers" in str(error.value)


def test_a_learned_time_encoding_is_timed_at_the_tokens_that_are_told(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "learned", None, srte_encoding="learned", max_position_embeddings=64)
    model = load(folder, device="cpu")
    settings = PlanSettings(targets={"parameters": 0.9}, context=4096, rounds=1, **WHOLE)
    plan = make_plan(model, text_of(model), settings, source="learned")
    assert plan.measured["context"] == 48
    export(model, plan, tmp_path / "cut", context=4096)
    config = RunManifest.load(tmp_path / "cut" / "manifest.json").config
    read = HybridCache(model.config)
    with torch.no_grad():
        model(torch.zeros(1, 48, dtype=torch.long), past_key_values=read)
    assert config["costs"]["context"] == 48 and config["costs"]["parent"]["state_bytes"] == read.nbytes
    assert "reading 48 tokens, ms" in (tmp_path / "cut" / "README.md").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_are_those_of_the_tensors(parent, dtype) -> None:
    heads = frozenset({(0, "mamba", 2), (0, "attention", 3), (2, "attention", 0)})
    model = blank(parent, Cuts(("both", "constant", "attention"), heads=heads)).to(dtype)
    assert model.config.layer_heads == [{"mamba": 7, "local": 2, "global": 1}, None, {"local": 1, "global": 2}]
    parameters, weight_bytes, state_bytes = sizes(model.config, dtype, 100)
    cache = HybridCache(model.config)
    with torch.no_grad():
        model(torch.zeros(1, 100, dtype=torch.long), past_key_values=cache)
    assert parameters == sum(p.numel() for p in model.parameters())
    assert weight_bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    assert state_bytes == cache.nbytes


def test_targets() -> None:
    found = parse_targets(["decode=1.4x", "memory = .75, max_loss_increase=0.05"])
    assert found == {"decode": 1.4, "memory": 0.75, "max_loss_increase": 0.05}
    assert shortfall(found, {"decode": 1.5, "memory": 0.8, "prefill": 1, "parameters": 1}) == ["memory"]


def test_rows_of_text_begin_documents_anew(tiny_folder: Path) -> None:
    model = load(tiny_folder, device="cpu")
    texts = [("the quick brown fox " * 60, "a"), ("a lazy dog", "b"), ("seven silver birds " * 90, "c")]
    text = calibration_text(model, iter(texts), tokens=1200, length=50)
    ids, positions = text.input_ids, text.position_ids
    assert ids.shape == positions.shape and ids.shape[1] == 50 and (positions[:, 0] == 0).all()
    assert ((positions[:, 1:] == positions[:, :-1] + 1) | (positions[:, 1:] == 0)).all()
    assert int((positions == 0).sum()) == len(ids) + 2  # each row, and two documents inside of rows
    assert text.tokens == ids.numel() - len(ids) - 2
    with pytest.raises(InputError, match="too little calibration text"):
        calibration_text(model, iter(texts[:2]), tokens=1200, length=50)
