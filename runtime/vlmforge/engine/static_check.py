"""What can be said of an engine where it cannot be run: is its description whole and consistent?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest

from msgspec import Struct

from vlmforge.engine.bundle import Bundle
from vlmforge.engine.chain import PartChain, SumNorm
from vlmforge.engine.interface import fits, interface_of
from vlmforge.engine.layer_report import read_layers
from vlmforge.engine.manifest import Part, decoder_name
from vlmforge.engine.tensors import TensorSpec
from vlmforge.errors import EngineFormatError

_COLLECTIVE = "DIST_COLLECTIVE"  # TensorRT's type of layer
_ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "int8": 1, "uint8": 1}


class StaticResult(Struct, frozen=True):
    """One check of one part; `detail` says what was seen."""

    part: str
    check: str
    passed: bool
    detail: str


Finding = tuple[bool, str]


def check_static(bundle: Bundle) -> Iterator[StaticResult]:
    """Check the parts of an engine whose files are those of its manifest; nothing is run."""
    checks: dict[str, Callable[[Bundle, Part], Finding]] = {
        "files": _files,
        "layers": _layers,
        "profiles": _profiles,
        "interface": _interface,
        "caches": _caches,
        "aliases": _aliases,
        "ranks": _ranks,
        "weights": _weights,
    }
    for part in bundle.manifest.parts:
        for name, check in checks.items():
            yield StaticResult(part.name, name, *check(bundle, part))


def _files(bundle: Bundle, part: Part) -> Finding:
    known = {entry.path for entry in bundle.manifest.files}
    missing = [name for name in (part.file, *part.data) if name not in known]
    return not missing, f"not in the manifest: {', '.join(missing)}" if missing else part.file


def _layers(bundle: Bundle, part: Part) -> Finding:
    if part.layers is None:
        return True, "no layer report: the part is a graph"
    try:
        report = read_layers(bundle.folder / part.layers)
    except EngineFormatError as error:
        return False, error.found
    found = ", ".join(f"{count} {kind}" for kind, count in list(report.histogram.items())[:4])
    return bool(report.layers), f"{len(report.layers)} layers: {found}, ..."


def _profiles(bundle: Bundle, part: Part) -> Finding:
    del bundle
    symbols = {dim for spec in part.inputs for dim in spec.shape if isinstance(dim, str)}
    for profile in part.profiles:
        if missing := symbols - set(profile.dims):
            return False, f"{profile.name} has no range of {', '.join(sorted(missing))}"
        for name, dim in profile.dims.items():
            if not 1 <= dim.least <= dim.usual <= dim.most:
                return False, f"{profile.name}: {name} from {dim.least} to {dim.most}"
    names = ", ".join(profile.name for profile in part.profiles)
    return True, names or "none: any shape"


def _interface(bundle: Bundle, part: Part) -> Finding:
    wrong = [name for name in _unlisted(bundle, part) if not _is_cache(name)]
    if wrong:
        return False, f"not as the runtime binds them: {', '.join(wrong)}"
    return True, f"{len(part.inputs)} inputs, {len(part.outputs)} outputs"


def _caches(bundle: Bundle, part: Part) -> Finding:
    caches = [spec.name for spec in part.inputs if _is_cache(spec.name)]
    wrong = [name for name in _unlisted(bundle, part) if _is_cache(name)]
    kv = bundle.manifest.kv
    if wrong:
        return False, f"{len(caches)} of {2 * kv.layers}; not as the KV layout: {wrong}"
    pages = f"pages of {kv.page_size} tokens" if kv.page_size else "dense"
    return True, f"{len(caches)} in {kv.dtype}, {pages}" if caches else "none"


def _is_cache(name: str) -> bool:
    return "." in name  # one tensor of many


def _unlisted(bundle: Bundle, part: Part) -> Iterator[str]:
    """Names of inputs and outputs that are not those of the runtime's list, or not there."""
    listed = interface_of(bundle.manifest, part.name)
    for found, wanted in ((part.inputs, listed.inputs), (part.outputs, listed.outputs)):
        for spec, by_list in zip_longest(found, wanted):
            if spec is None or by_list is None or not fits(spec, by_list):
                yield (spec or by_list).name


