"""The model as a transformers model: loading, saving, dtypes, generation, embeddings, outputs."""

from __future__ import annotations

import copy
import inspect
import json

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_config, tiny_model, token_ids
from transformers import AutoModelForCausalLM

import fusiontree
from fusiontree import HybridCache, HybridLanguageModel
from fusiontree.errors import InputError
from fusiontree.models.initialization import HEAD_GAIN, LINEAR_STD, TABLE_STD

FLOAT32 = ("A_log", "D", "dt_bias")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load(tmp_path, tied):
    model = tiny_model(tie_word_embeddings=tied, drop_branch_prob=0.1)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, HybridLanguageModel)
    assert (loaded.lm_head.weight is loaded.embed_tokens.weight) is tied
    ids = token_ids(2, 70)  # longer than anything the tables have seen
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "fusiontree"


@pytest.mark.parametrize("version", [1, 2])
def test_narrow_dtypes_keep_decays_in_float32(tmp_path, version):
    model = tiny_model(mamba_version=version)
    exact = {n: p.clone() for n, p in model.named_parameters() if n.endswith(FLOAT32)}
    model.save_pretrained(tmp_path)
    casts = {
        "from_pretrained": HybridLanguageModel.from_pretrained(tmp_path, dtype=torch.bfloat16),
        ".to": copy.deepcopy(model).to(torch.bfloat16),
        ".bfloat16": copy.deepcopy(model).bfloat16(),
        ".half": copy.deepcopy(model).half(),
    }
    for how, cast in casts.items():
        for name, parameter in cast.named_parameters():
            if name.endswith(FLOAT32):
                assert torch.equal(parameter, exact[name]), (how, name)
            else:
                assert parameter.dtype in (torch.bfloat16, torch.float16), (how, name)
    logits = casts["from_pretrained"](token_ids(1, 9)).logits
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    assert model.double()(token_ids(1, 9)).logits.dtype == torch.float64


def test_autocast_computes_in_bfloat16_and_stays_close():
    model, ids = tiny_model(), token_ids(2, 21)
    exact = model(ids).logits
    seen = []
    handle = model.layers[0].mamba.in_proj.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids)
        piece = model(ids[:, :9])
        rest = model(ids[:, 9:], past_key_values=piece.past_key_values).logits
        details = model(ids, output_gates=True).gate_stats.details
    handle.remove()
    exact_details = model(ids, output_gates=True).gate_stats.details
    for name in ("channel_sum", "channel_square_sum", "entropy_sum"):
        torch.testing.assert_close(getattr(details, name), getattr(exact_details, name), rtol=5e-4, atol=0)
    assert set(seen) == {torch.bfloat16}
    assert (out.logits.float() - exact).abs().max() < 0.02
    assert (rest.float() - exact[:, 9:]).abs().max() < 0.02


@pytest.mark.parametrize("mlp", ["aligned", "residual"])
@torch.no_grad()
def test_a_block_computes_its_equation(mlp):
    model = tiny_model(mlp=mlp, num_layers=1)
    block, seen = model.layers[0], {}
    for name, parameter in block.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    for name in ("mamba", "attention"):
        getattr(block, name).register_forward_hook(lambda module, given, out, name=name: seen.update({name: out}))
    block.register_forward_hook(lambda module, given, out: seen.update(x=given[0], out=out[0]))
    model(token_ids(2, 9))
    x, h_m, h_a = seen["x"], seen["mamba"], seen["attention"]
    h = torch.cat((h_m, h_a), -1)
    shortcut, inner = block.alignment.in_proj(h).chunk(2, -1)
    z = shortcut + block.alignment.out_proj(F.silu(inner))
    g = torch.sigmoid(block.gate.down(torch.tanh(block.gate.up(z))))
    y = x + block.fusion_proj(g * h_m + (1 - g) * h_a)
    if mlp == "aligned":
        y = y + block.small_mlp.out_proj(F.silu(block.small_mlp.in_proj(z)))
    else:
        own = block.residual_mlp
        gate, up = own.in_proj(own.norm(y)).chunk(2, -1)
        y = y + own.out_proj(F.silu(gate) * up)
    torch.testing.assert_close(seen["out"], block.ln_output(y), rtol=1e-5, atol=1e-5)


