"""The ranks of an engine in one process, in step: sessions for the segments, numpy where they meet.

No transports and no processes: what is tested with it are the shards. An engine of one rank is a
chain of one segment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmforge.engine import interface
from vlmforge.engine.chain import ChainStep, Collective, Segment
from vlmforge.engine.manifest import Manifest, Part, decoder_name, load_manifest
from vlmforge.ort import ort

Array = NDArray[Any]


def meet(collective: Collective, shares: Sequence[Array]) -> Array:
    """What all ranks get."""
    assert len({(share.shape, share.dtype) for share in shares}) == 1
    if collective.kind == "all_reduce":
        total: Array = np.sum(shares, axis=0, dtype=shares[0].dtype)
        return total
    return np.concatenate(shares, axis=-1)[..., : collective.width]


def steps_of(part: Part) -> tuple[ChainStep, ...]:
    if part.chain is not None:
        return part.chain.steps
    return (ChainStep(segment=Segment(part.file, part.inputs, part.outputs, 0)),)


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@dataclass
class Ranks:
    """All decoders of an engine, and the caches of each."""

    manifest: Manifest
    parts: list[Part]
    sessions: dict[str, ort.InferenceSession]
    caches: list[dict[str, Array]]

    @classmethod
    def load(cls, engine: Path, batch: int, capacity: int) -> Ranks:
        manifest = load_manifest(engine)
        parts = [manifest.part(decoder_name(rank)) for rank in range(manifest.parallel.tp)]
        files = [s.segment.file for p in parts for s in steps_of(p) if s.segment is not None]
        kv = manifest.rank_kv
        shape = (batch, kv.kv_heads, capacity, kv.head_dim)
        caches = [
            {name: np.zeros(shape, np.float32) for name in interface.cache_names(kv)} for _ in parts
        ]
        return cls(manifest, parts, {file: session(engine / file) for file in files}, caches)

    def step(
        self, ids: Array, lengths: Array, indices: Array, levels: Array, **more: Array
    ) -> Array:
        """Logits `[batch, outputs, vocab_size]`, the same of all ranks; caches are brought up."""
        given: dict[str, Array] = {
            interface.INPUT_IDS.name: ids,
            interface.PAST_LENGTHS.name: lengths,
            interface.LOGITS_INDICES.name: indices,
            interface.ROTARY_LEVELS.name: levels,
            interface.IMAGE_FEATURES: np.zeros((1, self.manifest.decode.hidden_size), np.float32),
            **more,
        }
        known = [{**given, **caches} for caches in self.caches]
        for steps in zip(*map(steps_of, self.parts), strict=True):
            self._one(steps, known)
        for tensors, caches in zip(known, self.caches, strict=True):
            for name in caches:
                caches[name] = tensors[interface.present_of(name)]
        for tensors in known:
            np.testing.assert_array_equal(tensors["logits"], known[0]["logits"])
        return known[0]["logits"]

    def _one(self, steps: Sequence[ChainStep], known: Sequence[dict[str, Array]]) -> None:
        collective = steps[0].collective
        if collective is not None:
            assert {step.collective for step in steps} == {collective}
            out = meet(collective, [tensors[collective.tensor] for tensors in known])
            for tensors in known:
                tensors[collective.out] = out
            return
        for step, tensors in zip(steps, known, strict=True):
            assert step.segment is not None
            taken = {spec.name: tensors[spec.name] for spec in step.segment.inputs}
            names = [spec.name for spec in step.segment.outputs]
            made = self.sessions[step.segment.file].run(names, taken)
            for spec, value in zip(step.segment.outputs, made, strict=True):
                assert math.prod(value.shape) and len(spec.shape) == value.ndim
            tensors.update(zip(names, made, strict=True))

    def greedy(self, prompts: Array, steps: int, **more: Array) -> tuple[list[Array], Array]:
        """Logits of each step, and the likeliest tokens `[batch, steps]`."""
        batch, length = prompts.shape
        levels, lengths = np.zeros(batch, np.int64), np.zeros(batch, np.int64)
        last = np.full((batch, 1), length - 1)
        logits = [self.step(prompts, lengths, last, levels, **more)]
        tokens = [logits[0][:, -1].argmax(-1)]
        for step in range(1, steps):
            past = lengths + length + step - 1
            found = self.step(tokens[-1][:, None], past, np.zeros((batch, 1), np.int64), levels)
            logits.append(found)
            tokens.append(found[:, -1].argmax(-1))
        return logits, np.stack(tokens, axis=1)
