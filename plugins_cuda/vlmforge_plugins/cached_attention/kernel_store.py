"""The compiled kernels of the plans in a process: each set once, however many layers share it."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmforge_plugins.cached_attention.compile import Binary
from vlmforge_plugins.cached_attention.config import (
    PTX_TARGETS,
    Config,
    Sizes,
    Target,
    sizes,
    targets,
)
from vlmforge_plugins.cached_attention.plan import Machine
from vlmforge_plugins.errors import UnsupportedError

Compiled = Mapping[Config, Sequence[Binary]]
"""The binaries of every configuration that a network's nodes may have."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Kernels on a GPU: what launches them, how they were compiled, and the GPU."""

    kernels: Any
    sizes: Sizes
    machine: Machine


class KernelStore:
    """Sets of binaries by a checksum of their contents.

    Args:
        compiled: What is put into plans; empty where plans are only run.
    """

    def __init__(self, compiled: Compiled) -> None:
        self._keys: dict[Config, str] = {}
        self._sets: dict[str, Mapping[str, bytes]] = {}
        self._loaded: dict[tuple[str, Config], Loaded] = {}
        for config, binaries in compiled.items():
            self._keys[config] = self.add({b.target.name: b.code for b in binaries})

    def add(self, binaries: Mapping[str, bytes]) -> str:
        """Keep a set of binaries, by the names of their targets; returns its key."""
        digest = hashlib.sha256()
        for name, code in sorted(binaries.items()):
            digest.update(f"{name} {len(code)} ".encode() + code)
        self._sets[digest.hexdigest()] = binaries
        return digest.hexdigest()

    def key_of(self, config: Config) -> str:
        """The key of what was compiled for `config`; empty where nothing was."""
        return self._keys.get(config, "")

    def binaries(self, key: str) -> Mapping[str, bytes]:
        """The set under `key`; empty where there is none."""
        return self._sets.get(key, {})

    def load(self, key: str, config: Config) -> Loaded:
        """The kernels for the current GPU, loaded the first time.

        Raises:
            UnsupportedError: the set has none that could run on it, or is not there.
            LaunchError: the driver refuses them.
        """
        if (key, config) not in self._loaded:
            from vlmforge_plugins.cached_attention import driver

            available = self.binaries(key)
            target = choose_target(config, available, driver.capability())
            compiled = sizes(config, target)
            kernels = driver.CudaKernels(available[target.name], compiled)
            self._loaded[key, config] = Loaded(kernels, compiled, driver.machine())
        return self._loaded[key, config]


def choose_target(config: Config, available: Collection[str], capability: int) -> Target:
    """Whose kernels run on a GPU: its own, those of an older one of its generation, or PTX.

    Args:
        config: What the kernels are specialised on.
        available: Names of the targets that the plan has kernels of.
        capability: The GPU's compute capability, major times 10 plus minor.

    Raises:
        UnsupportedError: the plan has none that could run on it.
    """
    known = [target for target in targets(config) if target.name in available]
    ptx = PTX_TARGETS[config.fp8]
    known += [ptx] if ptx.name in available else []
    if (found := newest_target(known, capability)) is not None:
        return found
    raise UnsupportedError(
        "The engine has no attention kernels for this GPU.",
        found=f"compute capability {capability / 10:.1f}",
        expected=", ".join(sorted(available)) or "an engine that was built with kernels",
        fix=f"use a GPU of compute capability {ptx.capability / 10:.1f} or later",
    )


def newest_target(known: Sequence[Target], capability: int) -> Target | None:
    """Of these, the one whose kernels run best on a GPU of this capability; None: none does.

    A cubin runs on every later minor version of its major one, PTX on all that is later.
    """
    fitting = [
        target
        for target in known
        if target.capability <= capability
        and (target.is_ptx or target.capability // 10 == capability // 10)
    ]
    return max(fitting, key=lambda target: (not target.is_ptx, target.capability), default=None)
