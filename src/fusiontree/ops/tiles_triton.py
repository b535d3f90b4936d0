"""Tiles of a matrix in memory, as the scans' Triton kernels read and write them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(ptr, stride, first, rows, columns, R: tl.constexpr, C: tl.constexpr):
    """[R,C] in float32: the rows first, first + 1, ... as far as they lie in 0 ... rows - 1, zeros elsewhere."""
    row, column = first + tl.arange(0, R)[:, None], tl.arange(0, C)[None, :]
    here = (row >= 0) & (row < rows) & (column < columns)
    return tl.load(ptr + row * stride + column, mask=here, other=0.0).to(tl.float32)


@triton.jit
def store_tile(ptr, stride, value, rows, columns, R: tl.constexpr, C: tl.constexpr):
    """Write what of value [R,C] lies in the first `rows` and `columns`, in the dtype of the memory."""
    row, column = tl.arange(0, R)[:, None], tl.arange(0, C)[None, :]
    here = (row < rows) & (column < columns)
    tl.store(ptr + row * stride + column, value.to(ptr.dtype.element_ty), mask=here)
