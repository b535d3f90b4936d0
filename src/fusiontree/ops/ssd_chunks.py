"""The chunked form of Mamba-2's scan: outputs, states and gradients of a run of equal chunks.

For the tokens t, s of one chunk, S the state before it, and cum the running sum of dt A:

    y_t = sum over s <= t of exp(cum_t - cum_s) (C_t . B_s) dt_s x_s  +  exp(cum_t) S C_t  +  D x_t
    S'  = exp(cum_L) S  +  sum over s of exp(cum_L - cum_s) dt_s x_s B_s^T

with the terms dropped that cross a reset. Products with states run over all heads of a group at once; the [L,L]
matrices are built for a slab of chunks and heads at a time, small enough to stay in the processor's cache.

Shapes: B batch, n chunks of L tokens, c = B n chunks of all rows, h heads, P head width, G groups, N state,
Q = the heads of a group side by side (h/G x P), k heads of one slab.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fusiontree.ops.precision import smallest_log_decay, state_dtype

# Elements of the [L,L] matrices built at once on CPU: 1 MiB of float32, the cache of one core. Other devices take all.
CPU_SLAB_ELEMENTS = 2**18
# Elements of x, in all rows, that are taken at once on CPU: their dozen intermediate tensors then lie in a cache.
CPU_PIECE_ELEMENTS = 2**19


class Gradients(NamedTuple):
    """Of x, dt, B, C: [B,n L,...]; of A and D: [h], D's None if there is none."""

    x: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor
    A: Tensor
    D: Tensor | None


class _Slab(NamedTuple):
    """Some chunks, and some heads of one group."""

    chunks: slice
    group: int
    heads: slice


def pieces(x: Tensor, chunk: int) -> list[tuple[int, int, int]]:
    """(start, stop, tokens per chunk) of runs of full chunks, in their order, and of the rest."""
    length = x.shape[1]
    whole = length // chunk * chunk
    chunks = CPU_PIECE_ELEMENTS // max(1, chunk * x[:, 0].numel()) if x.device.type == "cpu" else length // chunk
    step = chunk * max(1, chunks)
    full = [(start, min(start + step, whole), chunk) for start in range(0, whole, step)]
    return full + ([(whole, length, length - whole)] if whole < length else [])


