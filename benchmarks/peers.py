"""The models FusionTree is measured against: `transformers`' own, at a given number of parameters.

Each peer is built from its `transformers` class with the shape its authors publish (ratios of widths, head
width, groups) and one free size that is solved for the requested number of parameters: the MLP's width, or the
number of layers where a model has no MLP (Mamba-2). Everything runs on torch alone: no kernel package is used
and attention goes through `scaled_dot_product_attention`.

The library's initialisation of the Mamba layers is replaced by that of the papers, see
`initialise_mamba_as_published`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

HEAD_DIM = 64
MLP_STEP = 8


@dataclass(frozen=True, kw_only=True)
class PeerSize:
    """What all models of one comparison have in common.

    vocab_size, hidden_size, num_layers: as in the FusionTree model of the comparison; a peer without an MLP keeps
        the width and takes more layers.
    parameters: number of parameters aimed at, tied embeddings counted once.
    state_size: state channels per Mamba head.
    chunk_size: chunk length of the scan in torch; a matter of speed, not of mathematics.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    parameters: int
    state_size: int = 64
    chunk_size: int = 64


def count_parameters(model: nn.Module) -> int:
    """Number of parameters of `model`, each shared one counted once."""
    return sum(p.numel() for p in model.parameters())


def _llama(size: PeerSize, free: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=free,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.hidden_size // HEAD_DIM,
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=0,
        max_position_embeddings=1 << 20,
    )


def _falcon_h1(size: PeerSize, free: int) -> FalconH1Config:
    # Falcon-H1-0.5B: SSM width 1.5 H in heads of 64, one B/C group, no norm inside the mixer, grouped KV heads.
    # Its muP multipliers belong to the published sizes; at 1 the learning rate is searched instead.
    heads = size.hidden_size // HEAD_DIM
    ssm_width = 3 * size.hidden_size // 2
    return FalconH1Config(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=free,
        num_hidden_layers=size.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
        mamba_d_ssm=ssm_width,
        mamba_n_heads=ssm_width // HEAD_DIM,
        mamba_d_head=HEAD_DIM,
        mamba_d_state=size.state_size,
        mamba_n_groups=1,
        mamba_chunk_size=size.chunk_size,
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=0,
        max_position_embeddings=1 << 20,
    )


def _bamba(size: PeerSize, free: int) -> BambaConfig:
    # Bamba-9B has 3 attention layers among 32, evenly spread; at fewer than 16 layers that is one, in the middle.
    heads = size.hidden_size // HEAD_DIM
    attention_layers = max(1, round(size.num_layers * 3 / 32))
    spacing = size.num_layers / (attention_layers + 1)
    return BambaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=free,
        num_hidden_layers=size.num_layers,
        attn_layer_indices=[round(spacing * (i + 1)) for i in range(attention_layers)],
        num_attention_heads=heads,
        num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
        mamba_expand=2,
        mamba_n_heads=2 * size.hidden_size // HEAD_DIM,
        mamba_d_head=HEAD_DIM,
        mamba_d_state=size.state_size,
        mamba_n_groups=1,
        mamba_chunk_size=size.chunk_size,
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=0,
        max_position_embeddings=1 << 20,
    )


def _mamba_2(size: PeerSize, free: int) -> Mamba2Config:
    return Mamba2Config(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        num_hidden_layers=free,
        num_heads=2 * size.hidden_size // HEAD_DIM,
        head_dim=HEAD_DIM,
        state_size=size.state_size,
        n_groups=1,
        expand=2,
        chunk_size=size.chunk_size,
        # of the embeddings; the projections are initialised below
        initializer_range=0.02,
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=0,
    )


@dataclass(frozen=True)
class _Peer:
    title: str
    model_class: type[PreTrainedModel]
    config: Callable[[PeerSize, int], PretrainedConfig]
    free_step: int  # the free size is a multiple of this


