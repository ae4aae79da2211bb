"""Conversion and merge of the language model, against the independent references of ``tiny_weights``."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import math
import os
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tiny_weights as tiny
import torch
from failing_drive import is_killed
from filelock import FileLock
from safetensors.torch import save_file
from tiny_weights import DIMS, GROUPED
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import files, weights
from helpers.weights import WeightFileError, folders, llama, talk, tensors

Pair = tuple[Path, Path]
BASE = tiny.hugging_face(tiny.meta_model())
MERGED = tiny.fastchat(BASE, tiny.make_delta(BASE))


def write_pair(folder: Path, base: dict, delta: dict | None = None, dims: dict = DIMS) -> Pair:
    """A base and a delta (by default its v0 delta) on disk."""
    delta = tiny.make_delta(base) if delta is None else delta
    return tiny.write_hf(folder / "base", base, dims), tiny.write_hf(folder / "delta", delta, dims, n_files=3)


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return write_pair(tmp_path, BASE)


@pytest.mark.parametrize(("dims", "n_shards"), [(DIMS, 1), (DIMS, 4), (GROUPED, 2), (GROUPED, 4)])
def test_conversion_moves_every_bit(tmp_path, dims, n_shards):
    model = tiny.meta_model(dims)
    source = tiny.write_meta(tmp_path / "meta", model, dims, n_shards)
    target = weights.convert_llama(source, tmp_path / "hf", shard_bytes=100_000)
    tiny.assert_same_bits(tiny.read_all(target), tiny.hugging_face(model, dims))
    assert len(list(target.glob("model-*.safetensors"))) > 1


@pytest.mark.parametrize("extra_rows", [1, 0], ids=["v0", "v1.1"])
@pytest.mark.parametrize(
    ("suffix", "n_files", "chunk"),
    [("bin", 1, 4 << 20), ("safetensors", 3, 4 << 20), ("meta", 1, 4 << 20), ("meta", 2, 5000)],
)
def test_merge_equals_fastchat_bit_for_bit(tmp_path, monkeypatch, extra_rows, suffix, n_files, chunk):
    """From both formats of a converted base, and straight from Meta's files, there in many chunks a tensor."""
    monkeypatch.setattr(tensors, "CHUNK_BYTES", chunk)
    model = tiny.meta_model(GROUPED)
    base = tiny.hugging_face(model, GROUPED)
    delta = tiny.make_delta(base, extra_rows)
    if suffix == "meta":
        left = tiny.write_meta(tmp_path / "base", model, GROUPED, n_files)
    else:
        left = tiny.write_hf(tmp_path / "base", base, GROUPED, suffix=suffix, n_files=n_files)
    kind = suffix.replace("meta", "bin")
    right = tiny.write_hf(tmp_path / "delta", delta, GROUPED, suffix=kind, n_files=4 - n_files)
    target = weights.merge_delta(left, right, tmp_path / "out", shard_bytes=60_000)
    tiny.assert_same_bits(tiny.read_all(target), tiny.fastchat(base, delta))
    assert weights.read_ready(target)["source"]["version"] == ("v0" if extra_rows else "v1.1")
    assert files.read_json(target / "config.json")["vocab_size"] == DIMS["vocab"] + extra_rows


def test_converted_model_speaks_like_meta_s_own_forward_pass(tmp_path):
    """17 tokens: at position 0 a missing q/k reordering cannot be seen."""
    half = {k: (v.float() * (5 if v.ndim == 2 else 1)).half() for k, v in tiny.meta_model(GROUPED).items()}
    target = weights.convert_llama(tiny.write_meta(tmp_path / "meta", half, GROUPED, 2), tmp_path / "hf")
    model, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.arange(17) * 7 % GROUPED["vocab"]
    with torch.no_grad():
        found = model.float().eval()(ids[None]).logits[0]
    expected = meta_forward({k: v.float() for k, v in half.items()}, GROUPED, ids)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    assert expected.abs().max() > 0.1


