"""`fusiontree generate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fusiontree.cli._options import decoded, was_given
from fusiontree.errors import InputError, nearest

if TYPE_CHECKING:
    from fusiontree.deploy.runtime import Generation, InferenceRuntime
    from fusiontree.deploy.sampling import SamplingOptions


def generate(
    call: typer.Context,
    model: Path = typer.Argument(..., help="Model folder, or a run directory, whose newest checkpoint is taken."),
    prompt: str = typer.Option(None, "--prompt", "-p", help="Text to continue."),
    file: Path = typer.Option(None, "--file", "-f", help="File with the text to continue (UTF-8)."),
    jsonl: Path = typer.Option(None, "--jsonl", help='Many: {"prompt": …, "options": {…}} a line; - = standard input.'),
    out: Path = typer.Option(
        None, "--out", help="With --jsonl: where the lines with texts go; default: standard output."
    ),
    max_new_tokens: int = typer.Option(128, "--max-new-tokens", "-n", help="At most this many tokens."),
    temperature: float = typer.Option(
        None, "--temperature", "-t", help="Higher draws unlikely tokens more often; default: 0.8."
    ),
    top_k: int = typer.Option(None, "--top-k", help="Draw among this many likeliest tokens only."),
    top_p: float = typer.Option(0.95, "--top-p", help="Draw among the likeliest tokens of this total probability."),
    min_p: float = typer.Option(
        0.0, "--min-p", help="Leave out tokens below this share of the likeliest's probability."
    ),
    repetition_penalty: float = typer.Option(
        1.0, "--repetition-penalty", help="Above 1: seen tokens become less likely."
    ),
    stop: list[str] = typer.Option(None, "--stop", help="End before this text; can be given several times."),
    seed: int = typer.Option(None, "--seed", help="Makes the draws repeatable."),
    greedy: bool = typer.Option(False, "--greedy", help="Take the likeliest token each time and draw nothing."),
    rows: int = typer.Option(32, "--rows", min=1, help="With --jsonl: texts that are continued at once."),
    stats: bool = typer.Option(False, "--stats", help="Tokens, seconds and bytes of state on standard error."),
    device: str = typer.Option(None, "--device", help="cpu or cuda; default: cuda where there is a device."),
    dtype: str = typer.Option(None, "--dtype", help="float32, bfloat16 or float16; default: as saved."),
    weights: str = typer.Option(None, "--weights", help="int8 or int4: round the blocks' linear layers (torchao)."),
    compile: bool = typer.Option(False, "--compile", help="Compile a step first: pays for thousands of tokens."),
) -> None:
    """Continue a prompt: from --prompt, from --file, or from standard input; or many, with --jsonl.

    The continuation goes to standard output as it comes, without the prompt. A newline at the very end of a file or of
    standard input does not count as part of the prompt. With --jsonl each line comes back in order, with text,
    finish_reason, prompt_tokens and new_tokens, and with logprobs among its options those of its tokens; its "options"
    replace those of the command line.
    """
    if out is not None and jsonl is None:
        raise InputError("--out is for --jsonl; a single text goes to standard output")
    if jsonl is None and was_given(call, "rows"):
        raise InputError("--rows is for --jsonl: a single text is one row")
    if jsonl is not None and (prompt is not None or file is not None):
        raise InputError("--jsonl holds the prompts; leave out --prompt and --file")
    if jsonl is None:
        lines, text = [], _read_prompt(prompt, file)
    else:
        lines, text = list(_read_lines(jsonl)), ""
    from fusiontree.artifacts import check_writable
    from fusiontree.cli._options import load_for_use, temperature_of
    from fusiontree.deploy.runtime import InferenceRuntime, SamplingOptions, SchedulerSettings

    options = SamplingOptions(
        max_new_tokens=max_new_tokens,
        temperature=temperature_of(temperature, greedy),
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=tuple(stop or ()),
        seed=seed,
    )
    own = [_own_options(options, record, number, _place(jsonl, line)) for number, (line, record) in enumerate(lines)]
    settings = SchedulerSettings(max_rows=rows)
    if out is not None:  # before the work, not after it
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            raise InputError(f"--out {out} is a folder: name a file")
        if out.is_file() or not out.exists():  # a pipe or a device is written to as it is
            check_writable(out.parent, f"--out {out}")
    loaded = load_for_use(model, device=device, dtype=dtype, weights=weights, compile=compile)
    runtime = InferenceRuntime(loaded, settings=settings, compile=compile)
    if compile and loaded.device.type == "cpu":
        typer.echo("compiling a step of decoding, which takes a minute or so the first time", err=True)
    if jsonl is None:
        results = [_print_text(runtime, text, options)]
    else:
        names = [_place(jsonl, line) for line, _ in lines]
        results = _write_lines(runtime, [record for _, record in lines], own, names, out)
    if stats:
        _print_stats(runtime, results)


def _print_text(runtime: InferenceRuntime, text: str, options: SamplingOptions) -> Generation:
    stream = runtime.stream_text(text, options)
    for piece in stream:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return stream.result()


def _write_lines(
    runtime: InferenceRuntime,
    records: list[dict[str, Any]],
    options: list[SamplingOptions],
    names: list[str],
    out: Path | None,
) -> list[Generation]:
    """Every record with its continuation: to standard output as they are done, to a file when all are."""
    from rich.console import Console
    from rich.progress import track

    from fusiontree.atomic import atomic_write

    console, results, lines = Console(stderr=True), [], []
    texts = runtime.run([record["prompt"] for record in records], options, names)
    shown = track(texts, "generating", len(records), console=console, disable=not console.is_terminal or out is None)
    for record, own, result in zip(records, options, shown, strict=True):
        results.append(result)
        line = json.dumps(
            record
            | {
                "text": result.text,
                "finish_reason": result.finish_reason,
                "prompt_tokens": result.prompt_tokens,
                "new_tokens": result.new_tokens,
            }
            | ({} if own.logprobs is None else {"logprobs": _logprobs(runtime, result)}),
            ensure_ascii=False,
        )
        if out is not None:
            lines.append(line + "\n")
        else:
            print(line, flush=True)
    if out is not None:
        atomic_write(out, "".join(lines))
        print(out)
    return results


def _logprobs(runtime: InferenceRuntime, result: Generation) -> list[dict[str, Any]]:
    """Each token with its log probability and the likeliest ones with theirs, named as in chats of OpenAI's API."""
    from fusiontree.deploy.text import token_text

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": token_text(runtime.tokenizer, token), "logprob": logprob}

    return [
        entry(choice.token, choice.logprob) | {"top_logprobs": [entry(*one) for one in choice.likeliest]}
        for choice in result.choices
    ]


