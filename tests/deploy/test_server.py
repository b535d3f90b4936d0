"""`fusiontree serve` in a process of its own, asked by OpenAI's own client."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import ServerProcess, add_template

import warm
from fusiontree import HybridLanguageModel
from fusiontree.cli import main
from fusiontree.deploy.loading import load
from fusiontree.deploy.quantized import quantize_weights
from fusiontree.deploy.runtime import InferenceRuntime, SamplingOptions
from fusiontree.deploy.slots import state_bytes

PROMPT = "the quick brown fox"
KEY = "open-sesame"
PATIENCE = 120.0  # seconds: a machine that is busy with other things is no error


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_template(Path(shutil.copytree(tiny_folder, tmp_path_factory.mktemp("served") / "tiny")))


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Few of them: what a process costs is its imports."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"other-key\n\n{KEY}\n")
    limits = ("--max-prompt-tokens", "2000", "--max-queue", "4", "--max-rows", "8", "--prefill-piece", "64")
    server = ServerProcess(folder, "--api-key-file", str(keys), *limits, FUSIONTREE_API_KEY="from-environment")
    server.key = KEY
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> openai.OpenAI:
    return server.client()


def get(server: ServerProcess, path: str) -> httpx.Response:
    return httpx.get(server.url + path, headers={"authorization": f"Bearer {server.key}"}, timeout=PATIENCE)


@pytest.fixture(scope="module")
def runtime(model: HybridLanguageModel) -> InferenceRuntime:
    return InferenceRuntime(model)


def post(server: ServerProcess, content: bytes, path: str = "completions") -> httpx.Response:
    return httpx.post(
        f"{server.url}/v1/{path}",
        content=content,
        headers={"content-type": "application/json", "authorization": f"Bearer {server.key}"},
        timeout=PATIENCE,
    )


def sentence_of(response: httpx.Response) -> str:
    """The sentence of an error in OpenAI's form."""
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] and isinstance(error["message"], str) and len(error["message"]) > 10
    return error["message"]


def test_a_completion_is_the_text_of_the_python_interface(client: openai.OpenAI, runtime: InferenceRuntime) -> None:
    options = {"max_tokens": 12, "temperature": 0}
    answer = client.completions.create(model="tiny", prompt=PROMPT, **options)
    (expected,) = runtime.generate(PROMPT, max_new_tokens=12)
    assert answer.choices[0].text == expected
    assert answer.choices[0].finish_reason == "length"
    assert (answer.object, answer.model) == ("text_completion", "tiny")
    read = len(runtime.encode(PROMPT))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (read, 12)
    assert answer.usage.total_tokens == read + 12
    ids = client.completions.create(model="tiny", prompt=runtime.encode(PROMPT), **options)
    assert ids.choices[0].text == expected
    several = client.completions.create(model="tiny", prompt=[PROMPT, "学而"], n=2, **options)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in several.choices[:2]] == [expected] * 2
    assert several.usage.prompt_tokens == read + len(runtime.encode("学而"))


def test_a_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "seed": 5, "temperature": 1.2}
    whole = client.completions.create(**options)
    events = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(event.choices[0].text for event in events[:-1]) == whole.choices[0].text
    assert len(events) > 5 and len({event.id for event in events}) == 1
    assert events[-2].choices[0].finish_reason == "length"
    assert events[-1].choices == [] and events[-1].usage.completion_tokens == 24
    # Its own seed decides each choice.
    several = client.completions.create(**options, n=3)
    assert several.choices[0].text == whole.choices[0].text
    texts = ["", "", ""]
    for event in client.completions.create(**options, n=3, stream=True):
        texts[event.choices[0].index] += event.choices[0].text
    assert texts == [choice.text for choice in several.choices]
    assert len(set(texts)) == 3


