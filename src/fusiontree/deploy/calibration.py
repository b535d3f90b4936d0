"""Measuring a model layer by layer on calibration text, with branches or heads taken out and constants in their place.

Each layer's input on the whole text is kept, so that a cut is measured from its layer on, and what stands in for a
removed branch or head is what it says on average *after* all cuts before it: the joint state.

Shapes: B rows, T tokens, H hidden, L layers, d width of all heads of a branch together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from fusiontree.artifacts import BranchKind, LayerDecision
from fusiontree.data.tokenizer import DocumentEncoder
from fusiontree.deploy.cuts import BRANCHES_OF, Cuts, Removal, heads_in_order
from fusiontree.deploy.reference import blocks_of, removed_branches, stand_in
from fusiontree.errors import InputError
from fusiontree.models import HybridLanguageModel
from fusiontree.models.hybrid_block import HybridBlock
from fusiontree.models.layout import IGNORE_INDEX, Layout, build_layout, shift_labels
from fusiontree.ops import linear_cross_entropy
from fusiontree.train.evaluation import encoded_documents

#: Fewer predicted tokens than this give no mean to rely on.
MIN_TOKENS = 1000
#: A frozen gate stays this far from 0 and 1, where folding it could not be undone by the map behind it.
GATE_MARGIN = 1e-3
_ROWS = 8


@dataclass(frozen=True)
class CalibrationText:
    """Rows of text, int64 [R, T] each; a token at position 0 begins a document, or what a row cut off of one.

    The first `given` tokens of each row are not predicted.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    given: int = 0

    @property
    def targets(self) -> torch.Tensor:
        """[R, T]: the token that follows each one, -100 where nothing is to be predicted."""
        labels = self.input_ids.clone()
        labels[:, : self.given] = IGNORE_INDEX
        return shift_labels(labels, self.position_ids)

    @property
    def tokens(self) -> int:
        """Tokens to predict."""
        return int((self.targets != IGNORE_INDEX).sum())

    def read_twice(self) -> CalibrationText:
        """Recall of any text: the first half of each row twice, of which the second reading is predicted."""
        half = self.input_ids.shape[1] // 2
        positions = torch.arange(2 * half).expand(len(self.input_ids), -1).contiguous()
        # The second reading's first token follows from nothing.
        return CalibrationText(self.input_ids[:, :half].repeat(1, 2), positions, given=half + 1)


def calibration_text(
    model: HybridLanguageModel, documents: Iterable[tuple[str, str]], *, tokens: int, length: int
) -> CalibrationText:
    """The first `tokens` tokens of some texts, in rows of `length`.

    Args:
        documents: (text, where it came from).

    Raises:
        InputError: no tokenizer, too short texts, or rows longer than a learned time encoding.
    """
    config = model.config
    if config.srte_encoding == "learned" and length > config.max_position_embeddings:
        raise InputError(
            f"rows of {length} tokens are longer than the model's learned time encoding of "
            f"{config.max_position_embeddings} positions: ask for shorter ones"
        )
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise InputError("the model's folder holds no tokenizer to read calibration text with")
    encode = DocumentEncoder(tokenizer, separator_id=None)
    ids = [document for _, document in encoded_documents(encode, documents, tokens) if len(document)]
    stream = np.concatenate([np.empty(0, dtype=np.int32), *ids]).astype(np.int64)
    places = np.concatenate([np.empty(0, dtype=np.int64), *(np.arange(len(document)) for document in ids)])
    rows = min(len(stream), tokens + len(ids)) // length
    text = CalibrationText(
        torch.from_numpy(stream[: rows * length].reshape(rows, length)),
        torch.from_numpy(_restarted(places[: rows * length].reshape(rows, length))),
    )
    if rows == 0 or text.tokens < MIN_TOKENS:
        raise InputError(
            f"too little calibration text: {len(stream)} tokens, of which {text.tokens if rows else 0} can be "
            f"predicted in rows of {length}; give more text, ask for more tokens or for shorter rows: it takes "
            f"{MIN_TOKENS}, better ten times as many"
        )
    return text


def _restarted(places_RT: np.ndarray) -> np.ndarray:
    """Positions within documents; a row that begins inside a document counts from 0 there."""
    index = np.arange(places_RT.shape[1])[None]
    begins = (places_RT == 0) | (index == 0)
    return index - np.maximum.accumulate(np.where(begins, index, 0), axis=1)


