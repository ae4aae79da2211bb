"""The whole way of notebook 01 with tiny models, from a hub that cuts, killed again and again, and from own files."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import os
import re
import shutil
import signal
import ssl
from collections.abc import Iterator
from pathlib import Path

import open_clip  # noqa: F401 (not in every killed process anew)
import pytest
import tiny_weights as tiny
import torch
from failing_drive import is_killed
from fake_hub import Hub, serve

from helpers import files, profiles
from helpers.weights import WeightFileError, catalog, fetch, folders, mini, steps, talk
from helpers.weights.catalog import Route

MINI = profiles.WeightsSettings(size="mini", shard_bytes=120_000, fuse_merge=False, delete_raw=True)
FULL = profiles.WeightsSettings(shard_bytes=120_000)
NOTEBOOK = json.loads((profiles.REPOSITORY / "notebooks" / "01_prepare_weights.ipynb").read_text("utf-8"))
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
BASE = tiny.hugging_face(tiny.meta_model())
MERGED = tiny.fastchat(BASE, tiny.make_delta(BASE))


def run(route: Route) -> dict[str, torch.Tensor]:
    """The steps of notebook 01 as they stand there; the merged model."""
    names = {"route": route, "steps": steps, "ACCEPT_LICENCES": True, "talk": talk, "surprise": 0}
    for cell in CELLS:
        if "steps." in cell and "import" not in cell:
            exec(cell, names)
    return tiny.read_all(names["vicuna"])


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaMA in three forms, its delta, and the four others, tiny; only read."""
    folder = tmp_path_factory.mktemp("site")
    tiny.write_meta(folder / "meta", tiny.meta_model())
    tiny.write_hf(folder / "huggingface", BASE, suffix="safetensors", n_files=1)
    tiny.write_hf(folder / "merged", MERGED)
    tiny.write_hf(folder / "delta", tiny.make_delta(BASE))
    for family, shapes in tiny.SMALL.items():
        tiny.write_random(folder / family, shapes)
    return folder


