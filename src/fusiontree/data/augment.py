"""Long-context tasks written into documents: a fact to find again, a list to recall, a sequence to copy.

What a document gets follows from (seed, epoch, number of its record) and from the document alone, so any
number of workers and resume gives the same, and each epoch something else. It works on token ids: a clue goes in
somewhere, its question and answer come at the document's end. Only the answer is learnt (see `packing`): of clue and
question nothing could be known beforehand. Where packing cuts a document between the two, the answer cannot be known
either; with best fit that is so only in documents longer than a row.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from typing_extensions import Self

from fusiontree.data.inspection import script_of
from fusiontree.data.tokenizer import DocumentEncoder
from fusiontree.errors import InputError

MIN_TOKENS = 32  # a shorter document is left alone: it would be all task

_SCRIPT_TOKENS = 64  # of a document, which decide between English and Chinese
_LOOK_AHEAD = 48  # tokens within which a fact moves on to the end of a sentence
_CONTEXT = 8  # tokens that are decoded to see what stands before a place: at least a character's four bytes
_DIGITS = "0123456789"
_DIGITS_OF_A_NEEDLE = 5
_DIGITS_OF_A_VALUE = 3

_T = TypeVar("_T")

TaskKind = Literal["needle", "recall", "copy"]
"""A fact asked for, a value of a list, a sequence repeated."""


class Task(NamedTuple):
    """A clue, and what is asked about it at the document's end: questions, each with its answer."""

    clue: str
    asked: list[tuple[str, str]]
    kind: TaskKind


class Answer(NamedTuple):
    """Where an answer stands in its document: the tokens start <= place < stop."""

    kind: TaskKind
    start: int
    stop: int
    distance: int
    """Tokens between its clue's end and its question's start."""


class Draws:
    """Random choices that are the same in every version of Python: its `random()` is, and all else is made of that."""

    def __init__(self, name: str) -> None:
        self._random = random.Random(name).random

    def happens(self, probability: float) -> bool:
        return self._random() < probability

    def below(self, bound: int) -> int:
        return int(self._random() * bound)

    def one(self, choices: Sequence[_T]) -> _T:
        return choices[self.below(len(choices))]

    def some(self, choices: Sequence[_T], count: int) -> list[_T]:
        """`count` different ones, in random order."""
        rest = list(choices)
        for i in range(count):
            j = i + self.below(len(rest) - i)
            rest[i], rest[j] = rest[j], rest[i]
        return rest[:count]

    def digits(self, count: int) -> str:
        """A number of so many digits, the first not 0."""
        return str(1 + self.below(9)) + "".join(self.one(_DIGITS) for _ in range(count - 1))


@dataclass(frozen=True)
class Phrases:
    """What the tasks are worded in. A needle's names and a list's keys differ, so no clue answers another's question.

    needles: facts about {name} and {number}, each with its question.
    question, answer: how these stand in a document, the answer as it is continued right behind the question.
    """

    needles: tuple[tuple[str, str], ...]
    names: tuple[str, ...]
    keys: tuple[str, ...]
    question: str
    answer: str
    pair: str
    comma: str
    list_clue: str
    list_question: str
    space: str
    copy_clue: str
    copy_question: str


ENGLISH = Phrases(
    needles=(
        (" The secret code of {name} is {number}.", "What is the secret code of {name}?"),
        (" Remember that the key to {name} is {number}.", "What is the key to {name}?"),
        (" The number assigned to {name} is {number}.", "Which number is assigned to {name}?"),
        (" In the register, {name} is entered under {number}.", "Under which number is {name} entered?"),
    ),
    names=tuple(
        "amber basalt bronze cedar chalk clay cobalt copper coral crystal ebony emerald flint garnet granite graphite "
        "indigo ivory jade jasper linen maple marble nickel onyx opal pearl pewter quartz ruby saffron sandstone "
        "sapphire silver slate steel teal topaz velvet walnut willow zinc".split()
    ),
    keys=tuple(
        "ant badger bear beaver camel crane crow deer dolphin eagle falcon ferret fox frog goat goose hare hawk heron "
        "horse lark lion lizard lynx mole moose moth otter owl panda quail rabbit raven seal shark snail stork swan "
        "tiger toad wolf zebra".split()
    ),
    question="\nQuestion: {}\nAnswer:",
    answer=" {}",
    pair="{} = {}",
    comma=", ",
    list_clue="List: {}.",
    list_question="Which value has {} in the list?",
    space=" ",
    copy_clue="Sequence: {}.",
    copy_question="\nThe sequence once more:",
)

