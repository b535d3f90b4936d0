"""Tasks in documents: there as often as asked, in order, the same everywhere, and nothing else is touched."""

from __future__ import annotations

import json
import random
import subprocess
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonl_files import write_jsonl

import warm
from fusiontree.config import InputError
from fusiontree.data.augment import (
    CHINESE,
    ENGLISH,
    MIN_TOKENS,
    Draws,
    LongContextTasks,
    needle_task,
    structured_task,
)

SEPARATOR = 256
OPENING = 257


def encode(text: str) -> list[int]:
    return list(text.encode("utf-8"))


def decode(ids) -> str:
    return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


def tasks(needle=0.0, structured=0.0, seed=1, **changes) -> LongContextTasks:
    """On bytes, so that every character of Chinese is three tokens."""
    options = {"encode": encode, "decode": decode, "opening": (OPENING,), "separator_id": SEPARATOR} | changes
    return LongContextTasks(needle_in_haystack_prob=needle, structured_task_prob=structured, seed=seed, **options)


def document(text: str) -> np.ndarray:
    return np.array([OPENING, *encode(text), SEPARATOR], dtype=np.int32)


def text_of(ids: np.ndarray) -> str:
    return decode(np.where(ids < 0, ~ids, ids).tolist())


def learnt(ids: np.ndarray, among: str = "") -> str:
    return decode(ids[ids >= 0].tolist())


ENGLISH_TEXT = (
    "The river runs past the old mill. Two boats lie there, 3.50 metres long! Nobody has seen them sail. " * 3
)
CHINESE_TEXT = "子曰：学而时习之，不亦说乎？有朋自远方来，不亦乐乎？人不知而不愠，不亦君子乎？" * 3


@given(
    ids=st.lists(st.integers(-258, 255), min_size=MIN_TOKENS, max_size=80), epoch=st.integers(0, 9), n=st.integers(0, 9)
)
def test_at_probability_0_no_byte_changes(ids, epoch, n):
    ids = np.array(ids, dtype=np.int32)
    assert tasks()(ids, epoch, n) is ids


@pytest.mark.parametrize("text, phrases", [(ENGLISH_TEXT, ENGLISH), (CHINESE_TEXT, CHINESE)])
def test_at_probability_1_every_document_has_fact_question_and_answer_in_order(text, phrases):
    augment = tasks(needle=1.0)
    seen = set()
    for record in range(200):
        task = needle_task(expected_draws("needle", record), phrases)
        ((question, answer),) = task.asked
        ids = augment(document(text), 0, record)
        assert ids.dtype == np.int32 and ids[0] == OPENING and ids[-1] == SEPARATOR
        whole = text_of(ids)
        assert whole.endswith(question + answer)
        before, fact, behind = whole.removesuffix(question + answer).partition(task.clue)
        assert fact and before + behind == text
        assert whole.count(answer.strip()) == 2  # in the fact, and where it is asked for
        added = np.where(ids < 0)[0]
        assert len(added) == len(encode(task.clue + question))
        assert decode(ids[-1 - len(encode(answer)) : -1].tolist()) == answer  # learnt: none is below 0
        seen.add(len(before))
        assert before == "" or before[-1] in ".!？" or len(before) > len(text) - 48
    assert len(seen) > 6


def expected_draws(kind: str, record: int, seed: int = 1, epoch: int = 0) -> Draws:
    draws = Draws(f"{kind}/{seed}/{epoch}/{record}")
    assert draws.happens(1.0)
    return draws