@pytest.fixture
def hub(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The same files under their published names."""
    heads = [f"{name}/pytorch_model.pt" for name in ("train_mvtec", "train_visa", "train_supervised")]
    repositories = {
        "huggyllama/llama-7b": read_folder(site / "huggingface"),
        "lmsys/vicuna-7b-delta-v0": read_folder(site / "delta"),
        "openllmplayground/pandagpt_7b_max_len_1024": {"pytorch_model.pt": (site / "pandagpt").read_bytes()},
        "FantasticGNU/AnomalyGPT": dict.fromkeys(heads, (site / "anomalygpt").read_bytes()),
        "plain": {
            "imagebind_huge.pth": (site / "imagebind").read_bytes(),
            "epoch_15.pth": (site / "anomalyclip").read_bytes(),
        },
    }
    monkeypatch.setattr(fetch, "WAIT_SECONDS", 0.0)
    # 50 ms in each killed process, and no address here begins with https
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *_, **__: None)
    with serve(Hub(repositories)) as running:
        monkeypatch.setattr(fetch, "fetch_hub", functools.partial(fetch.fetch_hub, endpoint=running.url))
        yield running


def full_route(hub: Hub, folder: Path, **choices: object) -> Route:
    """The full profile's route, with the plain files at the hub; the published hashes are not theirs."""
    route = catalog.route(folder, FULL, delete_raw=True, **choices)
    needed = [file for file in route.files if file.path.name != "tokenizer.model"]  # the tiny ones have a .json
    for i, file in enumerate(needed):
        if file.source.startswith("https://"):
            source = f"{hub.url}/plain/{file.source.rsplit('/', 1)[1]}"
            needed[i] = dataclasses.replace(file, source=source, published_hash="")
    return dataclasses.replace(route, files=tuple(needed))


def mini_route(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Route:
    """The mini profile's route, with a tiny language model in place of SmolLM2, and random numbers."""
    fields = {
        "llama.embedding_length": 64, "llama.block_count": 3, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 4, "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 1e4, "llama.context_length": 2048,
    }  # fmt: skip
    monkeypatch.setattr(mini, "N_SHARDS", 2)
    monkeypatch.setattr(mini, "read_gguf", lambda path: (fields, tiny.meta_model()))
    monkeypatch.setattr(mini, "write_tokenizer", lambda folder, _: files.write_text(folder / "tokenizer.json", "{}"))
    monkeypatch.setattr(mini, "write", lambda part, path: tiny.write_random(path, tiny.SMALL[part.split("/")[0]]))
    return catalog.route(folder, MINI, delete_raw=True)


def raw_files(route: Route) -> list[Path]:
    return [path for path in route.raw_dir.rglob("*") if path.is_file() and path.suffix not in (".json", ".lock")]


def test_the_default_route_can_be_fetched_whole_and_names_every_licence_and_its_disk(tmp_path, monkeypatch):
    route = catalog.route(tmp_path, profiles.WeightsSettings())
    table = route.table()
    assert set(table["state"]) == {"will be fetched"} and (table["licence"] != "").all()
    assert "hub:huggyllama/llama-7b" in set(table["from"]) and 45e9 < route.disk_bytes < 50e9
    row = table[table["for"] == "anomalyclip/trained_on_mvtec"].iloc[0]  # published names are inverted
    assert "/45ed4dd35c05797d" in row["from"] and "9_12_4_multiscale_visa/" in row["from"]
    assert all(file.published_hash for file in route.files if file.component.startswith("anomalyclip/"))
    with pytest.raises(PermissionError, match=r"CC BY-NC-SA(.|\n)*ACCEPT_LICENCES"):
        steps.obtain(route, accept_licences=False)
    with pytest.raises(FileNotFoundError, match=r"LLAMA_FOLDER(.|\n)*consolidated\.00\.pth(.|\n)*tokenizer\.model"):
        steps.obtain(catalog.route(tmp_path, FULL, base="meta"), accept_licences=True)
    for choice in ({"base": "gguf"}, {"version": "v2"}, {"llama_folder": "/no/such/folder"}):
        with pytest.raises((ValueError, FileNotFoundError), match="allowed are|no folder here"):
            catalog.route(tmp_path, FULL, **choice)
    monkeypatch.setattr(files, "free_bytes", lambda path: 30 * 10**9)
    with pytest.raises(OSError, match=r"needs 4\d\.\d GB of disk, 30\.0 GB are free.*Free \d+\.\d GB"):
        catalog.check_disk(route)
    monkeypatch.setattr(files, "free_bytes", lambda path: 60 * 10**9)
    assert "needs 4" in catalog.check_disk(route)


def run_or_die(route: Route, deaths: Path, where: str) -> None:
    """Run the notebook, but be killed just before a file gets its name, once at each whose path has ``where``."""
    gc.disable()  # collecting would copy every page of the parent
    known, replace = deaths.read_text().splitlines(), os.replace

    def dying(source: Path, target: Path) -> None:
        if str(target) not in known and re.search(where, str(target)):
            deaths.write_text("\n".join([*known, str(target)]))
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = dying
    run(route)


@pytest.mark.parametrize("way", ["full", "mini"])
def test_killed_at_each_file_of_each_step_and_cut_at_every_third_file_it_still_ends_complete(
    hub, tmp_path, monkeypatch, way
):
    """All parts are converted alike: one beside the two large ones will do, and in mini none."""
    hub.cut_every = 3
    folder, deaths = tmp_path / "weights", tmp_path / "deaths"
    route = full_route(hub, folder) if way == "full" else mini_route(folder, monkeypatch)
    kept = tuple(file for file in route.files if file.component in ("vicuna", "imagebind", "pandagpt"))
    route = dataclasses.replace(route, files=kept)
    deaths.write_text("")
    while is_killed(run_or_die, route, deaths, "" if way == "full" else "llama|vicuna"):
        assert len(list(folder.rglob(".*.pth"))) < 2, "half-written files pile up"
        part = Path(deaths.read_text().splitlines()[-1]).parent
        raw = [file.path for file in route.files if folder / file.component == part]
        assert all(path.exists() for path in raw), "raw files stay until their part is ready"
    parts = {file.component for file in route.files} if way == "full" else {"llama", "vicuna"}
    assert {str(folder / part / folders.READY) for part in parts} <= set(deaths.read_text().splitlines())
    found = run(route)
    if way == "full":
        tiny.assert_same_bits(found, MERGED)
        assert hub.cut
    else:  # noise was added and taken away again, each time rounded
        assert all((found[name][: len(item)] - item).abs().max() < 1e-3 for name, item in BASE.items())
    listed = [name for path in folder.rglob(folders.READY) for name in files.read_json(path)["files"]]
    assert raw_files(route) == [] and not [name for name in listed if name.startswith(".")]


def test_a_second_run_needs_nothing_and_parts_that_do_not_fit_are_named(hub, tmp_path, capsys):
    route = full_route(hub, tmp_path / "weights")
    run(route)
    assert route.missing() == [] and route.disk_bytes == 0 and set(route.table()["state"]) == {"part is ready"}
    before = {path: path.stat().st_mtime_ns for path in route.weights_dir.rglob("*") if path.is_file()}
    capsys.readouterr()
    run(route)
    said = capsys.readouterr().out.splitlines()
    assert len([line for line in said if "already complete" in line]) == 8
    assert len([line for line in said if line.startswith("✓")]) == 9
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for part, right, wrong, words in (
        ("imagebind", '"embed_dim": 20', '"embed_dim": 21', r"pandagpt: llama_proj\.weight is \(64, 20\).*21"),
        ("imagebind", '"width": 128', '"width": 127', r"anomalygpt/.*image_decoder.*is \(20, 128\).*127"),
        ("vicuna", '"hidden_size": 64', '"hidden_size": 99', r"pandagpt.*\(99, 20\).*exist for 7B only"),
    ):
        config = route.weights_dir / part / "config.json"
        whole = config.read_text()
        config.write_text(whole.replace(right, wrong))
        with pytest.raises(WeightFileError, match=words):
            steps.check(route)
        config.write_text(whole)


def test_prompts_need_nobodys_consent(hub, tmp_path):
    route = full_route(hub, tmp_path / "weights")
    steps.obtain_free(route)
    ready = [file.component for file in route.files if route.is_ready(file.component)]
    assert ready == ["anomalyclip/trained_on_visa", "anomalyclip/trained_on_mvtec"], "all that notebook 04 needs"


@pytest.mark.parametrize("base", ["meta", "huggingface", "merged"])
def test_a_folder_of_one_s_own_is_read_where_it_lies(hub, site, tmp_path, base):
    before = {path: path.stat().st_mtime_ns for path in (site / base).iterdir()}
    choice = {"base": "merged"} if base == "merged" else {}
    route = full_route(hub, tmp_path / "weights", llama_folder=site / base, **choice)
    assert route.base == base and route.table()["state"][0] == "present"
    tiny.assert_same_bits(run(route), MERGED)
    assert {path: path.stat().st_mtime_ns for path in (site / base).iterdir()} == before
    assert not [path for path, _ in hub.asked if "huggyllama" in path]


@pytest.mark.parametrize("linked", ["folder", "folder of files", "files", "raw"])
def test_deleting_raw_files_never_follows_a_link(hub, site, tmp_path, linked, capsys):
    base = "meta" if linked == "folder of files" else "huggingface"
    drive, route = site / base, full_route(hub, tmp_path / "weights", base=base)
    before = read_folder(drive)
    route.weights_dir.mkdir()
    if linked == "raw":  # the whole folder lies on another disk: what was fetched there may go
        (tmp_path / "big").mkdir()
        route.raw_dir.symlink_to(tmp_path / "big")
    elif linked == "files":
        route.llama_dir.mkdir(parents=True)
        for path in drive.iterdir():
            (route.llama_dir / path.name).symlink_to(path)
    else:
        route.raw_dir.mkdir()
        route.llama_dir.symlink_to(drive)
    run(route)
    assert read_folder(drive) == before and not route.delta_dir.exists()
    assert ("kept, because it is, or holds, a link" in capsys.readouterr().out) == (linked != "raw")


def meta_by_hand(hub: Hub, site: Path, folder: Path) -> Route:
    """Meta's files in their place, with the published MD5 sums, which are not theirs."""
    route = full_route(hub, folder, base="meta")
    shutil.copytree(site / "meta", route.llama_dir)
    return route


def test_files_by_hand_with_another_hash_are_enough_when_their_contents_are_right(hub, site, tmp_path, capsys):
    """A mirror's params.json says vocab_size 32000 where Meta's says -1; its checkpoint was packed anew."""
    route = meta_by_hand(hub, site, tmp_path / "weights")
    shutil.copytree(site / "delta", route.delta_dir)
    del hub.repositories["lmsys/vicuna-7b-delta-v0"]
    params = route.llama_dir / "params.json"
    params.write_text(params.read_text().replace('"vocab_size": -1', '"vocab_size": 32000'))
    tiny.assert_same_bits(run(route), MERGED)
    said = capsys.readouterr().out
    assert "consolidated.00.pth: accepted" in said and "taken as they are" in said


def test_a_wrong_file_is_left_where_it_is(hub, site, tmp_path):
    route = meta_by_hand(hub, site, tmp_path / "weights")
    shutil.copy(site / "imagebind", route.raw_dir / "imagebind.pt")  # its hash is not published
    for name, spoil, words in (
        ("consolidated.00.pth", lambda whole: whole[: len(whole) * 9 // 10], "cut short"),
        ("params.json", lambda whole: b'{"dim": 64}', "lacks n_heads, n_layers, norm_eps"),
        ("imagebind.pt", lambda whole: whole[:-20], r"imagebind\.pt cannot be used"),
        ("imagebind.pt", lambda whole: whole.replace(b"\x3f", b"\x3e", 1), "does not match its checksum"),
    ):
        path = next(route.raw_dir.rglob(name))
        whole = path.read_bytes()
        path.write_bytes(spoil(whole))
        with pytest.raises(WeightFileError, match=rf"{words}.*left as it is: delete it.*LLAMA_FOLDER"):
            steps.obtain(route, accept_licences=True)
        assert path.read_bytes() == spoil(whole)
        path.write_bytes(whole)