def test_a_chat_goes_through_the_template(
    client: openai.OpenAI, server: ServerProcess, runtime: InferenceRuntime
) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "who "}, {"type": "text", "text": "sings?"}]},
    ]
    options: dict[str, Any] = {"model": "tiny", "messages": messages, "max_completion_tokens": 16, "temperature": 0}
    answer = client.chat.completions.create(**options)
    (expected,) = runtime.generate("[system] be brief\n[user] who sings?\n[assistant] ", max_new_tokens=16)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == expected
    events = list(client.chat.completions.create(**options, stream=True))
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content or "" for event in events) == expected
    assert events[-1].choices[0].finish_reason == "length"
    # The next turn goes on from the state at the end of this one.
    messages += [answer.choices[0].message, {"role": "user", "content": "and now?"}]
    again = client.chat.completions.create(**options)
    details = again.usage.prompt_tokens_details
    assert details is not None and details.cached_tokens >= answer.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError, match="the chat template refuses the messages: nobody develops here"):
        client.chat.completions.create(model="tiny", messages=[{"role": "developer", "content": "x"}])
    with pytest.raises(openai.BadRequestError, match=r"`messages.0.role`: input should be 'system', "):
        client.chat.completions.create(model="tiny", messages=[{"role": "tool", "content": "x", "tool_call_id": "1"}])


def test_stop_strings_and_seeds(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "seed": 3, "temperature": 1.0}
    whole = client.completions.create(**options).choices[0].text
    assert client.completions.create(**options).choices[0].text == whole
    assert client.completions.create(**(options | {"seed": 4})).choices[0].text != whole
    assert client.completions.create(**(options | {"seed": -1})).choices[0].text != whole
    stop = whole[10:13]
    ended = client.completions.create(**options, stop=[stop, "never written"]).choices[0]
    assert ended.finish_reason == "stop" and ended.text == whole[: whole.index(stop)]
    streamed = list(client.completions.create(**options, stop=stop, stream=True))
    assert "".join(event.choices[0].text for event in streamed) == ended.text


# Of top-level fields of a request, and what of them is the runtime's own.
DRAWS = {"temperature": 1.0, "seed": 3}
CHOOSING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "temperature": ({"temperature": 1.9, "seed": 3}, {"temperature": 1.9, "seed": 3}),
    "top_p": (DRAWS | {"top_p": 0.3}, DRAWS | {"top_p": 0.3}),
    "top_k": (DRAWS | {"top_k": 2}, DRAWS | {"top_k": 2}),
    "min_p": (DRAWS | {"min_p": 0.4}, DRAWS | {"min_p": 0.4}),
    "repetition_penalty": (DRAWS | {"repetition_penalty": 1.9}, DRAWS | {"repetition_penalty": 1.9}),
    "presence_penalty": (DRAWS | {"presence_penalty": 2}, DRAWS | {"presence_penalty": 2.0}),
    "frequency_penalty": (DRAWS | {"frequency_penalty": -2}, DRAWS | {"frequency_penalty": -2.0}),
    "logit_bias": (DRAWS | {"logit_bias": {"70": 30}}, DRAWS | {"logit_bias": {70: 30.0}}),
}


@pytest.mark.parametrize("option", CHOOSING)
def test_what_chooses_tokens_means_what_it_means_to_the_runtime(
    server: ServerProcess, runtime: InferenceRuntime, option: str
) -> None:
    given, meant = CHOOSING[option]
    plain, wanted = (
        next(runtime.run([PROMPT], [SamplingOptions(max_new_tokens=48, **options)])).text for options in (DRAWS, meant)
    )
    assert wanted != plain
    body = json.dumps({"model": "tiny", "prompt": PROMPT, "max_tokens": 48} | given).encode()
    assert post(server, body).json()["choices"][0]["text"] == wanted


