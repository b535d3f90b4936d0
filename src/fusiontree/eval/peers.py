"""transformers' own models at the size of a FusionTree model, to measure its speed and memory against.

Each is built as its authors publish it (ratios of widths, head width, groups), and its MLP's width is solved for the
number of parameters. What they learn is not compared here, so their initialisation is the library's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from fusiontree.errors import InputError
from fusiontree.models import HybridLanguageModelConfig

_MLP_STEP = 8
_TOLERANCE = 0.03


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, each shared one counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _llama(config: HybridLanguageModelConfig, mlp_width: int) -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=mlp_width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        tie_word_embeddings=config.tie_word_embeddings,
        max_position_embeddings=1 << 20,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )


def _falcon_h1(config: HybridLanguageModelConfig, mlp_width: int) -> PreTrainedConfig:
    # Falcon-H1-0.5B: state-space width 1.5 H in heads of 64, one group of B and C, grouped KV heads.
    width, heads = 3 * config.hidden_size // 2, config.num_heads
    head_dim = next(size for size in (64, 32, 16, 8, 4, 2, 1) if width % size == 0)
    return FalconH1Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=mlp_width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
        mamba_d_ssm=width,
        mamba_n_heads=width // head_dim,
        mamba_d_head=head_dim,
        mamba_d_state=max(config.mamba_state_size or 0, 64),
        mamba_n_groups=1,
        mamba_chunk_size=64,
        tie_word_embeddings=config.tie_word_embeddings,
        max_position_embeddings=1 << 20,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )


PEERS: dict[str, Callable[[HybridLanguageModelConfig, int], PreTrainedConfig]] = {
    "llama": _llama,
    "falcon_h1": _falcon_h1,
}


def build_peer(name: str, config: HybridLanguageModelConfig) -> PreTrainedModel:
    """Peer `name` of the width, depth and vocabulary of `config`, and as many parameters within 3 %.

    Raises:
        InputError: there is no such peer, or no width of its MLP comes that near.
    """
    if name not in PEERS:
        raise InputError(f"there is no peer {name!r}; there are {', '.join(PEERS)}")
    from fusiontree.models import HybridLanguageModel

    with torch.device("meta"):
        wanted = count_parameters(HybridLanguageModel(config))
        # The count is linear in the width, so two models on the meta device determine it.
        first, second = (
            count_parameters(AutoModelForCausalLM.from_config(PEERS[name](config, factor * _MLP_STEP)))
            for factor in (1, 2)
        )
    steps = max(1, 1 + round((wanted - first) / (second - first)))
    found = first + (steps - 1) * (second - first)
    if abs(found / wanted - 1) > _TOLERANCE:
        raise InputError(
            f"{name} of hidden size {config.hidden_size} and {config.num_layers} layers comes no nearer to {wanted:,} "
            f"parameters than {found:,}: leave it out of --peers, or change the model's size"
        )
    return AutoModelForCausalLM.from_config(PEERS[name](config, steps * _MLP_STEP))
