"""The whole way of notebook 01: the small models, and tiny ones from a hub that cuts, killed again and again."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import open_clip  # noqa: F401 (not in every killed process anew)
import pytest
import tiny_weights as tiny
import torch
from fake_hub import Hub, serve
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from helpers import files, profiles
from helpers.clip import backbones
from helpers.weights import WeightFileError, catalog, fetch, folders, llama, mini, steps, talk
from helpers.weights.catalog import Route

READER = functools.cache(gguf.GGUFReader)  # takes seconds
MINI = profiles.WeightsSettings(size="mini", shard_bytes=120_000_000, fuse_merge=False, delete_raw=True)
FULL = profiles.WeightsSettings()
NOTEBOOK = json.loads((profiles.REPOSITORY / "notebooks" / "01_prepare_weights.ipynb").read_text("utf-8"))
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
STEPS = [cell for cell in CELLS if "steps." in cell]


def run(route: Route, before: Callable[[int], None] = lambda number: None) -> Path:
    """The steps of notebook 01 as they stand there; ``before`` is told the number of each."""
    names = {"route": route, "steps": steps, "ACCEPT_LICENCES": True, "talk": talk, "surprise": 0}
    for number, cell in enumerate(STEPS):
        before(number)
        exec(cell, names)
    return names["vicuna"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", READER)
        run(catalog.route(folder, MINI, delete_raw=True))
    return folder


def mirror(folder: Path, target: Path) -> Path:
    """The same files again, without the bytes."""
    for path in folder.rglob("*"):
        if path.is_file():
            (target / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target / path.relative_to(folder))
    return target


# --- the small models ---------------------------------------------------------------------------------------------


def test_merged_model_is_the_published_one_but_for_rounding(prepared):
    """Against the package's file, with queries reordered by a plain loop."""
    packed = {item.name: item for item in READER(mini.find_smollm2()).tensors}
    merged = tiny.read_all(prepared / "vicuna")
    for name, source in {
        "model.layers.7.self_attn.q_proj.weight": "blk.7.attn_q.weight",
        "model.layers.29.mlp.down_proj.weight": "blk.29.ffn_down.weight",
        "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
        "lm_head.weight": "token_embd.weight",
    }.items():
        expected = gguf.dequantize(packed[source].data, packed[source].tensor_type)
        if "attn_q" in source:
            order = [head * 64 + 2 * i + odd for head in range(9) for odd in (0, 1) for i in range(32)]
            expected = expected[order]
        found = merged[name][: len(expected)].float().numpy()
        np.testing.assert_allclose(found, expected.astype(np.float32), rtol=2e-3, atol=2e-4, err_msg=name)
    assert merged["model.embed_tokens.weight"].shape == (49153, 576)


def test_it_talks_and_a_model_with_queries_and_keys_in_meta_s_order_does_not(prepared, tmp_path, capsys):
    assert talk.self_test(prepared / "vicuna", device="cpu") < 2.5
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 5 and all(line.startswith("✓") for line in said)
    tokenizer = AutoTokenizer.from_pretrained(prepared / "vicuna")
    text = "### Human: Is there any anomaly?\n### Assistant: In 1503, café ✓"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("1503").input_ids) == 4  # SmolLM cuts numbers into digits
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, 49152)
    order = torch.argsort(llama.halves_first(torch.arange(64.0)[:, None], 64)[:, 0])
    for path in mirror(prepared / "vicuna", tmp_path / "x").glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if "q_proj" in name or "k_proj" in name:
                tensors[name] = tensor.reshape(-1, 64, 576)[:, order].reshape(tensor.shape).contiguous()
        path.unlink()
        save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(WeightFileError, match=r"does not talk sensibly.*nats per token.*wrong order"):
        talk.self_test(tmp_path / "x", device="cpu")


