"""Several processes hand out the rows of one: the same rows in the same order, however many there are or come to be."""

from __future__ import annotations

import json
import subprocess
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonl_files import text_of, write_jsonl

import warm
from fusiontree.data import DataSettings, LazyDataset, build_loader
from fusiontree.data.corpus import Corpus
from fusiontree.data.loader import Loader
from fusiontree.data.order import PlainOrder
from fusiontree.data.ordered import OrderedSource
from fusiontree.data.records import EMPTY_TEXT, BadRecord
from fusiontree.data.static import tokenise
from fusiontree.data.streaming import StreamEntry, StreamingSource, open_streams
from fusiontree.data.tokenizer import DocumentEncoder
from fusiontree.errors import InputError

LENGTH, SEED = 32, 5
STEPS = 30  # of six rows; more than two epochs
BATCH = {1: 6, 2: 3, 3: 2}  # by number of processes: six rows together

RANKS = """
import json, sys
from itertools import islice
from multiprocessing import get_context
from fusiontree.data import DataSettings, build_loader, load_tokenizer

def run(job, tokenizer, rank, world_size, shape):
    loader = build_loader(
        DataSettings(**job["settings"]), tokenizer, split=job["split"], rank=rank, world_size=world_size, **shape
    )
    if job["state"]:
        loader.load_state_dict(job["state"])
    batches = [
        [b.input_ids.tolist(), b.labels.tolist(), b.position_ids.tolist()] for b in islice(loader, job["batches"])
    ]
    return {"batches": batches, "state": loader.state_dict()}

def one_rank(jobs, folder, *which):
    tokenizer = load_tokenizer(f"{folder}/bpe")
    results = [run(job, tokenizer, *which) for job in jobs]
    with open(f"{folder}/rank{which[0]}of{which[1]}.json", "x") as file:
        json.dump(results, file)

jobs, shapes, folder = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
for world_size, shape in shapes:  # forked, so as to import torch once
    ranks = [
        get_context("fork").Process(target=one_rank, args=(jobs, folder, rank, world_size, shape))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert not any(process.exitcode for process in ranks)
"""

#: What each process does: settings of the data, the split, and whether it goes on from a state of two processes.
JOBS = {
    "lazy": ({"data_mode": "lazy"}, "train", False),
    "lazy with workers": ({"data_mode": "lazy", "num_workers": 1}, "train", False),
    "static": ({"data_mode": "static"}, "train", False),
    "stream": ({"data_mode": "hf_streaming", "shuffle_block": 16}, "train", False),
    "best fit": ({"packing": "best_fit"}, "train", False),
    "tasks": ({"structured_task_prob": 0.5, "needle_in_haystack_prob": 0.5}, "train", False),
    "resumed": ({"data_mode": "lazy"}, "train", True),
    "resumed stream": ({"data_mode": "hf_streaming", "shuffle_block": 16}, "train", True),
    "resumed best fit": ({"packing": "best_fit"}, "train", True),
    "evaluation": ({}, "eval", False),
}


