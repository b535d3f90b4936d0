"""Planning on text that the model itself has written: nothing predicts that better than the model as it is, so every
removal costs something, and a branch that says the same of every token costs nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fusiontree import HybridCache, HybridLanguageModel, InputError, load
from fusiontree.artifacts import PrunePlan
from fusiontree.deploy import reference_parent
from fusiontree.deploy.budget import CostModel, blank, parse_targets, shortfall, sizes
from fusiontree.deploy.calibration import Calibration, CalibrationText, calibration_text
from fusiontree.deploy.criteria import CRITERIA, ablation_scores, trained_scores
from fusiontree.deploy.folding import fold
from fusiontree.deploy.prune_plan import PlanSettings, make_plan
from tiny_models import save_tiny_model

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
    torch.manual_seed(0)
    ids = parent.generate(torch.full((48, 1), 5), max_new_tokens=39, do_sample=True, top_k=0, eos_token_id=None)
    return CalibrationText(ids, torch.arange(40).expand(48, -1).contiguous())


@pytest.fixture(scope="module")
def costs(parent: HybridLanguageModel) -> CostModel:
    return CostModel.measured(parent, context=64, rounds=1, progress=lambda what: None)


def loss_of(model: HybridLanguageModel, text: CalibrationText) -> float:
    with torch.no_grad():
        return model(text.input_ids, position_ids=text.position_ids, labels=text.input_ids).loss.item()


def plan_for(parent, text, costs, **settings) -> PrunePlan:
    settings = {"context": 64, "rounds": 1} | settings
    return make_plan(parent, text, PlanSettings(**settings), source="parent", costs=costs)


@pytest.mark.parametrize(
    ("criterion", "more"),
    [(name, {}) for name in CRITERIA] + [("ablation", {"empty_layers": True, "freeze_gates": 0.02})],
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
    size = sum(p.numel() for p in blank(parent, plan.layer_branches, _frozen(plan)).parameters())
    assert size / sum(p.numel() for p in parent.parameters()) == pytest.approx(plan.expected["parameters"])
    assert plan.expected["parameters"] <= 0.9
    assert "constant" not in plan.layer_branches or more
    for step in plan.steps:
        assert 0 <= step.layer < 3 and plan.layers[step.layer].constant is not None


def _frozen(plan: PrunePlan) -> list[int]:
    return [index for index, layer in enumerate(plan.layers) if layer.gate is not None]


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
    sentence = r"parameters=0.75x, max_loss_increase=0.001 cannot be met: the nearest .* is parameters=0\.9\dx \(at \+0"
    with pytest.raises(InputError, match=sentence):
        plan_for(parent, own_text, costs, targets=wanted)
    with pytest.raises(
        InputError, match=r"with one branch left in every layer it is parameters=0\.\d\dx; ask for less"
    ):
        plan_for(parent, own_text, costs, criterion="gate", targets={"parameters": 0.2})
    with pytest.raises(InputError, match="without any branch it is parameters=0"):
        plan_for(parent, own_text, costs, criterion="gate", targets={"parameters": 0.01}, empty_layers=True)


def test_nothing_can_go_for_nothing(parent, own_text, costs) -> None:
    without_idle = fold(parent, plan_for(parent, own_text, costs, targets={"parameters": 0.95}))
    settings = PlanSettings(targets={"max_loss_increase": 1e-4}, context=64, rounds=1)
    with pytest.raises(
        InputError, match=r"max_loss_increase=0.0001 cannot be met: the cheapest removal raises .* \d\.\d+"
    ):
        make_plan(without_idle, own_text, settings, source="without the idle branch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_are_those_of_the_tensors(parent, dtype) -> None:
    kinds = ["both", "constant", "attention"]
    model = blank(parent, kinds).to(dtype)
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