CHINESE = Phrases(
    needles=(
        ("{name}的密码是{number}。", "{name}的密码是什么？"),
        ("请记住，{name}的编号是{number}。", "{name}的编号是什么？"),
        ("{name}对应的数字是{number}。", "{name}对应的数字是什么？"),
        ("登记簿上，{name}记在第{number}号。", "{name}记在第几号？"),
    ),
    names=tuple(
        "琥珀 玄武岩 青铜 雪松 白垩 陶土 钴蓝 黄铜 珊瑚 水晶 乌木 翡翠 燧石 石榴石 花岗岩 石墨 靛蓝 象牙 碧玉 亚麻 "
        "枫木 大理石 白银 玛瑙 蛋白石 珍珠 石英 红宝石 砂岩 蓝宝石 石板 钢铁 黄玉 天鹅绒 胡桃木 柳木".split()
    ),
    keys=tuple(
        "蚂蚁 獾 刺猬 海狸 骆驼 仙鹤 乌鸦 鹿 海豚 老鹰 猎鹰 狐狸 青蛙 山羊 大雁 野兔 白鹭 骏马 云雀 狮子 蜥蜴 猞猁 "
        "鼹鼠 飞蛾 水獭 猫头鹰 熊猫 鹌鹑 海豹 鲨鱼 蜗牛 白鹳 天鹅 老虎 蟾蜍 斑马".split()
    ),
    question="\n问题：{}\n答案：",
    answer="{}",
    pair="{}={}",
    comma="，",
    list_clue="列表：{}。",
    list_question="列表中{}的值是什么？",
    space=" ",
    copy_clue="序列：{}。",
    copy_question="\n再写一遍这个序列：",
)


def needle_task(draws: Draws, phrases: Phrases) -> Task:
    """A fact with a number in it, and the question for the number."""
    fact, question = draws.one(phrases.needles)
    name, number = draws.one(phrases.names), draws.digits(_DIGITS_OF_A_NEEDLE)
    asked = phrases.question.format(question.format(name=name)), phrases.answer.format(number)
    return Task(fact.format(name=name, number=number), [asked], "needle")


def structured_task(draws: Draws, phrases: Phrases) -> Task:
    """A list of keys and values, and questions for some of the values; or a sequence, to be repeated."""
    if draws.happens(0.5):
        keys = draws.some(phrases.keys, 4 + draws.below(13))
        values = {key: draws.digits(_DIGITS_OF_A_VALUE) for key in keys}
        pairs = phrases.comma.join(phrases.pair.format(key, value) for key, value in values.items())
        asked = [
            (phrases.question.format(phrases.list_question.format(key)), phrases.answer.format(values[key]))
            for key in draws.some(keys, 1 + draws.below(3))
        ]
        return Task(phrases.list_clue.format(pairs), asked, "recall")
    items = [
        draws.one(phrases.keys) if draws.happens(0.5) else draws.digits(_DIGITS_OF_A_VALUE)
        for _ in range(6 + draws.below(19))
    ]
    sequence = phrases.space.join(items)
    asked = [(phrases.copy_question, phrases.answer.format(sequence))]
    return Task(phrases.copy_clue.format(sequence), asked, "copy")


