"""Law 7: an export = its parent with the plan's constants in place of what was removed; also through caches, packing,
padding and `generate`, for cuts of branches, of heads, of whole layers and of gates, and with linear maps merged."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from conftest_laws import COMBINATIONS, FEW, build, packed_positions, tokens
from test_law2_pieces import read_in_pieces
from test_law3_padding import LENGTHS, assert_same_continuation, padded_batch

from fusiontree import HybridLanguageModel, InputError, load
from fusiontree.artifacts import LayerDecision, PrunePlan
from fusiontree.deploy import export, reference_parent
from fusiontree.deploy.cuts import BRANCHES_OF
from fusiontree.deploy.folding import fold
from fusiontree.deploy.reference import blocks_of, removed_branches


class Cut(NamedTuple):
    """What of each layer is kept, by turns; and what else is done to it."""

    keep: list[str]
    frozen: bool = False
    heads: bool = False
    merge: bool = False


CUTS = {
    "branches": Cut(["mamba", "attention", "both"]),
    "frozen gates": Cut(["both", "both", "both"], frozen=True),
    "branches and frozen gates": Cut(["attention", "mamba", "both"], frozen=True),
    "whole layers": Cut(["constant", "both", "constant"]),
    "everything and frozen gates": Cut(["constant", "attention", "mamba"], frozen=True),
    "heads": Cut(["both", "both", "both"], heads=True),
    "branches, heads and frozen gates": Cut(["attention", "mamba", "both"], frozen=True, heads=True),
    "merged maps": Cut(["attention", "both", "mamba"], frozen=True, merge=True),
    "merged maps and heads": Cut(["mamba", "both", "attention"], frozen=True, heads=True, merge=True),
}


def heads_to_remove(block, name: str, layer: int) -> list[int]:
    """Some of a branch's heads, by layer: the first and the last, the global ones, the local ones; never all."""
    branch = getattr(block, name)
    if name == "mamba":
        some = [] if branch.version == 1 else sorted({0, branch.num_heads - 1})
    else:
        group, local = branch.num_heads // branch.num_kv_heads, branch.num_heads - branch.global_heads
        every = list(range(branch.num_heads))
        some = [every[:group] + every[-group:], every[local:], every[:local]][layer % 3]
    return some if len(set(some)) < getattr(branch, "num_heads", 0) else []


def plan_for(model: HybridLanguageModel, cut: Cut) -> PrunePlan:
    """Constants of the size of the outputs they stand for, so that a slip anywhere shows."""
    generator = torch.Generator().manual_seed(1)
    layers = []
    for index, block in enumerate(blocks_of(model)):
        wanted = cut.keep[index % len(cut.keep)]
        can_go = block.merges == "none" and set(BRANCHES_OF[wanted]) <= set(BRANCHES_OF[block.branch])
        kept = wanted if can_go else block.branch
        decision = LayerDecision(keep=kept, reason="test")
        width = model.config.hidden_size
        if removed := removed_branches(block, decision):
            decision.constant = torch.randn(width * len(removed), generator=generator).tolist()
        if cut.heads and block.merges == "none":
            found = {name: heads_to_remove(block, name, index) for name in BRANCHES_OF[kept]}
            decision.heads = {name: removed for name, removed in found.items() if removed}
            wide = sum(len(removed) * getattr(block, name).head_dim for name, removed in decision.heads.items())
            decision.head_constants = torch.randn(wide, generator=generator).tolist() if wide else None
        if cut.frozen and index != 1:
            gate = 0.02 + 0.96 * torch.rand(width, generator=generator, dtype=torch.float64)  # no float32 number
            gate[0] = 0.999  # in bfloat16 it is 1
            decision.gate = gate.tolist()
        layers.append(decision)
    return PrunePlan(criterion="test", thresholds={}, source="test", layers=layers)


def assert_law(got: torch.Tensor, want: torch.Tensor) -> None:
    assert (got - want).abs().max() <= 1e-5 * max(1.0, want.abs().max().item())


@pytest.fixture(params=CUTS)
def cut(request):
    return CUTS[request.param]


def test_logits(any_model):
    ids = tokens(1, 30)
    before = any_model(ids, use_cache=False).logits
    for cut in CUTS.values():
        plan = plan_for(any_model, cut)
        want = reference_parent(any_model, plan)(ids, use_cache=False).logits
        blocks = blocks_of(any_model)
        if any(
            layer.has_constants or (layer.gate and block.gate) for layer, block in zip(plan.layers, blocks, strict=True)
        ):
            assert (want - before).abs().max() > 1e-2  # the plan changes what the model says
        assert_law(fold(any_model, plan, cut.merge)(ids, use_cache=False).logits, want)
    assert torch.equal(any_model(ids, use_cache=False).logits, before)  # and leaves the parent alone


@pytest.mark.parametrize("name", FEW)
def test_logits_in_float64(name):
    """Where rounding does not hide anything, the two agree to the last digits."""
    model = build(dtype=torch.float64, **COMBINATIONS[name])
    for cut in CUTS.values():
        plan, ids = plan_for(model, cut), tokens(1, 30)
        want = reference_parent(model, plan)(ids, use_cache=False).logits
        assert (fold(model, plan, cut.merge)(ids, use_cache=False).logits - want).abs().max() <= 1e-11


@pytest.mark.parametrize("sizes", [(7, 1, 1, 1, 12, 1, 6)], ids=str)
@pytest.mark.parametrize("layout", ["plain", "packed"])
def test_through_caches_and_packing(some_model, cut, layout, sizes):
    plan, ids = plan_for(some_model, cut), tokens(2, 29)
    positions = packed_positions([11, 1, 17], [3, 20, 6]) if layout == "packed" else None
    want, _ = read_in_pieces(reference_parent(some_model, plan), ids, sizes, positions)
    got, _ = read_in_pieces(fold(some_model, plan, cut.merge), ids, sizes, positions)
    assert_law(got, want)


