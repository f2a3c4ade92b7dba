"""What the driver says, as an error of ours; and a machine without one."""

from __future__ import annotations

import pytest
from cuda.bindings import driver

from vlmforge_plugins.cached_attention.driver import call
from vlmforge_plugins.errors import LaunchError


def refuse(_argument: int) -> tuple[driver.CUresult]:
    return (driver.CUresult.CUDA_ERROR_NO_BINARY_FOR_GPU,)


def test_a_refusal_names_the_call_and_the_status() -> None:
    with pytest.raises(LaunchError) as caught:
        call(refuse, 1)
    assert caught.value.summary == "The CUDA driver refused refuse."
    assert "CUDA_ERROR_NO_BINARY_FOR_GPU" in caught.value.found
    assert "vlmforge inspect" in caught.value.fix


def test_results_come_without_the_status() -> None:
    good = driver.CUresult.CUDA_SUCCESS
    assert call(lambda: (good,)) == ()
    assert call(lambda: (good, 7)) == 7
    assert call(lambda: (good, 7, 8)) == (7, 8)
