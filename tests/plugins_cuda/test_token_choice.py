"""The kernel that chooses tokens, compiled for the host, against the graph and the sampler."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from numpy.typing import NDArray

from host_choice import Chosen, HostChoice, Inputs, choose, library
from vlmforge.backends.choice import GREEDY, Choice, Edits, Picked
from vlmforge.backends.cuda.choosing import _fill
from vlmforge.engine.interface import REPORTED as REPORTED_TO_HOST
from vlmforge.engine.interface import UNDECIDED
from vlmforge.errors import ConfigError, EngineError
from vlmforge.ort import ort
from vlmforge.outputs.sampling import SampledToken, Sampler, SamplingParams
from vlmforge_builder.passes import sample_token as graph
from vlmforge_plugins.cached_attention.compile import Nvrtc, reports
from vlmforge_plugins.cached_attention.config import PTX_TARGETS, TARGETS
from vlmforge_plugins.errors import UnsupportedError
from vlmforge_plugins.token_choice import launcher
from vlmforge_plugins.token_choice.compile import compile_set, source_of
from vlmforge_plugins.token_choice.launcher import CANDIDATES, Choosing, launch_of

Logits = NDArray[np.float32]
VOCABULARIES = (1, 2, 7, 300, 1024, 1025, 3001)
NEAR_ONE = float(np.nextafter(1, 0))
KINDS = ("drawn", "of 16 bits", "few numbers", "all the same", "in order", "in turns", "a peak")


def logits_of(kind: str, vocab: int, seed: int) -> Logits:
    """Some have many equals, or the likeliest where few are looked for."""
    drawn = np.random.default_rng(seed).standard_normal(vocab) * 4
    values = {
        "of 16 bits": drawn.astype(np.float16),
        "few numbers": np.round(drawn / 3) * 3,  # zeros of both signs
        "all the same": np.full(vocab, -0.75),
        "in order": np.sort(drawn)[::-1],
        "in turns": np.where(np.arange(vocab) % 4096 < 64, 9 + drawn / 99, drawn),
        "a peak": np.where(np.arange(vocab) == seed % vocab, 400.0, drawn * 30),
    }
    return values.get(kind, drawn).astype(np.float32)


def inputs_of(logits: Sequence[Logits], choices: Sequence[Choice | None], edits: int) -> Inputs:
    """As `TokenSampler` fills them in."""
    rows = len(logits)
    kinds: dict[str, tuple[type, int]] = {
        "choices": (np.float64, 5),
        "edit_ids": (np.int64, edits),
        "edit_factors": (np.float32, edits),
        "edit_minus": (np.float64, edits),
    }
    views = {name: np.zeros((rows, width), kind) for name, (kind, width) in kinds.items()}
    for row, choice in enumerate(choices):
        _fill(views, row, choice or GREEDY)
    return Inputs(np.stack(logits), **views)


@cache
def session(vocab: int) -> ort.InferenceSession:
    model = ir.to_proto(graph.sample_token(vocab)).SerializeToString()
    return ort.InferenceSession(model, providers=["CPUExecutionProvider"])


def by_graph(inputs: Inputs) -> Chosen:
    """Where all is banned, none is drawn: on a processor, gathering where that ends is an error."""
    vocab, choices = inputs.logits.shape[1], inputs.choices.copy()
    for row, (ids, minus) in enumerate(zip(inputs.edit_ids, inputs.edit_minus, strict=True)):
        if len(set(ids[minus == np.inf])) == vocab:
            choices[row, 4] = -1
    given = vars(inputs) | {"logits": inputs.logits[:, None], "choices": choices}
    chosen, logit, normaliser, *best = session(vocab).run(None, given)
    return Chosen(chosen[:, 0], logit[:, 0], normaliser[:, 0], *best)


def assert_as_graph(inputs: Inputs, direction: int = 1) -> Chosen:
    """All outputs of both; returns the kernel's. Of a row without an answer little is of use."""
    found, wanted = choose(HostChoice(direction), inputs), by_graph(inputs)
    np.testing.assert_array_equal(found.chosen, wanted.chosen)
    decided, finite = found.chosen >= 0, np.isfinite(found.normaliser)
    assert finite[decided].all()
    np.testing.assert_allclose(found.normaliser[finite], wanted.normaliser[finite], rtol=1e-13)
    np.testing.assert_array_equal(found.best_ids[finite], wanted.best_ids[finite])
    np.testing.assert_array_equal(found.best_logits[finite], wanted.best_logits[finite])
    np.testing.assert_array_equal(found.chosen_logit[decided], wanted.chosen_logit[decided])
    alone = choose(HostChoice(-direction), inputs, told=False)
    np.testing.assert_array_equal(alone.chosen, found.chosen)
    return found


