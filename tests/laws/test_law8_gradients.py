"""Law 8: gradient checkpointing, loss chunking and splitting a batch change no gradient."""

from __future__ import annotations

import pytest
import torch
from conftest_laws import COMBINATIONS, FEW, build, packed_positions, tokens

from fusiontree.errors import InputError
from fusiontree.models.layout import count_labels, shift_labels
from fusiontree.ops import linear_cross_entropy

POSITIONS = packed_positions([7, 16], [23], [1, 2, 20], [11, 12])
SCOPES = ("mamba", "attention", "branches", "block")
CUT = [
    "gates-folded-and-a-constant-layer",
    "heads-cut",
    "heads-cut-kv2-pruned",
    "maps-merged",
    "aligned-mlp-cut",
    "linear-alignment-merged",
]
MANY = ["all-global", "all-local", "expand2-tied-linear-alignment", *CUT, *FEW]


@pytest.fixture(autouse=True)
def _with_grad():
    with torch.enable_grad():
        yield


def loss_and_gradients(model, scale_by_count=None, rows=slice(None), gates=True):
    ids, positions = tokens(4, 23)[rows], POSITIONS[rows]
    out = model(ids, position_ids=positions, labels=ids)
    loss = out.loss if scale_by_count is None else out.loss * count_labels(ids, positions) / scale_by_count
    if gates:
        share = ids.shape[0] / 4
        loss = loss + share * (out.gate_stats.mean.square().mean() + out.gate_stats.entropy.mean())
    loss.backward()
    return loss.detach()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients_equal(got, want, tolerance=2e-5):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert (got[name] - value).abs().max() <= tolerance * max(1.0, value.abs().max()), name


def saved_bytes(run):
    """Bytes that autograd keeps for the backward pass of what `run` computes."""
    found = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("name", MANY)
def test_checkpointing(name):
    model = build(**COMBINATIONS[name]).train()
    loss = loss_and_gradients(model)
    want = gradients(model)
    assert len(want) == len(list(model.parameters()))  # every parameter is reached
    model.activation_checkpointing_enable()
    for scope in (None, *SCOPES):
        if scope is not None:
            model.gradient_checkpointing_enable({"scope": scope})
        model.zero_grad()
        assert loss_and_gradients(model) == loss
        assert_gradients_equal(gradients(model), want, 1e-6)


@pytest.mark.parametrize("version", [1, 2])
def test_each_scope_keeps_less(version):
    model, ids = build(mamba_version=version).train(), tokens(4, 23)
    kept = {"off": saved_bytes(lambda: model(ids, labels=ids))}
    for scope in SCOPES:
        model.gradient_checkpointing_enable({"scope": scope})
        kept[scope] = saved_bytes(lambda: model(ids, labels=ids))
    assert kept["block"] < kept["branches"] < min(kept["mamba"], kept["attention"])
    assert max(kept["mamba"], kept["attention"]) < kept["off"]
    assert kept["branches"] < 0.7 * kept["off"]
    model.gradient_checkpointing_enable()
    assert saved_bytes(lambda: model(ids, labels=ids)) == kept["branches"]
    model.gradient_checkpointing_enable({"scope": "block"}, every_n_layers=2)  # layers 0 and 2 of three
    assert kept["block"] < saved_bytes(lambda: model(ids, labels=ids)) < kept["off"]
    model.gradient_checkpointing_disable()
    assert saved_bytes(lambda: model(ids, labels=ids)) == kept["off"]


def test_an_unknown_scope_is_refused():
    with pytest.raises(InputError, match="'blok'; did you mean 'block'"):
        build().gradient_checkpointing_enable({"scope": "blok"})


@pytest.mark.parametrize("name", [*FEW, *CUT])
def test_under_bfloat16_autocast(name):
    """Checkpointing repeats the same roundings; a split batch sums in another order, in 8 bits of mantissa."""
    model = build(**COMBINATIONS[name]).train()
    total = count_labels(tokens(4, 23), POSITIONS)

    def run(*parts):
        model.zero_grad()
        for rows in parts:
            with torch.autocast("cpu", torch.bfloat16):
                loss_and_gradients(model, total, rows)
        return gradients(model)

    want = run(slice(None))
    assert_gradients_equal(run(slice(0, 1), slice(1, 4)), want, 0.005)
    for scope in SCOPES:
        model.gradient_checkpointing_enable({"use_reentrant": False, "scope": scope})
        assert_gradients_equal(run(slice(None)), want, 1e-6)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("checkpointing", [None, "branches", "block"])
