"""The kernels through the real compiler: no spills, tensor cores in the machine code, the cache."""

from __future__ import annotations

import functools
import re
import subprocess
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path

import pytest

from named_kernels import Named, named
from vlmforge_plugins.cached_attention import compile as compiling
from vlmforge_plugins.cached_attention.compile import (
    Binary,
    Nvcc,
    Nvrtc,
    Source,
    compile_one,
    compile_set,
    compiler,
    digest,
    reports,
    source_of,
)
from vlmforge_plugins.cached_attention.config import (
    HEAD_SIZES,
    PTX_TARGETS,
    TARGETS,
    Config,
    Target,
    configs,
    sizes,
    targets,
)
from vlmforge_plugins.errors import CompileError, UnsupportedError

KERNELS = {"vf_write", "vf_decode", "vf_decode_narrow", "vf_combine", "vf_prefill"}
CONFIG = Config(128, "float16", "float16")
TARGET = {target.name: target for target in TARGETS}
SHIPPED = [(config, target) for config in configs() for target in targets(config)]
F16, BF16, FP8 = "float16", "bfloat16", "float8_e4m3fn"
CARRIED = Config(32, F16, F16)  # by engines that other tests build, compiled for Hopper
# On Hopper a producer feeds the others. Its code is of a size and of how the cache is stored; what
# fp8 is widened to takes turns.
PRODUCERS = [
    Config(head_size, *types)
    for types in ((F16, F16), (BF16, BF16), (F16, FP8), (BF16, FP8))
    for head_size in HEAD_SIZES
    if head_size >= 64
]
# Each size once, and each way to store; most are disassembled for what they are made of, too.
QUICK_PRODUCERS = [
    Config(64, F16, F16),
    Config(80, BF16, FP8),
    Config(96, F16, FP8),
    Config(104, BF16, BF16),
    CONFIG,
]
# On all others: each GPU and each type, the smallest and the largest size, most compiled by other
# tests too. The other sizes and pairs are for nightly runs.
OTHERS = [
    (Config(32, F16, F16), "sm_86"),
    (Config(32, BF16, FP8), "sm_120"),
    (Config(64, BF16, BF16), "sm_80"),
    (Config(80, F16, FP8), "sm_89"),
    (CONFIG, "sm_80"),
]
QUICK = [
    *((config, TARGET["sm_90"]) for config in QUICK_PRODUCERS),
    *((config, TARGET[name]) for config, name in OTHERS),
]


@pytest.fixture(scope="session")
def nvrtc() -> Nvrtc:
    return Nvrtc()


@pytest.fixture(scope="session")
def cache(shared: Path) -> Path:
    """Where builds keep what they compile, too."""
    return shared / "cache" / "kernels"


def _check_report(config: Config, target: Target, nvrtc: Nvrtc, cache: Path) -> None:
    binary = compile_one(config, target, nvrtc, cache)
    assert binary.code[:4] == b"\x7fELF"
    found = {report.kernel: report for report in reports(binary.log)}
    assert set(found) == KERNELS
    for report in found.values():
        assert report.spill_store_bytes == report.spill_load_bytes == report.stack_bytes == 0
        assert "C7508" not in binary.log  # setmaxnreg ignored
    limit = sizes(config, target).decode_registers
    assert found["vf_decode"].registers <= limit, "plans count on fewer registers"
    narrow = sizes(config, target).narrow.decode_registers
    assert found["vf_decode_narrow"].registers <= narrow, "plans count on fewer registers"
    assert max(sizes(config, target).decode_bytes, sizes(config, target).prefill_bytes) <= (
        target.shared_bytes
    )


@pytest.mark.parametrize(("config", "target"), QUICK, ids=lambda x: x.name)
def test_nothing_spills(config: Config, target: Target, nvrtc: Nvrtc, cache: Path) -> None:
    _check_report(config, target, nvrtc, cache)


@pytest.mark.nightly
@pytest.mark.parametrize(("config", "target"), SHIPPED, ids=lambda x: x.name)
def test_nothing_spills_anywhere(config: Config, target: Target, nvrtc: Nvrtc, cache: Path) -> None:
    _check_report(config, target, nvrtc, cache)


MachineCode = Callable[[Config, str], dict[str, str]]