@st.composite
def numbers_of(draw: st.DrawFn, vocab: int) -> tuple[float, float, float, float, float]:
    top_k = draw(st.sampled_from([vocab, vocab, vocab, 1, 2, 40, 1000, 1024, 1025]))
    return (
        draw(st.sampled_from([0.05, 0.6, 1.0, 1.0, 2.5])),
        float(min(top_k, vocab)),
        draw(st.sampled_from([1.0, 1.0, 0.0, 1e-9, 0.3, 0.8, 0.95, 0.9999])),
        draw(st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0])),
        draw(st.one_of(st.sampled_from([-1.0, 0.0, NEAR_ONE]), st.floats(0, 1, exclude_max=True))),
    )


@st.composite
def edits_of(draw: st.DrawFn, vocab: int) -> Edits:
    """Of any ids once; more bans than there are candidates among them."""
    count = draw(st.sampled_from([0, 0, 1, 5, 15, 200, vocab]))
    seed = draw(st.integers(0, 99))
    rng = np.random.default_rng(seed)
    ids = rng.permutation(vocab)[:count].astype(np.int64)
    factors = rng.choice(np.array([1, 1, 1.3, 0.7], np.float32), len(ids))
    return Edits(ids, factors, rng.choice([0.0, 0.3, -1.5, np.inf], len(ids)))


@st.composite
def rows_of(draw: st.DrawFn) -> Inputs:
    vocab, rows = draw(st.sampled_from(VOCABULARIES)), range(draw(st.integers(1, 4)))
    seed = draw(st.integers(0, 2**32 - 1))
    logits = [logits_of(draw(st.sampled_from(KINDS)), vocab, seed + row) for row in rows]
    choices = [Choice(draw(numbers_of(vocab)), draw(edits_of(vocab))) for _ in rows]
    longest = max(len(choice.edits.ids) for choice in choices)
    return inputs_of(logits, choices, max(16, longest))


@settings(max_examples=100)
@given(rows_of(), st.sampled_from([1, -1]))
def test_any_row_has_the_answer_of_the_graph(inputs: Inputs, direction: int) -> None:
    assert_as_graph(inputs, direction)


@pytest.mark.parametrize(
    ("vocab", "kinds"),
    [(40_000, KINDS), (19_003, ("drawn", "in turns", "few numbers")), (300_001, ("drawn",))],
    ids=str,
)
def test_large_vocabularies(vocab: int, kinds: tuple[str, ...]) -> None:
    """More than one look of each thread, blocks that a warp has several of."""
    edits = Edits(np.arange(50, 150) * 83, np.full(100, 1.2, np.float32), np.full(100, 0.5))
    draws = [(1.0, vocab, 1.0, 0.0, 0.7), (0.8, 1024, 0.9, 0.0, 0.9), (0.7, vocab, 0.6, 0.02, 0.4)]
    draws.append((1.0, vocab, 1.0, 0.0, -1.0))
    rows = list(itertools.product(kinds, draws))
    logits = [logits_of(kind, vocab, 5 + row) for row, (kind, _) in enumerate(rows)]
    choices = [
        Choice(numbers, replace(edits, ids=edits.ids + row) if row % 2 else GREEDY.edits)
        for row, (_, numbers) in enumerate(rows)
    ]
    found = assert_as_graph(inputs_of(logits, choices, 256))
    assert len(set(found.chosen.tolist())) > len(rows) // 2