def test_both_kinds_of_mlp_are_as_large_and_what_nobody_reads_is_not_there():
    def count(**fields):
        return sum(parameter.numel() for parameter in tiny_model(hidden_size=96, **fields).parameters())

    assert count(mlp="residual") == pytest.approx(count(mlp="aligned"), rel=0.01)
    gone = [False, False]
    assert tiny_model(layer_gates=gone, mlp="aligned").layers[0].alignment is not None
    assert tiny_model(layer_gates=gone).layers[0].alignment is None


def test_initialisation():
    model = tiny_model(hidden_size=64, mamba_expand=2, num_layers=4)
    for block in model.layers:
        dt = torch.nn.functional.softplus(block.mamba.dt_bias)
        assert dt.min() >= 1e-3 * 0.999
        assert dt.max() <= 1e-1 * 1.001
        decay = block.mamba.A_log.exp()
        assert decay.min() >= 1
        assert decay.max() <= 16
        assert torch.equal(block.mamba.D, torch.ones_like(block.mamba.D))
        assert block.gate.up.weight.std().item() == pytest.approx(LINEAR_STD / 8, rel=0.2)
        ratio = block.fusion_proj.weight.std() / block.gate.up.weight.std()
        assert 0.8 < ratio * 8**0.5 < 1.2  # residual outputs shrink with sqrt(2 L)
    residual = tiny_model(hidden_size=96, num_layers=4).layers[0].residual_mlp
    ratio = residual.out_proj.weight.std() / residual.in_proj.weight.std()
    assert 0.8 < ratio * (128 / 96 * 8) ** 0.5 < 1.2
    assert all((block.ln_output.weight == 1).all() for block in model.layers[:-1])
    version1 = tiny_model(mamba_version=1).layers[0].mamba.A_log.exp()
    torch.testing.assert_close(version1[3], torch.arange(1.0, 9.0))


@pytest.mark.parametrize("tied", [True, False])
def test_tables_start_small_before_a_large_gain(tied):
    """Small enough to move fast under Adam, and the logits start as if both factors were 1."""
    model = tiny_model(hidden_size=64, vocab_size=500, tie_word_embeddings=tied, srte_encoding="learned")
    assert (model.layers[-1].ln_output.weight == HEAD_GAIN).all()
    for table in (model.embed_tokens.weight, model.lm_head.weight):
        assert table.std().item() == pytest.approx(TABLE_STD / HEAD_GAIN, rel=0.05)
    assert model.srte.table.weight.std().item() == pytest.approx(TABLE_STD, rel=0.1)
    logits = model(torch.randint(500, (2, 40))).logits
    assert logits.std().item() == pytest.approx(TABLE_STD * 64**0.5, rel=0.2)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_added_for_new_tokens_start_like_the_others(tied):
    model = tiny_model(hidden_size=64, tie_word_embeddings=tied)
    model.resize_token_embeddings(600, mean_resizing=False)
    for table in (model.embed_tokens.weight, model.lm_head.weight):
        assert table.shape[0] == 600
        assert table[61:].std().item() == pytest.approx(TABLE_STD / HEAD_GAIN, rel=0.05)


