"""Continuing texts with a trained model: one or many, in one go or streamed.

    model = load("runs/quickstart")
    texts = generate(model, ["def main("], max_new_tokens=64)
    for piece in InferenceRuntime(model).stream("def main("): print(piece, end="")

Everything runs through the `Scheduler`, but for beam search, which is transformers' `generate`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase

from fusiontree.data.tokenizer import DocumentEncoder, pad_id_of, vocab_size_of
from fusiontree.deploy import sequences
from fusiontree.deploy.loading import find_model, load
from fusiontree.deploy.prefix import load_conversation, save_conversation
from fusiontree.deploy.sampling import KnownTokens, SamplingOptions
from fusiontree.deploy.scheduler import Scheduler, SchedulerSettings
from fusiontree.deploy.sequences import Delta
from fusiontree.deploy.streams import Generation, TextStream
from fusiontree.deploy.text import TextDecoder, render_chat
from fusiontree.errors import InputError
from fusiontree.models import HybridLanguageModel

__all__ = [
    "Generation",
    "InferenceRuntime",
    "SamplingOptions",
    "SchedulerSettings",
    "TextStream",
    "find_model",
    "generate",
    "load",
]


class InferenceRuntime:
    """A model and its tokenizer, ready to continue texts.

    Args:
        model: as `load` returns it.
        tokenizer: the model's own (`model.tokenizer`) if None.
        settings: how much runs at once, and the memory it may take.
        compile: run steps of decoding as one program, see `HybridLanguageModel.compile_decoding`: pays for thousands of
            tokens.

    Attributes:
        scheduler: what runs the texts, with its counts and its store of prefixes.

    Raises:
        InputError: there is no tokenizer, or it has more tokens than the model has embeddings; with `compile` on CPU,
            there is no C++ compiler.
    """

    def __init__(
        self,
        model: HybridLanguageModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        settings: SchedulerSettings | None = None,
        compile: bool = False,
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
        self.scheduler = Scheduler(model, tokenizer, settings)
        self._step_lock = threading.Lock()

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
        num_beams: int = 1,
    ) -> list[str]:
        """Continues each prompt; as many at once as the settings allow.

        Args:
            prompts: one text or several.
            max_new_tokens: at most this many tokens each; the model's end token ends a text earlier.
            temperature: 0 takes the likeliest token; above, tokens are drawn, the unlikely ones more often.
            top_k, top_p, min_p, repetition_penalty, stop: as of `SamplingOptions`.
            seed: makes the draws repeatable: prompt i draws with seed + i, whatever the others are. None takes one from
                torch's random state. No other random state is touched.
            num_beams: above 1, beam search of that width, with temperature 0 and nothing else that changes the choice.

        Returns:
            The continuations in order, without the prompts.

        Raises:
            InputError: a prompt is empty; prompt and new tokens do not fit a learned time encoding or the memory
                budget; an option is out of range.
        """
        options = SamplingOptions(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop=tuple(stop),
            seed=seed,
        )
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if num_beams == 1:
            return [one.text for one in self.run(texts, [_numbered(options, number) for number in range(len(texts))])]
        plain = SamplingOptions(max_new_tokens=max_new_tokens, seed=seed)
        if num_beams < 1:
            raise InputError(f"num_beams must be at least 1, got {num_beams}")
        if options != plain:
            raise InputError(
                f"beam search ({num_beams} beams) looks for the likeliest text: set temperature to 0, and leave out "
                "min_p, top_k, top_p, repetition_penalty and stop"
            )
        return self._search_beams(self._encode_prompts(texts, max_new_tokens), max_new_tokens, num_beams)

    def run(
        self, prompts: Sequence[str], options: Sequence[SamplingOptions], names: Sequence[str] | None = None
    ) -> Iterator[Generation]:
        """Continues each prompt with its own options, as many at once as the settings allow; gives them in order.

        Args:
            names: what errors call each prompt; None: "prompt 1" and so on.

        Raises:
            InputError: as `generate`, at the call; a bias for a token that there is not.
        """
        rows = self._encode_prompts(list(prompts), [one.max_new_tokens for one in options], names)
        streams = []
        for number, (row, one) in enumerate(zip(rows, options, strict=True)):
            try:
                streams.append(self._submit(row, one))
            except InputError as error:
                raise InputError(f"{names[number] if names else f'prompt {number + 1}'}: {error}") from error
        return (stream.result() for stream in streams)

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> TextStream:
        """Continues one prompt and yields the text as it comes, in whole characters; all of it together is what
        `generate` returns for the same arguments.

        Closing it (`close`, or leaving a `with` block) stops the generation. Several streams of one runtime run
        together.

        Raises:
            InputError: as `generate`, at the call.
        """
        return self.stream_text(
            prompt,
            SamplingOptions(
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                stop=tuple(stop),
                seed=seed,
            ),
        )

    def stream_text(self, prompt: str, options: SamplingOptions) -> TextStream:
        """As `stream`, with all options."""
        (row,) = self._encode_prompts([prompt], [options.max_new_tokens])
        return self._submit(row, options)

    def stream_ids(self, ids: Sequence[int], options: SamplingOptions, *, keep_state: bool = False) -> TextStream:
        """As `stream`, for a prompt of token ids. `keep_state`: keep the state at the end, to go on from there."""
        return self._submit(list(ids), options, keep_state)

    def encode_chat(self, messages: list[dict[str, str]], answers: bool = True) -> list[int]:
        """Ids of a conversation, written by the tokenizer's chat template; `answers`: up to where the assistant speaks.

        Raises:
            InputError: there is no template, or it refuses the messages.
        """
        text = render_chat(self.tokenizer, messages, answers)
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def save_conversation(self, path: str | Path, ids: Sequence[int], text: str = "") -> None:
        """Writes the state after the longest known prefix of `ids` to a file, and `text` beside it.

        Raises:
            InputError: no prefix of them is known.
        """
        found = self.scheduler.prefixes.find(ids)
        if found is None:
            raise InputError("there is no state of this conversation to save: give the runtime a budget for prefixes")
        state = self.scheduler.prefixes.restore(found, found.tokens)
        save_conversation(path, self.model, ids[: found.tokens], state, text)

    def load_conversation(self, path: str | Path) -> str:
        """Reads what `save_conversation` has written: prompts that begin with its tokens go on from its state.

        Returns:
            The text beside it.

        Raises:
            InputError: the file cannot be read, is of another model, or does not fit the budget of prefixes.
        """
        ids, state, text = load_conversation(path, self.model)
        if self.scheduler.prefixes.add(ids, state) is None:
            raise InputError(f"the state in {path} does not fit the budget for prefixes: raise it")
        return text

    def _submit(self, row: list[int], options: SamplingOptions, keep_state: bool = False) -> TextStream:
        deltas: deque[Delta] = deque()
        sequence = sequences.Sequence(row, options, deltas.append, ends=self.end_ids, keep_state=keep_state)
        self.scheduler.submit(sequence)
        return TextStream(sequence, deltas, self._step)

    def _step(self) -> None:
        with self._step_lock:
            try:
                self.scheduler.step()
            except BaseException as error:  # what runs along cannot go on either
                self.scheduler.fail(error)
                raise

    def _search_beams(self, rows: list[list[int]], max_new_tokens: int, num_beams: int) -> list[str]:
        if not rows:
            return []
        device, length, pad = self.model.device, max(map(len, rows)), pad_id_of(self.tokenizer)
        # Padding stands on the left, where the model takes it for an earlier document.
        input_ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
        output = self.model.generate(
            input_ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=num_beams,
                pad_token_id=pad,
                eos_token_id=sorted(self.end_ids) or None,
                use_cache=True,
            ),
            logits_processor=LogitsProcessorList([KnownTokens(self._vocabulary)]),
        )
        return [self._text(row, new) for row, new in zip(rows, output[:, length:].tolist(), strict=True)]

    def encode(self, prompt: str, which: str = "the prompt") -> list[int]:
        """Token ids of a prompt.

        Raises:
            InputError: it is not valid Unicode.
        """
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:  # half a surrogate pair, or an argument that was not UTF-8
            raise InputError(f"{which} is not valid Unicode text at character {error.start + 1}") from error
        (ids,) = self._encode([prompt])
        return ids.tolist()

    def _encode_prompts(
        self, prompts: list[str], max_new_tokens: int | Sequence[int], names: Sequence[str] | None = None
    ) -> list[list[int]]:
        """Ids of each prompt, checked against what the model can read and the budget allows."""
        new_tokens = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
        rows = []
        for number, (prompt, new) in enumerate(zip(prompts, new_tokens, strict=True), start=1):
            name = names[number - 1] if names else f"prompt {number}"
            rows.append(self.encode(prompt, name))
            self.scheduler.check(len(rows[-1]), new, name if names or len(prompts) > 1 else "the prompt")
        return rows

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids that end a text: those the model names, else the tokenizer's end token."""
        named = self.model.generation_config.eos_token_id
        if named is None:
            named = self.tokenizer.eos_token_id
        if named is None:
            return frozenset()
        return frozenset(named) if isinstance(named, (list, tuple)) else frozenset([int(named)])

    def _text(self, row: list[int], new_tokens: list[int]) -> str:
        decoder, text = TextDecoder(self.tokenizer, row), []
        for token in new_tokens:
            if token in self.end_ids:
                break
            text.append(decoder.push(token))
        return "".join([*text, decoder.finish()])


def _numbered(options: SamplingOptions, number: int) -> SamplingOptions:
    return options if options.seed is None else replace(options, seed=(options.seed + number) % 2**63)


def generate(
    model: HybridLanguageModel,
    prompts: str | Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
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
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop,
        seed=seed,
        num_beams=num_beams,
    )
