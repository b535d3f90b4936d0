"""What `fusiontree quickstart` trains, and the steps that lead from nothing to a run that can be looked at."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusiontree.artifacts import EvalReport
from fusiontree.atomic import atomic_write
from fusiontree.errors import InputError

if TYPE_CHECKING:
    from fusiontree.eval.report import Sample, Speed
    from fusiontree.models import HybridLanguageModel
    from fusiontree.train.settings import RunSettings

CORPUS_BYTES = 4_000_000
VOCABULARY = 4096
PROMPTS = ("def read_", "class Stack:\n    def __init__(self", "The following ")
SAMPLE_TOKENS = 120
SAMPLING: dict[str, Any] = {"temperature": 0.7, "top_p": 0.95, "seed": 0}
SPEED_PROMPT, SPEED_TOKENS = 512, 64

# As configs/quickstart.yaml, which an installed package does not have beside it.
QUICKSTART: dict[str, Any] = {
    "output_dir": "runs/quickstart",
    "seed": 0,
    "model": {
        "hidden_size": 192,
        "num_layers": 4,
        "num_heads": 6,
        "global_heads": 2,
        "window_size": 64,
        "mamba_head_dim": 32,
        "gate_rank": 24,
        "srte_rank": 48,
        "tie_word_embeddings": True,
    },
    "data": {
        "data_mode": "lazy",
        "tokenizer": "${output_dir}/tokenizer",
        "train_paths": "${output_dir}/corpus/train.jsonl",
        "eval_paths": "${output_dir}/corpus/eval.jsonl",
    },
    "training": {
        "batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_seq_length": 256,
        "max_steps": 300,
        "learning_rate": 3.0e-3,
        "min_lr_ratio": 0.1,
        "warmup_steps": 30,
        "mixed_precision": "no",
        "eval_interval": 100,
        "eval_batches": 12,
        "save_interval": 100,
        "save_total_limit": 2,
        "log_interval": 10,
    },
    "gate_monitor": {"interval": 20},
}


def quickstart_settings(out: Path, overrides: Sequence[str]) -> RunSettings:
    """The settings of a quickstart run in `out`.

    Raises:
        InputError: an override of `output_dir`, or one that does not fit.
    """
    from fusiontree.config import apply_overrides
    from fusiontree.train.settings import RunSettings

    if any(override.partition("=")[0].strip() == "output_dir" for override in overrides):
        raise InputError("give the run directory as --out, not as output_dir=")
    # Not as an override, which would read the path as YAML.
    settings = RunSettings.parse(apply_overrides({**QUICKSTART, "output_dir": str(out)}, overrides))
    if settings.training.eval_interval == 0:
        raise InputError("the quickstart shows how the validation loss falls: set training.eval_interval to 1 or more")
    if not settings.data.eval_paths:
        raise InputError("the quickstart shows how the validation loss falls: leave data.eval_paths as it is")
    return settings


def prepare_data(out: Path, corpus_bytes: int, vocabulary: int) -> str:
    """Writes the corpus and trains the tokenizer where the settings look for them, unless an earlier quickstart did.

    Returns:
        What there is now, in a few words.

    Raises:
        InputError: what is there was made with other sizes.
    """
    from fusiontree.data import train_bpe, write_embedded_corpus
    from fusiontree.data.bpe import require_vocabulary

    wanted = {"corpus_bytes": corpus_bytes, "vocabulary": vocabulary}
    record = out / "corpus" / "made_with.json"
    if record.is_file():
        found = json.loads(record.read_text(encoding="utf-8"))
        if found != wanted:
            raise InputError(
                f"{out} was begun with --corpus-bytes {found['corpus_bytes']} --vocab-size {found['vocabulary']}: "
                "repeat these, or choose another --out"
            )
    else:
        require_vocabulary(vocabulary)
        train, _ = write_embedded_corpus(out / "corpus", max_bytes=corpus_bytes)
        train_bpe([str(train)], vocabulary, out / "tokenizer")
        atomic_write(record, json.dumps(wanted) + "\n")
    sizes = {name: (out / "corpus" / f"{name}.jsonl").stat().st_size / 1e6 for name in ("train", "eval")}
    return f"{sizes['train']:.1f} MB of text to train on, {sizes['eval']:.2f} MB held out, {vocabulary} tokens"


def evaluate_run(settings: RunSettings, model: HybridLanguageModel) -> EvalReport:
    """Perplexity on the held-out documents, as the run was trained (bf16 autocast or float32); saved in the run."""
    from fusiontree.cli.evaluate import PICTURE, REPORT
    from fusiontree.eval.eval_llm import evaluate_perplexity
    from fusiontree.eval.figures import plot_perplexity_by_position
    from fusiontree.eval.texts import Texts

    run = Path(settings.output_dir)
    texts = Texts(settings.data.eval_paths, text_key=settings.data.text_key, where="data.eval_paths")
    report = evaluate_perplexity(model, texts, name=str(run), mixed_precision=settings.training.mixed_precision)
    report.save(run / REPORT)
    plot_perplexity_by_position(report, run / "plots" / PICTURE)
    return report


def write_samples(run: Path, model: HybridLanguageModel) -> list[Sample]:
    """Continues a few prompts; `sample.txt` holds them with their continuations."""
    from fusiontree.deploy.runtime import InferenceRuntime
    from fusiontree.eval.report import Sample

    texts = InferenceRuntime(model).generate(PROMPTS, max_new_tokens=SAMPLE_TOKENS, **SAMPLING)
    samples = [Sample(prompt, text) for prompt, text in zip(PROMPTS, texts, strict=True)]
    rule = "-" * 80
    atomic_write(run / "sample.txt", f"\n{rule}\n".join(sample.prompt + sample.text for sample in samples) + "\n")
    return samples


def measure_speed(model: HybridLanguageModel) -> Speed:
    """First token, decoding and state of one sequence, after a run that only warms up."""
    import torch

    from fusiontree.eval.eval_system import stream_stamps
    from fusiontree.eval.report import Speed

    longest = model.config.max_position_embeddings if model.config.srte_encoding == "learned" else SPEED_PROMPT * 2
    length = max(1, min(SPEED_PROMPT, longest - SPEED_TOKENS))
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (1, length), generator=generator).to(model.device)
    for _ in range(2):
        stamps, state_bytes = stream_stamps(model, prompt, SPEED_TOKENS)
    return Speed(
        prompt_tokens=length,
        new_tokens=SPEED_TOKENS,
        first_token_seconds=stamps[1] - stamps[0],
        decode_tokens_per_second=(len(stamps) - 2) / (stamps[-1] - stamps[1]),
        state_bytes=state_bytes,
    )


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started
