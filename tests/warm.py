"""Processes that are forked from one which has imported everything: a start takes milliseconds.

Importing torch and transformers costs seconds of CPU time, and the tests start some hundred commands. `python()` and
`fusiontree()` are executables that behave as the real ones: arguments, environment, working directory, standard
streams, signals, exit codes and the end of the interpreter are those of a process of its own. What depends on the start
itself (a variable that a library reads when it is imported, what a command imports, limits set before) is tested with
the real ones.

    subprocess.run([warm.python(), "-m", "fusiontree", "train", "--config", path])

An executable sends its arguments and streams to the server (`python warm.py SOCKET`), which forks, and waits there for
the exit code; signals that it gets it passes on, and if it is killed, the server kills the fork.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import pkgutil
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from pathlib import Path
from typing import Any

MESSAGE_BYTES = 1 << 20

EXECUTABLE = """\
#!{python} -SEs
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({address!r})
request = {{"command": {command!r} + sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd()}}
socket.send_fds(server, [json.dumps(request).encode("utf-8", "surrogateescape")], [0, 1, 2])
pid = int(server.recv(64))
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
code = int(server.recv(64) or -signal.SIGKILL)
if code < 0:
    if code != -signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@functools.cache
def _executables() -> Path:
    """A folder with `python` and `fusiontree`; starts the server, which ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    address = folder / "socket"
    server = subprocess.Popen([sys.executable, __file__, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    atexit.register(_stop, server, folder)
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    script = str(Path(sys.executable).with_name("fusiontree"))
    for name, command in (("python", []), ("fusiontree", [script])):
        path = folder / name
        path.write_text(EXECUTABLE.format(python=sys.executable, address=str(address), command=command))
        path.chmod(0o755)
    return folder


def _stop(server: subprocess.Popen, folder: Path) -> None:
    assert server.stdin is not None
    server.stdin.close()
    server.wait()
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def python() -> str:
    """`python` that takes `-m MODULE`, `-c CODE` or a script."""
    return str(_executables() / "python")


def fusiontree() -> str:
    """The `fusiontree` command; its folder on PATH serves a shell."""
    return str(_executables() / "fusiontree")


def torchrun(processes: int = 2) -> list[str]:
    """The beginning of a `torchrun` command, up to the script or `-m MODULE`; the processes are warm too."""
    options = ["--standalone", f"--nproc_per_node={processes}", "--no_python"]
    return [python(), "-m", "torch.distributed.run", *options, python()]


def _serve(address: str) -> dict[str, Any]:
    """Fork for each request, until standard input closes. Returns in the forked processes alone, with the request."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen(64)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
    running: dict[int, tuple[int, socket.socket]] = {}  # pidfd -> (pid, connection)
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                connection, _ = listener.accept()
                message, streams, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 3)
                pid = os.fork()
                if pid == 0:
                    selector.close()
                    listener.close()
                    connection.close()
                    for pidfd, (_, other) in running.items():
                        os.close(pidfd)
                        other.close()
                    for number, stream in enumerate(streams):
                        os.dup2(stream, number)
                        os.close(stream)
                    return json.loads(message.decode("utf-8", "surrogateescape"))
                for stream in streams:
                    os.close(stream)
                # The executable may have been killed; the connection's end then tells below.
                with contextlib.suppress(OSError):
                    connection.send(str(pid).encode())
                pidfd = os.pidfd_open(pid)
                running[pidfd] = (pid, connection)
                selector.register(pidfd, selectors.EVENT_READ)
                selector.register(connection, selectors.EVENT_READ, pid)
            elif key.fileobj in running:
                pidfd = key.fileobj
                pid, connection = running.pop(pidfd)
                selector.unregister(pidfd)
                os.close(pidfd)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                if connection.fileno() in selector.get_map():
                    selector.unregister(connection)
                    with contextlib.suppress(OSError):
                        connection.send(str(code).encode())
                connection.close()
            elif key.data is not None:  # the executable was killed
                if key.fileobj.fileno() >= 0:  # its fork did not end in the same moment
                    selector.unregister(key.fileobj)
                    os.kill(key.data, signal.SIGKILL)
            else:
                for pid, _ in running.values():
                    os.kill(pid, signal.SIGKILL)
                sys.exit()


def _become(request: dict[str, Any]) -> None:
    """Run what was asked for as the interpreter would."""
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        errors = "backslashreplace" if name == "stderr" else "strict"
        stream = open(number, "w" if number else "r", encoding="utf-8", errors=errors, closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    first, *rest = request["command"]
    if first == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.path[0] = ""
        sys.argv = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.path[0] = str(Path(first).resolve().parent)
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")


def _import_everything() -> None:
    import matplotlib

    matplotlib.use("agg")
    import fusiontree

    for module in pkgutil.walk_packages(fusiontree.__path__, "fusiontree."):
        if not module.name.endswith("__main__") and "triton" not in module.name:
            importlib.import_module(module.name)


def _end(code: object) -> None:
    """The interpreter's end, but for the freeing of every module: in a fork that copies all their memory."""
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit((code or 0) & 0xFF)


if __name__ == "__main__":
    _import_everything()
    gc.collect()
    gc.freeze()  # a collection in a fork would write to, and so copy, every object
    request = _serve(sys.argv[1])
    try:
        _become(request)
    except SystemExit as stop:
        _end(stop.code)
    except BaseException:
        traceback.print_exc()
        _end(1)
    _end(0)
