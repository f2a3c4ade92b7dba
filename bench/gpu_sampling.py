"""Tokens chosen on a GPU: are they those that the host's sampler chooses, and what does it cost?

    python bench/gpu_sampling.py write GRAPHS           # where the builder is, without a GPU
    python3 bench/gpu_sampling.py check GRAPHS          # random logits, many settings; times
    python3 bench/gpu_sampling.py engine ENGINE ...     # every token of whole answers

`check` wants every node on the GPU. What `engine` compares is each step: its logits are fetched
too, and given to a copy of the request's sampler. Both end with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("runtime", "plugins_cuda", "builder", "recipes")]

from vlmforge import GenerationConfig, Pipeline, pipeline  # noqa: E402
from vlmforge.backends import cuda  # noqa: E402
from vlmforge.backends.choice import Choice, Picked  # noqa: E402
from vlmforge.backends.cuda import machine  # noqa: E402
from vlmforge.backends.cuda.choice_kernel import ChoiceKernel  # noqa: E402
from vlmforge.backends.cuda.choosing import TokenSampler  # noqa: E402
from vlmforge.backends.cuda.decoder import PagedDecoder  # noqa: E402
from vlmforge.backends.cuda.device import Device  # noqa: E402
from vlmforge.engine.chain import Segment  # noqa: E402
from vlmforge.engine.schema import from_json, to_json  # noqa: E402
from vlmforge.ort import ort  # noqa: E402
from vlmforge.outputs.sampling import SampledToken, Sampler, SamplingParams  # noqa: E402

_KERNELS = "kernels.json"
VOCABULARIES = (1000, 32000, 151936)
ROWS = (1, 8, 64)
SETTINGS = [
    SamplingParams(
        greedy=greedy,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=penalty,
        frequency_penalty=0.3 if penalty != 1 else 0.0,
        logprobs=logprobs,
        bad_words=((3,), (5, 6)) if penalty != 1 else (),
    )
    for greedy, temperature, top_k, top_p, min_p, penalty, logprobs in itertools.product(
        (False, True), (0.6, 1.0), (0, 40), (1.0, 0.8), (0.0, 0.05), (1.0, 1.2), (0, 5)
    )
]
_REQUESTS = [
    {"top_k": 40, "top_p": 0.8, "temperature": 0.6},
    {"top_k": 0, "temperature": 1.2, "repetition_penalty": 1.3, "logprobs": 3},
    {"top_k": 0, "top_p": 0.9, "frequency_penalty": 0.5, "presence_penalty": 0.2},
    {"top_k": 1, "repetition_penalty": 1.1, "min_new_tokens": 4},
]


def write(folder: Path) -> None:
    """Our kernel; graphs for several vocabularies, and what they take and give."""
    from vlmforge_builder.chain_file import save_segments
    from vlmforge_builder.kernel_files import write_kernels
    from vlmforge_builder.passes.sample_token import sample_token
    from vlmforge_plugins.token_choice.compile import compile_set

    folder.mkdir(parents=True, exist_ok=True)
    files = write_kernels(compile_set, "choosers", folder)
    (folder / _KERNELS).write_text(json.dumps(dict(files)), "utf-8")
    for size in VOCABULARIES:
        (segment,) = save_segments([sample_token(size)], f"sample.{size}", folder)
        (folder / f"{size}.json").write_text(to_json(segment), "utf-8")
        print(folder / segment.file)


def check(folder: Path) -> int:
    """Every graph of `write`, and the kernel in its place; the number of tokens that differ."""
    wrong = 0
    files = json.loads((folder / _KERNELS).read_text("utf-8"))
    described = (path for path in folder.glob("*.json") if path.name != _KERNELS)
    for path in sorted(described, key=lambda path: int(path.stem)):
        segment = from_json(Segment, json.loads(path.read_text("utf-8")), path.name)
        device, size = cuda.BACKEND.device(), int(path.stem)
        wrong += not_there(folder / segment.file)
        ways = {"graph": device.segment(folder / segment.file)}
        kernels = device.choosers({name: folder / file for name, file in files.items()})
        if kernels is not None:
            ways["kernel"] = ChoiceKernel(device, kernels, size, max(ROWS))
        memory = device.allocate(4 * max(ROWS) * size)
        for name, way in ways.items():
            made = TokenSampler(device, way, segment, max(ROWS))
            differ, left = compared(device, made, memory.address, size)
            wrong += differ
            times = [timed(device, made, memory.address, size, rows) for rows in ROWS]
            shown = ", ".join(f"{us:.0f} us for {n}" for us, n in zip(times, ROWS, strict=True))
            print(
                f"vocabulary of {size}, {name}: {differ} tokens differ, {left} left to the host; "
                f"{shown}"
            )
    return wrong


def not_there(file: Path) -> int:
    """1 where the GPU's provider does not have all of a graph; on a processor nobody asks."""
    if machine.PROVIDER not in ort.get_available_providers():
        return 0
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        ort.InferenceSession(file, options, providers=[machine.PROVIDER])
    except Exception as error:  # noqa: BLE001 - it is shown, and the rest is tried
        print(f"{file.name}: not all of it is on the GPU: {str(error)[:600]}")
        return 1
    return 0


def drawn(rows: int, size: int, seed: int) -> NDArray[np.float32]:
    """Logits as 16 bits have them: many are equal."""
    values = np.random.default_rng(seed).standard_normal((rows, size)) * 3
    return values.astype(np.float16).astype(np.float32)


