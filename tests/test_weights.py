"""Conversion and merge of the language model, against independent references written out in this file."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import files, weights
from helpers.weights import WeightFileError, folders, llama, talk, tensors

DIMS = {"dim": 64, "n_heads": 4, "n_kv_heads": 4, "n_layers": 3, "inner": 96, "vocab": 128}
GROUPED = DIMS | {"n_heads": 8, "n_kv_heads": 4}


def quiet(_: str) -> None: ...


def meta_model(dims: dict, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """A whole random model under Meta's names, float16, not yet split."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).half()

    head = dims["dim"] // dims["n_heads"]
    model = {
        "tok_embeddings.weight": tensor(dims["vocab"], dims["dim"]),
        "norm.weight": 1 + tensor(dims["dim"]),
        "output.weight": tensor(dims["vocab"], dims["dim"]),
    }
    for layer in range(dims["n_layers"]):
        block = {
            "attention.wq": tensor(dims["dim"], dims["dim"]),
            "attention.wk": tensor(dims["n_kv_heads"] * head, dims["dim"]),
            "attention.wv": tensor(dims["n_kv_heads"] * head, dims["dim"]),
            "attention.wo": tensor(dims["dim"], dims["dim"]),
            "feed_forward.w1": tensor(dims["inner"], dims["dim"]),
            "feed_forward.w2": tensor(dims["dim"], dims["inner"]),
            "feed_forward.w3": tensor(dims["inner"], dims["dim"]),
            "attention_norm": 1 + tensor(dims["dim"]),
            "ffn_norm": 1 + tensor(dims["dim"]),
        }
        model |= {f"layers.{layer}.{name}.weight": value for name, value in block.items()}
    return model


