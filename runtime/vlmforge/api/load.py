"""`pipeline(...)`: from a path to something that answers."""

from __future__ import annotations

import copy
import dataclasses
import logging
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import structs

from vlmforge import env
from vlmforge.api.arguments import path_text
from vlmforge.api.config import EngineConfig, VisionConfig
from vlmforge.api.memory import feature_bytes, load_options, most_chunk, window_is_fixed
from vlmforge.api.parallel import check_processors, devices_of
from vlmforge.api.pipeline import Pipeline
from vlmforge.backends import load_backend
from vlmforge.engine.build_cache import cut_engine, engine_for
from vlmforge.engine.bundle import open_bundle
from vlmforge.engine.images.pixels import AS_ENGINE, PixelRange
from vlmforge.engine.manifest import MANIFEST_FILE, Manifest, load_manifest
from vlmforge.errors import ConfigError
from vlmforge.field_rules import Instance, OrNone, check_value, shown, use_instead
from vlmforge.inputs.template_choice import choose_template
from vlmforge.inputs.template_config import ChatTemplateConfig
from vlmforge.limits import available_memory, keep_freed, settle_heap
from vlmforge.runner.features import USUAL_BUDGET, FeatureCache
from vlmforge.runner.load import load_engine
from vlmforge.runner.stages import Engine
from vlmforge.scheduler.loop import Loop

if TYPE_CHECKING:
    from vlmforge.backends.ranks.mpi import World

logger = logging.getLogger("vlmforge")


def pipeline(
    model_path: str | Path,
    backend_config: EngineConfig | None = None,
    chat_template_config: ChatTemplateConfig | None = None,
    vision_config: VisionConfig | None = None,
    log_level: str = "WARNING",
    **kwargs: object,
) -> Pipeline:
    """Load an engine, ready to answer.

    Args:
        model_path: An engine directory. A checkpoint folder or hub id works too: an engine is
            built from it once, by a child process, and kept in the cache directory.
        backend_config: Window, batch size, threads and more.
        chat_template_config: Replaces the engine's chat template, or parts of it.
        vision_config: Views in one run of the vision part, what is behind transparent images,
            and which images may be read.
        log_level: Level of the logger "vlmforge".
        **kwargs: Fields of `EngineConfig` or `ChatTemplateConfig`, as older programs pass them;
            `model_name` chooses the template if no `chat_template_config` does. Others are refused
            but for `trust_remote_code`, which may be anything: no code of a checkpoint is run.

    Raises:
        EngineError: the engine cannot be used here.
        BuildError: a checkpoint could not be built.
        ConfigError: a configuration is out of range or asks for what the engine does not have.
    """
    _set_level(log_level)
    settle_heap()
    path = path_text(model_path)
    _check_kinds(backend_config, chat_template_config, vision_config)
    config, template_config = _apply(kwargs, backend_config or EngineConfig(), chat_template_config)
    config.validate()
    if template_config is not None:
        template_config.validate()
    ranks = _launched(config)
    vision = vision_config or VisionConfig()
    vision.validate()
    folder = _engine(path, config)
    _check_pixels(folder, vision, config)
    free = _available_memory() if ranks is None else ranks.room()
    features = feature_bytes(vision.feature_cache_bytes, free)
    vision = dataclasses.replace(vision, feature_cache_bytes=features)
    finished = (env.expanded(path) / MANIFEST_FILE).exists()
    with _patience(f"vlmforge: checking and loading {folder} ..."):
        engine = _load(folder, config, template_config, free, features, finished=finished)
    if vision.background is not None:
        engine = engine.on_background(vision.background)
    engine = engine.with_pixels(PixelRange(vision.min_pixels, vision.max_pixels))
    engine = dataclasses.replace(engine, limits=vision.image_limits())
    return serve(engine, config, vision)


