"""Prompts read piece by piece, and short ones side by side.

Prompts are cut on a fixed grid from their first token on, so that reading on from a snapshot that lies on the grid
repeats exactly what reading all of it would do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch

from fusiontree.deploy.prefix import PrefixStore
from fusiontree.deploy.sequences import Sequence
from fusiontree.deploy.slots import LEAST_ROOM
from fusiontree.models import HybridCache, HybridLanguageModel

_MOST_TOGETHER = 8  # prompts that are read as one batch: more of them hardly gain


class PromptReader:
    """Reads the prompts of `sequences`, first to last, and keeps snapshots of what was read.

    Args:
        model: that reads them.
        prefixes: where reading may begin, and where snapshots go.
        piece: tokens between two points of the grid.
        interval: tokens of a prompt between two snapshots.

    Attributes:
        sequences: those to read; who takes one to decode it removes it.
        tokens: that were read so far.
    """

    def __init__(self, model: HybridLanguageModel, prefixes: PrefixStore, piece: int, interval: int) -> None:
        self.sequences: deque[Sequence] = deque()
        self.tokens = 0
        self._model, self._prefixes = model, prefixes
        self._piece, self._interval = piece, interval

    @property
    def state_bytes(self) -> int:
        """Bytes of the states of what is being read; any thread may ask."""
        states = [sequence.state for sequence in list(self.sequences)]
        return sum(state.nbytes for state in states if state is not None)

    def read(self) -> Iterator[Sequence]:
        """A piece of tokens, or a little more; gives each sequence of which the prompt is read to its end."""
        computed = 0
        while self.sequences and computed < self._piece:
            sequence = self.sequences[0]
            if sequence.state is None:
                self._open(sequence)
            together = self._short_prompts()
            if len(together) > 1:
                computed += self._read_together(together)
                yield from together
                continue
            if sequence.read < len(sequence.prompt):
                computed += self._read_piece(sequence)
            if sequence.read == len(sequence.prompt):
                yield sequence

    def _open(self, sequence: Sequence) -> None:
        """An empty state, or that of the longest prefix which is known."""
        room = max(LEAST_ROOM, len(sequence.prompt))  # equal in both cases, so that the same is computed
        found = self._prefixes.find(sequence.prompt) if self._prefixes.budget else None
        if found is None:
            sequence.state = HybridCache(self._model.config, capacity=room)
            return
        sequence.state = self._prefixes.restore(found, room)
        sequence.snapshot, sequence.logits = found, found.logits
        sequence.read = sequence.cached_tokens = found.tokens
        sequence.on_grid = found.tokens % self._piece == 0

    def _short_prompts(self) -> list[Sequence]:
        """The first of those that are read, and those next to it, while they are new and fit one piece side by side.

        None ends on the grid: what is read beside other rows is rounded otherwise than alone.
        """
        chosen: list[Sequence] = []
        longest, tokens = 0, 0
        for sequence in self.sequences:
            prompt = sequence.prompt
            if any(one.group is not None and one.group is sequence.group for one in chosen):
                continue  # begins with the one that reads for it
            longest, tokens = max(longest, len(prompt)), tokens + len(prompt)
            fits = (len(chosen) + 1) * longest <= min(2 * tokens, self._piece) and len(prompt) % self._piece
            # That goes on from the snapshot of the other, once it was read.
            begins_with_another = self._prefixes.budget and any(
                prompt[: len(one.prompt)] == one.prompt for one in chosen
            )
            if len(chosen) == _MOST_TOGETHER or not fits or begins_with_another:
                break
            if sequence.state is None:
                self._open(sequence)
            if sequence.read:
                break
            chosen.append(sequence)
        return chosen

    def _read_together(self, sequences: list[Sequence]) -> int:
        """Whole prompts as one batch, padded to the longest; the number of tokens, padding included."""
        prompts, device = [sequence.prompt for sequence in sequences], self._model.device
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        input_ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
        ends = torch.tensor(lengths, device=device)[:, None]
        mask = None if min(lengths) == longest else (torch.arange(longest, device=device) < ends).long()
        batch = HybridCache(self._model.config, capacity=max(LEAST_ROOM, longest))
        output = self._model(
            input_ids, attention_mask=mask, past_key_values=batch, use_cache=True, logits_to_keep=ends - 1
        )
        for row, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
            sequence.state = batch.view_rows([length], row)
            self._note(sequence, length, output.logits[row, 0].float())
        return longest * len(sequences)

    def _read_piece(self, sequence: Sequence) -> int:
        """Up to the next point of the grid; the number of tokens."""
        start = sequence.read
        stop = min(len(sequence.prompt), start - start % self._piece + self._piece)
        input_ids = torch.tensor([sequence.prompt[start:stop]], device=self._model.device)
        logits = None
        if stop < len(sequence.prompt):
            self._model.backbone(input_ids, past_key_values=sequence.state, use_cache=True)
        else:
            output = self._model(input_ids, past_key_values=sequence.state, use_cache=True, logits_to_keep=1)
            logits = output.logits[0, -1].float()
        self._note(sequence, stop, logits)
        return stop - start

    def _note(self, sequence: Sequence, read: int, logits: torch.Tensor | None) -> None:
        """So many tokens of the prompt were read, after which the model says `logits`; perhaps keep a snapshot."""
        self.tokens += read - sequence.read
        sequence.read, sequence.logits = read, logits
        is_end, is_on_grid = read == len(sequence.prompt), read % self._piece == 0
        # On the grid all snapshots are exact, so none is kept there of what was read from elsewhere on.
        if (is_end or read % self._interval == 0) and (sequence.on_grid or not is_on_grid):
            assert sequence.state is not None
            kept = self._prefixes.add(sequence.prompt[:read], sequence.state, after=sequence.snapshot, logits=logits)
            sequence.snapshot = kept or sequence.snapshot