def test_second_time_needs_nothing(prepared, capsys):
    route = catalog.route(prepared, MINI, delete_raw=True)
    assert route.missing() == [] and route.disk_bytes == 0
    assert set(route.table()["state"]) == {"part is ready"}
    assert not [path for path in (prepared / "raw").rglob("*") if path.is_file()]  # used up, deleted
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*") if path.is_file()}
    run(route)
    said = capsys.readouterr().out.splitlines()
    assert len([line for line in said if "already complete" in line]) == 8
    assert len([line for line in said if line.startswith("✓")]) == 10
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("config", "key", "change", "words"),
    [
        ("imagebind", '"embed_dim": 192', '"embed_dim": 193', r"pandagpt: llama_proj\.weight is \(576, 192\).*193"),
        ("imagebind", '"width": 256', '"width": 255', r"anomalygpt/.*image_decoder.*is \(192, 256\).*255"),
        ("vicuna", '"hidden_size": 576', '"hidden_size": 5120', r"pandagpt.*\(5120, 192\).*exist for 7B only"),
    ],
)
def test_parts_that_do_not_fit_are_named(
    prepared: Path, tmp_path: Path, config: str, key: str, change: str, words: str
):
    path = mirror(prepared, tmp_path / "x") / config / "config.json"
    text = path.read_text().replace(key, change)
    path.unlink()
    path.write_text(text)
    ready = files.read_json(path.parent / folders.READY)
    ready["files"]["config.json"]["bytes"] = len(text)
    files.write_json(path.parent / folders.READY, ready)
    with pytest.raises(WeightFileError, match=words):
        steps.check(catalog.route(tmp_path / "x", MINI))


# --- routes to the large models -----------------------------------------------------------------------------------


def test_the_default_route_can_be_fetched_whole_and_names_every_licence(tmp_path):
    route = catalog.route(tmp_path, FULL)
    table = route.table()
    assert set(table["state"]) == {"will be fetched"} and (table["licence"] != "").all()
    assert "hub:huggyllama/llama-7b" in set(table["from"]) and 45e9 < route.disk_bytes < 50e9
    row = table[table["for"] == "anomalyclip/trained_on_mvtec"].iloc[0]  # published names are inverted
    assert "/45ed4dd35c05797d" in row["from"] and "9_12_4_multiscale_visa/" in row["from"]
    with pytest.raises(PermissionError, match=r"CC BY-NC-SA(.|\n)*ACCEPT_LICENCES"):
        steps.obtain(route, accept_licences=False)
    with pytest.raises(FileNotFoundError, match=r"LLAMA_FOLDER(.|\n)*consolidated\.00\.pth(.|\n)*tokenizer\.model"):
        steps.obtain(catalog.route(tmp_path, FULL, base="meta"), accept_licences=True)


@pytest.mark.parametrize("choice", [{"base": "gguf"}, {"version": "v2"}, {"llama_folder": "/no/such/folder"}])
def test_unknown_choices_say_what_is_allowed(tmp_path, choice):
    with pytest.raises((ValueError, FileNotFoundError), match="allowed are|no folder here"):
        catalog.route(tmp_path, FULL, **choice)


def test_a_small_disk_is_known_before_the_first_download(tmp_path, monkeypatch):
    route = catalog.route(tmp_path, FULL)
    monkeypatch.setattr(files, "free_bytes", lambda path: 30 * 10**9)
    with pytest.raises(OSError, match=r"needs 4\d\.\d GB of disk, 30\.0 GB are free.*Free \d+\.\d GB"):
        catalog.check_disk(route)
    monkeypatch.setattr(files, "free_bytes", lambda path: 60 * 10**9)
    assert "needs 4" in catalog.check_disk(route)


