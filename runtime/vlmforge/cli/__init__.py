"""`vlmforge`: look at an engine, verify it, talk to it, and see what this machine has."""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlmforge.version import __version__

if TYPE_CHECKING:
    import argparse


def parser() -> argparse.ArgumentParser:
    """The arguments of `vlmforge`."""
    import argparse

    root = argparse.ArgumentParser(prog="vlmforge", description=__doc__)
    root.add_argument("--version", action="version", version=__version__)
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    inspect = commands.add_parser("inspect", help="print what an engine is")
    inspect.add_argument("engine", type=Path, metavar="ENGINE")
    inspect.add_argument("--batch", type=int, default=1, help="sequences for the memory estimate")
    inspect.add_argument("--context", type=int, help="tokens of each (default: the window)")

    verify = commands.add_parser("verify", help="check files and rerun the goldens of the build")
    verify.add_argument("engine", type=Path, metavar="ENGINE")
    verify.add_argument(
        "--static", action="store_true", help="files and description only; nothing is run"
    )
    verify.add_argument(
        "--layers",
        action="store_true",
        help="which tensor is the first that parts from the reference's? (needs vlmforge[build])",
    )
    verify.add_argument(
        "--against", metavar="CHECKPOINT|ENGINE", help="for --layers: what to compare with"
    )
    verify.add_argument(
        "--limit", type=float, help="for --layers: of a tensor's largest value (default: by dtype)"
    )

    from vlmforge.cli.plan_arguments import add_plan

    add_plan(commands)
    _add_eval(
        commands.add_parser("eval", help="accuracy on drawn pictures, or on your own questions")
    )

    commands.add_parser("models", help="the models that can be built, as a table")
    commands.add_parser("doctor", help="versions, backends, and what is missing")

    from vlmforge.cli.serve_arguments import add_serve

    add_serve(commands)
    chat = commands.add_parser("chat", help="talk to an engine; images by path or URL")
    chat.add_argument("engine", metavar="ENGINE")
    chat.add_argument("--session-len", type=int, help="tokens of the conversation")
    chat.add_argument("--tp", type=int, default=1, help="ranks (default: the engine's)")
    chat.add_argument("--max-new-tokens", type=int, default=512)
    chat.add_argument("--temperature", type=float, help="sample with it (default: greedy)")
    return root


def _add_eval(evaluation: argparse.ArgumentParser) -> None:
    evaluation.add_argument("engine", metavar="ENGINE")
    evaluation.add_argument(
        "--limit", type=int, help="questions (default: 650, or all of the file's)"
    )
    evaluation.add_argument("--min-accuracy", type=float, metavar="PERCENT", help="fail below it")
    drawn = evaluation.add_argument_group("drawn pictures")
    drawn.add_argument("--seed", type=int, help="which pictures and questions (default: 0)")
    drawn.add_argument("--sheet", type=Path, metavar="FILE.html", help="write a picture sheet")
    drawn.add_argument(
        "--minimum",
        action="append",
        default=[],
        metavar="KIND=PERCENT",
        help="fail below it, such as color=95 or all=90; may be repeated",
    )
    own = evaluation.add_argument_group("your own questions")
    own.add_argument(
        "--data",
        type=Path,
        metavar="FILE.jsonl",
        help='lines of {"image": path, URL or null, "question": ..., "answers": [...]}; paths are '
        "relative to the file",
    )
    own.add_argument(
        "--match",
        choices=("contains", "exact"),
        help="what makes a reply right: an answer's words are in it (default), or are all of it; "
        "case, punctuation and articles do not count, numbers to ten may be words",
    )
    own.add_argument(
        "--max-new-tokens", type=int, help="of a reply, where it is cut off (default: 96)"
    )
    own.add_argument("--results", type=Path, metavar="FILE.jsonl", help="write each reply to it")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `vlmforge`; returns the exit status.

    1 on an error, 130 when interrupted, 141 when nobody reads what it prints any more.
    """
    try:
        return _main(argv)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Python flushes at its end: into nothing, rather than into the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141


def _main(argv: Sequence[str] | None) -> int:
    # Imported here: an interrupt is to be understood from the first moment.
    from vlmforge.errors import BackendUnavailableError, VlmforgeError

    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal whose encoding lacks a letter gets its number.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = _run(parser().parse_args(argv))
        if sys.stdout is not None:
            sys.stdout.flush()
    except VlmforgeError as error:
        return _failed(error)
    except ModuleNotFoundError as error:
        # Optional libraries are asked for by those who use them, who say which extra has them.
        if (name := (error.name or "").partition(".")[0]) in ("", "vlmforge"):
            raise
        return _failed(
            BackendUnavailableError(
                "A library is missing that vlmforge needs.",
                found=f"no module {name}",
                expected="all that vlmforge depends on",
                fix="pip install --force-reinstall vlmforge",
            )
        )
    return status


def _failed(error: Exception) -> int:
    print(f"vlmforge: {type(error).__name__}: {error}", file=sys.stderr)
    return 1


def _run(values: argparse.Namespace) -> int:
    # Imported when needed: `vlmforge doctor` must work where another command's library is missing.
    if values.command in ("chat", "eval", "serve", "verify"):
        importlib.import_module("vlmforge.early")
    match values.command:
        case "inspect":
            from vlmforge.cli.inspect import describe

            print(describe(values.engine, batch=values.batch, context=values.context))
            return 0
        case "verify":
            from vlmforge.cli.verify import run_layers, run_static, run_verify

            if values.layers or values.against is not None or values.limit is not None:
                return run_layers(values.engine, values.against, values.limit)
            return (run_static if values.static else run_verify)(values.engine)
        case "plan":
            from vlmforge.cli.plan import run_plan
            from vlmforge.cli.plan_arguments import asked_of

            return run_plan(asked_of(values))
        case "eval":
            from vlmforge.cli.eval import run_eval

            return run_eval(values)
        case "serve":
            from vlmforge.cli.serve import run_serve

            return run_serve(values)
        case "models":
            from vlmforge.engine.families import models_table

            print(models_table())
            return 0
        case "doctor":
            from vlmforge.cli.doctor import run_doctor

            return run_doctor()
        case _:
            from vlmforge.cli.chat import run_chat

            return run_chat(values)
