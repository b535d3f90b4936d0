"""Options that several commands share."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from fusiontree.errors import InputError

if TYPE_CHECKING:
    import torch

    from fusiontree.models import HybridLanguageModel

_LARGEST = 2**31 - 1

DTYPES = ("float32", "bfloat16", "float16")


def was_given(call: typer.Context, name: str) -> bool:
    """Whether the parameter stands on the command line, rather than having its default."""
    return getattr(call.get_parameter_source(name), "name", None) == "COMMANDLINE"


def dtype_named(name: str | None) -> torch.dtype | None:
    """The torch type of `--dtype`; None stays None.

    Raises:
        InputError: another name than those in `DTYPES`.
    """
    if name is None:
        return None
    if name not in DTYPES:
        raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    import torch

    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def load_for_use(
    model: Path, *, device: str | None, dtype: str | None, weights: str | None, compile: bool = False
) -> HybridLanguageModel:
    """The model of `MODEL`, `--device`, `--dtype` and `--weights`; says on stderr what rounding the weights did.

    Raises:
        InputError: as `load` and `quantize_weights`; `--weights` with `--compile`.
    """
    if weights is not None and compile:
        raise InputError("--weights does not go with --compile: choose one of the two")
    from fusiontree.deploy.loading import load

    loaded = load(model, device=device, dtype=dtype_named(dtype))
    round_weights(loaded, weights)
    return loaded


def round_weights(model: HybridLanguageModel, weights: str | None) -> None:
    """What `--weights` asks for, if it was given; says on stderr what that did.

    Raises:
        InputError: as `quantize_weights`.
    """
    if weights is None:
        return
    from fusiontree.deploy.quantized import quantize_weights

    typer.echo(str(quantize_weights(model, weights)), err=True)


#: Of `generate` and `chat`, where neither `--temperature` nor `--greedy` is given.
TEMPERATURE = 0.8


def temperature_of(temperature: float | None, greedy: bool) -> float:
    """What `--temperature` and `--greedy` mean together.

    Raises:
        InputError: both are given.
    """
    if not greedy:
        return TEMPERATURE if temperature is None else temperature
    if temperature is not None:
        raise InputError("--greedy draws nothing, so --temperature has no effect on it: leave one of the two out")
    return 0.0


@contextmanager
def working(command: str) -> Iterator[Callable[[str], None]]:
    """A line on stderr that shows, where that is a terminal, what a long command is doing: call it with a few words.

    Within it SIGTERM interrupts as Ctrl-C does, so that nothing half-written stays.
    """
    from rich.console import Console

    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if is_main else None
    try:
        with Console(stderr=True).status(command) as status:
            yield lambda what: status.update(f"{command}: {what}")
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)


def decoded(content: bytes, name: str) -> str:
    """Text from a file or from standard input.

    Raises:
        InputError: it is not UTF-8; `name` says where it came from.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text (byte {error.start})") from error


_UNITS = {"": 1, "b": 1, "k": 2**10, "kib": 2**10, "m": 2**20, "mib": 2**20, "g": 2**30, "gib": 2**30}


def byte_size(text: str, option: str) -> int:
    """The bytes that `512MiB`, `2G` or `1000000` means; units are powers of 1024.

    Raises:
        InputError: it means none; `option` is named.
    """
    found = re.fullmatch(r"\s*(\d{1,15})\s*([a-z]*)\s*", text.lower())
    if not found or found[2] not in _UNITS:
        raise InputError(f"{option} must be a number of bytes such as 512MiB or 2GiB, got {text!r}")
    return int(found[1]) * _UNITS[found[2]]


def whole_numbers(text: str, option: str) -> list[int]:
    """The whole numbers from 1 on that stand between commas, in their order, each once.

    Raises:
        InputError: something else, or more than a size can be; `option` is named.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch(r"0*[1-9]\d{0,9}", word, re.ASCII) and int(word) <= _LARGEST for word in words):
        raise InputError(
            f"{option} must be a whole number from 1 to {_LARGEST}, or several with commas between, got {text!r}"
        )
    return list(dict.fromkeys(map(int, words)))
