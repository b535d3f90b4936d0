"""`fusiontree chat`, talked to through its standard input."""

from __future__ import annotations

import io
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fusiontree.cli import main
from fusiontree.deploy.loading import load
from fusiontree.deploy.runtime import InferenceRuntime
from tiny_models import save_tiny_model

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoTokenizer

    folder = save_tiny_model(tmp_path_factory.mktemp("model"), corpus / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def talk(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A function that says lines to the command and gives what comes back on both outputs."""

    def say(
        *lines: str, options: tuple[str, ...] = (), model: Path = folder, greedy: bool = True
    ) -> tuple[int, list[str], str]:
        content = "".join(line + "\n" for line in lines).encode()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
        capsys.readouterr()
        how = ["--greedy"] if greedy else []
        code = main(["chat", str(model), *how, "-n", "10", "--device", "cpu", *options])
        shown = capsys.readouterr()
        return code, shown.out.splitlines(), shown.err

    return say


def answers(folder: Path, *texts: str, system: str | None = None) -> list[str]:
    """What a runtime without any memory answers."""
    runtime = InferenceRuntime(load(folder, device="cpu"))
    written, found = "" if system is None else f"system: {system}\n", []
    for text in texts:
        written += f"user: {text}\nassistant: "
        (answer,) = runtime.generate(written, max_new_tokens=10)
        written += answer + "\n"
        found.append(answer)
    return [line for answer in found for line in (answer + "\n").splitlines()]


def test_a_conversation_goes_on_line_by_line(folder: Path, talk) -> None:
    assert talk("hello", "and you?") == (0, answers(folder, "hello", "and you?"), "")
    code, shown, said = talk(
        "hello", "/reset", "/help", "", "hello", "/exit", "not heard", options=("--system", "short")
    )
    assert (code, shown) == (0, answers(folder, "hello", system="short") * 2)
    assert "/save FILE keeps the conversation" in said


def test_answers_are_chosen_and_ended_as_asked_for(folder: Path, talk) -> None:
    runtime, asked = InferenceRuntime(load(folder, device="cpu")), "user: hello\nassistant: "
    (whole,) = runtime.generate(asked, max_new_tokens=10)
    stop = whole[4:6]
    code, shown, _ = talk("hello", options=("--stop", "never written", "--stop", stop))
    assert (code, shown) == (0, (whole[: whole.index(stop)] + "\n").splitlines())
    draws: dict[str, Any] = {"max_new_tokens": 10, "temperature": 1.0, "top_p": 1.0, "seed": 3}
    plain, rare = (runtime.generate(asked, **draws, min_p=min_p)[0] for min_p in (0, 0.6))
    code, shown, _ = talk("hello", options=("-t", "1", "--top-p", "1", "--seed", "3", "--min-p", "0.6"), greedy=False)
    assert (code, shown) == (0, (rare + "\n").splitlines()) and rare != plain


def test_a_conversation_is_saved_and_resumed_without_reading_it_again(
    folder: Path, talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = answers(folder, "hello", "and you?", "why?")
    saved = tmp_path / "talk.safetensors"
    code, first, said = talk("hello", "and you?", f"/save {saved}")
    assert code == 0 and f"saved to {saved}" in said
    runtimes: list[InferenceRuntime] = []
    made = InferenceRuntime.__init__
    monkeypatch.setattr(
        InferenceRuntime, "__init__", lambda self, *a, **b: (made(self, *a, **b), runtimes.append(self))[0]
    )
    code, rest, _ = talk("why?", options=("--resume", str(saved)))
    assert code == 0 and [*first, *rest] == whole
    counts = runtimes[0].scheduler
    assert counts.prefixes.counts.hits == 1
    read = counts.prefixes.counts.tokens
    assert 30 < read > counts.counts.prompt_tokens
    # The file is of these weights.
    other = save_tiny_model(tmp_path / "other", folder)
    (other / "chat_template.jinja").write_text(TEMPLATE)
    weights = load(other, device="cpu")
    weights.embed_tokens.weight.data.mul_(2)
    weights.save_pretrained(other)
    code, _, said = talk("why?", options=("--resume", str(saved)), model=other)
    assert code == 2 and "was saved with another model" in said


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--resume", "missing"), "conversation file missing does not exist"),
        (("--resume", "MODEL/config.json"), "config.json cannot be read"),
        (("--resume", "MODEL/model.safetensors"), "model.safetensors is not a conversation saved by this version"),
        (("--resume", "x", "--system", "y"), "--resume brings what the conversation begins with"),
        (("--memory", "much"), "--memory must be a number of bytes such as 512MiB"),
    ],
)
def test_what_cannot_be_resumed(folder: Path, talk, options: tuple[str, ...], sentence: str) -> None:
    code, _, said = talk("a", options=tuple(word.replace("MODEL", str(folder)) for word in options))
    assert code == 2 and sentence in said and said.startswith("error: ") and said.count("\n") == 1


def test_what_cannot_be_saved_is_said_and_the_conversation_goes_on(folder: Path, talk) -> None:
    code, shown, said = talk("/save", "/save x", "hello", "/save", options=("--memory", "0"))
    assert (code, shown) == (0, answers(folder, "hello"))
    assert said.splitlines() == [
        "error: say where to: /save FILE",
        "error: nothing was said yet",
        "error: say where to: /save FILE",
    ]
    # The answer is a letter: bytes that are no character would be other tokens when the conversation is read again.
    code, shown, said = talk("a lazy dog", f"/save {folder}/config.json/x", "hello", options=("-n", "1"))
    assert code == 0 and len(shown) == 2 and shown[0].isalpha() and "config.json/x cannot be written: " in said
    code, _, said = talk("hello", "/save x", options=("--memory", "0"))
    assert code == 0 and "there is no state of this conversation to save" in said


def test_bytes_that_are_no_text_end_the_conversation(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hello\nh\xe9llo\n"), errors="surrogateescape"))
    capsys.readouterr()
    assert main(["chat", str(folder), "--greedy", "-n", "10", "--device", "cpu"]) == 2
    shown = capsys.readouterr()
    assert shown.out.splitlines() == answers(folder, "hello")
    assert shown.err == "error: line 2 of standard input is not UTF-8 text (byte 1)\n"


def test_without_a_template_there_is_no_conversation(corpus: Path, tmp_path: Path, talk) -> None:
    code, _, said = talk("hello", model=save_tiny_model(tmp_path, corpus / "tokenizer"))
    assert (code, said) == (
        2,
        "error: the model's tokenizer has no chat template, so it cannot hold a conversation: give it one, or use "
        "`fusiontree generate`\n",
    )


@pytest.mark.slow
def test_in_a_terminal_an_answer_can_be_stopped(folder: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "fusiontree", "chat", str(folder), "--greedy", "-n", "100000", "--device", "cpu"]
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, env={**os.environ, "TERM": "dumb"}
    ) as process:

        def read_until(text: str, seconds: float = 120) -> str:
            seen, end = "", time.monotonic() + seconds
            while text not in seen:
                assert time.monotonic() < end, seen
                if select.select([ours], [], [], 0.1)[0]:
                    seen += os.read(ours, 4096).decode(errors="replace")
            return seen

        read_until("> ")
        os.write(ours, b"hello\n")
        read_until("hello\r\n")
        time.sleep(2)
        process.send_signal(2)
        read_until("> ")
        os.write(ours, b"/exit\n")
        assert process.wait(timeout=60) == 0
    os.close(ours)
    os.close(theirs)
