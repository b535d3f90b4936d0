"""Whether two greedy continuations of one prompt are the same up to rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from fusiontree.models import HybridLanguageModel

TOLERANCE = 1e-3


@torch.no_grad()
def compare_greedy(
    model: HybridLanguageModel, prompt: Sequence[int], one: Sequence[int], other: Sequence[int]
) -> Literal["equal", "near tie", "different"]:
    """Compares two continuations in ids.

    The order in which a product sums up depends on its shape, so rows that are read together differ from rows that are
    read alone by rounding, and where two logits are as good as equal the choice may go either way.

    Returns:
        "near tie": they first differ where the logits of the two candidates lie within 1e-3, so that what follows
        cannot be compared; "different": anything else that is not equal.
    """
    at = next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        return "equal" if len(one) == len(other) else "different"
    ids = torch.tensor([[*prompt, *one[:at]]], device=model.device)
    logits = model(ids, logits_to_keep=1, use_cache=False).logits[0, -1].float()
    gap = abs(float(logits[one[at]] - logits[other[at]]))
    return "near tie" if gap < TOLERANCE else "different"
