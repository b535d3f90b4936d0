"""Weights in 8 and 4 bits beside those as they are: bytes, speed and loss, printed.

    python benchmarks/quantized.py                                     # 20M with random weights, bf16
    python benchmarks/quantized.py --model runs/quickstart --data runs/quickstart/corpus/eval.jsonl --dtype float32

The forms take turns, round after round: one pass over `--context` tokens, then `--steps` tokens one by one; the medians
are shown. Loss: of whole documents of `--data`, as `fusiontree eval` measures it.
"""

from __future__ import annotations

import argparse
import copy
import time
from statistics import median

import torch
from candidates import OURS, SIZES, build

from fusiontree import load
from fusiontree.deploy.quantized import KINDS, quantize_weights, weight_bytes
from fusiontree.eval.eval_llm import evaluate_perplexity
from fusiontree.eval.texts import Texts
from fusiontree.models import HybridCache, HybridLanguageModel


@torch.inference_mode()
def take_turn(model: HybridLanguageModel, context: int, steps: int) -> tuple[float, float]:
    """Tokens per second of reading and of decoding."""
    ids = torch.randint(model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(0))
    cache = HybridCache(model.config)
    started = time.perf_counter()
    token = model(ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
    read = time.perf_counter()
    for _ in range(steps):
        token = model(token, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
    return context / (read - started), steps / (time.perf_counter() - read)


def measure(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    dtype = {"bf16": torch.bfloat16, "float32": torch.float32}[options.dtype]
    plain = load(options.model, device="cpu") if options.model else build(OURS, SIZES[options.size], seed=0).model
    plain = plain.to(dtype).eval()
    forms = {options.dtype: plain}
    for kind in KINDS:
        forms[kind] = copy.deepcopy(plain)
        print(f"{kind}: {quantize_weights(forms[kind], kind)}", flush=True)
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    for number in range(options.rounds + 1):
        for name, model in forms.items():
            speed = take_turn(model, options.context, options.steps)
            if number:  # the first warms up
                speeds[name].append(speed)
    print("| weights | MB | reading, tok/s | decoding, tok/s | loss |\n|---|---|---|---|---|")
    for name, model in forms.items():
        loss = "–"
        if options.data:
            loss = f"{evaluate_perplexity(model, Texts(options.data), name=name).loss:.4f}"
        read, decoded = (median(column) for column in zip(*speeds[name], strict=True))
        print(f"| {name} | {weight_bytes(model) / 1e6:.2f} | {read:,.0f} | {decoded:.1f} | {loss} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder or run; default: random weights of --size")
    parser.add_argument("--size", choices=SIZES, default="20M")
    parser.add_argument("--dtype", choices=("bf16", "float32"), default="bf16")
    parser.add_argument("--data", nargs="*", help="files to take the loss on; needs --model")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.data and not options.model:
        parser.error("--data needs --model")
    measure(options)


if __name__ == "__main__":
    main()
