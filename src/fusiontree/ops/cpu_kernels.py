"""C++ kernels for training on CPU, in `cpu_*.cpp`: compiled at their first use for the processor at hand, and kept.

They are plain functions of pointers, so that they depend on no version of torch or Python. Compiled by g++, they share
the OpenMP that torch has loaded already.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fusiontree.cache import user_cache_folder
from fusiontree.ops.backends import BackendError, register

SOURCES = tuple(
    Path(__file__).with_name(name)
    for name in ("cpu_kernels.cpp", "cpu_scan.cpp", "cpu_attention.cpp", "cpu_tiles.h", "cpu_numbers.h")
)
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
# Below as many elements a call takes microseconds either way, and is no reason to run a compiler.
FEWEST_ELEMENTS = 2**18
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def unusable() -> str | None:
    """Why the kernels cannot be compiled on this machine (None: as far as can be told, they can)."""
    if platform.system() != "Linux":
        return "its kernels are compiled on Linux alone"
    return None if _compiler() is not None else "it needs a C++ compiler and finds none"


def refuses(x: Tensor, *tensors: Tensor | None, **_: Any) -> str | None:
    """Why the kernels cannot honour these arguments."""
    if any(t is not None and t.device.type != "cpu" for t in (x, *tensors)):
        return "it runs on CPU alone"
    if x.dtype not in _DTYPES:
        return f"it does not support dtype {x.dtype}"
    if type(x) is not Tensor:  # with a memory of its own kind, or none
        return f"it reads plain tensors, not {type(x).__name__}"
    return None if x.numel() else "it takes no empty tensors"


def auto_declines(x: Tensor, *tensors: Tensor | None, **_: Any) -> str | None:
    """Why `auto` leaves a call to torch's operations."""
    if x.numel() < FEWEST_ELEMENTS:
        return "the call is small"
    if torch.jit.is_tracing() or _get_current_dispatch_mode() is not None:
        return "somebody records torch's operations"
    try:
        _library()
    except BackendError as error:
        return str(error)
    return None


def register_kernel(op: str, function: Callable[..., Any], refuses: Callable[..., str | None] = refuses) -> None:
    """Adds `function`, which calls these kernels, to an op as its backend `cpp`."""
    register(op, "cpp", function, unusable=unusable, refuses=refuses, auto_declines=auto_declines)


def call(name: str, dtype: torch.dtype, *arguments: Tensor | int | float | bool | None) -> bool:
    """Calls the kernel `name` for tensors of `dtype`: pointers for tensors, null for None; the number of threads last.

    What it returns means something of those that return a bool.

    Raises:
        BackendError: the kernels do not compile.
    """
    function = getattr(_library(), f"{name}_{_DTYPES[dtype]}")
    function.restype = ctypes.c_bool
    return function(*map(_passed, arguments), ctypes.c_int(torch.get_num_threads()))


def asks(name: str) -> bool:
    """What a function without arguments says of this machine.

    Raises:
        BackendError: the kernels do not compile.
    """
    function = getattr(_library(), name)
    function.restype = ctypes.c_bool
    return function()


def floats(*shape: int) -> Tensor:
    """Memory for float32 results, whatever dtype and device torch would take."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def empty_like(tensor: Tensor) -> Tensor:
    """Contiguous memory for a result like `tensor`."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def rows(tensor: Tensor) -> Tensor:
    """The tensor, copied where the elements of its last dimension do not lie side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _passed(argument: Tensor | int | float | bool | None) -> Any:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, bool):
        return ctypes.c_bool(argument)
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int64(argument)


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "c++", "clang++")))), None)


def _library() -> ctypes.CDLL:
    """
    Raises:
        BackendError: there is no compiler, or it fails.
    """
    if isinstance(found := _outcome(), BackendError):
        raise found
    return found


@lru_cache(maxsize=1)
def _outcome() -> ctypes.CDLL | BackendError:
    """The kernels, or why there are none: a compiler that fails is not run again."""
    try:
        return _built()
    except BackendError as error:
        return error
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:  # RuntimeError: the user has no home folder
        return BackendError(f"the C++ kernels cannot be compiled and kept: {error}")


def _built() -> ctypes.CDLL:
    compiler = _compiler()
    if compiler is None:
        raise BackendError("the C++ kernels need a compiler and find none")
    made_of = ([source.read_bytes() for source in SOURCES], compiler, FLAGS, _processor())
    name = hashlib.sha256(repr(made_of).encode()).hexdigest()[:32]
    path = _folder() / f"cpu_kernels_{name}.so"
    if path.exists():
        with suppress(OSError):  # damaged, or of another system that shares the folder
            return ctypes.CDLL(str(path))
    _compile(compiler, path)
    return ctypes.CDLL(str(path))


def _compile(compiler: str, path: Path) -> None:
    """Into a file of its own first: other processes may do the same at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        sources = [str(source) for source in SOURCES if source.suffix == ".cpp"]
        done = subprocess.run(
            [compiler, *FLAGS, *sources, "-o", str(made)], capture_output=True, text=True, timeout=300
        )
        if done.returncode:
            lines = done.stderr.splitlines() or ["it says nothing"]
            problem = next((line for line in lines if "error" in line), lines[0])
            raise BackendError(f"{compiler} cannot compile the kernels: {problem}")
        with made.open("rb") as file:
            os.fsync(file.fileno())
        made.replace(path)


def _folder() -> Path:
    """Where compiled kernels are kept."""
    return user_cache_folder() / "kernels"


def _processor() -> str:
    """What `-march=native` looks at: a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = ("model name", "flags", "Features", "CPU part")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(named)}))
