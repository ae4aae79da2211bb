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
    """What the hub holds, what it does, and what it was asked."""

    repositories: dict[str, dict[str, bytes]]  # file -> content; those of "plain" are served at /plain/<file>
    gated: set[str] = field(default_factory=set)  # repositories that ask for the token "hf_right"
    cut_every: int = 0  # every so many files are cut in half, the first time they are asked for
    status: int = 200  # the answer to everything, where it is another
    seconds_per_block: float = 0.0  # pause after each 20 kB
    asked: list[tuple[str, int]] = field(default_factory=list)  # path and first byte of each file that was asked for
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

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes = b"", end: int | None = None, **headers: str) -> None:
        """Announce the whole body, and send it up to ``end``."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        sent = body[:end] if self.command == "GET" else b""
        with contextlib.suppress(ConnectionError):
            for position in range(0, len(sent), 20_000):
                self.wfile.write(sent[position : position + 20_000])
                time.sleep(self.hub.seconds_per_block)

    def send_file(self, path: str, content: bytes) -> None:
        wanted, hub, end = self.headers.get("Range", ""), self.hub, None
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        if self.command == "GET":
            hub.asked.append((path, start))
            order = list(dict.fromkeys(path for path, _ in hub.asked)).index(path) + 1
            if hub.cut_every and path not in hub.cut and order % hub.cut_every == 0:
                hub.cut.add(path)
                end = (len(content) - start) // 2
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": "0" * 40}
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.answer(206 if wanted else 200, content[start:], end, **headers)


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
