"""A vision transformer over patches of images of any size, turned by their places.

Its attention is over one image at a time, or in windows of one size, so that what it takes grows
with the patches alone. Images of one grid run beside each other. Sources:
https://arxiv.org/abs/2409.12191 (turned by place), https://arxiv.org/abs/2502.13923 (windows).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmforge.engine.images.patch_inputs import PatchInputs
from vlmforge_builder.blocks.layers import LayerNorm, Linear, RMSNorm, activation
from vlmforge_builder.blocks.long_context import rotate


@dataclass(frozen=True, slots=True)
class PatchVisionConfig:
    """Geometry of the tower and of what merges its patches to tokens.

    Attributes:
        inputs: What it takes.
        hidden_size, layers, heads, norm_eps: Of the tower.
        intermediate_size, activation: Of its MLPs.
        gated: Whether these are gated, and the norms RMS norms.
        patch_bias: Whether the projection of patches has one.
        outputs: Width of the decoder's embeddings.
        whole: Layers whose attention is over the whole image, where `inputs` has windows; all are
            without.
        table: Rows of the table of places; 0: there is none.
        tapped: Layers whose results are merged too, each by a merger of its own, and given behind
            those of the last one.
    """

    inputs: PatchInputs
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    norm_eps: float
    activation: str
    gated: bool
    patch_bias: bool
    outputs: int
    whole: frozenset[int] = frozenset()
    table: int = 0
    tapped: tuple[int, ...] = ()


def _norm(config: PatchVisionConfig, width: int) -> nn.Module:
    kind = RMSNorm if config.gated else LayerNorm
    return kind(width, eps=config.norm_eps)


class Windows(NamedTuple):
    """The windows of an image.

    Attributes:
        rows: `[windows, tokens]`, which are in each.
        sizes: `[windows]`, how many there are.
        places: `[tokens]`, where each token is in all windows one after the other.
    """

    rows: Tensor
    sizes: Tensor
    places: Tensor


class Turned(NamedTuple):
    """What follows from the grid of the images: cosines and sines `[1, patches, head_dim / 2]`."""

    cos: Tensor
    sin: Tensor
    windows: Windows | None = None

    @staticmethod
    def of(cos: Tensor, sin: Tensor, windows: Windows | None = None) -> Turned:
        """Of `[tokens, patches of a token, head_dim / 2]`."""
        rows = [part.flatten(0, 1).unsqueeze(0) for part in (cos, sin)]
        return Turned(rows[0], rows[1], windows)


class PatchAttention(nn.Module):
    """Bidirectional attention of the patches of an image, or of those of a window."""

    def __init__(self, config: PatchVisionConfig, *, whole: bool) -> None:
        super().__init__()
        self.heads, self.whole, self.group = config.heads, whole, config.inputs.group
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, bias=True)
        self.out = Linear(config.hidden_size, config.hidden_size, bias=True)

    def forward(self, x: Tensor, places: Turned) -> Tensor:
        """`x [n, patches, hidden]` to the same shape."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        cos, sin = (part.expand(x.shape[0], -1, -1) for part in (places.cos, places.sin))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.whole or places.windows is None:
            return self.out(self._mix(q, k, v, None))  # type: ignore[no-any-return]
        return self.out(self._in_windows((q, k, v), places.windows))  # type: ignore[no-any-return]

    def _in_windows(self, projected: tuple[Tensor, Tensor, Tensor], by: Windows) -> Tensor:
        n, _, width = projected[0].shape
        windows, tokens = by.rows.shape

        def cut(part: Tensor) -> Tensor:
            grouped: Tensor = part.unflatten(1, (-1, self.group))  # type: ignore[no-untyped-call]
            grouped = grouped[:, by.rows.flatten()]
            return grouped.reshape(n * windows, tokens * self.group, width)

        there = torch.arange(tokens).unsqueeze(0) < by.sizes.unsqueeze(1)
        there = there.unsqueeze(-1).expand(-1, -1, self.group).reshape(1, windows, 1, -1)
        size = tokens * self.group
        seen = there.expand(n, -1, size, -1).reshape(n * windows, 1, size, size)
        q, k, v = (cut(part) for part in projected)
        mixed = self._mix(q, k, v, seen).reshape(n, windows * tokens, self.group, width)
        return mixed[:, by.places].flatten(1, 2)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        split = [p.unflatten(-1, (self.heads, -1)) for p in (q, k, v)]  # type: ignore[no-untyped-call]
        q, k, v = (part.transpose(1, 2) for part in split)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return mixed.transpose(1, 2).flatten(2)


