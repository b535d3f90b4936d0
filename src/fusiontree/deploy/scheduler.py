"""Many texts continued at once: prompts are read in pieces, and rows join and leave the decoding batch between steps.

`Scheduler.submit` and `Sequence.cancel` may be called from any thread; everything else belongs to the one thread that
calls `step`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from fusiontree.data.tokenizer import vocab_size_of
from fusiontree.deploy.prefix import PrefixStore
from fusiontree.deploy.prompt_reader import PromptReader
from fusiontree.deploy.sampling import Choice, TokenSampler, choose_tokens
from fusiontree.deploy.sequences import Delta, Sequence
from fusiontree.deploy.slots import LEAST_ROOM, Slots, length_class, program_padding, program_rows, state_bytes
from fusiontree.deploy.text import StopText, TextDecoder
from fusiontree.errors import InputError, NonFiniteError
from fusiontree.models import HybridCache, HybridLanguageModel


@dataclass(frozen=True, kw_only=True)
class SchedulerSettings:
    """How much runs at once.

    state_bytes: budget of the states of running sequences, of which each reserves what it may grow to; None = none.
    prefix_bytes: budget of the snapshots of prompts; 0 keeps none.
    max_rows: sequences that run at once at most.
    prefill_piece: tokens of a prompt that are read between two steps of decoding.
    snapshot_interval: a snapshot is kept whenever so many tokens of a prompt were read, beside the one at its end;
        a multiple of `prefill_piece`.

    Raises:
        InputError: a value out of range.
    """

    state_bytes: int | None = None
    prefix_bytes: int = 0
    max_rows: int = 64
    prefill_piece: int = 512
    snapshot_interval: int = 1024

    def __post_init__(self) -> None:
        for name in ("state_bytes", "max_rows", "prefill_piece", "snapshot_interval"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if self.prefix_bytes < 0:
            raise InputError(f"prefix_bytes must be 0 or more, got {self.prefix_bytes}")
        if self.snapshot_interval % self.prefill_piece:
            raise InputError(
                f"snapshot_interval must be a multiple of prefill_piece {self.prefill_piece}, got "
                f"{self.snapshot_interval}"
            )


@dataclass
class SchedulerCounts:
    """What a `Scheduler` has done so far."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    peak_rows: int = 0
    peak_bytes: int = 0