# --- tiny models from a hub: cuts, kills, files of one's own --------------------------------------------------------


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """LLaMA, delta and the four others, tiny, under their published names; the same files in ``site``."""
    site = tmp_path / "site"
    base = tiny.hugging_face(tiny.meta_model())
    tiny.write_meta(site / "meta", tiny.meta_model())
    llama_, delta = (
        read_folder(tiny.write_hf(site / name, content, suffix=suffix))
        for name, content, suffix in (("llama", base, "safetensors"), ("delta", tiny.make_delta(base), "bin"))
    )
    config = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4}
    sizes = {"width": 24, "layers": 2, "patch": 4, "grid": 3, "text": 16, "text_layers": 2, "n_tokens": 50}
    for name, shapes in {
        "imagebind_huge.pth": tiny.imagebind_shapes(**sizes, joint=20),
        "pandagpt.pt": tiny.pandagpt_shapes(config, rank=4, n_image=20),
        "anomalygpt.pt": tiny.anomalygpt_shapes(64, joint=20, width=24, channels=(2, 4, 4, 8, 8)),
        "epoch_15.pth": tiny.anomalyclip_shapes(24, n_deep=2),
    }.items():
        tiny.write_random(site / name, shapes)
    heads = ("train_mvtec", "train_visa", "train_supervised")
    repositories = {
        "huggyllama/llama-7b": llama_,
        "lmsys/vicuna-7b-delta-v0": delta,
        "openllmplayground/pandagpt_7b_max_len_1024": {"pytorch_model.pt": (site / "pandagpt.pt").read_bytes()},
        "FantasticGNU/AnomalyGPT": {f"{n}/pytorch_model.pt": (site / "anomalygpt.pt").read_bytes() for n in heads},
        "plain": {name: (site / name).read_bytes() for name in ("imagebind_huge.pth", "epoch_15.pth")},
    }
    monkeypatch.setattr(fetch, "WAIT_SECONDS", 0.0)
    original = fetch.fetch_hub
    with serve(Hub(repositories)) as running:
        monkeypatch.setattr(fetch, "fetch_hub", lambda *args, **named: original(*args, **named, endpoint=running.url))
        yield running


def tiny_route(hub: Hub, folder: Path, **choices: object) -> Route:
    """The full profile's route, with the plain files at the hub; the published hashes are not theirs."""
    settings = dataclasses.replace(FULL, shard_bytes=60_000)
    route = catalog.route(folder, settings, delete_raw=True, **choices)
    needed = []
    for file in route.files:
        if file.source.startswith("https://"):
            source = f"{hub.url}/plain/{file.source.rsplit('/', 1)[1]}"
            file = dataclasses.replace(file, source=source, published_hash="")
        needed.append(file)
    return dataclasses.replace(route, files=tuple(needed))


def expected_bits() -> dict[str, torch.Tensor]:
    base = tiny.hugging_face(tiny.meta_model())
    return tiny.fastchat(base, tiny.make_delta(base))


def raw_files(route: Route) -> list[Path]:
    return [path for path in route.raw_dir.rglob("*") if path.is_file() and path.suffix not in (".json", ".lock")]


def killed(route: Route, step: int, deaths: Path) -> bool:
    """Run the notebook in a process that kills itself with -9 in a step, just before a file gets its name.

    It dies at each file once (``deaths`` lists them); False when the step got through.
    """
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL), f"step {step}: the process ended with {status}"
        return status != 0
    torch.set_num_threads(1)  # the parent's threads are not in the copy, and waiting for them would be for ever
    known, replace = deaths.read_text().splitlines(), os.replace

    def dying(source: Path, target: Path) -> None:
        if str(target) not in known:
            deaths.write_text("\n".join([*known, str(target)]))
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    def before(number: int) -> None:
        if number == step:
            os.replace = dying
        if number > step:
            os._exit(0)

    try:
        run(route, before)
        os._exit(0)
    finally:
        os._exit(1)


