"""A decoder of TensorRT's plans: one, or a chain of them between which ranks meet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from msgspec import structs
from typing_extensions import override

from vlmforge.backends import LoadOptions
from vlmforge.backends.cuda.device import Device, MeetingPlace, Tensor, Work
from vlmforge.backends.cuda.frames import Arrangement, Size, arrange
from vlmforge.backends.cuda.program import Pools, Program, Span
from vlmforge.backends.plans import Library, Shapes, load_plans
from vlmforge.engine.chain import ChainStep, PartChain, Segment
from vlmforge.engine.interface import BATCH, BLOCK_TABLE, TOKENS, cache_names
from vlmforge.engine.manifest import KVLayout, Part
from vlmforge.engine.tensors import TensorSpec
from vlmforge.errors import ConfigError


class PlanProgram(Program):
    """See `Program`. Attention is inside the plans.

    Args:
        device: Runs it.
        library: What the plans were compiled by.
        folder: Of the engine.
        part: The decoder of this rank.
        kv: Its cache.
        options: How to load it.
        place: Where it meets the other ranks, if there are any.

    Raises:
        ConfigError: more is asked for than the plans were compiled for.
        BackendUnavailableError, EngineError: see `load_plans`.
    """

    outputs: int | None = 1
    gives_likeliest = False

    def __init__(
        self,
        device: Device,
        library: Library,
        folder: Path,
        part: Part,
        kv: KVLayout,
        options: LoadOptions,
        place: MeetingPlace | None = None,
    ) -> None:
        assert kv.page_size is not None
        _check_options(part, options)
        self._kv, self._page, self._place = kv, kv.page_size, place
        self._caches, self._aliases = frozenset(cache_names(kv)), part.aliases
        self._inputs = tuple(spec for spec in part.inputs if spec.name not in self._caches)
        chain = part.chain or _of_one(part)
        plans = load_plans(library, folder, [_alone(part, s) for s in chain.segments], device)
        files = (segment.file for segment in chain.segments)
        self._plans = dict(zip(files, plans, strict=True))
        self._chain = _without(chain, {*self._caches, *self._aliases})
        self._steps, self._specs = chain.steps, chain.tensors

    @override
    def inputs(self, size: Size) -> Sequence[TensorSpec]:
        # The attention plans its launches by the table's columns: no more of them than needed.
        columns = -(-size.total // self._page)
        table = structs.replace(BLOCK_TABLE, shape=(BATCH, columns))
        return tuple(table if spec.name == table.name else spec for spec in self._inputs)

    @override
    def arrange(self, size: Size) -> Arrangement:
        return arrange(self._chain, self.inputs(size), size)

    @override
    def bind(
        self, size: Size, at: Mapping[str, int], pools: Pools, spans: Sequence[Span] = ()
    ) -> Work:
        del spans  # its steps are not packed
        kv = self._kv
        layers = [pools.of(layer) for layer in range(kv.layers)]
        held = dict(zip(cache_names(kv), (pair[i] for i in (0, 1) for pair in layers), strict=True))
        held |= {after: held[before] for after, before in self._aliases.items()}
        shapes = self._shapes(size, pools)
        works = [self._work(step, size, shapes, {**at, **held}) for step in self._steps]
        return works[0] if len(works) == 1 else partial(_all, works)

    def _shapes(self, size: Size, pools: Pools) -> Shapes:
        """Of all that is bound, by name."""
        kv, given = self._kv, {spec.name: spec for spec in self.inputs(size)}
        pool = pools.pages, kv.kv_heads, self._page, kv.head_dim
        held = {*self._caches, *self._aliases}
        return {
            name: pool if name in held else size.shape(given.get(name, spec))
            for name, spec in self._specs.items()
        }

    def _work(self, step: ChainStep, size: Size, shapes: Shapes, at: Mapping[str, int]) -> Work:
        if (segment := step.segment) is not None:
            profile = "decode" if size.tokens == 1 else "prefill"
            taken = {spec.name: shapes[spec.name] for spec in segment.inputs}
            return self._plans[segment.file].bind(profile, taken, at)
        call = step.collective
        assert call is not None and self._place is not None
        given, out = (
            Tensor(name, self._specs[name].dtype, shapes[name], at[name])
            for name in (call.tensor, call.out)
        )
        return self._place.bind(call, given, out)


def _of_one(part: Part) -> PartChain:
    """A plan as a chain of nothing but it."""
    return PartChain((ChainStep(Segment(part.file, part.inputs, part.outputs, 0)),), None, {})


def _alone(part: Part, segment: Segment) -> Part:
    """What the manifest would say of a plan if it were a part."""
    return structs.replace(
        part, file=segment.file, inputs=segment.inputs, outputs=segment.outputs, chain=None
    )


def _without(chain: PartChain, caches: Iterable[str]) -> PartChain:
    """The chain as it is if nobody looks at the caches, which do not lie with the rest."""
    left = frozenset(caches)

    def kept(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(spec for spec in specs if spec.name not in left)

    steps = (
        step
        if (own := step.segment) is None
        else ChainStep(structs.replace(own, inputs=kept(own.inputs), outputs=kept(own.outputs)))
        for step in chain.steps
    )
    return structs.replace(chain, steps=tuple(steps))


def _all(works: Sequence[Work]) -> None:
    for work in works:
        work()


def _check_options(part: Part, options: LoadOptions) -> None:
    """Refuse what the plan was not compiled for (ConfigError)."""
    for field, asked, dim in (
        ("max_batch_size", options.slots, BATCH),
        ("max_prefill_token_num", options.chunk, TOKENS),
    ):
        most = max(profile.dims[dim].most for profile in part.profiles)
        if asked > most:
            raise ConfigError(
                f"{field} is larger than what the plan was compiled for.",
                found=f"{field}={asked}",
                expected=f"at most {most}",
                fix=f"EngineConfig({field}={most}), or build-engine --max-batch-size {asked}"
                if dim == BATCH
                else f"EngineConfig({field}={most})",
            )