def test_log_probabilities(client: openai.OpenAI, model: HybridLanguageModel, runtime: InferenceRuntime) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=3, temperature=0, logprobs=4)
    found = answer.choices[0].logprobs
    with torch.no_grad():
        logits = model(torch.tensor([runtime.encode(PROMPT)])).logits[0, -1, :300]
    expected = logits.log_softmax(-1).topk(4).values.tolist()
    assert found.token_logprobs[0] == pytest.approx(expected[0], abs=1e-4)
    assert sorted(found.top_logprobs[0].values(), reverse=True) == pytest.approx(expected, abs=1e-4)
    assert len(found.tokens) == len(found.text_offset) == 3
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    options: dict[str, Any] = {"model": "tiny", "messages": messages, "max_tokens": 5, "temperature": 0}
    chat = client.chat.completions.create(**options, logprobs=True, top_logprobs=2).choices[0]
    assert [len(token.top_logprobs) for token in chat.logprobs.content] == [2] * 5
    assert all(token.logprob == token.top_logprobs[0].logprob for token in chat.logprobs.content)
    streamed = [
        token
        for event in client.chat.completions.create(**options, logprobs=True, top_logprobs=2, stream=True)
        if event.choices[0].logprobs
        for token in event.choices[0].logprobs.content
    ]
    assert [token.token for token in streamed] == [token.token for token in chat.logprobs.content]
    assert client.chat.completions.create(**options).choices[0].logprobs is None


def test_models_health_and_metrics(client: openai.OpenAI, server: ServerProcess) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "fusiontree"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-5' here"):
        client.models.retrieve("gpt-5")
    client.completions.create(model="tiny", prompt=PROMPT * 20, max_tokens=2)
    client.completions.create(model="tiny", prompt=PROMPT * 20, max_tokens=2)
    figures = figures_of(server)
    assert figures["generated_tokens_total"] > 0
    assert figures["prefix_hits_total"] >= 1
    assert figures["batch_size"] == figures["queue_length"] == 0
    assert figures['requests_total{path="/v1/completions",status="200"}'] > 0
    for name in ("queue", "first_token", "token", "request"):
        assert figures[f"{name}_seconds_count"] > 0
    schema = get(server, "/openapi.json").json()
    assert schema["openapi"].startswith("3.")
    body = schema["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["$ref"].rpartition("/")[2] in schema["components"]["schemas"]


def test_figures_of_what_runs(client: openai.OpenAI, server: ServerProcess, model: HybridLanguageModel) -> None:
    wait_until_idle(server)
    before, begun = figures_of(server), time.monotonic()
    stream = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=900, temperature=0, stream=True)
    events = iter(stream)
    for _ in range(200):
        next(events)
    during = figures_of(server)
    # A row of its class of lengths, and room for the next ones.
    row = state_bytes(model.config, torch.float32, 1024)
    assert during["batch_size"] == 1 and row / 8 < during["state_bytes"] < 5 * row
    for _ in events:
        pass
    after = figures_of(server)
    assert after["generated_tokens_total"] - before["generated_tokens_total"] == 900
    assert after["decoding_steps_total"] - before["decoding_steps_total"] == 899
    # Over the last ten seconds; of the tokens before, none may count any more.
    seconds = time.monotonic() - begun
    assert seconds > 10 or 90 <= after["tokens_per_second"]
    assert 0 < during["tokens_per_second"]


