"""Tensors that lie in files, mapped when they are read."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vlmforge.errors import TensorError


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a tensor without its values. `dtype` as torch names it: "bfloat16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path


@dataclass(frozen=True, slots=True)
class MappedTensor:
    """A tensor and where its values lie: `offset` in bytes, `stride` in elements."""

    info: TensorInfo
    offset: int
    stride: tuple[int, ...]

    @property
    def span(self) -> int:
        """Bytes from the first element to the end of the last."""
        if 0 in self.info.shape:
            return 0
        steps = zip(self.info.shape, self.stride, strict=True)
        elements = 1 + sum((size - 1) * stride for size, stride in steps)
        return elements * torch_dtype(self.info.dtype).itemsize

    def read(self) -> Tensor:
        """The tensor on the file's own pages (private: writes do not reach the file).

        Nothing is copied. The pages leave the process with the tensor, so a build that reads one
        tensor after the other never holds more than those in use. A living tensor keeps one file
        descriptor.

        Raises:
            TensorError: the file cannot be opened, or is shorter than when it was examined.
        """
        dtype = torch_dtype(self.info.dtype)
        if self.span == 0:
            return torch.empty(self.info.shape, dtype=dtype)
        start = self.offset % mmap.ALLOCATIONGRANULARITY
        try:
            with self.info.file.open("rb") as file:
                pages = mmap.mmap(
                    file.fileno(),
                    start + self.span,
                    access=mmap.ACCESS_COPY,
                    offset=self.offset - start,
                )
        except (OSError, ValueError) as error:
            raise TensorError(
                f"The tensor {self.info.name} cannot be read from {self.info.file}.",
                found=str(error),
                expected=f"{self.span} bytes at offset {self.offset}",
                fix="check that nothing changes the file meanwhile; download it again",
            ) from error
        count = self.span // dtype.itemsize
        flat = torch.frombuffer(pages, dtype=dtype, count=count, offset=start)
        return flat.as_strided(self.info.shape, self.stride)


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that torch calls by this name."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in elements, of a tensor whose last dimension varies fastest."""
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= size
    return tuple(reversed(stride))
