"""What the processes of one run tell each other beside gradients: sums, agreements, and what went wrong elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from fusiontree.errors import ElsewhereError, InputError, first_line

_T = TypeVar("_T")

#: What gloo says when a process at the other end answers too late; NCCL's and the store's errors have a class.
_LATE = ("Timed out waiting", "Application timeout")

_TIME_WORDS = ("timeout", "Timeout", "timed out", "Timed out", "timing out")

#: What gloo and NCCL say when a process at the other end is no more.
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


def _store() -> Any:
    """The key-value store by which the processes found each other."""
    return torch.distributed.distributed_c10d._get_default_store()


class Processes:
    """The processes of a run; alone, one asks and answers for itself.

    Every method but `on_main`'s work is called by all of them, in the same order.
    """

    def __init__(self, accelerator: Accelerator):
        self.device = accelerator.device
        self.index = accelerator.process_index
        self.count = accelerator.num_processes
        self.is_main = accelerator.is_main_process
        self._accelerator = accelerator

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

    def post(self, step: int) -> None:
        """Tell the others that this process begins `step`, which they read when they wait for it in vain."""
        if self.count > 1:
            _store().set(f"fusiontree/{self.index}", str(step))

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
        steps = self._steps()
        behind = [str(index) for index, step in enumerate(steps) if step < max(steps)]
        who = f"process {' and '.join(behind)}" if behind else "a process"
        where = f" (at step {min(steps)}, others at {max(steps)})" if behind else ""
        return InputError(
            f"process {self.index} waited longer than system.timeout for {who} of {self.count}{where}: "
            "look at what holds it up, then go on with --resume auto"
        )

    def _steps(self) -> list[int]:
        """The step that each process has begun, 0 before the first; none where the store is gone with its process."""
        keys = [f"fusiontree/{index}" for index in range(self.count)]
        try:
            # `get` would wait for what has not been set.
            return [int(_store().get(key)) if _store().check([key]) else 0 for key in keys]
        except RuntimeError:
            return []

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
