"""Many requests at once on a GPU engine of the demo model: is each answer the one it gives alone?

    python3 bench/gpu_soak.py [mixed] [batch] [cancels] [reopen] ENGINE
    python bench/gpu_soak.py --on-cpu ENGINE           # the stand-in, where there is no GPU

`mixed`: 64 requests of mixed lengths, from threads: questions with up to two pictures, chats of
several turns, sampled ones with a seed, some left in the middle. `batch`: 64 in one call.
`cancels`: 1,000 requests that are left at any moment, after which no page is held. `reopen`: an
engine is loaded and closed 20 times, and the GPU has its memory back. Sampled answers that differ
are counted apart: the last bits of logits depend on how many rows there are, and a draw that falls
between two tokens with them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_steps  # noqa: F401 - it says where the runtime is
from gpu_results import Results, attempts
from vlmforge import EngineConfig, GenerationConfig, Pipeline, Response, Session, pipeline
from vlmforge.backends.cuda import machine
from vlmforge.backends.fake import cuda_on_cpu
from vlmforge.evaluation.cases import Case, held_out_cases

REQUESTS, CANCELS, LOADS, SLOTS = 64, 1000, 20, 16
_KEPT = 32 << 20  # bytes that libraries may keep for themselves when an engine is closed
_DEADLINE = 60.0


@dataclass(frozen=True, slots=True)
class Asked:
    """A request.

    Attributes:
        turns: What is asked, one after the other in one conversation.
        config: For each of the turns.
        left: Pieces of the last answer after which nobody listens any more; None: to its end.
    """

    turns: tuple[Any, ...]
    config: GenerationConfig
    left: int | None = None

    def ask(self, pipe: Pipeline) -> list[Answer]:
        """The answers of all turns."""
        session = Session() if len(self.turns) > 1 else None
        return [self._turn(pipe, turn, session, last=turn is self.turns[-1]) for turn in self.turns]

    def _turn(self, pipe: Pipeline, turn: Any, session: Session | None, *, last: bool) -> Answer:
        pieces: Any
        if session is None:
            pieces = pipe.stream_infer(turn, self.config)
        else:
            pieces = pipe.chat(turn, session, self.config, stream_response=True)
        whole = Response()
        with contextlib.closing(pieces):
            for number, piece in enumerate(pieces, 1):
                whole.extend(piece)
                if last and number == self.left:
                    break
        return Answer(tuple(whole.token_ids), whole.text, whole.finish_reason)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a turn; `reason` is None where it was left."""

    ids: tuple[int, ...]
    text: str
    reason: str | None

    def agrees(self, alone: Answer) -> bool:
        """Whether it is the answer alone, or its beginning where it was left."""
        if self.reason is None:
            return self.ids == alone.ids[: len(self.ids)]
        return self == alone


def requests(count: int = REQUESTS) -> list[Asked]:
    """Questions about held-out pictures, and some without any."""
    return [_request(index, case) for index, case in enumerate(held_out_cases(count, seed=7))]


def _request(index: int, case: Case) -> Asked:
    drawn = random.Random(index)
    config = GenerationConfig(max_new_tokens=drawn.choice((1, 5, 17, 40, 90)))
    if index % 5 == 0:
        config.top_k, config.top_p, config.temperature = 40, 0.9, 0.8
        config.random_seed, config.repetition_penalty = index, 1.1
    elif index % 7 == 0:
        config.ignore_eos = True
    first, *rest = [turn.question for turn in case.turns]
    shown = (first, list(case.pictures)) if case.pictures else first
    turns: tuple[Any, ...] = (shown, *rest)
    if index % 4 == 3:
        turns = (*turns, "What did I ask you first?", "Who are you?")
    return Asked(turns, config, drawn.randint(1, 6) if index % 6 == 2 else None)


def opened(engine: Path, *, reuse: bool = True) -> Pipeline:
    """With places for a part of the requests, so that others wait."""
    return pipeline(engine, EngineConfig(max_batch_size=SLOTS, enable_prefix_caching=reuse))


def alone(engine: Path, asked: Sequence[Asked]) -> list[list[Answer]]:
    """One after the other, with nothing remembered."""
    with opened(engine, reuse=False) as pipe:
        return [Asked(one.turns, one.config).ask(pipe) for one in asked]


def mixed(engine: Path, results: Results) -> None:
    """All at once, from as many threads: with prefixes reused, and without."""
    asked = requests()
    singles = alone(engine, asked)
    for reuse in (False, True):
        with opened(engine, reuse=reuse) as pipe:
            gate = threading.Barrier(len(asked))

            def one(request: Asked, gate: threading.Barrier = gate, pipe: Pipeline = pipe) -> Any:
                gate.wait()
                return request.ask(pipe)

            with ThreadPoolExecutor(len(asked)) as pool:
                together = list(pool.map(one, asked))
            held, metrics = held_pages(pipe), pipe.metrics()
        wrong, sampled = differences(asked, singles, together)
        results.add(
            "soak",
            engine=engine.name,
            case="mixed, prefixes reused" if reuse else "mixed",
            requests=len(asked),
            answers=sum(map(len, together)),
            tokens=metrics.generated_tokens,
            cached_tokens=metrics.cached_tokens,
            left=sum(one.left is not None for one in asked),
            differ=wrong,
            sampled_differ=sampled,
            pages_held=held,
        )
        assert not wrong and not held


