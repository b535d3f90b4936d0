"""The one thing every data mode hands to a training loop. B rows, T tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

IGNORED_LABEL = -100  # the label that no loss counts, as everywhere in transformers


@dataclass(frozen=True)
class Batch:
    """Packed rows, int64 [B, T] each.

    `position_ids` counts from 0 within each document; 0 marks where a document (or what the end of the row before cut
    off) begins. `labels` are unshifted: `input_ids` again, and -100 on padding and on tokens that are not
    learnt. Padding stands at a row's end as if it were one more document.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch on `device`."""
        return Batch(
            self.input_ids.to(device, non_blocking=non_blocking),
            self.labels.to(device, non_blocking=non_blocking),
            self.position_ids.to(device, non_blocking=non_blocking),
        )
