"""What other ways to run the same decoder take for a step on this GPU, with random weights.

    python3 bench/gpu_yardsticks.py torch --batch 1:640 8:1024 32:1024 64:1024
    python3 bench/gpu_yardsticks.py onnxruntime --work FOLDER --like results.jsonl

`torch`: F.linear and SDPA over dense caches, in a CUDA graph. `onnxruntime`: one session with
GroupQueryAttention, caches in place, and ONNX Runtime's own CUDA graph. Each is a decoder of
LLaVA v1.5 7B alone: embedding, layers, head, and for torch the likeliest token; no scheduling, no
text. `--like` takes batches and contexts from what `gpu_steps.py decode` wrote.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpu_results import Results, attempts, middle, seconds_of
from gpu_steps import DEFAULT


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a decoder."""

    layers: int = 32
    hidden: int = 4096
    inner: int = 11008
    heads: int = 32
    kv_heads: int = 32
    width: int = 128
    vocab: int = 32064

    @property
    def packed(self) -> int:
        """Width of queries, keys and values together."""
        return (self.heads + 2 * self.kv_heads) * self.width


SMALL = Shape(2, 128, 256, 4, 2, 32, 256)


def median_ms(step: Callable[[], object], times: int = 30) -> float:
    """Of a step that is waited for; the first few are not counted."""
    for _ in range(4):
        step()
    return middle([seconds_of(step) for _ in range(times)]) * 1e3


# --- torch ----------------------------------------------------------------------------------------


def by_torch(shape: Shape, sizes: Sequence[tuple[int, int]], results: Results) -> None:
    """Steps in CUDA graphs."""
    import torch

    made = TorchDecoder(shape)
    for batch, context in sizes:
        graph, run = torch.cuda.CUDAGraph(), made.step(batch, context)
        side = torch.cuda.Stream()
        with torch.no_grad(), torch.cuda.stream(side):
            run()  # libraries choose and allocate
            side.synchronize()
            with torch.cuda.graph(graph, stream=side):
                run()

        def replay(graph: Any = graph) -> None:
            graph.replay()
            torch.cuda.synchronize()

        results.add(
            "yardstick", by="torch", batch=batch, context=context, step_ms=median_ms(replay)
        )
        del graph, run
        torch.cuda.empty_cache()