class Chunks:
    """The tokens start ... stop of every row, in chunks of one length. Arguments as `ssd_scan`."""

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        reset: Tensor | None,
        start: int,
        stop: int,
        chunk: int,
    ):
        self.start, self.stop, self.chunk = start, stop, chunk
        self.dtype = state_dtype(x)
        self.batch, self.n = x.shape[0], (stop - start) // chunk
        self.heads, self.width = x.shape[2:]
        self.groups, self.state_size = B.shape[2:]
        self.A = A.to(self.dtype)
        self.D = None if D is None else D.to(self.dtype)
        self.x_cLHP, self.dt_cLH = self._chunked(x), self._chunked(dt)
        self.dtx_cLHP = self.x_cLHP * self.dt_cLH[..., None]
        self.B_cGLN, self.C_cGLN = self._chunked(B).transpose(1, 2), self._chunked(C).transpose(1, 2)

        self.floor = smallest_log_decay(self.dtype)
        # cum is kept as the float32 nearest to it and what that leaves out: differences of one float32 lose, where
        # decays are strong, the digits that tell neighbours apart.
        wide = self.dtype if x.device.type == "mps" else torch.float64  # which MPS lacks
        exact_cHL = (self.dt_cLH.to(wide) * self.A.to(wide)).transpose(1, 2).contiguous().cumsum(-1)
        self.cum_cHL = exact_cHL.to(self.dtype)
        self.cum_rest_cHL = (exact_cHL - self.cum_cHL).to(self.dtype)
        from_start_cHL = exact_cHL.clamp(min=self.floor).exp_().to(self.dtype)
        to_end_cHL = (exact_cHL[..., -1:] - exact_cHL).clamp_(min=self.floor).exp_().to(self.dtype)
        self.interact_cLL: Tensor | None = None  # 1 where two tokens of a chunk share a document; None: all do
        if reset is not None:
            segment_cL = reset[:, start:stop].reshape(-1, chunk).cumsum(-1)
            self.interact_cLL = (segment_cL[:, :, None] == segment_cL[:, None, :]).to(self.dtype).tril_()
            from_start_cHL = from_start_cHL.masked_fill((segment_cL != 0)[:, None], 0.0)
            to_end_cHL = to_end_cHL.masked_fill((segment_cL != segment_cL[:, -1:])[:, None], 0.0)
        # Decay of the chunk's first state until each token [c,L,h,1], of each token until the chunk's end [c,L,h,1],
        # and of the first state over the whole chunk [B,n,h,1,1].
        self.from_start = from_start_cHL.transpose(1, 2)[..., None]
        self.to_end = to_end_cHL.transpose(1, 2)[..., None]
        self.through = from_start_cHL[..., -1].view(self.batch, self.n, self.heads, 1, 1)

    def _chunked(self, tensor: Tensor) -> Tensor:
        """[B,T,...] -> [c,L,...] in the computing dtype."""
        part = tensor[:, self.start : self.stop].to(self.dtype)
        return part.reshape(self.batch * self.n, self.chunk, *tensor.shape[2:])

    def _in_rows(self, tensor: Tensor) -> Tensor:
        """[c,L,...] -> [B,n L,...]."""
        return tensor.reshape(self.batch, self.n * self.chunk, *tensor.shape[2:])

    def _by_group(self, tensor_cLHP: Tensor) -> Tensor:
        """[c,L,h,P] -> [c,G,L,Q]."""
        return tensor_cLHP.view(-1, self.chunk, self.groups, self.heads // self.groups * self.width).transpose(1, 2)

    def _by_head(self, tensor_cGLQ: Tensor) -> Tensor:
        """[c,G,L,Q] -> [c,L,h,P]."""
        return tensor_cGLQ.transpose(1, 2).reshape(-1, self.chunk, self.heads, self.width)

    def _states_by_group(self, states_BnHPN: Tensor) -> Tensor:
        """[B,n,h,P,N] -> [c,G,Q,N]."""
        return states_BnHPN.reshape(self.batch * self.n, self.groups, -1, self.state_size)

    def _states_by_row(self, states_cGQN: Tensor) -> Tensor:
        """[c,G,Q,N] -> [B,n,h,P,N]."""
        return states_cGQN.view(self.batch, self.n, self.heads, self.width, self.state_size)

    def fill_states(self, state_BHPN: Tensor) -> Tensor:
        """Compute the state before each chunk, kept for what follows; return the state after the last."""
        self.dtx_decayed = self.dtx_cLHP * self.to_end
        added = self._states_by_row(torch.matmul(self._by_group(self.dtx_decayed).transpose(-1, -2), self.B_cGLN))
        self.states = torch.empty_like(added)
        self.states[:, 0] = state_BHPN
        for i in range(1, self.n):
            torch.addcmul(added[:, i - 1], self.states[:, i - 1], self.through[:, i - 1], out=self.states[:, i])
        return torch.addcmul(added[:, -1], self.states[:, -1], self.through[:, -1])

    def _read_states(self) -> Tensor:
        """S C_t, not yet decayed: [c,L,h,P]."""
        return self._by_head(torch.matmul(self.C_cGLN, self._states_by_group(self.states).transpose(-1, -2)))

    def _slabs(self) -> Iterator[_Slab]:
        size = self.chunk * self.chunk
        budget = CPU_SLAB_ELEMENTS if self.x_cLHP.device.type == "cpu" else len(self.x_cLHP) * self.heads * size
        per_group = self.heads // self.groups
        chunk_step = max(1, min(len(self.x_cLHP), budget // size))
        head_step = max(1, min(per_group, budget // (size * chunk_step)))
        for chunk in range(0, len(self.x_cLHP), chunk_step):
            for group in range(self.groups):
                first, last = group * per_group, (group + 1) * per_group
                for head in range(first, last, head_step):
                    yield _Slab(slice(chunk, chunk + chunk_step), group, slice(head, min(head + head_step, last)))

    def _decays(self, slab: _Slab) -> Tensor:
        """exp(cum_t - cum_s), 0 where t does not see s: [c,k,L,L]."""
        cum_ckL, rest_ckL = self.cum_cHL[slab.chunks, slab.heads], self.cum_rest_cHL[slab.chunks, slab.heads]
        log_decay = (cum_ckL[..., :, None] - cum_ckL[..., None, :]).add_(
            rest_ckL[..., :, None] - rest_ckL[..., None, :]
        )
        # Between 0 and the floor: what is above 0 is in the future, and erased after a harmless exp.
        decay = log_decay.clamp_(self.floor, 0.0).exp_()
        return decay.tril_() if self.interact_cLL is None else decay.mul_(self.interact_cLL[slab.chunks, None])

    def _products(self) -> Tensor:
        """C_t . B_s: [c,G,1,L,L]."""
        return torch.matmul(self.C_cGLN, self.B_cGLN.transpose(-1, -2))[:, :, None]

    def outputs(self) -> Tensor:
        """y: [B,n L,h,P]. Needs the states."""
        y_cLHP = self._read_states().mul_(self.from_start)
        products = self._products()
        for slab in self._slabs():
            mixing = self._decays(slab).mul_(products[slab.chunks, slab.group])
            _heads(y_cLHP, slab).add_(torch.matmul(mixing, _heads(self.dtx_cLHP, slab)))
        if self.D is not None:
            y_cLHP.addcmul_(self.x_cLHP, self.D[:, None])
        return self._in_rows(y_cLHP)

    def gradients(self, dy_BTHP: Tensor, dstate_BHPN: Tensor) -> tuple[Gradients, Tensor]:
        """Gradients of the inputs and of the state before, given those of y and of the state after. Needs the states.

        The gradient of dt A at t, the logarithm of a decay, is the sum of gradient x value over all that passes t:
        from the tokens before it to those from t on, from the first state to those, and into the last state. No term
        that passes t in neither is ever added and subtracted again, except between tokens, where there are few.
        """
        dy_cLHP = self._chunked(dy_BTHP)

        # Through the states; dstates[:, i] is the gradient of the state after chunk i.
        dy_decayed = dy_cLHP * self.from_start
        dy_cGLQ = self._by_group(dy_decayed)
        dread = self._states_by_row(torch.matmul(dy_cGLQ.transpose(-1, -2), self.C_cGLN))
        dstates = torch.empty_like(dread)
        dstates[:, -1] = dstate_BHPN
        for i in reversed(range(1, self.n)):
            torch.addcmul(dread[:, i], dstates[:, i], self.through[:, i], out=dstates[:, i - 1])
        dfirst_BHPN = torch.addcmul(dread[:, 0], dstates[:, 0], self.through[:, 0])
        dstates_cGQN = self._states_by_group(dstates)
        dC_cGLN = torch.matmul(dy_cGLQ, self._states_by_group(self.states))
        dB_cGLN = torch.matmul(self._by_group(self.dtx_decayed), dstates_cGQN)
        ddtx_cLHP = self._by_head(torch.matmul(self.B_cGLN, dstates_cGQN.transpose(-1, -2))).mul_(self.to_end)

        ddt_cLH = (self.x_cLHP * ddtx_cLHP).sum(-1)
        carried_BnH = (dstates * self.states).sum((-1, -2)).mul_(self.through[..., 0, 0])
        into_last_cLH = torch.cat([carried_BnH.view(-1, 1, self.heads), (ddt_cLH * self.dt_cLH)[:, :-1]], 1).cumsum(1)
        net_cLH = self._read_states().mul_(dy_decayed).sum(-1)

        # Within the chunks: y = (decay o products) dtx.
        products = self._products()
        dproducts = torch.zeros_like(products)
        for slab in self._slabs():
            product_cLL, dy_ckLP = products[slab.chunks, slab.group], _heads(dy_cLHP, slab)
            decay = self._decays(slab)
            dproduct = torch.matmul(dy_ckLP, _heads(self.dtx_cLHP, slab).transpose(-1, -2)).mul_(decay)
            ddtx_ckLP = torch.matmul(decay.mul_(product_cLL).transpose(-1, -2), dy_ckLP)
            _heads(ddtx_cLHP, slab).add_(ddtx_ckLP)
            ddt_cLH[slab.chunks, :, slab.heads] += ddtx_ckLP.mul_(_heads(self.x_cLHP, slab)).sum(-1).transpose(1, 2)
            dproducts[slab.chunks, slab.group] += dproduct if dproduct.shape[1] == 1 else dproduct.sum(1, keepdim=True)
            # A token's pair with itself passes no decay, and would drown the others where decays are strong.
            between = dproduct.mul_(product_cLL).tril_(-1)
            net_cLH[slab.chunks, :, slab.heads] += between.sum(-1).sub_(between.sum(-2)).transpose(1, 2)
        dC_cGLN += torch.matmul(dproducts[:, :, 0], self.B_cGLN)
        dB_cGLN += torch.matmul(dproducts[:, :, 0].transpose(-1, -2), self.C_cGLN)

        dlog_cLH = net_cLH.flip(1).cumsum(1).flip(1).add_(into_last_cLH)
        dA = (dlog_cLH * self.dt_cLH).sum((0, 1))
        ddt_cLH.addcmul_(dlog_cLH, self.A)
        dx_cLHP, dD = ddtx_cLHP.mul_(self.dt_cLH[..., None]), None
        if self.D is not None:
            dx_cLHP.addcmul_(dy_cLHP, self.D[:, None])
            dD = (dy_cLHP * self.x_cLHP).sum((0, 1, 3))
        grads = Gradients(
            self._in_rows(dx_cLHP),
            self._in_rows(ddt_cLH),
            self._in_rows(dB_cGLN.transpose(1, 2)),
            self._in_rows(dC_cGLN.transpose(1, 2)),
            dA,
            dD,
        )
        return grads, dfirst_BHPN


def _heads(tensor_cLHP: Tensor, slab: _Slab) -> Tensor:
    """The slab's part of [c,L,h,P] as [c,k,L,P]."""
    return tensor_cLHP[slab.chunks, :, slab.heads].transpose(1, 2)