class PatchMLP(nn.Module):
    """Two linear layers with an activation between, gated or not; all have biases."""

    def __init__(self, config: PatchVisionConfig) -> None:
        super().__init__()
        self.act, self.gated = config.activation, config.gated
        inner = config.intermediate_size * (2 if config.gated else 1)
        self.fc1 = Linear(config.hidden_size, inner, bias=True)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """`x [n, patches, hidden]` to the same shape."""
        x = self.fc1(x)
        if not self.gated:
            return self.fc2(activation(self.act, x))  # type: ignore[no-any-return]
        gate, up = x.chunk(2, dim=-1)
        return self.fc2(activation(self.act, gate) * up)  # type: ignore[no-any-return]


class PatchLayer(nn.Module):
    """One pre-norm encoder layer."""

    def __init__(self, config: PatchVisionConfig, *, whole: bool) -> None:
        super().__init__()
        self.attn_norm = _norm(config, config.hidden_size)
        self.attn = PatchAttention(config, whole=whole)
        self.mlp_norm = _norm(config, config.hidden_size)
        self.mlp = PatchMLP(config)

    def forward(self, x: Tensor, places: Turned) -> Tensor:
        """`x [n, patches, hidden]` to the same shape."""
        x = x + self.attn(self.attn_norm(x), places)
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class Merger(nn.Module):
    """The patches of a token, one behind the other, to the decoder's width."""

    def __init__(self, config: PatchVisionConfig, *, norm_first: bool) -> None:
        super().__init__()
        self.group, self.norm_first = config.inputs.group, norm_first
        width = config.hidden_size * self.group
        self.norm = _norm(config, config.hidden_size if norm_first else width)
        self.fc1 = Linear(width, width, bias=True)
        self.fc2 = Linear(width, config.outputs, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """`x [n, patches, hidden]` to `[n, tokens, outputs]`."""
        if self.norm_first:
            x = self.norm(x)
        x = x.unflatten(1, (-1, self.group)).flatten(2)  # type: ignore[no-untyped-call]
        if not self.norm_first:
            x = self.norm(x)
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class PatchVision(nn.Module):
    """Patches to the rows that take the place of token embeddings."""

    def __init__(self, config: PatchVisionConfig) -> None:
        super().__init__()
        self.tapped = config.tapped
        self.patch = Linear(config.inputs.values, config.hidden_size, bias=config.patch_bias)
        self.layers = nn.ModuleList(
            PatchLayer(config, whole=not config.inputs.window or i in config.whole)
            for i in range(config.layers)
        )
        self.merger = Merger(config, norm_first=True)
        self.taps = nn.ModuleList(Merger(config, norm_first=False) for _ in config.tapped)

    def forward(self, pixel_values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Encode images of one grid.

        Args:
            pixel_values: float32 `[n, tokens, patches of a token, values]`.
            cos, sin: float32 `[tokens, patches of a token, head_dim / 2]`.

        Returns:
            `[n, tokens, (1 + tapped) * outputs]`.
        """
        return self.encode(self.embed(pixel_values), Turned.of(cos, sin))

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Patches to `[n, patches, hidden]`."""
        return self.patch(pixel_values.flatten(1, 2))  # type: ignore[no-any-return]

    def encode(self, x: Tensor, places: Turned) -> Tensor:
        """`x [n, patches, hidden]` to what `forward` gives."""
        given = []
        for index, layer in enumerate(self.layers):
            x = layer(x, places)
            if index in self.tapped:
                given.append(self.taps[self.tapped.index(index)](x))
        return torch.cat((self.merger(x), *given), dim=-1)


class WindowedVision(PatchVision):
    """With windows in the attention of most layers."""

    def forward(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        cos: Tensor,
        sin: Tensor,
        window_rows: Tensor,
        window_sizes: Tensor,
        window_places: Tensor,
    ) -> Tensor:
        """As `PatchVision.forward`; the windows are those of `patch_inputs.windows`."""
        windows = Windows(window_rows, window_sizes, window_places)
        return self.encode(self.embed(pixel_values), Turned.of(cos, sin, windows))


class PlacedVision(PatchVision):
    """With a learned table of places, added to the patches."""

    def __init__(self, config: PatchVisionConfig) -> None:
        super().__init__(config)
        self.table = nn.Parameter(torch.empty(config.table, config.hidden_size))

    def forward(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        cos: Tensor,
        sin: Tensor,
        place_rows: Tensor,
        place_weights: Tensor,
    ) -> Tensor:
        """As `PatchVision.forward`; the last two are those of `patch_inputs.interpolation`."""
        rows, weights = place_rows.flatten(0, 1), place_weights.flatten(0, 1)
        places = (F.embedding(rows, self.table) * weights.unsqueeze(-1)).sum(1)
        return self.encode(self.embed(pixel_values) + places, Turned.of(cos, sin))