@pytest.mark.parametrize(
    ("fields", "error", "sentence"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "there is no model 'gpt-5' here; there is 'tiny'"),
        ({"prompt": ""}, openai.BadRequestError, "`prompt` is empty"),
        ({"prompt": []}, openai.BadRequestError, "`prompt` must be a text, a list of texts"),
        ({"prompt": [[5], []]}, openai.BadRequestError, "`prompt` must be a text, a list of texts"),
        ({"prompt": [299, 300]}, openai.BadRequestError, "`prompt` holds the id 300, which no token has"),
        ({"prompt": "\n" * 2001}, openai.BadRequestError, "`prompt` has 2001 tokens, 2000 are allowed here"),
        ({"prompt": "a" * 100_000}, openai.BadRequestError, "`prompt` has more than the 2000 tokens"),
        ({"max_tokens": 5000}, openai.BadRequestError, "5000 new tokens are asked for, 4096 are allowed here"),
        ({"max_tokens": 0}, openai.BadRequestError, "`max_tokens`: input should be greater than or equal to 1"),
        ({"temperature": 2.5}, openai.BadRequestError, "`temperature`: input should be less than or equal to 2"),
        ({"temperature": "hot"}, openai.BadRequestError, "`temperature`: input should be a valid number"),
        ({"max_tokens": 10**20}, openai.BadRequestError, f"{10**20} new tokens are asked for, 4096 are allowed here"),
        ({"stop": ["x"] * 17}, openai.BadRequestError, "`stop` must be a text, or a list of at most 16 texts"),
        ({"stop": 3}, openai.BadRequestError, "`stop` must be a text, or a list of at most 16 texts"),
        ({"n": 17}, openai.BadRequestError, "17 texts (prompts times `n`) are asked for, 16 are allowed"),
        ({"stop": ""}, openai.BadRequestError, "a stop string is empty"),
        ({"logit_bias": {"x": 1}}, openai.BadRequestError, "logit_bias: keys are token ids, got 'x'"),
        ({"logit_bias": {"999": 1}}, openai.BadRequestError, "there is no token 999, the last one is 299"),
        ({"echo": True}, openai.BadRequestError, "`echo` is not supported here: leave it out"),
        ({"stream_options": {}}, openai.BadRequestError, "`stream_options` means nothing without `stream`"),
        ({"extra_body": {"max_token": 1}}, openai.BadRequestError, "did you mean `max_tokens`?"),
    ],
)
def test_what_cannot_be_answered_is_a_sentence(
    client: openai.OpenAI, fields: dict, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error) as raised:
        client.completions.create(**({"model": "tiny", "prompt": PROMPT, "max_tokens": 2} | fields))
    assert sentence in str(raised.value)
    # What asks for nothing special is no reason to refuse.
    client.completions.create(model="tiny", prompt="a", max_tokens=1, user="me", echo=False, best_of=1, suffix=None)
    messages: Any = [{"role": "user", "content": "a"}]
    client.chat.completions.create(model="tiny", messages=messages, max_tokens=1, parallel_tool_calls=True)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"messages": [{"role": "user"}]}, "`messages.0`: a message of this role has a content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "`messages.0.content.0.type`: input should be 'text'",
        ),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "`max_tokens` and `max_completion_tokens` are different"),
    ],
)
def test_conversations_that_cannot_be_continued(client: openai.OpenAI, fields: dict, sentence: str) -> None:
    body: dict = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(**(body | fields))
    assert sentence in str(raised.value)
    client.chat.completions.create(**body, max_tokens=2, max_completion_tokens=2)


@pytest.mark.parametrize(
    ("content", "status", "sentence"),
    [
        (b"", 400, "the body is not valid JSON"),
        (b"[1]", 400, "the body must be a JSON object"),
        (b'{"model": "tiny", "prompt": "\xff"}', 400, "the body is not UTF-8 text (byte 29)"),
        (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', 400, "NaN is no number of JSON"),
        (b'{"model": "tiny", "prompt": "a", "temperature": 1e999}', 400, "`temperature`: input should be a finite"),
        (b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400, "the body is not valid JSON"),
        (b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 50 + b"}", 400, "`seed`: input should be"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', 400, "half of a surrogate pair"),
        (b'{"model": "tiny", "\\ud800": 1, "prompt": "a"}', 400, "half of a surrogate pair"),
        (b"[" * 100_000, 400, "nested too deeply"),
        (b'{"a":' * 900 + b"1" + b"}" * 900, 400, "nested too deeply"),
        (b'{"model": "tiny", "prompt": [' + b"null," * 500_000 + b"null]}", 400, "`prompt` must be a text"),
        (b'{"model": "tiny", "prompt": "' + b"x" * 10_000_000 + b'"}', 413, "more than the 4194304 bytes"),
        (b'{"prompt": "a"}', 400, "`model` is missing"),
    ],
    ids=range(14),
)
def test_bodies_that_are_none(server: ServerProcess, content: bytes, status: int, sentence: str) -> None:
    response = post(server, content)
    assert response.status_code == status
    assert sentence in sentence_of(response)


NUMBERS = st.integers() | st.floats() | st.sampled_from([2**63, -(2**63) - 1, 10**400, 1e308, -0.0])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    [
        *("model", "prompt", "messages", "n", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k"),
        *("seed", "stop", "stream", "stream_options", "logit_bias", "logprobs", "top_logprobs", "presence_penalty"),
        *("min_p", "repetition_penalty", "tools", "user", "anything"),
    ]
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(FIELDS, VALUES, max_size=5), st.booleans())
def test_no_body_breaks_the_server(server: ServerProcess, fields: dict, is_chat: bool) -> None:
    messages = [{"role": "user", "content": "a"}]
    valid = {"model": "tiny", "max_tokens": 1} | ({"messages": messages} if is_chat else {"prompt": "a"})
    content = json.dumps(valid | fields).encode("utf-8", "surrogatepass")
    response = post(server, content, "chat/completions" if is_chat else "completions")
    assert response.status_code in (200, 400, 404)
    if response.status_code != 200:
        sentence_of(response)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60))
