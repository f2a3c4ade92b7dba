"""What each graph takes and gives: the one list of names, dtypes and dimensions.

The builder exports by it, a pass that adds an input takes it from here, backends bind by it, and
the static check holds an engine's parts against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from msgspec import Struct

from vlmforge.engine.images.patch_inputs import (
    PATCH_COS,
    PATCH_SIN,
    PLACE_ROWS,
    PLACE_WEIGHTS,
    WINDOW_PLACES,
    WINDOW_ROWS,
    WINDOW_SIZES,
    PatchInputs,
)
from vlmforge.engine.manifest import KVLayout, Manifest, Part
from vlmforge.engine.tensors import TensorSpec

if TYPE_CHECKING:
    from vlmforge.engine.chain import PartChain, Segment

# Dimensions that vary at run time.
IMAGES, BATCH, TOKENS, ROWS, OUTPUTS = "images", "batch", "tokens", "rows", "outputs"
CAPACITY, PAGES, SEQUENCE_PAGES = "capacity", "pages", "sequence_pages"
WINDOWS = "windows"

_CHAINED = ("cuda",)  # backends whose attention runs between graphs

PIXEL_VALUES, IMAGE_FEATURES, LOGITS = "pixel_values", "image_features", "logits"

INPUT_IDS = TensorSpec("input_ids", "int64", (BATCH, TOKENS))
"""Ids >= vocab_size are rows of the image features."""
PAST_LENGTHS = TensorSpec("past_lengths", "int64", (BATCH,))
"""Tokens that each sequence has in the cache already."""
LOGITS_INDICES = TensorSpec("logits_indices", "int64", (BATCH, OUTPUTS))
"""Places among the tokens to give logits of."""
ROTARY_LEVELS = TensorSpec("rotary_levels", "int64", (BATCH,))
"""Levels of the sequences, where the position policy has some."""
TURNS = "turns"
"""Cosines and sines of the tokens, where the position policy gives them."""
LIKELIEST = TensorSpec("likeliest", "int64", (BATCH, OUTPUTS))
"""Ids of the largest logits, which a chain gives beside them."""
EDITS = "edits"
REPORTED = 20
"""Likeliest tokens that a sampled step tells of."""
CHOICES = TensorSpec("choices", "float64", (BATCH, 5))
"""How each row's token is chosen: temperature, top-k (the vocabulary's size: all), top-p, min-p,
and a random number in [0, 1), below 0 for the likeliest."""
EDIT_IDS = TensorSpec("edit_ids", "int64", (BATCH, EDITS))
"""Ids whose logits are changed before, in any order; those that fill up a row repeat its last."""
EDIT_FACTORS = TensorSpec("edit_factors", "float32", (BATCH, EDITS))
"""Of their logits: divides positive ones, multiplies others."""
EDIT_MINUS = TensorSpec("edit_minus", "float64", (BATCH, EDITS))
"""What is taken from them then; infinity for what must not be chosen."""
CHOSEN = TensorSpec("chosen", "int64", (BATCH, 1))
"""The tokens' ids."""
CHOSEN_LOGIT = TensorSpec("chosen_logit", "float64", (BATCH, 1))
"""Their logits, edited, as all that follow."""
NORMALISER = TensorSpec("normaliser", "float64", (BATCH, 1))
"""The logarithm of the sum of all logits' exponentials."""
BEST_IDS, BEST_LOGITS = "best_ids", "best_logits"
"""int64 and float64 `[batch, reported]`: the likeliest tokens, best first, and their logits."""
UNDECIDED = -2
"""An id where the host has to choose from the logits."""
QUERY_LENGTHS = TensorSpec("query_lengths", "int32", (BATCH,))
"""How many of the tokens of a row are there, where the cache is paged."""
BLOCK_TABLE = TensorSpec("block_table", "int32", (BATCH, SEQUENCE_PAGES))
"""The pages of each sequence, where the cache is paged."""


class VisionInterface(Struct, frozen=True):
    """Of the part "vision".

    Attributes:
        image_size: Height and width of a view.
        rows: Features of a view.
        hidden_size: Width of the features.
        features: Dtype of the features.
    """

    image_size: tuple[int, int]
    rows: int
    hidden_size: int
    features: str = "float32"

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """In the order of the graph."""
        return (TensorSpec(PIXEL_VALUES, "float32", (IMAGES, 3, *self.image_size)),)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """In the order of the graph."""
        shape = IMAGES, self.rows, self.hidden_size
        return (TensorSpec(IMAGE_FEATURES, self.features, shape),)

    @property
    def aliases(self) -> Mapping[str, str]:
        """Outputs that may be written where an input is, by the input's name."""
        return {}


class PatchInterface(Struct, frozen=True):
    """Of a part "vision" that takes the patches of images of one grid, as many as there are.

    Attributes:
        patches: What it takes.
        width: Of the features of a token.
        features: Dtype of the features.
    """

    patches: PatchInputs
    width: int
    features: str = "float32"

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """In the order of the graph."""
        patches, tokens = self.patches, (ROWS, self.patches.group)
        windows = (
            TensorSpec(WINDOW_ROWS, "int64", (WINDOWS, patches.window)),
            TensorSpec(WINDOW_SIZES, "int64", (WINDOWS,)),
            TensorSpec(WINDOW_PLACES, "int64", (ROWS,)),
        )
        places = (
            TensorSpec(PLACE_ROWS, "int64", (*tokens, 4)),
            TensorSpec(PLACE_WEIGHTS, "float32", (*tokens, 4)),
        )
        return (
            TensorSpec(PIXEL_VALUES, "float32", (IMAGES, *tokens, patches.values)),
            TensorSpec(PATCH_COS, "float32", (*tokens, patches.angles)),
            TensorSpec(PATCH_SIN, "float32", (*tokens, patches.angles)),
            *(windows if patches.window else ()),
            *(places if patches.places else ()),
        )

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """In the order of the graph."""
        return (TensorSpec(IMAGE_FEATURES, self.features, (IMAGES, ROWS, self.width)),)

    @property
    def aliases(self) -> Mapping[str, str]:
        """Outputs that may be written where an input is, by the input's name."""
        return {}