class TorchDecoder:
    """A decoder of random weights; gate and up are one product, and so are q, k and v."""

    def __init__(self, shape: Shape, device: str = "cuda") -> None:
        import torch

        self._shape, self._device = shape, device
        self._float = torch.float16 if device == "cuda" else torch.float32

        def drawn(rows: int, columns: int) -> Any:
            made = torch.randn(rows, columns, device=device, dtype=self._float)
            return made.mul_(columns**-0.5)

        s = shape
        self._table, self._head = drawn(s.vocab, s.hidden), drawn(s.vocab, s.hidden)
        self._one = torch.ones(s.hidden, device=device, dtype=self._float)
        self._layers = [
            (
                drawn(s.packed, s.hidden),
                drawn(s.hidden, s.heads * s.width),
                drawn(2 * s.inner, s.hidden),
                drawn(s.hidden, s.inner),
            )
            for _ in range(s.layers)
        ]

    def step(self, batch: int, context: int) -> Callable[[], Any]:
        """A step of `batch` rows, whose caches hold `context` tokens with the new one."""
        import torch
        from torch.nn import functional

        s, device = self._shape, self._device
        ids = torch.randint(0, s.vocab, (batch,), device=device)
        place = torch.tensor([context - 1], device=device)
        angles = torch.rand(s.width // 2, device=device)
        cos, sin = angles.cos().to(self._float), angles.sin().to(self._float)
        shape = (s.layers, 2, batch, s.kv_heads, context, s.width)
        caches = torch.randn(shape, device=device, dtype=self._float)

        def turned(x: Any) -> Any:
            first, second = x.chunk(2, -1)
            return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

        def norm(x: Any) -> Any:
            return functional.rms_norm(x, (s.hidden,), self._one, 1e-5)

        def run() -> Any:
            x = functional.embedding(ids, self._table)
            for (packed, out, up, down), (keys, values) in zip(self._layers, caches, strict=True):
                made = functional.linear(norm(x), packed).view(batch, -1, 1, s.width)
                query, key, value = made.split((s.heads, s.kv_heads, s.kv_heads), 1)
                keys.index_copy_(2, place, turned(key))
                values.index_copy_(2, place, value)
                grouped = s.heads != s.kv_heads
                mixed = functional.scaled_dot_product_attention(
                    turned(query), keys, values, enable_gqa=grouped
                )
                x = x + functional.linear(mixed.reshape(batch, -1), out)
                gate, upper = functional.linear(norm(x), up).chunk(2, -1)
                x = x + functional.linear(functional.silu(gate) * upper, down)
            return functional.linear(norm(x), self._head).argmax(-1)

        return run


# --- ONNX Runtime ---------------------------------------------------------------------------------


def write(folder: Path, shape: Shape, most: int, dtype: str = "float16") -> Path:
    """A graph of the whole decoder; all its matrices are read from the same numbers in one file."""
    import onnx
    from onnx import TensorProto, helper

    element = {"float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT}[dtype]
    folder.mkdir(parents=True, exist_ok=True)
    size = np.dtype(dtype).itemsize
    numbers = np.random.default_rng(0).standard_normal(_drawn(shape), np.float32)
    (numbers * np.float32(shape.hidden**-0.5)).astype(dtype).tofile(folder / "weights.data")
    kept: list[Any] = []

    def matrix(name: str, rows: int, columns: int) -> str:
        made = onnx.TensorProto(name=name, data_type=element, dims=[rows, columns])
        made.data_location = TensorProto.EXTERNAL
        places = {"location": "weights.data", "offset": 0, "length": rows * columns * size}
        for key, value in places.items():
            made.external_data.add(key=key, value=str(value))
        kept.append(made)
        return name

    def vector(name: str, values: Any) -> str:
        kept.append(onnx.numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    angles = np.outer(np.arange(most), 1e4 ** -(np.arange(0, 1, 2 / shape.width)))
    cos, sin = vector("cos", np.cos(angles)), vector("sin", np.sin(angles))
    vector("one", np.ones(shape.hidden))
    nodes = list(_nodes(helper, shape, matrix, cos, sin))
    caches = ("batch", shape.kv_heads, most, shape.width)
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ("batch", 1))]
    inputs += [
        helper.make_tensor_value_info("past", TensorProto.INT32, ("batch",)),
        helper.make_tensor_value_info("total", TensorProto.INT32, (1,)),
    ]
    outputs = [helper.make_tensor_value_info("logits", element, ("batch", 1, shape.vocab))]
    for layer in range(shape.layers):
        for kind in ("key", "value"):
            inputs.append(helper.make_tensor_value_info(f"past.{kind}.{layer}", element, caches))
            outputs.append(
                helper.make_tensor_value_info(f"present.{kind}.{layer}", element, caches)
            )
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, kept)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    path = folder / "decoder.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def _drawn(shape: Shape) -> int:
    """Numbers of the largest matrix."""
    return max(2 * shape.inner, shape.vocab, shape.packed) * shape.hidden


def _nodes(
    helper: Any, s: Shape, matrix: Callable[[str, int, int], str], cos: str, sin: str
) -> Iterator[Any]:
    def product(given: str, name: str, rows: int, columns: int) -> Any:
        return helper.make_node("MatMul", [given, matrix(name, rows, columns)], [f"{name}.out"])

    def skipped(one: str, other: str, name: str) -> Any:
        outputs = [f"{name}.norm", "", "", f"{name}.sum"]
        kind = "SkipSimplifiedLayerNormalization"
        inputs, domain = [one, other, "one"], "com.microsoft"
        return helper.make_node(kind, inputs, outputs, domain=domain, epsilon=1e-5)

    yield helper.make_node("Gather", [matrix("table", s.vocab, s.hidden), "input_ids"], ["x.sum"])
    first = ["x.sum", "one"]
    yield helper.make_node("SimplifiedLayerNormalization", first, ["x.norm"], epsilon=1e-5, axis=-1)
    last = "x"
    for i in range(s.layers):
        yield product(f"{last}.norm", f"qkv.{i}", s.hidden, s.packed)
        caches = [f"{kind}.{i}" for kind in ("key", "value")]
        yield helper.make_node(
            "GroupQueryAttention",
            [f"qkv.{i}.out", "", "", *(f"past.{c}" for c in caches), "past", "total", cos, sin],
            [f"mixed.{i}", *(f"present.{c}" for c in caches)],
            domain="com.microsoft",
            num_heads=s.heads,
            kv_num_heads=s.kv_heads,
            do_rotary=1,
        )
        yield product(f"mixed.{i}", f"o.{i}", s.heads * s.width, s.hidden)
        yield skipped(f"{last}.sum", f"o.{i}.out", f"a.{i}")
        yield product(f"a.{i}.norm", f"up.{i}", s.hidden, 2 * s.inner)
        halves = [f"gate.{i}", f"upper.{i}"]
        yield helper.make_node("Split", [f"up.{i}.out"], halves, axis=-1, num_outputs=2)
        silu = helper.make_node(
            "QuickGelu", [halves[0]], [f"s.{i}"], domain="com.microsoft", alpha=1.0
        )
        yield silu
        yield helper.make_node("Mul", [f"s.{i}", halves[1]], [f"inner.{i}"])
        yield product(f"inner.{i}", f"down.{i}", s.inner, s.hidden)
        yield skipped(f"a.{i}.sum", f"down.{i}.out", f"m.{i}")
        last = f"m.{i}"
    yield helper.make_node(
        "MatMul", [f"{last}.norm", matrix("head", s.hidden, s.vocab)], ["logits"]
    )