@pytest.fixture(scope="module")
def machine_code(
    nvrtc: Nvrtc, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> MachineCode:
    """SASS by kernel, of a configuration on a target."""
    folder = tmp_path_factory.mktemp("sass")

    @functools.cache
    def of(config: Config, target: str) -> dict[str, str]:
        return disassembled(compile_one(config, TARGET[target], nvrtc, cache), folder)

    return of


def disassembled(binary: Binary, folder: Path) -> dict[str, str]:
    """SASS by kernel, from nvdisasm's wheel."""
    files = distribution("nvidia-cuda-nvdisasm").files or []
    program = next(Path(str(f.locate())) for f in files if f.name.startswith("nvdisasm"))
    cubin = folder / "kernels.cubin"
    cubin.write_bytes(binary.code)
    done = subprocess.run(
        [str(program), "-c", str(cubin)], capture_output=True, text=True, check=True
    )
    parts = re.split(r"^\s*\.section\s+\.text\.(vf_\w+)", done.stdout, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize(
    ("config", "target", "instruction"),
    [
        (CONFIG, "sm_80", "HMMA.16816.F32"),
        (Config(80, BF16, FP8), "sm_90", "HGMMA.64x80x16.F32.BF16"),
        pytest.param(
            *(Config(80, BF16, BF16), "sm_90", "HGMMA.64x80x16.F32.BF16"),
            marks=pytest.mark.nightly,
        ),
        (Config(104, BF16, BF16), "sm_90", "HGMMA.64x104x16.F32.BF16"),
        (CONFIG, "sm_90", "HGMMA.64x128x16.F32"),
        (Config(64, F16, F16), "sm_90", "HGMMA.64x"),
        pytest.param(Config(64, BF16, BF16), "sm_90", "HGMMA.64x", marks=pytest.mark.nightly),
        (Config(32, BF16, FP8), "sm_120", "HMMA.16816.F32"),
        pytest.param(
            *(Config(128, F16, FP8), "sm_120", "HMMA.16816.F32"), marks=pytest.mark.nightly
        ),
    ],
    ids=str,
)
def test_prefill_runs_on_tensor_cores(
    config: Config, target: str, instruction: str, machine_code: MachineCode
) -> None:
    code = machine_code(config, target)
    assert set(code) == KERNELS
    assert instruction in code["vf_prefill"]
    assert "HMMA.16816" in code["vf_decode"]
    # Copies past the registers: of 16 bytes each, or of a strip.
    assert re.search(r"\b(LDGSTS|UBLKCP)\b", code["vf_decode"])
    for kernel in KERNELS:
        assert not re.search(r"\b(LDL|STL)\b", code[kernel]), "local memory"


def test_only_what_overlaps_waits_for_the_kernel_in_front(machine_code: MachineCode) -> None:
    """A wait that is left out would be a race; GPUs before Hopper have no such instruction."""
    for config, target in ((CONFIG, "sm_80"), (CONFIG, "sm_90"), (Config(32, BF16, FP8), "sm_120")):
        code = machine_code(config, target)
        waiting = {kernel for kernel in KERNELS if "ACQBULK" in code[kernel]}
        starting = {kernel for kernel in KERNELS if "PREEXIT" in code[kernel]}
        early = {"vf_write", "vf_decode", "vf_decode_narrow"} if target != "sm_80" else set()
        early |= {"vf_prefill"} if target == "sm_90" else set()
        assert waiting == starting == early


def test_softmax_overlaps_the_products(machine_code: MachineCode) -> None:
    """The assembler is free to wait for the output before the softmax; then nothing overlaps."""
    code = machine_code(CONFIG, "sm_90")
    waits = re.split(r"WARPGROUP\.DEPBAR\.LE gsb0, ", code["vf_prefill"])
    (between,) = (part for part in waits[1:] if part.startswith("0x1"))
    assert between.count("MUFU.EX2") >= 64


def test_bulk_copies_are_issued_once(machine_code: MachineCode) -> None:
    """Not in a loop over the lanes that may have come: it cost Hopper's prefill 8 %."""
    code = machine_code(CONFIG, "sm_90")
    assert "UTMALDG" in code["vf_prefill"] and "UBLKCP" in code["vf_decode"]
    assert not any("BRA.U.ANY" in code[kernel] for kernel in KERNELS)


def reached(code: str, start: str) -> str:
    """The instructions that can run after the one that contains `start`."""
    lines = [line for line in code.splitlines() if re.search(r"/\*[0-9a-f]{4,}\*/|^\.L_\w+:", line)]
    labels = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    (first,) = (i for i, line in enumerate(lines) if start in line)
    seen: set[int] = set()
    ahead = [first + 1]
    while ahead:
        at = ahead.pop()
        if at in seen:
            continue
        seen.add(at)
        ahead += [labels[name] for name in re.findall(r"`\((\.L_\w+)\)", lines[at])]
        ends = re.search(r"\*/\s+(BRA|EXIT|RET)\b", lines[at])  # always: nothing before it
        if not ends:
            ahead.append(at + 1)
    return "\n".join(lines[at] for at in sorted(seen))


@pytest.mark.parametrize(
    "config",
    [pytest.param(c, marks=() if c in QUICK_PRODUCERS else pytest.mark.nightly) for c in PRODUCERS],
    ids=lambda x: x.name,
)
def test_the_producer_keeps_to_its_registers(config: Config, machine_code: MachineCode) -> None:
    """It gave all but 56 away, as did who widens fp8. The assembler's figure does not show this.

    Nor may a descriptor of memory, 64 bits, start at an odd register: an illegal instruction, met
    when copies carried a cache policy.
    """
    code = machine_code(config, "sm_90")
    producer = reached(code["vf_prefill"], "USETMAXREG.DEALLOC.CTAPOOL 0x38")
    assert "HGMMA" not in producer
    assert max(int(n) for n in re.findall(r"\bR(\d+)\b", producer)) < 56
    assert ("UBLKCP" if config.fp8 else "UTMALDG") in producer
    for kernel in KERNELS:
        assert all(int(n) % 2 == 0 for n in re.findall(r"desc\[UR(\d+)\]", code[kernel]))


@pytest.mark.parametrize("fp8", [False, True])
def test_ptx_for_all_other_gpus(fp8: bool, nvrtc: Nvrtc, cache: Path) -> None:
    config = Config(32, BF16, FP8) if fp8 else CARRIED
    code = compile_one(config, PTX_TARGETS[fp8], nvrtc, cache).code
    assert code.endswith(b"\0")
    assert f".target sm_{89 if fp8 else 80}".encode() in code
    assert all(f".entry {kernel}(".encode() in code for kernel in KERNELS)


def test_a_set_has_a_cubin_for_every_gpu_and_ptx() -> None:
    binaries = compile_set(CARRIED, Named())
    for binary in binaries:
        assert binary.code == named(source_of(sizes(CARRIED, binary.target)), binary.target)
    names = [binary.target.name for binary in binaries]
    assert names == ["sm_80", "sm_86", "sm_89", "sm_90", "sm_120", "ptx"]
    fp8 = Config(64, "float16", "float8_e4m3fn")
    assert [target.name for target in targets(fp8)] == ["sm_89", "sm_90", "sm_120"]


class Counting:
    """A compiler that counts."""

    version = "counting 1"

    def __init__(self) -> None:
        self.calls = 0

    def compile(self, source: Source, target: Target) -> Binary:
        self.calls += 1
        return Binary(target, b"code \0\xff", "log é")


def test_results_are_kept(tmp_path: Path) -> None:
    by = Counting()
    first = compile_one(CONFIG, TARGET["sm_80"], by, tmp_path)
    assert compile_one(CONFIG, TARGET["sm_80"], by, tmp_path) == first
    assert by.calls == 1
    compile_one(CONFIG, TARGET["sm_89"], by, tmp_path)
    assert by.calls == 2
    by.version = "counting 2"
    compile_one(CONFIG, TARGET["sm_80"], by, tmp_path)
    assert by.calls == 3
    assert not list(tmp_path.glob(".new-*"))


def test_the_key_is_all_that_goes_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chosen = source_of(sizes(CONFIG, TARGET["sm_80"]))
    narrow = Config(64, "float16", "float16")
    keys = {
        digest(chosen, TARGET["sm_80"], "1"),
        digest(chosen, TARGET["sm_80"], "2"),
        digest(chosen, TARGET["sm_86"], "1"),
        digest(source_of(sizes(narrow, TARGET["sm_80"])), TARGET["sm_80"], "1"),
    }
    for path in compiling.SOURCES.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with (tmp_path / "params.h").open("a") as file:
        file.write("//\n")
    monkeypatch.setattr(compiling, "SOURCES", tmp_path)
    keys.add(digest(source_of(sizes(CONFIG, TARGET["sm_80"])), TARGET["sm_80"], "1"))
    assert len(keys) == 5


def test_another_build_may_finish_first(tmp_path: Path) -> None:
    kept = tmp_path / "entry"
    compiling._keep(Binary(TARGET["sm_80"], b"1", ""), kept)
    compiling._keep(Binary(TARGET["sm_80"], b"1", ""), kept)
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]


def test_a_refusal_has_the_compilers_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nvrtc: Nvrtc
) -> None:
    (tmp_path / compiling.MAIN).write_text("this is no program")
    monkeypatch.setattr(compiling, "SOURCES", tmp_path)
    with pytest.raises(CompileError) as caught:
        compile_one(CONFIG, TARGET["sm_80"], nvrtc)
    assert caught.value.summary == "NVRTC refused the kernels of cached_attention.cu."
    assert "error: expected a declaration" in caught.value.found
    assert caught.value.expected == "d128_float16_float16 for sm_80"


