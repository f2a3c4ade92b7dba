"""The ranks of an engine in one process, in step: sessions for the segments, numpy where they meet.

No transports and no processes: what is tested with it are the shards. An engine of one rank is a
chain of one segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmforge.engine import interface
from vlmforge.engine.chain import ChainStep, Collective, Segment
from vlmforge.engine.manifest import Part, decoder_name, load_manifest
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
    """A part that is a graph is a chain of one segment."""
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

    parts: Sequence[Part]
    sessions: dict[str, ort.InferenceSession]
    caches: list[dict[str, Array]]

    @classmethod
    def of_engine(cls, engine: Path, batch: int, capacity: int) -> Ranks:
        manifest = load_manifest(engine)
        parts = [manifest.part(decoder_name(rank)) for rank in range(manifest.parallel.tp)]
        return cls.load(engine, parts, batch, capacity)

    @classmethod
    def load(cls, folder: Path, parts: Sequence[Part], batch: int, capacity: int) -> Ranks:
        files = [s.segment.file for p in parts for s in steps_of(p) if s.segment is not None]
        sizes = {"batch": batch, "capacity": capacity}
        caches = [
            {
                spec.name: np.zeros([sizes.get(str(n), n) for n in spec.shape], np.float32)
                for spec in part.inputs
                if "." in spec.name
            }
            for part in parts
        ]
        return cls(parts, {file: session(folder / file) for file in files}, caches)

    def step(
        self, ids: Array, lengths: Array, indices: Array, levels: Array, features: Array
    ) -> Array:
        """Logits `[batch, outputs, vocab_size]`, the same of all ranks; caches are brought up."""
        given: dict[str, Array] = {
            interface.INPUT_IDS.name: ids,
            interface.PAST_LENGTHS.name: lengths,
            interface.LOGITS_INDICES.name: indices,
            interface.ROTARY_LEVELS.name: levels,
            interface.IMAGE_FEATURES: features,
            interface.TURNS: self._turns(lengths, ids.shape[1]),
        }
        known = [{**given, **caches} for caches in self.caches]
        for steps in zip(*map(steps_of, self.parts), strict=True):
            self._one(steps, known)
        for tensors, caches in zip(known, self.caches, strict=True):
            for name in caches:
                caches[name] = tensors[interface.present_of(name)]
            np.testing.assert_array_equal(tensors["logits"], known[0]["logits"])
        return known[0]["logits"]

    def _turns(self, lengths: Array, tokens: int) -> Array:
        """Cosines and sines of places one after the other, where a decoder is given them."""
        shapes = [s.shape for s in self.parts[0].inputs if s.name == interface.TURNS] or [(0,)]
        half = int(shapes[0][-1]) // 2
        places = lengths[:, None, None] + np.arange(tokens)[:, None]
        angles = places / 1e4 ** (np.arange(half) / max(half, 1))
        return np.concatenate([np.cos(angles), np.sin(angles)], -1).astype(np.float32)

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
            tensors.update(zip(names, made, strict=True))

    def greedy(
        self, prompts: Array, features: Array, steps: int, level: int = 0
    ) -> tuple[Array, Array]:
        """Logits `[steps, batch, vocab_size]`, and their likeliest tokens `[steps, batch]`."""
        batch, length = prompts.shape
        levels, past = np.full(batch, level), np.zeros(batch, np.int64)
        last = np.full((batch, 1), length - 1)
        logits = [self.step(prompts, past, last, levels, features)[:, 0]]
        while len(logits) < steps:
            tokens, past = logits[-1].argmax(-1)[:, None], past + (1 if past.any() else length)
            found = self.step(tokens, past, np.zeros((batch, 1), np.int64), levels, features)
            logits.append(found[:, 0])
        return np.stack(logits), np.stack(logits).argmax(-1)
