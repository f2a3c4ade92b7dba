"""Compiles the kernels: one cubin per configuration and kind of GPU, and PTX for other GPUs.

    python -m vlmforge_plugins.cached_attention.compile --out DIR [--compiler nvcc] [--config NAME]

NVRTC (wheels from PyPI, no toolkit) and nvcc make the same set. Results are cached by the content
of everything that went in: sources, macros, architecture, compiler and its version.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vlmforge_plugins.cached_attention.config import (
    PTX_TARGETS,
    Config,
    Sizes,
    Target,
    configs,
    sizes,
    targets,
)
from vlmforge_plugins.errors import CompileError

SOURCES = Path(__file__).parent / "kernels"
MAIN = "cached_attention.cu"
FLAGS = ("-std=c++17",)


@dataclass(frozen=True)
class Source:
    """What is compiled.

    Attributes:
        name: For messages and files.
        main: The file that includes all others.
        folders: In which these are.
        defines: Macros, `NAME=VALUE`.
    """

    name: str
    main: Path
    folders: tuple[Path, ...]
    defines: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """All that may go in, in order."""
        found = [path for folder in self.folders for path in sorted(folder.iterdir())]
        return tuple(path for path in found if path.suffix in (".cu", ".cuh", ".h"))


def source_of(sizes: Sizes) -> Source:
    """The attention's kernels of one configuration."""
    return Source(sizes.config.name, SOURCES / MAIN, (SOURCES,), sizes.defines)


@dataclass(frozen=True)
class Binary:
    """Compiled kernels.

    Attributes:
        target: What it runs on.
        code: A cubin, or PTX that ends in a zero byte (target "ptx").
        log: What the assembler reported; empty for PTX.
    """

    target: Target
    code: bytes
    log: str


class Compiler(Protocol):
    """Turns the sources into one binary."""

    @property
    def version(self) -> str:
        """Name and version: part of the cache's key."""

    def compile(self, source: Source, target: Target) -> Binary:
        """Raises `CompileError` with the compiler's words."""


