"""What processes tell each other when one of them is not there, and what they must have in common."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import astuple
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import DistBackendError, DistStoreError

from fusiontree.errors import ElsewhereError, InputError
from fusiontree.train import watch
from fusiontree.train.processes import Processes
from fusiontree.train.settings import RunSettings
from fusiontree.train.setup import common_facts
from fusiontree.train.watch import Place

GLOO = RuntimeError(
    "[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 10000ms for recv operation to complete"
)


@pytest.fixture
def first_of_three(monkeypatch) -> Iterator[Processes]:
    store = torch.distributed.HashStore()
    store.set_timeout(timedelta(milliseconds=50))
    monkeypatch.setattr(watch, "default_store", lambda: store)
    accelerator: Any = SimpleNamespace(
        device=torch.device("cpu"), process_index=0, num_processes=3, is_main_process=True
    )
    processes = Processes(accelerator, timeout=1000)
    yield processes
    processes.close()


def told(monkeypatch, index: int, *places: Place | None) -> InputError | None:
    """What process `index` makes of a timeout, where the processes have told these places; the last is the others'."""
    store = torch.distributed.HashStore()
    store.set_timeout(timedelta(milliseconds=50))
    monkeypatch.setattr(watch, "default_store", lambda: store)
    for number, place in enumerate(places):
        if place is not None:
            store.set(f"fusiontree/{number}", json.dumps(astuple(place)))
    own = places[index] or Place()
    monkeypatch.setattr(watch, "collectives_begun", lambda: own.collectives)
    accelerator: Any = SimpleNamespace(
        device=torch.device("cpu"), process_index=index, num_processes=len(places), is_main_process=index == 0
    )
    processes = Processes(accelerator, timeout=1000)
    if own.step is not None:
        processes.enter(own.phase, own.step)
    return processes.lost(GLOO)


BACKWARD, UPDATE, DATA = Place(5, "backward", 70), Place(5, "backward", 71), Place(5, "reading data", 69)


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ((BACKWARD, BACKWARD, BACKWARD), "a process of 3: look"),
        ((BACKWARD, BACKWARD, None), "process 2 (not heard of) of 3: look"),
        ((UPDATE, BACKWARD, BACKWARD), "process 1 and 2 (step 5, backward) of 3: look"),
        ((UPDATE, DATA, UPDATE, BACKWARD), "process 1 (step 5, reading data) and process 3 (step 5, backward) of 4"),
        # It had not gone back to the checkpoint with the others yet.
        ((Place(3, "reading data", 80), Place(5, "writing logs", 79)), "process 1 (step 5, writing logs) of 2: look"),
        ((UPDATE, *[DATA] * 20), "process 1, 2, 3, 4, 5, 6, 7 and 13 more (step 5, reading data) of 21: look"),
        # A backend that does not count its operations.
        ((Place(5, "backward", 0), Place(4, "reading data", 0)), "process 1 (step 4, reading data) of 2: look"),
    ],
)
def test_processes_that_are_waited_for_are_named(monkeypatch, places: tuple[Place | None, ...], said: str) -> None:
    assert f"process 0 waited longer than system.timeout for {said}" in str(told(monkeypatch, 0, *places))


def test_the_first_of_those_that_wait_tells_it(monkeypatch) -> None:
    places = BACKWARD, UPDATE, UPDATE
    assert type(told(monkeypatch, 1, *places)) is InputError
    assert type(told(monkeypatch, 2, *places)) is ElsewhereError


def test_the_sentence_needs_no_store(first_of_three: Processes, monkeypatch) -> None:
    def gone(keys: list[str]) -> Any:
        raise DistStoreError("Connection reset by peer")

    monkeypatch.setattr(first_of_three._watch, "_store", SimpleNamespace(check=gone))
    assert "for a process of 3: look" in str(first_of_three.lost(GLOO))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DistBackendError("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3)"), "waited longer than"),
        (DistStoreError("wait timeout after 300000ms, keys: /x"), "waited longer than"),
        (RuntimeError("Connection closed by peer [127.0.0.1]:1"), "another process of the run has ended"),
        (RuntimeError("CUDA error: the launch timed out and was terminated"), None),
        (RuntimeError("DataLoader timed out after 5 seconds"), None),
        (DistBackendError("NCCL error: unhandled cuda error"), None),
    ],
)
def test_only_waiting_for_others_is_blamed_on_them(
    first_of_three: Processes, error: RuntimeError, said: str | None
) -> None:
    found = first_of_three.lost(error)
    assert found is None if said is None else said in str(found)


def test_processes_share_all_settings_but_paths() -> None:
    def facts(**data: Any) -> dict[str, Any]:
        return common_facts(RunSettings.parse({"data": data}))

    here, there = (
        facts(
            train_sources=[{"paths": f"{root}/a.jsonl", "weight": 2.0}],
            eval_paths=f"{root}/b.jsonl",
            tokenizer=f"{root}/tokenizer",
            cache_dir=f"{root}/cache",
            static_dir=f"{root}/tokens",
        )
        for root in ("/one", "/other")
    )
    assert here == there
    assert here["data.train_sources"] == [{"weight": 2.0, "text_key": None}]
    assert facts(packing="best_fit")["data.packing"] == "best_fit" != facts()["data.packing"]
    assert not any("/" in str(value) for value in here.values())
