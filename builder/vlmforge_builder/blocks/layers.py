"""Layers that every part is assembled from.

Linear weights are stored `[in, out]`: what a row-major matrix product reads in order, so one-token
decoding streams each weight once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Linear(nn.Module):
    """`x [..., in] -> x @ weight [in, out] + bias [out]`."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last dimension."""
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class LayerNorm(nn.Module):
    """Layer normalisation over the last dimension (https://arxiv.org/abs/1607.06450)."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x [..., width]`."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """Root mean square normalisation over the last dimension (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x [..., width]`."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def activation(name: str, x: Tensor) -> Tensor:
    """The activations that checkpoints name.

    `gelu` (erf), `gelu_pytorch_tanh` (its approximation), `quick_gelu`, `silu`, `relu`.

    Raises:
        KeyError: any other name; recipes check theirs with `ACTIVATIONS` first.
    """
    match name:
        case "gelu":
            return F.gelu(x)
        case "gelu_pytorch_tanh":
            return F.gelu(x, approximate="tanh")
        case "quick_gelu":
            return x * torch.sigmoid(1.702 * x)
        case "silu":
            return x * torch.sigmoid(x)
        case "relu":
            return F.relu(x)
    raise KeyError(name)


ACTIVATIONS = frozenset({"gelu", "gelu_pytorch_tanh", "quick_gelu", "silu", "relu"})
