"""What a stream is made of: files here, files behind URLs and data sets of the hub, each read from its beginning.

Reading over records costs no decoding: what a shard hands out becomes a text, or the reason why there is none, only
when asked.
"""

from __future__ import annotations

import os
import posixpath
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from itertools import islice
from typing import Any, BinaryIO, Protocol, cast
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import parquet

from fusiontree.data.records import NOT_UTF8, BadRecord, Content, decode_record, decode_row, decode_text
from fusiontree.data.remote import Backoff, Patience, RemoteFile
from fusiontree.data.text_stream import COMPRESSIONS, decompressed, split_lines, whole
from fusiontree.errors import InputError, first_line

_CHUNK_BYTES = 1 << 20
_BATCH_ROWS = 256

LINE_FORMATS = {".jsonl": "jsonl", ".json": "jsonl", ".txt": "txt"}
SUFFIXES = ".jsonl, .json or .txt (each also with .gz or .zst behind it) or .parquet"


class Records(Protocol):
    """The records of a shard being read, as the shard keeps them."""

    def skip(self, count: int) -> int:
        """Read over `count` records before the first is taken; how many there were."""
        ...

    def __iter__(self) -> Iterator[Any]: ...


class Shard(Protocol):
    """A part of a stream that is read from beginning to end."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> list[object]:
        """What differs when the content does, as plain values."""
        ...

    def open(self) -> Records:
        """
        Raises:
            InputError: here or while reading: it cannot be read, or is not what it was when the stream was opened.
        """
        ...

    def decode(self, record: Any) -> Content: ...


class File(Protocol):
    @property
    def name(self) -> str: ...

    def identity(self) -> list[object]: ...

    def chunks(self) -> Iterator[bytes]: ...


class LocalFile:
    """A file on this machine, which must stay as it was when it was first looked at."""

    def __init__(self, path: str) -> None:
        self.name = path
        try:
            self._status = _state(os.stat(path))
        except OSError as error:
            raise self._unreadable(error) from error

    def identity(self) -> list[object]:
        """Size in bytes and modification time in ns."""
        return list(self._status)

    def open(self) -> BinaryIO:
        try:
            file = open(self.name, "rb")
        except OSError as error:
            raise self._unreadable(error) from error
        try:
            self.check_unchanged(file)
        except BaseException:
            file.close()
            raise
        return file

    def chunks(self) -> Iterator[bytes]:
        with self.open() as file:
            while True:
                try:
                    chunk = file.read(_CHUNK_BYTES)
                except OSError as error:
                    raise self._unreadable(error) from error
                self.check_unchanged(file)
                if not chunk:
                    return
                yield chunk

    def check_unchanged(self, file: BinaryIO) -> None:
        if _state(os.fstat(file.fileno())) != self._status:
            raise InputError(
                f"{self.name} has changed since this run began to read it; start again, the data is no longer the same"
            )

    def _unreadable(self, error: OSError) -> InputError:
        return InputError(f"{self.name} cannot be read: {error.strerror or error}")


def _state(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


class _Sequence:
    """Records that can only be read one after the other."""

    def __init__(self, records: Iterator[Any]) -> None:
        self._records = records

    def skip(self, count: int) -> int:
        return sum(1 for _ in islice(self._records, count))

    def __iter__(self) -> Iterator[Any]:
        return self._records


class LineShard:
    """A file with one record a line, JSONL or plain text, packed or not."""

    def __init__(
        self, file: File, *, text_key: str, line_format: str, compression: str | None, is_one_document: bool
    ) -> None:
        self.name = file.name
        self._is_one_document = is_one_document
        self._file = file
        self._text_key = text_key
        self._line_format = line_format
        self._compression = compression

    @property
    def version(self) -> list[object]:
        return [posixpath.basename(self.name), *self._file.identity(), self._text_key, self._is_one_document]

    def open(self) -> Records:
        return _Sequence(self._lines())

    def decode(self, record: bytes | BadRecord) -> Content:
        if isinstance(record, BadRecord):
            return record
        return decode_text(record) if self._line_format == "txt" else decode_record(record, self._text_key)

    def _lines(self) -> Iterator[bytes | BadRecord]:
        text = decompressed(self.name, self._file.chunks(), self._compression)
        yield from whole(text) if self._is_one_document else split_lines(text)


class ParquetShard:
    """A parquet file with one record a row.

    Its table of contents is at its end, so one behind a URL is first copied into a temporary file.
    """

    def __init__(self, file: LocalFile | RemoteFile, *, text_key: str) -> None:
        self.name = file.name
        self._file = file
        self._text_key = text_key

    @property
    def version(self) -> list[object]:
        return [posixpath.basename(self.name), *self._file.identity(), self._text_key]

    def open(self) -> Records:
        return _Rows(self.name, self._opened(), self._text_key)

    def decode(self, record: object) -> Content:
        return record if isinstance(record, BadRecord) else decode_row({self._text_key: record}, self._text_key)

    def _opened(self) -> BinaryIO:
        if isinstance(self._file, LocalFile):
            return self._file.open()
        copy = None
        try:
            copy = cast(BinaryIO, tempfile.TemporaryFile(prefix="fusiontree-"))
            for chunk in self._file.chunks():
                copy.write(chunk)
            copy.seek(0)
            finished, copy = copy, None
        except OSError as error:
            raise InputError(
                f"{self.name} cannot be copied to {tempfile.gettempdir()}: {error.strerror or error}; "
                "set TMPDIR to a folder with more space"
            ) from error
        finally:
            if copy is not None:
                copy.close()
        return finished


class _Rows:
    """The rows of a parquet file; row groups that are read over are not even fetched."""

    def __init__(self, name: str, file: BinaryIO, text_key: str) -> None:
        self._name = name
        self._text_key = text_key
        self._file = file
        try:
            # Buffered, so that no whole column of a row group is held.
            self._table = parquet.ParquetFile(file, buffer_size=_CHUNK_BYTES)
        except (pa.ArrowException, OSError) as error:
            file.close()
            raise self._unreadable(error) from error
        self._next = 0

    def skip(self, count: int) -> int:
        skipped = min(count, self._table.metadata.num_rows - self._next)
        self._next += skipped
        return skipped

    def __iter__(self) -> Iterator[object]:
        columns = self._table.schema_arrow.names
        missing = decode_row(dict.fromkeys(columns), self._text_key) if self._text_key not in columns else None
        with closing(self._file):
            for group, before in self._groups():
                if missing is not None:
                    for _ in range(self._table.metadata.row_group(group).num_rows - before):
                        yield missing
                else:
                    yield from islice(self._values(group), before, None)

    def _groups(self) -> Iterator[tuple[int, int]]:
        """Row groups that are not read over, and how many rows of each are."""
        start = 0
        for group in range(self._table.num_row_groups):
            rows = self._table.metadata.row_group(group).num_rows
            if self._next < start + rows:
                yield group, max(0, self._next - start)
            start += rows

    def _values(self, group: int) -> Iterator[object]:
        batches = self._table.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[self._text_key])
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError) as error:
                raise self._unreadable(error) from error
            if batch is None:
                return
            yield from _python_values(batch.column(0))

    def _unreadable(self, error: Exception) -> InputError:
        return InputError(
            f"{self._name} cannot be read as parquet: {first_line(error)}; check that the file is complete"
        )


def _python_values(column: Any) -> list[object]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_python_value(value) for value in column]


def _python_value(value: Any) -> object:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return BadRecord(NOT_UTF8, f"byte 0x{error.object[error.start]:02x} at column {error.start + 1}")


class HubShard:
    """One file, or the like, of a data set that `datasets` streams: from the hub or from a folder.

    Args:
        name: of the data set, with its split.
        load: opens this shard as an `IterableDataset`.
        version: see `Shard`.
        patience: None where an error will not pass by itself.
        advice: what to do about an error.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[], Any],
        *,
        version: list[object],
        text_key: str,
        patience: Patience | None,
        advice: str,
    ) -> None:
        self.name = name
        self.version = version
        self._load = load
        self._text_key = text_key
        self._patience = patience
        self._advice = advice

    def open(self) -> Records:
        return _Sequence(self._rows())

    def decode(self, record: Mapping[str, object]) -> Content:
        return decode_row(record, self._text_key)

    def _rows(self) -> Iterator[Mapping[str, object]]:
        position = 0
        backoff = Backoff(self.name, self._patience) if self._patience else None
        while True:
            rows: Iterator[Mapping[str, object]] | None = None
            while True:
                try:
                    if rows is None:
                        rows = iter(self._load().skip(position))
                    row = next(rows, None)
                except Exception as error:  # whatever a data set's format and file system raise
                    problem = first_line(error) or type(error).__name__
                    if backoff is None:
                        raise InputError(f"{self.name} cannot be read: {problem}; {self._advice}") from error
                    backoff.failed(problem)
                    break
                if row is None:
                    return
                position += 1
                if backoff is not None:
                    backoff.progress()
                yield row


