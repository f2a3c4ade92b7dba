"""Which kernels exist: configurations, the machines they are compiled for, and their sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from vlmforge_plugins.errors import UnsupportedError

HEAD_SIZES = (32, 64, 80, 96, 104, 128)
PAGE_SIZES = (16, 32, 64, 128)
STRIP_KEYS = 16
PREFILL_WARPS = 4
PREFILL_STRIPS = 4
WRITE_THREADS = 256
COMBINE_THREADS = 128

Activation = Literal["float16", "bfloat16"]
Stored = Literal["float16", "bfloat16", "float8_e4m3fn"]


@dataclass(frozen=True)
class Target:
    """A kind of GPU that kernels are compiled for.

    Attributes:
        name: As written in a plan and on the command line.
        arch: The compiler's name of it. Hopper's own matrix instructions need the `a`.
        capability: Compute capability, major times 10 plus minor.
        shared_bytes: Shared memory of a multiprocessor that blocks can have.
    """

    name: str
    arch: str
    capability: int
    shared_bytes: int

    @property
    def is_ptx(self) -> bool:
        """Whether a driver compiles it on."""
        return self.arch.startswith("compute_")


TARGETS = (
    Target("sm_80", "sm_80", 80, 163 << 10),
    Target("sm_86", "sm_86", 86, 99 << 10),
    Target("sm_89", "sm_89", 89, 99 << 10),
    Target("sm_90", "sm_90a", 90, 227 << 10),
    Target("sm_120", "sm_120", 120, 99 << 10),
)
# For machines that are none of these: compiled by their driver when the engine is loaded.
PTX_TARGETS = {
    False: Target("ptx", "compute_80", 80, 163 << 10),
    True: Target("ptx", "compute_89", 89, 99 << 10),
}


@dataclass(frozen=True)
class Config:
    """What the kernels' sources are specialised on. Everything else is an argument of a launch.

    Attributes:
        head_size: D.
        activation: Type of queries, new keys and values, and the output.
        stored: Type of the pools: `activation`, or fp8 E4M3 with a scale for keys, one for values.
    """

    head_size: int
    activation: Activation
    stored: Stored

    @property
    def fp8(self) -> bool:
        """Whether the pools hold fp8."""
        return self.stored == "float8_e4m3fn"

    @property
    def name(self) -> str:
        """For files and messages: `d128_float16_float8_e4m3fn`."""
        return f"d{self.head_size}_{self.activation}_{self.stored}"

    def check(self) -> None:
        """Raises `UnsupportedError` unless there are kernels for it."""
        if self.head_size not in HEAD_SIZES:
            raise UnsupportedError(
                "The attention kernels do not cover this head size.",
                found=f"head size {self.head_size}",
                expected=f"one of {', '.join(map(str, HEAD_SIZES))}",
                fix="build with --attention native, or add the size to HEAD_SIZES and run "
                "`make test-nightly`",
            )
        if self.activation not in ("float16", "bfloat16"):
            raise UnsupportedError(
                "The attention kernels do not cover this activation type.",
                found=f"activations in {self.activation}",
                expected="float16 or bfloat16",
                fix="build with --dtype float16",
            )
        if self.stored not in (self.activation, "float8_e4m3fn"):
            raise UnsupportedError(
                "The attention kernels do not cover this type of KV cache.",
                found=f"a cache in {self.stored} under activations in {self.activation}",
                expected=f"{self.activation} or float8_e4m3fn",
                fix="choose one of these for the cache",
            )

    def check_target(self, target: Target) -> None:
        """Raises `UnsupportedError` if a machine of this kind cannot run it."""
        if self.fp8 and target.capability < 89:
            raise UnsupportedError(
                "An fp8 KV cache needs a GPU that converts fp8 in hardware.",
                found=f"compute capability {target.capability / 10:.1f} ({target.name})",
                expected="8.9 or higher (Ada, Hopper, Blackwell)",
                fix=f"keep the KV cache in {self.activation} for this GPU",
            )


def configs() -> tuple[Config, ...]:
    """All that are shipped."""
    types: tuple[Activation, ...] = ("float16", "bfloat16")
    return tuple(
        Config(size, activation, stored)
        for size in HEAD_SIZES
        for activation in types
        for stored in (activation, "float8_e4m3fn")
    )


def targets(config: Config) -> tuple[Target, ...]:
    """The kinds of GPU that can run `config`."""
    return tuple(target for target in TARGETS if not config.fp8 or target.capability >= 89)


@dataclass(frozen=True)
class Sizes:
    """What the kernels of one configuration take of a machine. Mirrors the constants in kernels/.

    Attributes:
        decode_stages: Depth of decode's ring of asynchronous copies.
        prefill_tiles: Tiles of 16 queries that a warp of prefill holds in registers.
        hopper: Whether prefill is the one for sm_90a, with warpgroup products.
        buffers: For its tiles of 128 keys or values.
        decode_warps: Warps of a block of decode.
        decode_bulk: Whether decode reads by bulk copies, rows not padded.
        fused: Whether the last block of decode adds up the splits; else a kernel does.
        decode_blocks: Blocks of decode that a multiprocessor must have registers for.
        overlap: Whether kernels start while the one in front of them ends.
        narrow_warps: Warps of a block of decode for many short rows.
    """

    config: Config
    decode_stages: int
    prefill_tiles: int
    hopper: bool = False
    buffers: int = 4
    decode_warps: int = 4
    decode_bulk: bool = False
    fused: bool = True
    decode_blocks: int = 1
    overlap: bool = False
    narrow_warps: int = 4

    @property
    def strip_bytes(self) -> int:
        """Shared memory of 16 keys, rows padded to an odd number of 16-byte units."""
        steps = -(-self.config.head_size // 16)
        return STRIP_KEYS * ((steps * (1 if self.config.fp8 else 2)) | 1) * 16

    @property
    def decode_bytes(self) -> int:
        """Shared memory of a block of decode: the ring, or its warps' merge; rotated queries."""
        steps = -(-self.config.head_size // 16)
        merge = self.decode_warps * 16 * (steps * 16 + 8 + 2) * 4
        queries = 16 * (self.config.head_size + 20) * 2
        strips = self.decode_warps * self.decode_stages
        if self.decode_bulk:  # and a barrier for each pair of strips
            ring = strips * 4 * STRIP_KEYS * self.config.head_size
            return max(ring, merge) + queries + strips * 8
        return max(strips * 2 * self.strip_bytes, merge) + queries

    @property
    def decode_registers(self) -> int:
        """Registers of a thread of decode, at most; for planning."""
        free = 120 if self.config.head_size <= 64 else 176 if self.config.head_size < 128 else 192
        return min(free, 65536 // (32 * self.decode_warps * self.decode_blocks) // 8 * 8)

    @property
    def narrow(self) -> Sizes:
        """The same with the narrow blocks in place of the others."""
        return replace(self, decode_warps=self.narrow_warps)

    @property
    def prefill_bytes(self) -> int:
        """Shared memory of a block of prefill: its stages of keys and values (and barriers)."""
        if self.hopper:
            panels = -(-self.config.head_size // 64)  # of 128 keys x 64 dimensions x 2 bytes
            stages = 4 if self.config.fp8 else 0  # of 128 keys as they lie in the pool
            barriers = 8 * (2 * self.buffers + 2 * stages + 10)
            narrow = stages * 128 * self.config.head_size
            return self.buffers * panels * 128 * 128 + narrow + barriers
        return 4 * PREFILL_STRIPS * self.strip_bytes

    @property
    def prefill_rows(self) -> int:
        """Queries of a block of prefill."""
        return 128 if self.hopper else 16 * self.prefill_tiles * PREFILL_WARPS

    @property
    def prefill_threads(self) -> int:
        """Threads of a block of prefill."""
        return 384 if self.hopper else 32 * PREFILL_WARPS

    @property
    def defines(self) -> tuple[str, ...]:
        """Macros for the compiler, `NAME=VALUE`."""
        return (
            f"VF_BF16={int(self.config.activation == 'bfloat16')}",
            f"VF_FP8_KV={int(self.config.fp8)}",
            f"VF_HEAD_SIZE={self.config.head_size}",
            f"VF_DECODE_WARPS={self.decode_warps}",
            f"VF_NARROW_WARPS={self.narrow_warps}",
            f"VF_DECODE_STAGES={self.decode_stages}",
            f"VF_DECODE_BULK={int(self.decode_bulk)}",
            f"VF_DECODE_FUSED={int(self.fused)}",
            f"VF_DECODE_BLOCKS={self.decode_blocks}",
            f"VF_OVERLAP={int(self.overlap)}",
            f"VF_PREFILL_TILES={self.prefill_tiles}",
            f"VF_HOPPER_PREFILL={int(self.hopper)}",
            f"VF_HOPPER_BUFFERS={self.buffers}",
        )


def sizes(config: Config, target: Target) -> Sizes:
    """How `config` is compiled for `target`. Measured on an H200 and an H100; see BENCH.md.

    Two tiles of queries halve the reads of shared memory per product, but only small heads leave
    the registers for them. Warpgroup products take 16-bit operands from shared memory as they lie;
    they are not made for the heads of tiny models.
    A block of decode that fills a multiprocessor leaves fewer splits to add up than two would.
    """
    large = target.capability == 90
    special = target.arch == "sm_90a"
    return Sizes(
        config,
        decode_stages=3 if large else 2,
        decode_warps=8 if large else 4,
        decode_bulk=special and not config.fp8 and config.head_size % 16 == 0,
        overlap=target.capability >= 90,
        prefill_tiles=2 if config.head_size <= 64 else 1,
        hopper=special and config.head_size >= 64,
        buffers=8 if config.head_size <= 64 else 5 if config.fp8 else 6,
    )
