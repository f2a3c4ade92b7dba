"""Muon for the matrices, AdamW for the rest, and the learning rate's course."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn, optim

from vlmforge_recipes.llava.demo.spec import Training

_EMBEDDINGS = ("embed_tokens", "position_embedding", "patch_embedding", "lm_head", "patch_heads")


def optimizers(model: nn.Module, training: Training) -> Sequence[optim.Optimizer]:
    """The optimizers (Muon: https://kellerjordan.github.io/posts/muon/)."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        hidden = parameter.ndim == 2 and not any(word in name for word in _EMBEDDINGS)
        (matrices if hidden else rest).append(parameter)
    return (
        optim.Muon(
            matrices,
            lr=training.matrix_lr,
            weight_decay=training.weight_decay,
            nesterov=True,
        ),
        optim.AdamW(rest, lr=training.other_lr, betas=(0.9, 0.95), weight_decay=0.0),
    )


def rate(step: int, training: Training) -> float:
    """Share of the full learning rate at `step`: linear warm-up, flat, then linear to nothing."""
    warm = (step + 1) / training.warmup
    cooling = (training.steps - step) / (training.cooling * training.steps)
    return min(warm, cooling, 1.0)
