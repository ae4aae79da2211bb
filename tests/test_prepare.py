"""The whole way of notebook 01: the small models, and tiny ones from a hub that cuts, killed again and again."""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import test_checkpoints as small
import test_weights as tiny
import torch
from fake_hub import Hub, serve
from safetensors.torch import load_file, save_file

from helpers import files, profiles
from helpers.weights import WeightFileError, catalog, fetch, folders, llama, mini, steps, talk
from helpers.weights.catalog import Route

MINI = profiles.WeightsSettings(size="mini", shard_bytes=120_000_000, fuse_merge=False, delete_raw=True)
FULL = profiles.WeightsSettings()


def quiet(_: str) -> None: ...


def run(route: Route, log=quiet) -> Path:
    """Notebook 01 without its tables."""
    steps.obtain_free(route, log=log)
    steps.obtain(route, accept_licences=True, log=log)
    vicuna = steps.merge(route, steps.convert_base(route, log=log), log=log)
    steps.convert_rest(route, log=log)
    steps.check(route, log=log)
    return vicuna


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    run(catalog.route(folder, MINI))
    return folder


# --- the small models ---------------------------------------------------------------------------------------------


def test_merged_model_is_the_published_one_but_for_rounding(prepared: Path) -> None:
    """Against the package's file, with queries reordered by a plain loop."""
    import gguf

    arrays = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(mini.find_smollm2()).tensors}
    merged = tiny.read_all(prepared / "vicuna")
    query = arrays["blk.7.attn_q.weight"]
    rows = [query[head * 64 + 2 * i + odd] for head in range(9) for odd in (0, 1) for i in range(32)]
    pairs = {
        "model.layers.7.self_attn.q_proj.weight": np.stack(rows),
        "model.layers.29.mlp.down_proj.weight": arrays["blk.29.ffn_down.weight"],
        "model.layers.0.input_layernorm.weight": arrays["blk.0.attn_norm.weight"],
        "model.embed_tokens.weight": arrays["token_embd.weight"],
        "lm_head.weight": arrays["token_embd.weight"],
    }
    for name, expected in pairs.items():
        found = merged[name][: len(expected)].float().numpy()
        np.testing.assert_allclose(found, expected.astype(np.float32), rtol=2e-3, atol=2e-4, err_msg=name)
    assert merged["model.embed_tokens.weight"].shape == (49153, 576)


def test_gguf_reader_refuses_other_files(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"GGML" + bytes(100))
    with pytest.raises(ValueError, match="not a whole GGUF file"):
        mini.read_gguf(tmp_path / "x")


def test_it_talks_and_a_model_with_queries_and_keys_in_meta_s_order_does_not(prepared: Path, tmp_path: Path) -> None:
    said: list[str] = []
    assert talk.self_test(prepared / "vicuna", device="cpu", log=said.append) < 2.5
    assert len(said) == 5 and all(line.startswith("✓") for line in said)
    order = torch.argsort(llama.halves_first(torch.arange(64.0)[:, None], 64)[:, 0])
    for path in (prepared / "vicuna").iterdir():
        if path.suffix != ".safetensors":
            os.link(path, tmp_path / path.name)
            continue
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if "q_proj" in name or "k_proj" in name:
                tensors[name] = tensor.reshape(-1, 64, 576)[:, order].reshape(tensor.shape).contiguous()
        save_file(tensors, tmp_path / path.name, metadata={"format": "pt"})
    with pytest.raises(WeightFileError, match=r"does not talk sensibly.*nats per token.*wrong order"):
        talk.self_test(tmp_path, device="cpu", log=quiet)


def test_tokenizer_round_trip_and_digits(prepared: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepared / "vicuna")
    text = "### Human: Is there any anomaly?\n### Assistant: In 1503, café ✓"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert len(tokenizer("1503").input_ids) == 4  # SmolLM cuts numbers into digits
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, 49152)


def test_second_time_needs_nothing(prepared: Path) -> None:
    route = catalog.route(prepared, MINI)
    assert route.missing() == [] and route.disk_bytes == 0
    assert set(route.table()["state"]) == {"part is ready"}
    assert not [path for path in (prepared / "raw").rglob("*") if path.is_file()]  # used up, deleted
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*") if path.is_file()}
    said: list[str] = []
    run(route, said.append)
    assert len([line for line in said if "already complete" in line]) == 8
    assert len([line for line in said if line.startswith("✓")]) == 10
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*") if path.is_file()} == before