@pytest.mark.parametrize("text, phrases", [(ENGLISH_TEXT, ENGLISH), (CHINESE_TEXT, CHINESE)])
def test_lists_and_sequences_stand_before_or_behind_and_are_asked_for_at_the_end(text, phrases):
    augment = tasks(structured=1.0)
    layouts = set()
    for record in range(100):
        task = structured_task(expected_draws("structured", record), phrases)
        asked = "".join(question + answer for question, answer in task.asked)
        ids = augment(document(text), 0, record)
        assert ids[0] == OPENING and ids[-1] == SEPARATOR
        whole = text_of(ids)
        assert whole in (task.clue + "\n" + text + asked, text + "\n" + task.clue + asked)
        assert learnt(ids) == text + "".join(answer for _, answer in task.asked)
        for question, answer in task.asked:
            key = next((key for key in phrases.keys if key in question), None)
            assert answer.strip() in task.clue
            if key is not None:
                assert phrases.pair.format(key, answer.strip()) in task.clue
        layouts.add((whole.startswith(task.clue), len(task.asked)))
    assert len(layouts) == 6  # before or behind, with one to three questions


@pytest.mark.parametrize("text", [ENGLISH_TEXT, CHINESE_TEXT])
def test_it_says_where_answers_stand_and_how_far_behind_their_clue_they_are_asked_for(text):
    augment = tasks(needle=1.0, structured=1.0)
    kinds = set()
    for record in range(40):
        ids, answers = augment.write(~document(text), 0, record)
        assert ids.tobytes() == augment(~document(text), 0, record).tobytes()
        # All but the answers is marked as read.
        assert [place for answer in answers for place in range(answer.start, answer.stop)] == np.where(ids >= 0)[
            0
        ].tolist()
        plain = bytes(np.where(ids < 0, ~ids, ids)[1:-1].tolist())
        phrases = ENGLISH if text is ENGLISH_TEXT else CHINESE
        made = [
            needle_task(expected_draws("needle", record), phrases),
            structured_task(expected_draws("structured", record), phrases),
        ]
        expected = [(task, question, said) for task in made for question, said in task.asked]
        for answer, (task, question, said) in zip(answers, expected, strict=True):
            clue, question, said = task.clue.encode(), question.encode(), said.encode()
            assert answer.kind == task.kind
            # The ids of a text on bytes begin behind the opening token.
            assert plain[answer.start - 1 : answer.stop - 1] == said
            assert plain[: answer.start - 1].endswith(question)
            between = plain[: answer.start - 1].removesuffix(question)[plain.index(clue) + len(clue) :]
            is_before = task.kind != "needle" and plain.startswith(clue)  # a line's end belongs to such a clue
            assert answer.distance == len(between) - is_before
            kinds.add(answer.kind)
    assert kinds == {"needle", "recall", "copy"}


def test_without_a_task_there_is_no_answer():
    assert tasks().write(document(ENGLISH_TEXT), 0, 0)[1] == []
    assert tasks(1.0, 1.0).write(document("short"), 0, 0)[1] == []


def test_both_in_one_document():
    ids = tasks(needle=1.0, structured=1.0)(document(ENGLISH_TEXT), 0, 7)
    needle = needle_task(expected_draws("needle", 7), ENGLISH)
    structured = structured_task(expected_draws("structured", 7), ENGLISH)
    asked = "".join(question + answer for question, answer in needle.asked + structured.asked)
    whole = text_of(ids)
    assert whole.endswith(asked)
    assert needle.clue in whole and structured.clue in whole
    rest = whole.removesuffix(asked).replace(needle.clue, "").replace(structured.clue, "").strip("\n")
    assert rest == ENGLISH_TEXT


@given(text=st.text(min_size=10, max_size=60), record=st.integers(0, 1000))
@settings(deadline=None)
def test_no_character_is_torn(text, record):
    ids = document(text)
    augmented = tasks(needle=1.0)(ids, 0, record)
    if len(ids) < MIN_TOKENS:
        assert augmented is ids
        return
    assert text_of(augmented).count("\ufffd") == text.count("\ufffd")
    assert [i for i in augmented.tolist() if i >= 0][: len(ids) - 1] == ids[:-1].tolist()