def compared(device: Device, made: TokenSampler, address: int, size: int) -> tuple[int, int]:
    """Tokens of four steps of every setting that differ, and that the host has to choose."""
    differ = left = 0
    for first in range(0, len(SETTINGS), max(ROWS)):
        asked = [
            structs.replace(p, seed=i) for i, p in enumerate(SETTINGS[first : first + max(ROWS)])
        ]
        pairs = [(Sampler(p, size, (7, 8)), Sampler(p, size, (7, 8))) for p in asked]
        for step in range(4):
            logits = drawn(len(asked), size, 100 * first + step)
            choices = [one.choice() for one, _ in pairs]
            frame = made.prepare(len(asked), address, choices)
            device.upload(address, logits)
            made.run(frame)
            for row, picked in enumerate(made.found(frame, choices)):
                one, other = pairs[row]
                left += picked is None
                found = one.step(logits[row] if picked is None else picked)
                differ += not same(found, other.step(logits[row]))
    return differ, left


def same(one: SampledToken, other: SampledToken) -> bool:
    """Whether they are of one token, with the same log-probabilities."""
    tops = [top or {} for top in (one.top_logprobs, other.top_logprobs)]
    close = all(abs(tops[0].get(i, 1e9) - value) < 1e-6 for i, value in tops[1].items())
    return one.id == other.id and len(tops[0]) == len(tops[1]) and close


def timed(device: Device, made: TokenSampler, address: int, size: int, rows: int) -> float:
    """Microseconds of a captured choice, with what goes up and comes down."""
    choices: list[Choice | None] = [Choice((0.6, 40.0, 0.8, 0.0, 0.5))] * rows
    device.upload(address, drawn(rows, size, 1))
    seconds = []
    for _ in range(40):
        began = time.perf_counter()
        frame = made.prepare(rows, address, choices)
        made.run(frame)
        made.found(frame, choices)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[8:]) * 1e6


def engine(folder: Path) -> int:
    """Every token of answers that are sampled together; how many the host chooses otherwise."""
    logits: dict[int, tuple[Picked, NDArray[np.float32]]] = {}
    told = {"device": 0, "host": 0, "differ": 0}
    choose, step = PagedDecoder.choose, Sampler.step

    def noted(decoder: PagedDecoder, batch: Any, choices: Sequence[Choice | None]) -> Any:
        found = choose(decoder, batch, choices)
        frame = decoder._frame(decoder._size(batch))
        for row, one in enumerate(found):
            if isinstance(one, Picked):
                logits[id(one)] = one, decoder._row(decoder._at(frame, "logits"), row)
        return found

    def checked(sampler: Sampler, given: Any) -> SampledToken:
        if not isinstance(given, Picked):
            told["host"] += 1
            return step(sampler, given)
        other = step(copy.deepcopy(sampler), logits.pop(id(given))[1])
        found = step(sampler, given)
        told["device"] += 1
        told["differ"] += not same(found, other)
        return found

    with pipeline(folder) as pipe:
        plain = seconds(pipe)
        overlapping = pipe._engine.overlapping
        object.__setattr__(pipe._engine, "overlapping", None)
        by_turns = seconds(pipe)
        object.__setattr__(pipe._engine, "choosing", None)
        by_host = seconds(pipe)
        object.__setattr__(pipe._engine, "choosing", pipe._engine.decoder)
        PagedDecoder.choose, Sampler.step = noted, checked  # type: ignore[method-assign]
        answers(pipe)
        PagedDecoder.choose, Sampler.step = choose, step  # type: ignore[method-assign]
        wanted = answers(pipe)
        object.__setattr__(pipe._engine, "overlapping", overlapping)
        differ = sum(a != b for a, b in zip(wanted, answers(pipe), strict=True))
    print(
        f"{folder.name}: {told}; {plain:.2f} s chosen there, {by_turns:.2f} s one step after the "
        f"other, {by_host:.2f} s by the host; answers of overlapping steps that differ: {differ}"
    )
    return told["differ"] + (not told["device"])


def answers(pipe: Pipeline) -> list[list[int]]:
    """A batch of requests of all kinds, and the ids of what is said."""
    wanted = [
        GenerationConfig(max_new_tokens=48, ignore_eos=True, random_seed=i, **settings)
        for i, settings in enumerate(_REQUESTS * 4)
    ]
    texts = [f"number {i}, and so on" for i in range(len(wanted))]
    found = pipe(texts, gen_config=wanted)
    assert isinstance(found, list)
    return [answer.token_ids for answer in found]


def seconds(pipe: Pipeline) -> float:
    """Of the second of two batches; the first one captures."""
    answers(pipe)
    began = time.perf_counter()
    answers(pipe)
    return time.perf_counter() - began


def main() -> None:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__)
    kinds = arguments.add_subparsers(dest="kind", required=True)
    for kind in ("write", "check"):
        kinds.add_parser(kind).add_argument("graphs", type=Path)
    kinds.add_parser("engine").add_argument("engines", type=Path, nargs="+")
    values = arguments.parse_args()
    if values.kind == "write":
        return write(values.graphs)
    if values.kind == "check":
        sys.exit(min(1, check(values.graphs)))
    sys.exit(min(1, sum(map(engine, values.engines))))


if __name__ == "__main__":
    main()
