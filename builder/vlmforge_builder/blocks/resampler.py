"""A vision tower whose many patches a fixed number of learned queries sum up.

The tower is a vision transformer without class token (https://arxiv.org/abs/2010.11929); the
resampler is one cross-attention (https://arxiv.org/abs/2308.12966, section 2.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmforge_builder.blocks.layers import LayerNorm, Linear
from vlmforge_builder.blocks.vision import VisionConfig, VisionLayer


@dataclass(frozen=True, slots=True)
class ResamplerConfig:
    """Geometry of a resampler: `queries` rows of `width` for each image."""

    queries: int
    width: int
    heads: int
    norm_eps: float


class PatchTower(nn.Module):
    """Patches, position embedding, pre-norm and encoder layers. `positions` fits the patches."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch = nn.Parameter(
            torch.empty(config.hidden_size, 3, config.patch_size, config.patch_size)
        )
        self.positions = nn.Parameter(torch.empty(config.patches, config.hidden_size))
        self.pre_norm = LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.layers))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`pixel_values [n, 3, H, W]` to `[n, patches, hidden]`."""
        patches = F.conv2d(pixel_values, self.patch, stride=self.patch.shape[-1])
        x: Tensor = self.pre_norm(patches.flatten(2).transpose(1, 2) + self.positions)
        for layer in self.layers:
            x = layer(x)
        return x


class Resampler(nn.Module):
    """Learned queries attend to all patches: no residual, no MLP.

    Queries and keys have position embeddings added, values have not.
    """

    def __init__(self, config: ResamplerConfig, *, inputs: int, patches: int) -> None:
        super().__init__()
        width, self.heads = config.width, config.heads
        self.queries = nn.Parameter(torch.empty(config.queries, width))
        self.query_positions = nn.Parameter(torch.empty(config.queries, width))
        self.key_positions = nn.Parameter(torch.empty(patches, width))
        self.query_norm = LayerNorm(width, eps=config.norm_eps)
        self.kv_norm = LayerNorm(width, eps=config.norm_eps)
        self.kv = Linear(inputs, width, bias=False)
        self.q_proj = Linear(width, width, bias=True)
        self.k_proj = Linear(width, width, bias=True)
        self.v_proj = Linear(width, width, bias=True)
        self.out = Linear(width, width, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """`x [n, patches, inputs]` to `[n, queries, width]`."""
        x = self.kv_norm(self.kv(x))
        # The same for every image, so it is computed once for all of a run.
        q = self.q_proj(self.query_norm(self.queries) + self.query_positions)
        q = self._split(q.unsqueeze(0)).expand(x.shape[0], -1, -1, -1)
        k, v = self._split(self.k_proj(x + self.key_positions)), self._split(self.v_proj(x))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], self.heads, -1).transpose(1, 2)


class ResampledEncoder(nn.Module):
    """Tower, resampler, norm and a projection: pixels to rows that stand for token embeddings."""

    def __init__(self, tower: VisionConfig, resampler: ResamplerConfig) -> None:
        super().__init__()
        self.tower = PatchTower(tower)
        self.resampler = Resampler(resampler, inputs=tower.hidden_size, patches=tower.patches)
        self.norm = LayerNorm(resampler.width, eps=resampler.norm_eps)
        self.proj = Linear(resampler.width, resampler.width, bias=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`pixel_values` float32 `[n, 3, H, W]` to features `[n, queries, width]`."""
        return self.proj(self.norm(self.resampler(self.tower(pixel_values))))  # type: ignore[no-any-return]
