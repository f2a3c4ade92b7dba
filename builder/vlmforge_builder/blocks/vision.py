"""A vision transformer tower (https://arxiv.org/abs/2010.11929) and the projector behind it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmforge_builder.blocks.layers import LayerNorm, Linear, activation


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """Geometry of a tower. `layers` counts only those that run: later ones are not exported."""

    image_size: int
    patch_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    norm_eps: float
    activation: str
    keep_class_token: bool

    @property
    def patches(self) -> int:
        """Number of patches of one image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """Number of features of one image."""
        return self.patches + int(self.keep_class_token)


class VisionAttention(nn.Module):
    """Bidirectional multi-head attention; `qkv` holds the three projections."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, bias=True)
        self.out = Linear(config.hidden_size, config.hidden_size, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """`x [n, tokens, hidden]` to the same shape."""
        split = [part.unflatten(-1, (self.heads, -1)) for part in self.qkv(x).chunk(3, dim=-1)]
        q, k, v = (part.transpose(1, 2) for part in split)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class VisionLayer(nn.Module):
    """One pre-norm encoder layer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.act = config.activation
        self.attn_norm = LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = VisionAttention(config)
        self.mlp_norm = LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """`x [n, tokens, hidden]` to the same shape."""
        x = x + self.attn(self.attn_norm(x))
        return x + self.fc2(activation(self.act, self.fc1(self.mlp_norm(x))))  # type: ignore[no-any-return]


class VisionTower(nn.Module):
    """Patches, class token, position embedding, pre-norm and encoder layers."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.keep_class_token = config.keep_class_token
        self.patch = nn.Parameter(
            torch.empty(config.hidden_size, 3, config.patch_size, config.patch_size)
        )
        self.class_token = nn.Parameter(torch.empty(config.hidden_size))
        self.positions = nn.Parameter(torch.empty(config.patches + 1, config.hidden_size))
        self.pre_norm = LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.layers))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`pixel_values [n, 3, H, W]` to `[n, tokens, hidden]`."""
        patches = F.conv2d(pixel_values, self.patch, stride=self.patch.shape[-1])
        patches = patches.flatten(2).transpose(1, 2)
        first = self.class_token.expand(patches.shape[0], 1, -1)
        x: Tensor = self.pre_norm(torch.cat((first, patches), dim=1) + self.positions)
        for layer in self.layers:
            x = layer(x)
        return x if self.keep_class_token else x[:, 1:]


class Projector(nn.Module):
    """Two linear layers with an activation between: tower width to decoder width.

    With `norm_eps` a layer normalisation follows each linear layer, the first before the
    activation.
    """

    def __init__(self, inputs: int, outputs: int, *, act: str, norm_eps: float | None) -> None:
        super().__init__()
        self.act = act
        self.fc1 = Linear(inputs, outputs, bias=True)
        self.fc2 = Linear(outputs, outputs, bias=True)
        self.norm1 = self.norm2 = None
        if norm_eps is not None:
            self.norm1 = LayerNorm(outputs, eps=norm_eps)
            self.norm2 = LayerNorm(outputs, eps=norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., inputs]` to `[..., outputs]`."""
        x = self.fc1(x)
        if self.norm1 is not None:
            x = self.norm1(x)
        x = self.fc2(activation(self.act, x))
        return x if self.norm2 is None else self.norm2(x)


class VisionEncoder(nn.Module):
    """Tower and projector: pixels to rows that take the place of token embeddings.

    With `extra_row` every view's rows are followed by a learned one that is the same for all, such
    as what ends the lines of a picture made of several views.
    """

    def __init__(
        self,
        config: VisionConfig,
        *,
        outputs: int,
        projector_act: str,
        projector_norm_eps: float | None = None,
        extra_row: bool = False,
    ) -> None:
        super().__init__()
        self.tower = VisionTower(config)
        self.projector = Projector(
            config.hidden_size, outputs, act=projector_act, norm_eps=projector_norm_eps
        )
        self.extra_row = nn.Parameter(torch.empty(outputs)) if extra_row else None

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`pixel_values` float32 `[n, 3, H, W]` to features `[n, tokens, outputs]`."""
        rows: Tensor = self.projector(self.tower(pixel_values))
        if self.extra_row is None:
            return rows
        return torch.cat((rows, self.extra_row.expand(rows.shape[0], 1, -1)), dim=1)
