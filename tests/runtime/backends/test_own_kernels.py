"""Which of an engine's kernels are loaded for a GPU, and what is said where none can be."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmforge.backends.cuda.own_kernels import load_kernels
from vlmforge.errors import BackendUnavailableError
from vlmforge_plugins.cached_attention.config import Target
from vlmforge_plugins.errors import LaunchError


def files(folder: Path, *names: str) -> dict[str, Path]:
    for name in names:
        (folder / name).write_bytes(name.encode())
    return {name: folder / name for name in names}


def loaded(found: dict[str, Path], capability: int) -> tuple[bytes, str]:
    return load_kernels("doing things", found, capability, lambda code, t: (code, t.name))


@pytest.mark.parametrize(
    ("capability", "target"),
    [(80, "sm_80"), (87, "sm_86"), (90, "sm_90"), (100, "ptx"), (120, "ptx")],
)
def test_its_own_or_what_its_driver_compiles(tmp_path: Path, capability: int, target: str) -> None:
    found = files(tmp_path, "sm_80", "sm_86", "sm_90", "ptx")
    assert loaded(found, capability) == (target.encode(), target)


def test_a_gpu_that_is_too_old(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailableError, match="no kernels of doing things") as caught:
        loaded(files(tmp_path, "sm_90", "sm_80"), 75)
    assert (caught.value.found, caught.value.expected) == ("compute capability 7.5", "sm_80, sm_90")
    assert "--target cuda --force" in caught.value.fix


def test_files_that_are_gone_or_refused(tmp_path: Path) -> None:
    found = files(tmp_path, "sm_90")
    found["sm_90"].unlink()
    with pytest.raises(BackendUnavailableError, match=r"sm_90 cannot be read") as caught:
        loaded(found, 90)
    assert caught.value.found == "No such file or directory"

    def refused(code: bytes, target: Target) -> None:
        raise LaunchError("No.", found="a cubin of another kind")

    with pytest.raises(BackendUnavailableError, match=r"No\.") as caught:
        load_kernels("doing things", files(tmp_path, "sm_90"), 90, refused)
    assert caught.value.found == "a cubin of another kind"