def serve(engine: Engine, config: EngineConfig, vision: VisionConfig) -> Pipeline:
    """A pipeline for an engine that is loaded already, which is the caller's as well."""
    engine = copy.copy(engine)  # when it is closed it lets the parts of its own one go
    budget = vision.feature_cache_bytes
    features = FeatureCache(
        engine.encode,
        batch=max(int(vision.max_batch_size), engine.views),
        budget=USUAL_BUDGET if budget is None else int(budget),
    )
    loop = Loop(
        engine,
        features,
        chunk=_chunk(config.max_prefill_token_num, engine),
        reuse_prefixes=config.enable_prefix_caching,
    )
    return Pipeline(engine, loop, max_queued_requests=int(config.max_queued_requests))


def _check_kinds(engine: object, template: object, vision: object) -> None:
    for name, given, kind, words in (
        ("backend_config", engine, EngineConfig, "an EngineConfig"),
        ("chat_template_config", template, ChatTemplateConfig, "a ChatTemplateConfig"),
        ("vision_config", vision, VisionConfig, "a VisionConfig"),
    ):
        check_value(f"pipeline(): {name}", name, given, OrNone(Instance(kind, words)))


def _load(
    folder: Path,
    config: EngineConfig,
    template: ChatTemplateConfig | None,
    free: float,
    features: int,
    *,
    finished: bool,
) -> Engine:
    """Within `free` bytes, `features` of them for images; `finished`: not built for this call."""
    bundle = open_bundle(folder)
    manifest = bundle.manifest
    keep_freed(sum(part.loaded_bytes for part in manifest.parts))
    _check_devices(config, manifest)
    if finished:
        _check_finished(config, manifest)
    devices = devices_of(config.devices, manifest.parallel.tp)
    own = load_backend(manifest.backend).memory(devices)
    options = load_options(bundle, config, free - features if own is None else own.bytes, features)
    mpi = config.communicator == "mpi"
    options = structs.replace(options, mpi=mpi, devices=devices)
    frozen = bundle.text(manifest.prompt.template_file)
    return load_engine(bundle, choose_template(manifest.prompt, frozen, template), options)