class Run:
    """The jobs of one number of processes: for each, what each process gave."""

    def __init__(self, folder: Path, world_size: int) -> None:
        results = [json.loads((folder / f"rank{rank}of{world_size}.json").read_text()) for rank in range(world_size)]
        self.ranks = dict(zip(JOBS, zip(*results, strict=True), strict=True))

    def batches(self, job: str) -> list[list[torch.Tensor]]:
        """By process, its batches as [input_ids, labels, position_ids] [3, rows, T]."""
        return [[torch.tensor(batch) for batch in rank["batches"]] for rank in self.ranks[job]]

    def rows(self, job: str) -> torch.Tensor:
        """All rows, each step's in the order of the processes, [3, rows, T]."""
        ranks = self.batches(job)
        rows = torch.cat([rank[step] for step in range(len(ranks[0])) for rank in ranks], dim=1)
        # Where a process is left without a row at the end of an evaluation, it has one without labels.
        return rows[:, (rows[1] >= 0).any(dim=1)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer) -> dict[int, Run]:
    """What one, two and three real processes give."""
    folder = tmp_path_factory.mktemp("ranks")
    first = [{"text": text_of(number)} for number in range(35)]
    first[10:10] = ["{broken", ""]
    paths = [
        write_jsonl(folder / "first.jsonl", first),
        write_jsonl(folder / "second.jsonl", [{"text": text_of(number)} for number in range(35, 60)]),
    ]
    tokenizer.save_pretrained(folder / "bpe")
    common = {"train_paths": paths, "eval_paths": paths, "static_dir": str(folder / "tokens")}
    common["cache_dir"] = str(folder / "cache")
    encoder = DocumentEncoder(tokenizer, tokenizer.eos_token_id)
    records = LazyDataset(Corpus(paths, cache_dir=common["cache_dir"]), encoder)
    list(tokenise(records, folder / "tokens" / "train", vocab_size=400))

    def state_after_16_rows(changes: dict) -> dict:
        """Of two processes with four rows each, after two steps."""
        shape = {"batch_size": 4, "max_seq_length": LENGTH, "seed": SEED}
        loaders = [
            build_loader(DataSettings(**common, **changes), tokenizer, rank=rank, world_size=2, **shape)
            for rank in range(2)
        ]
        for loader in loaders:
            list(islice(loader, 2))
        assert loaders[0].state_dict() == loaders[1].state_dict()
        return loaders[0].state_dict()

    jobs = [
        {
            "settings": {**common, **changes},
            "split": split,
            "state": state_after_16_rows(changes) if resumes else None,
            "batches": STEPS if split == "train" else None,
        }
        for changes, split, resumes in JOBS.values()
    ]
    shapes = [(n, {"batch_size": BATCH[n], "max_seq_length": LENGTH, "seed": SEED}) for n in BATCH]
    subprocess.run(
        [warm.python(), "-c", RANKS, json.dumps(jobs), json.dumps(shapes), str(folder)], check=True, timeout=200
    )
    return {world_size: Run(folder, world_size) for world_size in BATCH}


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("job", JOBS)
def test_processes_hand_out_the_rows_of_one_and_have_its_state(runs, job, world_size):
    one, several = runs[1], runs[world_size]
    assert torch.equal(several.rows(job), one.rows(job))
    (expected,) = (rank["state"] for rank in one.ranks[job])
    assert [rank["state"] for rank in several.ranks[job]] == [expected] * world_size
    if JOBS[job][1] == "train":
        shapes = {batch.shape for rank in several.batches(job) for batch in rank}
        assert shapes == {(3, BATCH[world_size], LENGTH)}


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("job", ["lazy", "static", "stream", "evaluation"])
def test_every_document_comes_once_an_epoch(runs, tokenizer, job, world_size):
    input_ids, labels, _ = runs[world_size].rows(job)
    texts = tokenizer.decode(input_ids[labels >= 0]).split(tokenizer.eos_token)[:-1]
    everything = sorted(text_of(number) for number in range(60))
    assert len(texts) >= 120 or job == "evaluation"
    for start in range(0, len(texts) - 59, 60):
        assert sorted(texts[start : start + 60]) == everything


def test_the_modes_of_one_order_give_the_same_rows(runs):
    lazy = runs[2].rows("lazy")
    assert torch.equal(runs[2].rows("static"), lazy) and torch.equal(runs[2].rows("lazy with workers"), lazy)
    assert not torch.equal(runs[2].rows("stream"), lazy)


@pytest.mark.parametrize("job", ["resumed", "resumed stream", "resumed best fit"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_another_number_of_processes_goes_on_with_the_next_row(runs, job, world_size):
    never_stopped = runs[1].rows({"resumed": "lazy", "resumed stream": "stream", "resumed best fit": "best fit"}[job])
    assert torch.equal(runs[world_size].rows(job)[:, : STEPS * 6 - 16], never_stopped[:, 16:])


def test_the_last_rows_of_an_evaluation_may_not_go_round(runs):
    """All processes have as many batches, as engines need that gather weights in every forward pass."""
    assert runs[1].rows("evaluation").shape[1] == 13 * 6 + 3
    of_three = runs[3].batches("evaluation")
    assert [[len(ids) for ids, *_ in batches[12:]] for batches in of_three] == [[2, 2], [2, 1], [2, 1]]
    assert (of_three[2][13][1] == -100).all()


class Numbered:
    """Documents of given lengths, of which no token comes twice; a length of 0 is a record that cannot be used."""

    num_bytes = 1 << 20

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.first = np.cumsum([2, *lengths])

    def __len__(self) -> int:
        return len(self.lengths)

    def damage(self) -> list:
        return []

    def __getitems__(self, records) -> list[np.ndarray | BadRecord]:
        return [
            np.arange(self.first[record], self.first[record + 1], dtype=np.int32)
            if self.lengths[record]
            else BadRecord(EMPTY_TEXT, "nothing")
            for record in records
        ]

    def source(self, record: int) -> str:
        return f"numbers:{record + 1}"

    def identity(self) -> dict[str, object]:
        return {"data": self.lengths}


def rows_of(loaders: list[Loader], steps: int | None) -> list[list[list[int]]]:
    """The rows that the processes hand out in so many steps (None: to the end), each step's in their order."""
    batches = [list(islice(loader, steps)) for loader in loaders]
    return [
        [b.input_ids[row].tolist(), b.labels[row].tolist(), b.position_ids[row].tolist()]
        for step in range(len(batches[0]))
        for b in (rank[step] for rank in batches)
        for row in range(len(b.input_ids))
        if (b.labels[row] >= 0).any()  # else it stands for a row that is not there
    ]


PHASES = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 4)), min_size=1, max_size=5)


