"""Graphs as plans of TensorRT: one, or a chain of them between which ranks meet.

Each is compiled by a process of its own from files beside it, which go when it is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir
from msgspec import structs

from vlmforge.engine.chain import PartChain, Segment
from vlmforge.engine.layer_report import LayerReport, read_layers
from vlmforge.engine.manifest import Profile
from vlmforge.engine.schema import to_json
from vlmforge.env import writable_cache
from vlmforge_builder.chain_file import chain_steps, save_segments
from vlmforge_builder.kernel_files import write_meetings
from vlmforge_builder.onnx_file import refer
from vlmforge_builder.ops import DOMAIN
from vlmforge_builder.passes.cut_chain import cut_chain
from vlmforge_builder.targets import CompileJob
from vlmforge_builder.tensorrt.flavours import Flavour, capability_name
from vlmforge_builder.tensorrt.job import CompileRequest, KernelSet
from vlmforge_builder.tensorrt.process import Compiled, run_compiler
from vlmforge_builder.weights import Layout, write


@dataclass(frozen=True, slots=True)
class PlanJob:
    """How graphs of a part become plans.

    Attributes:
        flavour: The library.
        profiles: What they are compiled for.
        kernels: Of the attention inside; None: there is none of ours.
        job: Of the part, with the weights of its rank.
    """

    flavour: Flavour
    profiles: Sequence[Profile]
    kernels: KernelSet | None
    job: CompileJob

    @property
    def layers(self) -> str:
        """The file that tells of all layers."""
        return f"{self.job.stem}.layers.json"


def write_plan(model: ir.Model, layout: Layout, wanted: PlanJob) -> str:
    """Compile the graph; returns the plan's file (BuildError: see `run_compiler`)."""
    job, file = wanted.job, f"{wanted.job.stem}.plan"
    if job.described:
        return file
    with TemporaryDirectory(prefix=f".{job.stem}.", dir=job.folder) as scratch:
        data, graph = (Path(scratch) / f"{job.stem}.{kind}" for kind in ("data", "onnx"))
        refer(model, layout, data)
        ir.save(model, graph)
        _write_weights(data, layout, job)
        _compile({graph: wanted.kernels}, Path(scratch), wanted)
    return file


def write_chain(model: ir.Model, layout: Layout, wanted: PlanJob) -> PartChain:
    """Cut the graph where ranks meet, and compile each piece (BuildError: see `run_compiler`).

    Of all pieces with attention, the first one's plan carries the kernels.
    """
    job = wanted.job
    with TemporaryDirectory(prefix=f".{job.stem}.", dir=job.folder) as name:
        scratch = Path(name)
        data = scratch / f"{job.stem}.data"
        refer(model, layout, data)
        cut = cut_chain(model)
        graphs = save_segments(cut.pieces, job.stem, scratch)
        plans = [structs.replace(segment, file=_plan_of(segment)) for segment in graphs]
        meetings: Mapping[str, str] = {}
        if not job.described:
            _write_weights(data, layout, job)
            ours = [any(n.domain == DOMAIN for n in piece.graph) for piece in cut.pieces]
            asked = {
                scratch / segment.file: wanted.kernels if own else None
                for segment, own in zip(graphs, ours, strict=True)
            }
            _compile(asked, scratch, wanted)
            meetings = write_meetings(job.folder)
    return PartChain(chain_steps(plans, cut.between), None, {}, None, meetings)


def _plan_of(segment: Segment) -> str:
    return Path(segment.file).with_suffix(".plan").name


def _write_weights(data: Path, layout: Layout, job: CompileJob) -> None:
    for done, total in write(data, layout, job.part.weights, job.store):
        job.report(done, 2 * total)  # the other half is the compiler's


def _compile(graphs: Mapping[Path, KernelSet | None], scratch: Path, wanted: PlanJob) -> None:
    """Compile graphs, which may have attention with these kernels, one after the other."""
    job, found, reports = wanted.job, list[Compiled](), list[LayerReport]()
    for index, (graph, kernels) in enumerate(graphs.items()):

        def report(done: int, steps: int, before: int = len(graphs) + index) -> None:
            job.report(before * steps + done, 2 * len(graphs) * steps)

        request = _request(graph, kernels, scratch, wanted)
        found.append(run_compiler(wanted.flavour, request, report))
        reports.append(read_layers(Path(request.layers)))
    whole = LayerReport(tuple(layer for one in reports for layer in one.layers))
    (job.folder / wanted.layers).write_text(to_json(whole), "utf-8")
    peak = max(one.peak_rss_bytes for one in found) / 2**30
    many = "" if len(found) == 1 else f"{len(found)} plans "
    job.note(
        f"{job.stem}: {many}compiled by {wanted.flavour.name} {found[0].version}, "
        f"peak memory of its process {peak:.2f} GiB"
    )


def _request(
    graph: Path, kernels: KernelSet | None, scratch: Path, wanted: PlanJob
) -> CompileRequest:
    job = wanted.job
    return CompileRequest(
        module=wanted.flavour.module,
        graph=str(graph),
        plan=str(job.folder / graph.with_suffix(".plan").name),
        layers=str(graph.with_suffix(".layers.json")),
        profiles=tuple(
            {dim: (r.least, r.usual, r.most) for dim, r in profile.dims.items()}
            for profile in wanted.profiles
        ),
        capability=capability_name(wanted.flavour, job.settings.compute_capability),
        kernels=kernels,
        # Without a cache they are compiled again the next time.
        cache=str(writable_cache("kernels") or scratch / "kernels"),
    )