def test_time_encoding_of_a_position_has_length_one():
    srte = tiny_model(hidden_size=64, srte_rank=32).srte
    torch.nn.init.eye_(srte.proj.weight)
    lengths = srte(torch.arange(300)[None], 299).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_dropout_takes_embeddings_and_updates_in_training_alone():
    model, ids = tiny_model(hidden_size=64, dropout=0.5), token_ids(4, 40)
    plain = tiny_model(hidden_size=64, dropout=0.0)
    assert torch.equal(model(ids).logits, plain(ids).logits)  # in evaluation mode
    model.train()
    embedded = model(ids, output_hidden_states=True).hidden_states[0]
    kept = embedded != 0
    assert kept.float().mean().item() == pytest.approx(0.5, abs=0.05)
    whole = model.embed_tokens(ids)
    torch.testing.assert_close(embedded[kept], 2 * whole[kept])
    # The blocks drop parts of their update too: without dropped embeddings, two passes still differ.
    model.embed_dropout.p = 0.0
    first, second = (model(ids, output_hidden_states=True).hidden_states for _ in range(2))
    assert torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])
    model.layers[0].dropout.p = model.layers[1].dropout.p = 0.0
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_missing_weights_are_initialised_like_new(tmp_path):
    """A checkpoint without the time steps gets fresh ones in the papers' range, not zeros."""
    from safetensors.torch import load_file, save_file

    tiny_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.endswith("dt_bias")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = HybridLanguageModel.from_pretrained(tmp_path)
    dt = torch.nn.functional.softplus(loaded.layers[0].mamba.dt_bias)
    assert 1e-3 * 0.999 <= dt.min() <= dt.max() <= 1e-1 * 1.001


@pytest.mark.parametrize("embeds", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"do_sample": False}, {"do_sample": True, "top_k": 5}, {"num_beams": 3, "num_return_sequences": 2}],
    ids=["greedy", "sampling", "beams"],
)
def test_generate_equals_no_cache(options, embeds):
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
    ids = token_ids(2, 7)
    inputs = {"inputs_embeds": model.embed_tokens(ids).detach()} if embeds else {"inputs": ids}
    outputs = []
    for use_cache in (True, False):
        if embeds and not use_cache:
            inputs = {"inputs": ids}
        torch.manual_seed(0)
        out = model.generate(**inputs, max_new_tokens=9, min_new_tokens=9, use_cache=use_cache, **options)
        outputs.append(out[:, -9:])
    assert torch.equal(*outputs)


def test_generate_returns_its_state_and_goes_on():
    model, ids = tiny_model(), token_ids(1, 8)
    whole = model.generate(ids, max_new_tokens=10, min_new_tokens=10, do_sample=False)
    first = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert isinstance(first.past_key_values, HybridCache)
    rest = model.generate(
        first.sequences, past_key_values=first.past_key_values, max_new_tokens=6, min_new_tokens=6, do_sample=False
    )
    assert torch.equal(rest, whole)


def test_chunked_prefill_equals_whole():
    model, ids = tiny_model(), token_ids(2, 23)
    want = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False, prefill_chunk_size=7), want)


def test_other_cache_implementations_are_refused():
    with pytest.raises(InputError, match="static"):
        tiny_model().generate(token_ids(1, 4), cache_implementation="static", max_new_tokens=2)


@pytest.mark.parametrize("tied", [False, True])
def test_resize_token_embeddings(tied):
    model, ids = tiny_model(tie_word_embeddings=tied), token_ids(1, 6)
    with torch.no_grad():
        before = model(ids).logits
    model.resize_token_embeddings(80)
    after = model(ids).logits
    assert after.shape[-1] == 80 == model.config.vocab_size
    torch.testing.assert_close(after[..., :61], before)
    model(ids, labels=ids).loss.backward()


def test_outputs():
    model, ids = tiny_model(), token_ids(2, 11)
    said = {}
    for name in ("mamba", "attention"):
        branch = getattr(model.layers[0], name)
        branch.register_forward_hook(lambda module, given, output, name=name: said.setdefault(name, output.detach()))
    out = model(ids, output_hidden_states=True, output_gates=True)
    assert len(out.hidden_states) == 3
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    assert out.gate_stats.mean.shape == (2, 2)
    details = out.gate_stats.details
    assert details.histogram.sum(1).tolist() == [2 * 11 * 32.0] * 2
    torch.testing.assert_close(details.channel_sum.sum(1) / (22 * 32), out.gate_stats.mean.mean(1))
    for name, found in said.items():
        torch.testing.assert_close(getattr(details, f"{name}_sum")[0], found.sum((0, 1)), atol=1e-5, rtol=1e-4)
    with_labels = model(ids, labels=ids)
    assert with_labels.logits is None
    assert with_labels.past_key_values is None
    assert model(ids, labels=ids, logits_to_keep=2).logits.shape == (2, 2, 61)
    as_tuple = model(ids, labels=ids, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], with_labels.loss)
    model.config.return_logits_with_loss = True
    assert model(ids, labels=ids).logits.shape == (2, 11, 61)


