"""The build: checkpoint in, engine directory out."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from msgspec import structs

from vlmforge.engine.bundle import open_bundle
from vlmforge.engine.manifest import (
    MANIFEST_FILE,
    DecodePolicy,
    FileEntry,
    Manifest,
    Part,
    Provenance,
    dump_manifest,
    load_manifest,
)
from vlmforge.engine.migration import SCHEMA_VERSION
from vlmforge.errors import BuildError, ConfigError, EngineError, VlmforgeError
from vlmforge.limits import return_freed_memory
from vlmforge_builder.checkpoint.altered import refuse_altered
from vlmforge_builder.checkpoint.config import ConfigReader
from vlmforge_builder.checkpoint.fingerprint import fingerprint, input_files
from vlmforge_builder.checkpoint.limits import HEADS, POSITIONS
from vlmforge_builder.checkpoint.source import checkpoint_name, resolve_checkpoint
from vlmforge_builder.compile_ranks import compile_ranks, parallel_layout
from vlmforge_builder.divide_engine import BUILD_LOG
from vlmforge_builder.dtypes import BITS, DTYPE_NAMES
from vlmforge_builder.export import trace
from vlmforge_builder.goldens import record_goldens
from vlmforge_builder.image_policy import choose_image_policy
from vlmforge_builder.progress import Progress
from vlmforge_builder.publish import list_files, sole_build, staging
from vlmforge_builder.recipe import ModelSpec, RecipeOptions
from vlmforge_builder.recognise import recognise
from vlmforge_builder.targets import CompileJob, Settings, load_target
from vlmforge_builder.templates import choose_template, template_name
from vlmforge_builder.tensor_check import check_tensors

_BUILD_LIBRARIES = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "tokenizers")


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What `build-engine` was asked for.

    `session_len=None` is what the model was trained for; `revision` is of a hub id; `wait` is for
    another build of the same output, which is an error otherwise. `ignore_config_key` are
    configuration keys that are left out though no recipe knows them.
    """

    checkpoint: str
    output: Path
    revision: str | None = None
    target: str = "onnxruntime"
    dtype: str = "float32"
    weights: str | None = None
    session_len: int | None = None
    max_batch_size: int = 8
    vision_tower: str | None = None
    tower_weights: str | None = None
    chat_template: str | None = None
    image_policy: str | None = None
    kv_dtype: str | None = None
    attention: str | None = None
    compute_capability: str | None = None
    tp: int = 1
    ignore_config_key: Sequence[str] = ()
    skip_goldens: bool = False
    force: bool = False
    wait: bool = False

    def recorded(self) -> dict[str, str]:
        """The options that shape the engine, as text. Of files and folders the names, not where."""
        names = ("target", "dtype", "weights", "session_len", "max_batch_size", "tower_weights")
        policies = ("image_policy", "kv_dtype", "attention", "compute_capability")
        values = {name: str(getattr(self, name)) for name in (*names, *policies)}
        tower = None if self.vision_tower is None else checkpoint_name(self.vision_tower)
        template = None if self.chat_template is None else template_name(self.chat_template)
        if self.tp > 1:
            values["tp"] = str(self.tp)
        if self.ignore_config_key:
            values["ignore_config_key"] = ", ".join(sorted(self.ignore_config_key))
        if self.skip_goldens:
            values["skip_goldens"] = "True"
        return values | {"vision_tower": str(tower), "chat_template": str(template)}

    def settings(self, session_len: int) -> Settings:
        """What the target is to know of them."""
        return Settings(
            dtype=self.dtype,
            weights=self.weights,
            session_len=session_len,
            max_batch_size=self.max_batch_size,
            kv_dtype=self.kv_dtype,
            attention=self.attention,
            compute_capability=self.compute_capability,
            tp=self.tp,
        )


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint that a recipe has understood. `fingerprint` is of its files."""

    folder: Path
    config: ConfigReader
    recipe: str
    spec: ModelSpec
    fingerprint: str


def build_engine(options: BuildOptions, progress: Progress) -> Path:
    """Build the engine of `options.checkpoint` at `options.output` and return its path.

    An engine that was built from the same inputs with the same options is left as it is, unless
    `force`. Nothing is published before everything is written and the goldens ran.

    Raises:
        VlmforgeError: CheckpointError, ConfigError or BuildError, by what is wrong.
    """
    _check(options)
    with progress.stage("read the checkpoint"):
        source = read_checkpoint(options, progress)
    if _is_current(options, source):
        return _up_to_date(options, progress)
    with sole_build(options.output, _waiting(options, progress)):
        if _is_current(options, source):
            return _up_to_date(options, progress)
        _write(source, options, progress)
    return options.output


def _up_to_date(options: BuildOptions, progress: Progress) -> Path:
    progress.note(f"{options.output} is up to date; --force builds it again")
    return options.output


def _waiting(options: BuildOptions, progress: Progress) -> Callable[[str], None] | None:
    if not options.wait:
        return None
    return lambda holder: progress.note(f"waiting for another build of it: {holder}")


def _write(source: Source, options: BuildOptions, progress: Progress) -> None:
    with staging(options.output) as folder:
        parts = _compile(source.spec, options, folder, progress)
        manifest = _describe(source, options, parts)
        _write_texts(folder, source, options)
        stand_in = load_target(options.target).stand_in()
        if options.skip_goldens or stand_in is None:
            why = "asked for" if stand_in else f"an engine of {options.target} cannot be run here"
            progress.note(f"no goldens: {why}")
        else:
            with progress.stage("run the goldens"), stand_in:
                # What tracing and writing took goes back first: the engine needs as much again.
                gc.collect()
                return_freed_memory()
                record_goldens(folder, manifest, progress)
        with progress.stage("checksums"):
            files = list_files(folder)
        manifest = _with_files(manifest, files)
        (folder / MANIFEST_FILE).write_text(dump_manifest(manifest), "utf-8")
    size = sum(entry.size for entry in files)
    progress.note(f"built {options.output}: {len(files) + 1} files, {size / 1e9:.2f} GB")


def _check(options: BuildOptions) -> None:
    target = load_target(options.target)
    for name, value, within in (
        ("session_len", options.session_len, POSITIONS),
        ("max_batch_size", options.max_batch_size, POSITIONS),
        ("tp", options.tp, HEADS),
    ):
        if value is not None and value not in within:
            raise ConfigError(
                f"{name} is out of range.",
                found=str(value),
                expected=f"a whole number from 1 to {within[-1]}",
                fix=f"leave --{name.replace('_', '-')} out, for its default",
            )
    if options.dtype not in DTYPE_NAMES:
        raise ConfigError(
            "dtype is not known.",
            found=repr(options.dtype),
            expected="one of: " + ", ".join(DTYPE_NAMES),
            fix="--dtype float32",
        )
    if options.tower_weights not in (None, "checkpoint", "stock"):
        raise ConfigError(
            "A vision tower of this kind is not known.",
            found=f"--tower-weights {options.tower_weights}",
            expected="checkpoint or stock; or none, for what config.json says",
            fix="--tower-weights checkpoint",
        )
    if options.weights not in (None, *BITS):
        raise ConfigError(
            "Weights of this kind are not known.",
            found=f"--weights {options.weights}",
            expected="one of: " + ", ".join(BITS) + "; or none, for weights of --dtype",
            fix="--weights int4",
        )
    target.check(options.settings(options.session_len or 1))
    _check_scratch()


def _check_scratch() -> None:
    """torch writes temporary files while it traces."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise BuildError(
            "There is no place for temporary files, which a build needs.",
            found=str(error.strerror),
            expected="a folder that can be written to",
            fix="set TMPDIR to one",
        ) from error