def test_every_part_of_the_weight_ends_at_its_token() -> None:
    """Without limits, over the whole row; the graph's blocks are the kernel's."""
    vocab = 3001
    logits = [logits_of("drawn", vocab, 3) / 4] * 64
    choices = [Choice((1.0, vocab, 1.0, 0.0, (i + 0.5) / 64)) for i in range(64)]
    found = assert_as_graph(inputs_of(logits, choices, 16)).chosen
    assert (np.diff(found) >= 0).all()
    assert len(set(found // 256)) == 12


def test_a_draw_among_equals_ends_at_its_id() -> None:
    """Also where a warp's blocks are more than there are warps."""
    vocab, wanted = 300_001, [0, 33 * 256, 145 * 256 + 5, 300_000]
    numbers = [(1e-310, vocab, 1.0, 0.0, (i + 0.5) / vocab) for i in wanted]
    rows = [np.full(vocab, 2.5, np.float32)] * len(wanted)
    inputs = inputs_of(rows, [Choice(n) for n in numbers], 16)  # of a temperature of nearly nothing
    assert choose(HostChoice(), inputs, told=False).chosen.tolist() == wanted


@pytest.mark.parametrize("direction", [1, -1])
def test_a_row_has_the_same_bits_in_any_batch(direction: int) -> None:
    vocab = 3001
    logits = [logits_of(kind, vocab, 20 + row) for row, kind in enumerate(KINDS)]
    draws = [(0.7, vocab, 0.9, 0.0, 0.5), (1.0, 40, 1.0, 0.1, 0.3), (1.3, vocab, 1.0, 0.0, 0.8)]
    edits = Edits(np.arange(0, 3000, 60), np.full(50, 1.3, np.float32), np.full(50, 0.25))
    choices = [
        Choice(numbers, edits if row % 2 else GREEDY.edits)
        for row, numbers in zip(range(len(KINDS)), itertools.cycle(draws), strict=False)
    ]
    inputs = inputs_of(logits, choices, 64)
    together = choose(HostChoice(), inputs)
    order = np.roll(np.arange(len(KINDS)), 3)
    turned = choose(HostChoice(direction), inputs.rows(order))
    for row in range(len(KINDS)):
        alone = choose(HostChoice(direction), inputs.rows(slice(row, row + 1)))
        assert together.row(row) == alone.row(0) == turned.row(order.tolist().index(row))


@pytest.mark.parametrize("vocab", [7, 300, 3001])
def test_the_ends_of_what_may_be_drawn(vocab: int) -> None:
    """Tokens without weight are never drawn, whatever the number is; bans have none."""
    low, high = 2, vocab - 3
    logits = np.full(vocab, -1e4, np.float32)
    logits[[low, high]] = 0.0
    tied = np.zeros(vocab, np.float32)
    others = np.setdiff1d(np.arange(vocab), [low, high])
    bans = Edits(others, np.ones(len(others), np.float32), np.full(len(others), np.inf))
    for top_k, top_p, min_p in itertools.product((vocab, 4), (1.0, 0.9999), (0.0, 1.0)):
        draws = {0.0: low, 0.49: low, 0.51: high, NEAR_ONE: high, -1.0: low}
        numbers = [(0.5, top_k, top_p, min_p, draw) for draw in draws]
        choices = [*(Choice(n) for n in numbers), *(Choice(n, bans) for n in numbers)]
        rows = [logits] * len(draws) + [tied] * len(draws)
        found = assert_as_graph(inputs_of(rows, choices, vocab))
        assert found.chosen.tolist() == [*draws.values()] * 2


def test_sums_that_end_between_two_tokens() -> None:
    """Those of equals are exact: what they have is enough, and the draw is behind them."""
    flat, sharp = np.zeros(8, np.float32), np.full(8, -1e4, np.float32)
    sharp[[2, 4]] = 0.0, -34.5  # of a weight that rounding may take for nothing
    cases = [
        (flat, 8, 0.5, NEAR_ONE, 3),
        (flat, 4, 0.5, NEAR_ONE, 1),
        (flat, 8, 1.0, 0.5, 4),
        (sharp, 8, 1.0, NEAR_ONE, 2),
    ]
    choices = [Choice((1.0, top_k, top_p, 0.0, draw)) for _, top_k, top_p, draw, _ in cases]
    found = assert_as_graph(inputs_of([logits for logits, *_ in cases], choices, 16))
    assert found.chosen.tolist() == [wanted for *_, wanted in cases]


def test_a_sum_that_rounding_makes_larger_is_no_weight() -> None:
    """Sums of a block are not made one after the other."""
    rng = np.random.default_rng(0)
    banned = rng.random(64) < 0.5
    logits = np.where(banned, -1e4, rng.standard_normal(64)).astype(np.float32)
    choice = Choice((1.0, 64, 1.0, 0.0, 0.35582920510634997))
    (found,) = choose(HostChoice(), inputs_of([logits], [choice], 16), told=False).chosen
    assert not banned[found]


def test_more_candidates_than_it_looks_at_are_left_to_the_host() -> None:
    vocab = 3001
    flat, sharp = np.zeros(vocab, np.float32), logits_of("drawn", vocab, 1) * 5
    cases = [
        (sharp, vocab, 0.95, True),
        (flat, vocab, 0.95, False),
        (flat, vocab, 1024 / vocab, True),
        (flat, vocab, 1025.5 / vocab, False),
        (sharp, 1025, 1.0, False),
        (flat, 1024, 0.95, True),
    ]
    choices = [Choice((1.0, top_k, top_p, 0.0, 0.5)) for _, top_k, top_p, _ in cases]
    found = assert_as_graph(inputs_of([logits for logits, *_ in cases], choices, 16))
    assert [chosen >= 0 for chosen in found.chosen] == [known for *_, known in cases]
    assert (found.chosen[found.chosen < 0] == UNDECIDED).all()
    greedy = choose(HostChoice(), inputs_of([sharp], [Choice((1.0, 1025, 1.0, 0.0, -1.0))], 16))
    assert greedy.chosen.tolist() == [sharp.argmax()]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("vocab", [7, 300, 3001])
def test_logits_that_are_not_finite(bad: float, vocab: int) -> None:
    """Wherever one is, among edited ones too; rows beside it have their answers.

    The graph is not asked: on a processor, gathering where a sum of them ends is an error.
    """
    whole = logits_of("drawn", vocab, 6)
    rows = [whole.copy() for _ in range(6)]
    places = (0, vocab // 2, vocab - 1, 4, 5)
    for row, place in zip(rows, places, strict=False):
        row[place] = bad
    edit = Edits(np.array([4]), np.ones(1, np.float32), np.full(1, np.inf))
    kinds = ([-1.0, 0.3, 0.6][i % 3] for i in range(6))
    edited = (*(GREEDY.edits,) * 3, edit, edit, edit)
    choices = [Choice((1.0, vocab, 1.0, 0.0, n), e) for n, e in zip(kinds, edited, strict=True)]
    found = choose(HostChoice(), inputs_of(rows, choices, 16))
    assert found.chosen[:5].tolist() == [UNDECIDED] * 5
    last = assert_as_graph(inputs_of(rows[5:], choices[5:], 16))
    assert found.row(5) == last.row(0)


@pytest.mark.parametrize(("factor", "minus"), [(1e-30, 0.0), (1.0, -np.inf), (np.nan, 0.0)])
def test_edits_that_break_the_logits_are_left_to_the_host(factor: float, minus: float) -> None:
    """Which says what is wrong. Ids outside of the vocabulary are of tokens that nobody knows."""
    logits = np.abs(logits_of("drawn", 300, 8)) * 1e10
    edits = Edits(np.array([33]), np.full(1, factor, np.float32), np.full(1, minus))
    kinds = [replace(edits, ids=np.array([i])) for i in (33, UNDECIDED, 300, 1 << 32)]
    choices = [Choice((1.0, 300, 1.0, 0.0, draw), e) for draw in (-1, 0.5) for e in kinds]
    found = choose(HostChoice(), inputs_of([logits] * 8, choices, 16))
    assert [chosen >= 0 for chosen in found.chosen] == [False, True, True, True] * 2
    assert (found.chosen[1:4] == logits.argmax()).all()


SETTINGS = [
    SamplingParams(
        *(greedy, temperature, top_k, top_p, min_p, penalty),
        frequency_penalty=0.3 if penalty != 1 else 0.0,
        logprobs=logprobs,
        bad_words=((3,), (5, 6)) if penalty != 1 else (),
    )
    for greedy, temperature, top_k, top_p, min_p, penalty, logprobs in itertools.product(
        (False, True), (0.6, 1.0), (0, 40), (1.0, 0.8), (0.0, 0.05), (1.0, 1.2), (0, 5)
    )
]


def picked(found: Chosen, row: int, logprobs: int) -> Picked | None:
    if found.chosen[row] < 0:
        return None
    normaliser = float(found.normaliser[row])
    pairs = zip(found.best_ids[row].tolist(), found.best_logits[row].tolist(), strict=True)
    best = {i: value - normaliser for i, value in itertools.islice(pairs, logprobs)}
    return Picked(int(found.chosen[row]), float(found.chosen_logit[row]) - normaliser, best)


def same(one: SampledToken, other: SampledToken) -> bool:
    tops = [top or {} for top in (one.top_logprobs, other.top_logprobs)]
    close = all(abs(tops[0].get(i, 1e9) - value) < 1e-11 for i, value in tops[1].items())
    return one.id == other.id and [*tops[0]] == [*tops[1]] and close


@pytest.mark.parametrize("kind", ["drawn", "of 16 bits"])
def test_it_chooses_as_the_hosts_sampler(kind: str) -> None:
    """Steps of requests with all settings; what comes before decides what is edited."""
    vocab = 1025
    asked = [replace(params, seed=seed) for seed, params in enumerate(SETTINGS)]
    pairs = [(Sampler(p, vocab, (7, 8)), Sampler(p, vocab, (7, 8))) for p in asked]
    left = 0
    for step in range(2):
        logits = [logits_of(kind, vocab, 500 * step + row) for row in range(len(asked))]
        choices = [one.choice() for one, _ in pairs]
        found = choose(HostChoice((-1) ** step), inputs_of(logits, choices, 16))
        for row, (one, other) in enumerate(pairs):
            given = picked(found, row, asked[row].logprobs)
            left += given is None
            token = one.step(logits[row] if given is None else given)
            assert same(token, other.step(logits[row])), asked[row]
    assert left == 0


def test_what_the_host_says_of_rows_without_an_answer() -> None:
    logits = logits_of("drawn", 7, 3)
    banned = Sampler(SamplingParams(bad_words=tuple((i,) for i in range(7))), 7)
    broken = Sampler(SamplingParams(), 7)
    rows = [logits, np.where(logits == logits.max(), np.nan, logits)]
    found = assert_as_graph(inputs_of(rows, [banned.choice(), broken.choice()], 16))
    assert found.chosen.tolist() == [UNDECIDED, UNDECIDED]
    with pytest.raises(ConfigError, match="banned"):
        banned.step(rows[0])
    with pytest.raises(EngineError, match="not finite"):
        broken.step(rows[1])


def test_what_a_launch_is_told_is_as_the_kernel_reads_it() -> None:
    known = library()
    assert ctypes.sizeof(launcher.Params) == known.vf_params_size()
    for name, *_ in launcher.Params._fields_:
        offset = getattr(launcher.Params, name).offset
        assert offset == known.vf_params_offset(name.encode()), name
    for name in ("THREADS", "CANDIDATES", "MOST_VOCAB", "SHARED_BYTES"):
        assert getattr(launcher, name) == known.vf_constant(name.encode()), name
    assert (launcher.REPORTED, CANDIDATES) == (REPORTED_TO_HOST, graph.CANDIDATES)
    assert launcher.shared_bytes(launcher.MOST_VOCAB) <= 48 << 10  # more is to be asked for


@pytest.mark.parametrize(
    "change",
    [
        *({"rows": 0}, {"vocab": 0}, {"vocab": (1 << 19) + 1}, {"edits": -1}, {"logits": 8}),
        *({"scratch": 8}, {"choices": 4}, {"edit_ids": 4}, {"edit_factors": 2}, {"edit_minus": 4}),
        *({"chosen": 4}, {"best_ids": 4, "told": True}, {"rows": 1 << 31}),
    ],
    ids=str,
)
def test_what_there_is_no_kernel_for(change: dict[str, Any]) -> None:
    choosing = Choosing(*[0] * 7, rows=3, vocab=10, edits=16, best_ids=4)
    launch, params = launch_of(choosing, overlap=False)
    assert (launch.grid, launch.overlaps, params.reported) == ((3, 1, 1), False, 10)
    assert launcher.scratch_bytes(3, 10) == 3 * 12 * 4
    with pytest.raises(UnsupportedError):
        launch_of(dataclasses.replace(choosing, **change), overlap=False)


def test_who_overlaps_is_compiled_to_wait() -> None:
    for target in (*TARGETS, *PTX_TARGETS.values()):
        waits = "VF_OVERLAP=1" in source_of(target).defines
        assert waits is launcher.overlaps(target) is (target.name in ("sm_90", "sm_120"))


def test_every_gpu_gets_the_kernel() -> None:
    """By the compiler that engines are built with; a block takes the registers of 1024 threads."""
    *cubins, ptx = compile_set(Nvrtc())
    assert [binary.target for binary in cubins] == list(TARGETS)
    assert ptx.target.is_ptx and b"vf_choose" in ptx.code
    for binary in cubins:
        (report,) = reports(binary.log)
        assert (report.kernel, report.stack_bytes, report.spill_store_bytes) == ("vf_choose", 0, 0)
        assert report.registers <= 64