def tiny_mini(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Route, dict[str, torch.Tensor]]:
    """The mini profile's route, with a tiny language model in place of SmolLM2; and what must come out."""
    dims = {"dim": 576, "n_heads": 9, "n_kv_heads": 3, "n_layers": 1, "inner": 96, "vocab": 126}
    fields = {
        "llama.embedding_length": 576, "llama.block_count": 1, "llama.attention.head_count": 9,
        "llama.attention.head_count_kv": 3, "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 1e4, "llama.context_length": 2048,
    }  # fmt: skip
    model = tiny.meta_model(dims)
    for name in ("art_vit_mini", "load_clip"):  # not built in each process anew
        monkeypatch.setattr(backbones, name, functools.cache(getattr(backbones, name)))
    mini.write("imagebind", folder.parent / "x.pt")
    mini.write("anomalyclip/x", folder.parent / "x.pt")
    monkeypatch.setattr(mini, "read_gguf", lambda path: (fields, model))
    monkeypatch.setattr(mini, "write_tokenizer", lambda folder, _: files.write_text(folder / "tokenizer.json", "{}"))
    settings = dataclasses.replace(MINI, shard_bytes=500_000)
    return catalog.route(folder, settings, delete_raw=True), tiny.hugging_face(model, dims)


@pytest.mark.parametrize("way", ["full", "mini"])
def test_killed_at_each_file_of_each_step_and_cut_at_every_third_file_it_still_ends_complete(
    hub, tmp_path, monkeypatch, way
):
    hub.cut_every = 3
    route, expected = tiny_route(hub, tmp_path / "weights"), expected_bits()
    if way == "mini":
        route, expected = tiny_mini(tmp_path / "weights", monkeypatch)
    one_of_each = ("trained_on_mvtec", "train_visa", "train_supervised")  # their like is in
    kept = tuple(file for file in route.files if not file.component.endswith(one_of_each))
    route, deaths = dataclasses.replace(route, files=kept), tmp_path / "deaths"
    for step, cell in enumerate(STEPS):
        deaths.write_text("")
        while killed(route, step, deaths):
            pass
        is_writing = "check" not in cell and (way == "mini" or "convert_base" not in cell)
        assert (folders.READY in deaths.read_text() or "obtain(" in cell) == is_writing, cell
    found = tiny.read_all(run(route))
    if way == "mini":  # noise was added and taken away again, each time rounded
        assert all((found[name][: len(item)] - item).abs().max() < 1e-3 for name, item in expected.items())
    else:
        tiny.assert_same_bits(found, expected)
        assert hub.cut
    listed = [name for path in route.weights_dir.rglob(folders.READY) for name in files.read_json(path)["files"]]
    assert raw_files(route) == [] and not [name for name in listed if name.startswith(".")]


@pytest.mark.parametrize("base", ["meta", "huggingface", "merged"])
def test_a_folder_of_one_s_own_is_read_where_it_lies(hub, tmp_path, base):
    own = tmp_path / "site" / ("meta" if base == "meta" else "llama")
    if base == "merged":
        own = tiny.write_hf(tmp_path / "weights" / "raw" / "own", expected_bits())
    before = {path: path.stat().st_mtime_ns for path in own.iterdir()}
    choice = {"base": "merged"} if base == "merged" else {}
    route = tiny_route(hub, tmp_path / "weights", llama_folder=own, **choice)
    assert route.base == base and route.table()["state"][0] == "present"
    tiny.assert_same_bits(tiny.read_all(run(route)), expected_bits())
    assert {path: path.stat().st_mtime_ns for path in own.iterdir()} == before
    assert not [path for path, _ in hub.asked if "huggyllama" in path]


@pytest.mark.parametrize("linked", ["folder", "files", "raw"])
def test_deleting_raw_files_never_follows_a_link(hub, tmp_path, linked, capsys):
    drive, route = tmp_path / "site" / "llama", tiny_route(hub, tmp_path / "weights")
    before = read_folder(drive)
    route.raw_dir.parent.mkdir()
    if linked == "raw":  # the whole folder lies on another disk: what was fetched there may go
        (tmp_path / "big").mkdir()
        route.raw_dir.symlink_to(tmp_path / "big")
    else:
        route.raw_dir.mkdir()
    if linked == "folder":
        route.llama_dir.symlink_to(drive)
    if linked == "files":
        route.llama_dir.mkdir()
        for path in drive.iterdir():
            (route.llama_dir / path.name).symlink_to(path)
    run(route)
    assert read_folder(drive) == before and not route.delta_dir.exists()
    assert ("kept, because it is, or holds, a link" in capsys.readouterr().out) == (linked != "raw")


