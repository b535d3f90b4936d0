"""What gradient checkpointing, shared rotary tables and attention without scores save, and what recomputing costs.

    python benchmarks/memory.py                        # 20M parameters, 4096x1, bf16 autocast
    python benchmarks/memory.py --shape 1024x4 --dtype float32

Bytes are counted, not sampled, on tensors that have sizes but no memory, without head and loss: those that autograd
saves for the backward pass (every storage once, parameters left out), those alive when the forward pass ends, and the
most alive at a time in either pass. Time is CPU time of whole training steps, the scopes in turns in one process. Peak
resident memory is that of a process for each scope. The record goes to `results/memory_<cpu>.json`, its tables to the
`.md` beside it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from unittest.mock import patch

import memory_report
import records
import torch
from candidates import OURS, SIZES, build, our_config
from speed import peak_bytes, resident_bytes
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from training_run import RepeatedStep, Shape

from fusiontree.models import HybridLanguageModel, HybridLanguageModelConfig, local_global_attn
from fusiontree.models.layout import SinusoidTable
from fusiontree.train.activations import LiveBytes, estimate_activations
from fusiontree.train.settings import RunSettings
from fusiontree.train.setup import enable_gradient_checkpointing

AS_IT_SHIPS = "as it ships"
SCOPES = ("off", "mamba", "attention", "branches", "block")
#: What is counted beside the scopes.
VARIANTS = (("own tables", "off"), ("scores", "off"), ("scores", "branches"))
#: The original 8-GPU recipe's model is the default one; this is its micro-batch.
RECIPE = HybridLanguageModelConfig()
RECIPE_SHAPE = (4, 1024)


def set_scope(model: HybridLanguageModel, scope: str) -> None:
    model.activation_checkpointing_disable()
    enable_gradient_checkpointing(model, None if scope == "off" else scope)


def count(model: HybridLanguageModel, forward: Callable[[], torch.Tensor]) -> dict:
    """Bytes of one forward and one backward pass of the scalar that `forward` computes.

    Returns:
        saved: for the backward pass; weight_copies: what of it are narrower copies of weights (autocast's);
        largest: `saved` by module, shape and dtype; held: alive at the end of the forward pass, tables and outputs
        included; peak: most alive at a time, parameters, their gradients and the optimizer's state left out.
    """
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes() as live:
        loss = forward()
        held = live.now
        loss.backward()
    # Second, since the first forward pass builds the tables, which are to be counted above.
    return _saved(model, forward) | {"held": held, "peak": live.peak}


def _saved(model: HybridLanguageModel, forward: Callable[[], torch.Tensor]) -> dict:
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    running: list[tuple[str, nn.Module]] = [("", model)]
    found: dict[int, torch.UntypedStorage] = {}
    sizes: Counter[str] = Counter()
    copies = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal copies
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in found:
            found[storage._cdata] = storage  # alive, so that no other takes its address
            name, module = running[-1]
            shapes = {tuple(parameter.shape) for parameter in module.parameters(recurse=False)}
            if tuple(tensor.shape) in shapes or tuple(tensor.shape[::-1]) in shapes:
                copies += storage.nbytes()
            where = re.sub(r"layers\.\d+", "layers.*", name) or "model"
            sizes[f"{where} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"] += storage.nbytes()
        return tensor

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda m, _, name=name: running.append((name, m))))
        hooks.append(module.register_forward_hook(lambda *_: running.pop() and None))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
    for hook in hooks:
        hook.remove()
    del loss
    return {"saved": sizes.total(), "weight_copies": copies, "largest": dict(sizes.most_common(16))}


@contextmanager
def variant(model: HybridLanguageModel, name: str) -> Iterator[None]:
    """The model as it ships, or without one of its economies.

    `own tables`: each layer has a rotary table of its own, beside the shared one, which nobody reads. `scores`:
    attention as a softmax over a [B, h, T, T] tensor, as in `transformers`' eager attention.
    """
    with ExitStack() as stack:
        if name == "own tables":
            for block in model.layers:
                table = SinusoidTable(model.config.head_dim, model.config.rope_theta)
                hook = block.register_forward_pre_hook(
                    lambda _, args, table=table: (
                        *args[:2],
                        table(args[1].position_ids, args[1].max_position),
                        *args[3:],
                    )
                )
                stack.callback(hook.remove)
        if name == "scores":
            stack.enter_context(patch.object(local_global_attn, "local_global_attention", _attention_with_scores))
        yield


def _attention_with_scores(q, k, v, *, window_size, num_global_heads, layout):
    """One document a row; [B,T,Hq,D], as `local_global_attention`."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q.dtype
    q, k, v = (t.to(dtype).transpose(1, 2) for t in (q, k.repeat_interleave(q.shape[2] // k.shape[2], 2), v))
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    index = torch.arange(q.shape[2])
    distance = index[:, None] - index
    is_global = torch.arange(q.shape[1]) >= q.shape[1] - num_global_heads
    visible = (distance >= 0) & ((distance < window_size) | is_global[:, None, None])
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, float("-inf"))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + mask
    return (torch.softmax(scores, dim=-1, dtype=torch.float32).to(dtype) @ v).transpose(1, 2)


def count_layers(config: HybridLanguageModelConfig, shape: tuple[int, int], dtype: str, name: str, scope: str) -> dict:
    """`count` of a model without head and loss, at [batch, tokens].

    Layers are alike, so two and three of them tell what each adds.
    """
    found = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        for layers in (2, 3):
            fields = config.to_diff_dict() | {"num_layers": layers, "layer_branches": None, "vocab_size": 64}
            fields |= {"num_kv_heads": config.num_kv_heads, "mamba_state_size": config.mamba_state_size}
            names = HybridLanguageModelConfig.__dataclass_fields__.keys() & fields.keys()
            model = HybridLanguageModel(HybridLanguageModelConfig(**{key: fields[key] for key in names})).train()
            set_scope(model, scope)
            input_ids = torch.zeros(shape, dtype=torch.long)

            def forward(model: HybridLanguageModel = model, input_ids: torch.Tensor = input_ids) -> torch.Tensor:
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
                    output = model.backbone(input_ids=input_ids)
                gates = output.gate_stats
                return output.last_hidden_state.sum() + gates.mean.sum() + gates.entropy.sum()

            with variant(model, name):
                found.append(count(model, forward))
    two, three = found
    more = config.num_layers - 2
    whole = {key: two[key] + more * (three[key] - two[key]) for key in ("saved", "weight_copies", "held", "peak")}
    each = {what: two["largest"].get(what, 0) for what in three["largest"]}
    whole["largest"] = {what: size + more * (three["largest"][what] - size) for what, size in each.items()}
    return whole


class Run:
    """Training steps of the default configuration at one size, with any scope."""

    def __init__(self, options: argparse.Namespace):
        candidate = build(OURS, SIZES[options.size], seed=0)
        assert isinstance(candidate.model, HybridLanguageModel)
        self.model = candidate.model
        batch, length = options.batch, options.length
        generator = torch.Generator().manual_seed(0)
        input_ids = torch.randint(1, self.model.config.vocab_size, (batch, length), generator=generator)
        self.repeated = RepeatedStep(candidate, input_ids, options.dtype)

    def step(self, scope: str) -> float:
        """CPU seconds of a training step."""
        set_scope(self.model, scope)
        _, cpu_seconds = self.repeated()
        return cpu_seconds


def peak_of_process(options: argparse.Namespace, scope: str) -> int:
    """Most resident bytes of a process that takes two steps, less what its imports hold.

    It is forked, so call this before this process has built anything.
    """
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_two_steps, (options, scope))


def _two_steps(options: argparse.Namespace, scope: str) -> int:
    torch.set_num_threads(options.threads)
    baseline = resident_bytes()
    run = Run(options)
    for _ in range(2):
        run.step(scope)
    return peak_bytes() - baseline


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="20M")
    parser.add_argument("--shape", type=Shape, default="4096x1", metavar="TxB", help="tokens x rows")
    parser.add_argument("--dtype", choices=("bf16", "float32"), default="bf16")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each scope, after one to warm up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-recipe", action="store_true", help="leave out the original recipe's shape")
    parser.add_argument("--no-processes", action="store_true", help="leave out the peak of a process for each scope")
    parser.add_argument("--results", type=Path, default=records.RESULTS)
    options = parser.parse_args(argv)
    options.length, options.batch = options.shape.length, options.shape.rows
    return options


def main(argv: list[str]) -> None:
    options = arguments(argv)
    torch.set_num_threads(options.threads)
    config, shape = our_config(SIZES[options.size], {}), (options.batch, options.length)
    record = {
        "settings": {key: getattr(options, key) for key in ("size", "shape", "dtype", "threads")},
        "load_before": round(os.getloadavg()[0], 2),
        **records.provenance(),
        "revision": records.code_revision("models", "ops", "train/losses.py"),
        "command": " ".join(["python benchmarks/memory.py", *records.shown_arguments(argv)]),
        "rounds": 0,
        "recipe": [],
    }
    peaks = {} if options.no_processes else {scope: peak_of_process(options, scope) for scope in SCOPES}
    scopes = record["scopes"] = {}
    for scope in SCOPES:
        scopes[scope] = count_layers(config, shape, options.dtype, AS_IT_SHIPS, scope)
        scopes[scope] |= {"dry_run": predicted(options, scope), "peak_of_process": peaks.get(scope)}
        print(f"{scope} saves {scopes[scope]['saved'] / 1e6:.1f} MB for backward", flush=True)
    record["variants"] = [[*pair, count_layers(config, shape, options.dtype, *pair)] for pair in VARIANTS]
    memory_report.save(options.results, record)  # a long run that is stopped keeps what it measured
    if not options.no_recipe:
        pairs = (*((AS_IT_SHIPS, scope) for scope in ("off", "branches", "block")), *VARIANTS)
        record["recipe"] = [[*pair, count_layers(RECIPE, RECIPE_SHAPE, "bf16", *pair)] for pair in pairs]
    run = Run(options)
    run.step("off")  # warms up
    seconds: dict[str, list[float]] = {scope: [] for scope in SCOPES}
    for number in range(options.rounds):
        for scope in SCOPES:
            seconds[scope].append(run.step(scope))
            print(f"round {number} {scope} {seconds[scope][-1]:.2f} CPU s", flush=True)
        record["rounds"] = number + 1
        for scope in SCOPES:
            ratios = [own / off for own, off in zip(seconds[scope], seconds["off"], strict=True)]
            scopes[scope] |= {"cpu_seconds": median(seconds[scope]), "time_to_off": median(ratios)}
        shown = memory_report.save(options.results, record)
    print(shown)


def predicted(options: argparse.Namespace, scope: str) -> int:
    """What `fusiontree train --dry-run` says of the activations."""
    training = {"batch_size": options.batch, "max_seq_length": options.length, "gradient_checkpointing": scope}
    training["mixed_precision"] = "bf16" if options.dtype == "bf16" else "no"
    return estimate_activations(RunSettings.parse({"training": training}), our_config(SIZES[options.size], {})).peak


if __name__ == "__main__":
    main(sys.argv[1:])
