"""The requests of OpenAI's HTTP interface: what a body may hold, and what is wrong with one in a sentence."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from fusiontree.deploy.sampling import SamplingOptions
from fusiontree.errors import nearest

_DEEPEST = 32
_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")
_TYPES = ("str", "int", "float", "bool", "none")
# Of OpenAI's interface, but not here: harmless while they ask for nothing.
_UNSUPPORTED = frozenset(
    {
        *("audio", "best_of", "echo", "function_call", "functions", "logit_processors", "modalities"),
        *("prediction", "reasoning_effort", "response_format", "suffix", "tool_choice"),
        *("tools", "verbosity", "web_search_options"),
    }
)
# These say something about a request, and change nothing in its answer (of tools, of which there are none).
_NOTES = frozenset(
    {"metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"}
)
_NEUTRAL: tuple[Any, ...] = (None, False, [], {}, "none", "auto", {"type": "text"}, ["text"])


class ApiError(Exception):
    """An answer in the form of OpenAI's errors.

    Args:
        status: of HTTP.
        message: a sentence.
        param: the field of the body that is meant.
        code: a word for programs.
        headers: beside the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.is_logged = False
        self.headers = headers or {}
        kind = {429: "rate_limit_error"}.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.content = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """Whether the last event of a stream holds the usage."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TextPart(_Strict):
    """A part of a message: text is the only kind."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One message of a conversation; an answer can be handed back as it came, with all that it leaves empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_what_is_empty(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {key: value for key, value in fields.items() if key in cls.model_fields or value not in (None, [])}

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("no_content", "a message of this role has a content")
        return self

    def plain(self) -> dict[str, str]:
        """As chat templates want it."""
        content = self.content
        text = "".join(part.text for part in content) if isinstance(content, list) else content or ""
        return {"role": self.role, "content": text} | ({"name": self.name} if self.name else {})


class _Sampling(_Strict):
    model: str
    n: int | None = Field(None, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1, le=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | Annotated[list[str], Field(fail_fast=True, max_length=16)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def options(self, max_new_tokens: int, logprobs: int | None, seed: int) -> SamplingOptions:
        """How to continue the text; `seed` where the request names none.

        Raises:
            ApiError: a key of `logit_bias` that is no token id.
            InputError: as `SamplingOptions`.
        """
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingOptions(
            max_new_tokens=max_new_tokens,
            temperature=1.0 if self.temperature is None else float(self.temperature),
            top_k=self.top_k,
            top_p=1.0 if self.top_p is None else float(self.top_p),
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            seed=(seed if self.seed is None else self.seed) % 2**63,
            stop=tuple(stop),
            logit_bias={_token_id(key): float(bias) for key, bias in (self.logit_bias or {}).items()},
            logprobs=logprobs,
        )


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 12):
        raise ApiError(400, f"logit_bias: keys are token ids, got {key[:40]!r}", param="logit_bias")
    return int(key)


_Item = TypeVar("_Item")
_Several = Annotated[list[_Item], Field(fail_fast=True, min_length=1)]
_Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True, min_length=1)]


class CompletionBody(_Sampling):
    """The body of /v1/completions; the prompt is one text or several, or token ids of one or several."""

    prompt: str | _Several[str] | _Ids | _Several[_Ids]
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def likeliest(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str] | list[list[int]]:
        """One entry for each prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


class ChatBody(_Sampling):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def new_tokens(self) -> int | None:
        given = {self.max_completion_tokens, self.max_tokens} - {None}
        if len(given) > 1:
            problem = "`max_tokens` and `max_completion_tokens` are different numbers: give one of the two"
            raise ApiError(400, problem, param="max_tokens")
        return next(iter(given), None)

    @property
    def likeliest(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "`top_logprobs` means nothing without `logprobs`", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


Body = TypeVar("Body", bound=_Sampling)


def parse_body(kind: type[Body], content: bytes) -> Body:
    """The request in a body.

    Raises:
        ApiError: 400 and a sentence.
    """
    try:
        fields = json.loads(content.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 text (byte {error.start})") from error
    except RecursionError as error:
        raise ApiError(400, "the body's JSON is nested too deeply") from error
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(fields, dict):
        raise ApiError(400, "the body must be a JSON object")
    if _is_deeper(fields, _DEEPEST):
        raise ApiError(400, "the body's JSON is nested too deeply")
    if _HALF_PAIR.search(content):
        try:
            json.dumps(fields, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ApiError(400, "the body holds half of a surrogate pair, which is no character") from error
    for name in [name for name in fields if name in _UNSUPPORTED or name in _NOTES]:
        value = fields.pop(name)
        if name in _UNSUPPORTED and value not in _NEUTRAL and not (name == "best_of" and value == 1):
            raise ApiError(400, f"`{name}` is not supported here: leave it out", param=name, code="unsupported")
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _worded(
            kind, _telling(error.errors(include_url=False, include_input=False, include_context=False))
        ) from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _is_deeper(value: Any, levels: int) -> bool:
    """Without recursion."""
    layer = [value]
    for _ in range(levels):
        layer = [
            inner
            for outer in layer
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not layer:
            return False
    return True


def _telling(errors: list[ErrorDetails]) -> ErrorDetails:
    """The first, or what is wrong with a field of several types beyond not being of the first of them."""
    about = [error for error in errors if error["loc"][:1] == errors[0]["loc"][:1]]
    return next((error for error in about if not error["type"].endswith("_type")), errors[0])


def _worded(kind: type[BaseModel], error: ErrorDetails) -> ApiError:
    name = str(error["loc"][0]) if error["loc"] else None
    if name is None:
        return ApiError(400, f"the body cannot be used: {error['msg']}")
    if error["type"] == "extra_forbidden" and len(error["loc"]) == 1:
        close = nearest(name, kind.model_fields)
        hint = f"; did you mean `{close}`?" if close else ""
        return ApiError(400, f"`{name[:80]}` is not a field of this request{hint}", param=name[:80])
    if error["type"] == "missing" and len(error["loc"]) == 1:
        return ApiError(400, f"`{name}` is missing", param=name)
    if name == "prompt":
        wanted = "a text, a list of texts, a list of token ids, or a list of such lists, none of them empty"
        return ApiError(400, f"`prompt` must be {wanted}", param=name)
    if name == "stop":
        return ApiError(400, "`stop` must be a text, or a list of at most 16 texts", param=name)
    # A member of a union is named in the path as a type, which is no help to anybody.
    places = [str(part) for part in error["loc"] if str(part).isidentifier() or isinstance(part, int)]
    places = [part for part in places if part not in _TYPES]
    message = error["msg"][0].lower() + error["msg"][1:]
    return ApiError(400, f"`{'.'.join(places)[:120]}`: {message}", param=name)