def test_bytes_that_are_no_request(server: ServerProcess, content: bytes) -> None:
    response = post(server, content)
    assert response.status_code == 400
    sentence_of(response)


def test_other_paths_and_methods(server: ServerProcess) -> None:
    for method, path, status in (("GET", "/", 404), ("GET", "/v1/completions", 405), ("POST", "/health", 405)):
        headers = {"authorization": f"Bearer {server.key}"}
        response = httpx.request(method, server.url + path, headers=headers, timeout=PATIENCE)
        assert response.status_code == status
        sentence_of(response)


def figures_of(server: ServerProcess) -> dict[str, float]:
    """What /metrics says, by names without the beginning that all have."""
    lines = [line for line in get(server, "/metrics").text.splitlines() if line.startswith("fusiontree_")]
    return {name.removeprefix("fusiontree_"): float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def running(server: ServerProcess) -> tuple[float, float]:
    figures = figures_of(server)
    return figures["batch_size"], figures["queue_length"]


def wait_until_idle(server: ServerProcess) -> None:
    begun = time.monotonic()
    while running(server) != (0, 0):
        assert time.monotonic() - begun < 60
        time.sleep(0.05)


def test_leaving_ends_the_generation(client: openai.OpenAI, server: ServerProcess) -> None:
    """Of a stream that is closed, of a request that runs out of patience."""
    stream = client.completions.create(model="tiny", prompt="a", max_tokens=4000, stream=True)
    next(iter(stream))
    assert running(server)[0] == 1
    stream.close()
    wait_until_idle(server)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).completions.create(model="tiny", prompt="a", max_tokens=4000)
    wait_until_idle(server)


def test_a_full_queue_says_when_to_come_back(client: openai.OpenAI, server: ServerProcess) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 4000, "n": 12}
    stream = client.completions.create(**options, stream=True)
    next(iter(stream))
    assert running(server) == (8, 4)
    with pytest.raises(openai.RateLimitError, match="the queue is full; try again in") as raised:
        client.completions.create(model="tiny", prompt="a", max_tokens=1)
    assert int(raised.value.response.headers["retry-after"]) >= 1
    stream.close()
    wait_until_idle(server)
    assert client.completions.create(model="tiny", prompt="a", max_tokens=1).choices


# Prompts of more than a hundred tokens make a step fail, as where memory ends; those above fifty compute no numbers.
FAILING_STEP = """
import torch

def fail(module, given):
    if isinstance(module, torch.nn.Embedding) and given[0].shape[-1] > 100:
        raise RuntimeError("there is no memory left")

def spoil(module, given, found):
    if isinstance(module, torch.nn.Embedding) and 50 < given[0].shape[-1] <= 100:
        return found * float("nan")

torch.nn.modules.module.register_module_forward_pre_hook(fail)
torch.nn.modules.module.register_module_forward_hook(spoil)
"""


def leave_while_sending(server: ServerProcess) -> None:
    """Begins a body, goes away, and waits for the record of it."""
    address = httpx.URL(server.url)
    fields = ["Host: x", f"Authorization: Bearer {server.key}", "Content-Length: 99"]
    head = "\r\n".join(["POST /v1/completions HTTP/1.1", *fields, "", "{"])
    with socket.create_connection((address.host, address.port)) as connection:
        connection.sendall(head.encode())
        time.sleep(0.2)  # until it is read: a connection that is closed before is no request at all
    while server.wait_for("refused")["status"] != 499:
        pass


