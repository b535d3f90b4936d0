"""From the body of a request to its answer: what stands between HTTP and the engine."""

from __future__ import annotations

import asyncio
import copy
import itertools
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from fusiontree.data.tokenizer import DocumentEncoder
from fusiontree.deploy.engine import ComputeThread, Draining, Engine, Handover, QueueFull
from fusiontree.deploy.openai_answers import Answer, to_event, usage_of
from fusiontree.deploy.openai_bodies import ApiError, ChatBody, CompletionBody
from fusiontree.deploy.runtime import InferenceRuntime
from fusiontree.deploy.sampling import SamplingOptions
from fusiontree.deploy.sequences import Delta, Sequence
from fusiontree.deploy.server_metrics import Metrics
from fusiontree.deploy.text import render_chat
from fusiontree.errors import InputError, NonFiniteError

logger = logging.getLogger("fusiontree.server")

_DEFAULT_COMPLETION_TOKENS = 16  # as OpenAI has it


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What a server takes, and how much of it.

    name: of the model, by which requests ask for it.
    host, port: where to listen; port 0 = any free one.
    api_keys: of which a request must carry one; none = everybody may ask.
    max_body_bytes: of a request.
    max_prompt_tokens, max_new_tokens: of a text.
    max_choices: texts that one request may ask for.
    max_queue: texts that may wait beside those that run.
    request_seconds: after which a text ends where it is.
    drain_seconds: that running requests get when the server is told to stop.

    Raises:
        InputError: a value out of range.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 4 * 2**20
    max_prompt_tokens: int = 32768
    max_new_tokens: int = 4096
    max_choices: int = 16
    max_queue: int = 256
    request_seconds: float = 600.0
    drain_seconds: int = 30

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_prompt_tokens", "max_new_tokens", "max_choices", "request_seconds"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("max_queue", "drain_seconds"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not all(self.api_keys):
            raise InputError("an API key is empty")


