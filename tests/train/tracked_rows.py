"""The rows that trackers show, read back from what they leave on the disk."""

from __future__ import annotations

import csv
import json
import struct
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def in_metrics(run: Path) -> Rows:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def in_csv(run: Path) -> Rows:
    with (run / "metrics.csv").open(newline="") as file:
        return [{key: json.loads(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def in_tensorboard(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Per tag its steps and values, as TensorBoard itself reads the folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in sorted(events.Tags()["scalars"])
    }


def pictures_in_tensorboard(run: Path) -> dict[str, list[tuple[int, bytes]]]:
    """Per tag its steps and PNG files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    return {
        tag: [(event.step, event.encoded_image_string) for event in events.Images(tag)]
        for tag in events.Tags()["images"]
    }


def pictures_in_wandb(run: Path, expected: int) -> dict[str, tuple[str, bytes]]:
    """Captions and PNG files of the summary of the only offline run that is there."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = (run / "wandb").glob("offline-run-*/*.wandb")
    deadline, found = time.monotonic() + 60, {}
    while len(found) < expected and time.monotonic() < deadline:
        time.sleep(0.1)
        for content in _records(file.read_bytes()):
            for item in Record.FromString(content).summary.update:
                value = json.loads(item.value_json)
                if isinstance(value, dict) and value.get("_type") == "image-file":
                    picture = (file.parent / "files" / value["path"]).read_bytes()
                    found[item.key or item.nested_key[0]] = value["caption"], picture
    return found


def by_tag(rows: Rows) -> dict[str, list[tuple[int, float]]]:
    found = defaultdict(list)
    for row in rows:
        for key, value in row.items():
            if key != "step" and value is not None:
                found[key].append((row["step"], value))
    return dict(sorted(found.items()))


def in_wandb(run: Path, expected: int) -> Rows:
    """Those of the only offline run that is there. W&B's own process may write on after the run has finished."""
    deadline = time.monotonic() + 60
    while len(rows := _in_wandb(run)) < expected and time.monotonic() < deadline:
        time.sleep(0.1)
    return rows


def _in_wandb(run: Path) -> Rows:
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = (run / "wandb").glob("offline-run-*/*.wandb")
    rows = []
    for content in _records(file.read_bytes()):
        record = Record.FromString(content)
        if record.WhichOneof("record_type") == "history":
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            rows.append({key: value for key, value in items.items() if key[0] != "_"})
    return rows


def _records(data: bytes) -> list[bytes]:
    """W&B's file is a LevelDB log: blocks of 32 KiB, in them pieces of records with (checksum, length, kind) before."""
    found, pending, place = [], b"", 7  # the file's own head
    while place + 7 <= len(data):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        if place + 7 + length > len(data):
            break  # still being written
        piece, place = data[place + 7 : place + 7 + length], place + 7 + length
        pending = piece if kind in (1, 2) else pending + piece
        if kind in (1, 4):
            found.append(pending)
    return found
