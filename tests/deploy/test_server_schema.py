"""What the server's OpenAPI schema says, tried by schemathesis: requests made from it, right and wrong ones."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serving import add_template

from fusiontree import load
from fusiontree.deploy.runtime import InferenceRuntime, SchedulerSettings
from fusiontree.deploy.server import ServerSettings, build_app

KEY = "open-sesame"
load_all_checks()


@pytest.fixture(scope="module")
def address(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server in a thread of this process, whose answers are short."""
    folder = add_template(Path(shutil.copytree(tiny_folder, tmp_path_factory.mktemp("served") / "tiny")))
    runtime = InferenceRuntime(load(folder, device="cpu"), settings=SchedulerSettings(prefix_bytes=2**20))
    limits: dict[str, Any] = {"max_new_tokens": 8, "max_choices": 3, "max_prompt_tokens": 200}
    app = build_app(runtime, ServerSettings(name="tiny", api_keys=(KEY,), **limits))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(timeout=60)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def api(address: str) -> Any:
    headers = {"Authorization": f"Bearer {KEY}"}
    return schemathesis.openapi.from_url(f"{address}/openapi.json", headers=headers)


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_bodies_made_from_the_schema(api: Any, path: str, mode: GenerationMode) -> None:
    """Right ones and wrong ones."""
    ask(api[path]["POST"], mode, 40)


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", "/v1/models/{name}"])
def test_what_has_no_body(api: Any, path: str) -> None:
    ask(api[path]["GET"], GenerationMode.POSITIVE, 10 if "{" in path else 2)


def test_every_path_is_tried(api: Any) -> None:
    assert len([operation.ok() for operation in api.get_all_operations()]) == 6


def ask(operation: Any, mode: GenerationMode, examples: int) -> None:
    """No failure of the server, and nothing that the schema does not announce: statuses, kinds and forms of answers,
    wrong requests refused, and all without a key. What is right by its form may still be refused for what it means,
    with 400 and a sentence."""

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(mode))
    def run(case: Any) -> None:
        case.call_and_validate(
            headers={"Authorization": f"Bearer {KEY}"}, excluded_checks=[positive_data_acceptance], timeout=120
        )

    run()
