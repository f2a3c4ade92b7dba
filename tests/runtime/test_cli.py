"""The commands `vlmforge inspect | verify | doctor | chat`."""

from __future__ import annotations

import importlib.metadata
import io
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from conftest import IMAGES
from vlmforge.backends.cuda import machine
from vlmforge.cli import doctor, main
from vlmforge.engine.bundle import open_bundle
from vlmforge.engine.manifest import load_manifest
from vlmforge.evaluation.verify import STAGES

PHOTO = IMAGES / "photo_640x480.png"
# A machine without what a build needs: importing any of it raises.
_BARE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "onnx", "transformers", "safetensors", "sentencepiece"}:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
from vlmforge.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("installed", "cuda", "mended"),
    [
        (("onnxruntime",), False, False),
        (("onnxruntime-gpu",), True, False),
        (("onnxruntime", "onnxruntime-gpu"), True, False),
        (("onnxruntime", "onnxruntime-gpu"), False, True),  # the one for processors came last
    ],
    ids=str,
)
def test_doctor_says_which_onnxruntime_there_is(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    installed: tuple[str, ...],
    cuda: bool,
    mended: bool,
) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name.startswith("onnxruntime") and name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return "9.9" if name in installed else real(name)

    providers = [*(["CUDAExecutionProvider"] if cuda else []), "CPUExecutionProvider"]
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr("vlmforge.ort.ort.get_available_providers", lambda: providers)
    assert main(["doctor"]) == int(mended)
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.strip().startswith("onnxruntime"))
    assert " and ".join(f"{name} 9.9" for name in installed) in row
    assert ("CUDA" in row.partition("->")[0]) == cuda
    assert ("pip uninstall -y onnxruntime onnxruntime-gpu" in row) == mended


@pytest.fixture
def copied(hf_engine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(hf_engine, tmp_path / "engine"))


def test_inspect(hf_engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(hf_engine), "--batch", "2", "--context", "500"]) == 0
    out = capsys.readouterr().out
    manifest = load_manifest(hf_engine)
    for words in (
        "LlavaForConditionalGeneration",
        "pixel_values: float32 [images, 3, 168, 168]",
        "input_ids: int64 [batch, tokens]",
        "logits: float32 [batch, outputs, 704]",
        "4 key/value caches",
        "center_crop to 168x168",
        "144 tokens an image",
        "'USER: <image>\\nWhat is shown in this picture? ASSISTANT:'",
        "1024 tokens a sequence",
    ):
        assert words in out, words
    # Two layers, keys and values, four heads of 32 floats.
    assert manifest.kv.bytes_per_token == 2 * 2 * 4 * 32 * 4
    assert f"{2 * 500 * manifest.kv.bytes_per_token / 1e6:.1f} MB key/value cache" in out
    for entry in manifest.files:
        assert entry.path in out


