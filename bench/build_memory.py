"""Build checkpoints and print the seconds and the peak memory of each build.

python bench/build_memory.py --size 7b --work out/bench
python bench/build_memory.py --model smolvlm2-2.2b --weights int4 --answer --work out/bench
python bench/build_memory.py --model qwen3-vl-2b --session-len 4096 --weights int4 --answer
python bench/build_memory.py --checkpoint tests/data/*/checkpoint --dtype float32 --work out/bench
python bench/build_memory.py --size 300m --target tensorrt_rtx --weights plain int8 int4 --work ...
python bench/build_memory.py --size 1b --tp 1 2 4 --work out/bench

With several numbers of ranks it prints for each what a rank holds, and what its build took: the
limit is a rank's share of the decoder, all that is not divided, and 0.3 GB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from drawn import MODELS, draw
from vlmforge.engine.manifest import load_manifest
from vlmforge_recipes.llava.synthetic import PRESETS, write_checkpoint


def main() -> None:
    """Make the checkpoint if it is not there, build it, print the figures of its last event."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--size", default="7b", choices=tuple(PRESETS))
    arguments.add_argument("--model", choices=tuple(MODELS), help="another family, drawn")
    arguments.add_argument("--answer", action="store_true", help="ask each engine something")
    arguments.add_argument("--work", type=Path, required=True)
    arguments.add_argument(
        "--checkpoint", type=Path, nargs="+", help="those that are there already"
    )
    arguments.add_argument("--dtype", default="float16")
    arguments.add_argument("--target", default="onnxruntime")
    arguments.add_argument("--session-len", help="tokens of a sequence; else what was trained")
    arguments.add_argument("--attention", help="of a GPU target: plugin or native")
    arguments.add_argument("--weights", nargs="+", default=["plain"], help="plain, int8 or int4")
    arguments.add_argument("--tp", nargs="+", type=int, default=[1], help="numbers of ranks")
    values = arguments.parse_args()
    values.work.mkdir(parents=True, exist_ok=True)
    options = ["--dtype", values.dtype, "--target", values.target]
    window = values.session_len or ("2048" if values.target != "onnxruntime" else None)
    options += ["--session-len", window] if window else []
    options += ["--attention", values.attention] if values.attention else []
    checkpoints = values.checkpoint
    if not checkpoints:
        checkpoints = [random_checkpoint(values.work, values.size, values.model)]
    for checkpoint in checkpoints:
        first = 0
        for kind in values.weights:
            chosen = [] if kind == "plain" else ["--weights", kind]
            for tp in values.tp:
                ranks = [] if tp == 1 else ["--tp", str(tp)]
                engine = build(checkpoint, values.work, [*options, *chosen, *ranks])
                size = decoder_size(engine)
                first = first or size
                share = size / first
                print(
                    f"{kind}, tp {tp}: the decoder takes {size / 1e6:.1f} MB, "
                    f"{share:.3f} of the first"
                )
                print_rank(engine)
                if values.answer:
                    script = Path(__file__).with_name("answer.py")
                    subprocess.run([sys.executable, script, engine], check=True)


def random_checkpoint(work: Path, size: str, model: str | None = None) -> Path:
    """The checkpoint of a preset, or of another family's model, written unless it is there."""
    folder = work / f"{model or size}.checkpoint"
    if folder.exists():
        return folder
    return write_checkpoint(folder, PRESETS[size]) if model is None else draw(folder, MODELS[model])


def decoder_size(engine: Path) -> int:
    """Bytes of the decoders of all ranks: their graphs or plans, and their data."""
    parts = [part for part in load_manifest(engine).parts if part.name != "vision"]
    names = {name for part in parts for name in (part.file, *part.data)}
    return sum((engine / name).stat().st_size for name in names)


def print_rank(engine: Path) -> None:
    """What one rank holds, as it is stored and as it is in memory."""
    manifest = load_manifest(engine)
    part, vision = manifest.part("decoder"), manifest.part("vision")
    print(
        f"a rank of {manifest.parallel.tp}: decoder {part.weight_bytes / 1e9:.3f} GB stored, "
        f"{part.loaded_bytes / 1e9:.3f} GB loaded; the first also vision "
        f"{vision.loaded_bytes / 1e9:.3f} GB loaded; {manifest.rank_kv.bytes_per_token} B a token",
        flush=True,
    )


def build(checkpoint: Path, work: Path, options: list[str]) -> Path:
    """Build one engine in a process of its own and print what it took; returns the engine."""
    name = checkpoint.parent.name if checkpoint.name == "checkpoint" else checkpoint.stem
    kinds = [value for value in options if not value.startswith("--")]
    engine, events = work / ".".join((name, *kinds, "engine")), work / "events.jsonl"
    events.unlink(missing_ok=True)
    program = Path(sys.executable).with_name("build-engine")
    command = [program, checkpoint, "-o", engine, "--force", *options]
    subprocess.run([*command, "--json-events", events], check=True)
    rows = [json.loads(line) for line in events.read_text("utf-8").splitlines()]
    files = [*checkpoint.rglob("*.safetensors"), *checkpoint.rglob("*.bin")]
    size = sum(path.stat().st_size for path in files)
    last = rows[-1]
    for row in rows:
        if row["event"] == "end":
            print(f"{row['stage']:24} {row['seconds']:8.1f} s")
        if "compiled by" in str(row.get("text")):
            print(row["text"])
    print(
        f"{name}: built in {last['elapsed_s']:.1f} s; "
        f"peak anonymous memory {last['peak_anonymous_bytes'] / 2**30:.2f} GiB "
        f"for a checkpoint of {size / 1e9:.3f} GB, "
        f"peak RSS with mapped files {last['peak_rss_bytes'] / 2**30:.2f} GiB",
        flush=True,
    )
    return engine


if __name__ == "__main__":
    main()
