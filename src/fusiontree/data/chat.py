"""Conversations as token ids: the tokenizer's own chat template, and only what the assistant says is learnt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fusiontree.data.records import NOT_A_CONVERSATION, BadRecord, Conversation
from fusiontree.errors import InputError, first_line

_STAND_IN = "words-of-the-assistant"  # for what it says, to find where that begins


class ConversationEncoder:
    """Conversations to signed ids (see `packing`): all is read, and learnt is each turn of the assistant with its end.

    A turn begins where the template's prompt for it ends, and ends with what the template puts behind it, up to the
    next turn's beginning; so a model that is trained on it says when it has finished. Templates that mark the
    assistant's words themselves (`{% generation %}`) are read the same way.

    Args:
        separator_id: follows a conversation that does not end with it already, learnt; None = nothing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, separator_id: int | None) -> None:
        self.tokenizer = tokenizer
        self.separator_id = separator_id

    def __call__(self, conversation: Conversation) -> np.ndarray | BadRecord:
        """int32 ids, or why the template does not take the conversation.

        Raises:
            InputError: the tokenizer has no chat template, or cannot tell which characters a token stands for.
        """
        if self.tokenizer.chat_template is None:
            raise InputError(
                "the data hold conversations (lists of messages), but the tokenizer has no chat template: take one "
                "that has, or set data.text_key to the key of a text"
            )
        if not self.tokenizer.is_fast:
            raise InputError(
                "the data hold conversations, and to find the assistant's words a fast tokenizer is needed"
            )
        messages = conversation.messages
        try:
            text = self._render(messages)
            turns = list(self._turns(messages, text))
        except (TemplateError, KeyError, TypeError, ValueError) as error:
            return BadRecord(NOT_A_CONVERSATION, f"the chat template refuses it: {first_line(error)}")
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = np.array(encoded["input_ids"], dtype=np.int32)
        begins = np.array([begin for begin, _ in encoded["offset_mapping"]], dtype=np.int64)
        learnt = np.zeros(len(ids), dtype=bool)
        for begin, end in turns:
            learnt |= (begins >= begin) & (begins < end)
        ids = np.where(learnt, ids, ~ids)
        if self.separator_id is not None and (not len(ids) or ids[-1] not in (self.separator_id, ~self.separator_id)):
            ids = np.append(ids, np.int32(self.separator_id))
        return ids

    def _render(self, messages: list[dict[str, Any]], prompt: bool = False) -> str:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert isinstance(text, str)
        return text

    def _turns(self, messages: list[dict[str, Any]], text: str) -> Iterator[tuple[int, int]]:
        """The characters of `text` that the assistant says, turn by turn."""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            begin = self._render(messages[:number], prompt=True) if number else self._render_opening(messages)
            end = self._render(messages[: number + 1])
            if not end.startswith(begin) or not text.startswith(end):
                raise ValueError(f"it writes message {number + 1} differently once others follow it")
            yield len(begin), len(end)

    def _render_opening(self, messages: list[dict[str, Any]]) -> str:
        """What stands before a conversation that the assistant opens."""
        return self._render([{**messages[0], "content": _STAND_IN}]).partition(_STAND_IN)[0]
