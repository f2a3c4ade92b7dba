"""What the driver says, as an error of ours; and a machine without one."""

from __future__ import annotations

import pytest
from cuda.bindings import driver

from vlmforge_plugins.cached_attention.driver import call, launch_config
from vlmforge_plugins.cached_attention.plan import Launch
from vlmforge_plugins.errors import LaunchError


def refuse(_argument: int) -> tuple[driver.CUresult]:
    return (driver.CUresult.CUDA_ERROR_NO_BINARY_FOR_GPU,)


def test_a_refusal_names_the_call_and_the_status() -> None:
    with pytest.raises(LaunchError) as caught:
        call(refuse, 1)
    assert caught.value.summary == "The CUDA driver refused refuse."
    assert "CUDA_ERROR_NO_BINARY_FOR_GPU" in caught.value.found
    assert "vlmforge inspect" in caught.value.fix


def test_a_launch_as_the_driver_takes_it() -> None:
    plain = launch_config(Launch("vf_prefill", (7, 8, 9), 128, 1000), 5)
    assert (plain.gridDimX, plain.gridDimY, plain.gridDimZ) == (7, 8, 9)
    assert (plain.blockDimX, plain.blockDimY, plain.blockDimZ) == (128, 1, 1)
    assert (plain.sharedMemBytes, int(plain.hStream), plain.numAttrs) == (1000, 5, 0)
    early = launch_config(Launch("vf_decode", (1, 1, 1), 256, overlaps=True), 0)
    (attribute,) = early.attrs
    kind = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    assert (early.numAttrs, attribute.id) == (1, kind)
    assert attribute.value.programmaticStreamSerializationAllowed == 1


def test_results_come_without_the_status() -> None:
    good = driver.CUresult.CUDA_SUCCESS
    assert call(lambda: (good,)) == ()
    assert call(lambda: (good, 7)) == 7
    assert call(lambda: (good, 7, 8)) == (7, 8)
