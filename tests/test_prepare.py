"""The whole way of notebook 01 on the small models, and the plans of the large ones."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import files as storage
from helpers.weights import (
    catalog as weight_plan,
)
from helpers.weights import (
    folders as shard_job,
)
from helpers.weights import (
    gguf_file,
    llama_layout,
)
from helpers.weights import (
    llama as weights,
)
from helpers.weights import (
    mini as standins,
)
from helpers.weights import (
    steps as prepare,
)
from helpers.weights import (
    talk as language_check,
)
from helpers.weights.catalog import WeightFile
from helpers.weights.fetch import DownloadError
from helpers.weights.tensors import WeightFileError

SHARD_BYTES = 120_000_000


def quiet(_: str) -> None: ...


def mini(weights_dir: Path, **options: object) -> weight_plan.Plan:
    return weight_plan.make_plan(weights_dir, size="mini", **{"fused": False, "delete_raw": True, **options})


def obtain(plan: weight_plan.Plan, **options: object) -> None:
    settings = {"accept_licences": False, "clip_model": "art-vit-mini", "clip_image_size": 224, "log": quiet}
    prepare.obtain(plan, **{**settings, **options})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of notebook 01 in ``mini``."""
    folder = tmp_path_factory.mktemp("weights")
    plan = mini(folder)
    obtain(plan)
    base = prepare.convert_base(plan, shard_bytes=SHARD_BYTES, log=quiet)
    prepare.merge(plan, base, shard_bytes=SHARD_BYTES, log=quiet)
    prepare.convert_checkpoints(plan, log=quiet)
    return folder


# --- the small models ---------------------------------------------------------------------------------------------


def test_merged_model_is_the_published_one_but_for_rounding(prepared: Path) -> None:
    """Against the package's file, with queries reordered by a plain loop."""
    arrays = gguf_file.read_gguf(standins.find_smollm2())[1]
    merged = {k: v for path in (prepared / "vicuna").glob("*.safetensors") for k, v in load_file(path).items()}
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


def test_gguf_settings_and_tensors_come_back(tmp_path: Path) -> None:
    """A file with every tensor type of the model, written and quantised by the library."""
    import gguf
    from gguf.quants import dequantize, quantize

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_rope_freq_base(100000.0)
    writer.add_token_list(["a", "ü", "<|x|>"])
    writer.add_token_types([1, 1, 3])
    kinds = gguf.GGMLQuantizationType
    expected = {}
    for kind in (kinds.F32, kinds.F16, kinds.Q8_0, kinds.Q4_1):
        data = quantize(rng.standard_normal((6, 64)).astype(np.float32), kind)
        writer.add_tensor(kind.name, data, raw_dtype=kind)
        expected[kind.name] = dequantize(data, kind).astype(np.float16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    settings, arrays = gguf_file.read_gguf(tmp_path / "x.gguf")
    assert settings["llama.rope.freq_base"] == 100000.0
    assert settings["tokenizer.ggml.tokens"] == ["a", "ü", "<|x|>"]
    assert settings["tokenizer.ggml.token_type"] == [1, 1, 3]
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)


def test_gguf_reader_refuses_other_files(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"GGML" + bytes(100))
    with pytest.raises(ValueError, match="not a whole GGUF file"):
        gguf_file.read_gguf(tmp_path / "x")


def test_it_talks_and_a_model_with_queries_and_keys_in_meta_s_order_does_not(prepared: Path, tmp_path: Path) -> None:
    report = language_check.self_test(prepared / "vicuna", device="cpu")
    assert report.nats_per_token < 2.5 and all(answer.n_tokens >= 16 for answer in report.answers)
    assert "[ok]" in str(report) and "WRONG" not in str(report)
    order = torch.argsort(torch.tensor(llama_layout.pair_order(64)))
    for path in (prepared / "vicuna").iterdir():
        if path.suffix != ".safetensors":
            os.link(path, tmp_path / path.name)
            continue
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if "q_proj" in name or "k_proj" in name:
                tensors[name] = tensor.reshape(-1, 64, 576)[:, order].reshape(tensor.shape).contiguous()
        save_file(tensors, tmp_path / path.name, metadata={"format": "pt"})
    with pytest.raises(WeightFileError, match=r"does not talk sensibly(.|\n)*nats per token"):
        language_check.self_test(tmp_path, device="cpu")


