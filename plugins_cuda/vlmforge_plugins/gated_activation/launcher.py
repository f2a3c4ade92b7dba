"""Launches of gated activations: what each is told.

No allocation, no synchronisation, no look at device memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from vlmforge_plugins.cached_attention.config import Target
from vlmforge_plugins.cached_attention.plan import Launch
from vlmforge_plugins.errors import UnsupportedError

THREADS, GROUPS, ITEMS = 128, 2, 8
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
DTYPES: Mapping[str, str] = {"float16": "f16", "bfloat16": "bf16"}
NAMES: Mapping[tuple[str, str], str] = {
    (activation, dtype): f"vf_{activation}_{short}"
    for activation in ACTIVATIONS
    for dtype, short in DTYPES.items()
}
"""Kernels by activation and dtype."""
_MOST_GROUPS = 1 << 31


class Params(ctypes.Structure):
    """`vf::Params` of kernels/gated_activation.cu, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("given", "out")),
        *((name, ctypes.c_uint) for name in ("width", "row_groups", "groups")),
    ]


@dataclass(frozen=True)
class Gate:
    """`out [rows, width] = act(given[:, :width]) * given[:, width:]`; both aligned to 16 bytes.

    Attributes:
        given, out: Addresses.
        rows, width: Of `out`.
        activation: One of `ACTIVATIONS`.
        dtype: One of `DTYPES`, of both.
    """

    given: int
    out: int
    rows: int
    width: int
    activation: str
    dtype: str


class Kernels(Protocol):
    """A compiled kernel, or several, on one GPU.

    Attributes:
        overlap: Whether they wait for the kernel in front of them (see `overlaps`).
    """

    overlap: bool

    def launch(self, launch: Launch, params: Params, stream: int) -> None:
        """Enqueues one kernel. `params` is read before this returns."""


def overlaps(target: Target) -> bool:
    """Whether what is compiled for it may start while the kernel in front of it ends."""
    return target.capability >= 90 and not target.is_ptx


def name_of(activation: str, dtype: str) -> str:
    """The kernel (UnsupportedError: there is none)."""
    if (name := NAMES.get((activation, dtype))) is None:
        raise UnsupportedError(
            "There is no kernel for such a gated activation.",
            found=f"{activation} of {dtype}",
            expected=f"{', '.join(ACTIVATIONS)} of {' or '.join(DTYPES)}",
        )
    return name


def launch_of(gate: Gate, *, overlap: bool) -> tuple[Launch, Params]:
    """The kernel, and what it is told.

    Raises:
        UnsupportedError: An activation or a dtype without a kernel, or too many numbers.
    """
    name, row_groups = name_of(gate.activation, gate.dtype), -(-gate.width // ITEMS)
    groups = gate.rows * row_groups
    if not 0 < groups < _MOST_GROUPS or gate.given % 16 or gate.out % 16:
        raise UnsupportedError(
            "The kernels of gated activations do not cover such tensors.",
            found=str(gate),
            expected=f"some rows, aligned to 16 bytes, of fewer than {_MOST_GROUPS} groups of "
            f"{ITEMS} numbers",
        )
    params = Params(gate.given, gate.out, gate.width, row_groups, groups)
    blocks = -(-groups // (THREADS * GROUPS))
    return Launch(name, (blocks, 1, 1), THREADS, overlaps=overlap), params
