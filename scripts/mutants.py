"""Plant known faults in a copy of the repository, one at a time: does the suite notice each?

    python scripts/mutants.py [NAME ...]

Each fault is one that was made somewhere, or could be: a sign, a bound, a key that says too little.
The tests named with it must pass without it and fail with it. After a change to the suite itself,
faults that are noticed as before say that nothing was weakened. Add one for each test that is made
cheaper. Status 1 if a fault goes unnoticed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("runtime", "builder", "plugins_cuda", "recipes")
KERNELS = "plugins_cuda/vlmforge_plugins/cached_attention"


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in `file`; pytest with the arguments `tests` should notice."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = (
    Mutant(
        "a cached prompt leaves nothing to run",
        "runtime/vlmforge/kv/slots.py",
        "keys[:-1] if reuse else keys[:0]",
        "keys if reuse else keys[:0]",
        ("tests/runtime/kv/test_slots.py",),
    ),
    Mutant(
        "answers part from their prompt when the first of them may have ended",
        "runtime/vlmforge/scheduler/scheduler.py",
        "        self._place_forks()  # now: the parent may have ended with its first token\n",
        "",
        ("tests/runtime/scheduler/test_scheduler.py",),
    ),
    Mutant(
        "prefixes of another level are reused",
        "runtime/vlmforge/kv/slots.py",
        "common_prefix(slot.keys, keys) if slot.salt == salt else 0",
        "common_prefix(slot.keys, keys)",
        ("tests/runtime/kv/test_slots.py",),
    ),
    Mutant(
        "pictures of one colour and other sizes are the same",
        "runtime/vlmforge/vl/prepared.py",
        "content + rows.tobytes()",
        "content",
        ("tests/runtime/test_features.py",),
    ),
    Mutant(
        "images that come later fill more than the batch",
        "runtime/vlmforge/runner/features.py",
        "and 0 < len(image.pixel_values) <= spare",
        "",
        ("tests/runtime/test_features.py",),
    ),
    Mutant(
        "a resized edge is rounded instead of cut",
        "runtime/vlmforge/engine/images/center_crop.py",
        "return edge, int(edge * height / width)",
        "return edge, round(edge * height / width)",
        ("tests/runtime/test_images_preprocess.py",),
    ),
    Mutant(
        "a stop word that is kept loses its last token",
        "runtime/vlmforge/outputs/stopping.py",
        "return bisect_left(self._ends, self._passed) + 1\n",
        "return bisect_left(self._ends, self._passed)\n",
        ("tests/runtime/test_stopping.py",),
    ),
    Mutant(
        "top-p leaves out the token that reaches it",
        "runtime/vlmforge/outputs/drawing.py",
        "min(int(count) + 1, len(places))",
        "max(1, int(count))",
        ("tests/runtime/test_drawing.py",),
    ),
    Mutant(
        "a row of the cache that is copied over keeps the memory of what was there",
        "runtime/vlmforge/backends/dense.py",
        "row, used, kept = rows.row(place), rows.tokens(place), max(",
        "row, used, kept = rows.row(place), move.tokens, max(",
        ("tests/runtime/backends/test_placed_cache.py",),
    ),
    Mutant(
        "rows of the cache move for sequences that have left",
        "runtime/vlmforge/backends/rows.py",
        "        self._running.discard(slot)\n",
        "",
        ("tests/runtime/backends/test_rows.py",),
    ),
    Mutant(
        "the likeliest tokens are in the order of the cache's rows",
        "runtime/vlmforge/backends/onnxruntime.py",
        "ids[order] = likeliest_ids",
        "ids[:] = likeliest_ids",
        ("tests/e2e/test_decoder_steps.py",),
    ),
    Mutant(
        "a call that waits for room looks for it when an item ends only",
        "runtime/vlmforge/api/calls.py",
        "if event.last or self._wants_room:",
        "if event.last:",
        ("tests/runtime/test_iterators.py",),
    ),
    Mutant(
        "the reference of attention does not see the newest token",
        "builder/vlmforge_builder/ops/cached_attention.py",
        "visible = op.LessOrEqual(",
        "visible = op.Less(",
        ("tests/builder/test_cached_attention.py", "-k", "the_body_is"),
    ),
    Mutant(
        "the native mask does not see the newest token",
        "builder/vlmforge_builder/passes/native_attention.py",
        '"LessOrEqual", [keys, queries]',
        '"Less", [keys, queries]',
        ("tests/builder/test_native_attention.py",),
    ),
    Mutant(
        "quantised numbers are cut instead of rounded",
        "builder/vlmforge_builder/block_quantisation.py",
        "(grouped / scale.float()).round()",
        "(grouped / scale.float()).trunc()",
        ("tests/builder/test_block_quantisation.py",),
    ),
    Mutant(
        "holes between tensors are read over",
        "builder/vlmforge_builder/checkpoint/safetensors_file.py",
        "if tensor.offset != position:",
        "if tensor.offset < position:",
        ("tests/builder/test_checkpoint_safetensors.py",),
    ),
    Mutant(
        "a decoder's scores are scaled a little wrong",
        "builder/vlmforge_builder/blocks/decoder.py",
        "self.kv_heads, self.head_dim**-0.5",
        "self.kv_heads, self.head_dim**-0.51",
        ("tests/e2e/test_goldens.py", "-k", "greedy and yi_vl"),
    ),
    Mutant(
        "16-bit tables are gathered by a cast of them all",
        "builder/vlmforge_builder/passes/store_weights.py",
        "if node.op_type in _GATHERS and index == 0:",
        "if node.op_type in _GATHERS and index == 1:",
        ("tests/builder/test_cached_attention.py", "-k", "casts_come"),
    ),
    Mutant(
        "a plan cuts the keys otherwise than the kernels",
        f"{KERNELS}/plan.py",
        "return max(-(-even // 64) * 64, MIN_SPLIT_KEYS)",
        "return max(-(-even // 32) * 32, MIN_SPLIT_KEYS)",
        ("tests/plugins_cuda/test_kernels.py", "-k", "cut_as_planned"),
    ),
    Mutant(
        "Hopper's prefill takes the last tile before the diagonal for one behind it",
        f"{KERNELS}/kernels/prefill_hopper.cuh",
        "> at.past + at.first_row + thread_index() / 32 * 16) {",
        "> at.past + at.first_row + thread_index() / 32 * 16 + 15) {",
        ("tests/plugins_cuda/test_kernels.py", "-k", "prefill and len989"),
    ),
    Mutant(
        "the prefill of other GPUs takes it so too",
        f"{KERNELS}/kernels/prefill.cuh",
        "if ((i + 1) * kKeys - 1 > low) {",
        "if ((i + 1) * kKeys - 1 > high) {",
        ("tests/plugins_cuda/test_kernels.py", "-k", "prefill and len4097"),
    ),
    Mutant(
        "Hopper's producer gives away registers that it uses",
        f"{KERNELS}/kernels/prefill_hopper.cuh",
        "give_registers<56>()",
        "give_registers<40>()",
        ("tests/plugins_cuda/test_attention_compile.py", "-k", "producer and d128_float16"),
    ),
    Mutant(
        "a plan carries the kernels of one GPU only",
        "builder/vlmforge_builder/tensorrt/compiler.py",
        "register(trt, {config: binaries})",
        "register(trt, {config: binaries[:1]})",
        ("tests/builder/test_tensorrt_builds.py", "-k", "carries_its_kernels and qwen"),
    ),
    Mutant(
        "a checkpoint may ask for any number of positions",
        "builder/vlmforge_builder/checkpoint/limits.py",
        "POSITIONS = range(1, (1 << 24) + 1)",
        "POSITIONS = range(1, 1 << 62)",
        ("tests/recipes/test_numbers_of_configs.py", "-k", "llava_1_5_hf"),
    ),
    Mutant(
        "a build holds all weights that it has read",
        "builder/vlmforge_builder/checkpoint/mapped.py",
        "        return flat.as_strided(",
        "        mmap.held = [*getattr(mmap, 'held', ()), flat.clone()]\n"
        "        return flat.as_strided(",
        ("tests/builder/test_build.py", "-k", "weights_are_streamed"),
    ),
    Mutant(
        "reading a tensor copies it",
        "builder/vlmforge_builder/checkpoint/mapped.py",
        "return flat.as_strided(self.info.shape, self.stride)",
        "return flat.as_strided(self.info.shape, self.stride).clone()",
        ("tests/builder/test_checkpoint_store.py", "-k", "copies_nothing"),
    ),
    Mutant(
        "an interrupt that a library lost is forgotten",
        "builder/vlmforge_builder/progress.py",
        "        yield\n        if self._state.signal is not None:",
        "        yield\n        if self._state.signal is NotImplemented:",
        ("tests/builder/test_build_ends.py", "-k", "loses"),
    ),
    Mutant(
        "the paged reference writes a token too many",
        "builder/vlmforge_builder/ops/paged_attention.py",
        "there = op.Less(",
        "there = op.LessOrEqual(",
        ("tests/builder/test_paged_attention.py", "-k", "the_paged_body"),
    ),
    Mutant(
        "a build imports what lies where it is started",
        "runtime/vlmforge/engine/build_cache.py",
        '"-P", "-m", "vlmforge_builder"',
        '"-m", "vlmforge_builder"',
        ("tests/e2e/test_nothing_is_executed.py", "-k", "pipeline"),
    ),
)


def copy_of_the_repository(folder: Path) -> None:
    """What git knows or could, without what was made of it."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())