def test_loss_is_the_mean_over_counted_labels():
    model, ids = tiny_model(), token_ids(2, 11)
    labels = ids.clone()
    labels[0, 4:7] = -100
    logits = model(ids).logits[:, :-1]
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(model(ids, labels=labels).loss, want)
    nothing = model(ids, labels=torch.full_like(ids, -100)).loss
    assert nothing == 0
    nothing.backward()


def test_refusals():
    model, ids = tiny_model(), token_ids(2, 5)
    with pytest.raises(TypeError, match="attention_masks"):
        model(ids, attention_masks=torch.ones_like(ids))
    with pytest.raises(InputError, match="either `input_ids` or `inputs_embeds`"):
        model()
    with pytest.raises(InputError, match="at least one token"):
        model(ids[:, :0])
    with pytest.raises(InputError, match=r"shape \[2, 4\], expected \[2, 5\]"):
        model(ids, attention_mask=torch.ones(2, 4))
    with pytest.raises(InputError, match=r"`position_ids` has shape"):
        model(ids, position_ids=torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(InputError, match="zeros between real tokens"):
        model(ids, attention_mask=torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 0]]))
    cache = model(ids).past_key_values
    with pytest.raises(InputError, match=r"expected \[2, 7\]"):
        model(ids[:, :2], attention_mask=torch.ones(2, 2), past_key_values=cache)
    assert not any(p.kind == p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())


def test_learned_encoding_has_an_end():
    model = tiny_model(srte_encoding="learned")
    model(token_ids(1, 64))
    with pytest.raises(InputError, match="position 64 lies past the learned time encoding of 64 positions"):
        model(token_ids(1, 65))
    cache = model(token_ids(1, 64)).past_key_values
    with pytest.raises(InputError, match="learned time encoding"):
        model(token_ids(1, 1), past_key_values=cache)


def test_branch_dropout_follows_its_key_and_uses_the_running_mean():
    model, ids = tiny_model(drop_branch_prob=0.5, num_layers=6).train(), token_ids(2, 11)

    def run(*key):
        model.set_dropout_key(*key)
        out = model(ids, labels=ids)
        return out.gate_stats.active.tolist()

    patterns = [run(0, step, 0) for step in range(12)]
    assert patterns == [run(0, step, 0) for step in range(12)]
    assert len({tuple(pattern) for pattern in patterns}) > 4
    share = 1 - sum(map(sum, patterns)) / (12 * 6)
    assert 0.3 < share < 0.7
    assert run(0, 3, 1) != patterns[3] or run(1, 3, 0) != patterns[3]
    model.eval()
    assert model(ids).gate_stats.active.all()


def test_the_running_mean_is_a_mean_from_its_first_update_on():
    model, ids = tiny_model(drop_branch_prob=0.3).train(), token_ids(2, 11)
    seen: list[torch.Tensor] = []
    model.layers[0].mamba.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    for step in range(5):
        model.set_dropout_key(0, step, 0)
        model(ids + step % 2, labels=ids)
    assert 2 <= len(seen) <= 5
    want = torch.stack([output.mean((0, 1)) for output in seen]).mean(0)
    torch.testing.assert_close(model.layers[0].mamba_mean, want, atol=1e-6, rtol=1e-4)


def test_the_three_that_stay_float32():
    model = tiny_model().double().to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name.endswith(("A_log", ".D", "dt_bias")) else torch.bfloat16)


