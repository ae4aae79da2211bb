"""A Hugging Face hub, and a plain site, on this machine: ranges, hashes, gates, connections that are cut."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Hub:
    """What the hub holds, what it does, and what it was asked.

    Attributes:
        repositories: content by repository and file; files under ``"plain"`` are served at ``/plain/<file>``.
        gated: repositories that ask for the token ``"hf_right"``.
        cut_every: every so many files are cut in half, the first time they are asked for.
        status, seconds_per_block: answer to everything, where it is not 200; pause after each 20 kB.
        asked: path and first byte of each file that was asked for.
    """

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cut_every: int = 0
    status: int = 200
    seconds_per_block: float = 0.0
    asked: list[tuple[str, int]] = field(default_factory=list)
    cut: set[str] = field(default_factory=set)
    url: str = ""

    def describe(self, repository: str) -> bytes:
        """What the hub's API says about a repository."""
        siblings = []
        for name, content in self.repositories[repository].items():
            lfs = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 130}
            item = {"rfilename": name, "size": len(content), "blobId": "0" * 40}
            siblings.append(item if name.endswith(".json") else item | {"lfs": lfs})
        gated = "auto" if repository in self.gated else False
        return json.dumps({"id": repository, "private": False, "gated": gated, "siblings": siblings}).encode()


class Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, hub = self.path.split("?")[0], self.hub
        repository, _, name = path.removeprefix("/").rpartition("/" if path.startswith("/plain/") else "/resolve/main/")
        model = path.removeprefix("/api/models/").removesuffix("/revision/main")
        if hub.status != 200:
            self.answer(hub.status)
        elif path.startswith("/api/models/") and model in hub.repositories:
            self.answer(200, hub.describe(model))
        elif path.startswith("/api/models/"):
            self.answer(404, **{"X-Error-Code": "RepoNotFound"})
        elif repository in hub.gated and self.headers.get("Authorization") != "Bearer hf_right":
            self.answer(403, **{"X-Error-Code": "GatedRepo"})
        else:
            self.send_file(path, hub.repositories[repository][name])

    def answer(self, status: int, body: bytes = b"", n_bytes: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body) if n_bytes is None else n_bytes), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            for position in range(0, len(body) if self.command == "GET" else 0, 20_000):
                self.wfile.write(body[position : position + 20_000])
                time.sleep(self.hub.seconds_per_block)

    def send_file(self, path: str, content: bytes) -> None:
        wanted, hub = self.headers.get("Range", ""), self.hub
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        body = content[start:]
        if self.command == "GET":
            hub.asked.append((path, start))
            order = list(dict.fromkeys(p for p, _ in hub.asked)).index(path) + 1
            if hub.cut_every and path not in hub.cut and order % hub.cut_every == 0:
                hub.cut.add(path)
                body = body[: len(body) // 2]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": "0" * 40}
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.answer(206 if wanted else 200, body, len(content) - start, **headers)


@contextlib.contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
