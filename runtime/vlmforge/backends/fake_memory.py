"""The processor's memory as a device's (see `vlmforge.backends.fake`)."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmforge.backends.cuda.device import Tensor
from vlmforge.backends.number_formats import DTYPES, decode, encode


def memory_as(address: int, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    """Memory as an array, in place."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


def narrow(tensor: Tensor) -> bool:
    """Whether its numbers are of 16 bits or fewer, for which numpy has none."""
    return tensor.dtype in DTYPES


def bits_of(tensor: Tensor) -> NDArray[Any]:
    """In place; numbers that numpy has not as their bits."""
    return memory_as(tensor.address, DTYPES.get(tensor.dtype, tensor.dtype), tensor.shape)


def numbers_of(tensor: Tensor) -> NDArray[Any]:
    """What is there, narrow ones as float32."""
    bits = bits_of(tensor)
    return decode(bits, tensor.dtype).astype(np.float32) if narrow(tensor) else bits


def put(tensor: Tensor, values: NDArray[Any]) -> None:
    """Write float32 `values`, rounded to what the tensor is of."""
    bits_of(tensor)[:] = encode(values, tensor.dtype) if narrow(tensor) else values
