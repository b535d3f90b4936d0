"""One token per row through all blocks and the head as one program: compiled on CPU, a captured graph on CUDA.

A step of decoding is some hundred small operations, and what it costs is mostly their number. One program serves every
length: it reads more of the state's buffers than is filled, a graph all of it, and masks the rest.

Shapes: B batch, H hidden, V vocabulary, L layers.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn as nn

from fusiontree.errors import InputError
from fusiontree.models.cache import HybridCache, HybridLayerState
from fusiontree.models.layout import Layout

if TYPE_CHECKING:
    from fusiontree.models.hybrid_model import HybridLanguageModel

# Programs that are kept; on CPU each holds the weights once more, in the order in which it reads them.
_MAX_PROGRAMS = 4
_SLOTS = 64  # of a state's buffers: those that are read grow by so many
_TYPICAL_SLOTS = 512  # for which a program is tuned: the compiler shares loops among threads by the sizes it sees first
_CPU_OPTIONS: dict[str, Any] = {
    # Only fixed weights can be laid out for products of few rows, which are then several times as fast.
    "freezing": True,
    # The program calls its kernels without Python, whose lock other threads then have, such as a server's.
    "cpp_wrapper": True,
    "max_autotune": True,
    "autotune_num_choices_displayed": 0,
    "max_autotune_report_choices_stats": False,
}


def _gemm_backends(rows: int) -> str:
    """Where products are looked for: of one row, none is faster than those that torch writes itself."""
    return "CPP" if rows == 1 else "ATEN,CPP"


class StepInputs(NamedTuple):
    """What changes from step to step, beside the state.

    x: [B, 1, H] embeddings. lengths, next_position: [B] of the state before the step. cos, sin: [B or 1, 1, D/2].
    time_encoding: [B or 1, 1, H]. slots: [S, 0], which says that S slots of the state's buffers are read.
    """

    x: torch.Tensor
    lengths: torch.Tensor
    next_position: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    time_encoding: torch.Tensor
    slots: torch.Tensor

    @classmethod
    def of(
        cls,
        x: torch.Tensor,
        layout: Layout,
        rotary: tuple[torch.Tensor, torch.Tensor],
        time_encoding: torch.Tensor,
        cache: HybridCache,
    ) -> StepInputs:
        next_position = layout.position_ids[:, 0].expand(len(x))
        read = cache.capacity if x.is_cuda else -(-layout.max_length // _SLOTS) * _SLOTS
        slots = x.new_empty(min(read, cache.capacity), 0)
        inputs = (x, layout.carried, next_position, *rotary, time_encoding, slots)
        return cls(*(tensor.contiguous() for tensor in inputs))  # one program, whatever the strides


class StepOutputs(NamedTuple):
    """hidden: [B, 1, H] of the last block. logits: [B, 1, V]. gates: each block's gate logits, L of [B, 1, H]."""

    hidden: torch.Tensor
    logits: torch.Tensor
    gates: list[torch.Tensor]


_Program = Callable[[StepInputs, Sequence[HybridLayerState]], StepOutputs]


class DecodingProgram:
    """The programs of one model, each made when the first step of its shape is taken, and again if weights change.

    Writing to a weight's `.data` is no change that can be seen: make a new one after that.

    Raises:
        InputError: on CPU, there is no C++ compiler.
    """

    def __init__(self, model: HybridLanguageModel):
        self._model = model
        self._programs: dict[tuple, _Program] = {}
        if model.device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
            raise InputError(
                "a compiled decoding step needs a C++ compiler: install g++, or name another one in the environment "
                "variable CXX"
            )

    def takes(self, x: torch.Tensor, layout: Layout, cache: HybridCache | None) -> bool:
        """Whether this forward pass is a step that can be run as a program; the first token of a state cannot."""
        return (
            cache is not None
            and cache.is_initialized
            and x.shape[1] == 1
            and layout.max_length <= cache.capacity
            and not (layout.explicit or layout.mask is not None or torch.is_grad_enabled() or self._model.training)
            and not torch.is_autocast_enabled(x.device.type)
        )

    def __call__(self, inputs: StepInputs, cache: HybridCache) -> StepOutputs:
        """One step; writes the state's tensors, but none of the cache's counts."""
        x = inputs.x
        # A graph is bound to the tensors of one state; what was compiled reads any of as many rows.
        states = [tensor.data_ptr() for tensor in cache.tensors()] if x.is_cuda else []
        weights = _weights_of(self._model)
        room = cache.capacity if x.is_cuda else None
        key = (x.shape, x.dtype, x.device, torch.is_inference_mode_enabled(), room, *states, *weights)
        program = self._programs.get(key)
        if program is None:
            while len(self._programs) >= _MAX_PROGRAMS:
                self._programs.pop(next(iter(self._programs)))
            make = _captured if x.is_cuda else _compiled
            program = self._programs[key] = make(_step_of(self._model), inputs, cache)
        return program(inputs, cache.layers)


