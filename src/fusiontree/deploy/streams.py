"""A text as it comes, and what it took."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fusiontree.deploy.sampling import Choice
from fusiontree.deploy.sequences import Delta, Sequence


@dataclass(frozen=True)
class Generation:
    """A continuation and what it took.

    finish_reason: "stop" at the end token or a stop string, "length" at the last token asked for.
    cached_tokens: of the prompt, that were known from a snapshot.
    seconds_to_first_token, seconds: from the call.
    choices: the tokens with their log probabilities, where these were asked for; without the end token.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    new_tokens: int
    cached_tokens: int
    seconds_to_first_token: float
    seconds: float
    choices: tuple[Choice, ...] = ()


class TextStream(Iterator[str]):
    """A text that is being continued: iterating over it gives its pieces, and runs whatever else its scheduler runs.

    Args:
        sequence: submitted.
        deltas: where they are delivered.
        step: takes one of the scheduler.
    """

    def __init__(self, sequence: Sequence, deltas: deque[Delta], step: Callable[[], None]) -> None:
        self.sequence = sequence
        self._deltas = deltas
        self._step = step
        self._choices: list[Choice] = []

    def __next__(self) -> str:
        while True:
            while self._deltas:
                delta = self._deltas.popleft()
                if delta.error is not None:
                    raise delta.error
                if self.sequence.options.logprobs is not None:
                    self._choices += delta.choices
                if delta.text:
                    return delta.text
            if self.sequence.finish_reason is not None:
                raise StopIteration
            self._step()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the generation; nothing more comes."""
        if self.sequence.finish_reason is None:
            self.sequence.cancel()
            self._step()
        self._deltas.clear()

    def __del__(self) -> None:
        # A stream that nobody reads any more takes no more steps; the next step of another one drops it.
        self.sequence.cancel()

    def result(self) -> Generation:
        """The rest of the text, once it is whole, and figures."""
        text = "".join(self)
        sequence = self.sequence
        assert sequence.finish_reason is not None and sequence.finished is not None
        first = sequence.first_token if sequence.first_token is not None else sequence.finished
        return Generation(
            text=text,
            finish_reason=sequence.finish_reason,
            prompt_tokens=len(sequence.prompt),
            new_tokens=len(sequence.generated),
            cached_tokens=sequence.cached_tokens,
            seconds_to_first_token=first - sequence.submitted,
            seconds=sequence.finished - sequence.submitted,
            choices=tuple(self._choices),
        )
