"""Tensor functions behind the model, each with a naive `reference` and a fast `torch` backend. They are pure, but for
`ssd_step`, which is `ssd_scan` of one token that writes over its state."""

from fusiontree.ops.attention import cached_attention, local_global_attention
from fusiontree.ops.attention_layouts import (
    AttentionLayout,
    CachedLayout,
    attention_layout,
    cached_layout,
    whole_layout,
)
from fusiontree.ops.backends import BackendError, available_backends, resolve
from fusiontree.ops.causal_conv1d import causal_conv1d
from fusiontree.ops.cross_entropy import linear_cross_entropy, token_cross_entropy
from fusiontree.ops.gated_mix import gated_mix
from fusiontree.ops.gated_norm import gated_rms_norm
from fusiontree.ops.rotary import apply_rotary
from fusiontree.ops.selective_scan import selective_scan
from fusiontree.ops.ssd import ssd_scan, ssd_step
from fusiontree.ops.swiglu import swiglu

__all__ = [
    "AttentionLayout",
    "BackendError",
    "CachedLayout",
    "apply_rotary",
    "attention_layout",
    "available_backends",
    "cached_attention",
    "cached_layout",
    "causal_conv1d",
    "gated_mix",
    "gated_rms_norm",
    "linear_cross_entropy",
    "local_global_attention",
    "resolve",
    "selective_scan",
    "ssd_scan",
    "ssd_step",
    "swiglu",
    "token_cross_entropy",
    "whole_layout",
]