def _weights_of(model: nn.Module) -> list[tuple[int, int]]:
    """How often each weight was written to, and where it lies; `parameters()` would take a tenth of a step."""
    found: list[tuple[int, int]] = []
    modules: list[nn.Module | None] = [model]
    while modules:
        if (module := modules.pop()) is not None:
            modules += module._modules.values()
            for weight in module._parameters.values():
                if weight is not None:
                    found.append((0 if weight.is_inference() else weight._version, weight.data_ptr()))
    return found


def _step_of(model: HybridLanguageModel) -> _Program:
    blocks, head = list(model.layers), model.lm_head

    def step(inputs: StepInputs, states: Sequence[HybridLayerState]) -> StepOutputs:
        x, gates = inputs.x, []
        layout = _fixed_layout(inputs.lengths, inputs.next_position, len(inputs.slots))
        for block, state in zip(blocks, states, strict=True):
            x, block_gates = block(x, layout, (inputs.cos, inputs.sin), inputs.time_encoding, state)
            gates += block_gates.gate
        return StepOutputs(x, head(x), gates)

    return step


def _fixed_layout(lengths: torch.Tensor, next_position: torch.Tensor, most: int) -> Layout:
    """One more token on each row of a state, of which no length is known but that it is not above `most`."""
    place = lengths[:, None]
    return Layout(
        position_ids=next_position[:, None],
        reset=None,
        mask=None,
        place=place,
        final_place=place,
        last_real=None,
        last_reset=None,
        carried=lengths,
        read=lengths,
        lengths=lengths + 1,
        next_position=next_position + 1,
        max_position=most,
        max_length=most,
        past_length=most,
        explicit=False,
        even=False,
        unchecked=True,  # the state's buffers start as zeros, and a row writes its own slots alone
    )


def _compiled(step: _Program, inputs: StepInputs, cache: HybridCache) -> _Program:
    # torch keeps what it compiles with the code object, which all models share, and then looks at the modules again in
    # every step to tell them apart. A code object of its own makes that look unnecessary.
    step.__code__ = step.__code__.replace()
    compiled = torch.compile(
        step,
        fullgraph=True,
        options=_CPU_OPTIONS
        | {
            "max_autotune_gemm_backends": _gemm_backends(len(inputs.x)),
            "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
        },
    )

    example = cache.clone()  # the call that compiles is a step as well
    example.resize(len(inputs.x), max(cache.capacity, _TYPICAL_SLOTS))
    inputs = inputs._replace(slots=inputs.slots.new_empty(max(len(inputs.slots), _TYPICAL_SLOTS), 0))
    states = example.layers
    for state in states:
        for buffer in (state.global_keys, state.global_values):
            if buffer is not None:
                torch._dynamo.mark_dynamic(buffer, 2)  # one program for all capacities
    torch._dynamo.mark_dynamic(inputs.slots, 0)

    def run(inputs: StepInputs, states: Sequence[HybridLayerState]) -> StepOutputs:
        with torch._inductor.config.patch(freezing=True):  # read before the options are
            return compiled(inputs, states)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated")  # torch's own, as it times products
        run(inputs, states)
    return run


def _captured(step: _Program, inputs: StepInputs, cache: HybridCache) -> _Program:
    """`step` as a graph over copies of `inputs` and the tensors of `cache`, as they stand after one step."""
    kept = StepInputs(*(tensor.clone() for tensor in inputs))
    before = [tensor.clone() for tensor in cache.tensors()]
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step(kept, cache.layers)  # kernels are compiled and workspaces allocated outside of the graph
    torch.cuda.current_stream().wait_stream(aside)
    for tensor, value in zip(cache.tensors(), before, strict=True):
        tensor.copy_(value)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(kept, cache.layers)

    def run(inputs: StepInputs, states: Sequence[HybridLayerState]) -> StepOutputs:
        for place, value in zip(kept, inputs, strict=True):
            place.copy_(value)
        graph.replay()
        # The next replay writes over them.
        return StepOutputs(outputs.hidden.clone(), outputs.logits.clone(), [gate.clone() for gate in outputs.gates])

    return run