def write_meta(folder: Path, model: dict[str, torch.Tensor], dims: dict, n_shards: int) -> Path:
    """Meta's files: ``n_shards`` shards, tensors as views into shared storages, vocab_size -1, rotary table."""
    folder.mkdir(parents=True)
    columns = ("tok_embeddings", "attention.wo", "feed_forward.w2")
    for shard in range(n_shards):
        content, flat = {}, []
        for name, tensor in model.items():
            if tensor.ndim == 1:
                part = tensor
            else:
                part = tensor.chunk(n_shards, dim=1 if any(key in name for key in columns) else 0)[shard]
            flat.append((name, part.contiguous()))
        storage_ = torch.cat([part.reshape(-1) for _, part in flat])  # one storage, as in the originals
        begin = 0
        for name, part in flat:
            content[name] = storage_[begin : begin + part.numel()].view(part.shape)
            begin += part.numel()
        content["rope.freqs"] = torch.ones(8)
        torch.save(content, folder / f"consolidated.{shard:02d}.pth")
    params = {"dim": dims["dim"], "multiple_of": 256, "n_heads": dims["n_heads"], "n_layers": dims["n_layers"]}
    params |= {"norm_eps": 1e-6, "vocab_size": -1}
    if dims["n_kv_heads"] != dims["n_heads"]:
        params["n_kv_heads"] = dims["n_kv_heads"]
    (folder / "params.json").write_text(json.dumps(params))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def hugging_face(model: dict[str, torch.Tensor], dims: dict) -> dict[str, torch.Tensor]:
    """Independent conversion, per head and per pair with plain loops (the rule of transformers 4.28)."""
    head = dims["dim"] // dims["n_heads"]

    def permute(weight: torch.Tensor) -> torch.Tensor:
        rows = []
        for first in range(0, weight.shape[0], head):
            rows += [weight[first + 2 * i] for i in range(head // 2)]
            rows += [weight[first + 2 * i + 1] for i in range(head // 2)]
        return torch.stack(rows)

    names = {
        "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    result = {
        "model.embed_tokens.weight": model["tok_embeddings.weight"],
        "model.norm.weight": model["norm.weight"],
        "lm_head.weight": model["output.weight"],
    }
    for layer in range(dims["n_layers"]):
        ours, theirs = f"model.layers.{layer}", f"layers.{layer}"
        result[f"{ours}.self_attn.q_proj.weight"] = permute(model[f"{theirs}.attention.wq.weight"])
        result[f"{ours}.self_attn.k_proj.weight"] = permute(model[f"{theirs}.attention.wk.weight"])
        for meta, name in names.items():
            result[f"{ours}.{name}.weight"] = model[f"{theirs}.{meta}.weight"]
    return result


def fastchat(base: dict[str, torch.Tensor], delta: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """FastChat's rule, whole model in memory: resize with zero rows, then add in float16."""
    merged = {}
    for name, change in delta.items():
        original = base[name].half()
        if original.shape[0] < change.shape[0]:
            grown = torch.zeros_like(change)
            grown[: original.shape[0]] = original
            original = grown
        original += change.half()
        merged[name] = original
    return merged


def make_delta(base: dict[str, torch.Tensor], extra_rows: int, *, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    delta = {}
    for name, tensor in base.items():
        rows = extra_rows if name in llama.EMBEDDINGS else 0
        shape = (tensor.shape[0] + rows, *tensor.shape[1:])
        delta[name] = (torch.randn(*shape, generator=generator) * 0.001).half()
        if rows:
            delta[name][-1] = base[name].float().mean(0).half()
            delta[name][-1, 0] = -0.0  # 0 + (-0) is +0
    return delta


def write_hf(folder: Path, tensors: dict[str, torch.Tensor], dims: dict, *, fmt: str = "bin", n_files: int = 2) -> Path:
    """A Hugging Face folder with an index, in either format."""
    folder.mkdir(parents=True)
    names = list(tensors)
    stem, suffix = ("pytorch_model", "bin") if fmt == "bin" else ("model", "safetensors")
    weight_map = {}
    for number in range(n_files):
        keys = names[number * len(names) // n_files : (number + 1) * len(names) // n_files]
        name = f"{stem}-{number + 1:05d}-of-{n_files:05d}.{suffix}"
        part = {key: tensors[key].contiguous().clone() for key in keys}
        torch.save(part, folder / name) if fmt == "bin" else save_file(part, folder / name)
        weight_map |= dict.fromkeys(keys, name)
    index = "pytorch_model.bin" if fmt == "bin" else "model.safetensors"
    (folder / f"{index}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "hidden_size": dims["dim"], "intermediate_size": dims["inner"], "num_hidden_layers": dims["n_layers"],
        "num_attention_heads": dims["n_heads"], "num_key_value_heads": dims["n_kv_heads"], "rms_norm_eps": 1e-6,
        "vocab_size": dims["vocab"], "model_type": "llama",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name


@pytest.fixture
def base() -> dict[str, torch.Tensor]:
    return hugging_face(meta_model(DIMS), DIMS)


@pytest.fixture
def pair(tmp_path: Path, base: dict[str, torch.Tensor]) -> tuple[Path, Path]:
    """A base and a v0 delta on disk."""
    write_hf(tmp_path / "base", base, DIMS)
    return tmp_path / "base", write_hf(tmp_path / "delta", make_delta(base, 1), DIMS, n_files=3)


# --- equality ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_shards", [1, 2, 4])
@pytest.mark.parametrize("dims", [DIMS, GROUPED], ids=["mha", "grouped"])
def test_conversion_moves_every_bit(tmp_path: Path, dims: dict, n_shards: int) -> None:
    model = meta_model(dims)
    source = write_meta(tmp_path / "meta", model, dims, n_shards)
    target = weights.convert_llama(source, tmp_path / "hf", shard_bytes=100_000, log=quiet)
    assert_same_bits(read_all(target), hugging_face(model, dims))
    assert len(list(target.glob("model-*.safetensors"))) > 1


@pytest.mark.parametrize("extra_rows", [1, 0], ids=["v0", "v1.1"])
@pytest.mark.parametrize("fmt", ["bin", "safetensors"])
@pytest.mark.parametrize("n_files", [1, 3])
def test_merge_equals_fastchat_bit_for_bit(tmp_path: Path, base: dict, extra_rows: int, fmt: str, n_files: int) -> None:
    delta = make_delta(base, extra_rows)
    left = write_hf(tmp_path / "base", base, DIMS, fmt=fmt, n_files=n_files)
    right = write_hf(tmp_path / "delta", delta, DIMS, fmt=fmt, n_files=4 - n_files)
    target = weights.merge_delta(left, right, tmp_path / "out", shard_bytes=60_000, log=quiet)
    assert_same_bits(read_all(target), fastchat(base, delta))
    ready = weights.read_ready(target)
    assert ready["source"]["version"] == ("v0" if extra_rows else "v1.1")
    assert json.loads((target / "config.json").read_text())["vocab_size"] == DIMS["vocab"] + extra_rows


@pytest.mark.parametrize(("n_shards", "extra_rows", "chunk"), [(1, 1, 4 << 20), (2, 0, 4 << 20), (2, 1, 5000)])
def test_fused_merge_never_writes_the_base_and_gives_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_shards: int, extra_rows: int, chunk: int
) -> None:
    monkeypatch.setattr(tensors, "CHUNK_BYTES", chunk)  # at 5000 several chunks a tensor, whole heads each
    model = meta_model(GROUPED)
    converted = hugging_face(model, GROUPED)
    delta = make_delta(converted, extra_rows)
    meta = write_meta(tmp_path / "meta", model, GROUPED, n_shards)
    right = write_hf(tmp_path / "delta", delta, GROUPED)
    target = weights.merge_delta(meta, right, tmp_path / "out", log=quiet)
    assert_same_bits(read_all(target), fastchat(converted, delta))


def test_converted_model_speaks_like_meta_s_own_forward_pass(tmp_path: Path) -> None:
    """17 tokens: at position 0 a missing q/k reordering cannot be seen."""
    from transformers import AutoModelForCausalLM

    model = meta_model(GROUPED)
    model = {k: v.float() * (5 if v.ndim == 2 else 1) for k, v in model.items()}
    half = {k: v.half() for k, v in model.items()}
    source = write_meta(tmp_path / "meta", half, GROUPED, 2)
    target = weights.convert_llama(source, tmp_path / "hf", log=quiet)
    loaded = AutoModelForCausalLM.from_pretrained(target).float().eval()
    ids = torch.arange(17) * 7 % GROUPED["vocab"]
    with torch.no_grad():
        found = loaded(ids[None]).logits[0]
    expected = meta_forward({k: v.float() for k, v in half.items()}, GROUPED, ids)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    assert expected.abs().max() > 0.1


def meta_forward(model: dict[str, torch.Tensor], dims: dict, ids: torch.Tensor) -> torch.Tensor:
    """Meta's LLaMA with complex rotary pairs (2i, 2i + 1), written from the paper."""
    head, n = dims["dim"] // dims["n_heads"], len(ids)
    angle = torch.outer(torch.arange(n).float(), 10000.0 ** (-torch.arange(0, head, 2).float() / head))
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]  # (n, 1, head / 2)

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight

    def rotate(x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turn).flatten(-2)

    x = model["tok_embeddings.weight"][ids]
    causal = torch.full((n, n), -math.inf).triu(1)
    for layer in range(dims["n_layers"]):
        here = {k: v for k, v in model.items() if k.startswith(f"layers.{layer}.")}
        w = {k.split(".", 2)[2].removesuffix(".weight"): v for k, v in here.items()}
        h = norm(x, w["attention_norm"])
        q = rotate((h @ w["attention.wq"].T).view(n, -1, head))
        k = rotate((h @ w["attention.wk"].T).view(n, -1, head)).repeat_interleave(q.shape[1] // dims["n_kv_heads"], 1)
        v = (h @ w["attention.wv"].T).view(n, -1, head).repeat_interleave(q.shape[1] // dims["n_kv_heads"], 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(head) + causal
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(n, -1)
        x = x + out @ w["attention.wo"].T
        h = norm(x, w["ffn_norm"])
        gate = torch.nn.functional.silu(h @ w["feed_forward.w1"].T) * (h @ w["feed_forward.w3"].T)
        x = x + gate @ w["feed_forward.w2"].T
    return norm(x, model["norm.weight"]) @ model["output.weight"].T


# --- the failure table of the specification (section 5); numbers are its rows ------------------------------------


def run_killed(code: str, target: Path, *, at_shards: int) -> None:
    """Run ``code`` in a process whose disk is slow, and kill it with -9 while a shard is half written."""
    slow = "import os, time; fsync = os.fsync; os.fsync = lambda f: (time.sleep(0.08), fsync(f))\n"
    process = subprocess.Popen([sys.executable, "-c", slow + code], cwd=Path(__file__).parents[1])
    journal = target / folders.JOURNAL
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        n_done = len(files.read_json(journal)["shards"]) if journal.exists() else 0
        if n_done >= at_shards and list(target.glob("*.part")):
            break
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_01_kill_mid_shard_then_resume_writes_only_what_is_missing(tmp_path: Path, base: dict, pair: tuple) -> None:
    target = tmp_path / "out"
    call = f"weights.merge_delta('{pair[0]}', '{pair[1]}', '{target}', shard_bytes=40_000)"
    run_killed(f"from helpers import weights\n{call}", target, at_shards=2)
    assert list(target.glob("*.part")) and not (target / folders.READY).exists()
    kept = {path: path.stat().st_mtime_ns for path in target.glob("*.safetensors")}
    assert len(kept) >= 2
    for options in ({"shard_bytes": 80_000}, {"shard_bytes": 40_000, "base": write_hf(tmp_path / "b", base, DIMS)}):
        left = options.pop("base", pair[0])
        with pytest.raises(WeightFileError, match="from other inputs or settings"):
            weights.merge_delta(left, pair[1], target, log=quiet, **options)
    flip_byte(max(kept), -3)  # a finished shard that changed is written again
    same = {path: time_ns for path, time_ns in kept.items() if path != max(kept)}
    said: list[str] = []
    weights.merge_delta(*pair, target, shard_bytes=40_000, log=said.append)
    assert any(line.startswith(f"resuming at {len(same)}/") for line in said)
    assert {path: path.stat().st_mtime_ns for path in same} == same
    assert_same_bits(read_all(target), fastchat(base, make_delta(base, 1)))
    assert not list(target.glob("*.part")) and not (target / folders.JOURNAL).exists()


def flip_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def refused(pair: tuple, target: Path, match: str, **options: object) -> None:
    """The merge stops with words, quickly, and leaves no weights behind."""
    begin = time.process_time()
    with pytest.raises((WeightFileError, FileNotFoundError), match=match) as caught:
        weights.merge_delta(*pair, target, log=quiet, **options)
    assert time.process_time() - begin < 1
    assert not list(target.glob("*.safetensors*")) and not (target / folders.READY).exists()
    assert "weights_only=False" not in str(caught.value)


class Evil:
    """A pickle that creates a folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("witness",)


def change_config(folder: Path, key: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != key}))


def drop_tensor(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    del content["model.layers.0.self_attn.q_proj.weight"]
    torch.save(content, path)


def change_tensors(folder: Path, **changes: torch.Tensor) -> None:
    path = min(folder.glob("*.bin"))
    torch.save(torch.load(path, weights_only=True) | {k.replace("__", "."): v for k, v in changes.items()}, path)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9976634558\n"
SPOILT = {  # what happens to the delta's first file, or to a folder of (base, delta): words of the refusal
    "cut": (lambda base, delta, file: os.truncate(file, file.stat().st_size // 2), "is cut short"),
    "cut late": (lambda base, delta, file: os.truncate(file, int(file.stat().st_size * 0.97)), "is cut short"),
    "pointer": (lambda base, delta, file: file.write_bytes(LFS), "Git-LFS pointer"),
    "page": (lambda base, delta, file: file.write_bytes(b"<!DOCTYPE html><title>Quota</title>"), "is a web page"),
    "empty": (lambda base, delta, file: file.write_bytes(b""), "cannot be read as weights"),
    "noise": (lambda base, delta, file: file.write_bytes(b"not weights" * 40), "cannot be read as weights"),
    "code": (lambda base, delta, file: torch.save({"x": Evil()}, file), "was refused.*could run code"),
    "old code": (
        lambda base, delta, file: torch.save({"x": Evil()}, file, _use_new_zipfile_serialization=False),
        "was refused.*could run code",
    ),
    "shape": (
        lambda base, delta, file: change_tensors(delta, model__norm__weight=torch.zeros(63).half()),
        r"model\.norm\.weight is \(63,\), expected \(64,\)",
    ),
    "unknown": (
        lambda base, delta, file: change_tensors(delta, extra=torch.zeros(2)), "unknown extra.*ALLOW_UNKNOWN = True",
    ),
    "tensor of the delta": (lambda base, delta, file: drop_tensor(file), r"missing.*q_proj\.weight \(expected in"),
    "tensor of the base": (
        lambda base, delta, file: drop_tensor(min(base.glob("*.bin"))), r"missing.*q_proj\.weight \(expected in",
    ),
    "file": (lambda base, delta, file: file.rename(file.with_stem(f"{file.stem} (1)")), r"lacks .*holds .*\(1\)\.bin"),
    "empty index": (
        lambda base, delta, file: (base / "pytorch_model.bin.index.json").write_text('{"weight_map": {}}'),
        "lists no tensors",
    ),
    "no config": (lambda base, delta, file: (base / "config.json").unlink(), r"config\.json is missing"),
    "epsilon": (lambda base, delta, file: change_config(base, "rms_norm_eps"), "config.json lacks rms_norm_eps"),
    "heads": (lambda base, delta, file: change_config(base, "num_attention_heads"), "lacks num_attention_heads"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_spoilt_is_refused_in_words(
    pair: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    spoil, words = SPOILT[name]
    spoil(*pair, min(pair[1].glob("*.bin")))
    refused(pair, tmp_path / "out", words)
    assert not (tmp_path / "witness").exists()


def test_a_cut_safetensors_file(tmp_path: Path, base: dict) -> None:
    left = write_hf(tmp_path / "base", base, DIMS, fmt="safetensors")
    path = max(left.glob("*.safetensors"))
    os.truncate(path, int(path.stat().st_size * 0.97))
    refused((left, write_hf(tmp_path / "delta", make_delta(base, 1), DIMS)), tmp_path / "out", "is cut short")


def test_tensor_absent_from_the_index_is_taken_from_the_file(pair: tuple, tmp_path: Path) -> None:
    path = pair[1] / "pytorch_model.bin.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    target = weights.merge_delta(*pair, tmp_path / "out", log=quiet)
    assert "model.norm.weight" in read_all(target)
    assert any("does not list model.norm.weight" in note for note in weights.read_ready(target)["notes"])


def test_meta_shards_that_are_missing_misnamed_or_mixed(tmp_path: Path) -> None:
    def stops(match: str) -> None:
        with pytest.raises((FileNotFoundError, WeightFileError), match=match):
            weights.convert_llama(meta, tmp_path / "out", log=quiet)

    meta = write_meta(tmp_path / "meta", meta_model(DIMS), DIMS, 2)
    other = write_meta(tmp_path / "other", meta_model(DIMS, seed=3), DIMS, 2)
    (meta / "consolidated.01.pth").rename(meta / "consolidated.01 (1).pth")
    stops(r"holds .*consolidated\.01 \(1\)\.pth")
    (meta / "consolidated.01 (1).pth").unlink()  # one of two looks like a whole model
    stops("not a whole LLaMA model")
    os.replace(other / "consolidated.01.pth", meta / "consolidated.01.pth")
    stops("shards of different models")


@pytest.mark.parametrize(("left", "right"), [(60000.0, 60000.0), (math.nan, 0.0), (-math.inf, 0.0)])
def test_09_not_a_finite_number(tmp_path: Path, base: dict, left: float, right: float) -> None:
    delta = make_delta(base, 1)
    base["model.layers.2.mlp.up_proj.weight"][7, 5] = left
    delta["model.layers.2.mlp.up_proj.weight"][7, 5] = right
    pair = write_hf(tmp_path / "base", base, DIMS), write_hf(tmp_path / "delta", delta, DIMS)
    with pytest.raises(WeightFileError, match=r"layers\.2\.mlp\.up_proj\.weight is not a finite number"):
        weights.merge_delta(*pair, tmp_path / "out", shard_bytes=40_000, log=quiet)
    assert not (tmp_path / "out" / folders.READY).exists() and not list((tmp_path / "out").glob("*.part"))
    assert list(pair[0].glob("*.bin"))


@pytest.fixture
def small_disk(tmp_path: Path):
    """A real disk of 1 MB (tmpfs); needs root, as in CI's container and on Colab."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if made.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {made.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_10_disk_that_fills_up_during_the_run_keeps_what_is_done(
    small_disk: Path, tmp_path: Path, base: dict, pair: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, ballast, fsync = small_disk / "out", small_disk / "ballast", os.fsync

    def filling(handle: int) -> None:  # another program fills the disk once two shards are written
        fsync(handle)
        if len(list(target.glob("*.safetensors"))) == 2 and not ballast.exists():
            ballast.write_bytes(bytes(files.free_bytes(small_disk) - 30_000))

    monkeypatch.setattr(os, "fsync", filling)
    monkeypatch.setattr(folders, "RESERVE_BYTES", 0)
    with pytest.raises(OSError, match="GB are missing") as caught:
        weights.merge_delta(*pair, target, shard_bytes=60_000, log=quiet)
    assert caught.value.errno == errno.ENOSPC and not list(target.glob("*.part"))
    n_done = len(list(target.glob("*.safetensors")))
    assert n_done >= 2
    ballast.unlink()
    said: list[str] = []
    monkeypatch.undo()
    weights.merge_delta(*pair, target, shard_bytes=60_000, log=said.append)
    assert any(f"resuming at {n_done}/" in line for line in said)
    assert_same_bits(read_all(target), fastchat(base, make_delta(base, 1)))


def test_13_two_runs_at_once(pair: tuple, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    code = f"""
import sys
from filelock import FileLock
with FileLock({str(target / folders.LOCK)!r}):
    print("locked", flush=True)
    sys.stdin.read()
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
    )
    assert holder.stdout.readline() == b"locked\n"
    with pytest.raises(BlockingIOError, match="being written by another process"):
        weights.merge_delta(*pair, target, log=quiet)
    holder.kill()  # a lock of a dead process does not hold
    holder.wait()
    weights.merge_delta(*pair, target, log=quiet)


def test_base_and_delta_that_do_not_fit(tmp_path: Path, base: dict, pair: tuple) -> None:
    left, big = pair[0], DIMS | {"dim": 128}
    delta = {n: write_hf(tmp_path / f"d{n}", make_delta(base, n), DIMS) for n in (0, 3)}
    other = write_hf(tmp_path / "other", hugging_face(meta_model(big), big), big)
    merged = weights.merge_delta(*pair, tmp_path / "merged", log=quiet)
    out = tmp_path / "out"
    refused(pair, out, r"128 token rows.*129 \(wanted: v1\.1\)", version="v1.1")
    refused((left, delta[0]), out, r"wanted: v0", version="v0")
    refused((left, delta[3]), out, "128 token rows.*131.*Allowed are")
    refused((merged, pair[1]), out, "merged already")
    refused((other, pair[1]), out, "Use the same size")
    refused((left, left), out, "is not a delta")


def test_15_bfloat16_rounded_and_float32_bases_are_recorded(tmp_path: Path, base: dict, pair: tuple) -> None:
    rounded = {k: v.bfloat16().half() for k, v in base.items()}
    target = weights.merge_delta(write_hf(tmp_path / "b16", rounded, DIMS), pair[1], tmp_path / "out", log=quiet)
    notes = weights.read_ready(target)["notes"]
    assert any("rounded to bfloat16" in note for note in notes)
    clean = weights.merge_delta(*pair, tmp_path / "out2", log=quiet)
    assert weights.read_ready(clean)["notes"] == []
    wide = write_hf(tmp_path / "f32", {k: v.float() + 1e-9 for k, v in base.items()}, DIMS)
    target = weights.merge_delta(wide, pair[1], tmp_path / "out3", log=quiet)
    assert_same_bits(read_all(target), fastchat(base, make_delta(base, 1)))  # cast first, then add
    assert any("stored as float32" in note for note in weights.read_ready(target)["notes"])


# --- what people have on disk ------------------------------------------------------------------------------------


def test_an_input_is_never_the_target(pair: tuple, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for folder in pair for path in folder.iterdir()}
    (tmp_path / "link").symlink_to(pair[0])
    meta = write_meta(tmp_path / "meta", meta_model(DIMS), DIMS, 1)
    for call in (
        lambda: weights.merge_delta(*pair, pair[0]),
        lambda: weights.merge_delta(*pair, tmp_path / "link"),
        lambda: weights.merge_delta(*pair, pair[1]),
        lambda: weights.convert_llama(meta, meta),
    ):
        with pytest.raises(ValueError, match="is an input and cannot be written to"):
            call()
    assert {path: path.stat().st_mtime_ns for folder in pair for path in folder.iterdir()} == before


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A merge of 0.2 GB in a process of its own: what it takes beyond its imports is a few pieces of 4 MB."""
    dims = {"dim": 512, "n_heads": 4, "n_kv_heads": 4, "n_layers": 4, "inner": 2048, "vocab": 32000}
    base = hugging_face(meta_model(dims), dims)
    pair = write_hf(tmp_path / "b", base, dims), write_hf(tmp_path / "d", make_delta(base, 1), dims)
    code = f"""
from helpers import weights
def anonymous():
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0])
before, peak = anonymous(), 0
from helpers.weights import tensors
old = tensors._content
def content(*args):
    global peak
    peak = max(peak, anonymous())
    return old(*args)
tensors._content = content
weights.merge_delta({str(pair[0])!r}, {str(pair[1])!r}, {str(tmp_path / "out")!r}, log=lambda text: None)
print((peak - before) // 1024)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert int(run.stdout) < 80, run.stderr  # MB


# --- what else must hold ----------------------------------------------------------------------------------------


def test_rotary_tables_are_dropped_and_unknown_keys_when_allowed(tmp_path: Path, base: dict) -> None:
    delta = make_delta(base, 1)
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(8) for i in range(3)}
    extra["model.layers.0.extra"] = torch.zeros(2, 2)
    pair = write_hf(tmp_path / "base", base, DIMS), write_hf(tmp_path / "delta", delta | extra, DIMS)
    target = weights.merge_delta(*pair, tmp_path / "out", allow_unknown=True, log=quiet)
    assert_same_bits(read_all(target), fastchat(base, delta))


def test_output_is_what_transformers_and_safetensors_read(tmp_path: Path, pair: tuple) -> None:
    from transformers import AutoModelForCausalLM

    target = weights.merge_delta(*pair, tmp_path / "out", shard_bytes=50_000, log=quiet)
    model, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.get_input_embeddings().weight.shape == (129, 64)
    assert torch.equal(model.lm_head.weight.half(), read_all(target)["lm_head.weight"])  # its own, not tied
    ready = weights.read_ready(target)
    for name, entry in ready["files"].items():
        assert files.sha256_file(target / name) == entry["sha256"], name


def test_require_names_the_notebook(tmp_path: Path, pair: tuple) -> None:
    with pytest.raises(FileNotFoundError, match="Run notebook 01_prepare_weights"):
        weights.require(tmp_path, "vicuna")
    with pytest.raises(ValueError, match="no component"):
        weights.require(tmp_path, "vicunja")
    target = weights.merge_delta(*pair, tmp_path / "vicuna", log=quiet)
    assert weights.require(tmp_path, "vicuna", verify=True) == target
    flip_byte(target / "model.safetensors", -5)
    with pytest.raises(WeightFileError, match="does not match its SHA-256"):
        weights.require(tmp_path, "vicuna", verify=True)
    os.truncate(target / "model.safetensors", 1000)
    with pytest.raises(WeightFileError, match=r"model\.safetensors has 1000 bytes"):
        weights.require(tmp_path, "vicuna")


# --- tokenizer and self-test --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SentencePiece model with LLaMA's settings: BPE, byte fallback, single digits, unk 0, bos 1, eos 2."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("tokenizer")
    text = [path.read_text() for path in sorted((Path(__file__).parents[1] / "helpers").rglob("*.py"))[:6]]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(text).split("\n")), model_prefix=str(folder / "tokenizer"), model_type="bpe",
        vocab_size=500, byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, pad_id=-1, minloglevel=2,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("damage", ["none", "decapoda", "early v0"])
def test_tokenizer_gives_the_ids_of_sentencepiece_whatever_lay_beside_it(
    tmp_path: Path, sentencepiece_model: Path, damage: str
) -> None:
    import sentencepiece
    from transformers import AutoTokenizer

    dims = DIMS | {"vocab": 500}
    meta = write_meta(tmp_path / "meta", meta_model(dims), dims, 2)
    (meta / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes((sentencepiece_model / "tokenizer.model").read_bytes())
    special = {"decapoda": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "")}
    special["early v0"] = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "</s>")
    if damage != "none":  # as these folders were published
        config = special[damage] | {"tokenizer_class": "LLaMATokenizer"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(special[damage]))
    target = weights.convert_llama(meta, tmp_path / "out", log=quiet)
    assert (target / "tokenizer.model").read_bytes() == (sentencepiece_model / "tokenizer.model").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(target)
    talk.check_tokenizer(target, tokenizer)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(target / "tokenizer.model"))
    for text in ("### Human: <Img>", "def f(x):\n    return 1503", "café ✓"):
        assert tokenizer(text).input_ids == [1, *processor.encode(text)]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_a_tokenizer_that_differs_from_sentencepiece_is_refused(tmp_path: Path, sentencepiece_model: Path) -> None:
    from transformers import AutoTokenizer

    dims = DIMS | {"vocab": 500}
    meta = write_meta(tmp_path / "meta", meta_model(dims), dims, 1)
    target = weights.convert_llama(meta, tmp_path / "out", tokenizer=sentencepiece_model, log=quiet)
    config = json.loads((target / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": False}))
    with pytest.raises(WeightFileError, match="SentencePiece gives"):
        talk.check_tokenizer(target, AutoTokenizer.from_pretrained(target))


# --- true size, as sparse files -----------------------------------------------------------------------------------

SIZES = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32000},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
            "num_key_value_heads": 40, "vocab_size": 32000},
}  # fmt: skip


@pytest.mark.parametrize(("size", "n_params"), [("7B", 6_738_415_616), ("13B", 13_015_864_320)])
@pytest.mark.parametrize("extra_rows", [0, 1])
def test_every_key_is_transformers_llama(size: str, n_params: int, extra_rows: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    assert sum(math.prod(shape) for shape in llama.shapes_of(SIZES[size]).values()) == n_params
    config = SIZES[size] | {"vocab_size": 32000 + extra_rows}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config))
    assert llama.shapes_of(config) == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def write_sparse(folder: Path, size: str, *, vocab: int = 32000, eps: float = 1e-6) -> Path:
    """A Hugging Face folder of 13 or 26 GB that takes no room on disk: a true header over a hole."""
    config = SIZES[size] | {"vocab_size": vocab, "rms_norm_eps": eps}
    header, end = {}, 0
    for name, shape in llama.shapes_of(config).items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    folder.mkdir()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_true_size_mistakes_are_refused_within_a_second(tmp_path: Path) -> None:
    seven = write_sparse(tmp_path / "7b", "7B")
    refused((seven, write_sparse(tmp_path / "d13", "13B", vocab=32001)), tmp_path / "a", "is 7B, .* is for 13B")
    llama2 = write_sparse(tmp_path / "llama2", "7B", eps=1e-5)
    delta = write_sparse(tmp_path / "d7", "7B", vocab=32001)
    refused((llama2, delta), tmp_path / "b", "is LLaMA 2")
    done = write_sparse(tmp_path / "done", "7B", vocab=32001)
    refused((done, delta), tmp_path / "c", "32001 token rows and is merged already")
    with pytest.raises(WeightFileError, match="is LLaMA 2"):
        llama.adopt_merged(write_sparse(tmp_path / "v15", "7B", eps=1e-5), tmp_path / "d", log=quiet)


def test_true_size_disk_is_checked_before_the_first_byte(tmp_path: Path, small_disk: Path) -> None:
    pair = write_sparse(tmp_path / "7b", "7B"), write_sparse(tmp_path / "d7", "7B", vocab=32001)
    with pytest.raises(OSError, match=r"13\.48 GB are still to be written.* 15\.48 GB are missing"):
        weights.merge_delta(*pair, small_disk / "out", log=quiet)
    assert sorted(path.name for path in (small_disk / "out").iterdir()) == [folders.LOCK]
