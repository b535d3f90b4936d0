"""Where else the rows of metrics.jsonl are shown: Weights & Biases, TensorBoard, a CSV table.

metrics.jsonl stays the one truth. Whenever a run is begun or resumed, each tracker is handed the rows that stand in it
and shows those and no others; from then on it gets every row as it is written. A tracker that fails is left behind with
a warning, and catches up when the run is resumed.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import io
import json
import os
import secrets
import shutil
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TextIO

from fusiontree.atomic import atomic_write
from fusiontree.errors import InputError, first_line
from fusiontree.train.loggers import JsonlLog, finite
from fusiontree.train.settings import LoggingSettings

Row = Mapping[str, Any]

_PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboard"}

_RGBA = 4  # TensorBoard's number for it

#: Seconds that the end of a run waits for what W&B has yet to upload.
WANDB_PATIENCE = 120.0


def check_trackers(settings: LoggingSettings) -> None:
    """Whether what the trackers need is installed.

    Raises:
        InputError: a package is missing.
    """
    for name in settings.trackers:
        package = _PACKAGES.get(name)
        if package is not None and not _is_installed(package):
            raise InputError(f"logging.trackers: {package} is not installed: pip install 'fusiontree[track]'")


def _is_installed(package: str) -> bool:
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:
        return False
    # A folder of that name beside the caller (W&B leaves a `wandb/`) can be imported as well, but holds no package.
    return spec is not None and spec.origin is not None


class Tracker(Protocol):
    def log(self, row: Row) -> None: ...

    def show(self, pictures: Mapping[str, Path], step: int) -> None: ...

    def close(self) -> None: ...


class CsvTracker:
    """RUN/metrics.csv: a line a row, a column a key, in the order in which the keys came up."""

    def __init__(self, path: Path, rows: Sequence[Row]):
        self._path = path
        self._columns: list[str] = []
        self._file: TextIO | None = None
        self._rewrite(rows)

    def _rewrite(self, rows: Sequence[Row]) -> None:
        self.close()
        self._columns = list(dict.fromkeys(key for row in rows for key in row))
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, self._columns)
        writer.writeheader()
        writer.writerows(rows)
        atomic_write(self._path, table.getvalue())
        self._file = self._path.open("a", encoding="utf-8", newline="")
        self._writer = csv.DictWriter(self._file, self._columns)

    def log(self, row: Row) -> None:
        assert self._file is not None
        if row.keys() <= set(self._columns):
            self._writer.writerow(row)
            self._file.flush()
            return
        with self._path.open(encoding="utf-8", newline="") as file:
            self._rewrite([*csv.DictReader(file), row])

    def show(self, pictures: Mapping[str, Path], step: int) -> None:
        """A table has no place for them."""

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class TensorBoardTracker:
    """RUN/tensorboard: a scalar a number, in one event file, which replaces those of before.

    TensorBoard's own writer has a thread, whose errors arrive late and with a traceback of their own.
    """

    def __init__(self, directory: Path, rows: Sequence[Row]):
        proto = importlib.import_module("tensorboard.compat.proto.event_pb2")
        self._event, start = proto.Event, proto.SessionLog.START
        writer = importlib.import_module("tensorboard.summary.writer.record_writer").RecordWriter
        directory.mkdir(parents=True, exist_ok=True)
        old = list(directory.glob("events.out.tfevents.*"))
        # Later names are read later, also by a TensorBoard that is looking on.
        self._file = (directory / f"events.out.tfevents.{time.time():.6f}").open("xb")
        self._writer = writer(self._file)
        self._write(wall_time=time.time(), file_version="brain.Event:2")
        # One that has read the old files forgets their steps on this.
        self._write(wall_time=time.time(), step=0, session_log={"status": start})
        # Their clock is the run's, stops left out, and ends now.
        last = next((row["elapsed"] for row in reversed(rows) if "elapsed" in row), 0.0)
        began, elapsed = time.time() - last, 0.0
        for row in rows:
            elapsed = row.get("elapsed", elapsed)
            self._add(row, began + elapsed)
        self._file.flush()
        for path in old:
            path.unlink()

    def _write(self, **fields: Any) -> None:
        self._writer.write(self._event(**fields).SerializeToString())

    def _add(self, row: Row, when: float) -> None:
        numbers = [
            {"tag": key, "simple_value": value} for key, value in row.items() if key != "step" and value is not None
        ]
        self._write(wall_time=when, step=row["step"], summary={"value": numbers})

    def log(self, row: Row) -> None:
        self._add(row, time.time())
        self._file.flush()

    def show(self, pictures: Mapping[str, Path], step: int) -> None:
        for name, path in pictures.items():
            content = path.read_bytes()
            width, height = struct.unpack(">II", content[16:24])  # where every PNG has them
            image = {"width": width, "height": height, "colorspace": _RGBA, "encoded_image_string": content}
            self._write(wall_time=time.time(), step=step, summary={"value": [{"tag": name, "image": image}]})
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class WandbTracker:
    """A run of Weights & Biases, found again by its id in RUN/wandb_id.

    W&B's own step is the number of the row, and `step` the axis of its charts. W&B takes each number once, in rising
    order, and tells on resuming which comes next: rows before that are left out here, and those that it never received
    are sent again. Offline it knows nothing of the files written before, so that a new one is written with all rows.

    Raises:
        InputError: W&B cannot be used as it is set up here (no login).
    """

    def __init__(self, settings: LoggingSettings, run_directory: Path, rows: Sequence[Row], config: Row):
        wandb = importlib.import_module("wandb")
        identifier = run_directory / "wandb_id"
        if not identifier.exists():
            atomic_write(identifier, secrets.token_hex(4) + "\n")
        name = identifier.read_text(encoding="utf-8").strip()
        mode = settings.wandb_mode or os.environ.get("WANDB_MODE") or "online"
        is_offline = mode in ("offline", "dryrun")
        try:
            self._run = wandb.init(
                project=settings.wandb_project,
                entity=settings.wandb_entity,
                name=settings.wandb_name or run_directory.resolve().name,
                mode=mode,
                id=name,
                resume=None if is_offline else "allow",
                dir=str(run_directory),
                config=dict(config),
                reinit="create_new",  # a run that the calling program has opened stays as it is
                settings=wandb.Settings(
                    console="off", silent=True, finish_timeout=WANDB_PATIENCE, finish_timeout_raises=True
                ),
            )
        except wandb.errors.UsageError as error:
            raise InputError(
                f"logging.trackers: wandb: {first_line(error)}; or set logging.wandb_mode to offline"
            ) from error
        if not is_offline and settings.progress != "none" and self._run.url:
            print(f"wandb: {self._run.url}", file=sys.stderr, flush=True)
        self._run.define_metric("*", step_metric="step")
        self._next, self._known = 0, self._run.starting_step
        for row in rows:
            self.log(row)
        if is_offline:
            here = Path(self._run.settings.sync_dir)
            for path in here.parent.glob(f"offline-run-*-{name}"):
                if path.name != here.name:
                    shutil.rmtree(path)

    def log(self, row: Row) -> None:
        if self._next >= self._known:
            self._run.log({key: value for key, value in row.items() if value is not None}, step=self._next)
        self._next += 1

    def show(self, pictures: Mapping[str, Path], step: int) -> None:
        # Not in the history, whose rows are counted. A resume shows newer ones in their place.
        wandb = importlib.import_module("wandb")
        for name, path in pictures.items():
            self._run.summary[name] = wandb.Image(str(path), caption=f"step {step}")

    def close(self) -> None:
        # Called while an exception passes, it tells W&B that the run has failed.
        self._run.finish(exit_code=0 if sys.exc_info()[0] is None else 1)


class MetricsLog(JsonlLog):
    """metrics.jsonl, and the trackers that show its rows."""

    def __init__(self, run_directory: Path):
        super().__init__(run_directory / "metrics.jsonl")
        self._openers: dict[str, Callable[[Sequence[Row]], Tracker]] = {}
        self._trackers: dict[str, Tracker] = {}

    def open_trackers(self, settings: LoggingSettings, config: Row) -> None:
        """Begin to show the file in the trackers that the settings name.

        Args:
            settings: which ones, and how.
            config: all settings of the run.

        Raises:
            InputError: a tracker that cannot work as it is set up. Other failures are warned of.
        """
        run = self.path.parent
        openers: dict[str, Callable[[Sequence[Row]], Tracker]] = {
            "csv": lambda rows: CsvTracker(run / "metrics.csv", rows),
            "tensorboard": lambda rows: TensorBoardTracker(run / "tensorboard", rows),
            "wandb": lambda rows: WandbTracker(settings, run, rows, config),
        }
        self._openers = {name: openers[name] for name in settings.trackers}
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        rows = [json.loads(line) for line in lines]
        for name in self._openers:
            try:
                self._open(name, rows)
            except ImportError as error:
                raise InputError(f"logging.trackers: {name} cannot be imported: {first_line(error)}") from error

    def _open(self, name: str, rows: Sequence[Row]) -> None:
        try:
            self._trackers[name] = self._openers[name](rows)
        except (InputError, ImportError):
            raise
        except Exception as error:
            self._leave(name, error)

    def truncate_after(self, step: int) -> list[dict[str, Any]]:
        """As for any log; trackers that show the run already are handed the rows that stay."""
        self.close()
        rows = super().truncate_after(step)
        for name in self._openers:
            self._open(name, rows)
        return rows

    def write(self, row: Row | str) -> None:
        super().write(row)
        if not isinstance(row, str):
            self._each(lambda tracker: tracker.log(finite(row)))

    def show(self, pictures: Sequence[Path], step: int) -> None:
        """Hand PNG files to the trackers, under their names, as those of the run at `step`."""
        self._each(lambda tracker: tracker.show({path.stem: path for path in pictures}, step))

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                do(tracker)
            except Exception as error:
                self._leave(name, error)

    def close(self) -> None:
        super().close()
        for name, tracker in self._trackers.items():
            try:
                tracker.close()
            except Exception as error:
                self._warn(name, error)
        self._trackers = {}

    def _leave(self, name: str, error: Exception) -> None:
        """Whatever a tracker dies of (a network, a disk, a library), the run goes on."""
        tracker = self._trackers.pop(name, None)
        if tracker is not None:
            with suppress(Exception):
                tracker.close()
        self._warn(name, error)

    def _warn(self, name: str, error: Exception) -> None:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        print(
            f"warning: {name} does not show this run any more ({reason}); {self.path} has every row, and resuming the "
            "run hands over what is missing",
            file=sys.stderr,
            flush=True,
        )