def test_the_log_holds_figures_of_each_request_and_no_prompts(folder: Path) -> None:
    limits = ("--max-rows", "1", "--max-queue", "0", "--max-body", "4KiB")
    server = ServerProcess(folder, *limits, code=FAILING_STEP, FUSIONTREE_API_KEY=KEY)
    server.key = KEY
    client, secret = server.client(), "seven silver birds"
    given: dict[str, Any] = {"model": "tiny", "prompt": secret, "max_tokens": 3}
    answers = [client.completions.create(**given), client.completions.create(**given, stop=[secret])]
    answers.append(client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": secret}]))
    events = list(client.completions.create(**given, stream=True))
    with pytest.raises(openai.InternalServerError, match="the model failed on this request"):
        client.completions.create(**(given | {"prompt": secret + "\n" * 120}))
    with pytest.raises(openai.InternalServerError, match="the model's logits are not finite"):
        client.completions.create(**(given | {"prompt": secret + "\n" * 60}))
    with pytest.raises(openai.APIError, match="the model's logits are not finite"):
        list(client.completions.create(**(given | {"prompt": secret + "\n" * 60}), stream=True))
    for fields, error in (
        ({"model": secret}, openai.NotFoundError),
        ({"extra_body": {secret: secret}}, openai.BadRequestError),
        ({"logit_bias": {secret: 1}}, openai.BadRequestError),
        ({"prompt": secret * 1000}, openai.APIStatusError),
    ):
        with pytest.raises(error):
            client.completions.create(**(given | fields))
    with pytest.raises(openai.AuthenticationError):
        server.client(secret).completions.create(**given)
    assert get(server, f"/{secret}").status_code == 404
    leave_while_sending(server)
    stream = client.completions.create(**(given | {"max_tokens": 4000}), stream=True)
    next(iter(stream))
    with pytest.raises(openai.RateLimitError):
        client.completions.create(**given)
    stream.close()
    assert server.stop() == 0
    log = [json.loads(line) for line in server.lines]
    ran = [record for record in log if record["event"] == "request"]
    assert [record["id"] for record in ran[:4]] == [*(answer.id for answer in answers), events[0].id]
    assert [(record["status"], record["stream"]) for record in ran] == [
        *[(200, False)] * 3,
        (200, True),
        (500, False),
        (500, False),
        (500, True),
        (499, True),
    ]
    assert (ran[0]["completion_tokens"], ran[0]["finish"]) == (3, ["length"])
    refused = [(record["path"], record["status"]) for record in log if record["event"] == "refused"]
    path = "/v1/completions"
    assert refused == [
        *((path, status) for status in (404, 400, 400, 413, 401)),
        ("other", 404),
        (path, 499),
        (path, 429),
    ]
    (failed,) = [record for record in log if "exception" in record]
    assert failed["event"].startswith("a step failed") and "there is no memory left" in failed["exception"]
    assert secret not in "".join(server.lines)


def test_without_the_key_nothing_but_health_is_answered(server: ServerProcess) -> None:
    assert httpx.get(f"{server.url}/health", timeout=PATIENCE).json() == {"status": "ok"}
    for path in ("/metrics", "/v1/models", "/openapi.json", "/", "/health/"):
        response = httpx.get(server.url + path, timeout=PATIENCE)
        assert response.status_code == 401
        assert "wants an API key" in sentence_of(response)
    for header in ("Bearer wrong", "Bearer", f"Bearer {KEY}2", f"Basic {KEY}", KEY):
        headers = {"authorization": header}
        assert httpx.get(f"{server.url}/v1/models", headers=headers, timeout=PATIENCE).status_code == 401
    with pytest.raises(openai.AuthenticationError):
        server.client("wrong").completions.create(model="tiny", prompt="a", max_tokens=1)
    for key in (KEY, "other-key", "from-environment"):
        assert server.client(key).completions.create(model="tiny", prompt="a", max_tokens=1).choices


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "anybody who reaches 0.0.0.0 could use the model"),
        (["--without-key", "--api-key-file", "keys"], "--without-key lets anybody in, --api-key-file asks for a key"),
    ],
)
def test_a_server_does_not_start_where_it_is_unclear_who_may_use_it(
    folder: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FUSIONTREE_API_KEY", raising=False)
    assert main(["serve", str(folder), *options]) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


def test_a_server_that_is_stopped_finishes_what_it_began(tiny_folder: Path) -> None:
    """Also: a model without a template holds no conversation."""
    # The longest text ends before the time to drain does, whatever else the machine has to do.
    server = ServerProcess(tiny_folder, "--max-rows", "2", "--name", "bare", "--request-seconds", "20")
    client, choices = server.client(), {}
    with pytest.raises(openai.BadRequestError, match="no chat template, so it cannot hold a conversation"):
        client.chat.completions.create(model="bare", messages=[{"role": "user", "content": "hi"}])

    def ask(number: int) -> None:
        options: dict[str, Any] = {"model": "bare", "prompt": "a", "temperature": 0}
        choices[number] = client.completions.create(**options, max_tokens=100 * number).choices[0]

    threads = [threading.Thread(target=ask, args=(number,)) for number in (1, 2, 3, 4, 40)]
    for thread in threads:
        thread.start()
    while sum(running(server)) < 5:
        time.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(timeout=60)
    assert [choices[number].finish_reason for number in (1, 2, 3, 4, 40)] == ["length"] * 5
    assert choices[2].text.startswith(choices[1].text)
    shorter, longer = sorted((choices[4].text, choices[40].text), key=len)  # of a busy machine the last has less time
    assert longer.startswith(shorter)
    assert server.stop() == 0
    assert server.wait_for("stopping")["drain_seconds"] == 30
    with pytest.raises(openai.APIConnectionError):
        client.completions.create(model="bare", prompt="a", max_tokens=1)


def test_what_cannot_be_finished_in_time_is_told_so(tiny_folder: Path) -> None:
    server = ServerProcess(tiny_folder, "--name", "tiny", "--drain-seconds", "1", "--max-new-tokens", "200000")
    answers: list[httpx.Response] = []
    body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 200000}).encode()
    thread = threading.Thread(target=lambda: answers.append(post(server, body)))
    thread.start()
    while thread.is_alive() and sum(running(server)) < 1:
        time.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    thread.join(timeout=60)
    assert answers[0].status_code == 503 and "stopping" in sentence_of(answers[0])
    assert server.stop() == 0


