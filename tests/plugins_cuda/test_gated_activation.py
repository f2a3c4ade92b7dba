"""The kernels of gated activations, compiled for the host, against numpy in float64."""

from __future__ import annotations

import ctypes
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from host_gates import HostGates, library
from vlmforge.backends.fake_gates import NumpyGates
from vlmforge.backends.number_formats import decode, encode
from vlmforge_plugins.cached_attention.compile import Nvrtc, reports
from vlmforge_plugins.cached_attention.config import PTX_TARGETS, TARGETS
from vlmforge_plugins.errors import UnsupportedError
from vlmforge_plugins.gated_activation import launcher
from vlmforge_plugins.gated_activation.compile import source_of
from vlmforge_plugins.gated_activation.launcher import ACTIVATIONS, NAMES, Gate, Kernels, launch_of

Bits = NDArray[np.uint16]
DTYPES = ("float16", "bfloat16")
BEHIND = 0xA5A5
ULP = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # half of one, relatively
# The largest number, and what is near to nothing.
LIMITS = {"float16": (65504.0, 2.0**-24), "bfloat16": (3.39e38, 3e-37)}
_erf = np.frompyfunc(math.erfc, 1, 1)


def exact(numbers: NDArray[np.float64], activation: str) -> NDArray[np.float64]:
    """`act(x) * y` of rows `[r, 2 n]` in float64."""
    x, y = np.split(numbers, 2, axis=-1)
    with np.errstate(all="ignore"):
        if activation == "silu":
            act = x / (1 + np.exp(-x))
        elif activation == "gelu":
            act = x * (_erf(-x / math.sqrt(2)).astype(np.float64) / 2)
        else:  # 1 + tanh(u), without a difference of what is nearly equal
            u = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
            act = x / (1 + np.exp(-2 * u))
        return act * y