def test_a_part_of_another_size_is_named(prepared: Path, tmp_path: Path) -> None:
    for path in prepared.rglob("*"):
        if path.is_file():
            (tmp_path / path.relative_to(prepared)).parent.mkdir(parents=True, exist_ok=True)
            os.link(path, tmp_path / path.relative_to(prepared))
    config = tmp_path / "imagebind" / "config.json"
    text = config.read_text().replace('"embed_dim": 192', '"embed_dim": 193')
    config.unlink()
    config.write_text(text)
    with pytest.raises(WeightFileError, match=r"pandagpt: llama_proj\.weight is \(576, 192\).*need \(576, 193\)"):
        steps.check(catalog.route(tmp_path, MINI), log=quiet)


# --- routes to the large models -----------------------------------------------------------------------------------


def test_the_default_route_can_be_fetched_whole_and_names_every_licence(tmp_path: Path) -> None:
    route = catalog.route(tmp_path, FULL)
    table = route.table()
    assert set(table["state"]) == {"will be fetched"} and (table["licence"] != "").all()
    assert f"hub:{catalog.COMMUNITY_LLAMA}" in set(table["from"]) and 45e9 < route.disk_bytes < 50e9
    row = table[table["for"] == "anomalyclip/trained_on_mvtec"].iloc[0]  # published names are inverted
    assert "/45ed4dd35c05797d" in row["from"] and "9_12_4_multiscale_visa/" in row["from"]
    with pytest.raises(PermissionError, match=r"CC BY-NC-SA(.|\n)*ACCEPT_LICENCES"):
        steps.obtain(route, accept_licences=False, log=quiet)
    with pytest.raises(FileNotFoundError, match=r"LLAMA_FOLDER(.|\n)*consolidated\.00\.pth(.|\n)*tokenizer\.model"):
        steps.obtain(catalog.route(tmp_path, FULL, base="meta"), accept_licences=True, log=quiet)


@pytest.mark.parametrize("choice", [{"base": "gguf"}, {"version": "v2"}, {"llama_folder": "/no/such/folder"}])
def test_unknown_choices_say_what_is_allowed(tmp_path: Path, choice: dict) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match="allowed are|no folder here"):
        catalog.route(tmp_path, FULL, **choice)
    with pytest.raises(ValueError, match="7B only"):
        catalog.route(tmp_path, dataclasses.replace(FULL, size="13B"))


def test_a_small_disk_is_known_before_the_first_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    route = catalog.route(tmp_path, FULL)
    monkeypatch.setattr(files, "free_bytes", lambda path: 30 * 10**9)
    with pytest.raises(OSError, match=r"needs 4\d\.\d GB of disk, 30\.0 GB are free.*Free \d+\.\d GB"):
        catalog.check_disk(route)
    monkeypatch.setattr(files, "free_bytes", lambda path: 60 * 10**9)
    assert "needs 4" in catalog.check_disk(route)


# --- tiny models from a hub: cuts, kills, files of one's own --------------------------------------------------------


def torch_bytes(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """LLaMA, delta and the four others, tiny, under their published names."""
    base = tiny.hugging_face(tiny.meta_model(tiny.DIMS), tiny.DIMS)
    site = tmp_path / "site"
    tiny.write_hf(site / "llama", base, tiny.DIMS, fmt="safetensors")
    tiny.write_hf(site / "delta", tiny.make_delta(base, 1), tiny.DIMS)
    tiny.write_meta(site / "meta", tiny.meta_model(tiny.DIMS), tiny.DIMS, 1)
    config = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4}
    others = {
        "imagebind_huge.pth": small.imagebind_shapes(**{**small.SMALL, "joint": 20}),
        "pandagpt.pt": small.pandagpt_shapes(config, rank=4, n_image=20),
        "anomalygpt.pt": small.anomalygpt_shapes(64, joint=20, width=24),
        "epoch_15.pth": small.anomalyclip_shapes(24, n_deep=2),
    }
    for name, shapes in others.items():
        small.write(site / name, shapes)
    read = {name: (site / name).read_bytes() for name in others}
    folder = {name: {path.name: path.read_bytes() for path in (site / name).iterdir()} for name in ("llama", "delta")}
    monkeypatch.setattr(fetch, "WAIT_SECONDS", 0.0)
    with serve(
        Hub({
            catalog.COMMUNITY_LLAMA: folder["llama"],
            **{f"lmsys/vicuna-7b-delta-{version}": folder["delta"] for version in ("v0", "v1.1")},
            "openllmplayground/pandagpt_7b_max_len_1024": {"pytorch_model.pt": read["pandagpt.pt"]},
            "FantasticGNU/AnomalyGPT": {
                f"{name}/pytorch_model.pt": read["anomalygpt.pt"]
                for name in ("train_mvtec", "train_visa", "train_supervised")
            },
            "plain": {name: read[name] for name in ("imagebind_huge.pth", "epoch_15.pth")},
        })
    ) as running:  # fmt: skip
        original = fetch.fetch_hub

        def at_home(*args: object, **options: object) -> Path:
            return original(*args, **options, endpoint=running.url)

        monkeypatch.setattr(fetch, "fetch_hub", at_home)
        yield running


