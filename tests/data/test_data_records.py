from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusiontree.data.records import BadRecord, decode_record


@settings(max_examples=50)
@given(text=st.text(min_size=1).filter(lambda text: text.strip()), ascii_only=st.booleans())
def test_any_text_is_read_back(text, ascii_only):
    line = json.dumps({"id": 1, "text": text}, ensure_ascii=ascii_only)
    try:
        encoded = line.encode()
    except UnicodeEncodeError:
        return
    read = decode_record(encoded + b"\n", "text")
    if isinstance(read, BadRecord):
        assert read.kind == "lone surrogate"
    else:
        assert read == text


@given(line=st.binary(max_size=60))
def test_no_bytes_raise(line):
    assert isinstance(decode_record(line, "text"), (str, BadRecord))


@settings(max_examples=50)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_no_json_raises(value):
    assert isinstance(decode_record(json.dumps(value).encode(), "text"), (str, BadRecord))


@pytest.mark.parametrize(
    ("line", "kind", "detail"),
    [
        (b'{"text": "a"', "broken JSON", "at column 13"),
        (b"plain words", "broken JSON", "at column 1"),
        (b'{"text": "a"} {"text": "b"}', "broken JSON", "Extra data at column 15"),
        (b"[" * 100_000, "broken JSON", ""),
        (b'{"text": ' + b"9" * 5000 + b"}", "broken JSON", ""),
        (b'{"text": "nul \x00"}', "broken JSON", "control character"),
        (b'{"text": "caf\xe9"}', "not UTF-8", "byte 0xe9 at column 14"),
        (b'\xef\xbb\xbf{"text": "caf\xe9"}', "not UTF-8", "byte 0xe9 at column 14"),
        (b'["text"]', "not an object", "array"),
        (b'{"body": "a", "title": "b"}', "missing key", "no key 'text', keys seen: 'body', 'title'"),
        (b"{}", "missing key", "no keys"),
        (b'{"text": null}', "not a string", "null"),
        (b'{"text": 3}', "not a string", "number"),
        (b'{"text": {"a": 1}}', "not a string", "object"),
        (b'{"text": ["a"]}', "not a conversation", "message 1 under 'text' is no object with a role"),
        (b'{"text": "a', "broken JSON", "Unterminated string starting at column 10"),
        (b'{"text": ""}', "empty text", "no characters"),
        (b'{"text": " \\n\\t"}', "empty text", "white space alone"),
        (b'{"text": "a \\ud83d"}', "lone surrogate", "half of a surrogate pair"),
        (b" \r\n", "blank line", ""),
    ],
)
def test_what_is_wrong_is_named(line, kind, detail):
    found = decode_record(line, "text")
    assert isinstance(found, BadRecord)
    assert found.kind == kind
    assert detail in found.detail


@pytest.mark.parametrize(
    "line",
    [b'\xef\xbb\xbf{"text": "a"}\n', b'{"text": "a"}\r\n', b'  {"text": "a"}  ', b'{"text": "z", "text": "a"}'],
)
def test_byte_order_mark_carriage_return_and_spaces_are_accepted(line):
    assert decode_record(line, "text") == "a"


def test_a_surrogate_pair_is_one_character():
    assert decode_record(b'{"text": "\\ud83d\\ude00"}', "text") == "\U0001f600"


def test_many_keys_are_cut_short():
    found = decode_record(json.dumps({f"key{i}": 0 for i in range(50)}).encode(), "text")
    assert "'key7' and 42 more" in found.detail