def test_words_are_kept_whole_where_no_sentence_ends_nearby():
    text = "word " * 60
    for record in range(50):
        task = needle_task(expected_draws("needle", record), ENGLISH)
        before = text_of(tasks(needle=1.0)(document(text), 0, record)).partition(task.clue)[0]
        assert before == "" or before.endswith("word") or before == text


def test_what_is_read_but_not_learnt_stays_so():
    ids = document(ENGLISH_TEXT)
    ids[5:200] = ~ids[5:200]
    augmented = tasks(needle=1.0, structured=1.0)(ids, 0, 3)
    assert learnt(augmented).startswith(ENGLISH_TEXT[:4] + ENGLISH_TEXT[199:])


def test_short_documents_are_left_alone():
    for length in (1, 5, MIN_TOKENS - 1):
        ids = np.full(length, 65, dtype=np.int32)
        assert tasks(1.0, 1.0)(ids, 0, 0) is ids
    ids = np.full(MIN_TOKENS, 65, dtype=np.int32)
    assert len(tasks(1.0, 1.0)(ids, 0, 0)) > MIN_TOKENS


def test_without_opening_or_separator_nothing_is_kept_apart():
    ids = tasks(needle=1.0, opening=(), separator_id=None)(np.array(encode(ENGLISH_TEXT), dtype=np.int32), 0, 0)
    ((_, answer),) = needle_task(expected_draws("needle", 0), ENGLISH).asked
    assert text_of(ids).endswith(answer)


def test_probabilities_are_shares_of_the_documents():
    augment = tasks(needle=0.3, structured=0.2)
    needles = lists = 0
    for record in range(2000):
        whole = text_of(augment(document(ENGLISH_TEXT), 0, record))
        lists += "List: " in whole or "Sequence: " in whole
        needles += any(question.partition("{")[0] in whole for _, question in ENGLISH.needles)
    assert abs(needles / 2000 - 0.3) < 0.04
    assert abs(lists / 2000 - 0.2) < 0.04


def test_epoch_record_and_seed_each_make_another_document():
    ids = document(ENGLISH_TEXT)
    made = {
        tasks(1.0, 1.0, seed=seed)(ids, epoch, record).tobytes()
        for seed in (0, 1)
        for epoch in (0, 1)
        for record in (0, 1)
    }
    assert len(made) == 8


def test_one_task_does_not_depend_on_the_other():
    ids = document(ENGLISH_TEXT)
    task = needle_task(expected_draws("needle", 4), ENGLISH)
    for structured in (0.0, 0.5, 1.0):
        assert task.clue in text_of(tasks(1.0, structured)(ids, 0, 4))


def test_the_draws_are_fixed_for_all_time():
    draws = Draws("needle/1/0/0")
    assert [draws.below(100) for _ in range(4)] == [17, 61, 42, 2]
    asked = "\nQuestion: What is the key to bronze?\nAnswer:", " 66155"
    assert needle_task(Draws("a"), ENGLISH) == (" Remember that the key to bronze is 66155.", [asked], "needle")


def test_no_name_or_key_stands_within_another():
    for phrases in (ENGLISH, CHINESE):
        for words in (phrases.names, phrases.keys):
            assert not any(one in other for i, one in enumerate(words) for j, other in enumerate(words) if i != j)
        assert not set(phrases.names) & set(phrases.keys)


def test_a_tokenizer_without_digits_is_refused():
    with pytest.raises(InputError, match="the tokenizer has no digits: set data.needle_in_.* to 0 or") as caught:
        tasks(needle=0.5, encode=lambda text: encode(text.replace("7", "?")))
    assert "\n" not in str(caught.value)


# Through the loader


AUGMENTED = {"needle_in_haystack_prob": 0.6, "structured_task_prob": 0.5}