def test_tokenizer_round_trip_and_digits(prepared: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepared / "vicuna")
    text = "### Human: Is there any anomaly?\n### Assistant: In 1503, café ✓"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert len(tokenizer("1503").input_ids) == 4  # SmolLM cuts numbers into digits
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, 49152)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.startswith("<|im_start|>system") and tokenizer(chat).input_ids[0] == 1


def test_parts_fit_each_other_and_misfits_are_named(prepared: Path, tmp_path: Path) -> None:
    assert prepare.check_fit(prepared) == {"language_model": 576, "image_vector": 192, "image_tower": 256}
    for name in ("vicuna", "imagebind", "pandagpt"):
        (tmp_path / name).mkdir()
    storage.write_json(tmp_path / "vicuna" / "config.json", {"hidden_size": 5120})
    storage.write_json(tmp_path / "imagebind" / "config.json", {"embed_dim": 192, "vision_cfg": {"width": 192}})
    os.link(prepared / "pandagpt" / "model.safetensors", tmp_path / "pandagpt" / "model.safetensors")
    with pytest.raises(WeightFileError, match=r"pandagpt: llama_proj\.weight is \(576, 192\).*need \(5120, 192\)"):
        prepare.check_fit(tmp_path)


def test_second_time_needs_nothing(prepared: Path) -> None:
    plan = mini(prepared)
    assert plan.missing() == [] and plan.peak_disk_bytes == 0 and plan.is_possible
    assert set(plan.table()["state"]) == {"component is ready"}
    assert not [path for path in (prepared / "raw").rglob("*") if path.is_file()]  # used up, deleted
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*") if path.name != shard_job.LOCK}
    said: list[str] = []
    obtain(plan)
    base = prepare.convert_base(plan, shard_bytes=SHARD_BYTES, log=said.append)
    prepare.merge(plan, base, shard_bytes=SHARD_BYTES, log=said.append)
    prepare.convert_checkpoints(plan, log=said.append)
    assert len([line for line in said if "already complete" in line]) == 8
    assert {path: path.stat().st_mtime_ns for path in before if path.is_file()} == {
        path: stamp for path, stamp in before.items() if path.is_file()
    }
    table = prepare.summary(prepared)
    assert list(table["component"]) == sorted(table["component"]) and len(table) == 8
    statistics = weights.merge_statistics(prepared / "vicuna").set_index("matrix")
    assert statistics.index[0] == "model.embed_tokens"
    assert statistics.loc["model.embed_tokens", "pad_row_cosine"] > 0.99
    assert 0.2 < statistics.loc["mlp.up_proj", "delta / base"] < 0.4


def test_files_used_up_by_an_unfinished_run_are_not_asked_for_again(tmp_path: Path) -> None:
    plan = mini(tmp_path)
    n_all = len(plan.missing())
    (tmp_path / "llama").mkdir()
    inputs = {f"meta/consolidated.{i:02d}.pth": {} for i in range(3)}
    storage.write_json(tmp_path / "llama" / shard_job.READY, {"inputs": inputs})
    (tmp_path / "vicuna").mkdir()
    deleted = ["pytorch_model-00001-of-00002.bin"]
    storage.write_json(tmp_path / "vicuna" / shard_job.JOURNAL, {"inputs": {}, "deleted": deleted})
    assert len(plan.missing()) == n_all - 4


def test_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standins.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"bash colab_setup\.sh"):
        standins.find_smollm2()


# --- plans of the large models ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "fused", "delete_raw", "low", "high"),
    [
        ("7B", True, True, 38, 43),  # specification: "worst transient about 40 GB"
        ("7B", False, False, 58, 64),
        ("13B", True, True, 62, 73),  # and "13B about 65 GB"
        ("13B", False, False, 106, 113),
    ],
)
def test_peak_disk(tmp_path: Path, size: str, fused: bool, delete_raw: bool, low: float, high: float) -> None:
    plan = weight_plan.make_plan(tmp_path, size=size, fused=fused, delete_raw=delete_raw)
    assert low <= plan.peak_disk_bytes / 1e9 <= high


