"""The `static` mode: everything tokenised beforehand into memory-mapped shards.

    <folder>/manifest.json         what the ids depend on, number of records, of records in a shard, dtype
             shard-00000.ids       the signed ids (see `packing`) of the shard's documents, one after the other
             shard-00000.json      where each begins, the kinds of records without ids, a checksum of the ids, to which
                                   a process compares them when it first opens the shard

A shard appears when it is whole, and the manifest before all shards: what was interrupted goes on with those that are
missing, and a folder without one of its shards is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from fusiontree.atomic import atomic_write
from fusiontree.data.records import BadRecord
from fusiontree.data.report import DataReport
from fusiontree.data.source import RecordSet
from fusiontree.errors import InputError

_FORMAT = "fusiontree-tokens-1"
_MANIFEST = "manifest.json"
_MAX_OPEN_SHARDS = 64
_RECORDS_AT_ONCE = 256
# Source bytes to a shard, about: what one process tokenises at a time, and what an interruption loses.
_SHARD_BYTES = 1 << 26

# How shards can differ from what a run asks for, by the names in `RecordSet.identity`.
_DIFFERENCES = {
    "data": "the files' contents, their order or how they are read differ",
    "tokenizer": "the tokenizer differs",
    "separator_id": "data.document_separator differs",
    "chat_template": "the tokenizer's chat template differs",
}


def tokenise(
    records: RecordSet, folder: str | os.PathLike[str], *, vocab_size: int, processes: int = 1
) -> Iterator[tuple[int, int]]:
    """Write the shards of `records` that `folder` lacks; yields (shards done, of how many) as they are.

    Args:
        vocab_size: decides how many bytes an id takes.
        processes: that tokenise at a time.

    Raises:
        InputError: the folder holds tokens of something else or cannot be written; a record cannot be read.
    """
    folder = Path(folder).expanduser()
    if len(records) == 0:
        raise InputError("there is no record to tokenise")
    mean_bytes = max(1, records.num_bytes // len(records))
    manifest = {
        "format": _FORMAT,
        "identity": dict(records.identity()),
        "records": len(records),
        "records_per_shard": max(1, min(len(records), _SHARD_BYTES // mean_bytes)),
        "dtype": "<i2" if vocab_size <= 2**15 else "<i4",
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for entry in folder.glob("*.tmp"):
            entry.unlink(missing_ok=True)
        if (folder / _MANIFEST).exists():
            _require_same(folder, _read_manifest(folder), records.identity())
        else:
            atomic_write(folder / _MANIFEST, json.dumps(manifest, indent=1))
    except OSError as error:
        raise InputError(f"tokens cannot be written to {folder}: {error.strerror or error}") from error
    shards = _num_shards(manifest)
    missing = [shard for shard in range(shards) if not _index_path(folder, shard).exists()]
    yield shards - len(missing), shards
    jobs = [(records, str(folder), shard, manifest) for shard in missing]
    if processes <= 1 or len(jobs) <= 1:
        finished: Iterator[str | None] = map(_write_shard, jobs)
        yield from _failing(finished, shards - len(missing), shards)
        return
    # Spawned: a tokenizer that has used its threads must not be forked.
    pool = ProcessPoolExecutor(min(processes, len(jobs)), mp_context=get_context("spawn"))
    try:
        yield from _failing(pool.map(_write_shard, jobs), shards - len(missing), shards)
    except BrokenProcessPool as error:
        raise InputError(
            "a process that tokenises was killed, perhaps for lack of memory: use fewer --processes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _failing(finished: Iterator[str | None], done: int, shards: int) -> Iterator[tuple[int, int]]:
    for failure in finished:
        if failure is not None:
            raise InputError(failure)
        done += 1
        yield done, shards


def _write_shard(job: tuple[RecordSet, str, int, Mapping[str, Any]]) -> str | None:
    """Write one shard; what went wrong, in words, since it may happen in another process."""
    records, folder, shard, manifest = job
    first = shard * manifest["records_per_shard"]
    stop = min(first + manifest["records_per_shard"], manifest["records"])
    target = _ids_path(Path(folder), shard)
    temporary = target.with_name(f"{target.name}.{secrets.token_hex(4)}.tmp")
    lengths: list[int] = []
    bad: dict[str, list[str]] = {}
    digest = hashlib.sha256()
    try:
        with open(temporary, "xb") as output:
            for begin in range(first, stop, _RECORDS_AT_ONCE):
                numbers = range(begin, min(begin + _RECORDS_AT_ONCE, stop))
                for number, ids in zip(numbers, records.__getitems__(numbers), strict=True):
                    if isinstance(ids, BadRecord):
                        bad[str(number - first)] = [ids.kind, ids.detail, records.source(number)]
                        lengths.append(0)
                        continue
                    content = ids.astype(manifest["dtype"]).tobytes()
                    output.write(content)
                    digest.update(content)
                    lengths.append(len(ids))
            output.flush()
            os.fsync(output.fileno())
        os.replace(temporary, target)
        index = {"lengths": lengths, "bad": bad, "sha256": digest.hexdigest()}
        atomic_write(_index_path(Path(folder), shard), json.dumps(index))
    except InputError as error:
        return str(error)
    except OSError as error:
        return f"tokens cannot be written to {folder}: {error.strerror or error}"
    finally:
        with suppress(OSError):
            temporary.unlink()
    return None


class LongContextDataset(Dataset):
    """Records that `tokenise` has written: `dataset[i]` is the signed int32 ids of record i, or why there are none.

    Args:
        folder: where they lie.
        expected: what of `RecordSet.identity` must be equal; None = take what is there.

    Raises:
        InputError: no tokens there, not all of them, or tokens of something else.
    """

    def __init__(self, folder: str | os.PathLike[str], expected: Mapping[str, object] | None = None) -> None:
        self.folder = Path(folder).expanduser()
        self._manifest = _read_manifest(self.folder)
        if expected is not None:
            _require_same(self.folder, self._manifest, expected)
        missing = [n for n in range(_num_shards(self._manifest)) if not _index_path(self.folder, n).exists()]
        if missing:
            raise InputError(
                f"{self.folder} lacks {len(missing)} of {_num_shards(self._manifest)} shards: run "
                "`fusiontree data tokenise` again, which goes on where it stopped"
            )
        self._open: OrderedDict[int, tuple[np.ndarray, np.ndarray, dict[str, list[str]]]] = OrderedDict()
        self._verified: set[int] = set()

    def __len__(self) -> int:
        return int(self._manifest["records"])

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __getitem__(self, record: int) -> np.ndarray | BadRecord:
        return self.__getitems__([record])[0]

    def __getitems__(self, records: Sequence[int]) -> list[np.ndarray | BadRecord]:
        return [self._read(record) for record in records]

    @property
    def num_bytes(self) -> int:
        return sum(_ids_path(self.folder, shard).stat().st_size for shard in range(_num_shards(self._manifest)))

    def source(self, record: int) -> str:
        """`file:line` of a record without ids, as it was when it was tokenised; of others its number."""
        shard, number = divmod(record, self._manifest["records_per_shard"])
        bad = self._opened(shard)[2].get(str(number))
        return bad[2] if bad else f"{self.folder}: record {record}"

    def identity(self) -> dict[str, object]:
        return dict(self._manifest["identity"])

    def damage(self) -> list[tuple[str, BadRecord]]:
        """Nothing: `report` has told it when the tokens were made."""
        return []

    def report(self) -> DataReport:
        """What the tokens were made of: documents, and the records without ids, which stay in their places."""
        report = DataReport()
        for shard in range(_num_shards(self._manifest)):
            index = _read_json(_index_path(self.folder, shard))
            report.documents += len(index["lengths"]) - len(index["bad"])
            for kind, detail, source in index["bad"].values():
                report.add(source, BadRecord(kind, detail))
        return report

    def _read(self, record: int) -> np.ndarray | BadRecord:
        if not 0 <= record < len(self):
            raise IndexError(f"record {record} of {len(self)}")
        shard, number = divmod(record, self._manifest["records_per_shard"])
        ids, bounds, bad = self._opened(shard)
        if fault := bad.get(str(number)):
            return BadRecord(fault[0], fault[1])
        return ids[bounds[number] : bounds[number + 1]].astype(np.int32)

    def _opened(self, shard: int) -> tuple[np.ndarray, np.ndarray, dict[str, list[str]]]:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        path = _ids_path(self.folder, shard)
        index = _read_json(_index_path(self.folder, shard))
        bounds = np.cumsum([0, *index["lengths"]])
        dtype = np.dtype(self._manifest["dtype"])
        try:
            size = path.stat().st_size
            if size != bounds[-1] * dtype.itemsize:
                raise InputError(f"{path} is cut off or damaged: delete it and its .json, and tokenise again")
            # A file of no bytes cannot be mapped.
            ids = np.memmap(path, dtype=dtype, mode="r") if size else np.zeros(0, dtype=dtype)
            if shard not in self._verified and hashlib.sha256(ids.data).hexdigest() != index["sha256"]:
                raise InputError(f"{path} is damaged: delete it and its .json, and tokenise again")
            self._verified.add(shard)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
        self._open[shard] = ids, bounds, index["bad"]
        if len(self._open) > _MAX_OPEN_SHARDS:
            self._open.popitem(last=False)
        return self._open[shard]


def _num_shards(manifest: Mapping[str, Any]) -> int:
    return -(-int(manifest["records"]) // int(manifest["records_per_shard"]))


def _ids_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.ids"


def _index_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.json"


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not (folder / _MANIFEST).exists():
        raise InputError(f"{folder} holds no tokens: make them with `fusiontree data tokenise`")
    manifest = _read_json(folder / _MANIFEST)
    if manifest.get("format") != _FORMAT:
        raise InputError(f"{folder} holds tokens of another version: tokenise into another folder")
    return manifest


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}; delete it and tokenise again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object; delete it and tokenise again")
    return content


def _require_same(folder: Path, manifest: Mapping[str, Any], wanted: Mapping[str, object]) -> None:
    for key, value in wanted.items():
        if manifest["identity"].get(key) != value:
            raise InputError(
                f"the tokens in {folder} are not those of this run: {_DIFFERENCES.get(key, f'{key} differs')}; "
                "delete the folder and tokenise again, or name another data.static_dir"
            )