def passes(folder: Path, tests: Sequence[str]) -> bool:
    """Whether these tests of the copy pass; RuntimeError if pytest could not run them."""
    path = os.pathsep.join(str(folder / name) for name in PACKAGES)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *tests],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stdout + done.stderr)
    return done.returncode == 0


def judged(folder: Path, mutant: Mutant) -> str:
    """What the tests named with the fault say of it."""
    file = folder / mutant.file
    text = file.read_text("utf-8")
    if text.count(mutant.old) != 1:
        return "not there any more: give the fault its new place"
    if not passes(folder, mutant.tests):
        return "cannot be told: its tests fail without it"
    file.write_text(text.replace(mutant.old, mutant.new), "utf-8")
    try:
        return "UNNOTICED" if passes(folder, mutant.tests) else "noticed"
    finally:
        file.write_text(text, "utf-8")


def main(names: Sequence[str]) -> int:
    """The exit status: 0 if every chosen fault (all, without `names`) was noticed."""
    chosen = [m for m in MUTANTS if not names or any(name in m.name for name in names)]
    noticed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy_of_the_repository(Path(folder))
        for mutant in chosen:
            verdict = judged(Path(folder), mutant)
            noticed += verdict == "noticed"
            print(f"{verdict:10} {mutant.name} ({mutant.file})", flush=True)
    print(f"{noticed} of {len(chosen)} faults were noticed")
    return 0 if chosen and noticed == len(chosen) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