def tiny_route(hub: Hub, folder: Path, **choices: object) -> Route:
    """The full profile's route, with the plain files at the hub; the published hashes are not theirs."""
    settings = dataclasses.replace(FULL, shard_bytes=60_000)
    route = catalog.route(folder, settings, **{"delete_raw": True, **choices})
    needed = []
    for file in route.files:
        if file.source.startswith("https://"):
            source = f"{hub.url}/plain/{file.source.rsplit('/', 1)[1]}"
            file = dataclasses.replace(file, source=source, checks=None)
        needed.append(file)
    return dataclasses.replace(route, files=tuple(needed))


def expected_bits() -> dict[str, torch.Tensor]:
    base = tiny.hugging_face(tiny.meta_model(tiny.DIMS), tiny.DIMS)
    return tiny.fastchat(base, tiny.make_delta(base, 1))


def raw_files(route: Route) -> list[Path]:
    return [path for path in route.raw_dir.rglob("*") if path.is_file() and path.suffix not in (".json", ".lock")]


def dying(replace: Callable, n: int) -> Callable:
    """``os.replace`` that kills its process in place of its n-th call."""
    calls = itertools.count(1)

    def call(*paths: object) -> None:
        if next(calls) == n:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    return call


@pytest.mark.parametrize("first", [1, 4])
def test_killed_in_every_step_and_cut_at_every_third_file_it_still_ends_complete(
    hub: Hub, tmp_path: Path, first: int
) -> None:
    """Each run kills itself with -9 just before one of its files gets its name, the next one a file later."""
    hub.cut_every = 3
    route, n_runs = tiny_route(hub, tmp_path / "weights"), 0
    while True:
        child = os.fork()
        if not child:
            os.replace = dying(os.replace, first + n_runs)
            try:
                run(route)
                os._exit(0)
            finally:
                os._exit(1)
        n_runs += 1
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            break
        assert status == -signal.SIGKILL and n_runs < 40, f"run {n_runs} ended with {status}"
    assert n_runs > 5
    tiny.assert_same_bits(tiny.read_all(route.weights_dir / "vicuna"), expected_bits())
    steps.check(route, log=quiet)
    assert raw_files(route) == []


@pytest.mark.parametrize("base", ["meta", "huggingface", "merged"])
def test_a_folder_of_one_s_own_is_read_where_it_lies(hub: Hub, tmp_path: Path, base: str) -> None:
    own = tmp_path / "site" / ("meta" if base == "meta" else "llama")
    if base == "merged":
        own = tiny.write_hf(tmp_path / "own", expected_bits(), tiny.DIMS)
    before = {path: path.stat().st_mtime_ns for path in own.iterdir()}
    choice = {"base": "merged"} if base == "merged" else {}
    route = tiny_route(hub, tmp_path / "weights", llama_folder=own, **choice)
    assert route.base == base and route.table()["state"][0] == "present"
    tiny.assert_same_bits(tiny.read_all(run(route)), expected_bits())
    assert {path: path.stat().st_mtime_ns for path in own.iterdir()} == before
    assert not [path for path, _, _ in hub.asked if catalog.COMMUNITY_LLAMA in path]