def test_a_state_of_another_dtype():
    model, ids = tiny_model().eval(), token_ids(2, 12)
    with torch.no_grad():
        want = model(ids).logits[:, 8:]
        for pieces in ([4], [1, 1, 1, 1]):
            with torch.autocast("cpu", torch.bfloat16):
                cache = model(ids[:, :8]).past_key_values
            got = [model(piece, past_key_values=cache).logits for piece in torch.split(ids[:, 8:], pieces, dim=1)]
            assert (torch.cat(got, dim=1) - want).abs().max() < 0.05


def test_positions_go_on_from_where_the_state_stands():
    model, ids = tiny_model().eval(), token_ids(2, 12)
    far = torch.arange(12)[None] + 1000
    with torch.no_grad():
        want = model(ids, position_ids=far).logits
        cache = model(ids[:, :7], position_ids=far[:, :7]).past_key_values
        torch.testing.assert_close(model(ids[:, 7:], past_key_values=cache).logits, want[:, 7:], atol=1e-5, rtol=1e-4)
        learned = tiny_model(srte_encoding="learned").eval()
        longest = learned.config.max_position_embeddings
        cache = learned(ids[:, :4], position_ids=torch.arange(4)[None] + longest - 6).past_key_values
        with pytest.raises(InputError, match=f"position {longest + 1} lies past the learned time encoding"):
            learned(ids[:, 4:8], past_key_values=cache)


def test_what_callers_of_other_models_pass():
    model, ids = tiny_model(), token_ids(2, 5)
    assert model(ids, inputs_embeds=None, output_attentions=None, labels=None, return_dict=None).logits is not None
    with pytest.raises(InputError, match="no attention weights are ever held"):
        model(ids, output_attentions=True)
    with pytest.raises(TypeError):
        model(ids, output_atentions=None)


def test_a_cache_that_was_reset_takes_any_number_of_rows():
    model, ids = tiny_model().eval(), token_ids(3, 9)
    with torch.no_grad():
        cache = model(ids).past_key_values
        cache.reset()
        assert not cache.is_initialized and cache.get_seq_length() == 0 and cache.nbytes == 0
        torch.testing.assert_close(model(ids[:2], past_key_values=cache).logits, model(ids[:2]).logits)


def test_push_to_hub_uploads_a_loadable_folder(tmp_path, monkeypatch):
    """The inherited method; only huggingface_hub's two network calls are replaced."""
    from huggingface_hub import HfApi, RepoUrl

    def create_commit(self, repo_id, operations, **kwargs):
        assert repo_id == "someone/tiny"
        for operation in operations:
            with operation.as_file() as file:
                (tmp_path / operation.path_in_repo).write_bytes(file.read())

    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, repo_id, **kwargs: RepoUrl(f"https://huggingface.co/{repo_id}")
    )
    model, ids = tiny_model(), token_ids(1, 9)
    model.push_to_hub("someone/tiny")
    assert torch.equal(HybridLanguageModel.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_local_attention_sees_its_window_alone():
    """Without global heads and scans, what lies further back than the layers' windows reach changes nothing."""
    model = tiny_model(global_heads=0, layer_branches=["attention", "attention"], window_size=4)
    ids = token_ids(1, 30)
    changed = ids.clone()
    changed[0, 10] = (changed[0, 10] + 1 - 3) % 58 + 3
    difference = (model(ids).logits - model(changed).logits).abs().amax(-1)[0]
    reach = 10 + 2 * (4 - 1)
    assert difference[reach] > 0
    assert difference[reach + 1 :].max() == 0
    assert tiny_config().layer_window(1) == 5


@torch.no_grad()
def test_a_model_saved_before_there_was_a_choice_of_mlp_computes_what_it_did(tmp_path):
    model, ids = tiny_model(mlp="aligned"), token_ids(2, 9)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({name: value for name, value in json.loads(file.read_text()).items() if name != "mlp"}))
    for load in (HybridLanguageModel.from_pretrained, AutoModelForCausalLM.from_pretrained, fusiontree.load):
        assert torch.equal(load(tmp_path).eval()(ids).logits, model(ids).logits)
