"""The decoder block as a part: its interface, whichever family's weights fill it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from vlmforge.engine.interface import DecoderInterface
from vlmforge.engine.manifest import KVLayout
from vlmforge_builder.blocks.decoder import Decoder, DecoderConfig
from vlmforge_builder.recipe import PartSpec
from vlmforge_builder.weights import Weight


def cached_decoder_part(config: DecoderConfig, weights: Mapping[str, Weight]) -> PartSpec:
    """The part "decoder" of a decoder whose parameters are filled by `weights`."""
    kv = KVLayout(config.layers, config.kv_heads, config.head_dim, "float32", None)
    has_levels = config.long_context is not None
    return PartSpec(
        name="decoder",
        module=partial(Decoder, config),
        interface=DecoderInterface(
            *(config.vocab_size, config.hidden_size, kv, has_levels),
            turn_width=config.turn_width,
            feature_layers=config.feature_layers,
        ),
        weights=weights,
    )