@pytest.fixture(scope="module")
def small_server(tiny_folder: Path) -> Iterator[ServerProcess]:
    """Weights of 8 bits, and limits other than the default ones, each so low that a test reaches it."""
    memory = (
        "--state-memory",
        "11MiB",
        "--prefix-memory",
        "64KiB",
        "--prefill-piece",
        "16",
        "--snapshot-interval",
        "32",
    )
    limits = ("--max-body", "2KiB", "--request-seconds", "1.5", "--max-new-tokens", "200000")
    server = ServerProcess(tiny_folder, *memory, *limits, "--name", "tiny", "--dtype", "bfloat16", "--weights", "int8")
    yield server
    assert server.stop() == 0


def test_rounded_weights_answer_as_in_the_runtime(small_server: ServerProcess, tiny_folder: Path) -> None:
    loaded = load(tiny_folder, device="cpu", dtype=torch.bfloat16)
    quantize_weights(loaded, "int8")
    (expected,) = InferenceRuntime(loaded).generate(PROMPT, max_new_tokens=12)
    client = small_server.client()
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, temperature=0)
    assert answer.choices[0].text == expected
    (whole,) = InferenceRuntime(load(tiny_folder, device="cpu")).generate(PROMPT, max_new_tokens=12)
    assert whole != expected
    assert any("int8" in line for line in small_server.lines)


