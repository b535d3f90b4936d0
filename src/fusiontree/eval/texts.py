"""The texts to evaluate on: JSONL records, or whole text files."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from fusiontree.data.corpus import Corpus, resolve_paths
from fusiontree.data.records import EMPTY_TEXT, NOT_UTF8, BadRecord
from fusiontree.data.report import DataReport
from fusiontree.errors import InputError

logger = logging.getLogger(__name__)

JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")


class Texts:
    """The documents of some files: each record of a JSONL file (by its suffix), every other file as a whole.

    Args:
        files: paths and globs.
        text_key: key of a JSONL record that holds its text.
        where: the option that the files come from, for messages.

    Attributes:
        paths: the files.
        num_bytes: of all files.
        report: documents read and skipped so far.
        bytes_read: of the documents so far.

    Raises:
        InputError: no file, a file that cannot be read, or one without a single text.
    """

    def __init__(self, files: Sequence[str], *, text_key: str = "text", where: str = "the evaluation files") -> None:
        self.paths = resolve_paths(files, where=where)
        self._corpora = {
            path: Corpus([path], text_key=text_key) for path in self.paths if path.lower().endswith(JSONL_SUFFIXES)
        }
        for path in self.paths:
            if path in self._corpora:
                self._corpora[path].require_text(where=where)
            elif isinstance(problem := _whole_file(path), BadRecord):
                raise InputError(f"{where}: {path} cannot be used: {problem.kind}, {problem.detail}")
        self.num_bytes = sum(Path(path).stat().st_size for path in self.paths)
        self.report = DataReport()
        self.bytes_read = 0
        self._is_warned = False

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """(text, `file` or `file:line`) in file order; what was skipped is logged once, however often they are read."""
        report = self.report = DataReport()
        self.bytes_read = 0
        for source, content in self._records():
            if isinstance(content, BadRecord):
                report.add(source, content)
            else:
                report.documents += 1
                self.bytes_read += len(content.encode("utf-8", "surrogatepass"))
                yield content, source
        if report.skipped and not self._is_warned:
            logger.warning(report.summary())
            self._is_warned = True

    def _records(self) -> Iterator[tuple[str, str | BadRecord]]:
        for path in self.paths:
            if path in self._corpora:
                yield from self._corpora[path].texts()
            else:
                yield path, _whole_file(path)


def _whole_file(path: str) -> str | BadRecord:
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return BadRecord(NOT_UTF8, f"byte 0x{error.object[error.start]:02x} at place {error.start + 1}")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    return text if text.strip() else BadRecord(EMPTY_TEXT, "the file holds no characters but white space")
