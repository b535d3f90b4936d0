"""`fusiontree chat`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from fusiontree.cli._options import decoded
from fusiontree.errors import InputError

if TYPE_CHECKING:
    from fusiontree.deploy.runtime import InferenceRuntime, SamplingOptions

_HELP = "/save FILE keeps the conversation, /reset begins a new one, /exit ends; Ctrl-C stops an answer."


def chat(
    model: Path = typer.Argument(..., help="Model folder, or a run directory, whose newest checkpoint is taken."),
    system: str = typer.Option(None, "--system", help="What the conversation begins with, said by the system."),
    resume: Path = typer.Option(None, "--resume", help="Go on with a conversation that /save has written."),
    max_new_tokens: int = typer.Option(512, "--max-new-tokens", "-n", help="At most this many tokens an answer."),
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
    stop: list[str] = typer.Option(None, "--stop", help="End an answer before this text; can be given several times."),
    seed: int = typer.Option(None, "--seed", help="Makes the draws repeatable."),
    greedy: bool = typer.Option(False, "--greedy", help="Take the likeliest token each time and draw nothing."),
    memory: str = typer.Option("256MiB", "--memory", help="For states of what was said, so that it is read once."),
    device: str = typer.Option(None, "--device", help="cpu or cuda; default: cuda where there is a device."),
    dtype: str = typer.Option(None, "--dtype", help="float32, bfloat16 or float16; default: as saved."),
    weights: str = typer.Option(None, "--weights", help="int8 or int4: round the blocks' linear layers (torchao)."),
    compile: bool = typer.Option(False, "--compile", help="Compile a step first: pays for thousands of tokens."),
) -> None:
    """Talk to a model, line by line; its tokenizer needs a chat template.

    What was said is kept as a state and not read again. In the conversation, /help lists what can be done.
    """
    from fusiontree.cli._options import byte_size, load_for_use, temperature_of
    from fusiontree.deploy.runtime import InferenceRuntime, SamplingOptions, SchedulerSettings

    if resume is not None and system is not None:
        raise InputError("--resume brings what the conversation begins with; leave out --system")
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
    settings = SchedulerSettings(prefix_bytes=byte_size(memory, "--memory"))
    loaded = load_for_use(model, device=device, dtype=dtype, weights=weights, compile=compile)
    runtime = InferenceRuntime(loaded, settings=settings, compile=compile)
    conversation = Conversation(runtime, options, system)
    if resume is not None:
        conversation.messages = json.loads(runtime.load_conversation(resume))
    for line in _lines():
        command, _, argument = line.strip().partition(" ")
        try:
            if command == "/exit":
                return
            if command == "/reset":
                conversation.reset()
            elif command == "/save":
                conversation.save(argument.strip())
            elif command.startswith("/"):
                typer.echo(_HELP, err=True)
            elif line.strip():
                conversation.say(line)
        except InputError as error:  # of this line alone
            typer.echo(f"error: {error}", err=True)


class Conversation:
    """What was said so far."""

    def __init__(self, runtime: InferenceRuntime, options: SamplingOptions, system: str | None) -> None:
        self._runtime = runtime
        self._options = options
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self.reset()
        runtime.encode_chat([*self._opening, {"role": "user", "content": "a"}])  # whether there is a template at all

    def reset(self) -> None:
        self.messages = list(self._opening)

    def say(self, text: str) -> None:
        """Print the answer as it comes; Ctrl-C ends it where it is."""
        asked = [*self.messages, {"role": "user", "content": text}]
        stream = self._runtime.stream_ids(self._runtime.encode_chat(asked), self._options, keep_state=True)
        answer = []
        try:
            for piece in stream:
                answer.append(piece)
                sys.stdout.write(piece)
                sys.stdout.flush()
        except KeyboardInterrupt:
            stream.close()
        sys.stdout.write("\n")
        sys.stdout.flush()
        self.messages = [*asked, {"role": "assistant", "content": "".join(answer)}]

    def save(self, path: str) -> None:
        if not path:
            raise InputError("say where to: /save FILE")
        if self.messages == self._opening:
            raise InputError("nothing was said yet")
        ids = self._runtime.encode_chat(self.messages, answers=False)
        try:
            self._runtime.save_conversation(path, ids, json.dumps(self.messages, ensure_ascii=False))
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
        typer.echo(f"saved to {path}", err=True)


def _lines() -> Iterator[str]:
    """What is typed, or piped in, line by line."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        import readline  # noqa: F401  # lets input() edit lines and recall them

        typer.echo(_HELP, err=True)
        while True:
            try:
                yield input("> ")
            except EOFError:
                return
    for number, line in enumerate(sys.stdin.buffer, start=1):
        yield decoded(line, f"line {number} of standard input").rstrip("\r\n")
