"""Downloads from a hub on this machine that cuts, lies and refuses."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from failing_drive import is_killed
from fake_hub import Hub, serve

from helpers.weights import WeightFileError, fetch
from helpers.weights.fetch import DownloadError

CONTENT = np.random.default_rng(0).integers(0, 256, 1_500_000, dtype=np.uint8).tobytes()
FLIPPED = bytes([CONTENT[0] ^ 1]) + CONTENT[1:1_000_000]
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def torch_file(seed: int = 0, flipped: int = 0) -> bytes:
    """A torch file; with bits of its middle byte flipped torch itself sees nothing wrong."""
    buffer = io.BytesIO()
    torch.save({"a": torch.randn(3000, generator=torch.Generator().manual_seed(seed))}, buffer)
    content = bytearray(buffer.getvalue())
    content[len(content) // 2] ^= flipped
    assert torch.load(io.BytesIO(content), weights_only=True)
    return bytes(content)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(fetch, "WAIT_SECONDS", 0.0)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    parts = {f"pytorch_model-0000{i}-of-00003.bin": torch_file(i) for i in (1, 2, 3)}
    repository = {"README.md": b"no", "config.json": b"{}", "pytorch_model.bin.index.json": b'{"a": 1}', **parts}
    page = b"<!DOCTYPE html><title>Google Drive - Quota exceeded</title>"
    plain = {"x": CONTENT, "flipped.pth": torch_file(flipped=1), "page.pth": page}
    with serve(Hub({"plain": plain, "some/model": repository})) as running:
        yield running


def fetch_x(hub: Hub, folder: Path, **known: object) -> bytes:
    return fetch.fetch(f"{hub.url}/plain/x", folder / "x", **({"sha256": SHA256} | known)).read_bytes()


def fetch_folder(hub: Hub, folder: Path, **options: object) -> Path:
    return fetch.fetch_hub("some/model", folder, endpoint=hub.url, **options)


def test_a_cut_connection_goes_on_where_it_stopped(hub, tmp_path, capsys):
    hub.cut_every = 1
    assert fetch_x(hub, tmp_path) == CONTENT and hub.asked[0][1] == 0 and hub.asked[-1][1] > 500_000
    assert "trying again" in capsys.readouterr().out and [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_killed_process_goes_on_where_it_stopped(hub, tmp_path):
    hub.seconds_per_block = 0.02
    came = tmp_path / ".x.part"
    assert is_killed(fetch_x, hub, tmp_path, when=lambda: any(p.stat().st_size > 500_000 for p in came.glob("*")))
    hub.seconds_per_block = 0
    assert fetch_x(hub, tmp_path) == CONTENT and hub.asked[0][1] == 0 and hub.asked[-1][1] > 500_000


@pytest.mark.parametrize(("came", "asked"), [(CONTENT, []), (FLIPPED, [0, 1_000_000, 0])], ids=["whole", "flipped bit"])
def test_what_an_earlier_process_left_is_checked_and_fetched_anew_if_damaged(hub, tmp_path, came, asked):
    (tmp_path / ".x.part").mkdir()
    (tmp_path / ".x.part" / "xabcd1234.part").write_bytes(came)
    assert fetch_x(hub, tmp_path, n_bytes=len(CONTENT)) == CONTENT and [start for _, start in hub.asked] == asked


def test_content_that_stays_wrong_never_gets_the_name_and_refusals_say_what_to_do(hub, tmp_path):
    for words, name, known in (
        ("expected 0+: damaged", "x", {"sha256": "0" * 64}),
        ("1500000 bytes, expected 7", "x", {"sha256": SHA256, "n_bytes": 7}),
        ("does not match its checksum", "flipped.pth", {}),
        ("is a web page", "page.pth", {}),
    ):
        with pytest.raises(DownloadError, match=words):
            fetch.fetch(f"{hub.url}/plain/{name}", tmp_path / name, **known)
        assert not (tmp_path / name).exists()
    for hub.status in (401, 404, 503):
        with pytest.raises(DownloadError, match=rf"{hub.status}(.|\n)*put the file at .*x yourself"):
            fetch_x(hub, tmp_path)


def test_files_placed_by_hand_are_used_and_wrong_ones_left(hub, tmp_path):
    for name in ("config.json", "pytorch_model-00002-of-00003.bin"):
        (tmp_path / name).write_bytes(hub.repositories["some/model"][name])
    fetch_folder(hub, tmp_path)
    assert len(hub.asked) == 3
    (tmp_path / "config.json").write_bytes(b"{...}")
    with pytest.raises(WeightFileError, match=r"config\.json has 5 bytes, the published file 2.*left as it is.*LLAMA"):
        fetch_folder(hub, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == b"{...}"


def test_a_gated_repository_names_the_page_and_the_token_is_never_shown(hub, tmp_path, monkeypatch, capsys):
    hub.gated.add("some/model")
    name, target = "pytorch_model-00001-of-00003.bin", tmp_path / "x.bin"
    with pytest.raises(DownloadError, match=r"huggingface\.co/some/model.*HF_TOKEN"):
        fetch_folder(hub, target, name=name)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    fetch_folder(hub, target, name=name)
    assert target.read_bytes() == hub.repositories["some/model"][name] and list(tmp_path.iterdir()) == [target]
    assert "hf_right" not in "".join(capsys.readouterr())


def test_what_the_hub_lacks_is_named(hub, tmp_path):
    for words, repository, options in (
        ("no/model is not on the hub, or private", "no/model", {}),
        (r"some/model holds no b\.bin any more, but README", "some/model", {"name": "b.bin"}),
        ("cannot be asked about some/model", "some/model", {"endpoint": "http://127.0.0.1:9"}),
    ):
        with pytest.raises(DownloadError, match=words):
            fetch.fetch_hub(repository, tmp_path / "x", **({"endpoint": hub.url} | options))