class DecoderInterface(Struct, frozen=True):
    """Of the part "decoder".

    Attributes:
        vocab_size, hidden_size: Of the model.
        kv: The cache, of a shard one rank's; with a page size, its tensors are pools, and
            sequences have block tables.
        has_levels: Whether each sequence has a rotary level.
        features: Dtype of the image features.
        capacity: Tokens of a sequence in a dense cache; None: varies.
        chained: Attention runs between graphs, which neither know where pages are nor write them.
        turn_width: Cosines and sines that it takes for each token; 0: it has its own.
        feature_layers: Layers that the features of an image are for, each `hidden_size` of them:
            the first is taken instead of the embedding, others are added behind the first layers.
    """

    vocab_size: int
    hidden_size: int
    kv: KVLayout
    has_levels: bool = False
    features: str = "float32"
    capacity: int | None = None
    chained: bool = False
    turn_width: int = 0
    feature_layers: int = 1

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """In the order of the graph."""
        width = self.hidden_size * self.feature_layers
        turns = TensorSpec(TURNS, "float32", (BATCH, TOKENS, self.turn_width))
        return (
            INPUT_IDS,
            TensorSpec(IMAGE_FEATURES, self.features, (ROWS, width)),
            PAST_LENGTHS,
            LOGITS_INDICES,
            *(self._cache(past) for past in cache_names(self.kv)),
            *((ROTARY_LEVELS,) if self.has_levels else ()),
            *((turns,) if self.turn_width else ()),
            *((QUERY_LENGTHS, BLOCK_TABLE) if self.kv.page_size and not self.chained else ()),
        )

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """In the order of the graph."""
        logits = TensorSpec(LOGITS, "float32", (BATCH, OUTPUTS, self.vocab_size))
        return (logits, *(self._cache(present) for present in self.aliases))

    @property
    def aliases(self) -> Mapping[str, str]:
        """Each cache after a step, by the cache before it; the two may be one memory."""
        names = () if self.chained else cache_names(self.kv)
        return {present_of(past): past for past in names}

    def _cache(self, name: str) -> TensorSpec:
        kv = self.kv
        if kv.page_size:
            return TensorSpec(name, kv.dtype, (PAGES, kv.kv_heads, kv.page_size, kv.head_dim))
        capacity = self.capacity or CAPACITY
        return TensorSpec(name, kv.dtype, (BATCH, kv.kv_heads, capacity, kv.head_dim))


Interface = VisionInterface | PatchInterface | DecoderInterface


def cache_names(kv: KVLayout) -> tuple[str, ...]:
    """Names of the cache's tensors before a step: keys of all layers, then values."""
    return tuple(f"past_{kind}.{i}" for kind in ("key", "value") for i in range(kv.layers))


def present_of(past: str) -> str:
    """The name after the step of what is called `past` before it."""
    return past.replace("past_", "present_", 1)


def interface_of(manifest: Manifest, part: str) -> Interface:
    """What a part of an engine takes and gives; whatever is not the vision part is a decoder."""
    chained = manifest.backend in _CHAINED
    features = "float32" if chained else manifest.compute_dtype
    image, decode = manifest.image, manifest.decode
    if part == "vision":
        width = decode.hidden_size * decode.feature_layers
        if image.patch_inputs is not None:
            return PatchInterface(image.patch_inputs, width, features)
        rows = image.view_rows(decode.tokens_per_image)
        return VisionInterface(image.view_size, rows, width, features)
    return DecoderInterface(
        decode.vocab_size,
        decode.hidden_size,
        manifest.rank_kv,
        decode.positions.has_levels,
        features,
        chained=chained,
        turn_width=decode.positions.turn_width,
        feature_layers=decode.feature_layers,
    )


def packs(part: Part) -> bool:
    """Whether prompts may lie one behind the other in a row of a part: none of its graphs is told
    which sequence a row is, and so where in it a token is.
    """
    if part.chain is None:
        return False
    of_sequences = {PAST_LENGTHS.name, ROTARY_LEVELS.name}
    return not any(of_sequences & {spec.name for spec in s.inputs} for s in part.chain.segments)


def chosen_by_kernel(chain: PartChain, segment: Segment) -> bool:
    """Whether a compiled kernel chooses tokens in the place of a segment: the likeliest ones."""
    gives = {spec.name for spec in segment.outputs}
    return bool(chain.choosers) and LIKELIEST.name in gives


def fits(found: TensorSpec, listed: TensorSpec) -> bool:
    """Whether a graph's tensor is the listed one; it may fix a size that varies in the list."""
    if (found.name, found.dtype) != (listed.name, listed.dtype):
        return False
    pairs = list(zip(found.shape, listed.shape, strict=False))
    same = all(a == b or (isinstance(a, int) and isinstance(b, str)) for a, b in pairs)
    return same and len(pairs) == len(found.shape) == len(listed.shape)
