"""Compiled kernels as files of an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from vlmforge.env import writable_cache
from vlmforge.errors import BuildError, ConfigError
from vlmforge_plugins.cached_attention.compile import Binary, Compiler, Nvcc, Nvrtc
from vlmforge_plugins.collectives.compile import compile_set
from vlmforge_plugins.errors import CompileError, PluginError

_MEETINGS = "decoder.rank0.meetings"

Compile = Callable[[Compiler, Path], Iterable[Binary]]
"""Compiles a set of kernels, with a folder of what was compiled before."""


def compiler() -> Compiler:
    """NVRTC, which needs no toolkit, or else the toolkit's compiler (ConfigError: neither)."""
    try:
        return Nvrtc()
    except CompileError as missing:
        try:
            return Nvcc()
        except CompileError:
            raise ConfigError(
                missing.summary,
                found=missing.found,
                expected=missing.expected,
                fix="pip install 'vlmforge[kernels]'; no GPU and no CUDA toolkit is needed",
            ) from missing


def write_kernels(compile_all: Compile, stem: str, folder: Path) -> Mapping[str, str]:
    """Write what `compile_all` gives as `<stem>.<target>...`; files by the targets' names.

    Raises:
        BuildError: they cannot be compiled.
        ConfigError: see `compiler`.
    """
    with TemporaryDirectory(prefix=".kernels.", dir=folder) as scratch:
        # Without a cache they are compiled again the next time.
        cache = writable_cache("kernels") or Path(scratch)
        try:
            binaries = tuple(compile_all(compiler(), cache))
        except PluginError as error:
            raise BuildError(
                error.summary, found=error.found, expected=error.expected, fix=error.fix
            ) from error
    files = {}
    for binary in binaries:
        kind = "ptx" if binary.target.name == "ptx" else f"{binary.target.name}.cubin"
        files[binary.target.name] = f"{stem}.{kind}"
        (folder / files[binary.target.name]).write_bytes(binary.code)
    return files


def write_meetings(folder: Path) -> Mapping[str, str]:
    """Those in which the GPUs of all ranks meet."""
    return write_kernels(compile_set, _MEETINGS, folder)