def aligned(size: int) -> Bits:
    """Room for so many, and some behind."""
    memory = np.full(size + 136, BEHIND, np.uint16)
    return memory[-(memory.ctypes.data // 2) % 8 :]


def run(kernels: Kernels, bits: Bits, activation: str, dtype: str) -> Bits:
    """Of rows `[r, 2 n]` of bits; nothing else is written."""
    rows, width = bits.shape[0], bits.shape[1] // 2
    given, out = aligned(bits.size), aligned(rows * width)
    given[: bits.size] = bits.reshape(-1)
    gate = Gate(given.ctypes.data, out.ctypes.data, rows, width, activation, dtype)
    launch, params = launch_of(gate, overlap=True)
    assert launch.overlaps
    kernels.launch(launch, params, 0)
    assert (given[: bits.size] == bits.reshape(-1)).all()
    assert (out[rows * width :] == BEHIND).all()
    return out[: rows * width].reshape(rows, width)


def numbers_of(bits: Bits, dtype: str) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):  # what is no number is widened too
        return decode(bits, dtype).astype(np.float64)


def assert_near(found: Bits, bits: Bits, activation: str, dtype: str) -> None:
    """Within a rounding and a little: float32 has some more digits than either dtype."""
    numbers, got = numbers_of(bits, dtype), numbers_of(found, dtype)
    wanted, up = exact(numbers, activation), np.split(numbers, 2, axis=-1)[1]
    np.testing.assert_array_equal(np.isnan(got), np.isnan(wanted))
    most, nothing = LIMITS[dtype]
    with np.errstate(all="ignore"):
        huge, small = np.abs(wanted) > 1.01 * most, np.abs(wanted) < 0.99 * most
        # What is nothing in float32 is nothing, whatever it is multiplied by.
        limit = 1.05 * ULP[dtype] * np.abs(wanted) + nothing * np.maximum(np.abs(up), 1)
        far = np.abs(got - wanted) > limit
    np.testing.assert_array_equal(got[huge], np.sign(wanted[huge]) * np.inf)
    assert not far[small].any(), (numbers.reshape(2, -1)[:, far.reshape(-1)], got[far], wanted[far])


def drawn(seed: int, rows: int, width: int, dtype: str, spread: float) -> Bits:
    numbers = np.random.default_rng(seed).standard_normal((rows, 2 * width)) * spread
    return encode(numbers.astype(np.float32), dtype)


WIDTHS = st.one_of(st.integers(1, 40), st.sampled_from([64, 256, 1000, 2048, 2056, 2049]))


@settings(max_examples=40)
@given(
    rows=st.integers(1, 5),
    width=WIDTHS,
    activation=st.sampled_from(ACTIVATIONS),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([0.01, 1.0, 6.0]),
    seed=st.integers(0, 99),
)
@example(rows=2, width=4 * 256 * 8, activation="silu", dtype="float16", spread=1.0, seed=0)
@example(rows=3, width=4 * 256 * 8 + 1, activation="silu", dtype="bfloat16", spread=1.0, seed=0)
def test_any_size(
    rows: int, width: int, activation: str, dtype: str, spread: float, seed: int
) -> None:
    bits = drawn(seed, rows, width, dtype, spread)
    assert_near(run(HostGates(), bits, activation, dtype), bits, activation, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kernels", [HostGates(), NumpyGates()], ids=["host", "numpy"])
def test_every_number_there_is(kernels: Kernels, activation: str, dtype: str) -> None:
    """Extremes, infinities and what is no number among them, in both halves."""
    every = np.arange(1 << 16, dtype=np.uint16)
    one, many = (encode(np.full(1 << 16, n, np.float32), dtype) for n in (1.0, -1000.0))
    for up in (one, many, every[::-1]):
        bits = np.stack([every, up]).reshape(1, -1)
        assert_near(run(kernels, bits, activation, dtype), bits, activation, dtype)


def test_what_a_launch_is_told_is_as_the_kernels_read_it() -> None:
    known = library()
    assert ctypes.sizeof(launcher.Params) == known.vf_params_size()
    for name, *_ in launcher.Params._fields_:
        offset = getattr(launcher.Params, name).offset
        assert offset == known.vf_params_offset(name.encode()), name
    for name in ("THREADS", "GROUPS", "ITEMS"):
        assert getattr(launcher, name) == known.vf_constant(name.encode())


@pytest.mark.parametrize(
    "change",
    [
        {"activation": "relu"},
        {"dtype": "float32"},
        {"rows": 0},
        {"width": 0},
        {"rows": 1 << 30},
        {"given": 8},
        {"out": 2},
    ],
    ids=str,
)
def test_what_there_is_no_kernel_for(change: dict[str, Any]) -> None:
    gate = Gate(0, 0, 4, 24, "silu", "float16")
    launch, params = launch_of(gate, overlap=False)
    assert (launch.grid, launch.overlaps, params.groups) == ((1, 1, 1), False, 12)
    with pytest.raises(UnsupportedError):
        launch_of(replace(gate, **change), overlap=False)


def test_who_overlaps_is_compiled_to_wait() -> None:
    for target in (*TARGETS, *PTX_TARGETS.values()):
        waits = "VF_OVERLAP=1" in source_of("silu", "float16", target).defines
        assert waits is launcher.overlaps(target) is (target.name in ("sm_90", "sm_120"))


@pytest.mark.parametrize("kind", sorted(NAMES), ids="-".join)
def test_gpus_get_every_kernel(kind: tuple[str, str]) -> None:
    """By the compiler that engines are built with; registers leave room for many blocks."""
    hopper = next(target for target in TARGETS if target.name == "sm_90")
    compiled = Nvrtc().compile(source_of(*kind, hopper), hopper)
    (report,) = reports(compiled.log)
    assert (report.kernel, report.stack_bytes, report.spill_store_bytes) == (NAMES[kind], 0, 0)
    assert report.registers <= (80 if kind[0] == "gelu" else 40)