def meta_by_hand(hub: Hub, tmp_path: Path) -> Route:
    """Meta's files in their place, with the published MD5 sums, which are not theirs."""
    route = tiny_route(hub, tmp_path / "weights", base="meta")
    mirror(tmp_path / "site" / "meta", route.llama_dir)
    return dataclasses.replace(route, files=tuple(f for f in route.files if f.path.name != "tokenizer.model"))


def test_a_file_with_another_hash_is_accepted_when_its_contents_are_right(hub, tmp_path, capsys):
    """A mirror's params.json says vocab_size 32000 where Meta's says -1; its checkpoint was packed anew."""
    route = meta_by_hand(hub, tmp_path)
    params = route.llama_dir / "params.json"
    params.write_text(params.read_text().replace('"vocab_size": -1', '"vocab_size": 32000'))
    tiny.assert_same_bits(tiny.read_all(run(route)), expected_bits())
    assert "consolidated.00.pth: accepted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("consolidated.00.pth", lambda whole: whole[: len(whole) * 9 // 10], "cut short"),
        ("consolidated.00.pth", lambda whole: b"<html>403</html>", "is a web page"),
        ("params.json", lambda whole: b'{"dim": 64}', "lacks n_heads, n_layers, norm_eps"),
        ("imagebind.pt", lambda whole: whole[:-20], r"imagebind\.pt cannot be used"),
        ("imagebind.pt", lambda whole: whole.replace(b"\x3f", b"\x3e", 1), "does not match its checksum"),
    ],
    ids=["cut", "web page", "no params", "cut without a known hash", "bit flip without a known hash"],
)
def test_a_wrong_file_is_left_where_it_is(hub, tmp_path, name, content, words):
    route = meta_by_hand(hub, tmp_path)
    (route.raw_dir / "imagebind.pt").write_bytes(hub.repositories["plain"]["imagebind_huge.pth"])
    path = next(route.raw_dir.rglob(name))
    wrong = content(path.read_bytes())
    path.unlink()
    path.write_bytes(wrong)
    with pytest.raises(WeightFileError, match=rf"{words}.*left as it is: delete it.*LLAMA_FOLDER"):
        steps.obtain(route, accept_licences=True)
    assert path.read_bytes() == wrong


def test_files_by_hand_are_enough_without_a_hub(hub, tmp_path, capsys):
    route = tiny_route(hub, tmp_path / "weights")
    mirror(tmp_path / "site" / "delta", route.delta_dir)
    del hub.repositories["lmsys/vicuna-7b-delta-v0"]
    tiny.assert_same_bits(tiny.read_all(run(route)), expected_bits())
    assert "taken as they are" in capsys.readouterr().out


def test_raw_files_stay_until_their_part_is_ready(hub, tmp_path, monkeypatch):
    route = tiny_route(hub, tmp_path / "weights")
    steps.obtain(route, accept_licences=True)
    n_raw, write_json = len(raw_files(route)), files.write_json

    def no_ready(path: Path, value: object) -> None:
        if path.name == folders.READY:
            raise KeyboardInterrupt
        write_json(path, value)

    monkeypatch.setattr(files, "write_json", no_ready)
    with pytest.raises(KeyboardInterrupt):
        steps.merge(route, steps.convert_base(route))
    assert len(raw_files(route)) == n_raw
    monkeypatch.setattr(files, "write_json", write_json)
    assert run(route) and raw_files(route) == []
