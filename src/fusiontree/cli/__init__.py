"""The `fusiontree` command: finds a command's module only when that command is asked for, and words every error.

A command is a plain typer function (or a `typer.Typer` for one with sub-commands) in a module of this package, listed
in `COMMANDS`. Bad input raises `InputError` and ends as `error: <sentence>` with exit code 2; anything unforeseen keeps
its traceback. With `FUSIONTREE_TRACEBACK=1` in the environment every error does.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from fusiontree.errors import BAD_INPUT, ElsewhereError, InputError, first_line, is_out_of_memory, nearest
from fusiontree.version import __version__

__all__ = ["app", "main"]

INTERRUPTED = 130
_PATIENCE_S = 10

# typer brings its own copy of click since 0.2x and imports click before: `BadParameter`'s grandparent is the class of
# all errors that are the caller's in both.
_COMMAND_LINE_ERROR: type[Exception] = typer.BadParameter.__mro__[2]

_MENDABLE = {
    errno.ENOSPC: "the disk is full; free some space or choose another place",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another place",
    errno.EFBIG: "the file would be larger than this system allows; choose another place",
    errno.EACCES: "permission denied; change who may use it or choose another path",
    errno.EPERM: "permission denied; change who may use it or choose another path",
    errno.ENOENT: "no such file or folder, and none can be made there; choose another path",
    errno.ENXIO: "nothing can be written to it; choose another path",
    errno.EISDIR: "is a folder, where a file is needed",
    errno.ENOTDIR: "a file is in the way; choose another path",
    errno.EEXIST: "a file is in the way; choose another path",
    errno.EROFS: "the file system is read-only; choose another place",
}


@dataclass(frozen=True)
class _Entry:
    target: str
    """`module:attribute` of the function or `typer.Typer`."""
    summary: str
    """One line for `fusiontree --help`, so that listing the commands imports none of them."""

    def load(self, name: str) -> Any:
        module, _, attribute = self.target.partition(":")
        target = getattr(importlib.import_module(module), attribute)
        if isinstance(target, typer.Typer):
            command: Any = typer.main.get_group(target)
        else:
            wrapper = typer.Typer(add_completion=False, rich_markup_mode=None)
            wrapper.command(name)(target)
            command = typer.main.get_command(wrapper)
        command.name = name
        return command


COMMANDS = {
    "train": _Entry("fusiontree.cli.train:train", "Train a model as a YAML file says."),
    "eval": _Entry("fusiontree.cli.evaluate:evaluate", "Perplexity of a model on held-out text, also by position."),
    "gates": _Entry("fusiontree.cli.gates:gates", "Show what the gates of a run did, as a table and as heat maps."),
    "report": _Entry("fusiontree.cli.report:report", "Show runs side by side on one HTML page."),
    "plan": _Entry("fusiontree.cli.plan:plan", "Decide what to cut from a model to meet a budget, by measurement."),
    "export": _Entry("fusiontree.cli.export:export", "Apply a prune plan: write the smaller model."),
    "heal": _Entry("fusiontree.cli.heal:heal", "Distil a pruned model from its parent."),
    "generate": _Entry("fusiontree.cli.generate:generate", "Continue a prompt, or many."),
    "chat": _Entry("fusiontree.cli.chat:chat", "Talk to a model in the terminal."),
    "serve": _Entry("fusiontree.cli.serve:serve", "Serve a model over HTTP, as OpenAI's API does."),
    "data": _Entry("fusiontree.cli.data:app", "Look at training data, check it, train a tokenizer on it."),
    "bench": _Entry("fusiontree.cli.bench:bench", "Measure speed and memory side by side with other models."),
    "doctor": _Entry("fusiontree.cli.doctor:doctor", "Report versions, devices and what works on this machine."),
    "quickstart": _Entry("fusiontree.cli.quickstart:quickstart", "Train, look at and try a small model, in minutes."),
}


class _CommandGroup(TyperGroup):
    """Lists the commands from `COMMANDS` and imports the one that runs."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        entry = COMMANDS.get(cmd_name)
        return TyperCommand(cmd_name, help=entry.summary) if entry else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if name not in COMMANDS:
            close = nearest(name, COMMANDS)
            raise InputError(
                f"there is no command {name!r}; "
                + (f"did you mean {close!r}?" if close else f"there are {', '.join(COMMANDS)}")
            )
        return name, COMMANDS[name].load(name), args[1:]

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            # typer would make an exit code of it, which cannot be told from that of a command that has said all.
            raise typer.Abort from error


app = typer.Typer(
    name="fusiontree",
    cls=_CommandGroup,
    help="Hybrid Mamba + attention language models: train, watch, evaluate and use them.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: what follows `fusiontree`; those of the process by default, and `--help` when there are none.

    Returns:
        The exit code: 0, 2 for bad input, 130 when interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "OMP_WAIT_POLICY" not in os.environ:
        # Read when torch loads GNU OpenMP. Its threads spin for milliseconds wherever they wait, which costs most of a
        # training step when another process wants the core; spinning for tens of microseconds costs next to nothing.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    show_traceback = os.environ.get("FUSIONTREE_TRACEBACK", "0") not in ("", "0")
    try:
        code = typer.main.get_command(app).main(given or ["--help"], prog_name="fusiontree", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (`| head`) went away; without this the interpreter's last flush would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None or show_traceback:
            raise
        # A command with sub-commands that was given none answers with its help, which is no sentence.
        is_help = type(error).__name__ == "NoArgsIsHelpError"
        if isinstance(error, ElsewhereError):
            # The process that tells it may come to it later, and a launcher ends all as soon as one has ended.
            time.sleep(_PATIENCE_S)
        else:
            print(error if is_help else f"error: {sentence}", file=sys.stderr)
        return BAD_INPUT


def _sentence(error: Exception) -> str | None:
    """What to tell the user, or None when the error is not theirs to mend."""
    if isinstance(error, _COMMAND_LINE_ERROR):
        context = getattr(error, "ctx", None)
        hint = f" (see `{context.command_path} --help`)" if context else ""
        return error.format_message().replace(": Value error, ", ": ").rstrip(".") + hint  # type: ignore[attr-defined]
    if isinstance(error, InputError):
        text = str(error).strip()
        if "Traceback (most recent call last)" in text:
            # torch repeats a data worker's error with the worker's traceback as its text: the sentence stands last.
            return text.splitlines()[-1].partition(": ")[2]
        return " ".join(text.splitlines())
    if isinstance(error, OSError):
        problem = _MENDABLE.get(error.errno or 0)
        if problem:
            return f"{error.filename or 'a file of this command'}: {problem}"
    if is_out_of_memory(error):
        return f"there is not enough memory ({first_line(error)}): take fewer tokens or rows, or a smaller model"
    return None
