"""Files as one long list of records, any of which can be read alone.

A record is a line of JSONL, a row of parquet or of a saved Arrow data set, or a line or the whole of a `.txt`. What is
packed is unpacked once into the cache (`unpack`). Memory does not grow with the files: line offsets are memory-mapped
(`line_index`), lines are read on demand, and only a bounded number of files is open at a time.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Literal

import numpy as np

from fusiontree.data.line_index import LineIndex, index_lines
from fusiontree.data.records import (
    BLANK_LINE,
    BROKEN_JSON,
    DAMAGED_FILE,
    MAX_RECORD_BYTES,
    NOT_A_STRING,
    NOT_AN_OBJECT,
    NOT_UTF8,
    BadRecord,
    Content,
    Conversation,
    decode_record,
    decode_text,
    too_long,
)
from fusiontree.data.report import DataReport
from fusiontree.data.text_stream import check_is_text
from fusiontree.data.unpack import is_arrow_folder, is_text, unpacked
from fusiontree.errors import InputError

_MAX_OPEN_FILES = 64


def resolve_paths(patterns: Sequence[str], *, where: str) -> list[str]:
    """The files behind paths and globs: in the given order, each glob's own matches sorted, none twice.

    Args:
        where: the setting or argument the patterns come from, for messages.

    Raises:
        InputError: no pattern at all, a file that does not exist, a folder, or a glob that matches no file.
    """
    if not patterns:
        raise InputError(f"{where} is empty: name at least one file")
    found: dict[str, str] = {}
    for pattern in patterns:
        if not pattern.strip():
            raise InputError(f"{where} holds an empty name")
        expanded = os.path.expanduser(pattern)
        if glob.has_magic(expanded) and not os.path.lexists(expanded):
            found_here = sorted(matching_paths(expanded))
            folders = tuple(path + os.sep for path in found_here if is_arrow_folder(path))
            # Of a saved data set, the folder counts and not the files in it.
            matches = [
                path
                for path in found_here
                if path + os.sep in folders or not (os.path.isdir(path) or path.startswith(folders))
            ]
            if not matches:
                raise InputError(f"{where}: no file matches {pattern}")
        else:
            matches = [expanded]
        for path in matches:
            _check_is_file(path, where)
            found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def matching_paths(pattern: str) -> set[str]:
    """What a glob matches, each folder below `**` entered once, by its shortest path, however links lead into it.

    (`glob.glob` follows links, and two that lead back to their folder make it visit 2**40 paths.)
    """
    parts = pattern.split(os.sep)
    if "**" not in parts:
        return set(glob.glob(pattern))
    before, after = parts[: parts.index("**")], parts[parts.index("**") + 1 :]
    found: set[str] = set()
    entered: set[tuple[int, int]] = set()
    folders = sorted(glob.glob(os.sep.join([*before, ""]))) if before else [""]
    while folders:
        below: list[str] = []
        for folder in folders:
            with suppress(OSError), os.scandir(folder or os.curdir) as entries:
                status = os.stat(folder or os.curdir)
                if (status.st_dev, status.st_ino) in entered:
                    continue
                entered.add((status.st_dev, status.st_ino))
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if entry.name.startswith("."):  # as `*` leaves them out
                        continue
                    if not after:
                        found.add(folder + entry.name)
                    if entry.is_dir():
                        below.append(os.path.join(folder, entry.name, ""))
                if after:
                    found |= matching_paths(os.path.join(glob.escape(folder), *after))
        folders = below
    return found


def _check_is_file(path: str, where: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if "://" in path:
            raise InputError(f"{where}: {path} is a URL, which only data_mode hf_streaming reads") from error
        reason = "does not exist" if error.errno == errno.ENOENT else f"cannot be read: {error.strerror}"
        raise InputError(f"{where}: {path} {reason}") from error
    if stat.S_ISDIR(mode) and is_arrow_folder(path):
        return
    if stat.S_ISDIR(mode):
        raise InputError(f"{where}: {path} is a folder; name the files in it, such as {os.path.join(path, '*.jsonl')}")
    if not stat.S_ISREG(mode):
        raise InputError(f"{where}: {path} is a pipe or a device, where a file is needed")


class Corpus:
    """The records of some files, in file order, numbered from 0; every line is one, blank ones included.

    Args:
        paths: the files, as `resolve_paths` gives them.
        text_key: key of a record that holds its text, or its list of messages.
        txt_documents: whether a `.txt` file is one document, or each of its lines.
        cache_dir: see `index_lines`.

    Raises:
        InputError: a file that cannot be read or is visibly no JSONL (compressed, parquet, UTF-16).
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        text_key: str = "text",
        txt_documents: Literal["file", "line"] = "file",
        cache_dir: str | None = None,
    ) -> None:
        self.text_key = text_key
        self._set_files(
            [_index(path, text_key, txt_documents, cache_dir) for path in paths],
            [decode_text if is_text(path) else partial(decode_record, text_key=text_key) for path in paths],
        )

    @classmethod
    def joined(cls, corpora: Sequence[Corpus]) -> Corpus:
        """The records of all, one corpus after the other."""
        if len(corpora) == 1:
            return corpora[0]
        corpus = cls.__new__(cls)
        corpus.text_key = corpora[0].text_key
        corpus._set_files(
            [file for one in corpora for file in one.files], [decode for one in corpora for decode in one._decoders]
        )
        return corpus

    def _set_files(self, files: list[LineIndex], decoders: list[Callable[[bytes], Content]]) -> None:
        self.files = files
        self._decoders = decoders
        self._starts = np.cumsum([0] + [file.lines for file in self.files])  # [files + 1]: each file's first record
        self._open: OrderedDict[int, tuple[int, np.ndarray]] = OrderedDict()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, object]:
        # Another process opens the files for itself.
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self, _close: Callable[[int], None] = os.close) -> None:
        # Bound above because modules are gone when the interpreter ends.
        for descriptor, _ in self.__dict__.get("_open", {}).values():
            _close(descriptor)

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files)

    def source(self, record: int) -> str:
        """`file:line` of a record, lines counted from 1."""
        number, line = self._locate(record)
        return f"{self.files[number].name}:{line + 1}"

    def read(self, record: int) -> Content:
        """The text or conversation of a record, or why it has none.

        Raises:
            InputError: the file is gone, cannot be read, or has changed since it was indexed.
        """
        number, line = self._locate(record)
        file = self.files[number]
        try:
            descriptor, offsets = self._opened(number)
            start, end = int(offsets[line]), int(offsets[line + 1])
            if end - start > MAX_RECORD_BYTES:
                return too_long(end - start, MAX_RECORD_BYTES)
            content = os.pread(descriptor, end - start, start)
            # After reading: a file that is rewritten in place gives other lines, or lines cut anywhere.
            _check_unchanged(file, os.fstat(descriptor))
        except OSError as error:
            raise InputError(f"{file.name} cannot be read: {error.strerror or error}") from error
        return self._decoders[number](content)

    def records(self, start: int = 0, stop: int | None = None, step: int = 1) -> Iterator[tuple[str, Content]]:
        """(`file:line`, text or why there is none) of the records in file order."""
        for record in range(start, len(self) if stop is None else stop, step):
            yield self.source(record), self.read(record)

    def texts(self) -> Iterator[tuple[str, str | BadRecord]]:
        """`records`, where a conversation is no text."""
        for source, content in self.records():
            if isinstance(content, Conversation):
                content = BadRecord(NOT_A_STRING, "a list of messages where a text is needed")
            yield source, content

    def damage(self) -> list[tuple[str, BadRecord]]:
        """(`file:line`, what was found) of every packed file that was damaged; its last record says so."""
        faults = []
        for number, file in enumerate(self.files):
            if file.path != file.name and file.lines:
                record = int(self._starts[number + 1]) - 1
                content = self.read(record)
                if isinstance(content, BadRecord) and content.kind == DAMAGED_FILE:
                    faults.append((self.source(record), content))
        return faults

    def require_text(self, *, where: str) -> None:
        """Check that there is something to learn from, reading only as far as the first text.

        Raises:
            InputError: no record holds a text; says how many there are, what is wrong with them and where it begins.
        """
        report = DataReport()
        first = None
        for source, text in self.records():
            if not isinstance(text, BadRecord):
                return
            report.add(source, text)
            if first is None and text.kind != BLANK_LINE:
                first = f"{source}: {text.kind}, {text.detail}"
        names = self.files[0].name if len(self.files) == 1 else f"{len(self.files)} files"
        if first is None:
            raise InputError(f"{where}: {names} {'holds' if len(self.files) == 1 else 'hold'} no record at all")
        advice = ""
        if NOT_UTF8 in report.skipped:
            advice = "; the files must be UTF-8 (iconv converts other encodings)"
        elif report.skipped.keys() <= {BROKEN_JSON, NOT_AN_OBJECT}:
            advice = f'; each line must be a JSON object such as {{"{self.text_key}": "one document"}}'
        raise InputError(
            f"{where}: none of the {report.total_skipped} records of {names} can be used: {report.reasons()} "
            f"(first {first}){advice}"
        )

    def fingerprint(self) -> str:
        """Hexadecimal digest of the files' contents, their order and how they are read; the same wherever they lie."""
        digest = hashlib.sha256()
        for file, decode in zip(self.files, self._decoders, strict=True):
            key = decode.keywords["text_key"] if isinstance(decode, partial) else ".txt"
            digest.update(f"{key}\0{file.lines}\0".encode() + file.sha256)
        return digest.hexdigest()[:32]

    def _locate(self, record: int) -> tuple[int, int]:
        if not 0 <= record < len(self):
            raise IndexError(f"record {record} of {len(self)}")
        number = int(np.searchsorted(self._starts, record, side="right")) - 1
        return number, record - int(self._starts[number])

    def _opened(self, number: int) -> tuple[int, np.ndarray]:
        """Descriptor and line offsets of a file; the least recently used one is closed when too many are open."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        file = self.files[number]
        descriptor = os.open(file.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            _check_unchanged(file, os.fstat(descriptor))
            offsets = file.offsets()
        except BaseException:
            os.close(descriptor)
            raise
        self._open[number] = descriptor, offsets
        if len(self._open) > _MAX_OPEN_FILES:
            _, (oldest, _) = self._open.popitem(last=False)
            os.close(oldest)
        return self._open[number]


def _index(path: str, text_key: str, txt_documents: str, cache_dir: str | None) -> LineIndex:
    lines = unpacked(path, text_key, cache_dir)
    try:
        with open(lines, "rb") as file:
            head = file.read(8)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    check_is_text(path, head)
    return index_lines(lines, cache_dir, name=path, whole=is_text(path) and txt_documents == "file")


def _check_unchanged(file: LineIndex, status: os.stat_result) -> None:
    if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
        raise InputError(f"{file.name} has changed since it was indexed; start again, the data is no longer the same")
