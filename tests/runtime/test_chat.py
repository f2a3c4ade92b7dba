"""`vlmforge chat`: what people type, in a terminal and in a pipe."""

from __future__ import annotations

import io
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from conftest import IMAGES, wait_until
from vlmforge.api.session import Session
from vlmforge.cli import chat as chat_module
from vlmforge.cli.chat import COMMANDS, Chat, converse
from vlmforge.cli.line_editor import ChatCompleter, LineEditor
from vlmforge.cli.typed import PlainLines, image_sources
from vlmforge.errors import PromptError
from vlmforge.outputs.generation_config import GenerationConfig
from vlmforge.outputs.response import Response

PHOTO = IMAGES / "alpha_97x61.png"
UP, TAB, ESCAPE, CTRL_C, CTRL_D, CTRL_J = "\x1b[A", "\t", "\x1b", "\x03", "\x04", "\n"

# --- names of images -------------------------------------------------------------------------

_names = st.text(
    st.one_of(
        st.sampled_from(" '\"\\~$*()#&;|<>`!-=é."),
        st.characters(exclude_characters="/\0", exclude_categories=["Cs"]),
    ),
    min_size=1,
    max_size=20,
).filter(lambda name: name == name.strip() and name not in (".", "..") and len(name.encode()) < 99)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("typed")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(_names, min_size=1, max_size=3, unique=True))
def test_any_name_of_a_file_can_be_typed(names: list[str], folder: Path) -> None:
    paths = [f"{folder}/{name}" for name in names]
    for path in paths:
        Path(path).touch()
    try:
        for path in paths:
            assert image_sources(path) == [path]
            assert image_sources(f"  {path}\n") == [path]
        # As a terminal writes the names of files that are dropped on it.
        assert image_sources(shlex.join(paths)) == paths
        assert image_sources(" ".join(paths)) == paths
    finally:
        for path in paths:
            Path(path).unlink()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("a.png", ["a.png"]),
        ("  a.png   b.png ", ["a.png", "b.png"]),
        ("it's.jpg", ["it's.jpg"]),
        (r"C:\pics\cat.jpg", [r"C:\pics\cat.jpg"]),
        ("'a b.png' \"it's me.png\"", ["a b.png", "it's me.png"]),
        ("'a b.png", ["'a", "b.png"]),
        ("http://x/a?b='c' data:image/png;base64,AA==", ["http://x/a?b='c'"]),
        ("\0 ~nobody/x " + "x" * 5000, ["\0", "~nobody/x", "x" * 5000]),
    ],
)
def test_what_is_no_file_is_read_by_words(text: str, expected: list[str]) -> None:
    assert image_sources(text)[: len(expected)] == expected


def test_home_is_written_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    (folder / "it's here.png").touch()
    expected = [str(folder / "it's here.png")]
    for typed in ("~/it's here.png", '"~/it\'s here.png"', r"~/it\'s\ here.png"):
        assert image_sources(typed) == expected


# --- a pipe ----------------------------------------------------------------------------------


def test_lines_of_a_pipe() -> None:
    text = 'one\n\n"""\n two\n\nthree\n"""\n"""four"""\n"""five\nsix"""\n\\ \'\n"""seven'
    lines = PlainLines(io.StringIO(text))
    assert list(iter(lines.read, None)) == [
        *("one", "", " two\n\nthree", "four", "five\nsix", "\\ '", "seven"),
    ]


class StandIn:
    """A pipeline that answers from a list; what is no text is raised."""

    def __init__(self, *answers: object) -> None:
        self.answers = list(answers)
        self.asked: list[object] = []
        self.closed = 0

    def chat(self, prompt: object, session: Session, *_: object, **__: object) -> Any:
        self.asked.append(prompt)
        return self._pieces(session)

    def _pieces(self, session: Session) -> Iterator[Response]:
        try:
            for piece in (
                str(answer).split() if isinstance(answer := self.answers.pop(0), str) else [answer]
            ):
                if isinstance(piece, BaseException):
                    yield Response(text="half an ans")
                    raise piece
                yield Response(text=piece + " ")
        finally:
            self.closed += 1