def is_url(path: str) -> bool:
    return path.lower().startswith(("http://", "https://"))


def has_file_suffix(path: str) -> bool:
    with suppress(InputError):
        return bool(_format_of(path))
    return False


def file_shard(path: str, *, text_key: str, patience: Patience, txt_documents: str = "line") -> Shard:
    """The shard of one file or URL, by what its name ends in; `txt_documents` as in `Corpus`.

    Raises:
        InputError: a name that does not say what the file is, or a file that cannot be read.
    """
    file_format, compression = _format_of(path)
    file = RemoteFile(path, patience) if is_url(path) else LocalFile(path)
    if file_format == "parquet":
        return ParquetShard(file, text_key=text_key)
    return LineShard(
        file,
        text_key=text_key,
        line_format=file_format,
        compression=compression,
        is_one_document=file_format == "txt" and txt_documents == "file",
    )


def _format_of(path: str) -> tuple[str, str | None]:
    name = posixpath.basename(urlsplit(path).path) if is_url(path) else os.path.basename(path)
    stem, suffix = os.path.splitext(name.lower())
    compression = COMPRESSIONS.get(suffix)
    if compression is None and suffix == ".parquet":
        return "parquet", None
    if compression is not None:
        suffix = os.path.splitext(stem)[1]
    if suffix not in LINE_FORMATS:
        raise InputError(f"{path} does not say what it holds; its name must end in {SUFFIXES}")
    return LINE_FORMATS[suffix], compression
