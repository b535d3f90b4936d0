"""Batches: every document once an epoch, the same for any number of workers, and resumable anywhere."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from itertools import islice

import pytest
import torch
from jsonl_files import text_of, write_jsonl

from fusiontree.config import InputError
from fusiontree.data import Batch, DataSettings, build_loader, documents

WORKERS = [0, 1, 2]


def as_lists(batches) -> list[tuple[list, list, list]]:
    return [(b.input_ids.tolist(), b.labels.tolist(), b.position_ids.tolist()) for b in batches]


def texts_in(batches: list[Batch], tokenizer) -> list[str]:
    """The whole documents in some batches, put together again over the rows' ends; the last may be incomplete."""
    ids = torch.cat([batch.input_ids[batch.labels >= 0] for batch in batches])
    text = tokenizer.decode(ids)
    return [part for part in text.split(tokenizer.eos_token) if part]


def test_eval_is_one_pass_in_file_order_with_a_padded_last_row(make_loader, tokenizer):
    batches = list(make_loader(split="eval"))
    assert texts_in(batches, tokenizer) == [text_of(number) for number in range(60)]
    assert {tuple(batch.input_ids.shape) for batch in batches[:-1]} == {(3, 32)}
    assert 1 <= batches[-1].input_ids.shape[0] <= 3
    assert all((batch.labels >= 0).all() for batch in batches[:-1])
    last = batches[-1].labels[-1]
    assert (last == -100).any() and (last[:1] >= 0).all()
    for batch in batches:
        for tensor in (batch.input_ids, batch.labels, batch.position_ids):
            assert tensor.dtype == torch.int64
        counted = batch.labels >= 0
        assert torch.equal(batch.labels[counted], batch.input_ids[counted])
        assert (batch.input_ids[~counted] == tokenizer.pad_token_id).all()


def test_eval_begins_again_at_every_pass(make_loader):
    loader = make_loader(split="eval")
    whole = as_lists(loader)
    assert as_lists(islice(loader, 2)) == whole[:2]
    assert as_lists(loader) == whole
    assert loader.report().documents == 60


@pytest.mark.parametrize("num_workers", WORKERS)
def test_an_epoch_holds_every_document_once_and_each_epoch_has_its_own_order(make_loader, tokenizer, num_workers):
    loader = make_loader(num_workers=num_workers)
    batches = []
    for batch in loader:
        batches.append(batch)
        if loader.epoch == 3:
            break
    texts = texts_in(batches, tokenizer)
    everything = sorted(text_of(number) for number in range(60))
    epochs = [texts[start : start + 60] for start in (0, 60, 120)]
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [text_of(number) for number in range(60)]


def test_without_shuffle_training_keeps_the_order_of_the_files(make_loader, tokenizer):
    loader = make_loader(shuffle=False)
    texts = texts_in(list(islice(loader, 30)), tokenizer)
    assert texts[:65] == [text_of(number % 60) for number in range(65)]


def test_the_seed_decides_the_order(make_loader):
    def first(seed):
        return as_lists(islice(make_loader(seed=seed), 3))

    assert first(1) == first(1) != first(2)


def test_batches_do_not_depend_on_the_number_of_workers(make_loader):
    expected = as_lists(islice(make_loader(num_workers=0), 40))
    for num_workers in WORKERS[1:]:
        assert as_lists(islice(make_loader(num_workers=num_workers), 40)) == expected


def test_resuming_anywhere_is_never_stopping(make_loader):
    steps = 60  # some five epochs
    expected = as_lists(islice(make_loader(), steps))
    generator = random.Random(0)
    for _ in range(6):
        stops = sorted(generator.sample(range(steps + 1), 2))
        got, state = [], None
        for begin, end in zip([0, *stops], [*stops, steps], strict=True):
            loader = make_loader(num_workers=generator.choice(WORKERS))
            if state is not None:
                loader.load_state_dict(json.loads(json.dumps(state)))
            got += as_lists(islice(loader, end - begin))
            state = loader.state_dict()
        assert got == expected, stops


