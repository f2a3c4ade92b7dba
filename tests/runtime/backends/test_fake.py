"""The kernels by numpy against the reference that the compiled ones are compared with."""

from __future__ import annotations

import pytest

from attention_backends import HostBackend, addresses
from attention_cases import Batch, Case, make, verify
from vlmforge.backends.fake import NumpyKernels
from vlmforge_plugins.cached_attention.config import sizes
from vlmforge_plugins.cached_attention.launcher import run
from vlmforge_plugins.cached_attention.plan import plan

CASES = [
    Case(kind, *types, head_size, group, length, page_size)
    for kind, types, head_size, group, length, page_size in (
        ("decode", ("float16", "float16"), 32, 1, 65, 64),
        ("decode", ("bfloat16", "float8_e4m3fn"), 64, 4, 989, 16),
        ("prefill", ("bfloat16", "bfloat16"), 32, 7, 64, 32),
        ("chunk", ("float16", "float16"), 128, 4, 989, 64),
        ("chunk", ("float16", "float8_e4m3fn"), 80, 1, 65, 128),
    )
]


def by_numpy(batch: Batch) -> dict[str, object]:
    compiled = sizes(batch.case.config, batch.case.target)
    chosen = plan(batch.shape, compiled, HostBackend.machine)
    arrays = {name: array.copy() for name, array in batch.arrays.items()}
    tensors = addresses(batch, lambda name: arrays[name].ctypes.data, 0)
    run(chosen, tensors, batch.scales, NumpyKernels(compiled), 0)
    return arrays


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_by_numpy(case: Case) -> None:
    batch = make(case)
    verify(batch, by_numpy(batch))
