"""A local server that speaks the model hub's protocol, for tests.

    with HubServer({"org/name": folder}) as hub:
        run(..., env={"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)})

As the hub does, it redirects downloads of weights to another address (LFS), lists files in pages,
and tells errors by `X-Error-Code`. Each repository has one revision, `main`.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

_LARGE = (".safetensors", ".bin", ".model")
_PAGE = 3


class HubServer(ThreadingHTTPServer):
    """Serves `{repo_id: folder}`; files are read at each request.

    Attributes:
        requests: (method, path) of every request.
        agents: The `User-Agent` of every request.
        gated: Repositories whose files are refused with 403; their lists of files are public.
        forbidden: Repositories that are refused with a bare 403, by a token without the right.
        cut: Names of files whose next download breaks off in the middle.
    """

    daemon_threads = True

    def __init__(
        self,
        repos: Mapping[str, Path],
        *,
        gated: tuple[str, ...] = (),
        forbidden: tuple[str, ...] = (),
        cut: tuple[str, ...] = (),
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos = dict(repos)
        self.gated, self.forbidden, self.cut = gated, forbidden, set(cut)
        self.requests: list[tuple[str, str]] = []
        self.agents: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        # Another host than the hub, as in real life: the client stops its HEAD there.
        self.content_url = f"http://localhost:{self.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def files(self, repo: str) -> dict[str, Path]:
        folder = self.repos[repo]
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path for path in paths}

    def commit(self, repo: str) -> str:
        names = [f"{name} {_sha(path)}" for name, path in self.files(repo).items()]
        return hashlib.sha1(repr((repo, names)).encode()).hexdigest()

    def downloaded(self) -> set[str]:
        """Names of the files whose content was fetched."""
        paths = [urlsplit(path).path for method, path in self.requests if method == "GET"]
        return {unquote(p.split("/", 5)[5]) for p in paths if "/resolve/" in p or "/lfs/" in p}

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is none of ours."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def _route(self) -> None:
        self.server.requests.append((self.command, self.path))
        self.server.agents.append(self.headers.get("User-Agent", ""))
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        match parts:
            case ["api", "models", org, name]:
                self._checked(f"{org}/{name}", "main", self._send_info)
            case ["api", "models", org, name, "revision", revision]:
                self._checked(f"{org}/{name}", revision, self._send_info)
            case ["api", "models", org, name, "tree", revision]:
                self._checked(f"{org}/{name}", revision, self._send_tree)
            case [org, name, "resolve", revision, *rest]:
                send = partial(self._send_file, name="/".join(rest))
                self._checked(f"{org}/{name}", revision, send)
            case ["lfs", org, name, _, *rest]:
                self._send_content(self.server.files(f"{org}/{name}")["/".join(rest)], {})
            case _:
                self._send(404)

    def _checked(self, repo: str, revision: str, send: Callable[[str], None]) -> None:
        if repo not in self.server.repos:
            self._refuse(404, "RepoNotFound", "Repository not found")
        elif repo in self.server.forbidden:
            self._refuse(403, "", "Your token lacks the permission")
        elif revision not in ("main", self.server.commit(repo)):
            self._refuse(404, "RevisionNotFound", "Invalid rev id")
        else:
            send(repo)

    def _send_info(self, repo: str) -> None:
        siblings = [{"rfilename": name} for name in self.server.files(repo)]
        info = {"id": repo, "sha": self.server.commit(repo), "siblings": siblings}
        self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._send(status, headers={"X-Error-Code": code, "X-Error-Message": message})

    def _send_tree(self, repo: str) -> None:
        rows = []
        for name, path in self.server.files(repo).items():
            size = path.stat().st_size
            row: dict[str, object] = {"type": "file", "path": name, "size": size}
            row["oid"] = _sha(path)[:40]
            if path.suffix in _LARGE:
                row["lfs"] = {"oid": _sha(path), "size": size, "pointerSize": 130}
            rows.append(row)
        url = urlsplit(self.path)
        start = int(parse_qs(url.query).get("cursor", ["0"])[0])
        headers = {"Content-Type": "application/json"}
        if start + _PAGE < len(rows):
            following = f"{self.server.url}{url.path}?recursive=True&cursor={start + _PAGE}"
            headers["Link"] = f'<{following}>; rel="next"'
        page = json.dumps(rows[start : start + _PAGE]).encode()
        self._send(200, page, headers)

    def _send_file(self, repo: str, name: str) -> None:
        path = self.server.files(repo).get(name)
        commit = self.server.commit(repo)
        if repo in self.server.gated:
            self._refuse(403, "GatedRepo", "Access is restricted")
        elif path is None:
            self._refuse(404, "EntryNotFound", "Entry not found")
        elif path.suffix in _LARGE:
            headers = {
                "Location": f"{self.server.content_url}/lfs/{repo}/{commit}/{quote(name)}",
                "X-Repo-Commit": commit,
                "X-Linked-Size": str(path.stat().st_size),
                "X-Linked-Etag": f'"{_sha(path)}"',
            }
            self._send(302, headers=headers)
        else:
            self._send_content(path, {"X-Repo-Commit": commit, "ETag": f'"{_sha(path)[:40]}"'})

    def _send_content(self, path: Path, headers: Mapping[str, str]) -> None:
        data, status = path.read_bytes(), 200
        if (wanted := self.headers.get("Range", "")).startswith("bytes="):
            first = int(wanted.removeprefix("bytes=").partition("-")[0])
            headers = {**headers, "Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"}
            data, status = data[first:], 206
        sent = len(data)
        if self.command == "GET" and path.name in self.server.cut:
            self.server.cut.remove(path.name)
            sent //= 2
        self._send(status, data, headers, sent)

    def _send(
        self,
        status: int,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        sent: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:sent])
            self.close_connection = sent is not None and sent < len(body)

    def log_message(self, *_: object) -> None:
        pass


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
