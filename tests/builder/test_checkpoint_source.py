"""Checkpoints from folders and from a hub, as a user's program gets them."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hub_server import HubServer
from vlmforge.errors import CheckpointError
from vlmforge_builder.checkpoint import source
from vlmforge_builder.checkpoint.source import resolve_checkpoint

# The hub's client reads its environment once, so each case has a process of its own.
_PROGRAM = """
import sys
from vlmforge.errors import CheckpointError
from vlmforge_builder.checkpoint.source import resolve_checkpoint
for given in sys.argv[1:]:
    spec, _, revision = given.partition("@")
    try:
        print(resolve_checkpoint(spec, revision=revision or None, progress=print))
    except CheckpointError as error:
        print(error)
    print("---")
"""
_FILES = {
    "config.json": b"{}",
    "tokenizer.model": b"sentencepiece" * 100,
    "words.tiktoken": b"YQ== 0",
    "chat_template.jinja": b"{{ messages }}",
    "merges.txt": b"a b",
    "modeling_custom.py": b"raise SystemExit('code of the checkpoint ran')",
    "README.md": b"# words",
}
_BOTH = {"model.safetensors": b"s" * 5000, "pytorch_model.bin": b"b" * 5000}
_SHARDS = {f"pytorch_model-0000{i}-of-00002.bin": b"b" * 5000 for i in (1, 2)}
_REPOS = {
    "org/both": {**_FILES, **_BOTH, **_SHARDS, "tower/pytorch_model.bin": b"t" * 5000},
    "org/pickle": {**_FILES, **_SHARDS, "pytorch_model.bin.index.json": b"{}"},
    "org/others": {
        **_FILES,
        **_SHARDS,
        "pytorch_model.bin.index.json": b"{}",
        "consolidated.safetensors": b"c" * 5000,
        "other.safetensors": b"o" * 5000,
    },
    "org/gated": {**_FILES, **_BOTH},
    "org/forbidden": {**_FILES, **_BOTH},
}

Fetch = Callable[..., str]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    for repo, files in _REPOS.items():
        for name, content in files.items():
            path = tmp_path / "repos" / repo / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    repos = {repo: tmp_path / "repos" / repo for repo in _REPOS}
    with HubServer(repos, gated=("org/gated",), forbidden=("org/forbidden",)) as server:
        yield server


@pytest.fixture
def fetch(hub: HubServer, tmp_path: Path) -> Fetch:
    """Resolve checkpoints, each a name or name@revision, in an empty folder; what was printed."""
    work = tmp_path / "work"
    work.mkdir()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}

    def run(*arguments: str, **environment: str) -> str:
        env = {**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), **environment}
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, *arguments],
            env=env,
            cwd=work,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.removesuffix("---\n")

    return run


def _contents(printed: str) -> dict[str, bytes]:
    folder = Path(printed.splitlines()[-1])
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def _wanted(repo: str, *unwanted: str) -> dict[str, bytes]:
    unwanted = ("modeling_custom.py", "README.md", *unwanted)
    return {name: data for name, data in _REPOS[repo].items() if name not in unwanted}


def test_safetensors_are_fetched_without_the_pickles_beside_them(
    fetch: Fetch, hub: HubServer
) -> None:
    printed = fetch("org/both")
    assert printed.splitlines()[0] == f"fetching org/both (main) from {hub.url}"
    # The tower's folder has no safetensors: its pickle is all there is.
    wanted = _wanted("org/both", "pytorch_model.bin", *_SHARDS)
    assert _contents(printed) == wanted
    assert hub.downloaded() == set(wanted)
    # What `main` means was asked once: both kinds of weights are of one commit.
    assert [path for _, path in hub.requests if path.endswith("/revision/main")] == [
        "/api/models/org/both/revision/main"
    ]


def test_the_hub_is_asked_for_the_checkpoint_and_told_of_nothing_else(
    fetch: Fetch, hub: HubServer
) -> None:
    fetch("org/both", AGENT="someone", HF_HUB_DISABLE_TELEMETRY="0")
    assert hub.requests
    for _, path in hub.requests:
        assert path.startswith(("/api/models/org/both", "/org/both/resolve/", "/lfs/org/both/"))
    assert all("torch" not in agent and "agent/" not in agent for agent in hub.agents)


def test_pickles_are_fetched_where_nothing_stands_for_them(fetch: Fetch, hub: HubServer) -> None:
    """`open_store` and transformers read the pickles where there are other safetensors; one file
    more costs less than one less.

    The weights by the names of the code that trained them are never fetched.
    """
    pickle, others = fetch("org/pickle", "org/others").split("---\n")
    assert _contents(pickle) == _wanted("org/pickle")
    assert _contents(others) == _wanted("org/others", "consolidated.safetensors")
    assert not {"modeling_custom.py", "consolidated.safetensors"} & set(hub.downloaded())


def test_second_time_and_offline_nothing_is_fetched(fetch: Fetch, hub: HubServer) -> None:
    first = fetch("org/both")
    hub.requests.clear()
    assert fetch("org/both") == first
    assert not hub.downloaded()
    hub.requests.clear()
    assert fetch("org/both", HF_HUB_OFFLINE="1").splitlines()[-1] == first.splitlines()[-1]
    unplugged = fetch("org/both", HF_ENDPOINT="http://127.0.0.1:9")
    assert unplugged.splitlines()[-1] == first.splitlines()[-1]
    assert hub.requests == []


def test_commit_as_revision(fetch: Fetch, hub: HubServer) -> None:
    commit = hub.commit("org/pickle")
    printed = fetch(f"org/pickle@{commit}")
    assert printed.splitlines()[0] == f"fetching org/pickle ({commit}) from {hub.url}"
    assert _contents(printed) == _wanted("org/pickle")


def test_broken_download_is_resumed(fetch: Fetch, hub: HubServer) -> None:
    hub.cut = {"model.safetensors"}
    assert _contents(fetch("org/both"))["model.safetensors"] == _BOTH["model.safetensors"]
    assert not hub.cut


def test_offline_and_not_cached(fetch: Fetch, hub: HubServer, tmp_path: Path) -> None:
    printed = fetch("org/both", HF_HUB_OFFLINE="1")
    assert hub.requests == []
    assert f"org/both is neither a folder nor could it be fetched from {hub.url}." in printed
    assert f"no folder {tmp_path / 'work' / 'org/both'}; offline mode is on" in printed
    assert "fix:      unset HF_HUB_OFFLINE" in printed


REFUSALS = {
    "org/nothing": ("no such model, or a private one", "check the spelling (org/name)"),
    "org/gated": ("the model is gated", "accept its terms at http://127.0.0.1:"),
    "org/forbidden": ("access refused (HTTP 403)", "set HF_TOKEN"),
    "org/both@v9": ("no revision 'v9'", "check the revision on the hub"),
}


def test_refusals_of_the_hub(fetch: Fetch) -> None:
    parts = fetch(*REFUSALS).split("---\n")
    for (given, (found, fix)), printed in zip(REFUSALS.items(), parts, strict=True):
        name = given.partition("@")[0]
        assert f"{name} is neither a folder nor could it be fetched from" in printed
        assert f"; {found}\n" in printed
        assert "expected: a folder, or the id of a model on the hub that you may read" in printed
        assert f"fix:      {fix}" in printed


def test_hub_out_of_reach(fetch: Fetch) -> None:
    printed = fetch("org/both", HF_ENDPOINT="http://127.0.0.1:9")
    assert "Connection refused" in printed
    assert "check the connection and HF_ENDPOINT (http://127.0.0.1:9)" in printed


@pytest.mark.parametrize(
    ("failure", "found", "fix"),
    [
        (OSError(errno.ENOSPC, "No space left"), "no space left on the disk of ", "free space"),
        (RuntimeError("odd\nmore"), "RuntimeError: odd", "check the connection and HF_ENDPOINT"),
        (PermissionError(errno.EACCES, "Denied", "/kept"), "Denied: /kept", "set HF_HOME to"),
        (OSError(errno.EROFS, "Read-only", "/kept"), "Read-only: /kept", "set HF_HOME to"),
    ],
)
def test_failures_while_fetching(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, found: str, fix: str
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise failure

    monkeypatch.setattr(source, "snapshot_download", fail)
    monkeypatch.setattr(source.constants, "HF_HUB_CACHE", "/kept")
    with pytest.raises(CheckpointError) as caught:
        resolve_checkpoint("org/name")
    assert found in caught.value.found
    assert "more" not in caught.value.found
    assert caught.value.fix.startswith(fix)
    assert caught.value.__cause__ is failure


def test_folder_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    notes: list[str] = []
    assert resolve_checkpoint("org/name", progress=notes.append) == Path("org/name")
    assert resolve_checkpoint(tmp_path) == tmp_path
    assert notes == []


def test_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="The revision 'v1' was asked of the folder"):
        resolve_checkpoint(tmp_path, revision="v1")


@pytest.mark.parametrize("spec", ["nothing", "./a/b", "a/b/c", "../a", "/no/such", "a/b c"])
def test_neither_folder_nor_hub_id(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "x"
    work.mkdir()
    monkeypatch.chdir(work)
    with pytest.raises(CheckpointError) as caught:
        resolve_checkpoint(spec)
    assert caught.value.summary == f"There is no checkpoint at {Path(spec)}."
    assert caught.value.found == f"no folder {Path(spec).absolute()}"
    assert "a hub id that looks like org/name" in caught.value.expected
    assert caught.value.fix == "check the spelling and the working directory"


def test_file_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(CheckpointError) as caught:
        resolve_checkpoint(str(path))
    assert caught.value.found == f"a file at {path}"


def test_no_home_to_download_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client would make a folder called `~` where we are."""
    monkeypatch.setattr(source.constants, "HF_HUB_CACHE", "~/.cache/huggingface/hub")
    monkeypatch.setattr(source, "snapshot_download", lambda *_, **__: pytest.fail("it downloads"))
    for fetch in (resolve_checkpoint, source.fetch_config):
        with pytest.raises(CheckpointError, match="no place to download org/name") as caught:
            fetch("org/name")
        assert caught.value.fix.startswith("set HF_HOME to a folder")