def test_plan_of_7b_names_every_file_with_licence_and_hash(tmp_path: Path) -> None:
    plan = weight_plan.make_plan(tmp_path, size="7B")
    table = plan.table()
    assert {"vicuna", "imagebind", "pandagpt", "anomalygpt/train_mvtec", "anomalyclip/trained_on_visa"} <= set(
        table["for"]
    )
    assert (table["licence"] != "").all() and table["about MB"].sum() > 30_000
    # published names are inverted: ..._visa was trained on MVTec
    row = table[table["for"] == "anomalyclip/trained_on_mvtec"].iloc[0]
    assert "9_12_4_multiscale_visa/" in row["from"]
    with pytest.raises(FileNotFoundError) as caught:
        obtain(plan)
    for name in ("consolidated.00.pth", "params.json", "tokenizer.model", "6efc8dab194ab59e49cd24be5574d85e"):
        assert name in str(caught.value)
    assert "published AnomalyGPT checkpoints are 7B only" in weight_plan.make_plan(tmp_path, size="13B").verdict()
    assert "degraded" in weight_plan.make_plan(tmp_path, size="7B", version="v1.1").verdict()


def test_verdict_stops_on_a_small_machine(tmp_path: Path) -> None:
    plan = weight_plan.make_plan(tmp_path, size="7B")
    roomy = dataclasses.replace(plan, free_disk_bytes=200 * 10**9, free_ram_bytes=12 * 10**9)
    assert roomy.is_possible and "verdict: go" in roomy.verdict()
    for small in ({"free_disk_bytes": 30 * 10**9}, {"free_ram_bytes": 5 * 10**8}):
        assert "STOP" in dataclasses.replace(roomy, **small).verdict()


def test_licences_must_be_accepted_before_anything_is_fetched(tmp_path: Path) -> None:
    plan = weight_plan.make_plan(tmp_path, size="7B", base="huggingface", llama_repository="someone/llama")
    with pytest.raises(PermissionError, match=r"CC BY-NC-SA(.|\n)*ACCEPT_LICENCES"):
        obtain(plan)


@pytest.mark.parametrize("choice", [{"size": "70B"}, {"base": "gguf"}, {"version": "v2"}, {"base": "merged"}])
def test_unknown_choices_say_what_is_allowed(tmp_path: Path, choice: dict) -> None:
    with pytest.raises(ValueError, match="allowed are|use base='meta'"):
        weight_plan.make_plan(tmp_path, **{"size": "mini", **choice})


def test_placed_and_fetched_files_are_verified_once(tmp_path: Path) -> None:
    """A file put there by hand and one from a web server, through the same check."""
    content = b"{}" * 5000
    sha256 = hashlib.sha256(content).hexdigest()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "b.json").write_bytes(content)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(tmp_path / "site"))

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/b.json"
    raw, checks = tmp_path / "raw", (("sha256", sha256),)
    raw.mkdir()
    files = (
        WeightFile("vicuna", raw / "a.json", "manual", 10_000, "MIT", False, checks),
        WeightFile("imagebind", raw / "b.json", url, 10_000, "MIT", False, checks),
    )
    plan = dataclasses.replace(weight_plan.make_plan(tmp_path, size="7B"), files=files)
    with pytest.raises(FileNotFoundError, match=r"a\.json"):
        obtain(plan)
    (raw / "a.json").write_bytes(content[:-1])
    with pytest.raises(DownloadError, match=r"a\.json has sha256 .* set aside"):
        obtain(plan)
    assert (raw / "b.json").read_bytes() == content and (raw / "a.json.wrong").exists()
    (raw / "a.json").write_bytes(content)
    said: list[str] = []
    obtain(plan, log=said.append)
    assert any("a.json: verified (sha256)" in line for line in said)
    said.clear()
    obtain(plan, log=said.append)
    assert len(said) == 1  # not hashed again
    server.shutdown()
    server.server_close()
