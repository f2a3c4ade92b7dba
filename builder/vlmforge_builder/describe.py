"""What an engine would be: its manifest, from a checkpoint's configuration and headers alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from vlmforge.engine.manifest import MANIFEST_FILE, dump_manifest
from vlmforge.errors import BuildError
from vlmforge_builder.build import BuildOptions, describe_engine
from vlmforge_builder.checkpoint.source import outline_checkpoint
from vlmforge_builder.progress import Progress


def write_description(options: BuildOptions, progress: Progress) -> Path:
    """Write `engine.json` of what `build_engine` would build into `options.output`.

    Raises:
        VlmforgeError: as `build_engine`; a BuildError where something is at the output already.
    """
    target = options.output / MANIFEST_FILE
    if target.exists():
        raise BuildError(
            f"{options.output} is an engine already.",
            found=str(target),
            expected="a folder without one, for the description",
            fix="vlmforge plan ENGINE, or choose another -o",
        )
    with TemporaryDirectory() as scratch:

        def resolve(
            spec: str | Path,
            *,
            revision: str | None = None,
            progress: Callable[[str], None] | None = None,
            check: Callable[[Path], object] | None = None,
        ) -> Path:
            del progress
            folder = outline_checkpoint(spec, Path(scratch), revision=revision)
            if check is not None:
                check(folder)
            return folder

        manifest = describe_engine(options, progress, resolve)
    options.output.mkdir(parents=True, exist_ok=True)
    target.write_text(dump_manifest(manifest), "utf-8")
    return options.output