def read_checkpoint(
    options: BuildOptions, progress: Progress, resolve: Callable[..., Path] = resolve_checkpoint
) -> Source:
    """Understand the checkpoint that `resolve` finds (VlmforgeError: CheckpointError or others)."""
    folder = resolve(
        options.checkpoint,
        revision=options.revision,
        progress=progress.note,
        check=lambda folder: recognise(folder, options.ignore_config_key),
    )
    config, recipe = recognise(folder, options.ignore_config_key)
    spec = recipe.load(
        folder,
        config,
        RecipeOptions(
            options.session_len,
            options.vision_tower,
            lambda name: resolve(name, progress=progress.note, check=refuse_altered),
            progress.note,
            options.tower_weights,
        ),
    )
    check_tensors(spec, progress.note)
    spec = choose_template(spec, options.chat_template)
    spec = choose_image_policy(spec, options.image_policy)
    progress.note(f"{recipe.name} ({spec.architecture}); tokenizer {spec.tokenizer_proof}")
    if spec.session_len > spec.trained_len:
        progress.note(
            f"warning: session_len {spec.session_len} is beyond the {spec.trained_len} tokens that "
            "the model was trained for; answers to longer conversations may degrade"
        )
    identity = fingerprint(input_files((folder, *spec.source_files)))
    return Source(folder, config, recipe.name, spec, identity)


