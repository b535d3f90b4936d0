"""Conversations: the tokenizer's template writes them, and only the assistant's words are learnt."""

from __future__ import annotations

import copy
import json
import re

import pytest
from jsonl_files import text_of, write_jsonl

from fusiontree.config import InputError
from fusiontree.data import DataSettings, build_loader
from fusiontree.data.chat import ConversationEncoder
from fusiontree.data.records import BadRecord, Conversation, decode_record

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "4, 四"},
    {"role": "user", "content": "And 3+3?"},
    {"role": "assistant", "content": "6"},
]


@pytest.fixture
def chat_tokenizer(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = CHATML
    return other


def parts(ids, tokenizer) -> list[tuple[bool, str]]:
    """Runs of learnt and unlearnt tokens as text."""
    runs: list[tuple[bool, list[int]]] = []
    for token in ids.tolist():
        learnt = token >= 0
        if not runs or runs[-1][0] != learnt:
            runs.append((learnt, []))
        runs[-1][1].append(token if learnt else ~token)
    return [(learnt, tokenizer.decode(run)) for learnt, run in runs]


def test_only_what_the_assistant_says_is_learnt_with_the_end_of_its_turn(chat_tokenizer):
    ids = ConversationEncoder(chat_tokenizer, chat_tokenizer.eos_token_id)(Conversation(MESSAGES))
    assert parts(ids, chat_tokenizer) == [
        (
            False,
            "<|im_start|>system\nBe short.<|im_end|>\n"
            "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (True, "4, 四<|im_end|>\n"),
        (False, "<|im_start|>user\nAnd 3+3?<|im_end|>\n<|im_start|>assistant\n"),
        (True, "6<|im_end|>\n<|endoftext|>"),
    ]


def test_an_opening_of_the_assistant_is_learnt(chat_tokenizer):
    ids = ConversationEncoder(chat_tokenizer, None)(Conversation([{"role": "assistant", "content": "a"}]))
    assert parts(ids, chat_tokenizer) == [(False, "<|im_start|>assistant\n"), (True, "a<|im_end|>\n")]


def test_a_template_that_refuses_or_rewrites_is_a_bad_record(chat_tokenizer):
    chat_tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    bad = ConversationEncoder(chat_tokenizer, None)(Conversation(MESSAGES))
    assert bad == BadRecord("not a conversation", "the chat template refuses it: no system turns")
    chat_tokenizer.chat_template = "{{ messages | length }}: " + CHATML
    bad = ConversationEncoder(chat_tokenizer, None)(Conversation(MESSAGES))
    assert isinstance(bad, BadRecord) and "writes message 3 differently" in bad.detail


def test_without_a_template_the_error_says_what_to_do(tokenizer):
    with pytest.raises(InputError, match="no chat template: take one"):
        ConversationEncoder(tokenizer, None)(Conversation(MESSAGES))


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([{"content": "x"}], "message 1 under 'messages' is no object with a role"),
        ([{"role": "user", "content": "x"}, 3], "message 2"),
        ([{"role": "user", "content": "x"}], "nothing to learn"),
        ([], "nothing to learn"),
        (["x"], "message 1 under 'messages' is no object with a role"),
        ([{"role": "assistant"}], "message 1 under 'messages' has no content"),
        (
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": 5}],
            "message 2 .* has number for a content",
        ),
        ([{"role": "assistant", "content": ""}], "message 1 under 'messages', the assistant's, says nothing"),
    ],
)
def test_what_is_no_conversation_is_named(messages, problem):
    bad = decode_record(json.dumps({"messages": messages}).encode(), "messages")
    assert isinstance(bad, BadRecord) and bad.kind == "not a conversation" and re.search(problem, bad.detail)


def test_conversations_and_texts_are_packed_side_by_side(chat_tokenizer, tmp_path):
    records = [{"text": text_of(3)}, {"text": MESSAGES}, {"text": [{"role": "user"}]}, {"text": text_of(4)}]
    settings = DataSettings(train_paths=write_jsonl(tmp_path / "a.jsonl", records), shuffle=False)
    loader = build_loader(settings, chat_tokenizer, batch_size=1, max_seq_length=400)
    batch = next(iter(loader))
    text = chat_tokenizer.decode(batch.input_ids[0][batch.labels[0] >= 0])
    assert text.startswith(
        f"{text_of(3)}<|endoftext|>4, 四<|im_end|>\n6<|im_end|>\n<|endoftext|>{text_of(4)}<|endoftext|>"
    )
    assert loader.report().reasons() == "1 not a conversation"