@dataclass
class _Rows:
    """Some rows on the model's device, with what every layer reads beside x."""

    layout: Layout
    rotary: tuple[torch.Tensor, torch.Tensor]
    time_encoding: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True)
class Joint:
    """A model with some cuts on the calibration text.

    Attributes:
        cuts: what is taken from it.
        loss: mean over the predicted tokens of the text, nats.
        recall_loss: of the text read twice (`CalibrationText.read_twice`); NaN where that is not measured.
        decisions: per layer, with the constants of this joint state.
        inputs: for each layer, its input on each group of rows.
    """

    cuts: Cuts
    loss: float
    recall_loss: float
    decisions: tuple[LayerDecision, ...]
    inputs: tuple[list[torch.Tensor], ...]

    @property
    def kinds(self) -> tuple[BranchKind, ...]:
        """What each layer keeps."""
        return self.cuts.kinds

    def rise_from(self, other: Joint) -> float:
        """How much more is lost than in another state: of the text, and of recall where both measure it."""
        recall = self.recall_loss - other.recall_loss
        return self.loss - other.loss + (0.0 if math.isnan(recall) else recall)


class Calibration:
    """A model with its calibration text. The model is changed while something is measured, and restored after.

    Args:
        measures_recall: also measure the loss of the text read twice.
    """

    def __init__(self, model: HybridLanguageModel, text: CalibrationText, *, measures_recall: bool = False):
        self.model, self.text = model.eval(), text
        self.blocks = blocks_of(model)
        self._rows, embeddings = self._prepared(text)
        #: Groups of rows that are text; means are taken over these alone.
        self._text_groups = len(self._rows)
        if measures_recall:
            recall_rows, recall_embeddings = self._prepared(text.read_twice())
            self._rows += recall_rows
            embeddings += recall_embeddings
        kinds = tuple(cast("BranchKind", block.branch) for block in self.blocks)
        self.parent = self._run(Cuts(kinds), 0, (), (), embeddings)

    @torch.no_grad()
    def _prepared(self, text: CalibrationText) -> tuple[list[_Rows], list[torch.Tensor]]:
        model, found, embeddings = self.model, [], []
        for start in range(0, len(text.input_ids), _ROWS):
            part = slice(start, start + _ROWS)
            ids, positions, targets = (
                one[part].to(model.device) for one in (text.input_ids, text.position_ids, text.targets)
            )
            layout = build_layout((len(ids), ids.shape[1]), model.device, position_ids=positions)
            rotary = model.rotary(layout.position_ids, layout.max_position)
            time_encoding = model.srte(layout.position_ids, layout.max_position)
            found.append(_Rows(layout, rotary, time_encoding, targets))
            embeddings.append(model.embed_tokens(ids))
        return found, embeddings

    def cut(self, kinds: Sequence[BranchKind]) -> Joint:
        """The model with these layers."""
        return self._run(Cuts(tuple(kinds)), 0, (), (), self.parent.inputs[0])

    def remove(self, joint: Joint, removal: Removal) -> Joint:
        """What `joint` becomes without a branch, or without some heads of it."""
        return self._from(joint, removal.layer, joint.cuts.without(removal))

    def freeze(self, joint: Joint, layer: int) -> Joint:
        """What `joint` becomes when that layer's gate is frozen too."""
        return self._from(joint, layer, joint.cuts.with_frozen(layer))

    def _from(self, joint: Joint, layer: int, cuts: Cuts) -> Joint:
        return self._run(cuts, layer, joint.decisions[:layer], joint.inputs[:layer], joint.inputs[layer])

    @torch.no_grad()
    def _run(
        self,
        cuts: Cuts,
        start: int,
        decisions: tuple[LayerDecision, ...],
        inputs: tuple[list[torch.Tensor], ...],
        x: list[torch.Tensor],
    ) -> Joint:
        for layer in range(start, len(self.blocks)):
            block = self.blocks[layer]
            decision = cuts.decision(layer)
            if removed := removed_branches(block, decision):
                decision.constant = torch.cat([self.mean_output(block, name, x) for name in removed]).tolist()
            if decision.heads:
                decision.head_constants = self._mean_heads(block, decision, x)
            if layer in cuts.frozen and block.gate is not None:
                with stood_in(block, decision):
                    decision.gate = self._mean_gate(block, x).tolist()
            decisions, inputs = (*decisions, decision), (*inputs, x)
            with stood_in(block, decision):
                x = self._through(block, x)
        groups = self._text_groups
        loss, recall = (self._loss(x, part) for part in (slice(groups), slice(groups, None)))
        return Joint(cuts, loss, recall, decisions, inputs)

    def of_text(self, x: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Of what was measured on each group of rows, that on the text itself."""
        return x[: self._text_groups]

    def _through(self, block: HybridBlock, x: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [
            block(part, rows.layout, rows.rotary, rows.time_encoding)[0]
            for part, rows in zip(x, self._rows, strict=True)
        ]

    def _loss(self, x: Sequence[torch.Tensor], groups: slice) -> float:
        weight, total, count = self.model.lm_head.weight, 0.0, 0
        for part, rows in zip(x[groups], self._rows[groups], strict=True):
            counted = int((rows.targets != IGNORE_INDEX).sum())
            total += float(linear_cross_entropy(part, weight, rows.targets)) * counted
            count += counted
        return total / count if count else math.nan

    def branch_output(self, block: HybridBlock, branch: str, x: torch.Tensor, group: int) -> torch.Tensor:
        """[B, T, H]: what a branch says of a layer's input."""
        rows, u = self._rows[group], block.ln_input(x)
        if branch == "mamba":
            assert block.mamba is not None
            return block.mamba(u + rows.time_encoding, rows.layout)
        assert block.attention is not None
        return block.attention(u, rows.layout, rows.rotary)

    def mean_output(self, block: HybridBlock, branch: str, x: Sequence[torch.Tensor]) -> torch.Tensor:
        """[H] float64, over all tokens of the text."""
        sums = [
            self.branch_output(block, branch, part, group).double().sum((0, 1))
            for group, part in enumerate(self.of_text(x))
        ]
        return torch.stack(sums).sum(0).cpu() / self.text.input_ids.numel()

    @torch.no_grad()
    def head_outputs(self, block: HybridBlock, branch: str, x: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """What a branch's output projection reads, [B, T, d] on each group of rows of the text."""
        found: list[torch.Tensor] = []
        projection = getattr(block, branch).out_proj
        handle = projection.register_forward_pre_hook(lambda module, given: found.append(given[0]))
        try:
            for group, part in enumerate(self.of_text(x)):
                self.branch_output(block, branch, part, group)
                yield found.pop()
        finally:
            handle.remove()

    def _mean_heads(self, block: HybridBlock, decision: LayerDecision, x: Sequence[torch.Tensor]) -> list[float]:
        """As `LayerDecision.head_constants` has them, over all tokens of the text."""
        means: list[float] = []
        for name, removed in heads_in_order(decision):
            total = torch.stack([y.double().sum((0, 1)) for y in self.head_outputs(block, name, x)]).sum(0).cpu()
            mean = (total / self.text.input_ids.numel()).view(getattr(block, name).num_heads, -1)
            means += mean[removed].flatten().tolist()
        return means

    def _mean_gate(self, block: HybridBlock, x: Sequence[torch.Tensor]) -> torch.Tensor:
        """[H] float64, over all tokens of the text."""
        total = torch.zeros(block.ln_output.normalized_shape[0], dtype=torch.float64)
        for gate in self.gates(block, x):
            total += gate.double().sum((0, 1)).cpu()
        return (total / self.text.input_ids.numel()).clamp(GATE_MARGIN, 1 - GATE_MARGIN)

    def gates(self, block: HybridBlock, x: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The layer's gate [B, T, H] on each group of rows of the text."""
        found: list[torch.Tensor] = []
        assert block.gate is not None
        handle = block.gate.register_forward_hook(lambda module, given, logits: found.append(torch.sigmoid(logits)))
        try:
            for part, rows in zip(self.of_text(x), self._rows, strict=False):
                block(part, rows.layout, rows.rotary, rows.time_encoding)
                yield found.pop()
        finally:
            handle.remove()


@contextmanager
def stood_in(block: HybridBlock, decision: LayerDecision) -> Iterator[None]:
    """The layer as the decision leaves it, while the block lasts."""
    own = {name: getattr(block, name) for name in ("mamba", "attention", "gate")}
    projections = {name: getattr(own[name], "out_proj", None) for name in BRANCHES_OF["both"]}
    try:
        stand_in(block, decision)
        yield
    finally:
        for name, module in own.items():
            setattr(block, name, module)
        for name, projection in projections.items():
            if projection is not None:
                own[name].out_proj = projection