def check_phases(make, phases) -> None:
    """Each phase: processes, rows of each one's batch, steps; then all stop, and others go on from any one's state."""
    got, state = [], None
    for world_size, batch_size, steps in phases:
        loaders = [make(batch_size=batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(json.loads(json.dumps(state)))
        got += rows_of(loaders, steps)
        state = loaders[0].state_dict()
        assert all(loader.state_dict() == state for loader in loaders)
    one = make(batch_size=1, rank=0, world_size=1)
    assert got == rows_of([one], sum(world_size * batch_size * steps for world_size, batch_size, steps in phases))
    assert state == one.state_dict()


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any),
    packing=st.sampled_from(["concatenate", "best_fit"]),
    seed=st.one_of(st.none(), st.integers(0, 3)),
    length=st.integers(2, 24),
    phases=PHASES,
)
@settings(deadline=None, max_examples=50)
def test_stopping_anywhere_with_any_number_of_processes_is_one_that_never_stopped(
    lengths, packing, seed, length, phases
):
    def make(**options) -> Loader:
        records = Numbered(lengths)
        source = OrderedSource(records, PlainOrder(len(records), seed), num_workers=0, endless=True)
        return Loader(source, length=length, pad_id=1, on_bad_record="skip", packing=packing, **options)

    check_phases(make, phases)


def test_an_epoch_without_a_document_is_no_endless_loop():
    source = OrderedSource(Numbered([0, 0]), PlainOrder(2, 0), num_workers=0, endless=True)
    loader = Loader(source, batch_size=1, length=4, pad_id=1, on_bad_record="skip", rank=1, world_size=2)
    with pytest.raises(InputError, match=r"not one record of a whole epoch gave a document .*: 2 empty text \("):
        next(iter(loader))


@pytest.fixture(scope="module")
def few_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    lines: list[object] = [{"text": text_of(number)} for number in range(18)]
    lines[7:7] = ["{broken", ""]
    return [write_jsonl(folder / f"{part}.jsonl", lines[part * 10 :][:10]) for part in range(2)]


@given(
    block=st.integers(1, 12),
    is_mixed=st.booleans(),
    packing=st.sampled_from(["concatenate", "best_fit"]),
    phases=PHASES,
)
@settings(deadline=None, max_examples=15)
def test_streams_stop_anywhere_with_any_number_of_processes(few_files, tokenizer, block, is_mixed, packing, phases):
    encoder = DocumentEncoder(tokenizer, tokenizer.eos_token_id)

    def make(**options) -> Loader:
        entries = [StreamEntry(path, weight=weight) for path, weight in zip(few_files, (1, 3), strict=True)]
        streams = open_streams(entries, seed=3, is_mixed=is_mixed, shuffle_block=block)
        source = StreamingSource(streams, encoder, endless=True)
        return Loader(source, length=16, pad_id=1, on_bad_record="skip", packing=packing, **options)

    check_phases(make, phases)


@given(
    lengths=st.lists(st.integers(0, 40), max_size=30),
    length=st.integers(2, 24),
    world_size=st.integers(1, 5),
    batch_size=st.integers(1, 3),
)
@settings(deadline=None)
def test_an_evaluation_is_shared_out_to_its_last_row(lengths, length, world_size, batch_size):
    def make(**options) -> Loader:
        records = Numbered(lengths)
        source = OrderedSource(records, PlainOrder(len(records), None), num_workers=0, endless=False)
        return Loader(source, length=length, pad_id=1, on_bad_record="skip", **options)

    one = make(batch_size=1)
    ranks = [make(batch_size=batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    whole = rows_of([one], None)
    assert rows_of(ranks, None) == whole
    assert all(loader.report() == one.report() for loader in ranks)
    assert len({len(list(loader)) for loader in ranks}) == 1
    # So many batches of each are the same rows as so many of one process with batches as large as theirs together.
    big = make(batch_size=world_size * batch_size)
    assert rows_of(ranks, 2) == rows_of([big], 2)
