"""Tensors that are called differently by the versions of the program that saves them."""

from __future__ import annotations

from pathlib import Path

from vlmforge.errors import TensorError
from vlmforge_builder.checkpoint.compare import same_values
from vlmforge_builder.checkpoint.store import TensorStore


def find_prefix(store: TensorStore, checkpoint: Path, prefixes: tuple[str, ...], name: str) -> str:
    """Which of `prefixes` begins the name of the checkpoint's tensor `name` (TensorError: none)."""
    refuse_two(store, checkpoint, tuple(prefix + name for prefix in prefixes))
    for prefix in prefixes:
        if prefix + name in store:
            return prefix
    raise TensorError(
        f"A tensor is not found under any of its names in {checkpoint}.",
        found=", ".join(sorted(store.names())[:3]) + ", ...",
        expected=" or ".join(prefix + name for prefix in prefixes),
        fix="check that config.json belongs to these weight files",
    )


def refuse_two(store: TensorStore, checkpoint: Path, names: tuple[str, ...]) -> None:
    """Refuse one tensor under two of its names with other values (TensorError)."""
    first, *others = [name for name in names if name in store] or [""]
    for other in others:
        if not same_values(store, first, store, other):
            raise TensorError(
                f"{checkpoint} stores a tensor under two of its names, with other values.",
                found=f"{first} and {other}",
                expected="one of them",
                fix="save the checkpoint again with one version of transformers",
            )