def test_large_bodies_are_refused_however_they_come(small_server: ServerProcess) -> None:
    body = json.dumps({"model": "tiny", "prompt": "a" * 3000, "max_tokens": 1}).encode()

    def in_chunks() -> Iterator[bytes]:  # without a length that says so before
        for begin in range(0, len(body), 500):
            yield body[begin : begin + 500]

    for content in (body, in_chunks()):
        response = httpx.post(f"{small_server.url}/v1/completions", content=content, timeout=PATIENCE)
        assert response.status_code == 413
        assert "more than the 2048 bytes that are allowed here" in sentence_of(response)
    content = (body[:1] + body[1:].replace(b"a" * 3000, b"a") for _ in range(1))
    assert httpx.post(f"{small_server.url}/v1/completions", content=content, timeout=PATIENCE).status_code == 200


def test_the_memory_for_states_decides_what_runs_and_the_time_when_it_ends(small_server: ServerProcess) -> None:
    client = small_server.client()
    with pytest.raises(openai.BadRequestError, match="but the budget of states is 11,534,336"):
        client.completions.create(model="tiny", prompt="a", max_tokens=200_000)
    choices: dict[int, Any] = {}

    def ask(number: int) -> None:
        with contextlib.suppress(openai.InternalServerError):  # the one that waits may not begin in time
            choices[number] = client.completions.create(model="tiny", prompt="a", max_tokens=60_000, temperature=0)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    while running(small_server) != (1, 1):
        assert any(thread.is_alive() for thread in threads)
    for thread in threads:
        thread.join(timeout=PATIENCE)
    assert choices
    for ended in choices.values():
        assert ended.choices[0].finish_reason == "length" and 0 < ended.usage.completion_tokens < 60_000


def test_snapshots_lie_where_they_are_asked_for_and_go_when_their_memory_ends(small_server: ServerProcess) -> None:
    client, shared = small_server.client(), list(range(10, 50))

    def cached(prompt: list[int]) -> int:
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=1)
        return answer.usage.prompt_tokens_details.cached_tokens

    assert cached([*shared, 60]) == 0
    assert cached([*shared, 61]) == 32
    assert figures_of(small_server)["prefix_evictions_total"] == 0
    for number in range(100, 110):
        cached([number] * 40)
    figures = figures_of(small_server)
    assert figures["prefix_evictions_total"] > 0 and 0 < figures["prefix_bytes"] <= 2**16
    assert figures["prefix_snapshots"] > 0 and cached([*shared, 62]) == 0


@pytest.mark.slow
def test_a_killed_server_loses_nothing_but_what_ran(folder: Path) -> None:
    server = ServerProcess(folder, "--max-rows", "1", "--request-seconds", "2", "--drain-seconds", "0")
    client = server.client()
    with pytest.raises(openai.InternalServerError, match="did not begin within 2 seconds"):
        client.completions.create(model="tiny", prompt="a", max_tokens=4000, n=2)
    (choice,) = client.completions.create(model="tiny", prompt="a", max_tokens=4000, temperature=0).choices
    assert choice.finish_reason == "length" and choice.text

    def slowly() -> Iterator[bytes]:
        yield b'{"model": '
        time.sleep(4)
        yield b'"tiny", "prompt": "a"}'

    response = httpx.post(f"{server.url}/v1/completions", content=slowly(), timeout=PATIENCE)
    assert response.status_code == 408 and "the body did not arrive within 2 seconds" in sentence_of(response)
    stream = client.completions.create(model="tiny", prompt="a", max_tokens=4000, temperature=0, stream=True)
    next(iter(stream))
    assert server.stop(signal.SIGKILL) == -signal.SIGKILL
    with pytest.raises(openai.APIConnectionError):
        list(stream)
    begun = time.monotonic()
    again = ServerProcess(folder)
    assert again.client().completions.create(model="tiny", prompt="a", max_tokens=5).choices
    print(f"answers {time.monotonic() - begun:.1f} seconds after the start")
    assert again.stop(signal.SIGINT) == 130


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_ctrl_c_while_steps_are_compiled(folder: Path) -> None:
    command = [warm.python(), "-m", "fusiontree", "serve", str(folder), "--port", "0", "--device", "cpu", "--compile"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert any(line == "compiling program 1 of 4, steps of 1 row\n" for line in process.stderr)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    assert process.stderr.read() == "interrupted\n"
    assert process.wait(PATIENCE) == 130