def talk(stand_in: StandIn, *lines: str) -> Chat:
    chat = Chat(stand_in, GenerationConfig())  # type: ignore[arg-type]
    converse(chat, PlainLines(io.StringIO("".join(f"{line}\n" for line in lines))))
    return chat


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (PromptError("Too odd.", fix="be plain"), "PromptError: Too odd.\n  fix:      be plain"),
        (RuntimeError("broken"), "This should not happen. RuntimeError: broken"),
        (OSError(5, "disk"), "This should not happen. OSError: [Errno 5] disk"),
        (KeyboardInterrupt(), "(stopped; this turn is not part of the conversation)"),
    ],
)
def test_what_goes_wrong_in_a_turn_is_shown_and_the_chat_goes_on(
    error: BaseException, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in = StandIn(error, "fine now")
    chat = talk(stand_in, f"/image {PHOTO}", "one", "two", "/images")
    out = capsys.readouterr().out
    assert shown in out
    assert "fine now" in out
    assert stand_in.closed == 2
    # The images of the turn that failed went with the next one, and were then done with.
    assert [prompt[0] for prompt in stand_in.asked] == ["one", "two"]  # type: ignore[index]
    assert chat.images == []
    assert out.endswith("no images attached\n")


def test_a_reader_that_is_gone_ends_the_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BrokenPipeError):
        talk(StandIn(BrokenPipeError(), "never said"), "one", "two")


def test_one_wrong_image_does_not_lose_its_neighbours(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("it's.png", r"C:\pics\cat.png", "with  spaces.png", '"quoted".png')
    for name in names:
        shutil.copy(PHOTO, folder / name)
    no_image = folder / "no.png"
    no_image.write_text("nothing")
    paths = [str(folder / name) for name in names]
    typed = [*paths[:2], str(folder / "missing.png"), str(no_image), *paths[2:]]
    chat = talk(StandIn(), "/image " + " ".join(typed), "/images")
    out = capsys.readouterr().out
    assert chat.names == paths
    assert out.count("(97x61)") == 4
    assert "missing.png does not exist" in out
    assert out.count("ImageError") == 2
    assert out.endswith("\n".join(paths) + "\n")


def test_an_answer_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    talk(StandIn("\x1b[2J\x9b1mred \x07ä\t漢"), "hi")
    out = capsys.readouterr().out
    assert r"\x1b[2J\x9b1mred" in out
    assert r"\x07ä" in out
    assert "\x1b" not in out


@pytest.mark.parametrize("command", ["/dance", "/", "/image", "/imagesx", "//"])
def test_commands_that_are_not_understood(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in = StandIn()
    talk(stand_in, command)
    assert stand_in.asked == []
    assert ("which?" if command == "/image" else f"unknown command {command};") in (
        capsys.readouterr().out
    )


def test_closed_streams_are_no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `<&-` and `>&-` of a shell leave them."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stdin", io.StringIO("a line"))
    assert chat_module._lines().read() == "a line"
    monkeypatch.setattr(sys, "stdin", None)
    assert chat_module._lines().read() is None


def test_a_pipe_of_bytes_to_one_that_closes(hf_engine: Path) -> None:
    """A name that is no text; and a reader that has seen enough: no traceback."""
    program = "import sys\nfrom vlmforge.cli import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "chat", str(hf_engine), "--max-new-tokens", "2"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(b"/image \xff\xfe'.png\n")
        process.stdin.flush()
        lines = [process.stdout.readline().decode() for _ in range(2)]
        process.stdout.close()
        process.stdin.write(b"hi\n" * 3)
        process.stdin.close()
        errors = process.stderr.read().decode()
    assert "is ready" in lines[0]
    assert r"\udcff\udcfe'.png does not exist" in lines[1]
    assert process.returncode == 141
    # Where loading takes long, it says so.
    assert [line for line in errors.splitlines() if "checking and loading" not in line] == []


# --- a terminal ------------------------------------------------------------------------------


def typed(*keys: str) -> list[str | None]:
    """What a terminal's editor reads of these keys until its end."""
    with create_pipe_input() as terminal:
        editor = LineEditor(tuple(COMMANDS), terminal, DummyOutput())
        terminal.send_text("".join(keys) + CTRL_D)
        return list(iter(editor.read, None))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["hello\r", "again\r"], ["hello", "again"]),
        ([f"two{ESCAPE}\rlines\r"], ["two\nlines"]),
        ([f"two{CTRL_J}lines\r"], ["two\nlines"]),
        (["\x1b[200~pasted\ntext\x1b[201~\r"], ["pasted\ntext"]),
        ([f"never sent{CTRL_C}", "sent\r"], ["sent"]),
        (["it's \\ \"x\r"], ["it's \\ \"x"]),
        ([], []),
    ],
)
def test_keys(keys: list[str], expected: list[str]) -> None:
    assert typed(*keys) == expected