def meta_forward(model: dict[str, torch.Tensor], dims: dict, ids: torch.Tensor) -> torch.Tensor:
    """Meta's LLaMA with complex rotary pairs (2i, 2i + 1), written from the paper."""
    head, n, norm = dims["dim"] // dims["n_heads"], len(ids), functools.partial(torch.rms_norm, eps=1e-6)
    angle = torch.outer(torch.arange(n).float(), 10000.0 ** (-torch.arange(0, head, 2).float() / head))
    turn = torch.polar(torch.ones_like(angle), angle)  # (n, head / 2)

    def rotate(x: torch.Tensor) -> torch.Tensor:  # (heads, n, head)
        return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turn).flatten(-2)

    x, width = model["tok_embeddings.weight"][ids], (dims["dim"],)
    for layer in range(dims["n_layers"]):
        w = {k.removeprefix(f"layers.{layer}.").removesuffix(".weight"): v for k, v in model.items()}
        h = norm(x, width, w["attention_norm"])
        q, k, v = ((h @ w[f"attention.w{name}"].T).view(n, -1, head).transpose(0, 1) for name in "qkv")
        k, v = (item.repeat_interleave(len(q) // len(k), 0) for item in (k, v))
        seen = functional.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + seen.transpose(0, 1).reshape(n, -1) @ w["attention.wo"].T
        h = norm(x, width, w["ffn_norm"])
        gate = functional.silu(h @ w["feed_forward.w1"].T) * (h @ w["feed_forward.w3"].T)
        x = x + gate @ w["feed_forward.w2"].T
    return norm(x, width, model["norm.weight"]) @ model["output.weight"].T


def test_memory_does_not_grow_with_the_model(tmp_path, monkeypatch):
    """A merge of two files of 26 MB: beyond what was there before, it takes a few pieces of 1 MB."""

    def anonymous() -> int:
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) // 1024  # MB

    dims = {"dim": 512, "n_heads": 4, "n_kv_heads": 4, "n_layers": 2, "inner": 1024, "vocab": 8000}
    model = tiny.hugging_face(tiny.meta_model(dims), dims)
    pair = write_pair(tmp_path, model, dims=dims)
    seen, content = [anonymous()], tensors._content

    def watched(*args: object) -> memoryview:
        seen.append(anonymous())
        return content(*args)

    monkeypatch.setattr(tensors, "CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr(tensors, "_content", watched)
    weights.merge_delta(*pair, tmp_path / "out")
    assert max(seen) - seen[0] < 15 and len(seen) > 20


def slow_merge(pair: Pair, target: Path) -> None:
    fsync = os.fsync
    os.fsync = lambda handle: (time.sleep(0.05), fsync(handle))  # a slow disk
    weights.merge_delta(*pair, target, shard_bytes=40_000)


def test_kill_mid_shard_then_resume_writes_only_what_is_missing(tmp_path, pair, capsys):
    target = tmp_path / "out"

    def is_amid() -> bool:
        return len(list(target.glob("*.safetensors"))) > 2 and bool(list(target.glob("*.part")))

    assert is_killed(slow_merge, pair, target, when=is_amid)
    assert list(target.glob("*.part")) and not (target / folders.READY).exists()
    journal = files.read_json(target / folders.JOURNAL)["shards"]
    for left, shard_bytes in ((pair[0], 80_000), (tiny.write_hf(tmp_path / "b", BASE), 40_000)):
        with pytest.raises(WeightFileError, match="from other inputs or settings"):
            weights.merge_delta(left, pair[1], target, shard_bytes=shard_bytes)
    last = target / max(journal)
    last.write_bytes(last.read_bytes()[:-3] + b"xyz")  # a finished shard that changed is written again
    kept = {target / name: (target / name).stat().st_mtime_ns for name in journal if name != last.name}
    assert kept
    weights.merge_delta(*pair, target, shard_bytes=40_000)
    assert f"resuming at {len(kept)}/" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    tiny.assert_same_bits(tiny.read_all(target), MERGED)
    assert not list(target.glob("*.part")) and not (target / folders.JOURNAL).exists()


def test_a_disk_that_fills_up_during_the_run_keeps_what_is_done(tmp_path, pair, monkeypatch, capsys):
    target, fsync = tmp_path / "out", os.fsync

    def filling(handle: int) -> None:  # another program fills the disk once two shards are written
        if len(list(target.glob("*.safetensors"))) == 2:
            monkeypatch.setattr(files, "free_bytes", lambda path: 30_000)
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="still to be written, 0.00 GB are missing"):
        patch.setattr(files, "free_bytes", lambda path: 100_000)
        weights.merge_delta(*pair, target)
    assert [path.name for path in target.iterdir()] == [folders.LOCK]  # before the first byte
    monkeypatch.setattr(os, "fsync", filling)
    with pytest.raises(OSError, match="GB are missing.*it goes on") as caught:
        weights.merge_delta(*pair, target, shard_bytes=60_000)
    assert caught.value.errno == errno.ENOSPC and not list(target.glob("*.part"))
    monkeypatch.undo()
    with FileLock(target / folders.LOCK), pytest.raises(BlockingIOError, match="being written by another process"):
        weights.merge_delta(*pair, target, shard_bytes=60_000)
    weights.merge_delta(*pair, target, shard_bytes=60_000)
    assert "resuming at 1/" in capsys.readouterr().out  # the journal could not name the second
    tiny.assert_same_bits(tiny.read_all(target), MERGED)


def refused(pair: Pair, target: Path, match: str, **options: object) -> None:
    """The merge stops with words, quickly, and leaves no weights behind."""
    begin = time.process_time()
    with pytest.raises((WeightFileError, FileNotFoundError), match=match) as caught:
        weights.merge_delta(*pair, target, **options)
    assert time.process_time() - begin < 1
    assert not list(target.glob("*.safetensors*")) and not list(target.glob("*.part"))
    assert not (target / folders.READY).exists() and "weights_only=False" not in str(caught.value)


class Evil:
    """A pickle that creates a folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("witness",)


def packed(content: dict, is_old: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not is_old)
    return buffer.getvalue()


def changed(whole: bytes, name: str, tensor: torch.Tensor | None) -> bytes:
    """A torch file with another tensor of this name, or without it."""
    content = torch.load(io.BytesIO(whole), weights_only=True) | {name: tensor}
    return packed({name: tensor for name, tensor in content.items() if tensor is not None})


NORM = "model.norm.weight"
INFINITE = r"model\.norm\.weight is not a finite number"
FIRST = "delta/pytorch_model-00001-of-00003.bin"
SPOILT = {
    # kind: file, what becomes of its bytes (None: it is gone), words of the refusal
    "cut": (FIRST, lambda whole: whole[: len(whole) * 97 // 100], "is cut short"),
    "pointer": (FIRST, lambda whole: b"version https://git-lfs.github.com/spec/v1\nsize 9976634558\n", "LFS pointer"),
    "page": (FIRST, lambda whole: b"<!DOCTYPE html><title>Quota</title>", "is a web page"),
    "empty": (FIRST, lambda whole: b"", "cannot be read as weights"),
    "code": (FIRST, lambda whole: packed({"x": Evil()}), "was refused.*could run code"),
    "old code": (FIRST, lambda whole: packed({"x": Evil()}, is_old=True), "was refused.*could run code"),
    "no tensor": (FIRST, lambda whole: packed({"x": 3}), "x is no plain tensor"),
    "shape": (FIRST, lambda whole: changed(whole, NORM, torch.zeros(63).half()), r"norm\.weight is \(63,\), .*\(64,\)"),
    "unknown": (FIRST, lambda whole: changed(whole, "extra", torch.zeros(2)), "unknown extra.*ALLOW_UNKNOWN = True"),
    "tensor": (FIRST, lambda whole: changed(whole, NORM, None), r"lacks model\.norm\.weight"),
    "nan": (FIRST, lambda whole: changed(whole, NORM, torch.full((64,), math.nan).half()), INFINITE),
    "overflow": ("*/*-00001-of*", lambda whole: changed(whole, NORM, torch.full((64,), 6e4).half()), INFINITE),
    "file": (FIRST, None, r"lacks .*00001.* holds .*00002-of-00003\.bin"),
    "index": ("base/pytorch_model.bin.index.json", lambda whole: b"{}", "lists no tensors"),
    "no config": ("base/config.json", None, r"config\.json is missing"),
    "epsilon": ("base/config.json", lambda whole: whole.replace(b"rms_norm", b"x"), "config.json lacks rms_norm_eps"),
    "no tokenizer": ("*/tokenizer.json", None, r"no tokenizer\.model in"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPOILT)
def test_what_is_spoilt_is_refused_in_words(pair, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    pattern, spoil, words = SPOILT[kind]
    for path in tmp_path.glob(pattern):
        path.unlink() if spoil is None else path.write_bytes(spoil(path.read_bytes()))
    refused(pair, tmp_path / "out", words)
    assert not (tmp_path / "witness").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_any_damage_is_refused_in_words_or_leaves_a_whole_table(tmp_path):
    random, path, content = np.random.default_rng(0), tmp_path / "x", {"a": {"b": torch.ones(4, 4)}}
    save_file(content["a"], path)
    whole = (path.read_bytes(), packed(content), packed(content, is_old=True))
    for number in range(300):
        damaged = bytearray(whole[number % 3])
        for position in random.integers(0, len(damaged), random.integers(1, 20)):
            damaged[position] = random.integers(256)
        path.write_bytes(damaged[: random.integers(1, 2 * len(damaged))])
        with contextlib.suppress(WeightFileError):
            assert all(isinstance(item, tensors.Tensor) for item in tensors.read_index(path).values())


def test_base_and_delta_that_do_not_fit_and_an_input_as_target(tmp_path, pair, monkeypatch):
    before = {path: path.stat().st_mtime_ns for folder in pair for path in folder.iterdir()}
    (tmp_path / "link").symlink_to(pair[0])
    for target in (*pair, tmp_path / "link"):
        with pytest.raises(ValueError, match="is an input and cannot be written to"):
            weights.merge_delta(*pair, target)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    left, big, out = pair[0], DIMS | {"dim": 128}, tmp_path / "out"
    delta = {n: tiny.write_hf(tmp_path / f"d{n}", tiny.make_delta(BASE, n)) for n in (0, 3)}
    other = tiny.write_hf(tmp_path / "other", tiny.hugging_face(tiny.meta_model(big), big), big)
    merged = weights.merge_delta(*pair, tmp_path / "merged")
    refused(pair, out, r"128 token rows.*129 \(wanted: v1\.1\)", version="v1.1")
    refused((left, delta[0]), out, r"wanted: v0", version="v0")
    refused((left, delta[3]), out, "128 token rows.*131.*Allowed are")
    refused((merged, pair[1]), out, "merged already")
    refused((other, pair[1]), out, "is 128 wide, 3 layers, .*is for 64 wide.*Use the same size")
    refused((left, left), out, "is not a delta")
    monkeypatch.setattr(llama, "_SIZES", {(DIMS["dim"], DIMS["n_layers"]): "7B"})
    files.write_json(left / "config.json", files.read_json(left / "config.json") | {"rms_norm_eps": 1e-5})
    refused(pair, out, "is LLaMA 2")  # although its shapes are right
    with pytest.raises(WeightFileError, match="is LLaMA 2"):
        llama.adopt_merged(left, out)


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ("consolidated.01 (1).pth", r"holds .*consolidated\.01 \(1\)\.pth"),
        ("lost", "not a whole LLaMA model"),  # one of two looks like a whole model
        ("consolidated.01.pth", "shards of different models"),
    ],
)
def test_meta_shards_that_are_misnamed_missing_or_mixed(tmp_path, second, words):
    meta = tiny.write_meta(tmp_path / "meta", tiny.meta_model(), n_shards=2)
    other = tiny.write_meta(tmp_path / "other", tiny.meta_model(seed=3), n_shards=2)
    (meta / "consolidated.01.pth").unlink()
    os.replace(other / "consolidated.01.pth", meta / second)
    with pytest.raises((FileNotFoundError, WeightFileError), match=words):
        weights.convert_llama(meta, tmp_path / "out")


def test_what_is_odd_but_right_is_taken_and_noted(tmp_path, pair):
    """Bases rounded to bfloat16 or widened to float32, old rotary tables, unknown keys."""

    def merged(name: str, left: Path = pair[0], right: Path = pair[1], **options: object) -> str:
        target = weights.merge_delta(left, right, tmp_path / name, **options)
        if name != "b16":
            tiny.assert_same_bits(tiny.read_all(target), MERGED)
        return " ".join(weights.read_ready(target)["notes"])

    assert merged("plain") == ""
    rounded = {k: v.bfloat16().half() for k, v in BASE.items()}
    assert "rounded to bfloat16" in merged("b16", tiny.write_hf(tmp_path / "r", rounded))
    wide = {k: v.float() + 1e-9 for k, v in BASE.items()}  # cast first, then add
    assert "stored as float32" in merged("f32", tiny.write_hf(tmp_path / "w", wide))
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(8) for i in range(3)}
    extra["model.layers.0.extra"] = torch.zeros(2, 2)
    merged("extra", right=tiny.write_hf(tmp_path / "e", tiny.make_delta(BASE) | extra), allow_unknown=True)


def test_require_sees_what_is_absent_or_damaged(tmp_path, pair):
    with pytest.raises(FileNotFoundError, match="Run notebook 01_prepare_weights"):
        weights.require(tmp_path, "vicuna")
    target = weights.merge_delta(*pair, tmp_path / "vicuna", shard_bytes=50_000)
    assert weights.require(tmp_path, "vicuna") == target
    os.truncate(max(target.glob("*.safetensors")), 1000)
    with pytest.raises(WeightFileError, match=r"safetensors has 1000 bytes"):
        weights.require(tmp_path, "vicuna")


def test_tokenizer_gives_the_ids_of_sentencepiece_whatever_lay_beside_it(tmp_path):
    """With LLaMA's settings (byte fallback, single digits, unk 0, bos 1, eos 2) and an early delta's wrong tokens."""
    dims = DIMS | {"vocab": 500}
    meta = tiny.write_meta(tmp_path / "meta", tiny.meta_model(dims), dims)
    (meta / "tokenizer.json").unlink()
    sentencepiece.SentencePieceTrainer.train(
        input=str(Path(llama.__file__)), model_prefix=str(tmp_path / "tokenizer"), model_type="bpe", vocab_size=500,
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        pad_id=-1, minloglevel=2,
    )  # fmt: skip
    tokens = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "")
    files.write_json(tmp_path / "tokenizer_config.json", tokens | {"tokenizer_class": "LLaMATokenizer"})
    files.write_json(tmp_path / "special_tokens_map.json", tokens)
    target = weights.convert_llama(meta, tmp_path / "out")
    assert (target / "tokenizer.model").read_bytes() == (tmp_path / "tokenizer.model").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(target)
    talk.check_tokenizer(target, tokenizer)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(target / "tokenizer.model"))
    for text in ("def f(x):\n    return 1503", "café ✓"):
        assert tokenizer(text).input_ids == [1, *processor.encode(text)]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    config = files.read_json(target / "tokenizer_config.json")
    files.write_json(target / "tokenizer_config.json", config | {"add_bos_token": False})
    with pytest.raises(WeightFileError, match="SentencePiece gives"):
        talk.check_tokenizer(target, AutoTokenizer.from_pretrained(target))
