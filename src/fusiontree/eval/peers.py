"""transformers' own models at a given number of parameters, to measure a FusionTree model against.

Each peer has the shape its authors publish (ratios of widths, head width, groups) and one free size, solved for the
number of parameters: the MLP's width, or the number of layers where a model has no MLP (Mamba-2). Everything runs on
torch alone: no kernel package, attention through `scaled_dot_product_attention`. Mamba layers start as their papers
say, not as the library has it: `initialize_mamba_as_published`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    FalconH1Config,
    LlamaConfig,
    Mamba2Config,
    PreTrainedConfig,
    PreTrainedModel,
)

from fusiontree.errors import InputError, nearest
from fusiontree.models import HybridLanguageModel, HybridLanguageModelConfig

_MLP_STEP = 8
_WIDEST_HEAD = 64


@dataclass(frozen=True, kw_only=True)
class PeerSize:
    """What all models of one comparison have in common.

    vocab_size, hidden_size, num_layers, num_heads, tie_word_embeddings: of the model compared with; a peer without an
        MLP keeps the width and takes more layers.
    parameters: number aimed at, each shared one counted once.
    state_size: state channels per Mamba head.
    chunk_size: chunk length of the peers' scans; a matter of speed, not of mathematics.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    parameters: int
    tie_word_embeddings: bool = True
    state_size: int = 64
    chunk_size: int = 64

    @classmethod
    def of(cls, config: HybridLanguageModelConfig) -> PeerSize:
        """The size of a FusionTree model."""
        with torch.device("meta"):
            parameters = count_parameters(HybridLanguageModel(config))
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            parameters=parameters,
            tie_word_embeddings=config.tie_word_embeddings,
            state_size=max(config.mamba_state_size or 0, 64),
        )


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, each shared one counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _common(size: PeerSize) -> dict[str, Any]:
    return {
        "vocab_size": size.vocab_size,
        "hidden_size": size.hidden_size,
        "tie_word_embeddings": size.tie_word_embeddings,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _with_attention(size: PeerSize, free: int, kv_heads: int) -> dict[str, Any]:
    return {
        **_common(size),
        "num_hidden_layers": size.num_layers,
        "intermediate_size": free,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 1 << 20,
        "attn_implementation": "sdpa",
    }


def _grouped(size: PeerSize) -> int:
    return size.num_heads // 2 if size.num_heads % 2 == 0 else size.num_heads


def _head_width(width: int) -> int:
    return math.gcd(width, _WIDEST_HEAD)


def _llama(size: PeerSize, free: int) -> PreTrainedConfig:
    return LlamaConfig(**_with_attention(size, free, size.num_heads))


def _falcon_h1(size: PeerSize, free: int) -> PreTrainedConfig:
    # Falcon-H1-0.5B: state-space width 1.5 H, one group of B and C, no norm inside the mixer, grouped KV heads.
    # Its muP multipliers belong to the published sizes; at 1, as here, the learning rate is searched instead.
    width = 3 * size.hidden_size // 2
    return FalconH1Config(
        **_with_attention(size, free, _grouped(size)),
        mamba_d_ssm=width,
        mamba_n_heads=width // _head_width(width),
        mamba_d_head=_head_width(width),
        mamba_d_state=size.state_size,
        mamba_n_groups=1,
        mamba_chunk_size=size.chunk_size,
    )


def _bamba(size: PeerSize, free: int) -> PreTrainedConfig:
    # Bamba-9B has 3 attention layers among 32, evenly spread; at fewer than 16 layers that is one, in the middle.
    attention_layers = max(1, round(size.num_layers * 3 / 32))
    spacing = size.num_layers / (attention_layers + 1)
    width = 2 * size.hidden_size
    return BambaConfig(
        **_with_attention(size, free, _grouped(size)),
        attn_layer_indices=[round(spacing * (i + 1)) for i in range(attention_layers)],
        mamba_expand=2,
        mamba_n_heads=width // _head_width(width),
        mamba_d_head=_head_width(width),
        mamba_d_state=size.state_size,
        mamba_n_groups=1,
        mamba_chunk_size=size.chunk_size,
    )


def _mamba2(size: PeerSize, free: int) -> PreTrainedConfig:
    width = 2 * size.hidden_size
    return Mamba2Config(
        **_common(size),
        num_hidden_layers=free,
        num_heads=width // _head_width(width),
        head_dim=_head_width(width),
        state_size=size.state_size,
        n_groups=1,
        expand=2,
        chunk_size=size.chunk_size,
        initializer_range=0.02,  # of the embeddings; the projections are initialised below
    )


@dataclass(frozen=True)
class _Peer:
    title: str
    config: Callable[[PeerSize, int], PreTrainedConfig]
    free_step: int = _MLP_STEP  # the free size is a multiple of this


#: By the names transformers gives the model types.
PEERS = {
    "llama": _Peer("Llama", _llama),
    "falcon_h1": _Peer("Falcon-H1", _falcon_h1),
    "mamba2": _Peer("Mamba-2", _mamba2, free_step=1),
    "bamba": _Peer("Bamba", _bamba),
}


def peer_config(name: str, size: PeerSize, *, tolerance: float = 0.03) -> PreTrainedConfig:
    """The configuration of peer `name` with `size.parameters` parameters.

    Raises:
        InputError: there is no such peer, or no free size comes within `tolerance` (a fraction) of the number.
    """
    if name not in PEERS:
        close = nearest(name, PEERS)
        hint = f"; did you mean {close}?" if close else f"; there are {', '.join(PEERS)}"
        raise InputError(f"there is no peer {name!r}{hint}")
    peer = PEERS[name]

    def parameters(free: int) -> int:
        with torch.device("meta"):
            return count_parameters(AutoModelForCausalLM.from_config(peer.config(size, free)))

    # The count is affine in the free size, so two models on the meta device determine it.
    step = peer.free_step
    base, slope = parameters(step), parameters(2 * step) - parameters(step)
    steps = max(1, 1 + round((size.parameters - base) / slope))
    found = base + (steps - 1) * slope
    if abs(found / size.parameters - 1) > tolerance:
        raise InputError(
            f"{name} of hidden size {size.hidden_size} and {size.num_layers} layers comes no nearer to "
            f"{size.parameters:,} parameters than {found:,}: leave it out, or change the model's size"
        )
    return peer.config(size, steps * step)


def build_peer(name: str, size: PeerSize, *, seed: int = 0, tolerance: float = 0.03) -> PreTrainedModel:
    """Peer `name`, freshly initialised from `seed`, float32, in training mode.

    Raises:
        InputError: as `peer_config`.
    """
    config = peer_config(name, size, tolerance=tolerance)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    initialize_mamba_as_published(model, seed=seed, linear_default=name == "mamba2")
    return model.train()


@torch.no_grad()
def initialize_mamba_as_published(model: nn.Module, *, seed: int, linear_default: bool) -> None:
    """Initialise every Mamba-2 mixer of `model` as in Dao & Gu 2024 (state-spaces/mamba, `modules/mamba2.py`).

    dt_bias is the inverse softplus of a log-uniform draw from [1e-3, 1e-1] (`transformers` leaves it at 1 in
    Falcon-H1 and Bamba), A_log the logarithm of a uniform draw from [1, 16], D one, the convolution torch's default
    (`transformers` draws it with standard deviation 0.02, which silences the mixer). `linear_default` gives the
    projections torch's default too, the output ones divided by sqrt(layers), as Mamba-2 itself has it; the hybrids
    keep the normal draws of standard deviation 0.02 that they are published with.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    mixers: list[Any] = [m for m in model.modules() if hasattr(m, "dt_bias") and hasattr(m, "A_log")]
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