@pytest.mark.parametrize("side", ["left", "right"])
def test_through_padding_and_generation(some_model, cut, side):
    plan = plan_for(some_model, cut)
    some_model.generation_config.eos_token_id = None
    rows, ids, mask = padded_batch(side)
    reference, exported = reference_parent(some_model, plan), fold(some_model, plan, cut.merge)
    want, got = (one(ids, attention_mask=mask, use_cache=False).logits for one in (reference, exported))
    assert_law(got[mask.bool()], want[mask.bool()])
    want, got = (
        one.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, ids.shape[1] :]
        for one in (reference, exported)
    )
    ties = [assert_same_continuation(reference, *trio) for trio in zip(rows, got, want, strict=True)]
    assert sum(ties) <= 1 and len(ties) == len(LENGTHS)


def test_from_the_folder(some_model, cut, tmp_path):
    plan = plan_for(some_model, cut)
    export(some_model, plan, tmp_path / "cut", merge=cut.merge)
    loaded = load(tmp_path / "cut", device="cpu")
    assert loaded.config.layer_branches == plan.layer_branches
    assert (loaded.config.layer_heads is not None) == any(layer.heads for layer in plan.layers)
    ids = tokens(2, 30)
    saved = PrunePlan.load(tmp_path / "cut" / "prune_plan.json")
    assert saved == plan
    assert_law(loaded(ids).logits, reference_parent(some_model, saved)(ids).logits)


@pytest.mark.parametrize("heads", [False, True])
def test_a_cut_of_a_cut(some_model, heads):
    """An export is a model like any other: it can be cut again."""
    first = fold(some_model, plan_for(some_model, Cut(["both", "both", "both"], frozen=True, heads=heads)))
    plan = plan_for(first, Cut(["mamba", "attention", "mamba"], heads=heads))
    ids = tokens(2, 30)
    assert_law(fold(first, plan)(ids).logits, reference_parent(first, plan)(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FEW)
def test_a_narrow_model_is_cut_as_well_as_it_computes(name, cut, dtype):
    """About as far from what a wide one with the same weights says as the parent itself; its dtypes stay."""
    narrow = build(dtype=dtype, **COMBINATIONS[name])
    plan, ids = plan_for(narrow, cut), tokens(1, 30)
    exported = fold(narrow, plan, cut.merge)
    assert exported.dtype == dtype
    assert all(p.dtype == torch.float32 for n, p in exported.named_parameters() if n.endswith("A_log"))
    reference = reference_parent(narrow, plan)
    exact = reference_parent(narrow.double(), plan)(ids, use_cache=False).logits
    wanted, found = ((one(ids, use_cache=False).logits - exact).abs().max() for one in (reference, exported))
    assert found <= 4 * wanted


def test_means_that_branch_dropout_puts_in_are_folded_too():
    """With a frozen gate the branches say what the gate let through, so their running means do as well."""
    model = build(drop_branch_prob=0.5)
    generator = torch.Generator().manual_seed(0)
    for block in blocks_of(model):
        block.mamba_mean.normal_(generator=generator)
        block.attention_mean.normal_(generator=generator)
    plan = plan_for(model, CUTS["frozen gates"])
    for block, cut, layer in zip(blocks_of(model), blocks_of(fold(model, plan)), plan.layers, strict=True):
        gate = torch.tensor(layer.gate or [1.0])
        torch.testing.assert_close(cut.mamba_mean, block.mamba_mean * gate)
        torch.testing.assert_close(cut.attention_mean, block.attention_mean * (1 - gate if layer.gate else gate))


@pytest.mark.parametrize("use_alignment", [True, False])
def test_merging_maps_of_an_alignment(use_alignment):
    """Of one with and without a hidden layer, of a wide and a narrow branch."""
    model = build(mlp="aligned", use_alignment=use_alignment, mamba_expand=2)
    plan = plan_for(model, CUTS["merged maps"])
    merged = fold(model, plan, merge=True)
    assert merged.config.layer_merges == ["hz", "none", "z"]
    assert_law(merged(tokens(1, 20)).logits, fold(model, plan)(tokens(1, 20)).logits)


@pytest.mark.parametrize("mlp", ["residual", "aligned"])
def test_what_merging_leaves_out(mlp):
    """h unless the MLP reads z too and the branch is wide, then z, in every layer of one branch without gate; no weight
    is added."""
    model = build(mlp=mlp)  # of expand 2: Mamba is twice as wide as attention
    cut = CUTS["merged maps"]
    plan = plan_for(model, cut)
    apart, merged = fold(model, plan), fold(model, plan, merge=True)
    assert merged.config.layer_merges == ["hz", "none", "z" if mlp == "aligned" else "hz"]
    assert apart.config.layer_merges is None
    counts = [sum(p.numel() for p in one.layers.parameters()) for one in (apart, merged)]
    assert counts[1] < counts[0]
    ids, whole = tokens(1, 20), plan_for(merged, Cut(["both"]))
    emptied = [LayerDecision(keep="constant", reason="test"), *whole.layers[1:]]
    with pytest.raises(InputError, match="cuts layer 0, whose linear maps are merged"):
        fold(merged, whole.model_copy(update={"layers": emptied}))
    # As it stands it can be exported again.
    assert_law(fold(merged, whole)(ids).logits, merged(ids).logits)
