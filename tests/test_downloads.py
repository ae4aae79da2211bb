"""Downloads from real HTTP servers on this machine that cut, lie, redirect and refuse; archives that try to escape."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.server
import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.weights import fetch as downloads
from helpers.weights.fetch import DownloadError
from helpers.weights.tensors import WeightFileError

CONTENT = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8).tobytes()
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def quiet(_: str) -> None: ...


@dataclass
class Site:
    """What the server does, and what it was asked."""

    content: bytes = CONTENT
    etag: str = '"v1"'
    cut_after: list[int] = field(default_factory=list)  # bytes sent before each of the next connections is cut
    ranges: bool = True
    status: int = 200
    redirect: str = ""
    seconds_per_block: float = 0.0
    asked: list[dict[str, str]] = field(default_factory=list)
    url: str = ""
    extra_headers: dict[str, str] = field(default_factory=dict)


@contextlib.contextmanager
def serve(site: Site) -> Iterator[Site]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            site.asked.append({"path": self.path, "method": self.command, **dict(self.headers)})
            if site.redirect:
                self.send_response(302)
                self.send_header("Location", site.redirect)
                self.end_headers()
                return
            if site.status != 200:
                self.send_error(site.status)
                return
            start = 0
            wanted = self.headers.get("Range", "")
            unchanged = self.headers.get("If-Range", site.etag) == site.etag
            if site.ranges and wanted and unchanged:
                start = int(wanted.removeprefix("bytes=").rstrip("-"))
                if start >= len(site.content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(site.content)}")
                    self.end_headers()
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(site.content) - 1}/{len(site.content)}")
            else:
                self.send_response(200)
            self.send_header("ETag", site.etag)
            self.send_header("Content-Length", str(len(site.content) - start))
            for key, value in site.extra_headers.items():
                self.send_header(key, value)
            self.end_headers()
            if not with_body:
                return
            body = site.content[start:]
            if site.cut_after:
                body = body[: site.cut_after.pop(0)]
            for position in range(0, len(body), 20_000):
                self.wfile.write(body[position : position + 20_000])
                time.sleep(site.seconds_per_block)
            self.close_connection = True

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    site.url = f"http://127.0.0.1:{server.server_address[1]}/file.dat"
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def site() -> Iterator[Site]:
    with serve(Site()) as running:
        yield running


def get(site: Site, target: Path, **options: object) -> Path:
    return downloads.fetch(site.url, target, checks={"sha256": SHA256}, wait_seconds=0.01, log=quiet, **options)


def starts(site: Site) -> list[int]:
    """First byte asked for by each connection."""
    return [int(asked.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-")) for asked in site.asked]


def test_whole_file_and_nothing_left_over(site: Site, tmp_path: Path) -> None:
    assert get(site, tmp_path / "x").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    get(site, tmp_path / "x")
    assert len(site.asked) == 1  # a second call asks nobody


def test_cut_connections_go_on_where_they_stopped(site: Site, tmp_path: Path) -> None:
    site.cut_after = [100_000, 50_000, 1]
    assert get(site, tmp_path / "x").read_bytes() == CONTENT
    assert starts(site) == [0, 100_000, 150_000, 150_001]


def test_kill_near_the_end_does_not_start_over(tmp_path: Path) -> None:
    with serve(Site(seconds_per_block=0.03)) as site:
        code = f"from helpers import downloads; downloads.fetch({site.url!r}, {str(tmp_path / 'x')!r})"
        process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1])
        part = tmp_path / "x.part"
        while not part.exists() or part.stat().st_size < 200_000:
            assert process.poll() is None
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        n_before = part.stat().st_size
        site.seconds_per_block = 0
        assert not (tmp_path / "x").exists()
        assert get(site, tmp_path / "x").read_bytes() == CONTENT
        assert starts(site)[-1] == n_before >= 200_000


def test_complete_part_is_only_hashed(site: Site, tmp_path: Path) -> None:
    site.cut_after = [299_999]
    with pytest.raises(DownloadError):
        get(site, tmp_path / "x", n_tries=1)
    with open(tmp_path / "x.part", "ab") as file:
        file.write(CONTENT[-1:])
    assert get(site, tmp_path / "x").read_bytes() == CONTENT
    assert starts(site) == [0, 300_000]  # nothing was sent a second time


def test_a_changed_file_is_not_glued_to_the_old_part(site: Site, tmp_path: Path) -> None:
    site.cut_after = [100_000]
    with pytest.raises(DownloadError, match="kept in"):
        get(site, tmp_path / "x", n_tries=1)
    site.content, site.etag = CONTENT[::-1], '"v2"'
    target = downloads.fetch(site.url, tmp_path / "x", wait_seconds=0.01, log=quiet)
    assert target.read_bytes() == CONTENT[::-1]


def test_server_without_ranges(site: Site, tmp_path: Path) -> None:
    site.ranges, site.cut_after = False, [100_000]
    assert get(site, tmp_path / "x").read_bytes() == CONTENT


def test_part_of_another_address_is_thrown_away(site: Site, tmp_path: Path) -> None:
    site.cut_after = [100_000]
    with pytest.raises(DownloadError):
        get(site, tmp_path / "x", n_tries=1)
    with serve(Site(content=b"other" * 30_000)) as other:
        target = downloads.fetch(other.url, tmp_path / "x", log=quiet)
    assert target.read_bytes() == b"other" * 30_000


def test_04_flipped_bit_is_set_aside_and_fetched_anew(site: Site, tmp_path: Path) -> None:
    site.cut_after = [100_000]
    with pytest.raises(DownloadError):
        get(site, tmp_path / "x", n_tries=1)
    with open(tmp_path / "x.part", "r+b") as file:
        file.seek(5)
        file.write(bytes([CONTENT[5] ^ 1]))
    said: list[str] = []
    target = downloads.fetch(site.url, tmp_path / "x", checks={"sha256": SHA256}, wait_seconds=0, log=said.append)
    assert target.read_bytes() == CONTENT
    assert any("damaged, or another version" in line for line in said) and (tmp_path / "x.wrong").exists()


@pytest.mark.parametrize("check", [{"sha256": "0" * 64}, {"md5": "0" * 32}, {"git_blob": "0" * 40}])
def test_04_content_that_stays_wrong_never_gets_the_name(site: Site, tmp_path: Path, check: dict) -> None:
    with pytest.raises(DownloadError, match=r"expected 0+: damaged"):
        downloads.fetch(site.url, tmp_path / "x", checks=check, wait_seconds=0, log=quiet)
    assert not (tmp_path / "x").exists() and (tmp_path / "x.wrong").exists()


def test_size_known_beforehand_is_checked(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="offers 300000 bytes, expected 7"):
        downloads.fetch(site.url, tmp_path / "x", n_bytes=7, wait_seconds=0, log=quiet)


def test_hashes_of_all_three_kinds(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"hello\n")
    assert downloads.file_hash(tmp_path / "x", "git_blob") == "ce013625030ba8dba906f756967f9e9ca394464a"  # git's own
    assert downloads.file_hash(tmp_path / "x", "md5") == "b1946ac92492d2347c6235b4d2611184"
    with pytest.raises(ValueError, match="allowed are sha256"):
        downloads.file_hash(tmp_path / "x", "crc")


@pytest.mark.parametrize("status", [401, 403, 404])
def test_refusals_say_what_to_do(site: Site, tmp_path: Path, status: int) -> None:
    site.status = status
    with pytest.raises(DownloadError, match="put it at .*x"):
        get(site, tmp_path / "x")
    assert len(site.asked) == 1  # asking again would not help


def test_server_errors_are_tried_again_then_given_up(site: Site, tmp_path: Path) -> None:
    site.status = 503
    with pytest.raises(DownloadError, match="failed 3 times in a row .HTTP status 503"):
        get(site, tmp_path / "x", n_tries=3)
    assert len(site.asked) == 3


def test_token_goes_to_its_host_only_and_into_no_message(tmp_path: Path, site: Site, capsys) -> None:
    with serve(Site(redirect=site.url.replace("127.0.0.1", "localhost"))) as first:
        downloads.fetch(first.url, tmp_path / "x", token="hf_secret", log=print)
    assert first.asked[0]["Authorization"] == "Bearer hf_secret"
    assert all("Authorization" not in asked for asked in site.asked) and site.asked
    site.cut_after = [1000]
    with pytest.raises(DownloadError) as caught:
        downloads.fetch(site.url + "?sig=hf_secret", tmp_path / "y", token="hf_secret", n_tries=1, log=print)
    out = capsys.readouterr()
    assert "hf_secret" not in out.out + out.err + str(caught.value)
    assert not any(b"hf_secret" in path.read_bytes() for path in tmp_path.iterdir())


def test_token_comes_from_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", " hf_abc ")
    assert downloads.find_token() == "hf_abc"
    monkeypatch.delenv("HF_TOKEN")
    assert downloads.find_token() is None


def test_hub_file_is_checked_with_the_hub_s_own_hash(tmp_path: Path, site: Site) -> None:
    site.extra_headers = {"X-Repo-Commit": "a" * 40, "X-Linked-Etag": f'"{SHA256}"', "X-Linked-Size": "300000"}
    endpoint = site.url.removesuffix("/file.dat")
    target = downloads.fetch_hub_file("me/model", "big.dat", tmp_path / "x", endpoint=endpoint, log=quiet)
    assert target.read_bytes() == CONTENT
    assert site.asked[-1]["path"] == "/me/model/resolve/main/big.dat"
    site.content = CONTENT[:-1] + b"?"
    with pytest.raises(DownloadError, match=f"expected {SHA256}"):
        downloads.fetch_hub_file("me/model", "big.dat", tmp_path / "y", endpoint=endpoint, log=quiet)


def test_gated_repository_names_the_page_to_open(tmp_path: Path, site: Site) -> None:
    class Gate(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_HEAD(self) -> None:
            self.send_response(403)
            self.send_header("X-Error-Code", "GatedRepo")
            self.end_headers()

    server = http.server.HTTPServer(("127.0.0.1", 0), Gate)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    with pytest.raises(
        DownloadError, match=r"^me/model needs your consent: open https://huggingface\.co/me/model, accept"
    ):
        downloads.fetch_hub_file("me/model", "x.bin", tmp_path / "x", endpoint=endpoint, token="hf_secret", log=quiet)
    server.shutdown()
    server.server_close()


def test_03_a_quota_page_is_not_taken_for_weights(site: Site, tmp_path: Path) -> None:
    site.content = b"<!DOCTYPE html><title>Google Drive - Quota exceeded</title>"
    with pytest.raises(WeightFileError, match="is a web page"):
        downloads.fetch(site.url, tmp_path / "model.pth", wait_seconds=0, log=quiet)
    assert not (tmp_path / "model.pth").exists()


def test_04_manually_placed_file_without_known_hash_is_checked_by_its_own_sums(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"a": torch.arange(10_000.0)}, path)
    assert downloads.verify(path) == "zip checksums"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)  # torch itself sees nothing wrong
    with pytest.raises(WeightFileError, match="does not match its checksum"):
        downloads.verify(path)
    assert not path.exists() and (tmp_path / "model.pth.wrong").exists()


# --- archives (row 12) --------------------------------------------------------------------------------------------


def zip_with(path: Path, name: str, *, is_link: bool = False) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("good.txt", "good")
        info = zipfile.ZipInfo(name)
        info.external_attr = (0o120777 if is_link else 0o644) << 16
        file.writestr(info, "/etc/passwd" if is_link else "bad")
    return path


def tar_with(path: Path, name: str, *, kind: bytes = tarfile.REGTYPE) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for member in ("good.txt", name):
            info = tarfile.TarInfo(member)
            info.size = 3
            if member == name and kind != tarfile.REGTYPE:
                info.type, info.linkname, info.size = kind, "/etc/passwd", 0
            file.addfile(info, io.BytesIO(b"bad"))
    return path


@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "a/../../evil.txt", "C:/evil.txt"])
@pytest.mark.parametrize("make", [zip_with, tar_with])
def test_12_members_that_lead_outside_are_refused(tmp_path: Path, make, name: str) -> None:
    archive = make(tmp_path / "x.archive", name)
    with pytest.raises(DownloadError, match="leads outside"):
        downloads.unpack(archive, tmp_path / "deep" / "out")
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["x.archive"]


def test_12_links_are_refused(tmp_path: Path) -> None:
    for archive in (
        zip_with(tmp_path / "a", "link", is_link=True),
        tar_with(tmp_path / "b", "link", kind=tarfile.SYMTYPE),
        tar_with(tmp_path / "c", "link", kind=tarfile.LNKTYPE),
        tar_with(tmp_path / "d", "pipe", kind=tarfile.FIFOTYPE),
    ):
        with pytest.raises(DownloadError, match="is a link or leads outside"):
            downloads.unpack(archive, tmp_path / "out")


def test_12_bombs_and_damage_are_refused_and_good_archives_unpacked(tmp_path: Path) -> None:
    for archive in (zip_with(tmp_path / "x.zip", "sub/b.txt"), tar_with(tmp_path / "x.tar.gz", "sub/b.txt")):
        with pytest.raises(DownloadError, match="2 files.*allowed are 1 files"):
            downloads.unpack(archive, tmp_path / "out", max_files=1)
        with pytest.raises(DownloadError, match="allowed are"):
            downloads.unpack(archive, tmp_path / "out", max_bytes=2)
        assert not (tmp_path / "out").exists()
        target = downloads.unpack(archive, tmp_path / archive.name.replace(".", "_"))
        assert (target / "sub" / "b.txt").read_bytes() == b"bad"
        os.truncate(archive, archive.stat().st_size - 40)
        with pytest.raises(DownloadError, match="not a whole zip or tar file"):
            downloads.unpack(archive, tmp_path / "out2")


# --- copies to a disk that fails (row 18) ---------------------------------------------------------------------------


def test_18_copy_is_read_back_and_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Google Drive's two failures, at the level of the operating system: error 107, then a copy cut short."""
    source = tmp_path / "x"
    source.write_bytes(CONTENT)
    copyfile, calls = downloads.shutil.copyfile, []

    def failing(a: Path, b: Path) -> None:
        calls.append(b)
        if len(calls) == 1:
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
        copyfile(a, b)
        if len(calls) == 2:
            os.truncate(b, 1000)

    monkeypatch.setattr(downloads.shutil, "copyfile", failing)
    target = downloads.copy_verified(source, tmp_path / "drive" / "x", wait_seconds=0)
    assert target.read_bytes() == CONTENT and len(calls) == 3
    assert [path.name for path in target.parent.iterdir()] == ["x"]


def test_18_copy_onto_a_full_disk_keeps_the_local_file(tmp_path: Path) -> None:
    disk = tmp_path / "drive"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True)
    if made.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {made.stderr.decode().strip()}")
    try:
        source = tmp_path / "x"
        source.write_bytes(CONTENT)
        with pytest.raises(DownloadError, match=r"in 2 attempts .*No space left.*source is kept"):
            downloads.copy_verified(source, disk / "x", n_tries=2, wait_seconds=0)
        assert source.read_bytes() == CONTENT and not list(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)
