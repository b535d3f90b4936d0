"""Every command and every Python block of the READMEs and docs runs, on small sizes, in a directory of its own.

A command that is not in `SHORTENED` runs as it stands; a command of a tool that may not run in a test is in `CHECKED`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import warm

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.md"))]

SMALL = (
    "model.hidden_size=32 model.num_layers=2 model.num_heads=4 model.mamba_head_dim=8 model.window_size=8"
    " model.gate_rank=4 model.srte_rank=8 training.batch_size=2 training.max_seq_length=24 training.warmup_steps=1"
    " training.eval_batches=1 training.log_interval=1 gate_monitor.interval=1 training.mixed_precision=no"
)
SMALL_BENCH = "--rounds 1 --context 32 --new-tokens 4 --train-batch 1 --train-length 32"
# What is appended to a command that would otherwise run for long, by what it starts with.
SHORTENED = {
    "fusiontree train --config configs/pretrain_optimized.yaml": f"{SMALL} training.max_steps=3",
    "fusiontree train --config configs/pretrain_wikipedia.yaml --dry-run": "",
    "fusiontree train --config runs/pretrain_optimized/config.yaml": "training.max_steps=4",
    "fusiontree quickstart": f"--corpus-bytes 300000 --vocab-size 320 {SMALL} training.max_steps=3",
    "fusiontree generate": "--max-new-tokens 4",
    "fusiontree bench --config": f"{SMALL} {SMALL_BENCH}",
    "fusiontree bench runs/": SMALL_BENCH,
    "fusiontree plan runs/": "--context 64 --rounds 1 --tokens 2000 --length 64",
    "fusiontree export": "--context 64",
    "fusiontree heal": "training.eval_batches=1",
}
# Commands whose own effect is tested elsewhere, or that would start this test again.
CHECKED = {
    "fusiontree serve runs/pretrain_optimized --port 8000": ["fusiontree", "serve", "--help"],
    "make quickstart": ["make", "-n", "quickstart"],
    "make test": ["make", "-n", "test"],
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


def test_the_two_readmes_show_the_same_commands_and_code():
    english, chinese = PAGES[0], PAGES[1]
    assert blocks(english, "bash") == blocks(chinese, "bash")

    def code(page):
        return [re.sub(r"#.*", "", block) for block in blocks(page, "python")]

    assert code(english) == code(chinese)
    assert len(blocks(english, "mermaid")) == len(blocks(chinese, "mermaid")) == 3


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_blocks(page, tmp_path):
    for block in blocks(page, "python"):
        result = subprocess.run([warm.python(), "-c", block], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr


def prepared(command: str) -> list[str] | str:
    if command in CHECKED:
        return CHECKED[command]
    for start, extra in SHORTENED.items():
        if command.startswith(start):
            return f"{command} {extra}"
    return command


# The Chinese README's commands are held equal to the English one's above.
WITH_COMMANDS = [page for page in PAGES if blocks(page, "bash") and page.name != "README.zh-CN.md"]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.name)
def test_commands(page, tmp_path):
    """The page's commands one after the other, as a reader types them."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    path = os.pathsep.join([str(Path(warm.fusiontree()).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    for block in blocks(page, "bash"):
        for command in block.replace("\\\n", " ").strip().splitlines():
            if not command or command.startswith("#"):
                continue
            run = prepared(command)
            result = subprocess.run(
                run, shell=isinstance(run, str), cwd=tmp_path, env=environment, capture_output=True, text=True
            )
            assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"
