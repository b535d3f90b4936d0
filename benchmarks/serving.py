"""A served model under load: does it answer right, how fast, and what do prefixes and states cost.

    python benchmarks/serving.py --tasks load --seconds 600 --streams 64
    python benchmarks/serving.py --tasks throughput prefix state
    python benchmarks/serving.py --model runs/some-run …           # a trained model with a tokenizer

Without `--model` the weights are random, drawn wide so that the two best logits seldom lie close together, and the
tokenizer is trained on the standard library. The record replaces that of equal settings in
`benchmarks/results/serving_<cpu>.json`, with a report in the `.md` beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import httpx2
import records
import torch
from candidates import OURS, SIZES, Size, build
from serving_client import Expected, Reply, Server, ask, run_load
from transformers import DynamicCache, GenerationConfig

from fusiontree import load
from fusiontree.data import load_tokenizer, train_bpe
from fusiontree.data.embedded import write_embedded_corpus
from fusiontree.deploy.runtime import InferenceRuntime
from fusiontree.deploy.slots import length_class
from fusiontree.eval.eval_system import tensor_bytes
from fusiontree.models import HybridCache

TASKS = ("load", "throughput", "prefix", "state")
PIECE = 512


def make_model(folder: Path, size: Size) -> Path:
    """Our model at `size` with wide random weights, and a tokenizer of its vocabulary."""
    train, _ = write_embedded_corpus(folder / "corpus", max_bytes=1_000_000)
    train_bpe([str(train)], size.vocab_size, str(folder / "tokenizer"), "text")
    model = build(OURS, size, seed=0).model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and not name.endswith("A_log"):
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
    model.save_pretrained(folder / "model")
    load_tokenizer(folder / "tokenizer").save_pretrained(folder / "model")
    return folder / "model"


def draw_prompt(draw: random.Random, vocabulary: int, length: int) -> list[int]:
    return [draw.randrange(4, vocabulary) for _ in range(length)]


class Bench:
    """The tasks on one model folder."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.name = folder.name
        dtype = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
        self.runtime = InferenceRuntime(load(folder, device="cpu", dtype=dtype))
        self.vocabulary = len(self.runtime.tokenizer)

    def serve(self, *arguments: str) -> Server:
        compiled = ["--compile"] if self.options.compiled else []
        rows = ["--max-rows", str(self.options.streams), "--dtype", self.options.dtype]
        return Server(self.folder, self.options.threads, *rows, *compiled, *arguments)

    def load(self) -> dict[str, Any]:
        options, draw = self.options, random.Random(1)
        shared = draw_prompt(draw, self.vocabulary, options.prompt_tokens // 2)
        prompts = []
        for number in range(options.pool):
            prompt = shared if number % 3 == 0 else []
            prompts.append(prompt + draw_prompt(draw, self.vocabulary, draw.randint(1, options.prompt_tokens)))
        lengths = self._long_lengths(draw)
        for number, length in enumerate(lengths):
            prompts[number] = draw_prompt(draw, self.vocabulary, length)
        pool = [Expected.of(self.runtime, prompt, options.new_tokens) for prompt in prompts]
        begun = time.monotonic()
        with self.serve() as server:
            found = asyncio.run(
                run_load(
                    server,
                    self.name,
                    pool,
                    streams=options.streams,
                    seconds=options.seconds,
                    most=options.new_tokens,
                    seed=2,
                )
            )
            seconds = time.monotonic() - begun
            end = time.monotonic() + 30
            while (figures := server.figures())["fusiontree_batch_size"] and time.monotonic() < end:
                time.sleep(0.1)
        left = {name: figures[f"fusiontree_{name}"] for name in ("batch_size", "queue_length", "state_bytes")}
        hits = figures["fusiontree_prefix_hits_total"]
        prompt_tokens = {"long_prompts": len(lengths), "longest_prompt": max(map(len, prompts))}
        return found.summary(seconds) | prompt_tokens | {"left_behind": left, "prefix_hits": hits}

    def _long_lengths(self, draw: random.Random) -> list[int]:
        """Of the long prompts of the load, read in pieces; rows behind the first outgrow their class of lengths."""
        options, bound = self.options, length_class(1)
        count = min(options.pool, math.ceil(options.long_share * options.pool))
        lengths = [draw.randint(options.long_tokens // 4, options.long_tokens) for _ in range(count)]
        if count and options.long_tokens >= bound:
            lengths[0] = bound - options.new_tokens // 2
        return lengths

    def throughput(self) -> dict[str, Any]:
        options, draw = self.options, random.Random(3)
        prompts = [draw_prompt(draw, self.vocabulary, options.prompt_tokens) for _ in range(options.requests)]
        torch.set_num_threads(options.threads)
        peer: Any = build("falcon_h1", SIZES[options.size], seed=0, chunk_size=64).model
        peer = peer.eval().to(self.runtime.model.dtype)
        rounds = []
        with self.serve("--prefix-memory", "0") as server:
            for _ in range(options.rounds):  # in turns: the machine may be faster now than it was before
                at_once = asyncio.run(self._ask_all(server, prompts, at_once=True))
                single = asyncio.run(self._ask_all(server, prompts[: options.singles], at_once=False))
                rounds.append((at_once, single, self._peer_rate(peer, prompts)))
        at_once, single, generated = (median(figures) for figures in zip(*rounds, strict=True))
        return {
            "at_once": at_once,
            "one_by_one": single,
            "falcon_h1_generate": generated,
            "at_once_to_one_by_one": median(one / other for one, other, _ in rounds),
            "at_once_to_falcon_h1": median(one / other for one, _, other in rounds),
            "rounds": [[round(figure, 1) for figure in figures] for figures in rounds],
        }

    def _fields(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        # The end token is ruled out: every text has the same length.
        bias = {str(token): -100 for token in self.runtime.end_ids}
        return {"model": self.name, "prompt": prompt, "max_tokens": new_tokens, "logit_bias": bias}

    async def _ask_all(self, server: Server, prompts: list[list[int]], at_once: bool) -> float:
        """Tokens per second."""
        async with httpx2.AsyncClient(base_url=server.url, timeout=None) as client:
            wanted = self.options.new_tokens
            await ask(client, self._fields(prompts[0], 4))  # warms up
            begun = time.perf_counter()
            calls = [ask(client, self._fields(prompt, wanted)) for prompt in prompts]
            replies = await asyncio.gather(*calls) if at_once else [await call for call in calls]
            seconds = time.perf_counter() - begun
        assert all(reply.tokens == wanted for reply in replies)
        return wanted * len(prompts) / seconds

    def _peer_rate(self, model: Any, prompts: list[list[int]]) -> float:
        """Tokens per second of `transformers`' Falcon-H1 of equal size, all prompts as one batch."""
        ids, wanted = torch.tensor(prompts), self.options.new_tokens
        config = GenerationConfig(max_new_tokens=wanted, min_new_tokens=wanted, do_sample=False, pad_token_id=0)
        begun = time.perf_counter()
        with torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return wanted * len(prompts) / (time.perf_counter() - begun)

    def prefix(self) -> dict[str, Any]:
        options, draw = self.options, random.Random(4)
        shared = draw_prompt(draw, self.vocabulary, options.shared_tokens)
        prompts = [shared + draw_prompt(draw, self.vocabulary, draw.randint(4, 16)) for _ in range(options.questions)]
        found, texts = {}, {}
        for name, memory in (("without", "0"), ("with", "256MiB")):
            with self.serve("--prefix-memory", memory) as server:
                replies = asyncio.run(self._ask_in_turn(server, [shared, *prompts]))[1:]
            found[name] = median(reply.first or 0.0 for reply in replies)
            texts[name] = [reply.text for reply in replies]
        verdicts: dict[str, int] = {}
        for prompt, *pair in zip(prompts, texts["without"], texts["with"], strict=True):
            verdict = "equal"
            if pair[0] != pair[1]:  # the worse of the two, beside the prompt alone
                expected = Expected.of(self.runtime, prompt, 8)
                of_each = {expected.verdict(text, 8, is_whole=True) for text in pair}
                verdict = next(worst for worst in ("wrong", "near tie", "equal") if worst in of_each)
            verdicts[verdict] = verdicts.get(verdict, 0) + 1
        return {
            "first_token_without": found["without"],
            "first_token_with": found["with"],
            "ratio": found["without"] / found["with"],
            "verdicts": verdicts,
        }

    async def _ask_in_turn(self, server: Server, prompts: list[list[int]]) -> list[Reply]:
        async with httpx2.AsyncClient(base_url=server.url, timeout=None) as client:
            return [await ask(client, self._fields(prompt, 8)) for prompt in prompts]

    @torch.no_grad()
    def state(self) -> dict[str, Any]:
        """Bytes that one sequence holds after `--context` tokens, ours and Llama's, both read to that length."""
        length, model = self.options.context, self.runtime.model
        llama: Any = build("llama", SIZES[self.options.size], seed=0).model.eval().to(model.dtype)
        found = {}
        for name, reader, cache in (
            ("fusiontree", model, HybridCache(model.config, capacity=length)),
            ("llama", llama, DynamicCache(config=llama.config)),
        ):
            for start in range(0, length, PIECE):
                ids = torch.randint(4, self.vocabulary, (1, min(PIECE, length - start)))
                reader(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            found[name] = sum(tensor_bytes(cache).values())
        return found | {"ratio": found["llama"] / found["fusiontree"]}


def report(runs: list[dict]) -> str:
    parts = ["# Serving\n"]
    for run in runs:
        options, found = run["settings"], run["results"]
        rows = f"{options['streams']} rows at most" + (", compiled steps" if options["compiled"] else "")
        parts.append(f"## {options['size']}, {options['dtype']}, {options['threads']} thread(s), {rows}\n")
        for task, figures in found.items():
            parts.append(f"**{task}**\n")
            parts += ["| figure | |", "|---|---|"]
            parts += [f"| {name.replace('_', ' ')} | {_shown(value)} |" for name, value in figures.items()]
            parts.append("")
        parts.append(f"Load average before: {run['load']}. " + records.origin([run]))
    return "\n".join(parts)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(inner)}" for name, inner in value.items()) or "none"
    if isinstance(value, list):
        return "; ".join(" / ".join(map(_shown, inner)) for inner in value)
    return f"{value:,.4g}" if isinstance(value, float) and abs(value) < 1e4 else f"{value:,}" if value else "0"


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--model", type=Path, help="a trained one of the size, instead of random weights")
    parser.add_argument("--size", choices=SIZES, default="20M")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compiled", action="store_true", help="the server compiles its steps")
    parser.add_argument("--streams", type=int, default=64, help="of the load, and rows of the server")
    parser.add_argument("--seconds", type=float, default=600.0, help="of the load")
    parser.add_argument("--pool", type=int, default=48, help="different prompts of the load")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--long-share", type=float, default=0.1, help="of the load's prompts; 0 = none")
    parser.add_argument("--long-tokens", type=int, default=3000, help="of these prompts at most, a quarter at least")
    parser.add_argument("--requests", type=int, default=32, help="at once, of the throughput")
    parser.add_argument("--rounds", type=int, default=3, help="of the throughput")
    parser.add_argument("--singles", type=int, default=8, help="requests measured one by one")
    parser.add_argument("--shared-tokens", type=int, default=4096)
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--results", type=Path, default=records.RESULTS)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = arguments(argv)
    torch.set_num_threads(options.threads)
    before = round(os.getloadavg()[0], 2)
    with tempfile.TemporaryDirectory() as directory:
        folder = options.model or make_model(Path(directory), SIZES[options.size])
        bench, results = Bench(options, folder), {}
        for task in options.tasks:
            results[task] = getattr(bench, task)()
            print(task, results[task], flush=True)
    settings = {name: value for name, value in vars(options).items() if name not in ("results", "model")}
    record = {
        "settings": settings | {"trained": options.model is not None},
        "results": results,
        "load": before,
        "threads": options.threads,
        **records.provenance(),
        "revision": records.code_revision("models", "ops", "deploy"),
        "command": " ".join(["python benchmarks/serving.py", *records.shown_arguments(argv)]),
    }
    records.save_for_cpu(options.results, "serving", record, report)


if __name__ == "__main__":
    main(sys.argv[1:])
