"""What the documents tell a reader to type works.

Conventions, for `README.md` and `CONTRIBUTING.md`:

- Every block marked ```` ```python ```` compiles and is run, in order, in one namespace for each
  file and in an empty folder; one that cannot be run is marked ```` ```python no-run ````. Whatever
  path is given to `pipeline(...)` is an engine there, and every name of an image file is a picture.
- There, and in `docs/serving.md` and `docs/sizing.md`: in blocks marked `sh`, `bash`, `shell` or
  `console` (of that, lines that begin with `$ `), commands of `make`, `build-engine` and `vlmforge`
  parse. In `code spans` their targets, sub-commands and options exist. Python files of this
  repository that are named exist.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import itertools
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

import vlmforge.cli
import vlmforge_builder.command
from conftest import IMAGES

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "CONTRIBUTING.md")
FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
PARSERS = {"build-engine": vlmforge_builder.command.parser, "vlmforge": vlmforge.cli.parser}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Block:
    """A fenced block: the words after the fence, its text, and the line where that begins."""

    info: tuple[str, ...]
    text: str
    line: int


def blocks_of(document: str) -> list[Block]:
    return [
        Block(tuple(match[2].split()), match[3], document.count("\n", 0, match.start(3)) + 1)
        for match in FENCE.finditer(document)
    ]


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


# --- Python ------------------------------------------------------------------------------------


def python_blocks(document: str) -> list[tuple[ast.Module, bool]]:
    """Trees of the Python blocks, with the document's line numbers; whether each is to be run."""
    found = []
    for block in blocks_of(document):
        if block.info[:1] == ("python",):
            assert block.info[1:] in ((), ("no-run",)), f"line {block.line}: {block.info}"
            tree = ast.parse("\n" * (block.line - 1) + block.text)
            found.append((tree, block.info[1:] == ()))
    return found


def prepare(tree: ast.Module, folder: Path, engine: Path) -> None:
    """Put the engines and pictures that a block names into `folder`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("pipeline"):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant):
                    link(folder / str(argument.value), engine)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert "://" not in node.value, f"{node.value}: mark this block no-run"
            if node.value.endswith(IMAGE_SUFFIXES):
                paint(folder / node.value)


def link(path: Path, engine: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.symlink_to(engine)


def paint(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(IMAGES / "photo_640x480.png").convert("RGB").save(path)


def run_blocks(name: str, document: str, folder: Path, engine: Path) -> dict[str, object]:
    """Run the Python blocks of a document; returns their namespace."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    try:
        for tree, is_run in python_blocks(document):
            if is_run:
                prepare(tree, folder, engine)
                exec(compile(tree, name, "exec"), namespace)
    finally:
        for value in namespace.values():
            if isinstance(value, vlmforge.Pipeline):
                value.close()
    return namespace


SAMPLE = """
```python
from vlmforge import GenerationConfig, pipeline
from vlmforge.vl import load_image

pipe = pipeline("models/tiger.engine")
image = load_image("pictures/tiger.jpeg")
```

```python no-run
pipe = pipeline("https://host/nowhere")
```

```python
response = pipe(("what is it?", image), gen_config=GenerationConfig(max_new_tokens=2))
```
"""


def test_blocks_are_run_as_the_conventions_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hf_engine: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace = run_blocks("sample", SAMPLE, tmp_path, hf_engine)
    assert isinstance(namespace["response"], vlmforge.Response)
    assert namespace["response"].generate_token_len <= 2


@pytest.mark.parametrize("name", DOCUMENTS)
def test_python_in_documents_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hf_engine: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    document = read(name)
    assert document.count("```python") == len(python_blocks(document))
    run_blocks(name, document, tmp_path, hf_engine)


# --- commands ----------------------------------------------------------------------------------


def shell_lines(document: str) -> Iterator[str]:
    """Logical lines of the shell blocks."""
    for block in blocks_of(document):
        if block.info[:1] not in (("sh",), ("bash",), ("shell",), ("console",)):
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            if block.info[0] != "console":
                yield line.strip()
            elif line.lstrip().startswith("$ "):
                yield line.lstrip().removeprefix("$ ")


def code_spans(document: str) -> list[str]:
    return SPAN.findall(FENCE.sub("", document))


