"""`fusiontree serve`."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import sys
from pathlib import Path

import typer

from fusiontree.cli import INTERRUPTED
from fusiontree.errors import InputError

KEY_VARIABLE = "FUSIONTREE_API_KEY"
_LIBRARIES = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    model: Path = typer.Argument(..., help="Model folder, or a run directory, whose newest checkpoint is taken."),
    host: str = typer.Option(
        "127.0.0.1", "--host", help="Address to listen on; others than this machine's need a key."
    ),
    port: int = typer.Option(8000, "--port", min=0, max=65535, help="0 = any free one; the log says which."),
    name: str = typer.Option(None, "--name", help="By which requests ask for the model; default: the folder's name."),
    api_key_file: Path = typer.Option(None, "--api-key-file", help=f"One key a line; beside those in {KEY_VARIABLE}."),
    without_key: bool = typer.Option(False, "--without-key", help="Let anybody who reaches HOST in."),
    max_rows: int = typer.Option(64, "--max-rows", min=1, help="Texts that run at once at most."),
    state_memory: str = typer.Option("1GiB", "--state-memory", help="For the states of texts that run."),
    prefix_memory: str = typer.Option("256MiB", "--prefix-memory", help="For snapshots of prompts; 0 = none."),
    prefill_piece: int = typer.Option(512, "--prefill-piece", min=1, help="Prompt tokens between steps of decoding."),
    snapshot_interval: int = typer.Option(1024, "--snapshot-interval", min=1, help="Prompt tokens between snapshots."),
    max_body: str = typer.Option("4MiB", "--max-body", help="Of a request."),
    max_prompt_tokens: int = typer.Option(32768, "--max-prompt-tokens", min=1, help="Of a text."),
    max_new_tokens: int = typer.Option(4096, "--max-new-tokens", min=1, help="Of a text."),
    max_choices: int = typer.Option(16, "--max-choices", min=1, help="Texts that one request may ask for."),
    max_queue: int = typer.Option(256, "--max-queue", min=0, help="Texts that may wait; more are told to come back."),
    request_seconds: float = typer.Option(600.0, "--request-seconds", help="After which a text ends where it is."),
    drain_seconds: int = typer.Option(30, "--drain-seconds", min=0, help="To finish what runs when told to stop."),
    device: str = typer.Option(None, "--device", help="cpu or cuda; default: cuda where there is a device."),
    dtype: str = typer.Option(None, "--dtype", help="float32, bfloat16 or float16; default: as saved."),
    weights: str = typer.Option(None, "--weights", help="int8 or int4: round the blocks' linear layers (torchao)."),
    compile: bool = typer.Option(False, "--compile", help="Compile steps for up to four numbers of rows first."),
) -> None:
    """Serve a model over HTTP as OpenAI's API does: /v1/completions, /v1/chat/completions, /v1/models.

    Also /health and, for Prometheus, /metrics. Listens on this machine alone unless told otherwise. With a key set,
    nothing but /health is answered without it. SIGTERM finishes what runs and ends.
    """
    missing = [library for library in _LIBRARIES if importlib.util.find_spec(library) is None]
    if missing:
        raise InputError(f"serving needs {', '.join(missing)}: pip install 'fusiontree[serve]'")
    if without_key and api_key_file is not None:
        raise InputError("--without-key lets anybody in, --api-key-file asks for a key: leave one of the two out")
    keys = _read_keys(api_key_file)
    if not keys and not without_key and not _is_loopback(host):
        raise InputError(
            f"anybody who reaches {host} could use the model: set {KEY_VARIABLE}, give --api-key-file, or allow it "
            "with --without-key"
        )
    from fusiontree.cli._options import byte_size, load_for_use
    from fusiontree.deploy.allocator import keep_large_blocks_apart
    from fusiontree.deploy.engine import ComputeThread
    from fusiontree.deploy.loading import find_model
    from fusiontree.deploy.runtime import InferenceRuntime, SchedulerSettings
    from fusiontree.deploy.server import ServerSettings, run

    settings = ServerSettings(
        name=name or _name_of(find_model(model)),
        host=host,
        port=port,
        api_keys=tuple(keys),
        max_body_bytes=byte_size(max_body, "--max-body"),
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        max_choices=max_choices,
        max_queue=max_queue,
        request_seconds=request_seconds,
        drain_seconds=drain_seconds,
    )
    memory = SchedulerSettings(
        state_bytes=byte_size(state_memory, "--state-memory"),
        prefix_bytes=byte_size(prefix_memory, "--prefix-memory"),
        max_rows=max_rows,
        prefill_piece=prefill_piece,
        snapshot_interval=snapshot_interval,
    )

    def ready() -> InferenceRuntime:
        loaded = load_for_use(model, device=device, dtype=dtype, weights=weights, compile=compile)
        runtime = InferenceRuntime(loaded, settings=memory, compile=compile)
        if compile:
            typer.echo("compiling steps of decoding, which can take minutes the first time", err=True)
            runtime.scheduler.warm_up(_say_program)
        return runtime

    keep_large_blocks_apart()
    thread = ComputeThread()
    try:
        runtime = thread.submit(ready).result()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)  # without an end of the interpreter, which would break the thread off inside of torch
    try:
        run(runtime, settings, thread)
    except KeyboardInterrupt as error:  # after it has stopped in order, of which the log tells in its own form
        raise typer.Exit(INTERRUPTED) from error


def _say_program(number: int, count: int, rows: int) -> None:
    typer.echo(f"compiling program {number} of {count}, steps of {rows} row{'s' if rows > 1 else ''}", err=True)


def _name_of(folder: Path) -> str:
    """A run's name rather than that of its checkpoint."""
    folder = folder.resolve()
    return folder.parent.parent.name if folder.parent.name == "checkpoints" else folder.name


def _read_keys(file: Path | None) -> list[str]:
    keys = [os.environ.get(KEY_VARIABLE, "").strip()]
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except OSError as error:
            raise InputError(f"--api-key-file {file} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"--api-key-file {file} is not UTF-8 text (byte {error.start})") from error
        if not any(lines):
            raise InputError(f"--api-key-file {file} holds no key")
        keys += lines
    return [key for key in keys if key]


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