@pytest.mark.parametrize("engine", ["hf_engine", "original_engine"])
def test_verify_without_what_a_build_needs(engine: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(engine)
    command = [sys.executable, "-c", _BARE, "verify", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ok  ") == 3 * len(STAGES)
    assert "gives here what it gave when it was built" in done.stdout


@pytest.mark.parametrize("stage", STAGES)
def test_verify_names_the_first_stage_that_diverges(
    stage: str, copied: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied / "goldens/image.npz"
    values = dict(np.load(path))
    for later in STAGES[STAGES.index(stage) :]:
        values[later] = values[later] + values[later].dtype.type(1)
    np.savez_compressed(path, **values)
    # As if the engine had been built so: its hashes are not what is tested here.
    monkeypatch.setattr("vlmforge.cli.verify.check_hashes", lambda bundle: None)
    monkeypatch.setattr("vlmforge.evaluation.verify.open_bundle", lambda folder: _unchecked(folder))
    assert main(["verify", str(copied)]) == 1
    out = capsys.readouterr().out
    assert f"first stage that diverges is {stage!r}, in the golden 'image'" in out


def _unchecked(folder: Path) -> object:
    from vlmforge.engine.bundle import Bundle

    return Bundle(folder, load_manifest(folder))


def test_verify_refuses_an_altered_file(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_bundle(copied)
    path = copied / "decoder.rank0.data"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    assert main(["verify", str(copied)]) == 1
    error = capsys.readouterr().err
    assert "EngineIntegrityError" in error
    assert "decoder.rank0.data" in error


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "ready: onnxruntime" in out
    assert "missing" not in out
    real = importlib.metadata.version

    def without(name: str) -> str:
        if name in ("pillow", "torch"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "missing  ->  pip install vlmforge\n" in out
    assert "missing  ->  pip install 'vlmforge[build]'" in out


def test_doctor_calls_ready_what_can_run_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_gpu() -> machine.FoundGpu:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(machine, "find_gpu", no_gpu)
    assert main(["doctor"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    version = importlib.metadata.version("tensorrt-rtx")
    assert f"cannot run here (tensorrt_rtx {version}): no GPU" in rows["tensorrt_rtx"]
    assert "libcuda.so.1" in rows["tensorrt_rtx"]
    assert "--target onnxruntime" in rows["tensorrt_rtx"]
    assert "no module tensorrt" in rows["tensorrt"]
    assert "ready" not in rows["tensorrt_rtx"] + rows["tensorrt"]
    hopper = machine.FoundGpu("a GPU", 90, 13000, 1 << 34, 1 << 35)
    monkeypatch.setattr(machine, "find_gpu", lambda: hopper)
    assert main(["doctor"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "compute capability 9.0" in rows["tensorrt_rtx"]
    assert "ready" not in rows["tensorrt_rtx"]


@pytest.fixture
def talk(
    hf_engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[object]:
    def run(*lines: str) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert main(["chat", str(hf_engine), "--max-new-tokens", "6"]) == 0
        return capsys.readouterr().out

    return run


def test_chat(talk) -> None:
    out = talk(
        "/help",
        f"/image {PHOTO}",
        "/images",
        "/render hello",
        "what is this?",
        "/stats",
        "/images",
        "and now?",
        "/reset",
        "/stats",
        "/exit",
        "never sent",
    )
    assert "/image PATH_OR_URL" in out
    assert f"attached {PHOTO} (640x480)" in out
    assert "'USER: <image>\\nhello ASSISTANT:'" in out
    assert "tokens in, " in out
    assert "prefill " in out
    assert out.count("no images attached") == 1
    assert "forgotten" in out
    assert "no answer yet" in out
    assert "(stopped at the length limit)" in out


def test_chat_survives_mistakes_and_ends_with_the_input(talk) -> None:
    out = talk("/image no/such.png", "/dance", "/image", "", "hi")
    assert "ImageError" in out
    assert "no/such.png" in out
    assert "unknown command /dance" in out
    assert "which?" in out
    assert out.rstrip().endswith("(stopped at the length limit)")


def test_errors_are_words_and_a_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("inspect", "verify", "chat"):
        assert main([command, str(tmp_path)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("vlmforge: ")
        assert "found:" in error
        assert "build-engine CHECKPOINT" in error


@pytest.mark.parametrize("library", ["msgspec", "numpy"])
def test_a_missing_library_is_named(library: str) -> None:
    program = (
        f"import sys; sys.modules['{library}'] = None\n"
        "from vlmforge.cli import main; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", program, "doctor"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "vlmforge: BackendUnavailableError: A library is missing that vlmforge needs.",
        f"  found:    no module {library}",
        "  expected: all that vlmforge depends on",
        "  fix:      pip install --force-reinstall vlmforge",
    ]


def test_help_says_what_16_bits_mean() -> None:
    command = [sys.executable, "-m", "vlmforge_builder", "--help"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "arithmetic is float32 there in any case" in " ".join(out.split())


def test_doctor_knows_all_that_is_installed() -> None:
    with (Path(__file__).parents[2] / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]

    def names(requirements: list[str]) -> list[str]:
        found = [re.split(r"[>=<[; ]", requirement)[0] for requirement in requirements]
        return sorted(name.lower().replace("_", "-") for name in found)

    assert names(list(doctor.RUNTIME)) == names(project["dependencies"])
    assert names(list(doctor.BUILD)) == names(project["optional-dependencies"]["build"])
