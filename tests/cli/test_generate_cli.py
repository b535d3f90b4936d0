"""`fusiontree generate`: once in a process of its own, otherwise inside this one (importing torch takes seconds)."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import warm
from fusiontree import generate, load
from fusiontree.cli import main
from fusiontree.deploy.runtime import InferenceRuntime, SamplingOptions
from fusiontree.deploy.text import token_text
from tiny_models import save_tiny_model

SCRIPT = Path(sys.executable).with_name("fusiontree")
PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), corpus / "tokenizer")


@pytest.fixture
def give_stdin(monkeypatch: pytest.MonkeyPatch):
    def give(content: bytes) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))

    return give


def test_prompt_file_and_standard_input_give_the_same_text(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], give_stdin
) -> None:
    (expected,) = generate(load(folder, device="cpu"), PROMPT, max_new_tokens=16)
    (tmp_path / "prompt.txt").write_text(PROMPT + "\n")
    give_stdin(PROMPT.encode() + b"\r\n")
    capsys.readouterr()
    options = ["generate", str(folder), "--greedy", "--max-new-tokens", "16", "--device", "cpu"]
    for source in (["--prompt", PROMPT], ["--file", str(tmp_path / "prompt.txt")], []):
        assert main([*options, *source]) == 0
        assert capsys.readouterr() == (expected + "\n", "")


def test_draws_are_those_of_the_python_interface(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"max_new_tokens": 16, "temperature": 1.5, "top_k": 50, "top_p": 0.9, "seed": 4}
    (expected,) = generate(load(folder, device="cpu"), PROMPT, **options)
    flags = [str(word) for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    capsys.readouterr()
    assert main(["generate", str(folder), "--prompt", PROMPT, *flags, "--device", "cpu"]) == 0
    assert capsys.readouterr().out == expected + "\n"


def test_text_comes_as_it_is_made(folder: Path) -> None:
    command = [warm.fusiontree(), "generate", folder, "-p", PROMPT, "-n", "100000", "--greedy", "--device", "cpu"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(1)  # arrives although the rest takes minutes
        process.stdout.close()  # as `| head -c 1` does: the command ends at its next write
        assert process.wait(timeout=60) == 1
        assert process.stderr.read() == b""


@pytest.mark.parametrize(
    ("arguments", "stdin", "sentence"),
    [
        (["nowhere", "-p", "a"], b"", "model folder nowhere does not exist"),
        (["MODEL", "-p", ""], b"", "the prompt is empty: give at least one character"),
        (["MODEL"], b"", "the prompt is empty: give at least one character"),
        (["MODEL", "-p", "a", "-f", "b"], b"", "--prompt and --file were both given; choose one"),
        (["MODEL", "-f", "missing.txt"], b"", "prompt file missing.txt does not exist"),
        (["MODEL", "-f", "/"], b"", "prompt file / cannot be read: "),
        (["MODEL"], b"\xff\xfe", "standard input is not UTF-8 text (byte 0)"),
        (["MODEL", "-p", "a\udcff"], b"", "prompt 1 is not valid Unicode text at character 2"),
        (["MODEL", "-p", "a", "--dtype", "int3"], b"", "--dtype must be one of float32, bfloat16, float16, got 'int3'"),
        (["MODEL", "-p", "a", "--device", "abacus"], b"", "device 'abacus' cannot be used here"),
        (["MODEL", "-p", "a", "--temperature", "-1"], b"", "temperature must be a finite number of at least 0"),
        (["MODEL", "-p", "a", "-t", "inf"], b"", "temperature must be a finite number of at least 0"),
        (["MODEL", "-p", "a", "--greedy", "-t", "0.5"], b"", "--greedy draws nothing, so --temperature has no effect"),
        (["MODEL", "-p", "a", "--rows", "4"], b"", "--rows is for --jsonl: a single text is one row"),
        (["MODEL", "-p", "a", "-n", "0"], b"", "max_new_tokens must be at least 1, got 0"),
        (["MODEL", "-p", "a", "-n", "many"], b"", "Invalid value for '--max-new-tokens'"),
    ],
)
def test_bad_input_is_one_sentence(
    folder: Path, arguments: list[str], stdin: bytes, sentence: str, capsys: pytest.CaptureFixture[str], give_stdin
) -> None:
    give_stdin(stdin)
    capsys.readouterr()
    assert main(["generate", *(str(folder) if word == "MODEL" else word for word in arguments)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: {sentence}")
    assert shown.err.count("\n") == 1


def test_a_prompt_longer_than_a_learned_table(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny_model(tmp_path, corpus / "tokenizer", srte_encoding="learned")
    assert main(["generate", str(folder), "-p", "\n" * 100]) == 2
    sentence = "error: the prompt has 100 tokens, but the model's learned time encoding (SRTE) ends after 96 positions"
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_compiled_step_gives_the_same_text(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """In a process of its own, as compiling leaves settings and threads behind."""
    command = [SCRIPT, "generate", folder, "-p", PROMPT, "-n", "24", "--greedy", "--device", "cpu", "--compile"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert finished.returncode == 0 and finished.stderr.splitlines() == [
        "compiling a step of decoding, which takes a minute or so the first time"
    ]
    (expected,) = generate(load(folder, device="cpu"), PROMPT, max_new_tokens=24)
    assert finished.stdout == expected + "\n"


def test_a_file_of_prompts_comes_back_line_by_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], give_stdin
) -> None:
    model = load(folder, device="cpu")
    lines = [
        {"prompt": PROMPT, "id": 7},
        {"prompt": "学而", "options": {"max_new_tokens": 3}},
        {"prompt": PROMPT, "options": {"temperature": 1.0, "top_k": 20, "seed": 3, "stop": "zzz"}, "note": None},
    ]
    source = tmp_path / "prompts.jsonl"
    source.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    options = ["generate", str(folder), "--greedy", "-n", "9", "--device", "cpu", "--stats"]
    capsys.readouterr()
    assert main([*options, "--jsonl", str(source), "--rows", "2"]) == 0
    shown = capsys.readouterr()
    found = [json.loads(line) for line in shown.out.splitlines()]
    assert [{key: line[key] for key in record} for line, record in zip(found, lines, strict=True)] == lines
    assert found[0]["text"] == generate(model, PROMPT, max_new_tokens=9)[0]
    assert found[1]["text"] == generate(model, "学而", max_new_tokens=3)[0]
    assert (
        found[2]["text"] == generate(model, PROMPT, max_new_tokens=9, temperature=1.0, top_k=20, top_p=0.95, seed=3)[0]
    )
    assert [line["new_tokens"] for line in found] == [9, 3, 9]
    assert [line["finish_reason"] for line in found] == ["length"] * 3
    assert re.fullmatch(
        r"3 texts, 2 at once: \d+ prompt tokens, 21 new ones in [\d.]+ s \([\d.]+ tokens/s\), "
        r"the first after [\d.]+ s; [\d,]+ bytes of state at most\n",
        shown.err,
    )
    give_stdin(source.read_bytes())
    assert main([*options[:-1], "--jsonl", "-", "--out", str(tmp_path / "out.jsonl")]) == 0
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()] == found
    assert capsys.readouterr() == (f"{tmp_path / 'out.jsonl'}\n", "")


def test_a_stop_ends_a_text_and_penalties_change_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (whole,) = generate(load(folder, device="cpu"), PROMPT, max_new_tokens=30)
    options = ["generate", str(folder), "-p", PROMPT, "--greedy", "-n", "30", "--device", "cpu"]
    capsys.readouterr()
    assert main([*options, "--stop", whole[8:11], "--stop", "never", "--stats"]) == 0
    shown = capsys.readouterr()
    assert shown.out == whole[: whole.index(whole[8:11])] + "\n"
    assert shown.err.startswith("1 text, 1 at once: ")
    assert main([*options, "--stop", whole[0], "--stats"]) == 0  # with the first token
    shown = capsys.readouterr().err
    assert shown.startswith("1 text, 1 at once: ") and " 0 bytes of state" not in shown
    assert main([*options, "--repetition-penalty", "1.9"]) == 0
    assert capsys.readouterr().out != whole + "\n"


@pytest.mark.parametrize("more", [["--greedy"], ["-t", "1.5", "--top-k", "3", "--min-p", "0.1"]], ids=str)
def test_a_model_that_computes_no_numbers_is_told(
    corpus: Path, tmp_path: Path, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny_model(tmp_path / "broken", corpus / "tokenizer", broken=True)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    many = ["--jsonl", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    capsys.readouterr()
    for source in (["-p", PROMPT], many):
        assert main(["generate", str(folder), "--device", "cpu", *source, *more]) == 2
        shown = capsys.readouterr()
        assert shown.out == "" and shown.err.count("\n") == 1
        assert shown.err.startswith("error: the model's logits are not finite (NaN or infinity): ")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_seed_may_be_any_that_the_server_takes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in (-1, 2**63 - 1):  # equal modulo 2**63
        assert main(["generate", str(folder), "-p", PROMPT, "--seed", str(seed), "--device", "cpu", "-n", "8"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def texts_of(folder: Path, **options: Any) -> str:
    model = load(folder, device="cpu")
    return next(InferenceRuntime(model).run([PROMPT], [SamplingOptions(max_new_tokens=30, **options)])).text


def test_options_of_the_command_line_and_of_lines_are_the_runtime_s(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draws: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "seed": 3}
    plain, rare = texts_of(folder, **draws), texts_of(folder, **draws, min_p=0.4)
    options = ["generate", str(folder), "-n", "30", "-t", "1", "--top-p", "1", "--device", "cpu"]
    capsys.readouterr()
    assert main([*options, "-p", PROMPT, "--seed", "3", "--min-p", "0.4"]) == 0
    assert capsys.readouterr().out == rare + "\n" != plain + "\n"
    own: list[dict[str, Any]] = [
        {"min_p": 0.4},
        {"logit_bias": {"70": 30}},
        {"presence_penalty": 2},
        {"frequency_penalty": -2},
    ]
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": PROMPT, "options": one | {"seed": 3}}) + "\n" for one in own))
    assert main([*options, "--jsonl", str(source)]) == 0
    found = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    own[1] = {"logit_bias": {70: 30.0}}
    assert found == [texts_of(folder, **draws, **one) for one in own]
    assert plain not in found


def test_log_probabilities_come_with_a_line_that_asks_for_them(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "prompts.jsonl"
    lines = [{"prompt": PROMPT, "options": {"logprobs": 3}}, {"prompt": PROMPT}]
    source.write_text("\n".join(map(json.dumps, lines)))
    capsys.readouterr()
    assert main(["generate", str(folder), "--greedy", "-n", "5", "--device", "cpu", "--jsonl", str(source)]) == 0
    with_them, without = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert with_them["text"] == without["text"] and "logprobs" not in without
    model = load(folder, device="cpu")
    with torch.no_grad():
        logits = model(torch.tensor([model.tokenizer(PROMPT)["input_ids"]])).logits[0, -1, : len(model.tokenizer)]
    best = logits.log_softmax(-1).topk(3)
    first = with_them["logprobs"][0]
    assert len(with_them["logprobs"]) == 5 and first["token"] == first["top_logprobs"][0]["token"]
    assert [one["token"] for one in first["top_logprobs"]] == [
        token_text(model.tokenizer, token) for token in best.indices.tolist()
    ]
    assert [one["logprob"] for one in first["top_logprobs"]] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert first["logprob"] == first["top_logprobs"][0]["logprob"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"prompt": "a"}\n{"prompt"', "prompts.jsonl, line 2 is not valid JSON"),
        ('{"text": "a"}', 'prompts.jsonl, line 1 must be an object with a text "prompt"'),
        ('{"prompt": "a", "options": 1}', 'prompts.jsonl, line 1: "options" must be an object'),
        ('{"prompt": "a", "options": {"top_q": 1}}', "line 1: there is no option 'top_q'; did you mean 'top_p'?"),
        ('{"prompt": "a", "options": {"top_p": 2}}', "line 1: top_p must lie above 0"),
        ('{"prompt": "a", "options": {"seed": "x"}}', "line 1: option 'seed': Input should be a valid integer"),
        ('{"prompt": "a", "options": {"top_k": "3"}}', "line 1: option 'top_k': Input should be a valid integer"),
        ('{"prompt": "a", "options": {"max_new_tokens": true}}', "line 1: option 'max_new_tokens': Input should be a"),
        ('\n{"prompt": "a"}\n{"prompt": ""}', "prompts.jsonl, line 3: the prompt is empty"),
        ('{"prompt": "\\ud800"}', "prompts.jsonl, line 1: the prompt holds half of a surrogate pair"),
        ('{"prompt": "a", "options": {"logprobs": 21}}', "line 1: logprobs must lie between 0 and 20, got 21"),
        (
            '{"prompt": "a"}\n\n{"prompt": "a", "options": {"logit_bias": {"999": 1}}}',
            "prompts.jsonl, line 3: logit_bias: there is no token 999, the last one is 299",
        ),
        ("\n", "prompts.jsonl holds no prompt"),
    ],
)
def test_lines_that_cannot_be_continued(
    folder: Path, tmp_path: Path, content: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_text(content)
    capsys.readouterr()
    assert main(["generate", str(folder), "--jsonl", str(source), "--device", "cpu"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and sentence in shown.err and shown.err.count("\n") == 1
    source.write_text('{"prompt": "a"}')
    for out, problem in (
        (tmp_path, "is a folder: name a file"),
        (source / "x", "a file is in the way"),
        (Path("/proc/x.jsonl"), "--out /proc/x.jsonl: nothing can be written to /proc"),
    ):
        assert main(["generate", str(folder), "--jsonl", str(source), "--out", str(out), "--device", "cpu"]) == 2
        assert problem in capsys.readouterr().err
    for more, problem in ((["-p", "a"], "--jsonl holds the prompts"), (["--out", "x"], "--out is for --jsonl")):
        arguments = ["--jsonl", str(source)] if more[0] == "-p" else ["-p", "a"]
        assert main(["generate", str(folder), *arguments, *more]) == 2
        assert problem in capsys.readouterr().err