def by_onnxruntime(
    shape: Shape, sizes: Sequence[tuple[int, int]], results: Results, work: Path
) -> None:
    """Steps in ONNX Runtime's own CUDA graphs; all caches are as long as the longest."""
    from vlmforge.ort import ort

    ort.set_default_logger_severity(3)
    ort.preload_dlls()
    most = max(context for _, context in sizes)
    path = write(work, shape, most)
    began = time.perf_counter()
    settings = {"enable_cuda_graph": "1", "sdpa_kernel": "1"}
    session = ort.InferenceSession(path, providers=[("CUDAExecutionProvider", settings)])
    assert session.get_providers()[0] == "CUDAExecutionProvider", session.get_providers()
    results.add("load", engine="yardstick, onnxruntime", load_s=time.perf_counter() - began)
    for index, (batch, context) in enumerate(sizes):
        run = bound(ort, session, shape, batch, (context, most), graph=index + 1)
        row = {"batch": batch, "context": context, "step_ms": median_ms(run)}
        results.add("yardstick", by="onnxruntime", **row)


def bound(
    ort: Any,
    session: Any,
    s: Shape,
    batch: int,
    tokens: tuple[int, int],
    *,
    graph: int = 0,
    kind: str = "cuda",
) -> Callable[[], None]:
    """A step whose tensors have their places; captured in the graph of this number.

    `tokens`: that the caches hold with the new one, and that they have room for.
    """
    options, binding, (context, most) = ort.RunOptions(), session.io_binding(), tokens
    options.add_run_config_entry("gpu_graph_id", str(graph))
    dtype = {"tensor(float16)": np.float16, "tensor(float)": np.float32}
    number = dtype[session.get_outputs()[0].type]

    def on_device(values: Any) -> Any:
        return ort.OrtValue.ortvalue_from_numpy(values, kind, 0)

    def empty(*dims: int) -> Any:
        return ort.OrtValue.ortvalue_from_shape_and_type(dims, number, kind, 0)

    kept = {
        "input_ids": on_device(np.ones((batch, 1), np.int64)),
        "past": on_device(np.full(batch, context - 1, np.int32)),
        "total": ort.OrtValue.ortvalue_from_numpy(np.array([context], np.int32)),
    }
    outputs = {"logits": empty(batch, 1, s.vocab)}
    for layer in range(s.layers):
        for name in ("key", "value"):
            cache = empty(batch, s.kv_heads, most, s.width)
            kept[f"past.{name}.{layer}"] = outputs[f"present.{name}.{layer}"] = cache
    for name, value in kept.items():
        binding.bind_ortvalue_input(name, value)
    for name, value in outputs.items():
        binding.bind_ortvalue_output(name, value)

    def run() -> None:
        session.run_with_iobinding(binding, options)
        assert kept and outputs  # their memory is in use

    return run


# --- the command line -----------------------------------------------------------------------------


def sizes_of(wanted: Sequence[str], like: Results) -> list[tuple[int, int]]:
    """Batches and contexts as they were measured, or else as they are asked for."""
    rows = [row for row in like.of("decode") if "float16" in row["engine"]]
    found = {row["batch"]: row["context"] for row in rows}
    asked = [(int(batch), int(context)) for batch, context in (w.split(":") for w in wanted)]
    return [(batch, found.get(batch, context)) for batch, context in asked]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("by", nargs="+", choices=("torch", "onnxruntime"))
    parser.add_argument("--batch", nargs="+", default=list(DEFAULT), metavar="BATCH:CONTEXT")
    parser.add_argument("--like", type=Path, help="results of gpu_steps.py")
    parser.add_argument("--work", type=Path, default=Path("out/yardstick"))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    sizes, results = sizes_of(given.batch, Results(given.like)), Results(given.out)
    works: dict[str, Callable[[], object]] = {
        "torch": lambda: by_torch(Shape(), sizes, results),
        "onnxruntime": lambda: by_onnxruntime(Shape(), sizes, results, given.work),
    }
    attempts([(f"yardstick {name}", works[name]) for name in given.by])


if __name__ == "__main__":
    main()
