"""A vision transformer tower (https://arxiv.org/abs/2010.11929) and the projector behind it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmforge_builder.blocks.layers import LayerNorm, Linear, activation


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """Geometry of a tower.

    Attributes:
        image_size, patch_size: In pixels; patches that do not fit are left out.
        hidden_size, intermediate_size, heads: Of a layer.
        layers: Only those that run: later ones are not exported.
        norm_eps: Of all norms.
        activation: Of the layers' MLP.
        keep_class_token: Whether the class token's feature is one of the features.
        class_token: Whether there is one, before the patches.
        patch_bias, qkv_bias: Whether these projections have biases.
        pre_norm, post_norm: Whether there is a norm before the layers, and behind them.
        layer_scale: Whether what a layer adds is scaled (https://arxiv.org/abs/2103.17239).
    """

    image_size: int
    patch_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    norm_eps: float
    activation: str
    keep_class_token: bool = False
    class_token: bool = True
    patch_bias: bool = False
    qkv_bias: bool = True
    pre_norm: bool = True
    post_norm: bool = False
    layer_scale: bool = False

    @property
    def patches(self) -> int:
        """Number of patches of one image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """Number of features of one image."""
        return self.patches + int(self.keep_class_token)


@dataclass(frozen=True, slots=True)
class ProjectorConfig:
    """What is between the tower and the decoder.

    Attributes:
        activation: Between two linear layers; None: one, without a bias.
        shuffle: So many patches along each side become one row, their features side by side.
        input_norm_eps: Of a layer normalisation before all; None: there is none.
        norm_eps: Of those behind each linear layer, the first before the activation; None: none.
    """

    activation: str | None
    shuffle: int = 1
    input_norm_eps: float | None = None
    norm_eps: float | None = None

    def rows(self, tower: VisionConfig) -> int:
        """Features of one image."""
        return tower.tokens // self.shuffle**2


class VisionAttention(nn.Module):
    """Bidirectional multi-head attention; `qkv` holds the three projections."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
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
        self.attn_scale = self.mlp_scale = None
        if config.layer_scale:
            self.attn_scale = nn.Parameter(torch.empty(config.hidden_size))
            self.mlp_scale = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """`x [n, tokens, hidden]` to the same shape."""
        mixed = self.attn(self.attn_norm(x))
        x = x + (mixed if self.attn_scale is None else mixed * self.attn_scale)
        mixed = self.fc2(activation(self.act, self.fc1(self.mlp_norm(x))))
        return x + (mixed if self.mlp_scale is None else mixed * self.mlp_scale)  # type: ignore[no-any-return]


class VisionTower(nn.Module):
    """Patches, position embedding and encoder layers, and what of the rest the tower has."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.keep_class_token = config.keep_class_token
        self.patch = nn.Parameter(
            torch.empty(config.hidden_size, 3, config.patch_size, config.patch_size)
        )
        self.patch_bias = self.class_token = self.pre_norm = self.post_norm = None
        if config.patch_bias:
            self.patch_bias = nn.Parameter(torch.empty(config.hidden_size))
        if config.class_token:
            self.class_token = nn.Parameter(torch.empty(config.hidden_size))
        places = config.patches + int(config.class_token)
        self.positions = nn.Parameter(torch.empty(places, config.hidden_size))
        if config.pre_norm:
            self.pre_norm = LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.layers))
        if config.post_norm:
            self.post_norm = LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`pixel_values [n, 3, H, W]` to `[n, tokens, hidden]`."""
        x = F.conv2d(pixel_values, self.patch, self.patch_bias, stride=self.patch.shape[-1])
        x = x.flatten(2).transpose(1, 2)
        if self.class_token is not None:
            x = torch.cat((self.class_token.expand(x.shape[0], 1, -1), x), dim=1)
        x = x + self.positions
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        for layer in self.layers:
            x = layer(x)
        if self.post_norm is not None:
            x = self.post_norm(x)
        return x if self.keep_class_token or self.class_token is None else x[:, 1:]


class Projector(nn.Module):
    """Tower width to decoder width, by one or two linear layers."""

    def __init__(self, config: ProjectorConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self.act, self.shuffle = config.activation, config.shuffle
        inputs *= config.shuffle**2
        self.norm0 = self.norm1 = self.norm2 = self.fc2 = None
        if config.input_norm_eps is not None:
            self.norm0 = LayerNorm(inputs, eps=config.input_norm_eps)
        self.fc1 = Linear(inputs, outputs, bias=config.activation is not None)
        if config.activation is not None:
            self.fc2 = Linear(outputs, outputs, bias=True)
        if config.norm_eps is not None:
            self.norm1 = LayerNorm(outputs, eps=config.norm_eps)
            self.norm2 = LayerNorm(outputs, eps=config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """`x [n, patches, inputs]` to `[n, rows, outputs]`."""
        x = pixel_shuffle(x, self.shuffle)
        x = self.fc1(x if self.norm0 is None else self.norm0(x))
        if self.norm1 is not None:
            x = self.norm1(x)
        if self.act is not None and self.fc2 is not None:
            x = self.fc2(activation(self.act, x))
        return x if self.norm2 is None else self.norm2(x)


def pixel_shuffle(x: Tensor, factor: int) -> Tensor:
    """`[n, side * side, width]` to `[n, (side / factor) ** 2, factor ** 2 * width]`.

    The features of neighbours come row by row. Only the views are of a varying number.
    """
    if factor == 1:
        return x
    side, width = math.isqrt(x.shape[1]) // factor, x.shape[2]
    x = x.reshape(-1, side, factor, side, factor * width).transpose(2, 3)
    return x.reshape(-1, side * side, factor * factor * width)


class VisionEncoder(nn.Module):
    """Tower and projector: pixels to rows that take the place of token embeddings.

    With `extra_row` every view's rows are followed by a learned one that is the same for all, such
    as what ends the lines of a picture made of several views.
    """

    def __init__(
        self,
        config: VisionConfig,
        projector: ProjectorConfig,
        *,
        outputs: int,
        extra_row: bool = False,
    ) -> None:
        super().__init__()
        self.tower = VisionTower(config)
        self.projector = Projector(projector, config.hidden_size, outputs)
        self.extra_row = nn.Parameter(torch.empty(outputs)) if extra_row else None

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`pixel_values` float32 `[n, 3, H, W]` to features `[n, tokens, outputs]`."""
        rows: Tensor = self.projector(self.tower(pixel_values))
        if self.extra_row is None:
            return rows
        return torch.cat((rows, self.extra_row.expand(rows.shape[0], 1, -1)), dim=1)
