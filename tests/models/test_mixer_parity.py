"""Our Mamba mixers against transformers' own (its torch path), where the two parametrisations coincide."""

from __future__ import annotations

import pytest
import torch
from transformers import Mamba2Config, MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from fusiontree import HybridLanguageModelConfig
from fusiontree.models import MambaBlock
from fusiontree.models.layout import build_layout

BATCH, TOKENS, HIDDEN, STATE = 2, 37, 24, 8


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def run(module, x, *args):
    """Output and the gradient of x for a fixed random direction."""
    x = x.clone().requires_grad_()
    y = module(x, *args)
    y = y[0] if isinstance(y, tuple) else y
    y.mul(torch.randn(y.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return y.detach(), x.grad


def compare(ours, theirs, pairs):
    """Outputs, input gradients and the gradients of the paired parameters agree."""
    x = torch.randn(BATCH, TOKENS, HIDDEN)
    y_theirs, dx_theirs = run(theirs, x)
    y_ours, dx_ours = run(ours, x, build_layout((BATCH, TOKENS), x.device))
    torch.testing.assert_close(y_ours, y_theirs, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(dx_ours, dx_theirs, atol=2e-5, rtol=1e-4)
    for ours_name, theirs_name in pairs.items():
        a = ours.get_parameter(ours_name).grad
        b = theirs.get_parameter(theirs_name).grad
        torch.testing.assert_close(a, b.view_as(a), atol=1e-4, rtol=1e-3, msg=lambda m, n=ours_name: f"{n}: {m}")


def load(ours, theirs, pairs):
    with torch.no_grad():
        for ours_name, theirs_name in pairs.items():
            target = ours.get_parameter(ours_name)
            target.copy_(theirs.get_parameter(theirs_name).view_as(target))
        ours.out_proj.bias.zero_()


def randomize(module):
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not name.endswith("A_log"):
                parameter.add_(0.2 * torch.randn_like(parameter))


@pytest.mark.parametrize("chunk", [8, 64])
def test_mamba2(chunk):
    """One head, so that our norm per head and theirs over the whole width are the same."""
    inner = 2 * HIDDEN
    theirs = Mamba2Mixer(
        Mamba2Config(
            hidden_size=HIDDEN,
            expand=2,
            num_heads=1,
            head_dim=inner,
            state_size=STATE,
            n_groups=1,
            conv_kernel=4,
            chunk_size=chunk,
            layer_norm_epsilon=1e-5,
            use_bias=False,
            time_step_limit=(0.0, float("inf")),
        ),
        layer_idx=0,
    )
    randomize(theirs)
    ours = MambaBlock(
        HybridLanguageModelConfig(
            hidden_size=HIDDEN,
            num_heads=2,
            global_heads=1,
            mamba_expand=2,
            mamba_head_dim=inner,
            mamba_state_size=STATE,
            norm_eps=1e-5,
        )
    )
    pairs = {
        "in_proj.weight": "in_proj.weight",
        "conv_weight": "conv1d.weight",
        "conv_bias": "conv1d.bias",
        "A_log": "A_log",
        "D": "D",
        "dt_bias": "dt_bias",
        "norm_weight": "norm.weight",
        "out_proj.weight": "out_proj.weight",
    }
    load(ours, theirs, pairs)
    compare(ours, theirs, pairs)


def test_mamba1():
    theirs = MambaMixer(
        MambaConfig(hidden_size=HIDDEN, expand=2, state_size=STATE, conv_kernel=4, use_bias=False, use_conv_bias=True),
        layer_idx=0,
    )
    randomize(theirs)
    ours = MambaBlock(
        HybridLanguageModelConfig(
            hidden_size=HIDDEN, num_heads=2, global_heads=1, mamba_version=1, mamba_expand=2, mamba_state_size=STATE
        )
    )
    pairs = {
        "in_proj.weight": "in_proj.weight",
        "conv_weight": "conv1d.weight",
        "conv_bias": "conv1d.bias",
        "x_proj.weight": "x_proj.weight",
        "dt_proj.weight": "dt_proj.weight",
        "dt_bias": "dt_proj.bias",
        "A_log": "A_log",
        "D": "D",
        "out_proj.weight": "out_proj.weight",
    }
    load(ours, theirs, pairs)
    compare(ours, theirs, pairs)