def test_on_a_state(name, checkpointing):
    """The gradient of a piece that is read on a state: as if the state were a constant of the same values."""
    model, ids = build(**COMBINATIONS[name]).train(), tokens(2, 12)
    if checkpointing:
        model.gradient_checkpointing_enable({"scope": checkpointing})

    def state():
        with torch.no_grad():
            return model(ids[:, :5], use_cache=True).past_key_values

    for cuts in ([7], [3, 4], [6, 1]):
        cache, losses, copies = state(), [], []
        for start, piece in zip((5, 5 + cuts[0]), torch.split(ids[:, 5:], cuts, dim=1), strict=False):
            copies.append((start, cache.clone()))
            losses.append(model(piece, past_key_values=cache).logits.square().mean())
        model.zero_grad()
        sum(losses).backward()
        got, after = gradients(model), cache.state()
        model.zero_grad()
        for (_, copy), piece in zip(copies, torch.split(ids[:, 5:], cuts, dim=1), strict=True):
            model(piece, past_key_values=copy).logits.square().mean().backward()
        assert_gradients_equal(got, gradients(model), 1e-6)
        for key, value in cache.state().items():
            assert torch.equal(value, after[key]), key  # backward writes no state
    # One token is the simplest case to get by hand: its gradient by finite differences of the last bias.
    bias = model.layers[-1].fusion_proj.bias
    model.zero_grad()
    model(ids[:, 5:6], past_key_values=state()).logits.square().mean().backward()
    step, found = 1e-2, bias.grad[0].item()
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            bias[0] += sign * step
            values.append(model(ids[:, 5:6], past_key_values=state()).logits.square().mean().item())
            bias[0] -= sign * step
    assert abs((values[0] - values[1]) / (2 * step) - found) <= 0.05 * max(abs(found), 0.02)


def test_gradients_of_logits_in_evaluation_mode():
    model, ids = build(), tokens(2, 12)
    model(ids, use_cache=False).logits.square().mean().backward()
    want = gradients(model)
    model.zero_grad()
    out = model(ids)
    assert out.past_key_values is not None
    out.logits.square().mean().backward()
    assert_gradients_equal(gradients(model), want, 1e-6)


def test_padding_changes_no_gradient():
    model = build().train()
    ids, mask = tokens(3, 12), torch.ones(3, 12, dtype=torch.long)
    mask[1, :5] = 0
    mask[2, 9:] = 0

    def run(ids, mask):
        model.zero_grad()
        out = model(ids, attention_mask=mask, labels=ids)
        (out.loss + (out.gate_stats.mean * out.gate_stats.tokens).sum() / mask.sum()).backward()
        return gradients(model)

    want = run(ids, mask)
    assert_gradients_equal(run(ids.masked_fill(mask == 0, 7), mask), want, 1e-6)
    for scope in SCOPES:
        model.gradient_checkpointing_enable({"scope": scope})
        assert_gradients_equal(run(ids, mask), want, 1e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_checkpointing_with_dropout_of_both_kinds(version, use_reentrant):
    """Two forwards stand before each backward: a recomputation must not see what the second did to running means."""

    def run(scope):
        model = build(drop_branch_prob=0.6, dropout=0.2, mamba_version=version).train()
        if scope:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant, "scope": scope})
        torch.manual_seed(3)
        losses, details = [], {}
        for step in range(3):
            model.set_dropout_key(seed=5, step=step, micro_batch=0)
            for rows in (slice(0, 2), slice(2, 4)):
                ids, positions = tokens(4, 23)[rows], POSITIONS[rows]
                out = model(ids, position_ids=positions, labels=ids, output_gates=True)
                losses.append(out.loss + out.gate_stats.mean.square().mean() + out.gate_stats.entropy.mean())
                if out.gate_stats.details is not None:
                    details |= vars(out.gate_stats.details)
            (losses[-2] + losses[-1]).backward()
        assert details
        return torch.stack(losses).detach(), gradients(model), dict(model.named_buffers()) | details, torch.rand(1)

    losses, want, want_buffers, drawn = run(None)
    for scope in SCOPES:
        again, got, got_buffers, drawn_again = run(scope)
        assert torch.equal(again, losses) and drawn_again == drawn
        assert_gradients_equal(got, want, 1e-6)
        for name, value in want_buffers.items():
            assert torch.equal(got_buffers[name], value), name


@pytest.mark.parametrize("name", [*FEW, *CUT])
def test_splitting_the_batch(name):
    model = build(**COMBINATIONS[name]).train()
    total = count_labels(tokens(4, 23), POSITIONS)
    loss_and_gradients(model, total)
    want = gradients(model)
    model.zero_grad()
    for rows in (slice(0, 1), slice(1, 4)):
        loss_and_gradients(model, total, rows)
    assert_gradients_equal(gradients(model), want)


def test_loss_chunks_equal_whole_logits():
    model = build()
    ids, hidden = tokens(2, 23), torch.randn(2, 23, 32, requires_grad=True)
    labels, weight = shift_labels(ids), model.lm_head.weight
    whole = torch.nn.functional.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten())
    want = torch.autograd.grad(whole, (hidden, weight))
    for chunk in (1, 5, 46, 1000):
        loss = linear_cross_entropy(hidden, weight, labels, chunk_size=chunk)
        assert abs(loss - whole) <= 1e-5
        for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), want, strict=True):
            assert (a - b).abs().max() <= 1e-6


def test_training_never_holds_logits_or_scores():
    """No tensor of the training step is as large as [B, T, V] logits or [B, heads, T, T] scores."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    Largest.numel = max(Largest.numel, tensor.numel())
            return out

    batch, length = 2, 2048
    model = build(vocab_size=2000, window_size=32, max_position_embeddings=4096).train()
    ids = tokens(batch, length)
    with Largest():
        model(ids, labels=ids).loss.backward()
    logits, scores = batch * length * 2000, batch * 4 * length * length
    assert Largest.numel < min(logits, scores) / 3
