"""How far back a language model finds a number again: passkeys in text, over a grid of depths and lengths.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from fusiontree.artifacts import PasskeyReport
from fusiontree.data.batch import Batch
from fusiontree.data.tokenizer import DocumentEncoder
from fusiontree.errors import InputError
from fusiontree.eval.eval_llm import tokenizer_for
from fusiontree.eval.needle import PasskeyTask, passkey_accuracy
from fusiontree.eval.texts import Texts
from fusiontree.models import HybridLanguageModel
from fusiontree.train.evaluation import check_finite, evaluation_mode, hidden_in_pieces

MARKER = "\nThe pass key is: "
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
"""What stands around the passkey where there is no other text, as in Mohtashami and Jaggi 2023."""

_AT_ONCE = 8


def evaluate_passkeys(
    model: HybridLanguageModel,
    *,
    name: str,
    lengths: Sequence[int],
    depths: Sequence[float],
    rows: int,
    digits: int = 5,
    seed: int = 0,
    texts: Texts | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    piece: int = 2048,
    mixed_precision: Literal["bf16", "no"] = "no",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PasskeyReport:
    """Share of the passkeys that greedy decoding finds, in each cell of the grid.

    Args:
        model: as `fusiontree.load` returns it.
        name: of the model, for messages.
        lengths: tokens of a row, question and answer included.
        depths: where the passkey stands: 0 at the row's start, 1 right before the question.
        rows: passkeys in each cell; the same ones in all.
        digits: of a passkey, a token each.
        seed: of the passkeys.
        texts: what to hide them in, the documents one behind the other; None = a few sentences over and over.
        tokenizer: the model's own if None.
        piece: tokens of one forward pass; changes memory and speed, not the result.
        mixed_precision: "bf16" computes under autocast, as training does.
        progress: called with the passkeys done and all of them.

    Raises:
        InputError: no tokenizer or one without a token for each digit, a length too short for marker and passkey, a
            text that is too short or holds the marker, or a row that is longer than the model's learned time encoding.
    """
    encode = DocumentEncoder(tokenizer_for(model, tokenizer, name), separator_id=None)
    alphabet = [encode.plain(digit)[-1:] for digit in "0123456789"]
    if len({id for ids in alphabet for id in ids}) < 10:
        raise InputError(f"the tokenizer of {name} has no token for each digit, of which passkeys are made")
    filler = encode.plain(FILLER)
    if texts is not None:
        filler = [id for text, _ in texts for id in encode.plain(text)]
    task = PasskeyTask(
        length=lengths[0], digits=digits, marker=tuple(encode.plain(MARKER)), alphabet=[ids[0] for ids in alphabet]
    )
    total, done = len(lengths) * len(depths) * rows, 0

    def logits(batch: Batch) -> torch.Tensor:
        nonlocal done
        opening = torch.tensor([encode.prefix] * len(batch.input_ids), dtype=torch.int64)
        ids_BT = torch.cat((opening, batch.input_ids), dim=1)
        at_once = max(1, piece // ids_BT.shape[1])
        found = [_last_logits(model, part, digits + 1, piece) for part in ids_BT.split(at_once)]
        done += len(ids_BT)
        progress(done, total)
        return torch.cat(found)

    autocast = torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=mixed_precision == "bf16")
    with autocast, evaluation_mode(model):
        right = passkey_accuracy(
            logits,
            task,
            lengths=lengths,
            depths=depths,
            rows=rows,
            seed=seed,
            filler=torch.tensor(filler),
            at_once=_AT_ONCE,
        )
    return PasskeyReport(
        lengths=list(lengths),
        depths=list(depths),
        rows=rows,
        digits=digits,
        seed=seed,
        filler=[] if texts is None else texts.paths,
        right=right,
    )


def _last_logits(model: HybridLanguageModel, ids_BT: torch.Tensor, count: int, piece: int) -> torch.Tensor:
    """Logits of the last `count` tokens; a row longer than `piece` must be alone."""
    length = ids_BT.shape[1]
    if length <= piece:
        hidden = model.backbone(input_ids=ids_BT.to(model.device), use_cache=False).last_hidden_state[:, -count:]
    else:
        tails = [
            hidden[:, max(0, length - count - part.start) :]
            for part, hidden in hidden_in_pieces(model, [np.asarray(ids_BT[0])], piece)
        ]
        hidden = torch.cat(tails, dim=1)
    return check_finite(model.lm_head(hidden))
