"""The one exception for bad input, and what helps to word its messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

#: The exit code that goes with it.
BAD_INPUT = 2


class InputError(ValueError):
    """Input that cannot be used: a file, a line or a key, named together with what to do, in one sentence.

    The command line prints it as `error: <sentence>` and exits with code 2; from Python it is an ordinary `ValueError`.
    """


class NonFiniteError(InputError):
    """A model whose logits are NaN or infinite: nothing can be said of its texts, and no token chosen."""

    def __init__(self) -> None:
        super().__init__(
            "the model's logits are not finite (NaN or infinity): its weights are damaged, or too large for this data "
            "type; try float32, or an earlier checkpoint"
        )


class ElsewhereError(InputError):
    """An `InputError` of another process of the same run, which tells it itself: this one only ends with it."""


class SettingError(InputError):
    """Settings that cannot be used.

    Args:
        key: the dotted name of the one at fault, by which the line of its file can be found.
        others: of those that it does not go with.
    """

    def __init__(self, sentence: str, key: str, *others: str):
        super().__init__(sentence)
        self.key = key
        self.keys = (key, *others)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory did not suffice. On CPU torch raises a plain RuntimeError then."""
    is_torchs = isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    )
    return is_torchs or isinstance(error, MemoryError)


def first_line(error: Exception) -> str:
    """What another library's error says, cut to a line that fits into a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that `name` was most likely meant to be, or None when none is close.

    Case and the difference between `-` and `_` do not count, so `Batch-Size` finds `batch_size`.
    """

    def plain(text: str) -> str:
        return text.lower().replace("-", "_")

    by_plain_name = {plain(candidate): candidate for candidate in candidates}
    found = difflib.get_close_matches(plain(name), by_plain_name, n=1, cutoff=0.6)
    return by_plain_name[found[0]] if found else None
