"""From a line of bytes, or a row of a table, to a text or a conversation, or to the reason why there is none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

BLANK_LINE = "blank line"
BROKEN_JSON = "broken JSON"
DAMAGED_FILE = "damaged file"
EMPTY_TEXT = "empty text"
LONE_SURROGATE = "lone surrogate"
MISSING_KEY = "missing key"
NOT_A_CONVERSATION = "not a conversation"
NOT_AN_OBJECT = "not an object"
NOT_A_STRING = "not a string"
NOT_UTF8 = "not UTF-8"
NO_TOKENS = "no tokens"  # the tokenizer drops all there is
TOO_LONG = "too long"

# Begins a line that `fault_line` wrote; no JSON and no text does.
_FAULT_MARK = b"\x00fusiontree fault: "
#: A longer record is not read: it would take many times its size in memory.
MAX_RECORD_BYTES = 1 << 28

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_NEWLINE = b"\n"
_MAX_KEYS_SHOWN = 8


class BadRecord(NamedTuple):
    """Why a line gives no text: one of the kinds above, and what exactly was found."""

    kind: str
    detail: str


class Conversation(NamedTuple):
    """Turns as a chat template takes them, each with a `role` and, mostly, a `content`."""

    messages: list[dict[str, Any]]


#: What a record can hold.
Content = str | Conversation | BadRecord


def decode_text(line: bytes) -> str | BadRecord:
    """A line, or a file, that is the text itself, without its line end."""
    if fault := _fault_in(line):
        return fault
    line = line.removeprefix(_BYTE_ORDER_MARK)
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadRecord(NOT_UTF8, f"byte 0x{line[error.start]:02x} at {_place(line, error.start)}")
    if not text.strip():
        return BadRecord(BLANK_LINE, "nothing there")
    return text.removesuffix("\n").removesuffix("\r")


def _place(content: bytes, byte: int) -> str:
    """Where a byte stands: its column, and of a whole file its line, both from 1."""
    line = content.count(_NEWLINE, 0, byte)
    column = f"column {byte - content.rfind(_NEWLINE, 0, byte)}"
    return f"line {line + 1}, {column}" if line else column


def fault_line(fault: BadRecord) -> bytes:
    """A line that is read back as `fault`, in place of a record or where a file ends too early."""
    return _FAULT_MARK + json.dumps(fault).encode() + b"\n"


def _fault_in(line: bytes) -> BadRecord | None:
    """The fault that a line tells, or a file that is read as one line."""
    begin = line.find(_FAULT_MARK)
    if begin < 0 or (begin > 0 and line[begin - 1 : begin] != b"\n"):
        return None
    try:
        kind, detail = json.loads(line[begin + len(_FAULT_MARK) :])
    except (ValueError, TypeError):
        return None  # a text that happens to hold the mark
    return BadRecord(str(kind), str(detail))


def too_long(num_bytes: int, limit: int) -> BadRecord:
    """Why a record of so many bytes, more than `limit`, is not even read."""
    return BadRecord(TOO_LONG, f"a record of {num_bytes} bytes, where {limit} are the most")


def decode_record(line: bytes, text_key: str) -> Content:
    """What stands under `text_key` in one line of JSONL: a text, or a list of messages.

    A byte order mark and a CR before the line's end are accepted; a text of white space alone counts as empty.
    """
    content = decode_text(line)
    if isinstance(content, BadRecord):
        return content
    try:
        record = json.loads(content)
    except json.JSONDecodeError as error:
        return BadRecord(BROKEN_JSON, f"{error.msg.removesuffix(' at')} at column {error.colno}")
    except RecursionError:
        return BadRecord(BROKEN_JSON, "thousands of nested brackets")
    except ValueError as error:  # a number of thousands of digits
        return BadRecord(BROKEN_JSON, str(error).partition(";")[0])
    if not isinstance(record, dict):
        return BadRecord(NOT_AN_OBJECT, f"a JSON {_kind_of(record)} where an object is needed")
    if text_key not in record:
        return BadRecord(MISSING_KEY, f"no key {text_key!r}, {_keys_of(record)}")
    value = record[text_key]
    # In valid UTF-8 only an escape can write half of a pair, and looking for one costs less than encoding the text.
    return _content_of(value, text_key, "key", f"a JSON {_kind_of(value)}", may_hold_halves="\\u" in content)


def decode_row(row: Mapping[str, object], text_key: str) -> Content:
    """What stands in column `text_key` of one row of a table, by the rules of `decode_record`."""
    if text_key not in row:
        return BadRecord(MISSING_KEY, f"no column {text_key!r}, {_keys_of(row)}")
    value = row[text_key]
    kind = "null" if value is None else f"a value of type {type(value).__name__}"
    return _content_of(value, text_key, "column", kind, may_hold_halves=True)


def _content_of(value: object, text_key: str, place: str, kind: str, *, may_hold_halves: bool) -> Content:
    """`value` as a text or a conversation; `place` and `kind` say in messages where it stands and what it is."""
    if isinstance(value, list):
        return _conversation(value, text_key)
    if not isinstance(value, str):
        return BadRecord(NOT_A_STRING, f"{place} {text_key!r} holds {kind}")
    if not value.strip():
        return BadRecord(EMPTY_TEXT, f"key {text_key!r} holds {'white space alone' if value else 'no characters'}")
    if may_hold_halves and not _is_encodable(value):
        return BadRecord(LONE_SURROGATE, f"{place} {text_key!r} holds half of a surrogate pair")
    return value


def _conversation(messages: list[Any], text_key: str) -> Conversation | BadRecord:
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return BadRecord(NOT_A_CONVERSATION, f"message {number} under {text_key!r} is no object with a role")
        content = message.get("content")
        # What calls a tool may say nothing, and some templates take lists of parts.
        if not (isinstance(content, list) or "tool_calls" in message) and not isinstance(content, str):
            found = f"{_kind_of(content)} for a content" if "content" in message else "no content"
            return BadRecord(NOT_A_CONVERSATION, f"message {number} under {text_key!r} has {found}")
        if message["role"] == "assistant" and not content and "tool_calls" not in message:
            return BadRecord(NOT_A_CONVERSATION, f"message {number} under {text_key!r}, the assistant's, says nothing")
    if not any(message["role"] == "assistant" for message in messages):
        return BadRecord(NOT_A_CONVERSATION, f"{text_key!r} holds no message of the assistant, so nothing to learn")
    if not _is_encodable(json.dumps(messages, ensure_ascii=False)):
        return BadRecord(LONE_SURROGATE, f"key {text_key!r} holds half of a surrogate pair")
    return Conversation(messages)


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _kind_of(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


def _keys_of(record: Mapping[str, object]) -> str:
    if not record:
        return "the object has no keys"
    shown = [repr(key if len(key) <= 40 else key[:39] + "…") for key in list(record)[:_MAX_KEYS_SHOWN]]
    more = len(record) - len(shown)
    return f"keys seen: {', '.join(shown)}" + (f" and {more} more" if more else "")