def _is_current(options: BuildOptions, source: Source) -> bool:
    """Whether the output is the engine of these inputs already (BuildError: of others)."""
    if not (options.output / MANIFEST_FILE).exists() or options.force:
        return False
    try:
        found = load_manifest(options.output).provenance
    except VlmforgeError:
        found = None
    same = found is not None and (
        found.source_fingerprint == source.fingerprint
        and dict(found.options) == options.recorded()
        and dict(found.versions) == _versions()
    )
    if same:
        return _is_whole(options.output)
    raise BuildError(
        f"{options.output} is an engine of other inputs, options or versions.",
        found="an engine of " + (found.source if found else "another schema version"),
        expected="no engine, or the one of the same inputs and options",
        fix="add --force to replace it, or choose another -o",
    )


def _is_whole(engine: Path) -> bool:
    try:
        open_bundle(engine)
    except EngineError:
        return False  # damaged since: build it again
    return True


def _compile(
    spec: ModelSpec,
    options: BuildOptions,
    folder: Path,
    progress: Progress,
    *,
    described: bool = False,
) -> tuple[Part, ...]:
    target, parts = load_target(options.target), list[Part]()
    settings = options.settings(spec.session_len)
    for part in spec.parts:
        with progress.stage(f"trace {part.name}"):
            traced = trace(part)
        report, note = progress.report, progress.note
        job = CompileJob(part, spec.store, settings, folder, report, note, described=described)
        parts += compile_ranks(target, traced, job, progress)
    return tuple(parts)


def describe_engine(
    options: BuildOptions, progress: Progress, resolve: Callable[..., Path] = resolve_checkpoint
) -> Manifest:
    """The manifest of the engine that `build_engine` would write, but for its files and kernels.

    No weights are read: `resolve` may find a folder whose weight files have headers alone.

    Raises:
        VlmforgeError: as `build_engine`.
    """
    _check(options)
    with progress.stage("read the checkpoint"):
        source = read_checkpoint(options, progress, resolve)
    with tempfile.TemporaryDirectory() as scratch:
        parts = _compile(source.spec, options, Path(scratch), progress, described=True)
    return _describe(source, options, parts)


def _describe(source: Source, options: BuildOptions, parts: tuple[Part, ...]) -> Manifest:
    spec, target = source.spec, load_target(options.target)
    settings = options.settings(spec.session_len)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        backend=target.name,
        dtype=options.dtype,
        quantisation=options.weights,
        compute_dtype=target.compute_dtype(settings),
        parts=parts,
        image=spec.image,
        prompt=spec.prompt,
        decode=DecodePolicy(
            vocab_size=spec.vocab_size,
            hidden_size=spec.hidden_size,
            eos_ids=spec.eos_ids,
            tokens_per_image=spec.tokens_per_image,
            session_len=spec.session_len,
            max_batch_size=options.max_batch_size,
            positions=spec.positions,
            feature_layers=spec.feature_layers,
        ),
        kv=target.kv_layout(spec.kv, settings),
        parallel=parallel_layout(parts, options.tp),
        tokenizer_file="tokenizer.json",
        files=(),
        provenance=Provenance(
            built_at=datetime.now(UTC).isoformat(timespec="seconds"),
            source=checkpoint_name(options.checkpoint),
            source_fingerprint=source.fingerprint,
            recipe=source.recipe,
            architecture=spec.architecture,
            options=options.recorded(),
            versions=_versions(),
        ),
    )


def _with_files(manifest: Manifest, files: tuple[FileEntry, ...]) -> Manifest:
    return structs.replace(manifest, files=files)


def _versions() -> Mapping[str, str]:
    names = ("vlmforge", *_BUILD_LIBRARIES)
    return {name: importlib.metadata.version(name) for name in names}


def _write_texts(folder: Path, source: Source, options: BuildOptions) -> None:
    spec = source.spec
    (folder / "tokenizer.json").write_bytes(spec.tokenizer_json)
    (folder / spec.prompt.template_file).write_text(spec.template.jinja, "utf-8")
    # Decisions only: times and memory differ between two builds and go to --json-events.
    rows = [
        {"event": "source", "fingerprint": source.fingerprint, "recipe": source.recipe},
        {"event": "options", **options.recorded()},
        {"event": "tokenizer", "proof": spec.tokenizer_proof},
        {"event": "template", "name": spec.template.name},
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / BUILD_LOG).write_text(text, "utf-8")