def _print_stats(runtime: InferenceRuntime, results: list[Generation]) -> None:
    counts = runtime.scheduler.counts
    seconds = max((one.seconds for one in results), default=0.0)
    new = sum(one.new_tokens for one in results)
    first = min((one.seconds_to_first_token for one in results), default=0.0)
    typer.echo(
        f"{len(results)} text{'s' if len(results) != 1 else ''}, {counts.peak_rows} at once: "
        f"{sum(one.prompt_tokens for one in results)} prompt tokens, {new} new ones in {seconds:.2f} s "
        f"({new / max(seconds, 1e-9):.1f} tokens/s), the first after {first:.3f} s; "
        f"{counts.peak_bytes:,} bytes of state at most",
        err=True,
    )


def _own_options(options: SamplingOptions, record: dict[str, Any], number: int, where: str) -> SamplingOptions:
    """Those of the command line, with the seed of this line's number, changed as the line says."""
    from pydantic import TypeAdapter, ValidationError

    from fusiontree.deploy.sampling import SamplingOptions

    given = dict(record.get("options", {}))
    names = [field.name for field in fields(options)]
    for name in given:
        if name not in names:
            close = nearest(name, names)
            raise InputError(f"{where}: there is no option {name!r}" + (f"; did you mean {close!r}?" if close else ""))
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    values = {name: getattr(options, name) for name in names}
    values["seed"] = None if options.seed is None else (options.seed + number) % 2**63
    try:
        # As JSON, where a number as text and true as a number are told from numbers.
        return TypeAdapter(SamplingOptions).validate_json(json.dumps(values | given), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = f"option {first['loc'][0]!r}: " if first["loc"] else ""
        raise InputError(f"{where}: {place}{first['msg'].removeprefix('Value error, ')}") from error


def _read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records of a JSONL file with their line numbers; empty lines are none, and there has to be one."""
    name = _name_of(path)
    content = _read_bytes(None if str(path) == "-" else path, "JSONL file")
    lines = [(number, line) for number, line in enumerate(decoded(content, name).splitlines(), 1) if line.strip()]
    if not lines:
        raise InputError(f"{name} holds no prompt")
    for number, line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{_place(path, number)} is not valid JSON") from error
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise InputError(f'{_place(path, number)} must be an object with a text "prompt"')
        if not record["prompt"]:
            raise InputError(f"{_place(path, number)}: the prompt is empty: give at least one character")
        if any("\ud800" <= character <= "\udfff" for character in record["prompt"]):
            raise InputError(
                f"{_place(path, number)}: the prompt holds half of a surrogate pair, which is no character"
            )
        if not isinstance(record.get("options", {}), dict):
            raise InputError(f'{_place(path, number)}: "options" must be an object')
        yield number, record


def _name_of(path: Path) -> str:
    return "standard input" if str(path) == "-" else str(path)


def _place(path: Path, line: int) -> str:
    return f"{_name_of(path)}, line {line}"


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise InputError("--prompt and --file were both given; choose one")
    if prompt is not None:
        return prompt
    if file is None and sys.stdin.isatty():
        raise InputError("there is no prompt: give --prompt TEXT or --file FILE, or pipe text in")
    text = decoded(_read_bytes(file, "prompt file"), str(file or "standard input"))
    return text.removesuffix("\n").removesuffix("\r")


def _read_bytes(file: Path | None, kind: str) -> bytes:
    try:
        return file.read_bytes() if file is not None else sys.stdin.buffer.read()
    except FileNotFoundError as error:
        raise InputError(f"{kind} {file} does not exist") from error
    except (IsADirectoryError, PermissionError) as error:
        raise InputError(f"{kind} {file} cannot be read: {error.strerror}") from error
