"""More than one machine: `deploy/ray` on a cluster of two nodes, both on this one. Once a night.

`make test-nightly` installs what this needs (the extra `nightly`).
"""

from __future__ import annotations

import base64
import io
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image, ImageDraw

from conftest import HANGS, ROOT, wait_until
from vlmforge import GenerationConfig, Pipeline, Response, pipeline
from vlmforge.server.settings import server_vision_config

pytestmark = [pytest.mark.nightly, pytest.mark.xdist_group("ray")]  # one cluster

PORT = 18_642
URL = f"http://127.0.0.1:{PORT}/v1/chat/completions"
GREEDY = GenerationConfig(max_new_tokens=12, do_sample=False)
# On a busy machine, Ray's processes begin slowly: it would end them before they have.
PATIENT = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": str(HANGS),
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": str(HANGS),
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "PYTHONPATH": str(ROOT),
}


@pytest.fixture(scope="module")
def pipe(hf_engine: Path) -> Iterator[Pipeline]:
    with pipeline(hf_engine, vision_config=server_vision_config()) as made:
        yield made


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two nodes."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in PATIENT.items():
            patch.setenv(name, value)
        patch.syspath_prepend(str(ROOT))
        import ray
        from ray.cluster_utils import Cluster

        node: Any = {"num_cpus": 4, "object_store_memory": 100 << 20, "include_dashboard": False}
        made = Cluster(initialize_head=True, head_node_args=node)
        made.add_node(num_cpus=4, object_store_memory=100 << 20)
        ray.init(address=made.address, namespace="serve")
        try:
            assert len(ray.nodes()) == 2
            yield made.address
        finally:
            ray.shutdown()
            made.shutdown()


@pytest.fixture(scope="module")
def served(cluster: str, hf_engine: Path) -> Iterator[None]:
    """Two replicas, behind one address."""
    from deploy.ray.serve_app import build
    from ray import serve

    serve.start(http_options={"port": PORT})
    serve.run(build(str(hf_engine), replicas=(2, 2), cpus=1))
    yield
    serve.shutdown()


def image(number: int) -> Image.Image:
    made = Image.new("RGB", (60, 40), (255, 255, 3 * number))
    ImageDraw.Draw(made).ellipse((10, 5, 45, 35), fill=(5 * number, 40, 200 - 4 * number))
    return made


def user(text: str, number: int | None = None) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if number is not None:
        buffer = io.BytesIO()
        image(number).save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return {"role": "user", "content": parts}


def ask(messages: list[dict[str, Any]], **given: Any) -> httpx.Response:
    body = {"messages": messages, "temperature": 0, "max_tokens": 12, **given}
    return httpx.post(URL, json=body, timeout=HANGS)


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def wanted(pipe: Pipeline, messages: list[dict[str, Any]]) -> str:
    answer = pipe(messages, GREEDY)
    assert isinstance(answer, Response)
    return answer.text


def test_answers_are_those_of_the_pipeline(served: None, pipe: Pipeline) -> None:
    for messages in ([user("hello")], [user("what is this?", 1)], [user("and this?", 2)]):
        assert text_of(ask(messages)) == wanted(pipe, messages)
        streamed = ask(messages, stream=True)
        assert streamed.headers["content-type"].startswith("text/event-stream")
        assert streamed.text.rstrip().endswith("data: [DONE]")
    refused = ask([user("hello")], temperature=9)
    assert refused.status_code == 400 and "temperature" in refused.json()["error"]["message"]


def test_a_conversation_stays_where_it_is_cached(served: None) -> None:
    replicas = set()
    for number in range(40):  # a hash deals them out, so a few may all have one replica
        turns = [user("what is this?", 10 + number)]
        first = ask(turns)
        turns += [{"role": "assistant", "content": text_of(first)}, user("and of what colour?")]
        second = ask(turns)
        usage = second.json()["usage"]
        prompt = first.json()["usage"]["prompt_tokens"]
        assert usage["prompt_tokens_details"]["cached_tokens"] >= prompt - 1
        assert first.headers["x-replica"] == second.headers["x-replica"]
        replicas.add(first.headers["x-replica"])
    assert len(replicas) == 2  # conversations are spread over them


def test_a_replica_that_is_killed_loses_nothing(
    served: None, pipe: Pipeline, hf_engine: Path
) -> None:
    import ray
    from openai import OpenAI

    client = OpenAI(
        base_url=URL.removesuffix("/chat/completions"),
        api_key="none",
        max_retries=20,
        timeout=HANGS,
    )
    prompts = [[user(f"what is number {i}?", 30 + i % 8)] for i in range(60)]
    begun = threading.Semaphore(0)

    def one(messages: list[dict[str, Any]]) -> str:
        begun.release()
        found = client.chat.completions.create(
            model=hf_engine.name,
            messages=messages,  # type: ignore[arg-type]
            temperature=0,
            max_tokens=12,
        )
        return str(found.choices[0].message.content)

    with ThreadPoolExecutor(8) as clients:
        answers = [clients.submit(one, messages) for messages in prompts]
        for _ in range(12):
            begun.acquire()
        ray.kill(_replicas()[0], no_restart=True)
        texts = [answer.result(HANGS) for answer in answers]
    assert texts == [wanted(pipe, messages) for messages in prompts]
    numbers, found = itertools.count(), set[str]()

    def both() -> bool:
        found.add(ask([user(f"{next(numbers)}")]).headers["x-replica"])
        return len(found) > 1

    wait_until(both)


def _replicas() -> list[Any]:
    import ray

    names = ray.util.list_named_actors(all_namespaces=True)
    found = [name for name in names if "#replica#" in name["name"]]
    return [ray.get_actor(name["name"], namespace=name["namespace"]) for name in found]


def test_a_batch_that_was_killed_goes_on(
    cluster: str, hf_engine: Path, pipe: Pipeline, tmp_path: Path
) -> None:
    import pyarrow.parquet as parquet

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(40):
        image(number).save(pictures / f"{number:02}.png")
    (pictures / "broken.png").write_bytes(b"no picture")
    output = tmp_path / "out"
    command = [sys.executable, "-m", "deploy.ray.batch", hf_engine, pictures, "-o", output]
    command += ["--question", "what is this?", "--max-new-tokens", "12", "--batch-size", "2"]
    environment = {**os.environ, **PATIENT, "RAY_ADDRESS": cluster}
    first = subprocess.Popen(command, cwd=ROOT, env=environment)
    while first.poll() is None and not list(output.glob("answers/*.parquet")):
        time.sleep(0.01)
    assert first.poll() is None, "it ended before it could be killed"
    first.send_signal(signal.SIGKILL)
    first.wait()
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=HANGS)
    rows = parquet.read_table(output / "answers").to_pylist()
    assert sorted(Path(row["path"]).name for row in rows) == sorted(
        path.name for path in pictures.iterdir()
    )
    for row in rows:
        if row["path"].endswith("broken.png"):
            assert row["answer"] == "" and "image" in row["error"]
            continue
        answer = pipe(("what is this?", (pictures / Path(row["path"]).name).read_bytes()), GREEDY)
        assert isinstance(answer, Response)
        assert row["answer"] == answer.text and row["error"] == ""
    # Once all is answered, nothing is left to do, and nothing is done twice.
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=HANGS)
    assert parquet.read_table(output / "answers").num_rows == len(rows)
