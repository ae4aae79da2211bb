"""Files from the net that arrive whole, go on after a cut, and match their hash before they get their name.

Public files go through gdown, which goes on where a killed process stopped (huggingface_hub starts a large file over),
gated repositories through huggingface_hub, which has the user's token. Nothing here prints or stores a token.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gdown
from huggingface_hub import HfApi, get_token, hf_hub_download, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError

from helpers import files
from helpers.weights.tensors import WeightFileError, check_records, file_hash, read_index

N_TRIES, WAIT_SECONDS = 4, 3.0
WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
_GDOWN_ERROR = getattr(gdown.exceptions, "DownloadError", gdown.exceptions.FileURLRetrievalError)  # the latter in 5
_FAILURES = (OSError, HTTPError, _GDOWN_ERROR)  # disk and requests; the hub's client; gdown's own


class DownloadError(OSError):
    """A download that did not give the right file; the message says why and what to do."""


def fetch(
    url: str, target: Path, *, sha256: str | None = None, n_bytes: int | None = None, get: Callable | None = None
) -> Path:
    """Fetch a file, going on where an earlier call, or a killed process, stopped.

    Args:
        url, target: from where to where; nothing has this name before the content is checked.
        sha256, n_bytes: what is known of it. Without a hash, a torch file is compared with its own checksums.
        get: writes the file to a path, in place of gdown.
    Raises:
        DownloadError: the server refuses, the connection keeps failing, or the content stays wrong.
    """
    if target.exists():
        return target
    room = target.parent / f".{target.name}.part"  # gdown finds its unfinished file by the folder
    arrived, problem = room / target.name, ""
    get = get or partial(gdown.download, url, quiet=False, use_cookies=False, resume=True)
    for attempt in range(N_TRIES):
        room.mkdir(parents=True, exist_ok=True)
        begun = [path for path in room.iterdir() if path.is_file()]
        try:
            if begun and begun[0].stat().st_size == n_bytes:
                os.replace(begun[0], arrived)  # all had come when the process died
            if not arrived.exists():
                get(str(arrived))
            _check(arrived, sha256, n_bytes)
            os.replace(arrived, target)
            shutil.rmtree(room)
            return target
        except WeightFileError as error:  # damaged on the way, or joined of two versions: from the beginning
            problem = str(error).partition(" Delete it (rm")[0]
            shutil.rmtree(room)
        except DownloadError:
            raise
        except _FAILURES as error:
            problem = str(error).partition("\n")[0][:200] or type(error).__name__
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status in (401, 403, 404, 410) or getattr(error, "errno", 0) == errno.ENOSPC:
                break
        print(f"{target.name}: {problem}; {'trying again' if attempt < N_TRIES - 1 else 'giving up'}")
        time.sleep(WAIT_SECONDS * attempt)
    raise DownloadError(
        f"{url} could not be fetched ({problem}). What came is kept in {room}; run this cell again to go on, or put "
        f"the file at {target} yourself."
    )


def _check(path: Path, sha256: str | None, n_bytes: int | None) -> None:
    """Size, kind, and hash (or a torch file's own checksums) of a file that has arrived; each byte is read once."""
    if n_bytes is not None and path.stat().st_size != n_bytes:
        raise WeightFileError(f"{path.name} has {path.stat().st_size} bytes, expected {n_bytes}.")
    if path.suffix in WEIGHT_SUFFIXES:
        read_index(path)
    if sha256 is None:
        check_records(path)
    elif (found := file_hash(path)) != sha256:
        raise WeightFileError(f"{path.name} has SHA-256 {found}, expected {sha256}: damaged, or another version.")


def fetch_hub(
    repository: str, target: Path, *, name: str = "", list_path: Path | None = None, endpoint: str | None = None
) -> Path:
    """Fetch one file of a model repository, or all that is needed of it: one format of weights, and the texts.

    Args:
        repository, name: ``owner/name``, and one file of it; empty for the folder.
        target: the file, or the folder.
        list_path: where the hub's list of files is kept, so that a folder cut between two is known to be unfinished.
        endpoint: another hub.
    Raises:
        DownloadError: gated without permission, absent, or unreachable; says what to click.
    """
    try:
        info = HfApi(endpoint=endpoint, token=get_token() or False).model_info(repository, files_metadata=True)
    except RepositoryNotFoundError:
        raise DownloadError(f"{repository} is not on the hub, or private. {_consent(repository)}") from None
    except _FAILURES as error:
        place = f"Check the connection and run this cell again, or put the files into {target} yourself."
        raise DownloadError(f"the hub cannot be asked about {repository} ({error}). {place}") from None
    offered = {item.rfilename: (item.size, item.lfs.sha256 if item.lfs else None) for item in info.siblings}
    wanted = [name] if name else choose_files(list(offered))
    if absent := [file for file in wanted if file not in offered]:
        raise DownloadError(f"{repository} holds no {absent[0]} any more, but {', '.join(sorted(offered)[:8])}.")
    if list_path is not None:
        files.write_json(list_path, {file: {"bytes": offered[file][0]} for file in wanted})
    for file in wanted:
        path, (n_bytes, sha256) = target if name else target / file, offered[file]
        if path.exists() and path.stat().st_size != n_bytes:
            sizes = f"{path} has {path.stat().st_size} bytes, the published file {n_bytes}"
            way = "It was left as it is: delete it and run this cell again, or use your own files by LLAMA_FOLDER."
            raise WeightFileError(f"{sizes}. {way}")
        get = partial(_get_as_member, repository, file, endpoint) if info.gated or info.private else None
        fetch(hf_hub_url(repository, file, endpoint=endpoint), path, sha256=sha256, n_bytes=n_bytes, get=get)
    return target


def _get_as_member(repository: str, file: str, endpoint: str | None, arrived: str) -> None:
    """Fetch with the user's token, through huggingface_hub; begins anew after a kill."""
    try:
        os.replace(hf_hub_download(repository, file, local_dir=Path(arrived).parent, endpoint=endpoint), arrived)
    except GatedRepoError:
        raise DownloadError(f"{repository} needs your consent. {_consent(repository)}") from None


def choose_files(names: list[str]) -> list[str]:
    """The files of a model repository that are needed: the small texts, then one format of weights.

    >>> choose_files(["model.safetensors", "pytorch_model.bin", "config.json", "a/b.json", "tf_model.h5"])
    ['config.json', 'model.safetensors']
    """
    top = [name for name in names if "/" not in name]
    safe = [name for name in top if name.endswith(".safetensors")]
    weights = safe or [name for name in top if name.startswith("pytorch_model") and name.endswith(".bin")]
    other = "pytorch_model.bin.index.json" if safe else "model.safetensors.index.json"
    texts = [name for name in top if name.endswith((".json", ".model", ".jinja", "merges.txt")) and name != other]
    return texts + weights


def _consent(repository: str) -> str:
    return (
        f"Accept its licence at https://huggingface.co/{repository}, make a read token at "
        f"https://huggingface.co/settings/tokens, store it as HF_TOKEN (README: secrets), and run this cell again."
    )
