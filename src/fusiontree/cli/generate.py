"""`fusiontree generate`."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from fusiontree.errors import InputError


def generate(
    model: Path = typer.Argument(..., help="Model folder, or a run directory, whose newest checkpoint is taken."),
    prompt: str = typer.Option(None, "--prompt", "-p", help="Text to continue."),
    file: Path = typer.Option(None, "--file", "-f", help="File with the text to continue (UTF-8)."),
    max_new_tokens: int = typer.Option(128, "--max-new-tokens", "-n", help="At most this many tokens."),
    temperature: float = typer.Option(0.8, "--temperature", "-t", help="Higher draws unlikely tokens more often."),
    top_k: int = typer.Option(None, "--top-k", help="Draw among this many likeliest tokens only."),
    top_p: float = typer.Option(0.95, "--top-p", help="Draw among the likeliest tokens of this total probability."),
    seed: int = typer.Option(None, "--seed", help="Makes the draws repeatable."),
    greedy: bool = typer.Option(False, "--greedy", help="Take the likeliest token each time and draw nothing."),
    device: str = typer.Option(None, "--device", help="cpu or cuda; default: cuda where there is a device."),
    dtype: str = typer.Option(None, "--dtype", help="float32, bfloat16 or float16; default: as saved."),
    compile: bool = typer.Option(False, "--compile", help="Compile a step first: pays for thousands of tokens."),
) -> None:
    """Continue a prompt: from --prompt, from --file, or from standard input.

    The continuation goes to standard output as it comes, without the prompt. A newline at the very end of a file or of
    standard input does not count as part of the prompt.
    """
    text = _read_prompt(prompt, file)
    from fusiontree.cli._options import dtype_named
    from fusiontree.deploy.runtime import InferenceRuntime, load

    runtime = InferenceRuntime(load(model, device=device, dtype=dtype_named(dtype)), compile=compile)
    if compile and runtime.model.device.type == "cpu":
        typer.echo("compiling a step of decoding, which takes a minute or so the first time", err=True)
    pieces = runtime.stream(
        text,
        max_new_tokens=max_new_tokens,
        temperature=0.0 if greedy else temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise InputError("--prompt and --file were both given; choose one")
    if prompt is not None:
        return prompt
    if file is None and sys.stdin.isatty():
        raise InputError("there is no prompt: give --prompt TEXT or --file FILE, or pipe text in")
    try:
        content = file.read_bytes() if file is not None else sys.stdin.buffer.read()
        text = content.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"prompt file {file} does not exist") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file or 'standard input'} is not UTF-8 text (byte {error.start})") from error
    except (IsADirectoryError, PermissionError) as error:
        raise InputError(f"prompt file {file} cannot be read: {error.strerror}") from error
    return text.removesuffix("\n").removesuffix("\r")
