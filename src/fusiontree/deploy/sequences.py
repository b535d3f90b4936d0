"""A text to be continued, and what becomes of it: what a `Scheduler` takes and gives."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from fusiontree.deploy.prefix import Snapshot
from fusiontree.deploy.sampling import Choice, SamplingOptions, TokenSampler
from fusiontree.deploy.text import StopText, TextDecoder
from fusiontree.models import HybridCache


@dataclass
class Delta:
    """What has become of a sequence since the last one: text in whole characters, tokens, how it ended.

    finish_reason: None while it goes on; "stop" at the end token or a stop string, "length" at the last token asked
        for, "cancelled", "timeout" past its deadline, "error".
    """

    text: str = ""
    choices: list[Choice] = field(default_factory=list)
    finish_reason: str | None = None
    error: BaseException | None = None


@dataclass(eq=False)
class Sequence:
    """A prompt and its continuation, as `Scheduler.submit` takes it.

    prompt: ids, at least one.
    options: how it is continued.
    deliver: called by the thread of `step` with each `Delta`.
    ends: ids that end it.
    keep_state: also keep a snapshot at the end of the continuation, for a conversation that goes on.
    deadline: `time.monotonic()` at which it ends.
    group: sequences of one group have one prompt, which is read once if they run at the same time.
    """

    prompt: list[int]
    options: SamplingOptions
    deliver: Callable[[Delta], None]
    ends: frozenset[int] = frozenset()
    keep_state: bool = False
    deadline: float | None = None
    group: object = None

    generated: list[int] = field(default_factory=list, init=False)
    cached_tokens: int = field(default=0, init=False)
    finish_reason: str | None = field(default=None, init=False)
    submitted: float = field(default_factory=time.monotonic, init=False)
    started: float | None = field(default=None, init=False)
    first_token: float | None = field(default=None, init=False)
    finished: float | None = field(default=None, init=False)

    # Of the scheduler.
    cancelled: bool = field(default=False, init=False)
    read: int = field(default=0, init=False)
    on_grid: bool = field(default=True, init=False)
    state: HybridCache | None = field(default=None, init=False)
    logits: torch.Tensor | None = field(default=None, init=False)
    snapshot: Snapshot | None = field(default=None, init=False)
    sampler: TokenSampler = field(init=False)
    decoder: TextDecoder = field(init=False)
    stop_text: StopText = field(init=False)

    def cancel(self) -> None:
        """End it before the next step."""
        self.cancelled = True
