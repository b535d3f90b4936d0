"""The configuration: defaults, names that transformers reads, and one clear sentence for every bad value."""

from __future__ import annotations

import json

import pytest
from tiny import tiny_config
from transformers import AutoConfig

from fusiontree import HybridLanguageModelConfig
from fusiontree.errors import InputError


def test_defaults_are_the_published_recipe():
    config = HybridLanguageModelConfig()
    assert (config.hidden_size, config.num_layers, config.num_heads, config.global_heads) == (1536, 18, 12, 2)
    assert (config.window_size, config.gate_rank, config.max_position_embeddings) == (256, 96, 8192)
    assert config.num_kv_heads == 12
    assert config.mamba_state_size == 64
    assert HybridLanguageModelConfig(mamba_version=1).mamba_state_size == 16


def test_names_that_transformers_and_peft_read():
    config = tiny_config(num_kv_heads=2)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (2, 4, 2)
    by_alias = HybridLanguageModelConfig(num_hidden_layers=3, num_attention_heads=6)
    assert (by_alias.num_layers, by_alias.num_heads) == (3, 6)


def test_round_trip(tmp_path):
    config = tiny_config(layer_branches=["both", "mamba"], mamba_version=1, dropout=0.1)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, HybridLanguageModelConfig)
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()


def test_a_model_saved_before_there_were_two_kinds_of_mlp_has_the_first(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    saved = json.loads(file.read_text())
    assert saved.pop("mlp") == "residual" == AutoConfig.from_pretrained(tmp_path).mlp
    file.write_text(json.dumps(saved))
    assert AutoConfig.from_pretrained(tmp_path).mlp == "aligned"
    assert AutoConfig.from_pretrained(tmp_path, mlp="residual").mlp == "residual"
    for config in (HybridLanguageModelConfig.from_json_file(str(file)), HybridLanguageModelConfig(**saved)):
        assert config.mlp == "aligned"


def test_what_is_given_while_loading_is_validated_too(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path, window_size=7, trust_remote_code=False)
    assert (loaded.window_size, loaded.num_layers) == (7, 2)
    assert HybridLanguageModelConfig.from_pretrained(tmp_path, num_hidden_layers=3).num_layers == 3
    for load in (AutoConfig, HybridLanguageModelConfig):
        with pytest.raises(InputError, match="`hiden_size` is not a field.*did you mean `hidden_size`"):
            load.from_pretrained(tmp_path, hiden_size=3)
        with pytest.raises(InputError, match="`window_size` must be a whole number of at least 1, got 0"):
            load.from_pretrained(tmp_path, window_size=0)


def test_pyramidal_windows():
    config = tiny_config(attention_type="pyramidal", num_layers=6, window_size=4)
    assert [config.layer_window(layer) for layer in range(6)] == [4, 4, 8, 8, 16, 16]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"windows_size": 4}, "`windows_size` is not a field.*did you mean `window_size`"),
        ({"hiden_size": 4}, "did you mean `hidden_size`"),
        ({"num_heads": 5}, "`hidden_size` 32 is not a multiple of `num_heads` 5"),
        ({"num_heads": 32}, "must be even"),
        ({"num_kv_heads": 3}, "`num_heads` 4 is not a multiple of `num_kv_heads` 3"),
        ({"window_size": 0}, "`window_size` must be a whole number of at least 1, got 0"),
        ({"global_heads": 5}, "`global_heads` must lie between 0 and `num_heads` 4, got 5"),
        ({"num_kv_heads": 2, "global_heads": 1}, "must be a multiple of the 2 query heads that share"),
        ({"mamba_version": 3}, "`mamba_version` must be one of 1, 2, got 3"),
        ({"mamba_head_dim": 12}, "is not a multiple of `mamba_head_dim` 12"),
        ({"srte_encoding": "none"}, "`srte_encoding` must be one of sincos, learned"),
        ({"attention_type": "full"}, "`attention_type` must be one of local_global, pyramidal"),
        ({"layer_branches": ["both"]}, "names 1 layers, but `num_layers` is 2"),
        ({"layer_branches": ["both", "none"]}, r"`layer_branches\[1\]` must be one of both, mamba, attention"),
        ({"layer_heads": [None]}, "`layer_heads` must hold one entry for each of the 2 layers.*got 1 entries"),
        ({"layer_heads": 3}, "`layer_heads` must hold one entry for each of the 2 layers.*got 3"),
        ({"layer_heads": [None, 3]}, r"`layer_heads\[1\]` must be null or name numbers of heads.*got 3"),
        ({"layer_heads": [{"mambas": 1}, None]}, "counts heads of the kind 'mambas'; did you mean mamba"),
        ({"layer_heads": [{"mamba": 99}, None]}, r"`layer_heads\[0\]` must keep between 0 and \d+ mamba heads, got 99"),
        ({"layer_heads": [{"local": True}, None]}, "local heads, got True"),
        ({"layer_heads": [{"mamba": 0}, None]}, "leaves the branch `mamba` no head"),
        ({"layer_heads": [{"local": 0, "global": 0}, None]}, "leaves the branch `attention` no head"),
        ({"layer_heads": [{"local": 1}, None], "num_kv_heads": 2}, "keeps 1 local heads.*no multiple of the 2 query"),
        ({"layer_heads": [{"mamba": 1}, None], "mamba_version": 1}, "`mamba_version` 1 does not have"),
        (
            {"layer_heads": [None, {"mamba": 1}], "layer_branches": ["both", "attention"]},
            "counts mamba heads, but the layer keeps `attention` alone",
        ),
        ({"layer_branches": "mamba"}, "`layer_branches` must be a list with a branch for each layer, got 'mamba'"),
        ({"layer_gates": False}, "`layer_gates` must hold true or false for each of the 2 layers, got False"),
        ({"layer_merges": ["none"]}, "`layer_merges` must name one of none, z, hz for each of the 2 layers"),
        ({"layer_merges": ["none", "h"]}, r"`layer_merges\[1\]` must be one of none, z, hz, got 'h'"),
        ({"layer_merges": ["z", "none"]}, r"`layer_merges\[0\]` is z, but maps can be merged only in a layer of one"),
        (
            {
                "layer_branches": ["mamba", "mamba"],
                "layer_gates": [False, False],
                "layer_merges": ["hz", "z"],
                "mlp": "residual",
            },
            r"`layer_merges\[1\]` is z, but with `mlp: residual` a layer without a gate has no z: name hz",
        ),
        ({"dropout": 1.0}, "`dropout` must be at least 0 and below 1"),
        ({"hidden_size": "32"}, "`hidden_size` must be a whole number"),
        ({"num_layers": True}, "`num_layers` must be a whole number"),
        ({"conv_kernel": 1}, "`conv_kernel` must be at least 2"),
        ({"tie_word_embeddings": "flase"}, "`tie_word_embeddings` must be true or false, got 'flase'"),
        ({"use_alignment": None}, "`use_alignment` must be true or false, got None"),
        ({"mlp": "resdual"}, "`mlp` must be one of residual, aligned, got 'resdual'"),
        ({"use_cache": 0}, "`use_cache` must be true or false, got 0"),
        ({"return_logits_with_loss": "no"}, "`return_logits_with_loss` must be true or false"),
        ({"mamba_version": True}, "`mamba_version` must be one of 1, 2, got True"),
        ({"global_heads": True}, "`global_heads` must lie between 0 and `num_heads` 4, got True"),
        ({"norm_eps": 0}, "`norm_eps` must be a positive number"),
    ],
    ids=str,
)
def test_bad_values(overrides, sentence):
    with pytest.raises(InputError, match=sentence) as caught:
        tiny_config(**overrides)
    assert "\n" not in str(caught.value)
