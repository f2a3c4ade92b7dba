"""Whether the attention kernels are right on a GPU: cases, CUDA graphs, overlapping launches."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attention_backends import CudaBackend, addresses
from attention_cases import Batch, Case, make, verify
from vlmforge.backends.number_formats import encode
from vlmforge_plugins.cached_attention.config import Config, sizes
from vlmforge_plugins.cached_attention.driver import call
from vlmforge_plugins.cached_attention.launcher import Rows, Scales, Tensors, run
from vlmforge_plugins.cached_attention.plan import Shape, apart, plan, workspace
from vlmforge_plugins.cached_attention.plan import _decode as decode_launches


def check_cases(backend: CudaBackend, cases: Sequence[Case]) -> list[str]:
    """Runs cases and prints the worst; returns what failed."""

    def judge(case: Case, batch: Batch, after: dict[str, Any]) -> tuple[str, float]:
        try:
            return "", verify(batch, after)
        except AssertionError as error:
            return f"{case.name}: {error}", float("inf")

    results = []
    with ThreadPoolExecutor(16) as pool:
        for start in range(0, len(cases), 64):  # so many are in memory at once
            some = cases[start : start + 64]
            verdicts = [
                pool.submit(judge, case, batch, backend.run(batch))
                for case, batch in zip(some, pool.map(make, some), strict=True)
            ]
            results += [verdict.result() for verdict in verdicts]
    failures = [words for words, _ in results if words]
    worst = max((share for _, share in results if np.isfinite(share)), default=0.0)
    print(
        f"  {len(cases)} cases, {len(failures)} failed; worst error {worst:.2f} x naive (limit 2)"
    )
    return failures


def check_narrow(backend: CudaBackend, cases: Sequence[Case]) -> list[str]:
    """Decode with narrow blocks, which plans take only for more rows than these cases have."""
    failures, count = [], 0
    for case in cases:
        batch = make(case)
        if batch.shape.max_query > 1:
            continue
        compiled = sizes(case.config, backend.target)
        chosen = plan(batch.shape, compiled, backend.machine)
        forced = replace(
            chosen,
            splits=1,
            launches=(chosen.launches[0], *decode_launches(batch.shape, compiled, 1, True)),
            workspace=workspace(batch.shape, case.head_size, 1),
        )
        count += 1
        try:
            verify(batch, backend.run_plan(batch, forced, backend.kernels(case.config)))
        except AssertionError as error:
            failures.append(f"narrow {case.name}: {error}")
    print(f"  {count} cases with narrow blocks, {len(failures)} failed")
    return failures


def check_graph(backend: CudaBackend, case: Case) -> list[str]:
    """A captured call, replayed after the lengths in device memory changed, equals an eager one."""
    from cuda.bindings import driver

    batch = make(case)
    shape = replace(
        batch.shape,
        max_total=batch.shape.max_pages * case.page_size,
        positions=batch.shape.max_pages * case.page_size,
    )
    chosen = plan(shape, sizes(case.config, backend.target), backend.machine)
    kernels = backend.kernels(case.config)
    stream = call(driver.cuStreamCreate, driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value)
    arrays = {**batch.arrays, "workspace": np.full(chosen.workspace.size + 256, 255, np.uint8)}
    at = {name: int(call(driver.cuMemAlloc, array.nbytes)) for name, array in arrays.items()}

    def upload(past: np.ndarray) -> None:
        for name, array in {**arrays, "past_lengths": past}.items():
            kept = np.ascontiguousarray(array)
            call(driver.cuMemcpyHtoD, at[name], kept.ctypes.data, kept.nbytes)

    def enqueue() -> None:
        run(
            chosen,
            addresses(batch, at.__getitem__, at["workspace"]),
            batch.scales,
            kernels,
            int(stream),
        )

    def output() -> np.ndarray:
        call(driver.cuStreamSynchronize, stream)
        out = np.empty_like(batch.arrays["out"])
        call(driver.cuMemcpyDtoH, out.ctypes.data, at["out"], out.nbytes)
        return out

    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL
    call(driver.cuStreamBeginCapture, stream, mode)
    enqueue()
    graph = call(driver.cuGraphInstantiate, call(driver.cuStreamEndCapture, stream), 0)
    failures = []
    for shorter in (0, 1, 17):
        past = np.maximum(batch.past - shorter, 0).astype(np.int32)
        outputs = []
        for launch in (enqueue, lambda: call(driver.cuGraphLaunch, graph, stream)):
            upload(past)
            launch()
            outputs.append(output())
        if not (outputs[0] == outputs[1]).all():
            failures.append(f"graph of {case.name} with lengths - {shorter}: replay differs")
        if shorter == 0:
            failures += _judged(batch, outputs[1])
    for pointer in at.values():
        call(driver.cuMemFree, pointer)
    return failures


def _judged(batch: Batch, out: np.ndarray) -> list[str]:
    """The outputs that must be there are."""
    rows = [out[b, :n] for b, n in enumerate(batch.new)]
    return ["graph: an output is missing"] if any((r == 0xFFFF).any() for r in rows) else []


def check_chain(backend: CudaBackend, config: Config, steps: int = 24) -> list[str]:
    """Steps of decode in a row, overlapping, equal the same launched apart, to the bit.

    Each step writes a token that the next ones read while its own write may still run.
    """
    from cuda.bindings import driver

    batch, heads, kv_heads, page_size, pages, d = 3, 16, 4, 64, 12, config.head_size
    shape = Shape(batch, 1, pages * page_size, heads, kv_heads, page_size, pages, positions=1024)
    chosen = plan(shape, sizes(config, backend.target), backend.machine)
    random = np.random.default_rng(7)
    width = (heads + 2 * kv_heads) * d
    tokens = random.standard_normal((steps, batch, width), np.float32)
    half = encode(tokens, config.activation)
    angles = random.random((2, 1024, d // 2), np.float32)
    past = np.array([5, 640 - steps, 300]) + np.arange(steps)[:, None]
    table = random.permutation(batch * pages).astype(np.int32)
    pool = np.zeros(2 * batch * pages * kv_heads * page_size * d, np.uint16)
    contents: tuple[NDArray[Any], ...] = (half, angles, past.astype(np.int32), table, pool)
    out = np.zeros((steps, batch, heads * d), np.uint16)
    results = []
    for overlapping in (True, False):
        at = [int(call(driver.cuMemAlloc, array.nbytes)) for array in (*contents, out)]
        at.append(int(call(driver.cuMemAlloc, chosen.workspace.size + 256)))
        for address, array in zip(at, (*contents, out), strict=False):
            call(
                driver.cuMemcpyHtoD, address, np.ascontiguousarray(array).ctypes.data, array.nbytes
            )
        way = chosen if overlapping else apart(chosen)
        for step in range(steps):
            first = at[0] + step * batch * width * 2
            places = (0, heads, heads + kv_heads)
            query, key, value = (Rows(first + n * d * 2, width, width) for n in places)
            to = Rows(at[5] + step * out[0].nbytes, heads * d, heads * d)
            pools = at[4], at[4] + pool.nbytes // 2
            turns = at[1], at[1] + angles[0].nbytes
            lengths = at[2] + step * batch * 4
            given = query, key, value, to
            tensors = Tensors(*given, *pools, batch * pages, *turns, lengths, 0, at[3], at[6])
            run(way, tensors, Scales(d**-0.5), backend.kernels(config), 0)
        call(driver.cuCtxSynchronize)
        found = np.empty_like(out)
        call(driver.cuMemcpyDtoH, found.ctypes.data, at[5], out.nbytes)
        results.append(found)
        for address in at:
            call(driver.cuMemFree, address)
    same = (results[0] == results[1]).all() and results[0].any(axis=2).all()
    return [] if same else [f"chain of {config.name}: overlapping and apart differ"]


GRAPH_CASES = (
    Case("decode", "float16", "float16", 128, 4, 4097, 64),
    Case("decode", "bfloat16", "float8_e4m3fn", 80, 7, 989, 16),
    Case("chunk", "float16", "float16", 128, 8, 989, 32),
)