def _aliases(bundle: Bundle, part: Part) -> Finding:
    del bundle
    inputs = {spec.name: (spec.dtype, spec.shape) for spec in part.inputs}
    outputs = {spec.name: (spec.dtype, spec.shape) for spec in part.outputs}
    for out, source in part.aliases.items():
        if out not in outputs or inputs.get(source) != outputs[out]:
            return False, f"{out} cannot be where {source} is"
    return True, f"{len(part.aliases)} outputs are written where an input is"


def _ranks(bundle: Bundle, part: Part) -> Finding:
    """Whether what a rank gives where all meet is of the shape that the first one's is."""
    tp, first = bundle.manifest.parallel.tp, bundle.manifest.part(decoder_name(0))
    if tp > 1 and part.chain is None and part.layers is not None and part.name != "vision":
        met, wanted_met = (_collectives(bundle, plan) for plan in (part, first))
        return met == wanted_met != (), f"meets {tp - 1} others {len(met)} times, in the plan"
    if tp == 1 or part.chain is None or first.chain is None:
        return True, "one: nobody to meet" if tp == 1 else "has no other"
    own, others = _given(part.chain), _given(first.chain)
    for meeting in part.chain.collectives:
        found, wanted = own.get(meeting.tensor), others.get(meeting.tensor)
        if found is None or found != wanted:
            return False, f"{meeting.tensor} is {found}, and of the first rank {wanted}"
        last = found.shape[-1]
        if meeting.width is not None and isinstance(last, int) and meeting.width > tp * last:
            return False, f"{meeting.tensor}: {meeting.width} columns of {tp} times {last}"
        if (norm := meeting.norm) is not None and not _has_scale(bundle, norm, found):
            return False, f"{norm.out}: no scale for {found} at {norm.offset} of {norm.file}"
    normed = sum(meeting.norm is not None for meeting in part.chain.collectives)
    words = f"meets {tp - 1} others {len(part.chain.collectives)} times"
    return True, words + (f", {normed} with the norm behind it" if normed else "")


def _weights(bundle: Bundle, part: Part) -> Finding:
    """Whether what graphs take as inputs is in its file, and alike wherever a graph is run."""
    if part.chain is None:
        return True, "in its graph"
    sizes, count = {entry.path: entry.size for entry in bundle.manifest.files}, 0
    for file, (first, *others) in part.chain.kinds.items():
        if any(segment.form != first.form for segment in others):
            return False, f"segments of {file} differ in names, dtypes or shapes of what it takes"
        for weight in (weight for segment in (first, *others) for weight in segment.weights):
            spec, count = weight.tensor, count + 1
            shape = [dim for dim in spec.shape if isinstance(dim, int)]
            size = _ITEM_BYTES.get(spec.dtype, 0) * math.prod(shape)
            whole = size and len(shape) == len(spec.shape)
            if not whole or weight.offset + size > sizes.get(weight.file, 0):
                kind = f"{spec.dtype} {list(spec.shape)}"
                return False, f"{spec.name}: no {kind} at {weight.offset} of {weight.file}"
    return True, f"{count} are bound to {len(part.chain.kinds)} graphs" if count else "in graphs"


def _has_scale(bundle: Bundle, norm: SumNorm, summed: TensorSpec) -> bool:
    """Whether what a norm multiplies by can be where it is said to be."""
    sizes = {entry.path: entry.size for entry in bundle.manifest.files}
    item, width = _ITEM_BYTES.get(summed.dtype, 0), summed.shape[-1]
    assert isinstance(width, int)
    return norm.offset % (item or 1) == 0 and norm.offset + width * item <= sizes.get(norm.file, 0)


def _collectives(bundle: Bundle, part: Part) -> tuple[object, ...]:
    """Types and shapes of what a plan's ranks meet over, in order."""
    if part.layers is None:
        return ()
    layers = read_layers(bundle.folder / part.layers).layers
    met = (layer.outputs for layer in layers if layer.type == _COLLECTIVE)
    return tuple((out.dtype, out.shape) for outputs in met for out in outputs)


def _given(chain: PartChain) -> Mapping[str, TensorSpec]:
    return {spec.name: spec for segment in chain.segments for spec in segment.outputs}