def test_every_batch_is_a_place_to_resume_from(make_loader):
    loader = make_loader(length=8, batch_size=2)
    states, batches = [loader.state_dict()], []
    for batch in islice(loader, 120):
        batches.append(batch)
        states.append(loader.state_dict())
    expected = as_lists(batches)
    for step in range(0, 118, 3):
        again = make_loader(length=8, batch_size=2)
        again.load_state_dict(states[step])
        assert as_lists(islice(again, 2)) == expected[step : step + 2]
        assert again.state_dict() == states[step + 2]  # the counts of documents and skipped records too


def test_with_best_fit_every_batch_is_a_place_to_resume_from(make_loader):
    options = {"length": 16, "batch_size": 3, "packing": "best_fit"}
    loader = make_loader(**options)
    states, batches = [loader.state_dict()], []
    for batch in islice(loader, 70):  # four windows, and epochs that end within them
        batches.append(batch)
        states.append(json.loads(json.dumps(loader.state_dict())))
    assert loader.epoch == 1
    expected = as_lists(batches)
    for step in [0, 1, 20, 21, 22, 23, 43, 60, 68]:
        again = make_loader(**options, num_workers=step % 2)
        again.load_state_dict(states[step])
        assert as_lists(islice(again, 2)) == expected[step : step + 2]
        assert again.state_dict() == states[step + 2]  # the counts of documents, skipped records and padding too


def test_with_best_fit_batch_size_may_change_but_neither_packing_nor_row_length(make_loader):
    loader = make_loader(packing="best_fit")
    expected = torch.cat([batch.input_ids for batch in islice(loader, 6)])
    loader = make_loader(packing="best_fit")
    list(islice(loader, 2))
    state = loader.state_dict()
    again = make_loader(packing="best_fit", batch_size=4)
    again.load_state_dict(state)
    assert torch.equal(torch.cat([batch.input_ids for batch in islice(again, 3)]), expected[6:])
    for changed, problem in [
        ({"packing": "concatenate"}, "data.packing differs"),
        ({"packing": "best_fit", "length": 33}, "training.max_seq_length differs"),
    ]:
        with pytest.raises(InputError, match=f"does not fit this run: {problem}"):
            make_loader(**changed).load_state_dict(state)
    assert make_loader(packing="best_fit").fingerprint() == make_loader().fingerprint()


def test_best_fit_holds_every_document_of_an_epoch_uncut_where_it_fits(make_loader, tokenizer):
    loader = make_loader(packing="best_fit", length=200)
    found = []
    for batch in islice(loader, 40):
        for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
            found += [text for text in tokenizer.decode(ids[labels >= 0]).split(tokenizer.eos_token) if text]
    assert set(found) == {text_of(number) for number in range(60)}
    report = loader.report()
    assert report.cut_documents == 0
    assert report.tokens + report.padding_tokens == 40 * 3 * 200
    assert 0 < report.padding_share < 0.1
    assert "(0 cut, " in report.summary()


def test_evaluation_concatenates_whatever_training_does(make_loader):
    assert as_lists(make_loader(split="eval", packing="best_fit")) == as_lists(make_loader(split="eval"))


def test_the_report_counts_padding_and_cut_documents(make_loader):
    loader = make_loader(split="eval")
    batches = list(loader)
    report = loader.report()
    assert report.tokens == sum(int((batch.labels >= 0).sum()) for batch in batches)
    assert report.padding_tokens == sum(batch.labels.numel() for batch in batches) - report.tokens
    # A row that does not begin with a document's first word goes on with one that was cut, once at least.
    assert 0 < report.cut_documents <= sum(len(batch.labels) for batch in batches) - 1
    assert report.summary().startswith(f"60 documents read ({report.cut_documents} cut, ")


def test_an_interrupted_evaluation_goes_on_once_and_then_begins_anew(make_loader):
    loader = make_loader(split="eval")
    whole = as_lists(loader)
    list(islice(loader, 2))
    again = make_loader(split="eval")
    again.load_state_dict(loader.state_dict())
    assert as_lists(again) == whole[2:]
    assert as_lists(again) == whole


def test_iterating_again_goes_on_where_training_was(make_loader):
    expected = as_lists(islice(make_loader(), 9))
    loader = make_loader()
    assert as_lists(islice(loader, 4)) + as_lists(islice(loader, 5)) == expected