@dataclass(frozen=True, kw_only=True)
class LongContextTasks:
    """Writes tasks into some of the documents; the others stay what they are.

    needle_in_haystack_prob: share of documents that get a fact at a random place, at the end of a sentence where one
        is near, and its question and answer at the document's end.
    structured_task_prob: share that get a list or a sequence, before or behind the document, and what is asked about it
        at its end.
    seed: of all draws.
    encode, decode: the run's tokenizer, without special tokens.
    opening: ids that stay first in a document that begins with them; separator_id: id that stays last where it is.
    without_digits: what to do about a tokenizer that cannot write digits, for the message.

    Raises:
        InputError: the tokenizer cannot write digits.
    """

    needle_in_haystack_prob: float
    structured_task_prob: float
    seed: int
    encode: Callable[[str], Sequence[int]]
    decode: Callable[[list[int]], str]
    opening: tuple[int, ...] = ()
    separator_id: int | None = None
    without_digits: str = (
        "set data.needle_in_haystack_prob and data.structured_task_prob to 0 or take another tokenizer"
    )

    def __post_init__(self) -> None:
        if self.decode(list(self.encode(_DIGITS))).replace(" ", "") != _DIGITS:
            raise InputError(
                "long-context tasks write numbers into documents, and the tokenizer has no digits: "
                + self.without_digits
            )

    @classmethod
    def for_encoder(cls, encoder: DocumentEncoder, **fields: Any) -> Self:
        """For the documents of `encoder`; `fields` are those that it does not determine."""
        tokenizer = encoder.tokenizer
        return cls(
            encode=lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
            decode=lambda ids: str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)),
            opening=tuple(encoder.prefix),
            separator_id=encoder.separator_id,
            **fields,
        )

    def identity(self) -> dict[str, object]:
        """What must be equal for the same documents to come out; plain values."""
        return {
            "needle_in_haystack_prob": self.needle_in_haystack_prob,
            "structured_task_prob": self.structured_task_prob,
            "seed": self.seed,
        }

    def __call__(self, ids: np.ndarray, epoch: int, record: int) -> np.ndarray:
        """The signed int32 ids of a document with its tasks: `ids` itself where it gets none.

        Args:
            record: number of the document's record among all.
        """
        return self.write(ids, epoch, record)[0]

    def write(self, ids: np.ndarray, epoch: int, record: int) -> tuple[np.ndarray, list[Answer]]:
        """The same ids, and where the answers stand in them, first to last."""
        if len(ids) < MIN_TOKENS:
            return ids, []
        needle, structured = (Draws(f"{kind}/{self.seed}/{epoch}/{record}") for kind in ("needle", "structured"))
        has_needle = needle.happens(self.needle_in_haystack_prob)
        has_structured = structured.happens(self.structured_task_prob)
        if not has_needle and not has_structured:
            return ids, []
        plain = np.where(ids < 0, ~ids, ids).tolist()
        start = len(self.opening) if tuple(plain[: len(self.opening)]) == self.opening else 0
        stop = len(ids) - (plain[-1] == self.separator_id)
        phrases = self._phrases_for(plain[start : min(stop, start + _SCRIPT_TOKENS)])
        parts, asked = [ids[start:stop]], []
        if has_needle:
            task = needle_task(needle, phrases)
            place = self._place_near(plain, start + needle.below(stop - start + 1), start, stop)
            clue = self._read(task.clue)
            parts = [ids[start:place], clue, ids[place:stop]]
            asked.append((task, clue))
        if has_structured:
            task = structured_task(structured, phrases)
            is_before = structured.happens(0.5)
            clue = self._read(task.clue + "\n" if is_before else "\n" + task.clue)
            parts.insert(0 if is_before else len(parts), clue)
            asked.append((task, clue))
        parts.insert(0, ids[:start])
        ends = {id(part): int(end) for part, end in zip(parts, np.cumsum([len(part) for part in parts]), strict=True)}
        length, answers = sum(map(len, parts)), []
        for task, clue in asked:
            for question, answer in task.asked:
                question_ids, answer_ids = self._read(question), np.array(self.encode(answer), dtype=np.int32)
                first = length + len(question_ids)
                answers.append(Answer(task.kind, first, first + len(answer_ids), length - ends[id(clue)]))
                parts += [question_ids, answer_ids]
                length = first + len(answer_ids)
        return np.concatenate((*parts, ids[stop:])), answers

    def _read(self, text: str) -> np.ndarray:
        return ~np.array(self.encode(text), dtype=np.int32)

    def _phrases_for(self, ids: list[int]) -> Phrases:
        letters = [character for character in self.decode(ids) if character.isalpha()]
        chinese = sum(script_of(character) == "Han" for character in letters)
        return CHINESE if 2 * chinese > len(letters) else ENGLISH

    def _place_near(self, ids: list[int], wanted: int, start: int, stop: int) -> int:
        """The best place for a fact from `wanted` on: behind a sentence, else between words, else between characters.

        A token may end within a character, where the fact would leave both halves unreadable.
        """
        between_words = between_characters = None
        for place in range(wanted, min(stop, wanted + _LOOK_AHEAD)):
            if place == start:
                return place
            context = max(start, place - _CONTEXT)
            left = self.decode(ids[context:place])
            if left.endswith("\ufffd"):
                continue
            # Decoded with what stands before: a tokenizer may drop the space that a text begins with.
            is_word_end = self.decode(ids[context : place + 1])[len(left) :][:1].isspace()
            if left.endswith(("\n", "。", "！", "？")) or (is_word_end and left.endswith((".", "!", "?"))):
                return place
            if is_word_end and between_words is None:
                between_words = place
            if between_characters is None:
                between_characters = place
        return next((place for place in (between_words, between_characters) if place is not None), stop)