def batch(engine: Path, results: Results) -> None:
    """One call of many prompts equals as many calls."""
    asked = [Asked(one.turns[:1], one.config) for one in requests()]
    singles = alone(engine, asked)
    with opened(engine) as pipe:
        found = pipe([one.turns[0] for one in asked], [one.config for one in asked])
    assert isinstance(found, list)
    together = [[Answer(tuple(r.token_ids), r.text, r.finish_reason)] for r in found]
    wrong, sampled = differences(asked, singles, together)
    results.add(
        "soak",
        engine=engine.name,
        case="batch",
        requests=len(asked),
        answers=len(asked),
        differ=wrong,
        sampled_differ=sampled,
    )
    assert not wrong


def differences(
    asked: Sequence[Asked], singles: list[list[Answer]], together: list[list[Answer]]
) -> tuple[int, int]:
    """How many greedy and sampled answers are others than alone; the first of them are shown."""
    wrong = [0, 0]
    for request, one, other in zip(asked, singles, together, strict=True):
        sampled = request.config.random_seed is not None
        for turn, (single, found) in enumerate(zip(one, other, strict=True)):
            if found.agrees(single):
                continue
            wrong[sampled] += 1
            if sum(wrong) <= 4:
                print(f"    turn {turn} of {request.turns}, sampled: {sampled}")
                print(f"      alone    {single}\n      together {found}", flush=True)
    return wrong[0], wrong[1]


def cancels(engine: Path, results: Results, count: int = CANCELS) -> None:
    """Requests that are left at any moment: before they run, in a prompt, after some tokens."""
    pictures = [case for case in held_out_cases(26, seed=8) if case.pictures]
    config = GenerationConfig(max_new_tokens=60, ignore_eos=True)

    async def leave(pipe: Pipeline, index: int, turn: asyncio.Semaphore) -> None:
        drawn = random.Random(index)
        case = pictures[index % len(pictures)]
        question = case.turns[0].question
        prompt = (question, list(case.pictures)) if index % 3 else question
        async with turn:
            if drawn.random() < 0.5:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(drawn.random() * 0.2):
                        async for _ in pipe.astream(prompt, config):
                            pass
                return
            pieces, wanted = pipe.astream(prompt, config), drawn.randint(1, 20)
            async with contextlib.aclosing(pieces):
                async for _ in pieces:
                    wanted -= 1
                    if not wanted:
                        break

    async def all_of_them(pipe: Pipeline) -> None:
        turn = asyncio.Semaphore(3 * SLOTS)
        await asyncio.gather(*(leave(pipe, index, turn) for index in range(count)))

    for reuse in (False, True):
        with opened(engine, reuse=reuse) as pipe:
            asyncio.run(all_of_them(pipe))
            idle(pipe)
            metrics, held = pipe.metrics(), held_pages(pipe)
            answer = pipe("Who are you?")
        results.add(
            "soak",
            engine=engine.name,
            case="cancels, prefixes reused" if reuse else "cancels",
            requests=sum(metrics.requests.values()),
            aborted=metrics.requests["abort"],
            errors=sum(metrics.errors.values()),
            pages_held=held,
            answer=getattr(answer, "text", ""),
        )
        assert not held and not metrics.errors


def idle(pipe: Pipeline) -> None:
    """Wait until nothing runs (AssertionError: something goes on)."""
    until = time.monotonic() + _DEADLINE
    while pipe.metrics().running or pipe.metrics().waiting:
        assert time.monotonic() < until, pipe.metrics()
        time.sleep(0.01)


def held_pages(pipe: Pipeline) -> int:
    """Pages that belong to a sequence; those with leftovers that anybody may have do not count."""
    idle(pipe)
    cache: Any = pipe._scheduler._jobs._cache
    return int(cache.blocks - cache.free_blocks)


def reopen(engine: Path, results: Results, count: int = LOADS, *, on_gpu: bool = True) -> None:
    """Load, ask and close; what the GPU has free behind the first time, and behind the last."""
    free, texts = [], set()
    for _ in range(count + 1):
        with opened(engine) as pipe:
            answer = pipe("Who are you?")
        texts.add(getattr(answer, "text", ""))
        del pipe, answer
        gc.collect()
        free.append(machine.find_gpu().free if on_gpu else 0)
    lost = free[0] - min(free[1:])
    results.add(
        "soak",
        engine=engine.name,
        case="reopen",
        requests=count,
        lost_mb=lost / 1e6 if on_gpu else "not asked: no GPU",
        answers=len(texts),
    )
    assert lost <= _KEPT and len(texts) == 1, (free, texts)


def main() -> None:
    """The command line."""
    kinds: dict[str, Callable[..., None]] = {
        "mixed": mixed,
        "batch": batch,
        "cancels": cancels,
        "reopen": reopen,
    }
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("arguments", nargs="+", metavar="KIND ... ENGINE")
    parser.add_argument("--on-cpu", action="store_true", help="the processor in a GPU's place")
    parser.add_argument("--out", type=Path)
    given = parser.parse_intermixed_args()
    *names, folder = given.arguments
    if unknown := set(names) - set(kinds):
        parser.error(f"not one of {', '.join(kinds)}: {', '.join(sorted(unknown))}")
    engine, results = Path(folder), Results(given.out)

    def work(name: str) -> Callable[[], None]:
        more = {"on_gpu": not given.on_cpu} if name == "reopen" else {}
        return lambda: kinds[name](engine, results, **more)

    with cuda_on_cpu() if given.on_cpu else contextlib.nullcontext():
        attempts([(f"{name} {engine.name}", work(name)) for name in names or kinds])


if __name__ == "__main__":
    main()
