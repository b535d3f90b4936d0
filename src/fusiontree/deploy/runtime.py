"""Generating text with a trained model: in one go for many prompts, or streamed for one.

    model = load("runs/quickstart")
    texts = generate(model, ["def main("], max_new_tokens=64)
    for piece in InferenceRuntime(model).stream("def main("): print(piece, end="")

Everything runs through transformers' `generate` with our `HybridCache`.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from fusiontree.data.tokenizer import DocumentEncoder, pad_id_of, vocab_size_of
from fusiontree.deploy.loading import find_model, load
from fusiontree.deploy.sampling import build_processors
from fusiontree.deploy.text import TextDecoder
from fusiontree.errors import InputError
from fusiontree.models import HybridLanguageModel

__all__ = ["InferenceRuntime", "find_model", "generate", "load"]

# Longer prompts are read in pieces of this many tokens: what a forward pass needs in memory grows with its length.
_PREFILL_PIECE = 4096


@dataclass(frozen=True, kw_only=True)
class _Options:
    """How tokens are chosen, checked. Fields as in `InferenceRuntime.generate`."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    seed: int | None
    num_beams: int

    def __post_init__(self) -> None:
        def require(condition: bool, message: str) -> None:
            if not condition:
                raise InputError(message)

        require(self.max_new_tokens >= 1, f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        require(
            math.isfinite(self.temperature) and self.temperature >= 0,
            f"temperature must be at least 0 (0 takes the likeliest token), got {self.temperature}",
        )
        require(self.top_k is None or self.top_k >= 1, f"top_k must be at least 1, got {self.top_k}")
        require(0 < self.top_p <= 1, f"top_p must lie above 0 and at most at 1, got {self.top_p}")
        require(self.seed is None or 0 <= self.seed < 2**63, f"seed must lie between 0 and 2**63, got {self.seed}")
        require(self.num_beams >= 1, f"num_beams must be at least 1, got {self.num_beams}")
        require(
            self.num_beams == 1 or self.temperature == 0,
            f"beam search ({self.num_beams} beams) looks for the likeliest text: set temperature to 0",
        )


class InferenceRuntime:
    """A model and its tokenizer, ready to continue texts.

    Args:
        model: as `load` returns it.
        tokenizer: the model's own (`model.tokenizer`) if None.
        compile: run steps of decoding as one program, see `HybridLanguageModel.compile_decoding`: pays for thousands of
            tokens.

    Raises:
        InputError: there is no tokenizer, or it has more tokens than the model has embeddings; with `compile` on CPU,
            there is no C++ compiler.
    """

    def __init__(
        self, model: HybridLanguageModel, tokenizer: PreTrainedTokenizerBase | None = None, *, compile: bool = False
    ) -> None:
        tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
        if tokenizer is None:
            raise InputError("the model's folder holds no tokenizer: pass the one that it was trained with")
        self.model = model
        self.tokenizer = tokenizer
        self._encode = DocumentEncoder(tokenizer, separator_id=None)
        self._vocabulary = vocab_size_of(tokenizer)
        if self._vocabulary > model.config.vocab_size:
            raise InputError(
                f"the tokenizer has ids up to {self._vocabulary - 1}, but the model's vocab_size is "
                f"{model.config.vocab_size}; it belongs to another model"
            )
        if compile:
            model.compile_decoding()

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int | None = None,
        num_beams: int = 1,
    ) -> list[str]:
        """Continues each prompt; the prompts run as one batch.

        Args:
            prompts: one text or several.
            max_new_tokens: at most this many tokens each; the model's end token ends a text earlier.
            temperature: 0 takes the likeliest token; above, tokens are drawn, the unlikely ones more often.
            top_k: draw among this many likeliest tokens only; None = all.
            top_p: draw among the likeliest tokens that together have this probability.
            seed: makes the draws repeatable: prompt i draws with seed + i, whatever the others are. None takes one from
                torch's random state. No other random state is touched.
            num_beams: above 1, beam search of that width, with temperature 0.

        Returns:
            The continuations in order, without the prompts.

        Raises:
            InputError: a prompt is empty; prompt and new tokens do not fit a learned time encoding; an option is out of
                range.
        """
        options = _Options(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            num_beams=num_beams,
        )
        rows = self._encode_prompts([prompts] if isinstance(prompts, str) else list(prompts), max_new_tokens)
        if not rows:
            return []
        new_tokens = self._run(rows, options)
        return [self._text(row, new) for row, new in zip(rows, new_tokens.tolist(), strict=True)]

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[str]:
        """Continues one prompt and yields the text as it comes, in whole characters; all of it together is what
        `generate` returns for the same arguments.

        Closing the iterator (leaving the loop) stops the generation.

        Raises:
            InputError: as `generate`, at the call.
        """
        options = _Options(
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, num_beams=1
        )
        (row,) = self._encode_prompts([prompt], max_new_tokens)
        return self._stream(row, options)

    def _stream(self, row: list[int], options: _Options) -> Iterator[str]:
        tokens = _TokenQueue()
        thread = threading.Thread(target=self._run_streamed, args=(row, options, tokens), daemon=True)
        thread.start()
        try:
            decoder, ends = TextDecoder(self.tokenizer, row), self._end_ids()
            for token in tokens:
                if token in ends:
                    break
                if text := decoder.push(token):
                    yield text
            if text := decoder.finish():
                yield text
        finally:
            tokens.cancelled = True
            thread.join()
        if tokens.error is not None:
            raise tokens.error

    def _run_streamed(self, row: list[int], options: _Options, tokens: _TokenQueue) -> None:
        try:
            self._run([row], options, tokens)
        except BaseException as error:  # handed to the thread that reads the stream, which raises it there
            tokens.error = error
        finally:
            tokens.end()

    def _run(self, rows: list[list[int]], options: _Options, tokens: _TokenQueue | None = None) -> torch.Tensor:
        """[B, new] ids that continue rows of ids, filled up behind a row's end."""
        device, length, pad = self.model.device, max(map(len, rows)), pad_id_of(self.tokenizer)
        # Padding stands on the left, where the model takes it for an earlier document.
        input_ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
        seed = options.seed
        if seed is None and options.temperature > 0:
            seed = int(torch.randint(2**63 - 1, ()))
        output = self.model.generate(
            input_ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                max_new_tokens=options.max_new_tokens,
                do_sample=False,  # draws are made by the processors
                num_beams=options.num_beams,
                pad_token_id=pad,
                eos_token_id=sorted(self._end_ids()) or None,
                prefill_chunk_size=_PREFILL_PIECE if length > _PREFILL_PIECE else None,
                use_cache=True,
            ),
            logits_processor=build_processors(
                vocabulary=self._vocabulary,
                temperature=options.temperature,
                top_k=options.top_k,
                top_p=options.top_p,
                seed=seed or 0,
                rows=len(rows),
                device=device,
            ),
            stopping_criteria=StoppingCriteriaList([] if tokens is None else [_Cancelled(tokens)]),
            streamer=tokens,
        )
        return output[:, length:]

    def _encode_prompts(self, prompts: list[str], max_new_tokens: int) -> list[list[int]]:
        """Ids of each prompt, checked against what the model can read."""
        for number, prompt in enumerate(prompts, start=1):
            try:
                prompt.encode("utf-8")
            except UnicodeEncodeError as error:  # half a surrogate pair, or an argument that was not UTF-8
                raise InputError(f"prompt {number} is not valid Unicode text at character {error.start + 1}") from error
        rows = [ids.tolist() for ids in self._encode(prompts)]
        config = self.model.config
        for number, row in enumerate(rows, start=1):
            which = "the prompt" if len(rows) == 1 else f"prompt {number}"
            if not row:
                raise InputError(f"{which} is empty: give at least one character")
            if config.srte_encoding != "learned":
                continue
            table, tokens = config.max_position_embeddings, f"{len(row)} token{'s' if len(row) > 1 else ''}"
            if len(row) > table:
                raise InputError(
                    f"{which} has {tokens}, but the model's learned time encoding (SRTE) ends after {table} "
                    "positions: shorten it, or use a model with srte_encoding sincos"
                )
            # The last new token is returned, not read.
            if len(row) + max_new_tokens - 1 > table:
                raise InputError(
                    f"{which} has {tokens} and {max_new_tokens} new ones are asked for, but the model's learned time "
                    f"encoding (SRTE) ends after {table} positions: ask for at most {table - len(row) + 1} new ones"
                )
        return rows

    def _end_ids(self) -> set[int]:
        """Ids that end a text: those the model names, else the tokenizer's end token."""
        named = self.model.generation_config.eos_token_id
        if named is None:
            named = self.tokenizer.eos_token_id
        if named is None:
            return set()
        return set(named) if isinstance(named, (list, tuple)) else {int(named)}

    def _text(self, row: list[int], new_tokens: list[int]) -> str:
        decoder, ends, text = TextDecoder(self.tokenizer, row), self._end_ids(), []
        for token in new_tokens:
            if token in ends:
                break
            text.append(decoder.push(token))
        return "".join([*text, decoder.finish()])


class _TokenQueue(BaseStreamer):
    """Hands tokens from the thread that generates to the one that reads."""

    def __init__(self) -> None:
        self.cancelled = False
        self.error: BaseException | None = None
        self._queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True  # transformers hands over the prompt first
            return
        for token in value.flatten().tolist():
            self._queue.put(token)

    def end(self) -> None:
        self._queue.put(None)

    def __iter__(self) -> Iterator[int]:
        return iter(self._queue.get, None)


class _Cancelled(StoppingCriteria):
    """Stops the generation once nobody reads it any more."""

    def __init__(self, tokens: _TokenQueue) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: object) -> torch.Tensor:
        return torch.full((len(input_ids),), self.tokens.cancelled, device=input_ids.device)


def generate(
    model: HybridLanguageModel,
    prompts: str | Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int | None = None,
    num_beams: int = 1,
) -> list[str]:
    """Continues each prompt with `model`; see `InferenceRuntime.generate`. The tokenizer is the model's own if None."""
    return InferenceRuntime(model, tokenizer).generate(
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        num_beams=num_beams,
    )
