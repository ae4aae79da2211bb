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
        status: answer to everything, where it is not 200.
        seconds_per_block: pause after each 20 kB.
        asked: (path, first byte, token) of each file that was asked for.
    """

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cut_every: int = 0
    status: int = 200
    seconds_per_block: float = 0.0
    asked: list[tuple[str, int, str]] = field(default_factory=list)
    url: str = ""

    def starts(self) -> list[int]:
        return [start for _, start, _ in self.asked]


@contextlib.contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    cut: set[str] = set()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            path, token = self.path.split("?")[0], self.headers.get("Authorization", "").removeprefix("Bearer ")
            if hub.status != 200:
                self.send_error(hub.status)
            elif path.startswith("/api/models/"):
                self.describe(path.removeprefix("/api/models/").removesuffix("/revision/main"))
            elif path.startswith("/plain/"):
                self.send_file(path, hub.repositories["plain"][path.removeprefix("/plain/")], with_body, token)
            else:
                repository, _, name = path.lstrip("/").partition("/resolve/main/")
                if repository in hub.gated and token != "hf_right":
                    self.send_response(403)
                    self.send_header("X-Error-Code", "GatedRepo")
                    self.end_headers()
                elif name in hub.repositories.get(repository, {}):
                    self.send_file(path, hub.repositories[repository][name], with_body, token)
                else:
                    self.send_error(404)

        def describe(self, repository: str) -> None:
            if repository not in hub.repositories:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.end_headers()
                return
            siblings = []
            for name, content in hub.repositories[repository].items():
                item = {"rfilename": name, "size": len(content), "blobId": "0" * 40}
                if not name.endswith(".json"):
                    digest = hashlib.sha256(content).hexdigest()
                    item["lfs"] = {"size": len(content), "sha256": digest, "pointerSize": 130}
                siblings.append(item)
            gated = "auto" if repository in hub.gated else False
            text = json.dumps({"id": repository, "private": False, "gated": gated, "siblings": siblings}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def send_file(self, path: str, content: bytes, with_body: bool, token: str) -> None:
            wanted = self.headers.get("Range", "")
            start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
            if with_body:
                hub.asked.append((path, start, token))
            if start >= len(content) > 0:
                self.send_error(416)
                return
            self.send_response(206 if wanted else 200)
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            if not with_body:
                return
            body = content[start:]
            paths = list(dict.fromkeys(p for p, _, _ in hub.asked))
            if hub.cut_every and path not in cut and (paths.index(path) + 1) % hub.cut_every == 0:
                cut.add(path)
                body = body[: len(body) // 2]
            with contextlib.suppress(ConnectionError):
                for position in range(0, len(body), 20_000):
                    self.wfile.write(body[position : position + 20_000])
                    time.sleep(hub.seconds_per_block)
            self.close_connection = True

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
