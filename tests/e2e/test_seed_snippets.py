"""Every snippet of the LMDeploy guide runs unchanged under `install_as_lmdeploy()`.

`tests/data/seed_snippets/` has the snippets verbatim. Their model paths are folders of the working
directory here, and their image URLs are served by a local HTTP server.
"""

from __future__ import annotations

import runpy
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import vlmforge.vl.fetch
from conftest import DATA, IMAGES, ORIGINAL
from vlmforge import Pipeline, Response, Session
from vlmforge.compat import install_as_lmdeploy
from vlmforge.engine.manifest import load_manifest
from vlmforge.vl.image_limits import ImageLimits

SNIPPETS = DATA / "seed_snippets"
SERVED = {
    "tiger.jpeg": "photo_640x480.png",
    "human-pose.jpg": "square_450x450.png",
    "det.jpg": "wide_1000x333.png",
}


class _Images(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name = SERVED[Path(urlsplit(self.path).path).name]
        data = (IMAGES / name).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        self.server.served.append(name)  # type: ignore[attr-defined]

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the images that were fetched; every URL leads to the local server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Images)
    server.served = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    fetch = vlmforge.vl.fetch.fetch_bytes

    def local(url: str, *, limits: ImageLimits, allow_private: bool) -> bytes:
        assert not allow_private
        address = f"http://127.0.0.1:{server.server_port}{urlsplit(url).path}"
        return fetch(address, limits=limits, allow_private=True)

    monkeypatch.setattr(vlmforge.vl.fetch, "fetch_bytes", local)
    yield server.served  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


def stand(model: Path, folder: Path) -> None:
    """Let the snippets' model paths below `folder` be `model`."""
    for name in ("liuhaotian/llava-v1.6-vicuna-7b", "liuhaotian/llava-v1.5-7b"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(model)
    (folder / "local_model_folder").symlink_to(model)


@pytest.fixture
def folders(original_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which the snippets' model paths are a prebuilt engine.

    It was built without options, so that its window is the model's: 4096 tokens. Several snippets
    ask for 8192.
    """
    assert load_manifest(original_engine).decode.session_len == 4096
    stand(original_engine, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folders: Path, served: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Run a snippet by its name; its globals."""
    kept = {name: module for name, module in sys.modules.items() if name.startswith("lmdeploy")}
    install_as_lmdeploy()
    pipes: list[Pipeline] = []

    def run_snippet(name: str) -> dict[str, object]:
        (path,) = SNIPPETS.glob(f"*_{name}.py")
        values = runpy.run_path(str(path))
        pipes.append(values["pipe"])
        return values

    yield run_snippet
    for pipe in pipes:
        pipe.close()
    for name in [name for name in sys.modules if name.startswith("lmdeploy")]:
        del sys.modules[name]
    sys.modules.update(kept)


def answered(response: object, *, sampled: bool = False) -> Response:
    """A whole answer: it ended, and has the ids that it says. A sampled one may be empty."""
    assert isinstance(response, Response)
    assert response.finish_reason in ("stop", "length")
    assert response.generate_token_len == len(response.token_ids)
    assert sampled or response.text
    return response


ONE_IMAGE = ("hello_world", "openai_messages", "session_len", "image_token", "vision_config")


def test_one_image(run, served: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Tuple, messages and settings give the same answer."""
    ids = {}
    for name in (*ONE_IMAGE, "chat_template"):
        served.clear()
        values = run(name)
        response = answered(values["response"])
        assert served == ["photo_640x480.png"], name
        assert response.input_token_len > 576, name
        assert repr(response) in capsys.readouterr().out, name
        if name == "image_token":  # here the image comes after the text
            rendered = values["pipe"].render(("x<IMAGE_TOKEN>", "y.png"))
            assert rendered.text.endswith("USER: x<image> ASSISTANT:")
        else:
            ids[name] = response.token_ids
    assert all(found == ids["hello_world"] for found in ids.values()), ids


def test_tensor_parallelism(run, served: list[str]) -> None:
    """The engine is cut for two ranks, once."""
    values = run("tensor_parallel")
    assert values["pipe"].manifest.parallel.tp == 2
    assert answered(values["response"]).token_ids == run("hello_world")["response"].token_ids
    values = run("sampling")
    answered(values["response"], sampled=True)
    assert not values["gen_config"].greedy
    assert values["gen_config"].random_seed is None  # the caller's config is left as it was


@pytest.mark.usefixtures("traces_for_children")
def test_from_the_checkpoint(
    run, folders: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One engine is built, whatever window a snippet asks for, and answers as the prebuilt one."""
    expected = run("multi_images")["response"].token_ids
    elsewhere = tmp_path_factory.mktemp("checkpoint")
    monkeypatch.setenv("VLMFORGE_CACHE", str(elsewhere / "cache"))
    (elsewhere / "openai").symlink_to(ORIGINAL / "openai")  # where it finds its vision tower
    stand(ORIGINAL / "checkpoint", elsewhere)
    monkeypatch.chdir(elsewhere)
    assert answered(run("multi_images")["response"]).token_ids == expected
    assert all(answered(run(name)["response"]) for name in (*ONE_IMAGE, "chat_template"))
    assert all(answered(response).text for response in run("batch")["response"])
    assert answered(run("multi_turn")["sess"].response, sampled=True).cached_tokens > 576
    assert len(list((elsewhere / "cache" / "engines").iterdir())) == 1


def test_multi_images(run, served: list[str]) -> None:
    response = answered(run("multi_images")["response"])
    assert served == ["square_450x450.png", "wide_1000x333.png"]
    assert response.input_token_len > 2 * 576


def test_batch(run) -> None:
    values = run("batch")
    responses = values["response"]
    assert isinstance(responses, list)
    assert [answered(r).index for r in responses] == [0, 1]
    alone = [values["pipe"](prompt) for prompt in values["prompts"]]
    assert [r.token_ids for r in responses] == [r.token_ids for r in alone]


def test_multi_turn(run, capsys: pytest.CaptureFixture[str]) -> None:
    session = run("multi_turn")["sess"]
    assert isinstance(session, Session)
    assert len(session.history) == 2
    second = answered(session.response, sampled=True)
    assert second.cached_tokens > 576  # the image was not run again
    printed = capsys.readouterr().out
    assert printed == "".join(f"{text}\n" for _, text in session.history)
