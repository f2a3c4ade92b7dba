"""The kernel that chooses tokens, compiled for the host, and a launch of it over guarded memory."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attention_backends import HOST_SOURCES, host_build
from vlmforge_plugins.cached_attention.compile import SOURCES
from vlmforge_plugins.cached_attention.plan import Launch
from vlmforge_plugins.token_choice.compile import KERNELS
from vlmforge_plugins.token_choice.launcher import (
    NAME,
    Choosing,
    Params,
    launch_of,
    reported,
    scratch_bytes,
)

_HOST = HOST_SOURCES.parent / "host_choice"
_POISON, _BEHIND = 0xA5, 64


@cache
def library() -> ctypes.CDLL:
    """Kept by the content of all that goes in."""
    return ctypes.CDLL(str(host_build(_HOST / "token_choice.cpp", (KERNELS, SOURCES, _HOST))))


class HostChoice:
    """See `Kernels`. Every thread must wait for the kernel in front, whatever it does then.

    Attributes:
        late: What is not there before a thread waits, and lost if it is written before.
    """

    overlap = True

    def __init__(self, direction: int = 1) -> None:
        self._direction = direction
        self.late: list[NDArray[np.uint8]] = []

    def launch(self, launch: Launch, params: Params, stream: int) -> None:
        assert launch.kernel == NAME
        for memory in self.late:
            library().vf_late(ctypes.c_void_p(memory.ctypes.data), ctypes.c_long(len(memory)))
        sizes = launch.grid[0], launch.threads, launch.shared_bytes
        status = library().vf_launch(ctypes.byref(params), *sizes, self._direction)
        library().vf_late(None, ctypes.c_long(0))
        assert status == 0, "a block wrote behind its memory" if status == 1 else "did not wait"


@dataclass(frozen=True)
class Chosen:
    """The outputs; all but the first only where they were asked for."""

    chosen: NDArray[np.int64]
    chosen_logit: NDArray[np.float64]
    normaliser: NDArray[np.float64]
    best_ids: NDArray[np.int64]
    best_logits: NDArray[np.float64]

    def row(self, row: int) -> tuple[bytes, ...]:
        """All bits of one."""
        return tuple(values[row].tobytes() for values in vars(self).values())


@dataclass(frozen=True)
class Inputs:
    """Of rows: see `Choosing`."""

    logits: NDArray[np.float32]
    choices: NDArray[np.float64]
    edit_ids: NDArray[np.int64]
    edit_factors: NDArray[np.float32]
    edit_minus: NDArray[np.float64]

    def rows(self, rows: Any) -> Inputs:
        """These rows of all."""
        return Inputs(*(np.ascontiguousarray(values[rows]) for values in vars(self).values()))


class _Memory:
    """Bytes aligned to 16, poisoned before, between and behind the arrays."""

    def __init__(self, size: int) -> None:
        whole = np.full(size + 2 * _BEHIND + 16, _POISON, np.uint8)
        self.all = whole[-whole.ctypes.data % 16 :]
        self.inside = self.all[_BEHIND : _BEHIND + size]
        self.address = self.inside.ctypes.data

    def check(self) -> None:
        size = len(self.inside)
        assert (self.all[:_BEHIND] == _POISON).all()
        assert (self.all[_BEHIND + size :] == _POISON).all()


def _check_scratch(scratch: NDArray[np.uint8], inputs: Inputs) -> None:
    """Of each row in which something is edited its own part was written to, and no other."""
    rows, vocab = inputs.logits.shape
    there = (inputs.edit_ids >= 0) & (inputs.edit_ids < vocab)
    edited = there & ((inputs.edit_factors != 1) | (inputs.edit_minus != 0))
    written = (scratch.reshape(rows, -1) != _POISON).any(axis=1)
    np.testing.assert_array_equal(written, edited.any(axis=1))


def choose(kernels: HostChoice, inputs: Inputs, *, told: bool = True) -> Chosen:
    """A launch; nothing is written but what is asked for, and scratch memory.

    The kernel in front writes what goes in, and still reads what comes out.
    """
    rows, vocab = inputs.logits.shape
    edits, best = inputs.edit_ids.shape[1], reported(vocab)
    given = {name: _Memory(values.nbytes) for name, values in vars(inputs).items()}
    for name, values in vars(inputs).items():
        given[name].inside[:] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    shapes: dict[str, tuple[type, tuple[int, ...]]] = {
        "chosen": (np.int64, (rows,)),
        "chosen_logit": (np.float64, (rows,)),
        "normaliser": (np.float64, (rows,)),
        "best_ids": (np.int64, (rows, best)),
        "best_logits": (np.float64, (rows, best)),
    }
    out = {name: _Memory(8 * int(np.prod(shape))) for name, (_, shape) in shapes.items()}
    scratch = _Memory(scratch_bytes(rows, vocab))
    at = {name: memory.address for name, memory in (given | out).items()}
    sizes = {"rows": rows, "vocab": vocab, "edits": edits}
    choosing = Choosing(**at, **sizes, scratch=scratch.address, told=told)
    launch, params = launch_of(choosing, overlap=kernels.overlap)
    kernels.late = [memory.inside for memory in (*given.values(), *out.values())]
    kernels.launch(launch, params, 0)
    for memory in (*given.values(), *out.values(), scratch):
        memory.check()
    _check_scratch(scratch.inside, inputs)
    for name, values in vars(inputs).items():
        assert given[name].inside.tobytes() == np.ascontiguousarray(values).tobytes(), name
    for name, memory in out.items():
        assert told or name == "chosen" or (memory.inside == _POISON).all(), name
    return Chosen(*(out[name].inside.view(kind).reshape(s) for name, (kind, s) in shapes.items()))