def as_lists(batches) -> list[tuple[list, list, list]]:
    return [(b.input_ids.tolist(), b.labels.tolist(), b.position_ids.tolist()) for b in batches]


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_batches_do_not_depend_on_the_number_of_workers(make_loader, packing):
    options = AUGMENTED | {"packing": packing}
    expected = as_lists(islice(make_loader(**options), 30))
    assert expected != as_lists(islice(make_loader(packing=packing), 30))
    for num_workers in (1, 2):
        assert as_lists(islice(make_loader(**options, num_workers=num_workers), 30)) == expected


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_resuming_anywhere_is_never_stopping(make_loader, packing):
    options = AUGMENTED | {"packing": packing, "length": 128, "batch_size": 2}
    expected = as_lists(islice(make_loader(**options), 80))
    draw = random.Random(1)
    for _ in range(4):
        stop = draw.randrange(80)
        stopped, resumed = make_loader(**options), make_loader(**options)
        list(islice(stopped, stop))
        resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
        assert as_lists(islice(resumed, 80 - stop)) == expected[stop:]


def test_at_probability_0_batches_are_those_without(make_loader):
    zero = make_loader(needle_in_haystack_prob=0.0, structured_task_prob=0.0)
    assert as_lists(islice(zero, 20)) == as_lists(islice(make_loader(), 20))
    assert zero.fingerprint() == make_loader().fingerprint() != make_loader(**AUGMENTED).fingerprint()


def test_evaluation_reads_the_texts_as_they_are(make_loader):
    augmented = make_loader(split="eval", **AUGMENTED, packing="best_fit")
    assert as_lists(augmented) == as_lists(make_loader(split="eval"))


def test_every_long_document_has_its_tasks_and_each_epoch_others(make_loader, tokenizer, tmp_path):
    texts = [f"Text {number}: " + "the old mill stands by the river. " * 4 for number in range(5)]
    path = write_jsonl(tmp_path / "long.jsonl", [{"text": text} for text in texts])
    loader = make_loader(paths=[path], needle_in_haystack_prob=1.0, length=512, packing="best_fit", shuffle=False)
    rows = [row for batch in islice(loader, 8) for row in zip(batch.input_ids, batch.position_ids, strict=True)]
    found = [
        document
        for ids, _ in rows
        for document in tokenizer.decode(ids).split(tokenizer.eos_token)
        if document.startswith("Text")
    ]
    assert len(found) > 15
    assert len(set(found)) == len(found)
    for document in found:
        question, _, answer = document.rpartition("\nAnswer: ")
        assert question.count(answer) == 1 and answer.isdigit()
        assert question.index(answer) < question.index("\nQuestion: ")


def test_a_state_of_other_tasks_is_refused(make_loader):
    loader = make_loader(**AUGMENTED)
    list(islice(loader, 2))
    for changed in ({}, AUGMENTED | {"structured_task_prob": 0.1}):
        with pytest.raises(InputError, match="does not fit this run: data.needle_in_haystack_prob or data.structured"):
            make_loader(**changed).load_state_dict(loader.state_dict())
    with pytest.raises(InputError, match="does not fit this run: .*seed"):
        make_loader(**AUGMENTED, shuffle=False, seed=8).load_state_dict(
            make_loader(**AUGMENTED, shuffle=False, seed=9).state_dict()
        )


FIRST_BATCHES = """
import json, sys
from itertools import islice
from fusiontree.data import DataSettings, build_loader, load_tokenizer
settings = DataSettings(train_paths=sys.argv[1], needle_in_haystack_prob=0.6, structured_task_prob=0.5)
loader = build_loader(settings, load_tokenizer(sys.argv[2]), batch_size=3, max_seq_length=32, seed=5)
print(json.dumps([batch.input_ids.tolist() for batch in islice(loader, 20)]))
"""


def test_another_process_writes_the_same(make_loader, tokenizer, corpus, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    command = [warm.python(), "-c", FIRST_BATCHES, corpus[0], str(tmp_path / "tokenizer")]
    there = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert there == [batch.input_ids.tolist() for batch in islice(make_loader(paths=corpus[:1], **AUGMENTED), 20)]