class Nvcc:
    """The CUDA toolkit's compiler.

    Args:
        path: Of the program; by default the one on PATH.

    Raises:
        CompileError: There is none.
    """

    def __init__(self, path: Path | None = None) -> None:
        found = path or shutil.which("nvcc")
        if found is None or not Path(found).is_file():
            raise CompileError(
                "There is no nvcc.",
                found=str(path) if path else "none on PATH",
                expected="nvcc of CUDA 12.8 or newer",
                fix="install the CUDA toolkit, or compile with NVRTC: --compiler nvrtc",
            )
        self._path = str(found)
        said = subprocess.run([self._path, "--version"], capture_output=True, text=True, check=True)
        self._version = " ".join(said.stdout.split())

    @property
    def version(self) -> str:
        """What `nvcc --version` prints."""
        return self._version

    def compile(self, source: Source, target: Target) -> Binary:
        """Runs nvcc once. The 'a' of an architecture needs the long form of its option."""
        real = target.arch.replace("sm_", "compute_")
        ptx = target.is_ptx
        kind = [f"-arch={real}", "-ptx"] if ptx else [f"-gencode=arch={real},code={target.arch}"]
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            command = [self._path, *FLAGS, *kind, "-Xptxas", "-v", *([] if ptx else ["-cubin"])]
            command += [*(f"-I{folder}" for folder in source.folders[1:])]
            command += [*(f"-D{d}" for d in source.defines), str(source.main), "-o", str(out)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise _refused("nvcc", done.stderr, source, target)
            code = out.read_bytes()
        return Binary(target, code + b"\0" if ptx else code, "" if ptx else done.stderr)


class Nvrtc:
    """The run-time compiler, from the wheels `cuda-bindings` and `nvidia-cuda-nvrtc`.

    Raises:
        CompileError: They are not installed.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import nvrtc

            status, major, minor = nvrtc.nvrtcVersion()
        except (ImportError, RuntimeError) as error:  # pathfinder's errors are RuntimeErrors
            raise CompileError(
                "NVRTC is not installed.",
                found=str(error).splitlines()[0],
                expected="the packages cuda-bindings and nvidia-cuda-nvrtc",
                fix="pip install 'vlmforge[tensorrt]', or compile with nvcc: --compiler nvcc",
            ) from error
        self._nvrtc = nvrtc
        self._version = f"nvrtc {major}.{minor} {status.name}"

    @property
    def version(self) -> str:
        """As NVRTC gives it."""
        return self._version

    def compile(self, source: Source, target: Target) -> Binary:
        """Compiles in this process; needs neither driver nor GPU, also for PTX."""
        nvrtc = self._nvrtc
        ptx = target.is_ptx
        text, name = source.main.read_bytes(), source.main.name
        _, program = nvrtc.nvrtcCreateProgram(text, name.encode(), 0, [], [])
        options = [*FLAGS, f"--gpu-architecture={target.arch}"]
        options += [f"--include-path={folder}" for folder in source.folders]
        options += [] if ptx else ["--ptxas-options=-v"]
        options += [f"-D{define}" for define in source.defines]
        (status,) = nvrtc.nvrtcCompileProgram(
            program, len(options), [option.encode() for option in options]
        )
        log = bytearray(nvrtc.nvrtcGetProgramLogSize(program)[1])
        nvrtc.nvrtcGetProgramLog(program, log)
        words = log.decode(errors="replace").rstrip("\0")
        try:
            if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
                raise _refused("NVRTC", words, source, target)
            size_of = nvrtc.nvrtcGetPTXSize if ptx else nvrtc.nvrtcGetCUBINSize
            code = bytearray(size_of(program)[1])
            (nvrtc.nvrtcGetPTX if ptx else nvrtc.nvrtcGetCUBIN)(program, code)
        finally:
            nvrtc.nvrtcDestroyProgram(program)
        return Binary(target, bytes(code), words)


def _refused(compiler: str, words: str, source: Source, target: Target) -> CompileError:
    return CompileError(
        f"{compiler} refused the kernels of {source.main.name}.",
        found=words.strip()[-2000:],
        expected=f"{source.name} for {target.arch}",
        fix="use a compiler of CUDA 12.8 or newer; if it is, please report this",
    )


def compiler(name: str) -> Compiler:
    """By the name given on a command line: `nvrtc` or `nvcc`."""
    return Nvcc() if name == "nvcc" else Nvrtc()


def digest(source: Source, target: Target, version: str) -> str:
    """The cache's key: a hash of all that the result depends on."""
    state = hashlib.sha256()
    parts = [version, target.arch, *FLAGS, *source.defines]
    files = (path.name.encode() + path.read_bytes() for path in source.files)
    for part in [*(p.encode() for p in parts), *files]:
        state.update(len(part).to_bytes(8, "little") + part)
    return state.hexdigest()


def compile_one(config: Config, target: Target, by: Compiler, cache: Path | None = None) -> Binary:
    """One binary, from the cache if it is there.

    Raises:
        UnsupportedError: There are no kernels for `config`, or `target` cannot run it.
        CompileError: The compiler refused.
    """
    config.check()
    config.check_target(target)
    return compile_source(source_of(sizes(config, target)), target, by, cache)


def compile_source(
    source: Source, target: Target, by: Compiler, cache: Path | None = None
) -> Binary:
    """One binary, from the cache if it is there (CompileError: the compiler refused)."""
    if cache is None:
        return by.compile(source, target)
    kept = cache / f"{source.name}.{target.name}.{digest(source, target, by.version)[:32]}"
    if kept.is_dir():
        return Binary(target, (kept / "code").read_bytes(), (kept / "log").read_text("utf-8"))
    binary = by.compile(source, target)
    _keep(binary, kept)
    return binary


def _keep(binary: Binary, folder: Path) -> None:
    """Writes beside, then renames: two builds at once both end with a whole entry."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".new-"))
    (beside / "code").write_bytes(binary.code)
    (beside / "log").write_text(binary.log, "utf-8")
    try:
        beside.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(beside)


def compile_set(config: Config, by: Compiler, cache: Path | None = None) -> tuple[Binary, ...]:
    """A cubin for every kind of GPU that can run `config`, then PTX for all others.

    Raises:
        UnsupportedError: There are no kernels for it.
        CompileError: The compiler refused.
    """
    wanted = (*targets(config), PTX_TARGETS[config.fp8])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return tuple(pool.map(lambda target: compile_one(config, target, by, cache), wanted))


@dataclass(frozen=True)
class KernelReport:
    """What the assembler said of one kernel."""

    kernel: str
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int


_REPORT = re.compile(
    r"Function properties for (?P<kernel>vf_\w+)\s+"
    r"(?:ptxas[ .]*)?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\s+"
    r"ptxas info\s*:\s*Used (?P<registers>\d+) registers"
)


def reports(log: str) -> tuple[KernelReport, ...]:
    """The report of `ptxas -v`, kernel by kernel."""
    return tuple(
        KernelReport(m["kernel"], *(int(m[k]) for k in ("registers", "stack", "stores", "loads")))
        for m in _REPORT.finditer(log)
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="compile the attention kernels")
    parser.add_argument("--out", type=Path, required=True, help="folder for the cubins and PTX")
    parser.add_argument("--compiler", choices=("nvrtc", "nvcc"), default="nvrtc")
    parser.add_argument(
        "--config", action="append", help="only this one, e.g. d128_float16_float16"
    )
    parser.add_argument("--cache", type=Path, help="folder of earlier results")
    options = parser.parse_args(arguments)
    by = compiler(options.compiler)
    options.out.mkdir(parents=True, exist_ok=True)
    for config in configs():
        if options.config and config.name not in options.config:
            continue
        for binary in compile_set(config, by, options.cache):
            suffix = "ptx" if binary.target.name == "ptx" else f"{binary.target.name}.cubin"
            (options.out / f"{config.name}.{suffix}").write_bytes(binary.code)
            used = ", ".join(
                f"{r.kernel} {r.registers} regs"
                + (f" ({r.spill_store_bytes} B spilled)" if r.spill_store_bytes else "")
                for r in reports(binary.log)
            )
            print(f"{config.name:36} {binary.target.name:7} {len(binary.code):7} B  {used}")


if __name__ == "__main__":
    main()