def test_an_unsupported_configuration_is_never_compiled() -> None:
    by = Counting()
    with pytest.raises(UnsupportedError, match="head size"):
        compile_one(Config(72, "float16", "float16"), TARGET["sm_80"], by)
    with pytest.raises(UnsupportedError, match="fp8"):
        compile_one(Config(64, "float16", "float8_e4m3fn"), TARGET["sm_86"], by)
    assert by.calls == 0


def test_without_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompileError) as caught:
        compiler("nvcc")
    assert caught.value.found == "none on PATH"
    assert "--compiler nvrtc" in caught.value.fix
    with pytest.raises(CompileError) as caught:
        Nvcc(tmp_path / "nvcc")
    assert caught.value.found == str(tmp_path / "nvcc")


def test_without_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings.nvrtc", None)
    monkeypatch.delattr("cuda.bindings.nvrtc", raising=False)
    with pytest.raises(CompileError, match="NVRTC is not installed") as caught:
        compiler("nvrtc")
    assert "pip install" in caught.value.fix


FAKE_NVCC = """#!/bin/sh
if [ "$1" = --version ]; then echo "fake nvcc 1"; exit 0; fi
if [ -n "$FAIL" ]; then echo "error: no" >&2; exit 1; fi
while [ $# -gt 1 ]; do if [ "$1" = -o ]; then echo "cubin $*" > "$2"; fi; shift; done
echo "$@" >&2
"""


