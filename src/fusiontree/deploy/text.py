"""From token ids back to text, as they come; conversations as text."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fusiontree.errors import InputError, first_line

# What a decoder writes for bytes that are not (yet) a character.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Tokens before the first one that are decoded along: enough to tell a word's start from the middle of one.
_CONTEXT = 8


class TextDecoder:
    """Turns the tokens of one continuation into text, piece by piece, never in the middle of a character.

    A token may end inside a character (byte-level vocabularies), and what a token looks like may depend on the one
    before (a leading space). So each is decoded together with those before it that were last shown, and shown once it
    ends a character: the usual way of streaming servers. Special tokens give no text.

    Args:
        context: ids of the prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._shown = list(context[-_CONTEXT:])  # their text has been shown; they give the rest its context
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        self._waiting.append(token)
        text = self._new_text()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._shown, self._waiting = self._waiting, []
        return text

    def finish(self) -> str:
        """What is left at the end, without the beginning of a character that never became whole."""
        text = self._new_text().rstrip(_REPLACEMENT)
        self._waiting = []
        return text

    def _new_text(self) -> str:
        before = self._decode(self._shown)
        return self._decode(self._shown + self._waiting)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StopText:
    """Cuts a text that comes in pieces before the first of some strings; where the text is cut into pieces changes
    nothing.

    Text that may be the beginning of such a string is held back until it is known.

    Args:
        stops: the strings, none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What can be shown once `text` has come; nothing after a stop."""
        if not self._stops:
            return text
        if self.stopped:
            return ""
        self._held += text
        # The one that is complete first counts, as if the text came character by character.
        ends = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            shown, self._held = self._held[: min(ends)[1]], ""
            return shown
        keep = max(map(self._begun, self._stops))
        at = len(self._held) - keep
        shown, self._held = self._held[:at], self._held[at:]
        return shown

    def finish(self) -> str:
        """What was held back, once the text is over."""
        shown, self._held = self._held, ""
        return shown

    def _begun(self, stop: str) -> int:
        """Length of the longest end of what is held that `stop` begins with."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token's text; of one that is a part of a character, its name in the vocabulary."""
    text = tokenizer.decode([token])
    return tokenizer.convert_ids_to_tokens(token) if _REPLACEMENT in text else text


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], answers: bool = True) -> str:
    """A conversation as the tokenizer's chat template writes it; `answers`: up to where the assistant speaks.

    Raises:
        InputError: there is no template, or it refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise InputError(
            "the model's tokenizer has no chat template, so it cannot hold a conversation: give it one, or use "
            "`fusiontree generate`"
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answers)
    except (TemplateError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"the chat template refuses the messages: {first_line(error)}") from error
    assert isinstance(text, str)
    return text
