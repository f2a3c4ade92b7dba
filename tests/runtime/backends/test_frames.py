"""How steps lie in memory: nothing that lives lies on anything else, and sizes are few."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sample_manifest import CHAIN
from vlmforge.backends.cuda.chain import _scales
from vlmforge.backends.cuda.frames import ALIGNMENT, Size, arrange, bucket, inputs_of
from vlmforge.backends.fake import HostDevice
from vlmforge.engine.chain import AttentionCall, ChainStep, GatedActivation, PartChain, Segment
from vlmforge.engine.tensors import TensorSpec
from vlmforge.errors import EngineFormatError

LAYERS = 4
INPUTS = (
    TensorSpec("input_ids", "int64", ("batch", "tokens")),
    TensorSpec("image_features", "float32", ("rows", 24)),
    TensorSpec("past_key.0", "float16", ("pages", 2, 64, 8)),
)


def rows(name: str, width: int) -> TensorSpec:
    return TensorSpec(name, "float16", ("batch", "tokens", width))


def behind(layer: int) -> list[TensorSpec]:
    """What stands after a layer's activation."""
    return [rows(f"sum{layer}", 16), rows(f"gated{layer}", 40)]


def chain(kept: frozenset[int]) -> PartChain:
    """Four layers; a tensor of each layer in `kept` is taken by the last segment too."""
    steps: list[ChainStep] = []
    for layer in range(LAYERS):
        given = behind(layer - 1) if layer else [INPUTS[0]]
        made = [rows(f"qkv{layer}", 48), rows(f"rest{layer}", 16), rows(f"kept{layer}", 40)]
        steps.append(ChainStep(segment=Segment(f"{layer}", tuple(given), tuple(made), 64)))
        call = AttentionCall(layer, f"qkv{layer}", f"out{layer}", 2, 2, 8, 1.0, 1.0, 1.0, False)
        steps.append(ChainStep(attention=call))
        mixed = (rows(f"out{layer}", 16), rows(f"rest{layer}", 16))
        packed = (rows(f"packed{layer}", 80), rows(f"sum{layer}", 16))
        steps.append(ChainStep(segment=Segment(f"{layer}.up", mixed, packed, 64)))
        gate = GatedActivation("silu", f"packed{layer}", f"gated{layer}")
        steps.append(ChainStep(gated=gate))
    last = behind(LAYERS - 1) + [rows(f"kept{layer}", 40) for layer in sorted(kept)]
    logits = TensorSpec("logits", "float32", ("batch", "outputs", 50))
    steps.append(ChainStep(segment=Segment("last", tuple(last), (logits,), 64)))
    return PartChain(tuple(steps), None, {})


sizes = st.builds(
    Size,
    batch=st.integers(1, 70),
    tokens=st.integers(1, 600),
    outputs=st.integers(0, 3),
    rows=st.integers(1, 600),
    total=st.integers(1, 5000),
)


def lives(of: PartChain) -> dict[str, tuple[int, int]]:
    """First and last step in which each tensor between steps must be whole."""
    found: dict[str, tuple[int, int]] = {}
    for index, step in enumerate(of.steps):
        if step.segment is not None:
            used = [spec.name for spec in (*step.segment.inputs, *step.segment.outputs)]
        else:
            used = [*step.taken, *step.given]
            assert len(used) == 2
        for name in used:
            if name != "input_ids":
                found[name] = found.get(name, (index, index))[0], index
    return found


@given(sizes, st.frozensets(st.integers(0, LAYERS - 1)))
def test_nothing_that_lives_lies_on_anything_else(size: Size, kept: frozenset[int]) -> None:
    of, inputs = chain(kept), inputs_of(INPUTS, columns=9)
    found = arrange(of, inputs, size)
    specs = {s.name: s for seg in of.segments for s in (*seg.inputs, *seg.outputs)}
    specs |= {spec.name: spec for spec in inputs}
    alive = {**dict.fromkeys((s.name for s in inputs), (0, len(of.steps))), **lives(of)}
    items = {"int64": 8, "int32": 4, "float32": 4, "float16": 2}
    places = []
    for name, (first, last) in alive.items():
        begin, length = found.offsets[name], items[specs[name].dtype]
        for dim in size.shape(specs[name]):
            length *= dim
        assert begin % ALIGNMENT == 0
        assert begin + length <= found.size
        places.append((begin, begin + length, first, last, name))
    for one in places:
        for other in places:
            apart = one[1] <= other[0] or other[1] <= one[0]
            assert one is other or apart or one[3] < other[2] or other[3] < one[2], (one, other)
    assert all(found.offsets[spec.name] < found.uploaded for spec in inputs)


def test_memory_is_used_again() -> None:
    size = Size(1, 512, 1, 1, 512)
    of = chain(frozenset())
    whole = sum(2 * 512 * (48 + 16 + 40 + 16 + 80 + 16 + 40) for _ in range(LAYERS))
    taken = arrange(of, inputs_of(INPUTS, 9), size)
    assert taken.size - taken.uploaded < whole / 2


@given(sizes, st.integers(1, 70), st.integers(1, 5000))
def test_a_bucket_holds_what_it_is_for(size: Size, slots: int, capacity: int) -> None:
    size = Size(
        min(size.batch, slots), size.tokens, size.outputs, size.rows, min(size.total, capacity)
    )
    found = bucket(size, slots, capacity)
    assert size.batch <= found.batch <= slots
    assert size.total <= found.total <= capacity
    assert (found.tokens, found.outputs, found.rows) == (size.tokens, size.outputs, size.rows)
    if not size.replayed:
        assert found.batch == size.batch
    assert bucket(found, slots, capacity) == found


def test_buckets_are_few_and_not_much_larger() -> None:
    asked = [Size(batch, 1, 1, 1, total) for batch in range(1, 65) for total in range(1, 4097, 13)]
    found = {size: bucket(size, 64, 4096) for size in asked}
    assert len(set(found.values())) <= 7 * 9
    assert all(given.batch < 2 * size.batch for size, given in found.items())
    assert all(given.total <= max(256, 1.5 * size.total) for size, given in found.items())


def test_a_norms_scale_that_is_not_in_its_file_is_an_error(tmp_path: Path) -> None:
    call = next(call for call in CHAIN.collectives if call.norm is not None)
    assert call.norm is not None
    width, specs, device = 16, CHAIN.tensors, HostDevice()
    values = np.arange(1, width + 1, dtype=np.float16)
    file = tmp_path / call.norm.file
    file.write_bytes(bytes(call.norm.offset) + values.tobytes())
    found = _scales(device, tmp_path, CHAIN, specs)[call.norm.out]
    np.testing.assert_array_equal(device.download(found.address, (width,), values.dtype), values)
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(EngineFormatError, match="norm1"):
        _scales(device, tmp_path, CHAIN, specs)