def commands_of(line: str) -> Iterator[list[str]]:
    """The words of each command of a shell line: without variables, folders and redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    for is_operator, words in itertools.groupby(lexer, lambda word: bool(set(word) <= set("&|;"))):
        command = list(itertools.takewhile(lambda word: not set(word) <= set("<>"), words))
        while command and re.fullmatch(r"\w+=.*", command[0]):
            del command[0]
        if command and not is_operator:
            yield [Path(command[0]).name, *command[1:]]


def problem(words: Sequence[str], *, whole: bool) -> str:
    """What is wrong with a command; `whole` ones must parse, of others every word must exist."""
    program, *arguments = words
    for word in arguments:
        if word.endswith(".py") and "/" in word and not (ROOT / word).exists():
            return f"no file {word}"
    if program == "make":
        goals = [word for word in arguments if not word.startswith("-") and "=" not in word]
        unknown = [goal for goal in goals if goal not in make_targets()]
        return f"no target {unknown[0]}" if unknown else ""
    if program not in PARSERS:
        return ""
    if whole:
        return parse_problem(PARSERS[program](), arguments)
    return word_problem(PARSERS[program](), arguments)


def make_targets() -> list[str]:
    return re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE)


def parse_problem(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> str:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            parser.parse_args(arguments)
        except SystemExit as error:
            return said.getvalue() if error.code else ""
    return ""


def word_problem(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> str:
    commands = [word for word in arguments[:1] if re.fullmatch("[a-z]+", word)]
    if parser.prog == "vlmforge" and commands:
        if trouble := parse_problem(parser, [*commands, "--help"]):
            return trouble
    else:
        commands = []
    known = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", help_of(parser, commands)))
    options = [word.partition("=")[0] for word in arguments if word.startswith("-")]
    unknown = [option for option in options if option not in known]
    return f"no option {unknown[0]}" if unknown else ""


def help_of(parser: argparse.ArgumentParser, commands: Sequence[str]) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
        parser.parse_args([*commands, "--help"])
    return said.getvalue()


def problems(document: str) -> list[str]:
    whole = [words for line in shell_lines(document) for words in commands_of(line)]
    parts = [span.split() for span in code_spans(document)]
    found = [(words, problem(words, whole=True)) for words in whole]
    found += [([Path(w[0]).name, *w[1:]], problem(w, whole=False)) for w in parts if w]
    return [f"{' '.join(words)}: {trouble}" for words, trouble in found if trouble]


@pytest.mark.parametrize("name", [*DOCUMENTS, "docs/serving.md", "docs/sizing.md"])
def test_commands_in_documents_exist(name: str) -> None:
    assert problems(read(name)) == []


@pytest.mark.parametrize(
    ("document", "trouble"),
    [
        ("```sh\nmake demos\n```\n", "make demos: no target demos"),
        ("```sh\nmake demo test  # both\n```\n", ""),
        ("```sh\nmake PYTHON=python3.12 demo\n```\n", ""),
        ("```console\n$ make demo\nmake no sense of this output\n```\n", ""),
        ("```bash\nX=1 .venv/bin/build-engine model \\\n  -o model.engine --force\n```\n", ""),
        ("```bash\nbuild-engine model\n```\n", "required: -o"),
        ("```bash\nbuild-engine model -o x --fast\n```\n", "--fast"),
        ("```sh\ncd x && vlmforge inspect e > f.txt; vlmforge verify e\n```\n", ""),
        ("```sh\ncd x && vlmforge look e\n```\n", "invalid choice: 'look'"),
        ("Type `make`, `make test` or `vlmforge chat`.", ""),
        ("Type `make tests`.", "no target tests"),
        ("Type `vlmforge chat ENGINE --session-len N`.", ""),
        ("Type `vlmforge chats`.", "invalid choice: 'chats'"),
        ("Type `vlmforge verify --batch`.", "no option --batch"),
        ("Type `build-engine --dtype float16`.", ""),
        ("Type `build-engine --type float16`.", "no option --type"),
        ("Type `python -m pytest tests/runtime/test_nothing.py`.", "no file"),
        ("See `vlmforge.recipes`, `vlmforge_builder` and `install_as_lmdeploy()`.", ""),
    ],
)
def test_what_is_wrong_with_a_command_is_seen(document: str, trouble: str) -> None:
    found = problems(document)
    assert (trouble in found[0]) if trouble else (found == [])