_PEERS = {
    "llama": _Peer("Llama", LlamaForCausalLM, _llama, MLP_STEP),
    "falcon-h1": _Peer("Falcon-H1", FalconH1ForCausalLM, _falcon_h1, MLP_STEP),
    "mamba-2": _Peer("Mamba-2", Mamba2ForCausalLM, _mamba_2, 1),
    "bamba": _Peer("Bamba", BambaForCausalLM, _bamba, MLP_STEP),
}
PEER_NAMES = tuple(_PEERS)


def peer_title(name: str) -> str:
    """The model's name as its authors write it."""
    return _PEERS[name].title


def peer_config(name: str, size: PeerSize, *, tolerance: float = 0.03) -> PretrainedConfig:
    """The configuration of peer `name` with `size.parameters` parameters.

    The count is affine in the free size, so two models on the meta device determine it.

    Raises:
        ValueError: no free size comes within `tolerance` (a fraction) of the number of parameters.
    """
    peer = _PEERS[name]

    def parameters(free: int) -> int:
        with torch.device("meta"):
            return count_parameters(peer.model_class(peer.config(size, free)))

    step = peer.free_step
    base, slope = parameters(step), parameters(2 * step) - parameters(step)
    free = step * max(1, 1 + round((size.parameters - base) / slope))
    found = parameters(free)
    if abs(found / size.parameters - 1) > tolerance:
        raise ValueError(
            f"{peer.title} with hidden size {size.hidden_size} comes no nearer to {size.parameters} parameters than "
            f"{found}; change the hidden size or the number of layers"
        )
    return peer.config(size, free)


def build_peer(name: str, size: PeerSize, *, seed: int, tolerance: float = 0.03) -> PreTrainedModel:
    """Peer `name`, freshly initialised from `seed`, float32, in training mode."""
    config = peer_config(name, size, tolerance=tolerance)
    if name != "mamba-2":  # has no attention to choose an implementation for
        config._attn_implementation = "sdpa"
    torch.manual_seed(seed)
    model = _PEERS[name].model_class(config)
    initialise_mamba_as_published(model, seed=seed, linear_default=name == "mamba-2")
    return model.train()


@torch.no_grad()
def initialise_mamba_as_published(model: nn.Module, *, seed: int, linear_default: bool) -> None:
    """Initialise every Mamba-2 mixer of `model` as in Dao & Gu 2024 (state-spaces/mamba, `modules/mamba2.py`).

    dt_bias is the inverse softplus of a log-uniform draw from [1e-3, 1e-1] (`transformers` leaves it at 1 in
    Falcon-H1 and Bamba), A_log the logarithm of a uniform draw from [1, 16], D one, the convolution torch's default
    (`transformers` draws it with standard deviation 0.02, which silences the mixer). `linear_default` gives the
    projections torch's default too, the output ones divided by sqrt(layers), as Mamba-2 itself has it; the hybrids
    keep the normal draws of standard deviation 0.02 that they are published with.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    mixers = [m for m in model.modules() if hasattr(m, "dt_bias") and hasattr(m, "A_log")]
    for mixer in mixers:
        heads = mixer.dt_bias.shape
        low, high = math.log(1e-3), math.log(1e-1)
        dt = torch.exp(torch.rand(heads, generator=generator) * (high - low) + low)
        mixer.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        mixer.A_log.copy_(torch.empty(heads).uniform_(1, 16, generator=generator).log())
        mixer.D.fill_(1)
        _torch_default(mixer.conv1d, generator)
        if linear_default:
            _torch_default(mixer.in_proj, generator)
            _torch_default(mixer.out_proj, generator)
            mixer.out_proj.weight.div_(math.sqrt(len(mixers)))


def _torch_default(layer: nn.Linear | nn.Conv1d, generator: torch.Generator) -> None:
    fan_in = layer.weight[0].numel()
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    if layer.bias is not None:
        nn.init.uniform_(layer.bias, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in), generator=generator)
