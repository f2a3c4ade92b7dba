"""The kernels of gated activations by numpy, in float32 (see `vlmforge.backends.fake`)."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from vlmforge.backends.number_formats import decode, encode
from vlmforge_plugins.cached_attention.plan import Launch
from vlmforge_plugins.gated_activation.launcher import NAMES, Params

Floats = NDArray[np.float32]
_ROOT = math.sqrt(2 / math.pi)


def _sigmoid(x: Floats) -> Floats:
    return np.float32(1) / (np.float32(1) + np.exp(-x))


def _gelu(x: Floats) -> Floats:
    tail = np.asarray(np.frompyfunc(math.erfc, 1, 1)(-x.astype(np.float64) / math.sqrt(2)))
    return (x * tail.astype(np.float64) / 2).astype(np.float32)


_FUNCTIONS: Mapping[str, Callable[[Floats], Floats]] = {
    "silu": lambda x: x * _sigmoid(x),
    "gelu": _gelu,
    "gelu_tanh": lambda x: x * _sigmoid(np.float32(2 * _ROOT) * (x + np.float32(0.044715) * x**3)),
}
_KINDS = {name: kind for kind, name in NAMES.items()}


class NumpyGates:
    """See `vlmforge_plugins.gated_activation.launcher.Kernels`."""

    overlap = False

    def launch(self, launch: Launch, params: Params, stream: int) -> None:
        """Do what the kernel does."""
        del stream
        activation, dtype = _KINDS[launch.kernel]
        p, rows = params, params.groups // params.row_groups
        given = _memory(p.given, rows * 2 * p.width).reshape(rows, 2, p.width)
        with np.errstate(over="ignore", invalid="ignore"):  # as a kernel does, without a word
            gate, up = (decode(given[:, i], dtype).astype(np.float32) for i in (0, 1))
            found = _FUNCTIONS[activation](gate) * up
            _memory(p.out, rows * p.width)[:] = encode(found, dtype).reshape(-1)


def _memory(address: int, count: int) -> NDArray[np.uint16]:
    return np.ctypeslib.as_array((ctypes.c_uint16 * count).from_address(address))
