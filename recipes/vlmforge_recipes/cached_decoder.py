"""The decoder block as a part: its interface, whichever family's weights fill it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from vlmforge_builder.blocks.decoder import Decoder, DecoderConfig
from vlmforge_builder.recipe import PartSpec, TensorArg
from vlmforge_builder.weights import Weight


def cached_decoder_part(config: DecoderConfig, weights: Mapping[str, Weight]) -> PartSpec:
    """The part "decoder" of a decoder whose parameters are filled by `weights`."""
    caches = [
        tuple(
            TensorArg(f"past_{kind}.{i}", ("batch", config.kv_heads, "capacity", config.head_dim))
            for i in range(config.layers)
        )
        for kind in ("key", "value")
    ]
    presents = [f"present_{kind}.{i}" for kind in ("key", "value") for i in range(config.layers)]
    levels = (
        () if config.long_context is None else (TensorArg("rotary_levels", ("batch",), "int64"),)
    )
    return PartSpec(
        name="decoder",
        module=partial(Decoder, config),
        inputs=(
            TensorArg("input_ids", ("batch", "tokens"), "int64"),
            TensorArg("image_features", ("rows", config.hidden_size)),
            TensorArg("past_lengths", ("batch",), "int64"),
            TensorArg("logits_indices", ("batch", "outputs"), "int64"),
            *caches,
            *levels,
        ),
        outputs=("logits", *presents),
        weights=weights,
    )
