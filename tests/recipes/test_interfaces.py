"""What recipes say that parts take and give is what the runtime makes of their policies."""

from __future__ import annotations

import pytest
from msgspec import structs

from golden_models import FOLDERS
from lowered_decoder import model_spec
from sample_manifest import MANIFEST
from vlmforge.engine.interface import interface_of
from vlmforge.engine.manifest import DecodePolicy


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_part_of_a_recipe_is_as_the_manifest_will_say(folder: str) -> None:
    spec = model_spec(folder)
    decode = DecodePolicy(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        eos_ids=spec.eos_ids,
        tokens_per_image=spec.tokens_per_image,
        session_len=spec.session_len,
        max_batch_size=1,
        positions=spec.positions,
    )
    manifest = structs.replace(MANIFEST, image=spec.image, decode=decode, kv=spec.kv)
    assert len(spec.parts) == 2
    for part in spec.parts:
        assert part.interface == interface_of(manifest, part.name)
