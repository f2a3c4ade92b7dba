"""The demo model in plain torch: transformers' CLIP tower and Llama decoder, and a projector."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from vlmforge_recipes.llava.demo.data import PATCH_CLASSES, Batch
from vlmforge_recipes.llava.synthetic.spec import SyntheticSpec


def _tower(spec: SyntheticSpec) -> CLIPVisionModel:
    vision = spec.vision
    config = CLIPVisionConfig(
        hidden_size=vision.hidden,
        intermediate_size=vision.intermediate,
        # Without the last layer, whose output LLaVA does not use.
        num_hidden_layers=vision.layers - 1,
        num_attention_heads=vision.heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        hidden_act="quick_gelu",
    )
    return CLIPVisionModel(config)


def _decoder(spec: SyntheticSpec) -> LlamaForCausalLM:
    text = spec.text
    config = LlamaConfig(
        vocab_size=text.vocab,
        hidden_size=text.hidden,
        intermediate_size=text.intermediate,
        num_hidden_layers=text.layers,
        num_attention_heads=text.heads,
        num_key_value_heads=text.kv_heads,
        max_position_embeddings=text.max_positions,
        rms_norm_eps=text.rms_eps,
        tie_word_embeddings=text.tied,
    )
    return LlamaForCausalLM(config)


class DemoModel(nn.Module):
    """Tower, projector and decoder.

    The tower has only the layers up to the one whose output LLaVA uses (`hidden_states[-2]`).
    `patch_heads` are there for training alone and are not stored.
    """

    def __init__(self, spec: SyntheticSpec) -> None:
        super().__init__()
        self.tower = _tower(spec)
        self.projector = nn.Sequential(
            nn.Linear(spec.vision.hidden, spec.text.hidden),
            nn.GELU(),
            nn.Linear(spec.text.hidden, spec.text.hidden),
        )
        self.decoder = _decoder(spec)
        self.patch_heads = nn.ModuleList(
            nn.Linear(spec.vision.hidden, classes) for classes in PATCH_CLASSES
        )

    def see(self, pixel_values: Tensor) -> Tensor:
        """`[n, 3, H, W]` to patch features `[n, patches, tower_width]`."""
        return self.tower(pixel_values).last_hidden_state[:, 1:]  # type: ignore[no-any-return]

    def read(self, ids: Tensor, rows: Tensor, features: Tensor) -> Tensor:
        """Hidden states `[b, t, width]` of `ids` with image rows in their places.

        Args:
            ids: int64 `[b, t]`.
            rows: int64 `[b, t]`, the row of `features` at each position, or -1 for text.
            features: Patch features of all pictures, `[n, patches, tower_width]`.
        """
        embeds = self.decoder.model.embed_tokens(ids)
        if len(features):
            images = self.projector(features).flatten(0, 1)
            embeds = torch.where((rows >= 0)[..., None], images[rows.clamp(min=0)], embeds)
        return self.decoder.model(inputs_embeds=embeds).last_hidden_state  # type: ignore[no-any-return]

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross entropies, per token of the answers and per patch (the heads summed)."""
        features = self.see(batch.pixel_values)
        hidden = self.read(batch.ids, batch.rows, features)
        answers = batch.labels >= 0
        words = F.cross_entropy(self.decoder.lm_head(hidden[answers]), batch.labels[answers])
        seen = torch.stack(
            [
                F.cross_entropy(head(features).flatten(0, 1), batch.patches[..., i].flatten())
                for i, head in enumerate(self.patch_heads)
            ]
        )
        return words, seen.sum()