def test_row_length_and_batch_size_may_change_on_resume(make_loader, tokenizer):
    loader = make_loader(length=32, batch_size=3)
    first = list(islice(loader, 5))
    longer = make_loader(length=50, batch_size=2)
    longer.load_state_dict(loader.state_dict())
    texts = texts_in(first + list(islice(longer, 25)), tokenizer)
    assert texts[:60] == texts_in(list(islice(make_loader(), 30)), tokenizer)[:60]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_change_of_shape_between_batches_is_a_resume_with_another_shape(make_loader, num_workers):
    """Any sequence of shapes, over the end of an epoch: nothing read ahead, dropped or counted twice."""
    generator = random.Random(1)
    shapes = [generator.choice([(1, 48), (2, 24), (6, 8), (3, 16)]) for _ in range(60)]
    loader = make_loader(num_workers=num_workers)
    batches, got, states = iter(loader), [], []
    for shape in shapes:
        loader.set_shape(*shape)
        got.append(next(batches))
        states.append(loader.state_dict())
    assert [tuple(batch.input_ids.shape) for batch in got] == shapes
    assert loader.epoch >= 1
    for number in range(1, len(shapes)):
        again = make_loader(batch_size=shapes[number][0], length=shapes[number][1])
        again.load_state_dict(states[number - 1])
        assert as_lists(islice(again, 1)) == as_lists(got[number : number + 1])
        assert again.state_dict() == states[number]
    one_row = make_loader(batch_size=1, length=48)
    expected = torch.cat([batch.input_ids for batch in islice(one_row, len(shapes))]).flatten()
    assert torch.cat([batch.input_ids.flatten() for batch in got]).equal(expected)


def test_an_impossible_shape_is_refused_and_changes_nothing(make_loader):
    loader = make_loader()
    for shape, problem in [((0, 32), "batch_size must be at least 1"), ((3, 1), "max_seq_length must be at least 2")]:
        with pytest.raises(InputError, match=problem):
            loader.set_shape(*shape)
    assert next(iter(loader)).input_ids.shape == (3, 32)


def test_the_state_is_small(make_loader):
    loader = make_loader()
    list(islice(loader, 30))
    assert len(json.dumps(loader.state_dict())) < 1000


def test_torchs_random_numbers_are_left_alone(make_loader):
    torch.manual_seed(0)
    expected = torch.rand(3)
    for num_workers in (0, 1):
        torch.manual_seed(0)
        list(islice(make_loader(num_workers=num_workers), 5))
        assert torch.equal(torch.rand(3), expected)


def test_a_state_of_other_data_is_refused(make_loader, tmp_path):
    loader = make_loader()
    list(islice(loader, 2))
    state = loader.state_dict()
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": "other"}] * 60)
    for changed, problem in [
        ({"paths": [other]}, "the files' contents"),
        ({"seed": 6}, "seed or data.shuffle"),
        ({"shuffle": False}, "seed or data.shuffle"),
        ({"document_separator": None}, "data.document_separator"),
    ]:
        with pytest.raises(InputError, match=f"does not fit this run: .*({problem})"):
            make_loader(**changed).load_state_dict(state)
    for old, version in [({**state, "version": 99}, 99), ([{**state, "version": 2, "rank": 0}], 2)]:
        with pytest.raises(InputError, match=f"data state has version {version}, this program reads 3: resume with"):
            make_loader().load_state_dict(old)


def test_moved_files_resume(make_loader, corpus, tmp_path):
    loader = make_loader()
    expected = as_lists(islice(loader, 3))[2:]
    loader = make_loader()
    list(islice(loader, 2))
    moved = []
    for number, path in enumerate(corpus):
        moved.append(str(tmp_path / f"moved{number}"))
        os.rename(path, moved[-1])
    again = make_loader(paths=moved)
    again.load_state_dict(loader.state_dict())
    assert as_lists(islice(again, 1)) == expected
    assert again.fingerprint() == loader.fingerprint()


