"""A frozen causal language model to distil from, split at its output head so that its logits come in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fusiontree.data.tokenizer import holds_tokenizer, load_tokenizer
from fusiontree.errors import InputError, first_line
from fusiontree.models import HybridLanguageModel, HybridLanguageModelConfig
from fusiontree.train.checkpoint import no_progress_bar

if TYPE_CHECKING:
    from fusiontree.data.batch import Batch

_HUB_TIMEOUT_S = 10.0


class Teacher:
    """Hidden states and output head of a causal LM, in evaluation mode and without gradients.

    Args:
        model: any transformers causal LM whose logits are `get_output_embeddings()` of its base model's last state.
        vocabulary: token ids that teacher and student share; logits past it (padding of either) are left out.
        name: for messages.

    Raises:
        InputError: the teacher changes its logits after the head (scaling, soft capping), so they cannot be chunked.
    """

    def __init__(self, model: nn.Module, vocabulary: int, name: str = "teacher"):
        self.model = model.eval().requires_grad_(False)
        self.vocabulary = vocabulary
        self._name = name
        self.head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        base: Any = model.backbone if isinstance(model, HybridLanguageModel) else model.base_model
        self._base: Callable[..., Any] = base
        self._check_head(name)

    @torch.no_grad()
    def hidden_states(self, batch: Batch) -> torch.Tensor:
        """[B, T, G] last hidden states; document boundaries reach the teacher as `position_ids`."""
        return self._base(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).last_hidden_state

    @torch.no_grad()
    def layer_outputs(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """What each layer says, [B, T, H] each, of a teacher that `require_layers_of` has let pass."""
        given = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
        return self._base(**given, use_cache=False, output_hidden_states=True).hidden_states[1:]

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of hidden states [n, G]: [n, vocabulary]."""
        return self.head(hidden)[:, : self.vocabulary]

    def require_layers_of(self, config: HybridLanguageModelConfig) -> None:
        """Whether hidden states can be compared layer by layer.

        Raises:
            InputError: it is no FusionTree model, or one of other sizes than the student's.
        """
        own = self.model.config
        sizes = f"{config.num_layers} layers of width {config.hidden_size}"
        if not isinstance(own, HybridLanguageModelConfig):
            found = f"is a {type(self.model).__name__}"
        elif (own.num_layers, own.hidden_size) != (config.num_layers, config.hidden_size):
            found = f"has {own.num_layers} layers of width {own.hidden_size}"
        else:
            return
        raise InputError(
            f"loss.hidden_coeff compares hidden states layer by layer, but the teacher {self._name} {found}, the "
            f"student a FusionTree model of {sizes}: set loss.hidden_coeff to 0, or name the model it was cut from"
        )

    @torch.no_grad()
    def _check_head(self, name: str) -> None:
        probe = torch.arange(min(8, self.vocabulary), device=next(self.model.parameters()).device)[None]
        whole = self.model(input_ids=probe, use_cache=False).logits
        split = self.head(self._base(input_ids=probe, use_cache=False).last_hidden_state)
        if not torch.allclose(whole.float(), split.float(), atol=1e-3, rtol=1e-3):
            raise InputError(
                f"loss.teacher {name}: its logits are not its output embedding of its last hidden state "
                "(scaled or capped logits); distil from another model"
            )


def check_vocabulary(name: str, tokenizer: Any, vocab_size: int) -> None:
    """Whether `loss.teacher` speaks the student's vocabulary, by its configuration and tokenizer alone.

    Args:
        name: local folder or hub name of a causal LM.
        tokenizer: the student's.
        vocab_size: the student's embedding rows, compared when the teacher's folder holds no tokenizer.

    Raises:
        InputError: there is no such model, or its vocabulary differs.
    """
    folder = Path(name)
    if not folder.is_dir() and (folder.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise InputError(f"loss.teacher: there is no folder {name}")
    with _loading(name):
        config = _config(name)
    rows = config.get_text_config().vocab_size
    # In a folder without a tokenizer the sizes are all there is to compare.
    bare = folder.is_dir() and not holds_tokenizer(folder)
    teachers_ids = None if bare else load_tokenizer(name).get_vocab()
    ids = tokenizer.get_vocab()
    if (teachers_ids != ids) if teachers_ids is not None else (rows != vocab_size):
        raise InputError(
            f"loss.teacher {name!r} has another vocabulary ({rows} rows) than the student's tokenizer "
            f"({len(ids)} tokens): distillation compares token by token, so both must share one tokenizer"
        )


def teacher_parameters(name: str) -> int:
    """Numbers in the teacher, by its configuration alone.

    Raises:
        InputError: there is no such model.
    """
    with _loading(name):
        config = _config(name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def load_teacher(name: str, tokenizer: Any, device: torch.device) -> Teacher:
    """Load `loss.teacher`, of which `check_vocabulary` has been asked.

    Raises:
        InputError: it cannot be loaded, or its logits cannot be had in chunks.
    """
    with _loading(name), no_progress_bar():
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=torch.float32,
            local_files_only=_is_at_hand(name),
            trust_remote_code=False,
            use_safetensors=True,
        )
    rows = model.get_output_embeddings().weight.shape[0]
    return Teacher(model.to(device), vocabulary=min(rows, len(tokenizer.get_vocab())), name=name)


def _config(name: str) -> Any:
    return AutoConfig.from_pretrained(name, local_files_only=_is_at_hand(name), trust_remote_code=False)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of the file system, the network, the hub, safetensors, a configuration
        where = "" if Path(name).is_dir() else "is no folder here and "
        raise InputError(
            f"loss.teacher {name!r} {where}cannot be loaded as a causal LM: {first_line(error)}"
        ) from error


def _is_at_hand(name: str) -> bool:
    """Whether a folder or the hub's local cache has the model; else the hub must know it, which is asked once.

    Loading would retry an unreachable hub for the better part of a minute.
    """
    try:
        AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        return True
    except (OSError, ValueError):
        if Path(name).exists():
            raise
        HfApi().model_info(name, timeout=_HUB_TIMEOUT_S)
        return False
