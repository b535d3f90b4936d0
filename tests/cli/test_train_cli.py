"""`fusiontree train` as a user meets it: what it leaves, what it prints, what it says about mistakes."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import fusiontree
import warm
from fusiontree.cli import main
from fusiontree.data.bpe import train_bpe
from fusiontree.errors import InputError

Train = Callable[..., tuple[int, str, str]]


@pytest.fixture
def config(run_settings, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(run_settings(output_dir=str(tmp_path / "run"), logging={"progress": "auto"})))
    return path


@pytest.fixture
def train(config: Path, capfd: pytest.CaptureFixture[str]) -> Train:
    """Run the command in this process with extra arguments: exit code, standard output, standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(["train", "--config", str(config), *arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_directory(config: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [warm.python(), "-m", "fusiontree", "train", "--config", str(config)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    found = {str(path.relative_to(run)) for path in run.rglob("*")}
    assert found >= {
        *("config.yaml", "manifest.json", "metrics.jsonl", "gates.jsonl", "prune_plan.json", "latest"),
        *("plots/learning_curve.png", "plots/gates_by_step.png", "plots/gates_by_channel.png"),
        *("checkpoints/step_00000003/model.safetensors", "checkpoints/step_00000006/tokenizer.json"),
    }
    rows = metrics(run)
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 3, 6]
    train_rows = [row for row in rows if "lm_loss" in row]
    assert [row["step"] for row in train_rows] == [1, 2, 3, 4, 5, 6]
    assert train_rows[-1]["tokens"] == 6 * 2 * 2 * 24
    for row in train_rows:
        parts = row["lm_loss"] + 0.05 * row["load_balance_loss"] + 3e-4 * row["entropy_loss"]
        assert row["loss"] == pytest.approx(parts)
        assert 0.3 < row["gate_mean"] < 0.7 and row["grad_norm"] > 0 and row["tokens_per_second"] > 0
    assert train_rows[-1]["lm_loss"] < train_rows[0]["lm_loss"]
    # The resolved configuration starts the same run again, and says where the run came from.
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["model"]["vocab_size"] == 320  # the tokenizer's 300, rounded up to a multiple of 64
    assert json.loads((run / "manifest.json").read_text())["config"] == resolved
    assert "AdamW, weight decay 0.1: " in done.stderr and "layers.*.fusion_proj.weight" in done.stderr
    # A log file gets plain lines: no escape codes, no redrawn bars.
    assert "step 6/6  loss " in done.stderr and "tok/s" in done.stderr and "ETA" in done.stderr
    assert "eval loss" in done.stderr
    assert "\x1b" not in done.stderr and "\r" not in done.stderr


@pytest.mark.parametrize("scope", ["branches", "block"])
def test_gradient_checkpointing_changes_no_loss(config: Path, tmp_path: Path, scope: str) -> None:
    """Both kinds of dropout are on: what is recomputed must draw and drop as the first time."""
    dropped = ["model.dropout=0.1", "model.drop_branch_prob=0.5", "training.save_interval=0"]
    for name, chosen in (("plain", "off"), ("recomputed", scope)):
        settings = [*dropped, f"training.gradient_checkpointing={chosen}", f"output_dir={tmp_path / name}"]
        command = [warm.python(), "-m", "fusiontree", "train", "--config", str(config), *settings]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    plain, recomputed = metrics(tmp_path / "plain"), metrics(tmp_path / "recomputed")
    assert len(plain) == len(recomputed) >= 6
    for row, other in zip(plain, recomputed, strict=True):
        for key in row.keys() & {"loss", "lm_loss", "eval_loss", "gate_mean", "grad_norm"}:
            assert other[key] == pytest.approx(row[key], rel=1e-6), key


def test_a_terminal_gets_a_live_line(config: Path, tmp_path: Path) -> None:
    """A pseudo-terminal stands in for one; the display is redrawn there."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [warm.python(), "-m", "fusiontree", "train", "--config", str(config), "training.eval_interval=0"],
        stderr=follower,
        stdout=follower,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "160"},
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not part:
            break
        shown += part
    assert process.wait() == 0
    text = shown.decode(errors="replace")
    for wanted in ("6/6", "loss", "tok/s", "gate 0.", "lr ", "ETA"):
        assert wanted in text
    assert "\x1b[" in text


def test_a_directory_with_a_run_is_not_overwritten(train: Train, tmp_path: Path) -> None:
    assert train("training.max_steps=1")[0] == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    code, _, errors = train("training.max_steps=1")
    assert code == 2
    assert errors.startswith("error: ") and "already holds a run" in errors and "--resume auto" in errors
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["training.bach_size=2"], "training.bach_size is not a known setting; did you mean training.batch_size?"),
        (["trainig.batch_size=2"], "did you mean training?"),
        (["max_steps=2"], "max_steps is not a known setting; did you mean training.max_steps?"),
        (["training=5"], "training is a section: its settings are written below it, got 5"),
        (["--dry-run", "model.vocab_size=100"], "has ids up to 299 but model.vocab_size is 100"),
        (["model.num_head=2"], "did you mean `num_heads`?"),
        (["model.num_heads=5"], "is not a multiple of `num_heads` 5"),
        (["model.window_size=0"], "`window_size` must be"),
        (["model.global_heads=9"], "`global_heads` must lie between 0 and `num_heads` 4"),
        (["model.vocab_size=100"], "has ids up to 299 but model.vocab_size is 100"),
        (
            ["training.optimizer=muon", "system.zero_stage=2"],
            "muon needs matrices, which DeepSpeed ZeRO-2 takes apart into flat shares: set it to adamw",
        ),
        (["training.lr_schedule=cosin"], "training.lr_schedule"),
        (["training.batch_size=0"], "training.batch_size"),
        (["training.learning_rate=fast"], "training.learning_rate"),
        (
            ["training.gradient_checkpointing=blok"],
            "must be true, false or one of off, mamba, attention, branches, block (did you mean block?), got 'blok'",
        ),
        (
            ["logging.trackers=[csv,wandbb]"],
            "logging.trackers: there is no tracker 'wandbb', only wandb, tensorboard, csv; did you mean wandb?",
        ),
        (["training.betas=[0.9, 1.5]"], "betas must lie in [0, 1)"),
        (["data.train_paths=missing.jsonl"], "missing.jsonl"),
        (["data.eval_paths=missing/*.jsonl"], "missing/*.jsonl"),
        (["data.tokenizer=missing/folder"], "missing/folder"),
        (["data.tokenizer=null"], "data.tokenizer is missing"),
        (["loss.distillation_coeff=0.5"], "no teacher is named"),
        (
            ["loss.distillation_coeff=0.5", "loss.teacher=missing/teacher"],
            "loss.teacher 'missing/teacher' is no folder here and cannot be loaded",
        ),
        (
            ["--dry-run", "loss.distillation_coeff=0.5", "loss.teacher=missing/teacher"],
            "loss.teacher 'missing/teacher' is no folder here and cannot be loaded",
        ),
        (
            ["system.fsdp=true", "system.zero_stage=2"],
            "fsdp and DeepSpeed (zero_stage, deepspeed_config) are two engines",
        ),
        (["system.deepspeed_config=missing.json"], "system.deepspeed_config: missing.json cannot be read"),
        (["system.offload_optimizer=true"], "offload_optimizer needs zero_stage"),
        (
            ["training.save_best=true", "training.eval_interval=0"],
            "training.save_best: that is the checkpoint of the lowest",
        ),
        (
            ["training.init_from=missing"],
            "training.init_from: missing holds no model (it has no config.json) and",
        ),
        (
            ["system.num_devices=8"],
            "system.num_devices is 8 but 1 process runs: start it with torchrun --nproc_per_node=8",
        ),
        (["model.srte_encoding=learned", "model.max_position_embeddings=8"], "training.max_seq_length 24 is longer"),
        (["--resume", "missing/run"], "missing/run"),
    ],
)
def test_mistakes_are_one_sentence(train: Train, tmp_path: Path, arguments: list[str], said: str) -> None:
    code, _, errors = train(*arguments)
    assert code == 2
    (line,) = [line for line in errors.splitlines() if line.strip()]
    assert line.startswith("error: ")
    assert said in line
    assert not (tmp_path / "run").exists()  # told before any work is done


@pytest.mark.parametrize(
    ("written", "by_hand", "said"),
    [
        (
            "training:\n  max_steps: 3\n  bach_size: 2\n",
            (),
            "{file}, line 3: training.bach_size is not a known setting",
        ),
        ("seed: 1\ntraining: {betas: [0.9, x]}\n", (), "{file}, line 2: training.betas.1: input should be a valid num"),
        ("seed: 1\n\ntraining: 5\n", (), "{file}, line 3: training is a section"),
        ("training:\n  batch_size: 2\n", ("training.batch_size=x",), "error: training.batch_size: input should be"),
        ("training:\n  betas: [0.9, 0.95]\n", ("training.betas=[0.9, x]",), "error: training.betas.1: input should be"),
        ("training:\n  batch_size: 2\n", ("training={batch_size: x}",), "error: training.batch_size: input should be"),
        ("system:\n  device: cpu\n", ("system.offload_params=true",), "error: system: offload_params needs zero_stage"),
        (
            "model:\n  vocab_size: 64\n  num_heads: 7\n",
            ("--dry-run",),
            "{file}, line 3: model: `hidden_size` 1536 is not a multiple of `num_heads` 7",
        ),
        ("model:\n  vocab_size: 64\n  num_hedas: 8\n", ("--dry-run",), "{file}, line 3: model: `num_hedas` is not a f"),
        (
            "model:\n  vocab_size: 64\n  num_heads: 8\n",
            ("--dry-run", "model.num_heads=7"),
            "error: model: `hidden_size` 1536 is not a multiple of `num_heads` 7",
        ),
        (
            "model:\n  vocab_size: 64\n  hidden_size: 64\n",
            ("--dry-run", "model.num_heads=7"),
            "error: model: `hidden_size` 64 is not a multiple of `num_heads` 7",
        ),
    ],
)
def test_a_mistake_in_the_file_is_told_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], written: str, by_hand: tuple[str, ...], said: str
) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(written)
    assert main(["train", "--config", str(file), *by_hand]) == 2
    assert said.format(file=file) in capsys.readouterr().err


def test_a_mistake_in_the_model_is_told_with_its_line(train: Train, config: Path) -> None:
    written = config.read_text()
    config.write_text(written.replace("  num_heads: 4\n", "  num_heads: 5\n"))
    line = written.splitlines().index("  hidden_size: 32") + 1
    code, _, errors = train()
    assert code == 2
    assert errors.startswith(f"error: {config}, line {line}: model: `hidden_size`"), errors


def test_python_is_told_the_line_too(config: Path) -> None:
    config.write_text(config.read_text().replace("  window_size: 8\n", "  window_size: 0\n"))
    line = config.read_text().splitlines().index("  window_size: 0") + 1
    with pytest.raises(InputError, match=f"^{re.escape(str(config))}, line {line}: model: `window_size` must be"):
        fusiontree.train(config)


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_a_warm_up_that_never_ends_is_told(train: Train, dry_run: list[str]) -> None:
    steps = ("training.max_steps=2", "training.warmup_steps=8", "training.learning_rate=0.004")
    code, _, errors = train(*dry_run, *steps)
    assert code == 0
    assert "training.warmup_steps 8 is not below training.max_steps 2" in errors
    assert "rises to the last step, to 0.001 of 0.004" in " ".join(errors.split())


@pytest.mark.parametrize("progress", ["none", "plain"])
def test_bad_records_are_counted_in_training_and_evaluation(
    train: Train, corpus: Path, tmp_path: Path, progress: str
) -> None:
    lines = {split: (corpus / f"{split}.jsonl").read_bytes().splitlines() for split in ("train", "eval")}
    broken = [part for line in lines["train"] for part in (line, b"{broken")]  # a few steps read a few of them
    bad = [lines["eval"][0], b'{"title": "no text"}', b"\xff\xfe", *lines["eval"][1:]]
    files = {"train": tmp_path / "train.jsonl", "eval": tmp_path / "eval.jsonl"}
    for split, written in (("train", broken), ("eval", bad)):
        files[split].write_bytes(b"\n".join(written) + b"\n")
    paths = [f"data.{split}_paths={path}" for split, path in files.items()]
    code, _, errors = train(*paths, f"logging.progress={progress}", "training.eval_batches=null")
    assert code == 0, errors
    (data,) = [line for line in errors.splitlines() if line.startswith("data: ")]
    assert re.search(r"[2-9] records skipped: [2-9] broken JSON", data) and f"{files['train']}:" in data
    (evaluation,) = [line for line in errors.splitlines() if line.startswith("evaluation data: ")]
    assert (
        "2 records skipped" in evaluation and f"{files['eval']}:2" in evaluation and f"{files['eval']}:3" in evaluation
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{broken\n", "broken JSON"),
        (b'{"text": "\xff\xfe"}\n', "not UTF-8"),
        (b'{"title": "here"}\n', "text"),
        (b'{"text": "  "}\n', "empty text"),
    ],
)
def test_files_without_a_usable_record_are_refused(train: Train, tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    code, _, errors = train(f"data.train_paths={file}")
    assert code == 2
    sentence = errors.splitlines()[-1]
    assert sentence.startswith("error: ") and f"{file}:1" in sentence and said in sentence


def damage_by_truncation(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def damage_by_another_shape(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["layers.0.gate.up.weight"] = tensors["layers.0.gate.up.weight"][:-1].contiguous()
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("damage", [damage_by_truncation, damage_by_another_shape])
def test_a_damaged_checkpoint_is_told_by_every_command(
    train: Train, corpus: Path, tmp_path: Path, damage: Callable[[Path], None], capfd: pytest.CaptureFixture[str]
) -> None:
    assert train("training.max_steps=1")[0] == 0
    run = tmp_path / "run"
    (checkpoint,) = (run / "checkpoints").iterdir()
    damage(checkpoint)
    commands = (
        ["train", "--config", str(run / "config.yaml"), "--resume", "auto", "training.max_steps=2"],
        ["generate", str(run), "--prompt", "a"],
        ["eval", str(run), "--data", str(corpus / "eval.jsonl")],
    )
    for command in commands:
        capfd.readouterr()
        assert main(command) == 2
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
        assert line.startswith("error: ") and checkpoint.name in line, command


def test_an_output_dir_with_a_file_in_its_way_is_named(train: Train, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("kept")
    for path in (tmp_path / "notes.txt", tmp_path / "notes.txt" / "run"):
        code, _, errors = train(f"output_dir={path}")
        assert code == 2 and (tmp_path / "notes.txt").read_text() == "kept"
        assert (
            errors
            == f"error: output_dir: nothing can be written to {path} (a file is in the way); name another place\n"
        )


@pytest.mark.parametrize("beneath", ["run", "run/checkpoints", ""])
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_dir_without_permission_is_told_before_the_data_is_read(
    train: Train, tmp_path: Path, beneath: str
) -> None:
    locked = tmp_path / "locked" / beneath
    locked.mkdir(parents=True)
    locked.chmod(0o555)
    code, _, errors = train(f"output_dir={tmp_path / 'locked' / 'run'}", "data.train_paths=missing.jsonl")
    locked.chmod(0o755)
    assert code == 2 and errors.startswith("error: output_dir: nothing can be written to ")
    assert "(Permission denied); name another place" in errors and len(errors.splitlines()) == 1


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no place where nobody may write")
def test_nothing_is_read_for_an_output_dir_where_nobody_may_write(train: Train) -> None:
    code, _, errors = train("output_dir=/proc/fusiontree/run", "data.train_paths=missing.jsonl")
    assert code == 2 and len(errors.splitlines()) == 1
    assert errors.startswith("error: output_dir: nothing can be written to /proc/fusiontree/run (")


def test_a_file_of_the_run_that_cannot_be_written_is_no_traceback(train: Train, tmp_path: Path) -> None:
    (tmp_path / "run" / "config.yaml" / "in the way").mkdir(parents=True)
    code, _, errors = train()
    assert code == 2 and f"error: output_dir: the run's files cannot be written to {tmp_path / 'run'} (" in errors


def test_a_teacher_of_another_vocabulary_is_told_before_its_weights_are_read(
    train: Train, corpus: Path, tmp_path: Path
) -> None:
    assert train("training.max_steps=1", f"output_dir={tmp_path / 'teacher'}")[0] == 0
    checkpoint = (tmp_path / "teacher" / "latest").resolve()
    (checkpoint / "model.safetensors").write_bytes(b"not read")
    train_bpe([str(corpus / "eval.jsonl")], 280, str(tmp_path / "tokenizer"), "text")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / file).write_bytes((tmp_path / "tokenizer" / file).read_bytes())
    code, _, errors = train(f"loss.teacher={checkpoint}", "loss.distillation_coeff=0.5")
    assert code == 2 and len(errors.splitlines()) == 1 and not (tmp_path / "run").exists()
    assert f"loss.teacher '{checkpoint}' has another vocabulary (320 rows) than the student's tokenizer (300" in errors


def test_a_checkpoint_beyond_the_last_step_is_refused_before_anything_is_written(train: Train, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    assert train("training.max_steps=3")[0] == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for arguments in (
        ("--resume", "auto", "training.max_steps=2"),
        ("--resume", str(run), f"output_dir={other}", "training.max_steps=2"),
        ("--resume", str(run), f"output_dir={other}", "training.max_steps=3"),
    ):
        code, _, errors = train(*arguments)
        assert code == 2
        assert f"is at step 3 and training.max_steps is {arguments[-1][-1]}: raise it to train on" in errors
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert not other.exists()
    assert train("--resume", "auto", "training.max_steps=3")[0] == 0  # a complete run may be asked for again
    assert train("--resume", str(run), f"output_dir={other}", "training.max_steps=4")[0] == 0


def test_a_new_run_starts_from_the_newest_checkpoint_of_another(train: Train, tmp_path: Path) -> None:
    assert train("training.max_steps=2", "training.save_interval=1")[0] == 0
    run, other = tmp_path / "run", tmp_path / "other"
    start = ["training.max_steps=1", "training.learning_rate=1e-30", "training.weight_decay=0"]
    assert train(f"training.init_from={run}", f"output_dir={other}", *start)[0] == 0
    weights = [load_file(folder / "latest" / "model.safetensors") for folder in (run, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_tokenizer_that_changed_is_named_when_a_run_does_not_fit_it(train: Train, tmp_path: Path) -> None:
    assert train("training.max_steps=1")[0] == 0
    code, _, errors = train("--resume", "auto", "training.max_steps=2", "model.vocab_size=384")
    assert code == 2 and "data.tokenizer may have changed since (the checkpoint's own is in " in errors


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("WORLD_SIZE", "2", "system.num_devices is 1 but 2 processes run"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "the launcher asks for DeepSpeed (ACCELERATE_USE_DEEPSPEED) but system."),
        ("ACCELERATE_USE_FSDP", "true", "the launcher asks for FSDP (ACCELERATE_USE_FSDP) but system.fsdp is false"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "the launcher asks for fp16 (ACCELERATE_MIXED_PRECISION) but training."),
    ],
)
def test_what_the_launcher_asks_for_must_be_what_the_settings_ask_for(
    train: Train, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str
) -> None:
    monkeypatch.setenv(variable, value)
    code, _, errors = train("system.num_devices=1")
    assert code == 2 and said in errors


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_a_mistake_that_every_process_sees_is_told_by_one(
    train: Train, monkeypatch: pytest.MonkeyPatch, rank: str, lines: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    code, _, errors = train("system.num_devices=3")
    assert code == 2 and errors.count("system.num_devices is 3 but 2 processes run") == lines


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no JSON object"),
        (
            '{"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 64}',
            "the training section makes it 2",
        ),
        ('{"zero_optimization": {"stage": 0}}', "zero_optimization.stage is 0: set it to 1, 2 or 3"),
        ('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}}', "parameters stay float32"),
        ('{"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}', "optimizer: the optimizer is that of"),
    ],
)
def test_a_deepspeed_file_that_contradicts_the_settings_is_one_sentence(
    train: Train, tmp_path: Path, content: str, said: str
) -> None:
    file = tmp_path / "deepspeed.json"
    file.write_text(content)
    code, _, errors = train(f"system.deepspeed_config={file}")
    (line,) = [line for line in errors.splitlines() if line.strip()]
    assert code == 2 and line.startswith("error: ") and str(file) in line and said in line


def test_dry_run_counts_and_trains_nothing(train: Train, tmp_path: Path) -> None:
    code, shown, _ = train("--dry-run", "system.zero_stage=2", "system.num_devices=4")
    assert code == 0
    for wanted in (
        "Mamba branches",
        "attention branches",
        "gates",
        "optimizer state",
        "activations",
        "peak",
        "4 in all",
    ):
        assert wanted in shown
    (group,) = [line for line in shown.splitlines() if line.startswith("AdamW, weight decay 0.1: ")]
    assert "parameters in" in group and "AdamW, no weight decay: " in shown and "layers.*.gate.up.weight" in shown
    assert f"{2 * 2 * 24 * 4} tokens per optimizer step on 4 device(s)" in shown
    assert not (tmp_path / "run").exists()


def test_a_full_disk_leaves_the_last_checkpoint_whole(config: Path, train: Train, tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: writing fails in the middle of a file alike."""
    assert train("training.max_steps=3")[0] == 0
    run = tmp_path / "run"
    before = load_file(run / "latest" / "model.safetensors")
    limit = (run / "latest" / "model.safetensors").stat().st_size // 2

    def limit_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        [sys.executable, "-m", "fusiontree", "train", "--config", str(config), "--resume", "auto"],
        capture_output=True,
        text=True,
        preexec_fn=limit_files,
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: checkpoint ") and "step_00000006 could not be saved" in last
    assert "step_00000003 is whole" in last and "--resume auto" in last
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000003"]
    assert (run / "latest").resolve().name == "step_00000003"
    after = load_file(run / "latest" / "model.safetensors")
    assert all((after[name] == tensor).all() for name, tensor in before.items())
    assert train("--resume", "auto")[0] == 0  # with room again, it goes on
    assert metrics(run)[-1]["step"] == 6


def test_steps_that_stay_without_a_finite_value_go_back_once_and_then_name_the_layer(
    train: Train, tmp_path: Path
) -> None:
    absurd = ("training.learning_rate=1e30", "training.warmup_steps=0", "training.grad_clip=0", "training.max_steps=40")
    code, _, errors = train(
        *absurd, "training.save_interval=1", "training.max_skipped_steps=2", "training.eval_interval=0"
    )
    assert code == 2
    lines = errors.splitlines()
    (back,) = [line for line in lines if ": back to " in line]
    left_out = [line for line in lines if "left out" in line]
    assert len(left_out) == 4 and "step 2 is not finite (lm " in left_out[0] and "2 in a row" in left_out[1]
    assert "step 4 is not finite" in back and "checkpoints/step_0000000" in back
    last = lines[-1]
    assert last.startswith("error: step ") and "first in the output of " in last and "training.learning_rate" in last
    # What was saved before is still there and whole.
    code, _, errors = train("--resume", "auto", "training.learning_rate=1e-30", "training.max_steps=6")
    assert "resumed from" in errors


def test_without_evaluation_data_it_trains_and_says_so(train: Train, tmp_path: Path) -> None:
    code, _, errors = train("data.eval_paths=[]", "training.max_steps=2")
    assert code == 0 and "no evaluation: data.eval_paths is empty" in errors
    assert all("eval_loss" not in row for row in metrics(tmp_path / "run"))


def test_a_teacher_is_distilled_from(train: Train, tmp_path: Path) -> None:
    assert train("training.max_steps=2", f"output_dir={tmp_path / 'teacher'}")[0] == 0
    teacher = f"loss.teacher={tmp_path / 'teacher' / 'latest'}"
    shown = train("--dry-run", teacher, "loss.distillation_coeff=0.5")[1]
    mebibytes = (tmp_path / "teacher" / "latest" / "model.safetensors").stat().st_size / 2**20
    (told,) = re.findall(r"teacher\W+(\d+\.\d+)", shown)
    assert float(told) == pytest.approx(mebibytes, abs=0.02)
    assert train(teacher, "loss.distillation_coeff=0.5", "seed=3", "training.max_steps=3")[0] == 0
    rows = [row for row in metrics(tmp_path / "run") if "lm_loss" in row]
    assert all(row["distillation_loss"] > 0 for row in rows)
    assert rows[0]["loss"] == pytest.approx(
        rows[0]["lm_loss"]
        + 0.05 * rows[0]["load_balance_loss"]
        + 3e-4 * rows[0]["entropy_loss"]
        + 0.5 * rows[0]["distillation_loss"]
    )