@pytest.mark.parametrize("linked", ["folder", "files", "raw"])
def test_deleting_raw_files_never_follows_a_link(hub: Hub, tmp_path: Path, linked: str) -> None:
    drive = tmp_path / "site" / "llama"
    route = tiny_route(hub, tmp_path / "weights")
    before = {path.name: path.read_bytes() for path in drive.iterdir()}
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
    said: list[str] = []
    run(route, said.append)
    assert {path.name: path.read_bytes() for path in drive.iterdir()} == before
    assert any("kept, because it is, or holds, a link" in line for line in said) == (linked != "raw")
    assert not route.delta_dir.exists()


def meta_by_hand(hub: Hub, tmp_path: Path) -> Route:
    """Meta's files in their place, with the published MD5 sums, which are not theirs."""
    route = tiny_route(hub, tmp_path / "weights", base="meta")
    route.llama_dir.mkdir(parents=True)
    for path in (tmp_path / "site" / "meta").iterdir():
        (route.llama_dir / path.name).write_bytes(path.read_bytes())
    needed = tuple(file for file in route.files if file.path.name != "tokenizer.model")
    return dataclasses.replace(route, files=needed)


def test_a_file_with_another_hash_is_accepted_when_its_contents_are_right(hub: Hub, tmp_path: Path) -> None:
    """A mirror's params.json says vocab_size 32000 where Meta's says -1; its checkpoint was packed anew."""
    route = meta_by_hand(hub, tmp_path)
    params = route.llama_dir / "params.json"
    params.write_text(params.read_text().replace('"vocab_size": -1', '"vocab_size": 32000'))
    said: list[str] = []
    steps.obtain(route, accept_licences=True, log=said.append)
    assert any("consolidated.00.pth: accepted" in line for line in said)
    tiny.assert_same_bits(tiny.read_all(run(route)), expected_bits())


@pytest.mark.parametrize("fault", ["cut", "web page", "no params", "cut without a known hash"])
def test_a_wrong_file_is_left_where_it_is(hub: Hub, tmp_path: Path, fault: str) -> None:
    route = meta_by_hand(hub, tmp_path)
    path, words = route.llama_dir / "consolidated.00.pth", "cut short"
    if fault == "cut":
        os.truncate(path, int(path.stat().st_size * 0.9))
    elif fault == "web page":
        path.write_bytes(b"<html>403</html>")
        words = "is a web page"
    elif fault == "no params":
        path = route.llama_dir / "params.json"
        path.write_text('{"dim": 64}')
        words = "lacks n_heads, n_layers, norm_eps"
    else:
        (path,) = [file.path for file in route.files if file.component == "imagebind"]
        path.write_bytes(hub.repositories["plain"]["imagebind_huge.pth"][:-20])
        words = rf"{path.name} cannot be used"
    before = path.read_bytes()
    with pytest.raises(WeightFileError, match=rf"{words}.*left as it is: delete it.*LLAMA_FOLDER"):
        steps.obtain(route, accept_licences=True, log=quiet)
    assert path.read_bytes() == before


def test_files_by_hand_are_enough_without_a_hub(hub: Hub, tmp_path: Path) -> None:
    route = tiny_route(hub, tmp_path / "weights")
    route.delta_dir.mkdir(parents=True)
    for path in (tmp_path / "site" / "delta").iterdir():
        (route.delta_dir / path.name).write_bytes(path.read_bytes())
    del hub.repositories["lmsys/vicuna-7b-delta-v0"]
    said: list[str] = []
    tiny.assert_same_bits(tiny.read_all(run(route, said.append)), expected_bits())
    assert any("taken as they are" in line for line in said)


def test_raw_files_stay_until_their_part_is_ready(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    route = tiny_route(hub, tmp_path / "weights")
    steps.obtain(route, accept_licences=True, log=quiet)
    n_raw = len(raw_files(route))
    write_json = files.write_json

    def no_ready(path: Path, value: object) -> None:
        if path.name == folders.READY:
            raise KeyboardInterrupt
        write_json(path, value)

    monkeypatch.setattr(files, "write_json", no_ready)
    with pytest.raises(KeyboardInterrupt):
        steps.merge(route, steps.convert_base(route, log=quiet), log=quiet)
    assert len(raw_files(route)) == n_raw
    monkeypatch.setattr(files, "write_json", write_json)
    assert run(route) and raw_files(route) == []