@contextmanager
def _patience(text: str) -> Iterator[None]:
    """Say `text` on standard error if the block takes longer than two seconds."""
    timer = threading.Timer(2.0, print, (text,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _chunk(asked: int | None, engine: Engine) -> int:
    most = most_chunk(engine.manifest)
    if asked is not None and asked > most:
        logger.warning(
            "max_prefill_token_num=%s: %d tokens are run at once, to keep memory in bounds; "
            "answers do not depend on it",
            shown(asked),
            most,
        )
    # A decoder was loaded for no more.
    loaded = engine.options.chunk if engine.options.paged else most
    return loaded if asked is None else min(int(asked), loaded)


def _set_level(level: object) -> None:
    if not isinstance(level, str) or level not in logging.getLevelNamesMapping():
        raise ConfigError(
            "log_level is not known.",
            found=f"log_level={shown(level)}",
            expected=", ".join(logging.getLevelNamesMapping()),
            fix="log_level='WARNING'",
        )
    logger.setLevel(level)


def _apply(
    kwargs: Mapping[str, object], config: EngineConfig, template: ChatTemplateConfig | None
) -> tuple[EngineConfig, ChatTemplateConfig | None]:
    """Move keyword arguments to the configuration that has a field of that name."""
    engine_fields = {f.name for f in dataclasses.fields(EngineConfig)}
    template_fields = {f.name for f in dataclasses.fields(ChatTemplateConfig)}
    value: Any
    for name, value in kwargs.items():
        if name == "model_name":
            if template is None and value is not None:
                template = ChatTemplateConfig(value)
        elif name in engine_fields:
            config = dataclasses.replace(config, **{name: value})
        elif name in template_fields and template is not None:
            template = dataclasses.replace(template, **{name: value})
        elif not (name == "trust_remote_code" or value is None):
            # Nothing is ever executed from a checkpoint, so that one may say what it likes.
            raise ConfigError(
                f"pipeline() has no argument {name!r}.",
                found=f"{name}={shown(value)}",
                expected="backend_config, chat_template_config, vision_config, log_level, or a "
                "field of EngineConfig",
                fix=use_instead(name, sorted(engine_fields)),
            )
    return config, template


def _engine(path: str, config: EngineConfig) -> Path:
    """The engine of `path`, of as many ranks as are asked for.

    One of a checkpoint is built for the window asked for only where that cannot be made at load:
    an engine takes long to build, and all the space of its weights.
    """
    options, asked = _build_options(config), config.session_len
    folder = engine_for(path, options)
    if folder == env.expanded(path):
        # Nobody asks for one rank by name: it is the default, and an engine knows better.
        if config.tp == 1 and config.devices is None:
            return folder
        manifest = load_manifest(folder)
        _check_devices(config, manifest)
        if config.tp in (1, manifest.parallel.tp):
            return folder
        _check_whole(manifest, int(config.tp))
        return cut_engine(folder, int(config.tp))
    if asked is None:
        return folder
    manifest = load_manifest(folder)
    if asked > manifest.decode.session_len and window_is_fixed(manifest):
        return engine_for(path, {**options, "session-len": str(asked)})
    return folder


def _build_options(config: EngineConfig) -> dict[str, str]:
    """What a checkpoint is built with: only what was asked for."""
    options = {
        "max-batch-size": config.max_batch_size,
        "dtype": None if config.dtype == "auto" else config.dtype,
        "revision": config.revision,
        "tp": None if config.tp == 1 else config.tp,
    }
    return {name: str(value) for name, value in options.items() if value is not None}


def _check_finished(config: EngineConfig, manifest: Manifest) -> None:
    """ConfigError for what a finished engine was built otherwise than."""
    if config.dtype not in ("auto", manifest.dtype):
        raise ConfigError(
            "The engine's weights are stored in another dtype than was asked for.",
            found=f"dtype={config.dtype!r}",
            expected=f"'auto' or {manifest.dtype!r}, which the engine is",
            fix=f"leave dtype out, or build-engine CHECKPOINT -o ENGINE --dtype {config.dtype}",
        )
    if config.revision is not None:
        raise ConfigError(
            "A finished engine has no revisions.",
            found=f"revision={shown(config.revision)}",
            expected=f"none: the engine was built of {manifest.provenance.source}",
            fix="leave revision out, or build-engine HUB_ID -o ENGINE --revision REVISION",
        )


def _check_whole(manifest: Manifest, ranks: int) -> None:
    """ConfigError for an engine that cannot be cut for `ranks`, before a process is started."""
    own = manifest.parallel.tp
    if own > 1 or manifest.kv.page_size is not None:
        raise ConfigError(
            "This engine cannot be divided among other ranks than it was built for.",
            found=f"tp={ranks}, and an engine of {own} for {manifest.backend}",
            expected=f"tp={own}, or an engine of one rank for processors",
            fix="leave tp out, or divide the checkpoint: "
            f"build-engine CHECKPOINT -o ENGINE --target {manifest.backend} --tp {ranks}",
        )


def _check_devices(config: EngineConfig, manifest: Manifest) -> None:
    if manifest.kv.page_size is None and config.devices is not None:
        check_processors(config.devices)


def _check_pixels(folder: Path, vision: VisionConfig, config: EngineConfig) -> None:
    """Refuse limits that the engine's images cannot have, before its ranks are started."""
    limits = PixelRange(vision.min_pixels, vision.max_pixels)
    if limits != AS_ENGINE:
        manifest = load_manifest(folder)
        manifest.image.within(limits, config.session_len or manifest.decode.session_len)


def _launched(config: EngineConfig) -> World | None:
    """The ranks that mpirun has started, where they are asked for; returns on the first only."""
    if config.communicator != "mpi":
        return None
    from vlmforge.backends.ranks.mpi import world  # an extra, which begins MPI

    ranks = world(int(config.tp))
    if ranks.rank > 0:
        ranks.serve()
    return ranks


def _available_memory() -> float:
    """Bytes that this process may still take, whoever limits it."""
    return float(available_memory().bytes)