class Prompts:
    """Texts and conversations to ids, by any thread."""

    def __init__(self, runtime: InferenceRuntime) -> None:
        # Tokenizers may not be used by two threads at once, and the engine has the runtime's.
        self._tokenizer = copy.deepcopy(runtime.tokenizer)
        self._encode = DocumentEncoder(self._tokenizer, separator_id=None)
        self._lock = threading.Lock()
        self._vocabulary = self._tokenizer.get_vocab()
        self._known = set(self._vocabulary.values())
        self._longest = max(map(len, self._vocabulary))

    def encode(self, prompt: str | list[int], most: int, param: str, plain: bool = True) -> list[int]:
        """Ids of at most `most` tokens; `plain`: a text as in training, not one that a template has written."""
        if not isinstance(prompt, str):
            unknown = next((token for token in prompt if token not in self._known), None)
            if unknown is not None:
                raise ApiError(400, f"`{param}` holds the id {unknown}, which no token has", param=param)
            ids = prompt
        elif len(prompt) > most * self._longest:  # known without counting its tokens
            raise ApiError(400, f"`{param}` has more than the {most} tokens that are allowed here", param=param)
        else:
            with self._lock:
                ids = self._encode([prompt])[0].tolist() if plain else self._encode_rendered(prompt)
        if not ids:
            raise ApiError(400, f"`{param}` is empty: give at least one character", param=param)
        if len(ids) > most:
            raise ApiError(400, f"`{param}` has {len(ids)} tokens, {most} are allowed here", param=param)
        return ids

    def _encode_rendered(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def render(self, body: ChatBody) -> str:
        """What the chat template makes of the messages."""
        if self._tokenizer.chat_template is None:
            problem = "the model's tokenizer has no chat template, so it cannot hold a conversation"
            raise ApiError(400, f"{problem}: use /v1/completions", code="no_chat_template")
        with self._lock:
            return render_chat(self._tokenizer, [message.plain() for message in body.messages])


@dataclass
class _Job:
    """A request that runs: for each prompt the sequences of its choices, and what comes from them."""

    answer: Answer
    prompts: list[list[Sequence]]
    events: asyncio.Queue[tuple[int, Delta] | None]
    is_stream: bool
    status: int | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def sequences(self) -> list[Sequence]:
        return [sequence for choices in self.prompts for sequence in choices]


class Service:
    """Answers requests with a runtime, whose scheduler it runs.

    Args:
        runtime: which nobody else uses from now on.
        settings: the limits.
        thread: as of `Engine`.
    """

    def __init__(
        self, runtime: InferenceRuntime, settings: ServerSettings, thread: ComputeThread | None = None
    ) -> None:
        self.settings = settings
        self.engine = Engine(runtime.scheduler, settings.max_queue, thread)
        self.metrics = Metrics(self.engine)
        self._runtime = runtime
        self._delivers: Handover | None = None
        self._prompts = Prompts(runtime)
        self._shown = copy.deepcopy(runtime.tokenizer)  # of the event loop's thread

    async def answer(self, body: CompletionBody | ChatBody, request: Request) -> Response:
        """Raises:
        ApiError: whatever is wrong, in a sentence.
        """
        if body.model != self.settings.name:
            problem = f"there is no model {body.model[:80]!r} here; there is {self.settings.name!r}"
            raise ApiError(404, problem, param="model", code="model_not_found")
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "`stream_options` means nothing without `stream`", param="stream_options")
        job = await self._start(body)
        if body.stream:
            events = self._stream(job, request, body.wants_usage)
            headers = {"cache-control": "no-cache", "x-request-id": job.answer.identity}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        return await self._whole(job, request)

    async def _start(self, body: CompletionBody | ChatBody) -> _Job:
        is_chat, logprobs, wanted = isinstance(body, ChatBody), body.likeliest, body.new_tokens
        most = self.settings.max_new_tokens
        if wanted is not None and wanted > most:
            raise ApiError(400, f"{wanted} new tokens are asked for, {most} are allowed here", param="max_tokens")
        events: asyncio.Queue[tuple[int, Delta] | None] = asyncio.Queue()
        answer = Answer(self.settings.name, is_chat, self._shown, logprobs)
        try:
            prompts = await self._encode(body)
            options = body.options(wanted or (most if is_chat else _DEFAULT_COMPLETION_TOKENS), logprobs, _new_seed())
            rows = self._sequences(prompts, body.choices, options, wanted is None, is_chat, events)
            job = _Job(answer, rows, events, bool(body.stream))
            self.engine.submit(job.sequences)
        except InputError as error:
            raise ApiError(400, str(error)) from error
        except QueueFull as error:
            problem = f"{error} (at most {self.settings.max_queue} texts wait here)"
            headers = {"retry-after": str(error.retry_after)}
            raise ApiError(429, problem, code="queue_full", headers=headers) from error
        except Draining as error:
            raise stopping() from error
        return job

    async def _encode(self, body: CompletionBody | ChatBody) -> list[list[int]]:
        """Ids of each prompt."""
        most, param, plain = self.settings.max_prompt_tokens, "prompt", True
        given: list[str] | list[list[int]]
        if isinstance(body, ChatBody):
            self._check_choices(1, body.choices)
            given, param, plain = [await asyncio.to_thread(self._prompts.render, body)], "messages", False
        else:
            given = body.prompts()
            self._check_choices(len(given), body.choices)
        return [await asyncio.to_thread(self._prompts.encode, prompt, most, param, plain) for prompt in given]

    def _sequences(
        self,
        prompts: list[list[int]],
        choices: int,
        options: SamplingOptions,
        shortens: bool,
        keeps_state: bool,
        events: asyncio.Queue[tuple[int, Delta] | None],
    ) -> list[list[Sequence]]:
        """For each prompt those of its choices, numbered throughout; `shortens`: to what the model has room for."""
        handover, numbers = self._handover(), itertools.count()

        def deliver(index: int, delta: Delta) -> None:
            handover.put(events, (index, delta))

        def sequence(prompt: list[int], group: object, index: int) -> Sequence:
            new_tokens = options.max_new_tokens
            if shortens:
                new_tokens = min(new_tokens, self._room(len(prompt)))
            seed = ((options.seed or 0) + index) % 2**63
            return Sequence(
                prompt,
                replace(options, seed=seed, max_new_tokens=new_tokens),
                partial(deliver, index),
                ends=self._runtime.end_ids,
                keep_state=keeps_state,
                deadline=time.monotonic() + self.settings.request_seconds,
                group=group,
            )

        groups = [object() for _ in prompts]
        return [
            [sequence(prompt, group, next(numbers)) for _ in range(choices)]
            for prompt, group in zip(prompts, groups, strict=True)
        ]

    def _handover(self) -> Handover:
        loop = asyncio.get_running_loop()
        if self._delivers is None or self._delivers.loop is not loop:
            self._delivers = Handover(loop)
        return self._delivers

    def _check_choices(self, prompts: int, choices: int) -> None:
        most = self.settings.max_choices
        if prompts * choices > most:
            problem = f"{prompts * choices} texts (prompts times `n`) are asked for, {most} are allowed here"
            raise ApiError(400, problem, param="n")

    def _room(self, prompt_tokens: int) -> int:
        """New tokens that a learned time encoding has positions for; at least one, which then is refused."""
        config = self._runtime.model.config
        if config.srte_encoding != "learned":
            return self.settings.max_new_tokens
        return max(1, config.max_position_embeddings - prompt_tokens + 1)

    async def _whole(self, job: _Job, request: Request) -> Response:
        with self._running(job, request):
            texts = [""] * len(job.sequences)
            chosen: list[list[Any]] = [[] for _ in texts]
            async for index, delta in self._deltas(job):
                texts[index] += delta.text
                if job.answer.logprobs is not None:
                    chosen[index] += delta.choices
            finished = [sequence.finish_reason or "" for sequence in job.sequences]
            choices = [
                job.answer.choice(index, text, chosen[index], finished[index]) for index, text in enumerate(texts)
            ]
            content = job.answer.whole(choices, usage_of(job.prompts))
            return JSONResponse(content, headers={"x-request-id": job.answer.identity})

    async def _stream(self, job: _Job, request: Request, wants_usage: bool) -> AsyncIterator[str]:
        with self._running(job, request):
            try:
                for index in range(len(job.sequences)):
                    for event in job.answer.opening(index):
                        yield event
                lengths = [0] * len(job.sequences)
                async for index, delta in self._deltas(job):
                    for event in job.answer.event(index, delta, lengths[index]):
                        yield event
                    lengths[index] += len(delta.text)
                if wants_usage:
                    yield job.answer.usage_event(usage_of(job.prompts))
                yield "data: [DONE]\n\n"
            except ApiError as error:  # the status of the answer has been sent already
                job.status = error.status
                yield to_event(error.content)

    async def _deltas(self, job: _Job) -> AsyncIterator[tuple[int, Delta]]:
        """What comes, until every sequence has ended.

        Raises:
            ApiError: the engine failed, the time was over before it began, or the client has gone.
        """
        going = len(job.sequences)
        while going:
            event = await job.events.get()
            if event is None:
                raise ApiError(499, "the client has gone")
            index, delta = event
            if delta.finish_reason is not None:
                going -= 1
            if isinstance(delta.error, Draining):
                raise stopping()
            if isinstance(delta.error, NonFiniteError):
                raise ApiError(500, str(delta.error), code="not_finite")
            if delta.error is not None:
                raise ApiError(500, "the model failed on this request; the server's log says why")
            if delta.finish_reason == "timeout" and job.sequences[index].first_token is None:
                problem = f"the request did not begin within {self.settings.request_seconds:g} seconds"
                raise ApiError(503, problem, code="timeout", headers={"retry-after": "10"})
            yield index, delta

    @contextmanager
    def _running(self, job: _Job, request: Request) -> Iterator[None]:
        """Watches the connection meanwhile; ends whatever still runs, and writes the log."""
        watch = asyncio.create_task(_watch(request, job.events))
        try:
            yield
            job.status = job.status or 200
        except ApiError as error:
            job.status, error.is_logged = error.status, True
            raise
        finally:
            watch.cancel()
            for sequence in job.sequences:
                if sequence.finish_reason is None:
                    sequence.cancel()
            self.engine.wake()
            self._note(job)

    def _note(self, job: _Job) -> None:
        seconds = time.monotonic() - job.started
        self.engine.note_duration(seconds)
        for sequence in job.sequences:
            self.metrics.observe(sequence)
        firsts = [one.first_token - one.submitted for one in job.sequences if one.first_token is not None]
        usage = usage_of(job.prompts)
        logger.info(
            "request",
            extra={
                "fields": {
                    "id": job.answer.identity,
                    "status": job.status or 499,  # the client has gone
                    "stream": job.is_stream,
                    "choices": len(job.sequences),
                    "prompt_tokens": usage["prompt_tokens"],
                    "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
                    "completion_tokens": usage["completion_tokens"],
                    "finish": sorted({one.finish_reason or "cancelled" for one in job.sequences}),
                    "first_token_s": round(min(firsts), 4) if firsts else None,
                    "seconds": round(seconds, 4),
                }
            },
        )


async def _watch(request: Request, events: asyncio.Queue[tuple[int, Delta] | None]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    events.put_nowait(None)


def _new_seed() -> int:
    return secrets.randbits(62)


def stopping() -> ApiError:
    """The answer while the server stops."""
    return ApiError(503, "the server is stopping", code="stopping", headers={"retry-after": "5"})
