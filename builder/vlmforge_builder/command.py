"""What `build-engine` takes and does; the way into it and out of it is `cli.py`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from vlmforge.engine.lifeline import end_with_parent
from vlmforge.engine.manifest import MANIFEST_FILE
from vlmforge.errors import ConfigError, VlmforgeError
from vlmforge_builder.dtypes import BITS, DTYPE_NAMES, KV_DTYPES
from vlmforge_builder.progress import Interrupted, Progress
from vlmforge_builder.recognise import refuse_unknown
from vlmforge_builder.targets import TARGETS

_CHECKPOINT_HELP = (
    "a folder, or a hub id such as org/name; or, with --tp, an engine of one rank to divide"
)
_DTYPE_HELP = (
    "how weights are stored. ONNX Runtime's CPU provider has no 16-bit matrix kernels: with "
    "float16 or bfloat16 the files are half as big, and each weight is widened to float32 once "
    "at load; arithmetic is float32 there in any case. GPUs calculate in 16 bits and need one of "
    "these (default: float32)"
)
_WEIGHTS_HELP = (
    "quantise the decoder's weights: int8 or int4, in blocks of 128 (less where 128 does not "
    "divide) with a scale each; the rest is stored as --dtype says (default: all of it)"
)
_WINDOW_HELP = "tokens that one conversation may hold (default: what the model was trained for)"
_TP_HELP = (
    "divide the decoder among N ranks, which run as processes of their own and meet in each layer "
    "(default: 1)"
)
_IGNORE_HELP = (
    "leave out a configuration key that is unknown, or that changes how to ask and not the model; "
    "may be given several times"
)
_GOLDENS_HELP = (
    "do not run the new engine to record what `vlmforge verify` compares with; engines of GPUs are "
    "run on this machine's processor for it, in float32"
)
_DESCRIBE_HELP = (
    "write nothing but engine.json, of what would be built: no weights are read, and of a hub id "
    "only their headers are fetched (what `vlmforge plan` asks for)"
)
_TOWER_HELP = (
    "which vision tower to use where a checkpoint stores one and names another: its own, or the "
    "one that it names (default: as its config.json says)"
)


def parser() -> argparse.ArgumentParser:
    """The arguments of `build-engine`."""
    arguments = argparse.ArgumentParser(
        prog="build-engine",
        description="Compile a vision-language checkpoint into a self-contained engine directory.",
    )
    add = arguments.add_argument
    add("checkpoint", metavar="CHECKPOINT", help=_CHECKPOINT_HELP)
    add("-o", "--output", required=True, type=Path, metavar="ENGINE", help="where to write it")
    add("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    add(
        "--target",
        default="onnxruntime",
        choices=TARGETS,
        help="what runs it (default: onnxruntime)",
    )
    add("--dtype", default="float32", choices=DTYPE_NAMES, help=_DTYPE_HELP)
    add("--weights", choices=BITS, metavar="KIND", help=_WEIGHTS_HELP)
    add("--session-len", type=int, metavar="N", help=_WINDOW_HELP)
    add("--max-batch-size", type=int, default=8, metavar="N", help="sequences at once (default 8)")
    add("--vision-tower", metavar="PATH_OR_ID", help="where the vision tower is, if not inside")
    add("--tower-weights", choices=("checkpoint", "stock"), help=_TOWER_HELP)
    add("--chat-template", metavar="NAME_OR_JSON", help="a name, JSON text or a .json file")
    add("--image-policy", metavar="NAME", help="another official preprocessing of the model")
    add("--kv-dtype", choices=KV_DTYPES, help="key/value cache of a GPU engine; default: --dtype")
    add("--attention", metavar="KIND", help="of a TensorRT plan: plugin (default) or native")
    add(
        "--compute-capability", metavar="X.Y", help="of a plan: for this GPU; default: the target's"
    )
    add("--tp", type=int, default=1, metavar="N", help=_TP_HELP)
    add("--ignore-config-key", action="append", default=[], metavar="KEY", help=_IGNORE_HELP)
    add("--skip-goldens", action="store_true", help=_GOLDENS_HELP)
    add("--describe", action="store_true", help=_DESCRIBE_HELP)
    add("--force", action="store_true", help="replace an engine that is there")
    add("--wait", action="store_true", help="wait for another build of the same output")
    add("--until-eof", action="store_true", help="end when standard input does: for programs")
    add("--json-events", metavar="FILE", help="write progress as JSON lines; - is stdout")
    return arguments


def run(argv: Sequence[str] | None) -> None:
    """Do what the command line asks for.

    Raises:
        VlmforgeError: what is wrong with it.
        Interrupted: a signal told the build to end.
        SystemExit: the arguments are not of `build-engine`.
    """
    values = vars(parser().parse_args(argv))
    events, follow = values.pop("json_events"), values.pop("until_eof")
    describe = values.pop("describe")
    if follow:
        _follow()
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(events=_open(events, stack)))
        try:
            _build(values, progress, describe=describe)
        except VlmforgeError as error:
            progress.fail(type(error).__name__, error)
            raise
        except Exception as error:
            # What follows from an interrupt, such as an import that was cut, is its echo.
            if progress.signal is not None:
                raise Interrupted(progress.signal) from error
            raise


def _build(values: Mapping[str, Any], progress: Progress, *, describe: bool) -> None:
    engine = Path(values["checkpoint"]).expanduser()
    if (engine / MANIFEST_FILE).exists():
        _divide(engine, values, progress, describe=describe)
    else:
        refuse_unknown(values["checkpoint"], values["revision"], values["ignore_config_key"])
        # Imported here: what cannot be built is refused before torch has been loaded.
        from vlmforge_builder.build import BuildOptions, build_engine
        from vlmforge_builder.describe import write_description

        _end_by_signals(progress)
        (write_description if describe else build_engine)(BuildOptions(**values), progress)
    peak = progress.peak
    progress.note(
        f"done in {progress.elapsed:.1f} s; peak memory {peak.anonymous / 2**20:.0f} MiB "
        f"anonymous, {peak.resident / 2**20:.0f} MiB resident with mapped files"
    )


def _divide(engine: Path, values: Mapping[str, Any], progress: Progress, *, describe: bool) -> None:
    """Divide an engine among ranks; it keeps all else that it was built with."""
    own = ("checkpoint", "output", "tp", "force", "wait")
    others = [n for n in values if n not in own and values[n] != parser().get_default(n)]
    others += ["describe"] if describe else []
    if others:
        raise ConfigError(
            f"{engine} is an engine, and only --tp can be changed of one.",
            found="--" + ", --".join(name.replace("_", "-") for name in others),
            expected="build-engine ENGINE -o OTHER --tp N",
            fix="leave the others out, or build from the checkpoint",
        )
    from vlmforge_builder.divide_engine import divide_engine

    _end_by_signals(progress)
    divide_engine(
        engine,
        values["output"],
        values["tp"],
        progress,
        force=values["force"],
        wait=values["wait"],
    )


def _follow() -> None:
    try:
        end_with_parent(signal.SIGTERM)
    except OSError as error:
        raise ConfigError(
            "--until-eof needs a standard input whose end can be told.",
            found=str(error.strerror),
            expected="a pipe",
            fix="leave --until-eof out",
        ) from error


def _end_by_signals(progress: Progress) -> None:
    """From here on there are things to clear up: a polite kill takes the way of Ctrl-C."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        del frame
        progress.interrupt(signum)

    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, interrupt)


def _open(events: str | None, stack: ExitStack) -> TextIO | None:
    if events is None:
        return None
    if events == "-":
        return sys.stdout
    try:
        return stack.enter_context(Path(events).open("w", encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"The file for the JSON events cannot be written: {events}",
            found=str(error.strerror),
            expected="a path in a folder that can be written to",
            fix="--json-events events.jsonl",
        ) from error
