"""A run's checkpoints as files: which there are, whether they are whole, which of them to keep.

RUN/checkpoints/step_00000500/
    training_state/files.json    size and SHA-256 of every other file
RUN/latest, RUN/best             relative symbolic links to checkpoints
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from fusiontree.artifacts import checkpoint_step
from fusiontree.errors import InputError

LATEST = "latest"
BEST = "best"
MANIFEST = "manifest.json"
STATE_DIRECTORY = "training_state"
_LISTING = "files.json"


def list_files(directory: Path) -> None:
    """Write sizes and checksums of all files beside them, so that a damaged copy is told before anything is used."""
    files = {
        str(file.relative_to(directory)): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }
    (directory / STATE_DIRECTORY / _LISTING).write_text(json.dumps(files, indent=1), encoding="utf-8")


def check_files(path: Path) -> None:
    """Compare a checkpoint's files with what is written beside them.

    Raises:
        InputError: names the first file that is missing, of another size or with other content.
    """
    if not path.is_dir():
        raise InputError(f"checkpoint {path} does not exist")
    listing = path / STATE_DIRECTORY / _LISTING
    try:
        files = json.loads(listing.read_text(encoding="utf-8"))
        expected = {path / name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path} is not a whole training checkpoint: {listing} is missing, truncated or of an older version"
        ) from error
    for file, (size, digest) in expected.items():
        name = file.relative_to(path)
        if not file.is_file():
            raise InputError(f"checkpoint {path} is not whole: {name} is missing; resume from an earlier checkpoint")
        if file.stat().st_size != size:
            raise InputError(
                f"checkpoint {path} is truncated: {name} has {file.stat().st_size} bytes instead of {size}; "
                "resume from an earlier checkpoint"
            )
        if _sha256(file) != digest:
            raise InputError(
                f"checkpoint {path} is damaged: {name} is not what was written (its SHA-256 differs); "
                "resume from an earlier checkpoint"
            )


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def checkpoints_of(run: Path) -> list[Path]:
    """A run's checkpoints, newest first: what `latest` points to, then the others by step."""
    found = [path for path in (run / "checkpoints").glob("step_*") if checkpoint_step(path) is not None]
    found.sort(key=lambda path: checkpoint_step(path) or 0, reverse=True)
    pointed = (run / LATEST).resolve()
    return sorted(found, key=lambda path: path.resolve() != pointed)


def newest_checkpoint(run: Path) -> Path | None:
    """What a run goes on from, whether it is whole or not."""
    return next(iter(checkpoints_of(run)), None)


def newest_whole(run: Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole; each damaged one on the way is reported.

    Raises:
        InputError: there are checkpoints, and all of them are damaged.
    """
    damaged: InputError | None = None
    for path in checkpoints_of(run):
        try:
            check_files(path)
        except InputError as error:
            damaged = error
            report(f"passed over: {error}")
            continue
        return path
    if damaged is not None:
        raise InputError(f"{run} has no checkpoint that is whole; the oldest: {damaged}")
    return None


def point(link: Path, path: Path) -> None:
    """Make `link`, a relative symbolic link in the run's directory, point to a checkpoint in one step."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(path.relative_to(link.parent))
    if link.is_dir() and not link.is_symlink():
        # A copy of the run that followed the link has a whole checkpoint here, which lies in its place as well.
        shutil.rmtree(link)
    os.replace(temporary, link)


def drop_old(directory: Path, keep: Path, limit: int) -> None:
    """Remove the oldest checkpoints beyond `limit`, but neither `keep` nor the best one."""
    newest = checkpoint_step(keep) or 0
    spared = {keep.resolve(), (directory.parent / BEST).resolve()}
    others = [
        (step, path)
        for path in directory.iterdir()
        if path.resolve() not in spared and (step := checkpoint_step(path)) is not None
    ]
    # First those of later steps: a run that went back to an earlier checkpoint has given them up.
    steps = sorted(others, key=lambda entry: (entry[0] < newest, entry[0]))
    for _, path in steps[: max(0, len(steps) - (limit - 1))]:
        shutil.rmtree(path)


def remove_unfinished(directory: Path) -> None:
    """Clear away what a process that was killed while saving left in a run's `checkpoints` directory.

    A checkpoint that it had set aside to replace it, and did not get to replace, is put back.
    """
    for path in directory.glob(".step_*.old"):
        destination = directory / path.name[1:].partition(".")[0]
        if not destination.exists():
            path.rename(destination)
    for path in [*directory.glob(".step_*.old"), *directory.glob(".step_*.tmp")]:
        shutil.rmtree(path, ignore_errors=True)
