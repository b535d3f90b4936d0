"""A model that is taught to look things up (MQAR) beside its text, for `pruning.py`: which cuts take recall?"""

from __future__ import annotations

import torch
from recall import STAGE_ENDS, draw, stages
from training_run import Recipe, build_optimizers, update

from fusiontree.data.batch import Batch
from fusiontree.deploy.calibration import CalibrationText
from fusiontree.eval.mqar import MQARTask, mqar_accuracy
from fusiontree.models import HybridLanguageModel

TASK = MQARTask(length=256, pairs=16, vocab_size=64)
ROWS, TEXT_ROWS = 8, 4  # of a step, of the task's length each
TEST_ROWS, TEST_SEED = 256, 10**6


def teach(model: HybridLanguageModel, text: CalibrationText, recipe: Recipe) -> None:
    """Train `model` on rows of the task, easy ones first, and on rows of text."""
    model.train()
    optimizers = build_optimizers(model, recipe.optimizer)
    for step in range(1, recipe.steps + 1):
        easy = next(
            stage for end, stage in zip(STAGE_ENDS, stages(TASK), strict=True) if step <= round(end * recipe.steps)
        )
        rows = draw(easy, ROWS * TASK.length // easy.length, step, recipe.seed)
        chosen = torch.arange(TEXT_ROWS * step, TEXT_ROWS * (step + 1)) % len(text.input_ids)
        ids, positions = text.input_ids[chosen], text.position_ids[chosen]
        with recipe.autocast():
            asked = model(rows.input_ids, position_ids=rows.position_ids, labels=rows.labels).loss
            read = model(ids, position_ids=positions, labels=ids).loss
        (asked + read).backward()
        update(model, optimizers, recipe.rate(step))
        if step % max(1, recipe.steps // 20) == 0:
            right, _ = mqar(model, rows=32)
            print(f"recall: step {step} loss {asked.item():.3f} and {read.item():.3f}, found {right:.3f}", flush=True)
    model.eval()


@torch.no_grad()
def mqar(model: HybridLanguageModel, rows: int = TEST_ROWS) -> tuple[float, float]:
    """The share of the task's answers that are found in unseen rows, and the answers' loss."""
    was_training = model.training
    model.eval()
    losses = []

    def logits(batch: Batch) -> torch.Tensor:
        output = model(batch.input_ids, labels=batch.labels)
        losses.append(output.loss.item())
        return model(batch.input_ids).logits

    found = mqar_accuracy(logits, TASK, rows=rows, seed=TEST_SEED)
    model.train(was_training)
    return found, sum(losses) / len(losses)