def test_nvcc_is_told_what_nvrtc_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvcc"
    program.write_text(FAKE_NVCC)
    program.chmod(0o755)
    by = Nvcc(program)
    assert by.version == "fake nvcc 1"
    assert by.compile(source_of(sizes(CONFIG, TARGET["sm_90"])), TARGET["sm_90"]).code.startswith(
        b"cubin -o"
    )
    ptx = by.compile(source_of(sizes(CONFIG, PTX_TARGETS[False])), PTX_TARGETS[False])
    assert ptx.code.endswith(b"\0")
    monkeypatch.setenv("FAIL", "1")
    with pytest.raises(CompileError, match="nvcc refused") as caught:
        by.compile(source_of(sizes(CONFIG, TARGET["sm_90"])), TARGET["sm_90"])
    assert caught.value.found == "error: no"


def test_the_command_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    nvrtc: Nvrtc,
    cache: Path,
) -> None:
    by = Named(log=compile_one(CARRIED, TARGET["sm_90"], nvrtc, cache).log)
    asked: list[str] = []
    monkeypatch.setattr(compiling, "compiler", lambda name: asked.append(name) or by)
    own, out = tmp_path / "cache", tmp_path / "out"
    compiling.main(["--out", str(out), "--config", CARRIED.name, "--cache", str(own)])
    assert asked == ["nvrtc"] and len(list(own.iterdir())) == 6
    names = {path.name for path in out.iterdir()}
    assert names == {f"{CARRIED.name}.{t.name}.cubin" for t in TARGETS} | {f"{CARRIED.name}.ptx"}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert re.search(r"sm_90 .* vf_prefill \d+ regs", "\n".join(lines))
    assert "spilled" not in "\n".join(lines)
