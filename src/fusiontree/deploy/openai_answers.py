"""The answers of OpenAI's HTTP interface, whole or in pieces."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from fusiontree.deploy.sampling import Choice
from fusiontree.deploy.sequences import Delta
from fusiontree.deploy.sequences import Sequence as Running
from fusiontree.deploy.text import token_text

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A request that ran out of time ends where it is, as if that had been its length.
_REASONS = {"stop": "stop", "length": "length", "timeout": "length"}


@dataclass
class Answer:
    """One answer: its identity, and how its choices look.

    Args:
        model: name of the model.
        is_chat: /v1/chat/completions, else /v1/completions.
        tokenizer: used by the thread that answers alone.
        logprobs: of `SamplingOptions`.
    """

    model: str
    is_chat: bool
    tokenizer: PreTrainedTokenizerBase
    logprobs: int | None
    identity: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.identity = ("chatcmpl-" if self.is_chat else "cmpl-") + uuid.uuid4().hex

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        kind = "chat.completion" if self.is_chat else "text_completion"
        return self._envelope(kind) | {"choices": choices, "usage": usage}

    def choice(self, index: int, text: str, chosen: Sequence[Choice], reason: str) -> dict[str, Any]:
        """A finished one."""
        common = {"index": index, "finish_reason": _REASONS.get(reason, reason)}
        if self.is_chat:
            message = {"role": "assistant", "content": text, "refusal": None}
            return common | {"message": message, "logprobs": self._chat_logprobs(chosen)}
        return common | {"text": text, "logprobs": self._text_logprobs(chosen, 0)}

    def opening(self, index: int) -> Iterator[str]:
        """The first event of a choice: in a chat, who speaks."""
        if self.is_chat:
            yield self._event([self._part(index, {"role": "assistant", "content": "", "refusal": None}, None, None)])

    def event(self, index: int, delta: Delta, offset: int) -> Iterator[str]:
        """The events of what came; `offset`: characters of the choice before it."""
        reason = None if delta.finish_reason is None else _REASONS.get(delta.finish_reason, delta.finish_reason)
        counted = delta.choices if self.logprobs is not None else []
        if not self.is_chat:
            if delta.text or counted or reason:
                logprobs = self._text_logprobs(counted, offset) if counted else None
                yield self._event([{"index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": reason}])
            return
        if delta.text or counted:
            logprobs = self._chat_logprobs(counted) if counted else None
            yield self._event([self._part(index, {"content": delta.text}, logprobs, None)])
        if reason:
            yield self._event([self._part(index, {}, None, reason)])

    def usage_event(self, usage: dict[str, Any]) -> str:
        """The last event where usage was asked for."""
        return self._event([], usage)

    def _part(self, index: int, delta: dict[str, Any], logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> str:
        content = self._envelope("chat.completion.chunk" if self.is_chat else "text_completion") | {"choices": choices}
        return to_event(content if usage is None else content | {"usage": usage})

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self.identity, "object": kind, "created": self.created, "model": self.model}

    def _chat_logprobs(self, chosen: Sequence[Choice]) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        content = []
        for choice in chosen:
            top = [self._token(token, logprob) for token, logprob in choice.likeliest]
            content.append(self._token(choice.token, choice.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.tokenizer.decode([token])
        # A part of a character has no text of its own.
        shown = None if _REPLACEMENT in text else list(text.encode("utf-8"))
        return {"token": token_text(self.tokenizer, token), "logprob": logprob, "bytes": shown}

    def _text_logprobs(self, chosen: Sequence[Choice], offset: int) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        names = [token_text(self.tokenizer, choice.token) for choice in chosen]
        offsets = []
        for name in names:
            offsets.append(offset)
            offset += len(name)
        return {
            "tokens": names,
            "token_logprobs": [choice.logprob for choice in chosen],
            "top_logprobs": [
                {token_text(self.tokenizer, token): logprob for token, logprob in choice.likeliest} for choice in chosen
            ],
            "text_offset": offsets,
        }


def to_event(content: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


def usage_of(prompts: Sequence[Sequence[Running]]) -> dict[str, Any]:
    """Tokens of a request: of each prompt once, whatever the number of its continuations."""
    read = sum(len(sequences[0].prompt) for sequences in prompts)
    new = sum(len(sequence.generated) for sequences in prompts for sequence in sequences)
    cached = sum(sequences[0].cached_tokens for sequences in prompts)
    return {
        "prompt_tokens": read,
        "completion_tokens": new,
        "total_tokens": read + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
