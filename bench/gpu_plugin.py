"""Run the TensorRT plugin's own methods on a GPU, with a stand-in for the library.

The library calls the same methods in the same order: configure, workspace, shapes, enqueue. What
it does besides (memory, streams) is torch's part. Needs torch, numpy and cuda-bindings with NVRTC.

python bench/gpu_plugin.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "plugins_cuda"))

import torch

from vlmforge_plugins.cached_attention.compile import Nvrtc, compile_set
from vlmforge_plugins.cached_attention.config import Config
from vlmforge_plugins.cached_attention.kernel_store import KernelStore
from vlmforge_plugins.cached_attention.launcher import Scales
from vlmforge_plugins.cached_attention.plugin import Attributes, _Plugin

TYPES = {
    torch.float16: "half",
    torch.bfloat16: "bf16",
    torch.int32: "int32",
    torch.float32: "float",
}
TRT = SimpleNamespace(
    DataType=SimpleNamespace(HALF="half", BF16="bf16", FP8="fp8", INT32="int32", FLOAT="float"),
    TensorFormat=SimpleNamespace(LINEAR="linear"),
)
PAGE, SEQUENCE_PAGES, HEADS, KV_HEADS, POSITIONS = 64, 12, 8, 2, 1024


def describe(tensor: torch.Tensor) -> Any:
    """What the library says of a tensor."""
    return SimpleNamespace(type=TYPES[tensor.dtype], dims=tuple(tensor.shape), format="linear")


def draw(dtype: torch.dtype, head_size: int, past: list[int], rows: int) -> list[torch.Tensor]:
    """Inputs of the plugin: pools are poisoned where no token of a sequence is."""
    batch = len(past)
    pages = batch * SEQUENCE_PAGES + 3
    table = torch.randperm(pages, device="cuda")[: batch * SEQUENCE_PAGES].view(batch, -1).int()
    pools = torch.full((2, pages, KV_HEADS, PAGE, head_size), torch.nan, device="cuda")
    for row, length in enumerate(past):
        for place in range(length):
            page = int(table[row, place // PAGE])
            pools[:, page, :, place % PAGE] = torch.randn(2, KV_HEADS, head_size, device="cuda")
    angles = torch.rand(POSITIONS, head_size // 2, device="cuda") * 6.28
    qkv = torch.randn(batch, rows, (HEADS + 2 * KV_HEADS) * head_size, device="cuda")
    lengths = torch.tensor(past, dtype=torch.int32, device="cuda")
    full = torch.full_like(lengths, rows)
    stored = [t.to(dtype).contiguous() for t in (qkv, *pools)]
    return [*stored, lengths, full, table, angles.cos(), angles.sin()]


def reference(inputs: list[torch.Tensor], past: list[int], head_size: int) -> torch.Tensor:
    """The same in float64, sequence by sequence."""
    qkv, keys, values, _, _, table, cos, sin = (t.double() for t in inputs)
    rows, widths = qkv.shape[1], [n * head_size for n in (HEADS, KV_HEADS, KV_HEADS)]
    query, key, value = qkv.split(widths, dim=-1)

    def turn(x: torch.Tensor, start: int) -> torch.Tensor:
        x = x.reshape(rows, -1, head_size)
        c, s = (t[start : start + rows].unsqueeze(1) for t in (cos, sin))
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * c - second * s, second * c + first * s), dim=-1)

    made = []
    for row, length in enumerate(past):
        pages = table[row].long()
        old = [
            p[pages].transpose(1, 2).reshape(-1, KV_HEADS, head_size)[:length]
            for p in (keys, values)
        ]
        k = torch.cat((old[0], turn(key[row], length))).repeat_interleave(HEADS // KV_HEADS, 1)
        new = value[row].reshape(rows, -1, head_size)
        v = torch.cat((old[1], new)).repeat_interleave(HEADS // KV_HEADS, 1)
        scores = torch.einsum("qhd,khd->hqk", turn(query[row], length), k) * head_size**-0.5
        places = torch.arange(length + rows, device="cuda")
        hidden = places[None] > length + torch.arange(rows, device="cuda")[:, None]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        made.append(torch.einsum("hqk,khd->qhd", weights, v).reshape(rows, -1))
    return torch.stack(made)


def check(dtype: torch.dtype, head_size: int, past: list[int], rows: int) -> float:
    """One call, then the same captured into a CUDA graph; returns the largest error."""
    name = {torch.float16: "float16", torch.bfloat16: "bfloat16"}[dtype]
    config = Config(head_size, name, name)  # type: ignore[arg-type]
    binaries = {config: compile_set(config, Nvrtc(), Path("out/kernels"))}
    inputs = draw(dtype, head_size, past, rows)
    expected = reference(inputs, past, head_size)
    attributes = Attributes(HEADS, KV_HEADS, Scales(head_size**-0.5), holds_kernels=True)
    plugin: Any = _Plugin(TRT, "PagedAttention", attributes, KernelStore(binaries))
    described = [describe(tensor) for tensor in inputs]
    ranges = [SimpleNamespace(desc=d, max=d.dims) for d in described]
    plugin.configure_plugin(ranges, [])
    scratch = torch.empty(plugin.get_workspace_size(ranges, []), dtype=torch.uint8, device="cuda")
    plugin = plugin.attach_to_context(None)
    plugin.on_shape_change(described, [])
    out = torch.full_like(inputs[0][..., : HEADS * head_size], torch.nan).contiguous()
    addresses = [t.data_ptr() for t in inputs]
    outputs = [out.data_ptr(), *addresses[1:3]]
    given = (described, [], addresses, outputs, scratch.data_ptr())
    plugin.enqueue(*given, torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    eager = out.clone()
    error = (eager.double() - expected).abs().max().item()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plugin.enqueue(*given, torch.cuda.current_stream().cuda_stream)
    out.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, eager), "the replay differs from the eager call"
    return error


def main() -> None:
    """Every case; fails when an error is larger than rounding explains."""
    torch.manual_seed(0)
    for dtype, limit in ((torch.float16, 4e-3), (torch.bfloat16, 3e-2)):
        for head_size in (64, 128):
            for past, rows in (([700, 3, 0, 64], 1), ([0, 65, 300], 200)):
                error = check(dtype, head_size, past, rows)
                print(f"plugin {dtype} head size {head_size} past {past} + {rows}: {error:.1e}")
                assert error < limit, (error, limit)
    print("plugin: 8 calls and their replays, all right")


if __name__ == "__main__":
    main()
