"""Downloads from a hub on this machine that cuts, lies and refuses; folders that were cut between two files."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_hub import Hub, serve

from helpers.weights import WeightFileError, fetch
from helpers.weights.catalog import WeightFile
from helpers.weights.fetch import DownloadError

CONTENT = np.random.default_rng(0).integers(0, 256, 1_500_000, dtype=np.uint8).tobytes()
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def torch_file(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.randn(3000, generator=torch.Generator().manual_seed(seed))}, buffer)
    return buffer.getvalue()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(fetch, "WAIT_SECONDS", 0.0)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    parts = {f"pytorch_model-0000{i}-of-00003.bin": torch_file(i) for i in (1, 2, 3)}
    repository = {"README.md": b"no", "config.json": b"{}", "pytorch_model.bin.index.json": b'{"a": 1}', **parts}
    with serve(Hub({"plain": {"x.dat": CONTENT, "x.pth": torch_file()}, "some/model": repository})) as running:
        yield running


def fetch_dat(hub: Hub, tmp_path: Path, **known: object) -> bytes:
    return fetch.fetch(f"{hub.url}/plain/x.dat", tmp_path / "x", **({"sha256": SHA256} | known)).read_bytes()


def begun(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".x.part").mkdir()
    (tmp_path / ".x.part" / "xabcd1234.part").write_bytes(content)


def test_a_cut_connection_goes_on_where_it_stopped(hub, tmp_path, capsys):
    hub.cut_every = 1
    assert fetch_dat(hub, tmp_path) == CONTENT and hub.asked[0][1] == 0 and hub.asked[-1][1] > 500_000
    assert "trying again" in capsys.readouterr().out and [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_killed_process_goes_on_where_it_stopped(hub, tmp_path):
    hub.seconds_per_block = 0.01
    child = os.fork()
    if not child:
        fetch_dat(hub, tmp_path)
        os._exit(0)
    room = tmp_path / ".x.part"
    while not (room.exists() and any(p.stat().st_size > 500_000 for p in room.iterdir())):
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    hub.seconds_per_block = 0
    assert fetch_dat(hub, tmp_path) == CONTENT and hub.asked[0][1] == 0 and hub.asked[-1][1] > 500_000


def test_a_file_that_had_all_come_is_only_checked(hub, tmp_path):
    begun(tmp_path, CONTENT)
    assert fetch_dat(hub, tmp_path, n_bytes=len(CONTENT)) == CONTENT and not hub.asked


def test_a_flipped_bit_is_fetched_anew(hub, tmp_path, capsys):
    begun(tmp_path, bytes([CONTENT[0] ^ 1]) + CONTENT[1:1_000_000])
    assert fetch_dat(hub, tmp_path) == CONTENT and [start for _, start in hub.asked][1:] == [1_000_000, 0]
    assert "damaged, or another version" in capsys.readouterr().out


def test_content_that_stays_wrong_never_gets_the_name(hub, tmp_path):
    with pytest.raises(DownloadError, match="expected 0+: damaged"):
        fetch_dat(hub, tmp_path, sha256="0" * 64)
    with pytest.raises(DownloadError, match="1500000 bytes, expected 7"):
        fetch_dat(hub, tmp_path, n_bytes=7)
    assert not (tmp_path / "x").exists()


def test_wrong_content_of_a_torch_file_is_seen_without_a_known_hash(hub, tmp_path):
    content = bytearray(torch_file())
    content[len(content) // 2] ^= 1
    assert torch.load(io.BytesIO(content), weights_only=True)  # torch itself sees nothing wrong
    page = b"<!DOCTYPE html><title>Google Drive - Quota exceeded</title>"
    for wrong, words in ((bytes(content), "does not match its checksum"), (page, "is a web page")):
        hub.repositories["plain"]["x.pth"] = wrong
        with pytest.raises(DownloadError, match=words):
            fetch.fetch(f"{hub.url}/plain/x.pth", tmp_path / "x.pth")
        assert not (tmp_path / "x.pth").exists()


@pytest.mark.parametrize("status", [401, 403, 404, 503])
def test_refusals_say_what_to_do(hub, tmp_path, status):
    hub.status = status
    with pytest.raises(DownloadError, match=rf"{status}(.|\n)*put the file at .*x yourself"):
        fetch_dat(hub, tmp_path)


def test_a_folder_cut_between_any_two_files_is_completed(hub, tmp_path, monkeypatch):
    check, n_files = fetch._check, 5  # the README is not needed
    for n_whole in range(n_files):
        file = WeightFile("vicuna", tmp_path / str(n_whole) / "model", "hub:some/model", 1, "MIT", True)
        left = iter(range(n_whole))

        def interrupted(*args: object, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            check(*args)

        with monkeypatch.context() as patch:
            patch.setattr(fetch, "_check", interrupted)
            with pytest.raises(KeyboardInterrupt):
                fetch.fetch_hub("some/model", file.path, list_path=file.list_path, endpoint=hub.url)
        assert not file.is_present
        fetch.fetch_hub("some/model", file.path, list_path=file.list_path, endpoint=hub.url)
        assert file.is_present and len(list(file.path.iterdir())) == n_files


def test_files_placed_by_hand_are_used_and_wrong_ones_left(hub, tmp_path):
    for name in ("config.json", "pytorch_model-00002-of-00003.bin"):
        (tmp_path / name).write_bytes(hub.repositories["some/model"][name])
    fetch.fetch_hub("some/model", tmp_path, endpoint=hub.url)
    assert len(hub.asked) == 3
    (tmp_path / "config.json").write_bytes(b"{...}")
    with pytest.raises(WeightFileError, match=r"config\.json has 5 bytes, the published file 2.*left as it is.*LLAMA"):
        fetch.fetch_hub("some/model", tmp_path, endpoint=hub.url)
    assert (tmp_path / "config.json").read_bytes() == b"{...}"


def test_a_gated_repository_names_the_page_and_the_token_is_never_shown(hub, tmp_path, monkeypatch, capsys):
    hub.gated.add("some/model")
    name = "pytorch_model-00001-of-00003.bin"
    with pytest.raises(DownloadError, match=r"huggingface\.co/some/model.*HF_TOKEN"):
        fetch.fetch_hub("some/model", tmp_path / "x.bin", name=name, endpoint=hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    fetch.fetch_hub("some/model", tmp_path / "x.bin", name=name, endpoint=hub.url)
    assert (tmp_path / "x.bin").read_bytes() == hub.repositories["some/model"][name]
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]
    assert "hf_right" not in "".join(capsys.readouterr())


def test_what_the_hub_lacks_is_named(hub, tmp_path):
    for words, repository, options in (
        ("no/model is not on the hub, or private", "no/model", {}),
        (r"some/model holds no b\.bin any more, but README", "some/model", {"name": "b.bin"}),
        ("cannot be asked about some/model", "some/model", {"endpoint": "http://127.0.0.1:9"}),
    ):
        with pytest.raises(DownloadError, match=words):
            fetch.fetch_hub(repository, tmp_path / "x", **({"endpoint": hub.url} | options))