class Scheduler:
    """See the module.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        settings: the default ones if None.
    """

    def __init__(
        self,
        model: HybridLanguageModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: SchedulerSettings | None = None,
    ) -> None:
        self.settings = settings or SchedulerSettings()
        self.prefixes = PrefixStore(model, self.settings.prefix_bytes)
        self.counts = SchedulerCounts()
        self._model, self._tokenizer = model, tokenizer
        self._vocabulary = vocab_size_of(tokenizer)
        self._arriving: deque[Sequence] = deque()
        self._waiting: deque[Sequence] = deque()
        self._begun: set[Sequence] = set()  # those that read or decode, wherever an error may have left them
        self._prompts = PromptReader(model, self.prefixes, self.settings.prefill_piece, self.settings.snapshot_interval)
        self._row_bytes: dict[int, int] = {}  # of a row, by its class of lengths
        self._classes: dict[int, Slots[Sequence]] = {}
        self._reserved = 0

    # From any thread.

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            InputError: its prompt is empty, it cannot fit the memory budget or the model's time encoding, or it names a
                token that there is not.
        """
        self.check(len(sequence.prompt), sequence.options.max_new_tokens)
        sequence.sampler = TokenSampler(sequence.options, sequence.prompt, self._vocabulary, self._model.device)
        sequence.decoder = TextDecoder(self._tokenizer, sequence.prompt)
        sequence.stop_text = StopText(sequence.options.stop)
        self._arriving.append(sequence)

    def check(self, prompt_tokens: int, new_tokens: int, which: str = "the prompt") -> None:
        """Raise InputError unless a prompt of so many tokens can be continued by so many."""
        if not prompt_tokens:
            raise InputError(f"{which} is empty: give at least one character")
        tokens, config = f"{prompt_tokens} token{'s' if prompt_tokens > 1 else ''}", self._model.config
        table = config.max_position_embeddings
        if config.srte_encoding == "learned" and prompt_tokens > table:
            raise InputError(
                f"{which} has {tokens}, but the model's learned time encoding (SRTE) ends after {table} "
                "positions: shorten it, or use a model with srte_encoding sincos"
            )
        # The last new token is returned, not read.
        if config.srte_encoding == "learned" and prompt_tokens + new_tokens - 1 > table:
            raise InputError(
                f"{which} has {tokens} and {new_tokens} new ones are asked for, but the model's learned time "
                f"encoding (SRTE) ends after {table} positions: ask for at most {table - prompt_tokens + 1} new ones"
            )
        needed, budget = self._bytes_for(prompt_tokens + new_tokens), self.settings.state_bytes
        if budget is not None and needed > budget:
            raise InputError(
                f"{which} has {tokens} and {new_tokens} new ones are asked for, whose state takes {needed:,} bytes, "
                f"but the budget of states is {budget:,}: ask for fewer, or raise it"
            )

    @property
    def waiting(self) -> int:
        """Sequences that have not begun."""
        return len(self._arriving) + len(self._waiting)

    @property
    def running(self) -> int:
        """Sequences that have begun."""
        return len(self._begun)

    @property
    def is_idle(self) -> bool:
        return not (self.waiting or self.running)

    @property
    def state_bytes(self) -> int:
        """Bytes of the states of running sequences, as allocated."""
        # Read by the server's thread too, while this one goes on.
        return self._prompts.state_bytes + sum(slots.nbytes for slots in list(self._classes.values()))

    # From the thread that calls `step`.

    @torch.no_grad()
    def step(self) -> None:
        """Read a piece of the prompts that wait, then one token of every running row."""
        while self._arriving:
            self._waiting.append(self._arriving.popleft())
        self._end_early()
        self._admit()
        for sequence in self._prompts.read():
            self._note_peaks()  # it may end with its first token
            self._begin(sequence)
        self.counts.prompt_tokens = self._prompts.tokens
        for slots in list(self._classes.values()):
            self._move_outgrown(slots)
        self._note_peaks()
        for slots in list(self._classes.values()):
            if slots.lengths:
                self._decode(slots)

    @torch.no_grad()
    def warm_up(self, progress: Callable[[int, int, int], None] = lambda number, count, rows: None) -> None:
        """Make the programs of compiled steps now, which takes a minute or so for each of at most four on CPU.

        Args:
            progress: called before each with its number from 1 on, how many there are, and how many rows it is for.
        """
        state, most = HybridCache(self._model.config, capacity=LEAST_ROOM), self.settings.max_rows
        self._model.backbone(torch.zeros(1, 1, dtype=torch.long, device=self._model.device), past_key_values=state)
        programs = sorted({program_rows(rows, most) for rows in range(1, most + 1)})
        for number, rows in enumerate(programs, start=1):
            progress(number, len(programs), rows)
            slots: Slots[None] = Slots(self._model, length_class(1), most)
            for _ in range(rows):
                slots.add(state, None, spare=False)
            slots.step([0] * rows)

    def fail(self, error: BaseException) -> None:
        """End everything that runs or waits with `error`, and forget its states."""
        while self._arriving:
            self._waiting.append(self._arriving.popleft())
        ended = [*self._waiting, *self._begun]
        self._waiting.clear()
        self._prompts.sequences.clear()
        self._classes.clear()
        for sequence in ended:
            self._finish(sequence, "error", Delta(error=error))

    def _note_peaks(self) -> None:
        self.counts.peak_rows = max(self.counts.peak_rows, self.running)
        self.counts.peak_bytes = max(self.counts.peak_bytes, self.state_bytes)

    def _bytes_for(self, tokens: int) -> int:
        bound = length_class(tokens)
        if bound not in self._row_bytes:
            self._row_bytes[bound] = state_bytes(self._model.config, self._model.dtype, bound)
        return self._row_bytes[bound]

    def _fits(self, nbytes: int) -> bool:
        return self.settings.state_bytes is None or nbytes <= self.settings.state_bytes

    def _reserve_of(self, sequence: Sequence) -> int:
        return self._bytes_for(len(sequence.prompt) + sequence.options.max_new_tokens)

    def _end_early(self) -> None:
        """Sequences that were cancelled or have run out of time."""
        now = time.monotonic()

        def reason(sequence: Sequence) -> str | None:
            if sequence.cancelled:
                return "cancelled"
            return "timeout" if sequence.deadline is not None and now > sequence.deadline else None

        for queued in (self._waiting, self._prompts.sequences):
            for sequence in [sequence for sequence in queued if reason(sequence)]:
                queued.remove(sequence)
                self._finish(sequence, reason(sequence) or "", Delta())
        for slots in self._classes.values():
            for row in reversed(range(len(slots.owners))):
                sequence = slots.owners[row]
                if why := reason(sequence):
                    slots.remove(row)
                    self._finish(sequence, why, Delta(text=self._rest(sequence)))

    def _admit(self) -> None:
        while self._waiting and self.running < self.settings.max_rows:
            needed = self._reserve_of(self._waiting[0])
            # Compiled steps come in few numbers of rows, which idle rows fill up.
            padding = program_padding(self.settings.max_rows) if self._model.decodes_compiled and self.running else 1
            if not self._fits((self._reserved + needed) * padding):
                return
            sequence = self._waiting.popleft()
            sequence.started = time.monotonic()
            self._reserved += needed
            self._begun.add(sequence)
            self._prompts.sequences.append(sequence)

    def _begin(self, sequence: Sequence) -> None:
        """The first tokens of a sequence whose prompt was read, and of those of its group."""
        state, logits = sequence.state, sequence.logits
        assert state is not None and logits is not None
        reading = self._prompts.sequences
        others = [other for other in reading if other.group is not None and other.group is sequence.group]
        ready = [sequence, *(other for other in others if other is not sequence)]
        for one in ready:
            reading.remove(one)
            one.cached_tokens = sequence.cached_tokens if one is sequence else len(one.prompt)
            one.snapshot, one.state, one.logits = sequence.snapshot, None, None
        choices = choose_tokens(logits.expand(len(ready), -1), [one.sampler for one in ready])
        for one, choice in zip(ready, choices, strict=True):
            one.first_token = time.monotonic()
            if not self._take(one, choice):
                self._place(one, state)

    def _place(self, sequence: Sequence, state: HybridCache) -> None:
        bound = length_class(state.max_length + 1)
        if bound not in self._classes:
            self._classes[bound] = Slots(self._model, bound, self.settings.max_rows)
        slots = self._classes[bound]
        spare = self._fits(self.state_bytes + slots.spare_bytes(state))
        if not spare:
            for other in self._classes.values():
                other.trim()
        slots.add(state, sequence, spare=spare)

    def _move_outgrown(self, slots: Slots[Sequence]) -> None:
        for row in reversed(range(len(slots.lengths))):
            if slots.lengths[row] >= slots.bound:
                state, sequence = slots.take(row), slots.owners[row]
                slots.remove(row)
                self._place(sequence, state)

    def _decode(self, slots: Slots[Sequence]) -> None:
        logits = slots.step([sequence.generated[-1] for sequence in slots.owners])
        self.counts.steps += 1
        choices = choose_tokens(logits, [sequence.sampler for sequence in slots.owners])
        snapshots = [sequence.snapshot for sequence in slots.owners]
        ended = [self._take(one, choice) for one, choice in zip(slots.owners, choices, strict=True)]
        for row in reversed(range(len(ended))):
            if not ended[row]:
                continue
            sequence = slots.owners[row]
            if choices[row] is None:
                slots.remove(row)
                continue
            read = len(sequence.prompt) + len(sequence.generated) - 1
            # Not on the grid of pieces, where all snapshots are exact.
            if sequence.keep_state and self.settings.prefix_bytes and read % self.settings.prefill_piece:
                tokens = [*sequence.prompt, *sequence.generated][:read]
                self.prefixes.add(tokens, slots.take(row), after=snapshots[row])
            slots.remove(row)

    def _take(self, sequence: Sequence, choice: Choice | None) -> bool:
        """Hand on the token that was chosen; whether the sequence ends with it, or with an error as there is none."""
        if choice is None:
            self._finish(sequence, "error", Delta(error=NonFiniteError()))
            return True
        sequence.generated.append(choice.token)
        self.counts.generated_tokens += 1
        if choice.token in sequence.ends:
            self._finish(sequence, "stop", Delta(text=self._rest(sequence)))
            return True
        text = sequence.stop_text.push(sequence.decoder.push(choice.token))
        if sequence.stop_text.stopped:
            self._finish(sequence, "stop", Delta(text=text, choices=[choice]))
            return True
        if len(sequence.generated) == sequence.options.max_new_tokens:
            text += self._rest(sequence)
            reason = "stop" if sequence.stop_text.stopped else "length"
            self._finish(sequence, reason, Delta(text=text, choices=[choice]))
            return True
        sequence.deliver(Delta(text=text, choices=[choice]))
        return False

    def _rest(self, sequence: Sequence) -> str:
        """Text that was held back until the end."""
        text = sequence.stop_text.push(sequence.decoder.finish())
        return text + sequence.stop_text.finish()

    def _finish(self, sequence: Sequence, reason: str, delta: Delta) -> None:
        """Deliver the last delta; a sequence that had begun gives back what it had reserved."""
        if sequence in self._begun:
            self._begun.remove(sequence)
            self._reserved -= self._reserve_of(sequence)
        sequence.finish_reason = delta.finish_reason = reason
        sequence.finished = time.monotonic()
        sequence.state = sequence.logits = sequence.snapshot = None
        sequence.deliver(delta)