def test_the_fingerprint_is_that_of_the_documents_in_order(make_loader):
    one = make_loader().fingerprint()
    assert one == make_loader(num_workers=2, batch_size=1, length=64).fingerprint()
    assert one == make_loader(rank=1, world_size=2).fingerprint()
    assert one != make_loader(seed=6).fingerprint()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_records_are_counted_once_by_kind_with_their_places(make_loader, corpus, caplog, num_workers):
    loader = make_loader(num_workers=num_workers)
    for _ in loader:
        if loader.epoch == 2:
            break
    report = loader.report()
    assert {kind: (skipped.count, skipped.examples) for kind, skipped in report.skipped.items()} == {
        "broken JSON": (
            1,
            [f"{corpus[0]}:11: Expecting property name enclosed in double quotes at column 2"],
        ),
        "missing key": (1, [f"{corpus[1]}:6: no key 'text', keys seen: 'title'"]),
        "empty text": (1, [f"{corpus[1]}:7: key 'text' holds white space alone"]),
    }
    assert report.blank_lines == 1
    assert "3 records skipped: 1 broken JSON, 1 empty text, 1 missing key" in report.summary()
    assert f"broken JSON first at {corpus[0]}:11" in report.summary()
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 3


@pytest.mark.parametrize("num_workers", [0, 1])
def test_on_bad_record_error_stops_at_the_first(make_loader, corpus, num_workers):
    loader = make_loader(split="eval", on_bad_record="error", num_workers=num_workers)
    with pytest.raises(InputError) as caught:
        list(loader)
    assert str(caught.value).startswith(f"{corpus[0]}:11: broken JSON, Expecting property name")
    assert "\n" not in str(caught.value)


def test_on_bad_record_error_holds_after_a_run_that_skipped(make_loader, corpus):
    skipping = make_loader()
    batches = iter(skipping)
    while not skipping.report().skipped:
        next(batches)
    state = skipping.state_dict()
    strict = make_loader(on_bad_record="error")
    state["place"] = [0, 0, 0]  # before the record that was skipped
    strict.load_state_dict(state)
    with pytest.raises(InputError, match=r"data\.on_bad_record: skip leaves such records out"):
        for _, _ in zip(range(200), strict, strict=False):
            pass


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_file_that_changes_while_training_ends_in_one_sentence(make_loader, corpus, num_workers):
    loader = make_loader(num_workers=num_workers, batch_size=1, length=8)
    batches = iter(loader)
    next(batches)
    os.utime(corpus[1], ns=(0, 0))
    with pytest.raises(InputError, match="second.jsonl has changed since it was indexed") as caught:
        list(islice(batches, 5000))
    assert "\n" not in str(caught.value)


def test_impossible_requests(make_loader, tmp_path):
    for options, problem in [
        ({"length": 1}, "max_seq_length must be at least 2"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"paths": [str(tmp_path / "none.jsonl")]}, "data.train_paths: .*none.jsonl does not exist"),
        (
            {"paths": [write_jsonl(tmp_path / "bad.jsonl", ["{"])]},
            "none of the 1 records of .*bad.jsonl:1: broken JSON",
        ),
    ]:
        with pytest.raises(InputError, match=problem):
            make_loader(**options)


