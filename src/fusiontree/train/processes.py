"""What the processes of one run tell each other beside gradients: sums, agreements, and what went wrong elsewhere."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from fusiontree.errors import ElsewhereError, InputError, first_line
from fusiontree.train.watch import Watch

_T = TypeVar("_T")

#: What gloo says when a process at the other end answers too late; NCCL's and the store's errors have a class.
_LATE = ("Timed out waiting", "Application timeout")

_TIME_WORDS = ("timeout", "Timeout", "timed out", "Timed out", "timing out")

#: What gloo and NCCL say when a process at the other end is no more.
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


class Processes:
    """The processes of a run; alone, one asks and answers for itself.

    Every method is called by all of them, in the same order, but those that say `this process` and `on_main`'s work.

    Args:
        accelerator: of the run.
        timeout: seconds that they wait for one another.
    """

    def __init__(self, accelerator: Accelerator, timeout: float):
        self.device = accelerator.device
        self.index = accelerator.process_index
        self.count = accelerator.num_processes
        self.is_main = accelerator.is_main_process
        self._accelerator = accelerator
        self._watch = Watch(self.index, self.count, timeout)

    def enter(self, phase: str, step: int) -> None:
        """Note what this process is about to do, for the others to name if they wait for it in vain."""
        self._watch.enter(phase, step)

    def close(self) -> None:
        """Nobody waits for this process from here on."""
        self._watch.close()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of all processes' `tensor`, on the device."""
        tensor = tensor.to(self.device)
        return tensor.clone() if self.count == 1 else self._accelerator.reduce(tensor, reduction="sum")

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        if self.count == 1:
            return flag
        return bool(self.sum(torch.tensor([float(flag)], device=self.device)).item())

    def first(self, value: _T | None) -> _T | None:
        """The first of all processes' values that is not None."""
        values = [value] if self.count == 1 else gather_object([value])
        return next((one for one in values if one is not None), None)

    @contextmanager
    def naming_the_lost(self) -> Iterator[None]:
        """What waiting for a process that is gone, or holds all up, looks like becomes a sentence."""
        try:
            yield
        except RuntimeError as error:
            lost = self.lost(error)
            if lost is None:
                raise
            raise lost from error

    def lost(self, error: RuntimeError) -> InputError | None:
        """What an error of waiting for other processes means, or None if it is no such error."""
        if self.count == 1:
            return None
        text = str(error)
        # Not every timeout is one of waiting for others: CUDA's launches, for one, have their own.
        by_class = isinstance(error, torch.distributed.DistError) and any(word in text for word in _TIME_WORDS)
        if not by_class and not any(mark in text for mark in _LATE):
            if not any(mark in text for mark in _GONE):
                return None
            return ElsewhereError(f"another process of the run has ended: {first_line(error)}")
        self._watch.close()
        behind, falls_to_this = self._watch.waits_for()
        # Once the sentence is told: it ends those that hang, which can be what a launcher goes by.
        atexit.register(self._watch.give_up)
        kind = InputError if falls_to_this else ElsewhereError
        return kind(self._watch.sentence(behind))

    def require_equal(self, facts: Mapping[str, Any], advice: str) -> None:
        """Compare what must be the same in all processes.

        Args:
            facts: values by what they are, as JSON knows them.
            advice: what to do where one differs.

        Raises:
            InputError: one does, in all processes (`ElsewhereError` in all but the main one).
        """
        if self.count == 1:
            return
        everyones = gather_object([dict(facts)])
        for index, others in enumerate(everyones):
            for name in {**everyones[0], **others}:
                ours, theirs = everyones[0].get(name), others.get(name)
                if ours != theirs:
                    kind = InputError if self.is_main else ElsewhereError
                    raise kind(f"{name} is {theirs} in process {index} but {ours} in process 0: {advice}")

    def on_main(self, work: Callable[[], _T]) -> _T:
        """The result of `work`, which the main process does while the others wait.

        Raises:
            InputError: the main process's, everywhere (`ElsewhereError` in the others).
        """
        results = self._attempt(work) if self.is_main else (None, None)
        if self.count > 1:
            shared: list[Any] = [results if results[1] is None else (None, str(results[1]))]
            broadcast_object_list(shared)
            if not self.is_main:
                results = shared[0]
        return self._result(results, main=0)

    def on_all(self, work: Callable[[], _T]) -> _T:
        """This process's result of `work`, which every process does.

        Raises:
            InputError: that of the first process in which one was raised, everywhere (`ElsewhereError` in the others).
        """
        results = self._attempt(work)
        if self.count > 1:
            errors = gather_object([str(results[1]) if results[1] is not None else None])
            failed = next((index for index, error in enumerate(errors) if error is not None), None)
            if failed is not None and failed != self.index:
                raise ElsewhereError(errors[failed])
        return self._result(results, main=self.index)

    @staticmethod
    def _attempt(work: Callable[[], _T]) -> tuple[_T | None, InputError | None]:
        try:
            return work(), None
        except InputError as error:
            return None, error

    def _result(self, results: tuple[Any, Any], main: int) -> Any:
        result, error = results
        if error is None:
            return result
        raise error if isinstance(error, InputError) and self.index == main else ElsewhereError(str(error))