def pressed(key: str, expected: str, *before: str) -> str | None:
    """A line that `key` changed to `expected`, after the lines `before`; Enter follows then.

    The editor does its work on keys in the background, so the key is pressed until it is done.
    """
    with create_pipe_input() as terminal:
        editor = LineEditor(tuple(COMMANDS), terminal, DummyOutput())
        for line in before[:-1]:
            terminal.send_text(line + "\r")
            assert editor.read() == line
        terminal.send_text(before[-1])

        def done() -> bool:
            if editor.typed != expected:
                terminal.send_text(key)
            return editor.typed == expected

        def press() -> None:
            try:
                wait_until(lambda: editor.typed == before[-1])
                wait_until(done)
            finally:
                terminal.send_text("\r")

        finger = threading.Thread(target=press)
        finger.start()
        line = editor.read()
        finger.join()
        return line


def test_the_arrow_goes_back_to_what_was_typed() -> None:
    assert pressed(UP, "one", "one", "two") == "one"


@pytest.mark.parametrize("begun", ["/ren", "/render"])
def test_commands_are_completed(begun: str) -> None:
    assert pressed(TAB, "/render", begun) == "/render"


@pytest.mark.parametrize(
    ("begun", "completed"),
    [
        ("{}/it", "{}/it's here.png"),
        ("{}/it's he", "{}/it's here.png"),
        ("other.png {}/it's he", "other.png {}/it's here.png"),
        ('"{}/it', "\"{}/it's here.png"),
        ("~/ba", r"~/back\slash.png"),
        ("", "it's here.png"),
        ("none.png ", "none.png it's here.png"),
        ("{}/none", None),
    ],
)
def test_paths_are_completed(
    begun: str, completed: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("it's here.png", r"back\slash.png"):
        (tmp_path / name).touch()
    text = f"/image {begun.format(tmp_path)}"
    found = [
        text + completion.text
        for completion in ChatCompleter(()).get_completions(Document(text), CompleteEvent())
    ]
    if completed is None:
        assert found == []
    else:
        assert f"/image {completed.format(tmp_path)}" in found


def test_nothing_that_is_typed_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert typed("a secret\r") == ["a secret"]
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_stops_the_answer_and_not_the_chat(capsys: pytest.CaptureFixture[str]) -> None:
    """The signal itself, while pieces come."""

    class Endless(StandIn):
        def _pieces(self, session: Session) -> Iterator[Response]:
            try:
                for number in range(10**9):
                    yield Response(text=f"{number} ")
                    if len(self.asked) == 2:
                        return
                    if number == 3:
                        signal.raise_signal(signal.SIGINT)
            finally:
                self.closed += 1

    stand_in = Endless()
    talk(stand_in, "count", "again")
    out = capsys.readouterr().out
    assert "0 1 2 3 \n(stopped; this turn" in out
    assert out.endswith("0 \n")
    assert stand_in.closed == 2