def test_one_document_is_enough_for_any_number_of_processes(make_loader, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    batch = next(iter(make_loader(paths=[path], rank=2, world_size=3, length=12)))
    assert batch.position_ids.tolist() == [[0, 1] * 6] * 3


def test_only_the_first_process_tells_what_is_skipped(make_loader, caplog):
    for rank in (1, 0):
        list(make_loader(split="eval", rank=rank, world_size=2))
        assert len(caplog.records) == (0 if rank else 3)


def test_one_short_document_fills_rows_by_repetition(make_loader, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    batch = next(iter(make_loader(paths=[path], length=12, batch_size=1)))
    assert batch.position_ids.tolist() == [[0, 1] * 6]


def test_a_document_much_longer_than_a_row(make_loader, tokenizer, tmp_path):
    text = " ".join(f"word{number}" for number in range(3000))
    path = write_jsonl(tmp_path / "long.jsonl", [{"text": text}, {"text": "end"}])
    batches = list(make_loader(split="eval", paths=[path], length=128))
    assert texts_in(batches, tokenizer) == [text, "end"]


def test_documents_gives_texts_in_file_order_with_their_places(corpus, caplog):
    found = list(documents(DataSettings(eval_paths=corpus), "eval"))
    assert [text for text, _ in found] == [text_of(number) for number in range(60)]
    assert found[10][1] == f"{corpus[0]}:13"
    assert "3 records skipped" in caplog.text
    with pytest.raises(InputError, match="first.jsonl:11: broken JSON"):
        list(documents(DataSettings(eval_paths=corpus, on_bad_record="error"), "eval"))


def test_settings_accept_one_path_and_refuse_what_is_unknown():
    assert DataSettings.parse({"train_paths": "a.jsonl"}).train_paths == ("a.jsonl",)
    with pytest.raises(InputError, match="did you mean data.num_workers"):
        DataSettings.parse({"num_worker": 2}, where="data")
    for key, value in [("data_mode", "eager"), ("packing", "first_fit"), ("structured_task_prob", 1.5)]:
        with pytest.raises(InputError, match=f"data.{key}"):
            DataSettings.parse({key: value}, where="data")


SLOW_READER = """
import signal, sys, time
from fusiontree.data import DataSettings, build_loader, load_tokenizer
loader = build_loader(DataSettings(train_paths=sys.argv[1], num_workers=2), load_tokenizer(sys.argv[2]), batch_size=2,
                      max_seq_length=16)
batches = iter(loader)
next(batches)
signal.signal(signal.SIGTERM, signal.default_int_handler)
print("ready", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    for _ in range(200):
        next(batches)
    print("still reading", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_stops_no_worker(tokenizer, corpus, tmp_path, number):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_READER, corpus[0], str(tmp_path / "tokenizer")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    os.killpg(process.pid, number)
    output, errors = process.communicate(timeout=60)
    assert output == "still reading\n"
    # Not a word from the tokenizer, the workers or the interpreter but the one about the broken line.
    assert [line for line in errors.splitlines() if "first.jsonl:11" not in line] == []
    assert process.returncode == 0


def test_sources_are_mixed_by_their_weights(corpus, tokenizer, tmp_path):
    third = write_jsonl(tmp_path / "third.jsonl", [{"body": f"rare {number}"} for number in range(7)])
    settings = DataSettings(
        train_sources=(
            {"paths": corpus[0], "weight": 3},
            {"paths": corpus[1], "weight": 1},
            {"paths": third, "weight": 0.5, "text_key": "body"},
        )
    )

    def loader(**changes):
        return build_loader(settings, tokenizer, **{"batch_size": 2, "max_seq_length": 64, "seed": 1} | changes)

    mixed = loader()
    texts = texts_in(list(islice(mixed, 120)), tokenizer)[:-1]
    first = sum(text in {text_of(n) for n in range(35)} for text in texts)
    third_count = sum(text.startswith("rare") for text in texts)
    # Records that hold no text have their places too: 2 of 37 of the first source, 2 of 27 of the second.
    assert abs(first / len(texts) - 3 / 4.5) < 0.03 and abs(third_count / len(texts) - 0.5 / 4.5) < 0.02
    state = mixed.state_dict()
    again = loader()
    again.load_state_dict(state)
    assert as_lists(islice(again, 5)) == as_lists(islice(mixed, 5))
    with pytest.raises(InputError, match="weights of data.train_sources differ"):
        sources = tuple(source.model_copy(update={"weight": 1.0}) for source in settings.train_sources)
        same_files = settings.model_copy(update={"train_sources": sources})
        build_loader(same_files, tokenizer, batch_size=2, max_seq_length=64, seed=1).load_state_dict(state)
    with pytest.raises(InputError, match="train_paths and data.train_sources are both given"):
        build_loader(
            settings.model_copy(update={"train_paths": tuple(corpus)}), tokenizer, batch_size=2, max_seq_length=64
        )


def test_a_bad_record_of_a_small_source_counts_once_and_of_a_rare_one_is_not_missed(tokenizer, tmp_path):
    rare = write_jsonl(tmp_path / "rare.jsonl", [{"text": f"rare {n}"} for n in range(90)] + ["{broken"] * 10)
    small = write_jsonl(tmp_path / "small.jsonl", [{"text": f"small {n}"} for n in range(9)] + ["{broken"])
    settings = DataSettings(train_sources=({"paths": rare, "weight": 1}, {"paths": small, "weight": 9}), shuffle=False)
    loader = build_loader(settings, tokenizer, batch_size=8, max_seq_length=64)
    batches = iter(loader)
    for _ in range(60):
        next(batches)
    assert loader.report().reasons() == "11 broken JSON"
