"""The Mamba branch: short causal convolution, selective state space scan, gated output.

Shapes: B batch, T tokens, H hidden, c convolution channels, d inner width, h heads, P head width, N state, K taps,
R rank of Mamba-1's time step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from fusiontree.models.cache import HybridLayerState
from fusiontree.models.configuration import HybridLanguageModelConfig
from fusiontree.models.layout import Layout
from fusiontree.ops import causal_conv1d, gated_rms_norm, selective_scan, ssd_scan, ssd_step
from fusiontree.ops.precision import state_dtype

_FLOAT32_PARAMETERS = ("A_log", "D", "dt_bias")


class MambaBlock(nn.Module):
    """Selective state space mixer, version 2 (Dao & Gu 2024, "Transformers are SSMs") or 1 (Gu & Dao 2023, "Mamba").

    Version 2 has h = d/P heads with one decay each, shared B and C, and normalises its gated output per head, so that
    heads can be removed. Version 1 has one decay per channel and state and, as in its paper, no norm.

    `A_log`, `D` and `dt_bias` stay float32 when the module is cast to a narrower type: decays are exponentials of
    them, and rounding them changes how far the model remembers.

    Args:
        num_heads: of version 2, where some were cut; None: all.
    """

    def __init__(self, config: HybridLanguageModelConfig, num_heads: int | None = None):
        super().__init__()
        self.version = config.mamba_version
        d = config.mamba_inner_size
        decays: tuple[int, ...]
        self.state_size = N = config.mamba_state_size
        self.norm_eps = config.norm_eps
        hidden = config.hidden_size
        if self.version == 2:
            self.head_dim = config.mamba_head_dim
            self.num_heads = d // self.head_dim if num_heads is None else num_heads
            d = self.num_heads * self.head_dim
            channels, decays = d + 2 * N, (self.num_heads,)
            self.in_proj = nn.Linear(hidden, d + channels + self.num_heads, bias=False)
            self.norm_weight = nn.Parameter(torch.ones(d))
        else:
            self.dt_rank = math.ceil(hidden / 16)
            channels, decays = d, (d, N)
            self.in_proj = nn.Linear(hidden, 2 * d, bias=False)
            self.x_proj = nn.Linear(d, self.dt_rank + 2 * N, bias=False)
            self.dt_proj = nn.Linear(self.dt_rank, d, bias=False)
        self.inner_size = d
        self.conv_weight = nn.Parameter(torch.empty(channels, config.conv_kernel))
        self.conv_bias = nn.Parameter(torch.empty(channels))
        self.A_log = nn.Parameter(torch.empty(decays, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(decays[0], dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(decays[0], dtype=torch.float32))
        # None where it is merged with what follows (`layer_merges`).
        self.out_proj: nn.Module | None = nn.Linear(d, hidden)

    def _apply(self, fn: Callable, recurse: bool = True) -> MambaBlock:
        kept = {name: getattr(self, name).data for name in _FLOAT32_PARAMETERS}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            parameter = getattr(self, name)
            if parameter.dtype.itemsize < 4 and not parameter.is_meta:
                parameter.data = before.to(parameter.device, torch.float32)
                if parameter.grad is not None:
                    parameter.grad.data = parameter.grad.data.float()
        return self

    def forward(self, u: torch.Tensor, layout: Layout, state: HybridLayerState | None = None) -> torch.Tensor:
        """u [B, T, H] -> [B, T, H]; reads and updates `state` in place when given.

        Padding is a no-op on the state: its time step is 0, so it neither decays nor adds.
        """
        if state is not None:
            state.ensure_mamba(
                u.shape[0], torch.float64 if u.dtype == torch.float64 else self._compute_dtype(u), u.device
            )
        y = self._forward_ssd(u, layout, state) if self.version == 2 else self._forward_selective(u, layout, state)
        return y if self.out_proj is None else self.out_proj(y)

    def _compute_dtype(self, u: torch.Tensor) -> torch.dtype:
        kind = u.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.in_proj.weight.dtype

    def _forward_ssd(self, u: torch.Tensor, layout: Layout, state: HybridLayerState | None) -> torch.Tensor:
        d, N, h = self.inner_size, self.state_size, self.num_heads
        z, xBC, dt = self.in_proj(u).split((d, d + 2 * N, h), dim=-1)  # [B,T,d] [B,T,c] [B,T,h]
        xBC = self._convolve(xBC, layout, state)
        x, B, C = xBC.split((d, N, N), dim=-1)
        inputs = (x.unflatten(-1, (h, -1)), self._time_step(dt, layout), -self.A_log.exp())
        parameters = (B[:, :, None], C[:, :, None], self.D)
        is_step = state is not None and u.shape[1] == 1 and not torch.is_grad_enabled()
        if is_step and state.scan.dtype == state_dtype(x):
            y = ssd_step(*inputs, *parameters, state=state.scan, reset=layout.reset)
        else:
            y = self._scan(ssd_scan, inputs, parameters, layout, state)  # [B,T,h,P]
        return gated_rms_norm(y, z, self.norm_weight, eps=self.norm_eps)

    def _forward_selective(self, u: torch.Tensor, layout: Layout, state: HybridLayerState | None) -> torch.Tensor:
        x, z = self.in_proj(u).chunk(2, dim=-1)  # [B,T,d] each
        x = self._convolve(x, layout, state)
        dt, B, C = self.x_proj(x).split((self.dt_rank, self.state_size, self.state_size), dim=-1)
        delta = self._time_step(self.dt_proj(dt), layout)
        return self._scan(selective_scan, (x, delta, -self.A_log.exp()), (B, C, self.D, z), layout, state)

    def _time_step(self, dt: torch.Tensor, layout: Layout) -> torch.Tensor:
        dt = F.softplus(dt + self.dt_bias)  # float32 through dt_bias
        return dt if layout.mask is None else dt * layout.mask[:, :, None]

    def _convolve(self, x: torch.Tensor, layout: Layout, state: HybridLayerState | None) -> torch.Tensor:
        if state is None:
            out = causal_conv1d(x, self.conv_weight, self.conv_bias, reset=layout.reset, activation="silu")
            assert isinstance(out, torch.Tensor)
            return out
        y, tail = causal_conv1d(
            x,
            self.conv_weight,
            self.conv_bias,
            reset=layout.reset,
            initial_state=state.conv,
            return_final_state=True,
            activation="silu",
        )
        if layout.mask is not None:
            tail = _masked_tail(x, state.conv, layout)
        state.conv = _updated(state.conv, tail)
        return y

    def _scan(
        self,
        scan: Callable,
        inputs: tuple[torch.Tensor, ...],
        parameters: tuple[torch.Tensor, ...],
        layout: Layout,
        state: HybridLayerState | None,
    ) -> torch.Tensor:
        if state is None:
            return scan(*inputs, *parameters, reset=layout.reset)
        y, final = scan(*inputs, *parameters, reset=layout.reset, initial_state=state.scan, return_final_state=True)
        state.scan = _updated(state.scan, final)
        return y


def _updated(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """`old` with the values of `new`, in place; a tensor of its own where a backward pass may still read `old`."""
    if torch.is_grad_enabled():
        return new.detach().to(old.dtype, copy=True)
    return old.copy_(new)


def _masked_tail(x: torch.Tensor, tail: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The K-1 convolution inputs up to each row's last real token; zero where they belong to an earlier document.

    x [B,T,c], tail [B,K-1,c] from before the piece -> [B,K-1,c].
    """
    assert layout.last_real is not None and layout.last_reset is not None
    taps = tail.shape[1]
    offset = torch.arange(taps, device=x.device)
    token = layout.last_real[:, None] - (taps - 1) + offset  # [B,K-1] index in the piece, negative: in `tail`
    inputs = torch.cat((tail.to(x.dtype), x), dim=1)
    kept = inputs.gather(1, (token + taps)[..., None].expand(-1, -1, x.shape[2]))
    return kept.masked_fill((token < layout.last_reset[:, None])[..., None], 0)
