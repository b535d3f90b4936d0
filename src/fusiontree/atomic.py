"""Files and directories that appear whole or not at all.

Everything is written beside its destination, flushed to the disk and then renamed, so that a full disk, an exception or
a killed process leaves what was there before.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def atomic_write(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Replaces the file at `path` by `content` (text as UTF-8) in one step.

    Missing parent directories are made. A symbolic link stays one: the file that it points to is replaced. What is
    there and is no regular file, such as a pipe or a device, is written to instead.

    Raises:
        OSError: the content could not be written (disk full, no permission); its `filename` is `path`, and the old file
            is untouched.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    if os.path.exists(path) and not os.path.isfile(path):
        with _naming(path), open(path, "wb") as file:
            file.write(data)
        return
    destination = Path(os.path.realpath(path))
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(destination)
    with _naming(path):
        try:
            # Not tempfile.mkstemp: its files are private to the user, whatever the umask says.
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, destination)
        except BaseException:
            with suppress(OSError):  # it may never have been made
                temporary.unlink()
            raise
    _sync_directory(destination.parent)


@contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """An `OSError` of the block names `path`: one of a write names no file, and others the temporary one."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Fills a directory and then puts it at `path` in one step, replacing a directory that is there.

    Yields an empty directory beside `path` to write into. When the block ends, its files are flushed to the disk and
    it is renamed; when the block or the flush raises, it is removed and what was at `path` stays. (Replacing takes two
    renames. Should the machine die between them, the old directory is found beside `path` as `.<name>.<digits>.old`.)

    Raises:
        OSError: the files could not be written. Libraries that report a full disk as an error of their own
            (safetensors, torch) are translated, so that `errno` is `ENOSPC` whoever wrote.
    """
    destination = Path(os.path.realpath(path))
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(destination)
    temporary.mkdir()
    try:
        yield temporary
        _sync_tree(temporary)
        _put_in_place(temporary, destination)
    except BaseException as error:
        is_of_library = isinstance(error, Exception) and not isinstance(error, OSError | ValueError)
        full = is_of_library and _means_disk_full(error, temporary)
        shutil.rmtree(temporary, ignore_errors=True)
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(destination)) from error
        raise
    _sync_directory(destination.parent)


def _sibling(destination: Path, suffix: str = "tmp") -> Path:
    return destination.with_name(f".{destination.name}.{secrets.token_hex(4)}.{suffix}")


def _put_in_place(temporary: Path, destination: Path) -> None:
    if not destination.exists():
        os.rename(temporary, destination)
        return
    if not destination.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(destination))
    old = _sibling(destination, "old")
    os.rename(destination, old)
    try:
        os.rename(temporary, destination)
    except BaseException:
        os.rename(old, destination)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync_tree(root: Path) -> None:
    for directory, _, names in os.walk(root):
        for name in names:
            # Flushing needs no right to write, and a file may have been made read-only.
            descriptor = os.open(os.path.join(directory, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        _sync_directory(Path(directory))


def _sync_directory(directory: Path) -> None:
    # Windows opens no directories, and some network file systems refuse to flush them: the rename itself stands.
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _means_disk_full(error: BaseException, directory: Path) -> bool:
    """safetensors says it in words, `torch.save` only fails an internal check: then the free space tells."""
    message = str(error)
    if os.strerror(errno.ENOSPC) in message or f"os error {errno.ENOSPC}" in message:
        return True
    return "inline_container" in message and shutil.disk_usage(directory).free < 1 << 20
