"""What gpu_figures.py measured, as the tables of RESULTS.md (`gpu_engines.py report`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gpu_report import table
from gpu_results import Results, Row

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "<!-- engines on a GPU: written by bench/gpu_engines.py report -->\n"
END = "<!-- end of engines on a GPU -->\n"
LARGE = "7b.float16"
# Shares of the copy rate, by rows: those of a chain of parts without sampling and scheduling.
STEP_GOALS = {1: 0.78, 8: 0.81, 32: 0.87, 64: 0.91}
IDLE_GOALS = {1: 0.10, 64: 0.05}
PREFILL_GOAL = 0.62
# Others on the same kind of card, measured before, with the same requests: LMDeploy 0.18 (128 new
# tokens each) and, where there are images, vLLM 0.26.
OTHERS_TEXT = {8: 1024, 32: 2385, 128: 3504}
_CHUNK = "chunk 2048"
OTHERS_IMAGES, OTHERS_IMAGE_MS, IMAGE_GOAL = 21.3, 47.4, 0.7


def write(results: Path, document: Path = ROOT / "bench" / "RESULTS.md") -> None:
    """Tables between the markers of the document (AssertionError: it has none)."""
    before, begin, rest = document.read_text("utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"no {BEGIN.strip()} ... {END.strip()}"
    text = "\n".join(lines(Results(results)))
    document.write_text("".join([before, begin, text, "\n", end, after]), "utf-8")


def lines(results: Results) -> Iterator[str]:
    """All tables for which there are rows."""
    card = next(iter(results.of("card")), {})
    if card:
        yield (
            f"{card['card']}, driver {card['driver'].split()[0]}, {card['onnxruntime']}; a copy "
            f"moves {card['copy_tb_per_s']:.2f} TB/s, read and written, a product of 8192-cubed "
            f"matrices runs at {card['matmul_tflop_per_s']:.0f} TFLOP/s in float16."
        )
    for section in (_steps, _others, _prompts, _serving, _start, _memory, _pool, _soak):
        made = list(section(results, card))
        if made:
            yield ""
            yield from made


def _goal(value: float, goal: float | None, *, least: bool = True) -> str:
    """A share, and whether it is what was aimed at."""
    if goal is None:
        return f"{value:.1%}"
    met = value >= goal if least else value <= goal
    return f"{value:.1%} ({'' if met else '**missed**, '}{'>=' if least else '<='} {goal:.0%})"


def _steps(results: Results, card: Row) -> Iterator[str]:
    rows = results.of("decode")
    if not rows:
        return
    rate = card.get("copy_tb_per_s", 0) * 1e3

    def cells(row: Row) -> list[str]:
        own = row["engine"] == LARGE
        share = row["gb_per_s"] / rate if rate else float("nan")
        return [
            row["engine"],
            str(row["batch"]),
            str(row["context"]),
            f"{row['step_ms']:.2f}",
            f"{row['gpu_ms']:.2f}",
            _goal(row["idle"], IDLE_GOALS.get(row["batch"]) if own else None, least=False),
            f"{row['tokens_per_s']:.0f}",
            _goal(share, STEP_GOALS.get(row["batch"]) if own else None),
        ]

    head = ["engine", "batch", "tokens held by each", "step, ms", "graphs on the GPU, ms"]
    head += ["GPU idle", "tokens/s", "share of the copy rate"]
    yield from table(head, map(cells, rows))


def _others(results: Results, card: Row) -> Iterator[str]:
    del card
    ours = {row["batch"]: row for row in results.of("decode") if row["engine"] == LARGE}
    found: dict[int, dict[str, Row]] = {}
    for row in results.of("yardstick"):
        found.setdefault(row["batch"], {})[row["by"]] = row
    if not found:
        return
    yield (
        "The same step by others in the same run, each in a process of its own one after the "
        "other: torch with F.linear and SDPA in a CUDA graph, and one ONNX Runtime session with "
        "GroupQueryAttention in its own CUDA graph. Theirs is the decoder alone."
    )
    yield ""

    def cells(batch: int) -> list[str]:
        own = ours.get(batch)
        made = [str(batch), f"{own['step_ms']:.2f}" if own else ""]
        for by in ("torch", "onnxruntime"):
            row = found[batch].get(by)
            ratio = f", {row['step_ms'] / own['step_ms']:.2f}x" if row and own else ""
            made.append(f"{row['step_ms']:.2f} at {row['context']}{ratio}" if row else "")
        return made

    head = ["batch", "ours, ms", "torch, ms", "ONNX Runtime, ms"]
    yield from table(head, map(cells, sorted(found)))


def _prompts(results: Results, card: Row) -> Iterator[str]:
    rate = card.get("matmul_tflop_per_s", 0)
    for row in results.of("prefill"):
        share = row["tflop_per_s"] / rate if rate else float("nan")
        goal = PREFILL_GOAL if row["case"] == 2048 else None
        yield (
            f"- A prompt of {row['case']} tokens: first token in {row['first_token_ms']:.1f} ms, "
            f"its step {row['prefill_ms']:.1f} ms, {row['tflop_per_s']:.0f} TFLOP/s of products "
            f"and attention, {_goal(share, goal)} of the matmul rate."
        )
    for row in results.of("image"):
        ratio = row["first_token_ms"] / OTHERS_IMAGE_MS
        yield (
            f"- An image of 336 pixels that was never seen, {row['tokens']} tokens in all: first "
            f"token in {row['first_token_ms']:.1f} ms, {_goal(ratio, IMAGE_GOAL, least=False)} of "
            f"vLLM's {OTHERS_IMAGE_MS} ms."
        )


def _serving(results: Results, card: Row) -> Iterator[str]:
    del card
    rows = results.of("text") + results.of("images")
    if not rows:
        return

    def cells(row: Row) -> list[str]:
        images = row["part"] == "images"
        other = OTHERS_IMAGES if images else OTHERS_TEXT.get(row["batch"])
        own = row["requests_per_s" if images else "tokens_per_s"]
        of = "vLLM's" if images else "LMDeploy's"
        against = "" if other is None else f"{_goal(own / other, 1.0)} of {of} {other}"
        chunk = f" ({row['case']})" if row.get("case", _CHUNK) != _CHUNK else ""
        return [
            f"{row['batch']}{' with an image each' if images else ''}{chunk}",
            f"{row['requests_per_s']:.1f}",
            f"{row['tokens_per_s']:.0f}",
            against,
        ]

    # Random weights say bytes that are no text before the answer's end: when a first piece comes
    # tells nothing of its first token.
    yield from table(["requests at once", "requests/s", "tokens/s", "others"], map(cells, rows))


def _start(results: Results, card: Row) -> Iterator[str]:
    del card
    for row in results.of("start"):
        met = "" if row["first_answer_s"] <= 10 else ", **missed: 10 s**"
        yield (
            f"- A new process of {row['engine']} is ready after {row['ready_s']:.1f} s "
            f"(`pipeline()` takes {row['pipeline_s']:.1f} s of them) and has answered after "
            f"{row['first_answer_s']:.1f} s{met}; files checked before, and in the system's cache."
        )


def _memory(results: Results, card: Row) -> Iterator[str]:
    rows = results.of("planned")
    fitting = [row for row in rows if row["fits"]]

    def cells(row: Row) -> list[str]:
        values: Sequence[Any] = [row[f"{name}_gb"] for name in ("weights", "cache", "planned")]
        off = abs(row["off"])
        verdict = f"{row['off']:+.1%}" + ("" if off <= 0.03 else " **missed: 3 %**")
        shown = [f"{value:.2f}" for value in (*values, row["loaded_gb"], row["taken_gb"])]
        return [row["engine"], *shown, verdict]

    if fitting:
        head = ["engine", "weights, GB", "pages, GB", "planned, GB", "taken when loaded"]
        yield from table([*head, "taken after the largest steps", "off"], map(cells, fitting))
        driver = max(row["driver_gb"] for row in fitting)
        planned = fitting[0]["planned_driver_gb"]
        yield ""
        yield f"Beside this the driver itself takes {driver:.2f} GB, planned {planned:.2f}."
    for row in rows:
        if not row["fits"]:
            total = card.get("memory_gb", 0)
            yield ""
            yield f"{row['engine']} does not fit {total:.1f} GB, and is refused with: "
            yield f"`{_one_line(row['said'])}` What would fit: {row['change']}."


def _pool(results: Results, card: Row) -> Iterator[str]:
    del card
    for row in results.of("full"):
        yield (
            f"- {row['requests']} requests of {row['asked_tokens']} tokens in all, in a pool for "
            f"{row['pool_tokens']}: {row['preemptions']} times one gave up its place, all answers "
            f"came whole, {row['errors']} errors, {row['blocks_left']} pages left in use."
        )
    for row in results.of("refused"):
        yield f"- {row['case'].capitalize()}: `{_one_line(row['said'])}`"


def _soak(results: Results, card: Row) -> Iterator[str]:
    del card
    rows = {row["case"]: row for row in results.of("soak")}
    for case, row in rows.items():
        if case in ("cancels", "cancels, prefixes reused"):
            yield (
                f"- {row['requests']} requests left at any moment ({case}): {row['aborted']} were "
                f"aborted, {row['errors']} errors, {row['pages_held']} pages held afterwards."
            )
        elif case == "reopen":
            yield (
                f"- {row['engine']} loaded, asked and closed {row['requests']} times: "
                f"{row['lost_mb']} MB of the GPU's memory lost, {row['answers']} different answer."
            )
        else:
            yield (
                f"- {row['requests']} requests at once ({case}), {row['answers']} answers: "
                f"{row['differ']} greedy and {row['sampled_differ']} sampled ones differ from what "
                "they give alone."
            )


def _one_line(text: str) -> str:
    return " ".join(text.split())
