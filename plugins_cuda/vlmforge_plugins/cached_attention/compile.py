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
class Binary:
    """Compiled kernels of one configuration.

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

    def compile(self, sizes: Sizes, target: Target) -> Binary:
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

    def compile(self, sizes: Sizes, target: Target) -> Binary:
        """Runs nvcc once. The 'a' of an architecture needs the long form of its option."""
        real = target.arch.replace("sm_", "compute_")
        ptx = target.arch.startswith("compute_")
        kind = [f"-arch={real}", "-ptx"] if ptx else [f"-gencode=arch={real},code={target.arch}"]
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            command = [self._path, *FLAGS, *kind, "-Xptxas", "-v", *([] if ptx else ["-cubin"])]
            command += [*(f"-D{d}" for d in sizes.defines), str(SOURCES / MAIN), "-o", str(out)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise _refused("nvcc", done.stderr, sizes, target)
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

    def compile(self, sizes: Sizes, target: Target) -> Binary:
        """Compiles in this process; needs neither driver nor GPU, also for PTX."""
        nvrtc = self._nvrtc
        ptx = target.arch.startswith("compute_")
        source = (SOURCES / MAIN).read_bytes()
        _, program = nvrtc.nvrtcCreateProgram(source, MAIN.encode(), 0, [], [])
        options = [*FLAGS, f"--gpu-architecture={target.arch}", f"--include-path={SOURCES}"]
        options += [] if ptx else ["--ptxas-options=-v"]
        options += [f"-D{define}" for define in sizes.defines]
        (status,) = nvrtc.nvrtcCompileProgram(
            program, len(options), [option.encode() for option in options]
        )
        log = bytearray(nvrtc.nvrtcGetProgramLogSize(program)[1])
        nvrtc.nvrtcGetProgramLog(program, log)
        text = log.decode(errors="replace").rstrip("\0")
        try:
            if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
                raise _refused("NVRTC", text, sizes, target)
            size_of = nvrtc.nvrtcGetPTXSize if ptx else nvrtc.nvrtcGetCUBINSize
            code = bytearray(size_of(program)[1])
            (nvrtc.nvrtcGetPTX if ptx else nvrtc.nvrtcGetCUBIN)(program, code)
        finally:
            nvrtc.nvrtcDestroyProgram(program)
        return Binary(target, bytes(code), text)


def _refused(compiler: str, words: str, sizes: Sizes, target: Target) -> CompileError:
    return CompileError(
        f"{compiler} refused the attention kernels.",
        found=words.strip()[-2000:],
        expected=f"{sizes.config.name} for {target.arch}",
        fix="use a compiler of CUDA 12.8 or newer; if it is, please report this",
    )


def compiler(name: str) -> Compiler:
    """By the name given on a command line: `nvrtc` or `nvcc`."""
    return Nvcc() if name == "nvcc" else Nvrtc()


def digest(sizes: Sizes, target: Target, version: str) -> str:
    """The cache's key: a hash of all that the result depends on."""
    state = hashlib.sha256()
    parts = [version, target.arch, *FLAGS, *sizes.defines]
    files = [path for path in sorted(SOURCES.iterdir()) if path.suffix in (".cu", ".cuh", ".h")]
    for part in [*(p.encode() for p in parts), *(p.name.encode() + p.read_bytes() for p in files)]:
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
    chosen = sizes(config, target)
    if cache is None:
        return by.compile(chosen, target)
    kept = cache / f"{config.name}.{target.name}.{digest(chosen, target, by.version)[:32]}"
    if kept.is_dir():
        return Binary(target, (kept / "code").read_bytes(), (kept / "log").read_text("utf-8"))
    binary = by.compile(chosen, target)
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
