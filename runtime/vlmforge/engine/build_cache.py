"""Engines that `pipeline(<checkpoint>)` builds: once, by a child process, kept by content.

A child process, because a build needs libraries that serving must not load, because its memory
goes back when it ends, and because its crash is then a message and not ours.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vlmforge import env
from vlmforge.engine.manifest import MANIFEST_FILE
from vlmforge.errors import BuildError
from vlmforge.version import __version__

if TYPE_CHECKING:
    from vlmforge.engine.build_child import Outcome

HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_KNOWN = (MANIFEST_FILE, "config.json")

# Options of build-engine that a caller gives as fields, and such values as advice names.
_OPTION = re.compile(
    r"--(tp|dtype|session-len|max-batch-size|revision)\b(?: (?:(\d+|N)|(b?float\d+))\b)?"
)


def engine_for(path: str, options: Mapping[str, str]) -> Path:
    """The engine directory of `path`: itself, or one built from it as a checkpoint.

    Args:
        path: An engine directory, a checkpoint folder, or a hub id.
        options: Long options of `build-engine` and their values.

    Raises:
        BuildError: neither of them, the builder is not installed, or it failed.
    """
    folder = env.expanded(path)
    if (folder / MANIFEST_FILE).exists():
        return folder
    _check_checkpoint(path, folder)
    spec = str(folder) if folder.exists() else path
    name = folder.resolve().name if folder.exists() else folder.name
    return _kept(spec, name, options)


def _check_checkpoint(path: str, folder: Path) -> None:
    """Refuse at once, without a process, what cannot be one (BuildError)."""
    if (folder / "config.json").exists() or (not folder.exists() and HUB_ID.fullmatch(path)):
        return
    fix = "build-engine CHECKPOINT -o ENGINE, then pipeline('ENGINE')"
    if folder.is_dir():
        found = "neither engine.json nor config.json in it"
    elif folder.exists():
        found, fix = "a file", "give the folder that it is in" if folder.name in _KNOWN else fix
    else:
        found, fix = (
            f"no folder {folder.absolute()}",
            "check the spelling and the working directory",
        )
    raise BuildError(
        f"{path} is neither an engine nor a checkpoint.",
        found=found,
        expected="an engine directory, a checkpoint folder, or a hub id such as org/name",
        fix=fix,
    )


def cut_engine(engine: Path, ranks: int) -> Path:
    """The engine directory of `engine` cut for so many ranks.

    Raises:
        BuildError: it cannot be, the builder is not installed, or it failed.
    """
    return _kept(str(engine), engine.resolve().name, {"tp": str(ranks)})


def _kept(spec: str, name: str, options: Mapping[str, str]) -> Path:
    engine = env.cache_dir() / "engines" / f"{name}-{_key(spec, options)}"
    try:
        return _built(spec, engine, options)
    except OSError as error:
        raise _unusable(engine.parent, error) from error


def _built(path: str, engine: Path, options: Mapping[str, str]) -> Path:
    """`engine`, built now unless it is there or another process is about to have it built."""
    if (engine / MANIFEST_FILE).exists():
        return engine
    # Not at the top: whoever serves an engine that is there needs neither this nor processes.
    from vlmforge.engine.ownership import sole_owner

    engine.parent.mkdir(parents=True, exist_ok=True)

    def wait(holder: str) -> None:
        _say(f"vlmforge: waiting for the engine of {path}, which is being built by {holder}")

    with sole_owner(engine.with_name(f".{engine.name}.pipeline.lock"), wait):
        if not (engine / MANIFEST_FILE).exists():
            _build(path, engine, options)
    return engine


def _unusable(folder: Path, error: OSError) -> BuildError:
    return BuildError(
        "The engine cannot be kept in the cache directory.",
        found=f"{error.strerror or error}: {error.filename or folder}",
        expected=f"a folder {folder} that can be written to, on a file system that has locks",
        fix="set the environment variable VLMFORGE_CACHE to a folder that can be written to, or "
        "build-engine CHECKPOINT -o ENGINE and pipeline('ENGINE')",
    )


def _key(path: str, options: Mapping[str, str]) -> str:
    """Changes with the files of a folder (names, sizes, times of change) and with the options.

    A hub id stands for itself: give a `revision` to follow a newer one.
    """
    digest = hashlib.sha256(f"{__version__}\n{sorted(options.items())}".encode())
    folder = Path(path)
    if folder.is_dir():
        digest.update(os.fsencode(folder.resolve()))
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            stat = file.stat()
            digest.update(
                os.fsencode(f"{file.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n")
            )
    else:
        digest.update(os.fsencode(path))
    return digest.hexdigest()[:16]


def describe_checkpoint(path: str, options: Mapping[str, str], folder: Path) -> Path:
    """`folder`, with the manifest of the engine that would be built of a checkpoint.

    No weights are read, and of a hub id none are fetched.

    Raises:
        BuildError: it is no checkpoint, the builder is not installed, or it failed.
    """
    here = env.expanded(path)
    _check_checkpoint(path, here)
    _run(str(here) if here.exists() else path, folder, options, "--describe")
    return folder


def _build(path: str, engine: Path, options: Mapping[str, str]) -> None:
    _say(f"vlmforge: building an engine of {path} once, into {engine}")
    # --wait: for the build of a pipeline that was killed, while it clears up.
    _run(path, engine, options, "--wait")


def _run(path: str, engine: Path, options: Mapping[str, str], flag: str) -> None:
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    missing = [name for name in ("torch", "onnx", "onnxscript") if not _installed(name)]
    if missing:
        raise BuildError(
            f"{path} {_why(path)}, and the builder is not installed here.",
            found="no " + ", ".join(missing),
            expected="what build-engine needs, or an engine that was built elsewhere",
            fix="pip install 'vlmforge[build]', or elsewhere: "
            + shlex.join(["build-engine", path, "-o", "ENGINE", *arguments]),
        )
    from vlmforge.engine.build_child import run_build

    # -P: a module in the working directory, which may be the checkpoint's, is never imported.
    command = [sys.executable, "-P", "-m", "vlmforge_builder", path, "-o", str(engine), *arguments]
    outcome = run_build([*command, flag])
    if outcome.status != 0:
        raise _failed(path, engine, outcome)


def _why(path: str) -> str:
    cut = (Path(path) / MANIFEST_FILE).exists()
    return "is an engine for another number of ranks" if cut else "is a checkpoint"


def _say(text: str) -> None:
    if sys.stderr is not None:
        print(text, file=sys.stderr, flush=True)


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _failed(path: str, engine: Path, outcome: Outcome) -> BuildError:
    if outcome.status == -signal.SIGKILL:
        return BuildError(
            f"The build of {path} was killed.",
            found="signal 9, which is what the system sends when memory is short",
            expected="a build that ends",
            fix="free memory, or build on a bigger machine: build-engine CHECKPOINT -o ENGINE",
        )
    if outcome.error is None:
        said = "\n    ".join(["", *outcome.words]) or " nothing"
        return BuildError(
            f"The build of {path} failed; nothing was published.",
            found=f"build-engine ended with status {outcome.status}; it said last:{said}",
            expected="status 0",
            fix="mend what it names, then call pipeline() again; to see more, run it by hand: "
            f"build-engine {shlex.quote(path)} -o ENGINE",
        )
    told = outcome.error
    # The path of the engine was not the caller's choice, but where it lies is.
    moved = f" (VLMFORGE_CACHE chooses another place than {engine.parent})"
    return BuildError(
        f"The build of {path} failed: {told['error']}: {told['summary']}",
        found=as_fields(told["found"]),
        expected=as_fields(told["expected"]),
        fix=as_fields(told["fix"]) + (moved if str(engine) in told["summary"] else ""),
    )


def as_fields(words: str) -> str:
    """What build-engine says of its options, for who gives them as fields: `--tp 2` is `tp=2`.

    A command line to be typed stays one.
    """
    if "build-engine" in words:
        return words

    def field(option: re.Match[str]) -> str:
        name, number, dtype = option.groups()
        value = repr(dtype) if dtype else number
        return name.replace("-", "_") + (f"={value}" if value else "")

    return _OPTION.sub(field, words)
