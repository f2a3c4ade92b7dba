"""Which tensor is the output projection: the stored one, or the embedding that it is tied to."""

from __future__ import annotations

from collections.abc import Callable

from vlmforge.errors import TensorError
from vlmforge_builder.checkpoint.compare import same_values
from vlmforge_builder.checkpoint.config import ConfigReader
from vlmforge_builder.checkpoint.store import TensorStore


def is_tied(config: ConfigReader, *, default: bool) -> bool:
    """Whether the configuration, at the top or of its text model, ties the output projection.

    transformers 5 saves it at the top, before it was the text model's.
    """
    places = [config, *([config.section("text_config")] if config.has("text_config") else [])]
    given = [place.opt_bool("tie_word_embeddings") for place in places]
    return any(given) if any(value is not None for value in given) else default


def choose_head(
    store: TensorStore,
    names: tuple[str, ...],
    embedding: str,
    *,
    tied: bool,
    note: Callable[[str], None],
) -> str:
    """The name of the output projection's tensor.

    A stored one is used whatever the configuration says, as `PreTrainedModel.tie_weights` of
    transformers 5 does: `tie_word_embeddings` decides only where none is stored. Its warning is
    given where a stored one is not the embedding that it should be tied to.

    Args:
        store: The checkpoint.
        names: What the stored one may be called; the first that there is counts.
        embedding: The embedding's name.
        tied: `tie_word_embeddings`.
        note: Gets the warning.

    Raises:
        TensorError: none is stored, and it is not tied.
    """
    stored = next((name for name in names if name in store), None)
    if stored is None:
        if tied:
            return embedding
        raise TensorError(
            "The checkpoint has no output projection.",
            found="tie_word_embeddings false, and no tensor " + " or ".join(names),
            expected=names[0],
            fix="download the checkpoint again; if the projection is the embedding, set "
            "tie_word_embeddings true in config.json",
        )
    if tied and not same_values(store, stored, store, embedding):
        note(
            f"warning: tie_word_embeddings is true, but {stored} is stored and has other values "
            f"than {embedding}; the stored one is used"
        )
    return stored
