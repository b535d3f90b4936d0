"""What processes tell each other when one of them is not there, and what they must have in common."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import DistBackendError, DistStoreError

from fusiontree.train import processes
from fusiontree.train.processes import Processes
from fusiontree.train.settings import RunSettings
from fusiontree.train.setup import common_facts

GLOO = RuntimeError(
    "[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 10000ms for recv operation to complete"
)


@pytest.fixture
def first_of_three(monkeypatch) -> Processes:
    store = torch.distributed.HashStore()
    store.set_timeout(timedelta(milliseconds=50))
    monkeypatch.setattr(processes, "_store", lambda: store)
    accelerator: Any = SimpleNamespace(
        device=torch.device("cpu"), process_index=0, num_processes=3, is_main_process=True
    )
    return Processes(accelerator)


@pytest.mark.parametrize(
    ("posted", "said"),
    [
        ({}, "for a process of 3: look"),
        ({0: 5, 1: 5, 2: 5}, "for a process of 3: look"),
        ({0: 5, 1: 5}, "for process 2 of 3 (at step 0, others at 5): look"),
        ({0: 5, 1: 4, 2: 4}, "for process 1 and 2 of 3 (at step 4, others at 5): look"),
    ],
)
def test_a_process_that_is_waited_for_is_named(first_of_three: Processes, posted: dict[int, int], said: str) -> None:
    for index, step in posted.items():
        first_of_three.index = index
        first_of_three.post(step)
    first_of_three.index = 0
    assert f"process 0 waited longer than system.timeout {said}" in str(first_of_three.lost(GLOO))


def test_the_sentence_needs_no_store(first_of_three: Processes, monkeypatch) -> None:
    def gone() -> Any:
        raise DistStoreError("Connection reset by peer")

    monkeypatch.setattr(processes, "_store", gone)
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
