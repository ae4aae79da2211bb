"""Files from the net that arrive whole, go on after a cut, and match their hash before they get their name.

huggingface_hub starts a large file over when the process dies (its issue 4196), so large files are fetched here in
ranges into ``<name>.part``. Tokens come from the environment or Colab's secrets and never reach an output or a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from helpers import files as storage
from helpers.weights import tensors as tensor_files

CHUNK_BYTES = 8 << 20
SMALL_FILE_BYTES = 50_000_000
MAX_ARCHIVE_FILES = 200_000
MAX_ARCHIVE_BYTES = 100_000_000_000
T = TypeVar("T")
_WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")


class DownloadError(OSError):
    """A download that did not give the right file; the message says why and what to do."""


def fetch(
    url: str,
    target: Path,
    *,
    checks: Mapping[str, str] | None = None,
    n_bytes: int | None = None,
    token: str | None = None,
    n_tries: int = 5,
    wait_seconds: float = 2.0,
    log: Callable[[str], None] = print,
) -> Path:
    """Fetch a file, going on where an earlier call, or a killed process, stopped.

    Args:
        url: ``http(s)`` address; the server should support ranges (without them the file starts over).
        target: the file to write; nothing has this name before the content is verified.
        checks: expected hashes, any of ``sha256``, ``md5`` and ``git_blob`` (SHA-1 of Git's blob).
        n_bytes: expected size, if known.
        token: sent as a bearer token to this host only, never to a host that it redirects to.
        n_tries: attempts in a row without progress before giving up.
        wait_seconds: pause before the second attempt; doubles with each further one.
        log: receives one sentence at a time.
    Returns:
        ``target``.
    Raises:
        DownloadError: the server refuses, the connection keeps failing, or the content is wrong. Wrong content is
            set aside as ``<name>.wrong``, fetched once more from zero, and only then given up.
    """
    target = Path(target)
    if target.exists():
        verify(target, checks=checks, n_bytes=n_bytes)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part, memo = target.with_name(target.name + ".part"), target.with_name(target.name + ".part.json")
    n_failures, is_second_try = 0, False
    while True:
        n_before = part.stat().st_size if part.exists() else 0
        try:
            _fetch_rest(url, part, memo, n_bytes=n_bytes, token=token, log=log)
            verify(part, checks=checks, n_bytes=n_bytes, name=target.name)
            os.replace(part, target)
            memo.unlink(missing_ok=True)
            return target
        except (DownloadError, tensor_files.WeightFileError) as error:
            # Damaged on the way, or joined from two versions: once more from zero, then it is the server's fault.
            if is_second_try:
                raise
            is_second_try = True
            log(f"{target.name}: {error}")
            continue
        except urllib.error.HTTPError as error:
            if error.code in (401, 403, 404, 410):
                raise DownloadError(_refusal(url, error.code, target)) from None
            problem = f"HTTP status {error.code}"
        except (OSError, EOFError) as error:
            if isinstance(error, OSError) and error.errno == 28:
                raise DownloadError(
                    28, f"the disk is full while fetching {target.name}. Free some space and call again: it goes on"
                ) from error
            problem = _scrub(str(error), token)
        n_failures = 1 if part.exists() and part.stat().st_size > n_before else n_failures + 1
        if n_failures >= n_tries:
            raise DownloadError(
                f"{_plain(url)} failed {n_tries} times in a row ({problem}). What has arrived is kept in {part}; call "
                f"again to go on, or put the file at {target} yourself."
            )
        log(f"{target.name}: {problem}; trying again")
        time.sleep(wait_seconds * 2 ** (n_failures - 1))


def fetch_hub_file(
    repo: str,
    name: str,
    target: Path,
    *,
    token: str | None = None,
    revision: str = "main",
    endpoint: str | None = None,
    log: Callable[[str], None] = print,
) -> Path:
    """Fetch one file of a Hugging Face repository; its size and SHA-256 come from the hub.

    Raises:
        DownloadError: gated without permission, absent, or unreachable; says what to click.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if Path(target).exists():
        return Path(target)
    url = hf_hub_url(repo, name, revision=revision, endpoint=endpoint)
    try:
        metadata = get_hf_file_metadata(url, token=token or False)
    except GatedRepoError:
        raise DownloadError(_gated(repo)) from None
    except RepositoryNotFoundError:
        raise DownloadError(f"{repo} does not exist on the hub or is private. Check its name; {_gated(repo)}") from None
    except (HfHubHTTPError, OSError) as error:
        raise DownloadError(
            f"{repo}/{name} cannot be asked for ({_scrub(str(error).splitlines()[0], token)}). Check the connection, "
            f"or put the file at {target} yourself."
        ) from None
    etag = (metadata.etag or "").strip('"')
    kind = {64: "sha256", 40: "git_blob"}.get(len(etag))  # large files carry SHA-256, small ones Git's blob hash
    return fetch(url, target, checks={kind: etag} if kind else None, n_bytes=metadata.size, token=token, log=log)


def fetch_hub_folder(
    repo: str, target: Path, *, token: str | None = None, revision: str = "main", log: Callable[[str], None] = print
) -> Path:
    """Fetch a model repository: safetensors if it has them, else ``.bin``, and the small text files.

    Raises:
        DownloadError: as :func:`fetch_hub_file`.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    try:
        names = HfApi(token=token or False).list_repo_files(repo, revision=revision)
    except GatedRepoError:
        raise DownloadError(_gated(repo)) from None
    except (HfHubHTTPError, OSError) as error:
        raise DownloadError(
            f"{repo} cannot be listed ({_scrub(str(error).splitlines()[0], token)}). Check name and connection, or "
            f"put its files into {target} yourself."
        ) from None
    for name in choose_hub_files(names):
        fetch_hub_file(repo, name, Path(target) / name, token=token, revision=revision, log=log)
    return Path(target)


def choose_hub_files(names: list[str]) -> list[str]:
    """The files of a model repository that are needed: one format of weights, and the small files beside them.

    >>> choose_hub_files(["model.safetensors", "pytorch_model.bin", "config.json", "a/b.json", "tf_model.h5"])
    ['model.safetensors', 'config.json']
    """
    top = [name for name in names if "/" not in name]
    safe = [name for name in top if name.endswith(".safetensors")]
    weights = safe or [name for name in top if name.endswith(".bin") and name.startswith("pytorch_model")]
    small = [name for name in top if name.endswith((".json", ".model", ".jinja", "merges.txt"))]
    index = "pytorch_model.bin.index.json" if safe else "model.safetensors.index.json"
    return weights + [name for name in small if name != index]


def fetch_drive(file_id: str, target: Path, *, checks: Mapping[str, str] | None = None) -> Path:
    """Fetch a Google Drive file with gdown, resuming; Drive's quota page is recognised.

    Raises:
        DownloadError: Drive refuses (often: too many downloads today); says where to put the file by hand.
    """
    import gdown

    target = Path(target)
    if target.exists():
        verify(target, checks=checks)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    by_hand = f"Open https://drive.google.com/file/d/{file_id}, download it and put it at {target}."
    try:
        got = gdown.download(id=file_id, output=str(part), quiet=False, resume=True)
    except Exception as error:  # gdown's own exceptions changed names between 5 and 6
        raise DownloadError(f"Google Drive refused {file_id} ({type(error).__name__}). {by_hand}") from error
    if got is None:
        raise DownloadError(f"Google Drive gave nothing for {file_id}. {by_hand}")
    verify(part, checks=checks, name=target.name)
    os.replace(part, target)
    return target


def verify(
    path: Path, *, checks: Mapping[str, str] | None = None, n_bytes: int | None = None, name: str | None = None
) -> str:
    """Compare a file with what is known of it, however it came here.

    Without a known hash, torch's zip files are checked record by record against their own checksums.

    Args:
        path: the file; a wrong one is renamed to ``<name>.wrong``, so that it is never used and can be looked at.
        checks: expected hashes: ``sha256``, ``md5``, ``git_blob``.
        n_bytes: expected size.
        name: name in messages and of the ``.wrong`` file; None takes the file's own.
    Returns:
        what was checked, in words.
    Raises:
        DownloadError: size or hash differ.
        WeightFileError: not a weight file at all, or damaged inside.
    """
    path, name = Path(path), name or Path(path).name
    found = path.stat().st_size
    try:
        if Path(name).suffix in _WEIGHT_SUFFIXES:
            tensor_files.sniff(path, suffix=Path(name).suffix)
        if n_bytes is not None and found != n_bytes:
            raise DownloadError(f"{name} has {found} bytes, expected {n_bytes}.")
        for kind, expected in (checks or {}).items():
            actual = file_hash(path, kind)
            if actual != expected.lower():
                raise DownloadError(f"{name} has {kind} {actual}, expected {expected}: damaged, or another version.")
        if not checks and zipfile.is_zipfile(path):
            tensor_files.check_crc(path)
    except (DownloadError, tensor_files.WeightFileError) as error:
        wrong = path.with_name(f"{name}.wrong")
        os.replace(path, wrong)
        path.with_name(f"{name}.part.json").unlink(missing_ok=True)
        text = str(error).split(" Delete it (rm")[0]
        raise type(error)(
            f"{text} It was set aside as {wrong}. Run this cell again: only this file is fetched anew."
        ) from None
    if checks:
        return ", ".join(checks)
    return "zip checksums" if zipfile.is_zipfile(path) else "size" if n_bytes is not None else "kind of file"


def file_hash(path: Path, kind: str) -> str:
    """Hash of a file: ``sha256``, ``md5`` or ``git_blob`` (SHA-1 with Git's header), lower-case hexadecimal."""
    if kind not in ("sha256", "md5", "git_blob"):
        raise ValueError(f"hash {kind!r} is unknown; allowed are sha256, md5 and git_blob.")
    with open(path, "rb") as file:
        if kind != "git_blob":
            return hashlib.file_digest(file, kind).hexdigest()
        digest = hashlib.sha1(f"blob {Path(path).stat().st_size}\0".encode())
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
        return digest.hexdigest()


def find_token(name: str = "HF_TOKEN") -> str | None:
    """The token from the environment, else from Colab's secrets, else None; it is never shown.

    Put into the environment when found in Colab, so that libraries see it too.
    """
    token = os.environ.get(name, "").strip()
    if not token and "google.colab" in sys.modules:
        from google.colab import userdata

        try:
            token = (userdata.get(name) or "").strip()
        except Exception as error:  # SecretNotFoundError, NotebookAccessError, TimeoutException: no common base
            print(f"Colab's secret {name} is not available ({type(error).__name__}); going on without it.")
    if token:
        os.environ[name] = token
    return token or None


def unpack(
    archive: Path, target: Path, *, max_files: int = MAX_ARCHIVE_FILES, max_bytes: int = MAX_ARCHIVE_BYTES
) -> Path:
    """Unpack a zip or tar file whose every member stays inside ``target``.

    Raises:
        DownloadError: damaged, a member with an absolute path, ``..`` or a link, or more than the limits. Nothing is
            unpacked then.
    """
    archive, target = Path(archive), Path(target)
    try:
        # A tar first: one whose last file is a zip (a torch checkpoint) looks like a zip from its end.
        if not tarfile.is_tarfile(archive) and zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                members = [(i.filename, i.file_size, (i.external_attr >> 28) == 0xA) for i in file.infolist()]
                _check_members(archive, target, members, max_files, max_bytes)
                if (bad := file.testzip()) is not None:
                    raise DownloadError(f"{archive} is damaged: {bad} does not match its checksum. Fetch it again.")
                file.extractall(target)
        else:
            with tarfile.open(archive) as file:
                entries = file.getmembers()
                members = [(e.name, e.size, not (e.isfile() or e.isdir())) for e in entries]
                _check_members(archive, target, members, max_files, max_bytes)
                file.extractall(target, members=entries, filter="data")
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise DownloadError(f"{archive} is not a whole zip or tar file ({error}). Fetch it again.") from error
    return target


def copy_verified(
    source: Path,
    target: Path,
    *,
    sha256: str | None = None,
    n_tries: int = 4,
    wait_seconds: float = 2.0,
    reconnect: Callable[[], None] | None = None,
) -> Path:
    """Copy a file from or to a disk that may fail (Google Drive): read back and compared before it gets its name.

    Args:
        source, target: files; the folder above that of ``target`` must exist, so that a lost mount is an error and
            not a new local folder.
        sha256: what the copy must have, when it is known; None takes the source's own hash.
        n_tries, wait_seconds, reconnect: see :func:`patiently`.
    Raises:
        DownloadError: the copy keeps differing or failing; the source is untouched, and ``target`` as it was before.
    """
    source, target = Path(source), Path(target)
    part = target.with_name(target.name + ".part")

    def copy() -> Path:
        expected = sha256 or storage.sha256_file(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, part)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        if storage.sha256_file(part) != expected:
            raise OSError(f"the copy has {part.stat().st_size} of {source.stat().st_size} bytes or other content")
        os.replace(part, target)
        return target

    try:
        return patiently(copy, n_tries=n_tries, wait_seconds=wait_seconds, reconnect=reconnect)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise DownloadError(
            f"{source} could not be copied to {target} in {n_tries} attempts ({error}). The source is kept as it is. "
            f"Free space on Drive (15 GB without a plan), or mount it again, then repeat."
        ) from error


def patiently(
    action: Callable[[], T],
    *,
    n_tries: int = 4,
    wait_seconds: float = 2.0,
    reconnect: Callable[[], None] | None = None,
) -> T:
    """Do something on a disk that may fail, again after a pause when it does.

    Args:
        action: without arguments; repeating it must do no harm.
        n_tries: attempts in all.
        wait_seconds: pause before the second attempt; doubles with each further one.
        reconnect: called before each further attempt, to mount the disk again.
    Raises:
        OSError: of the last attempt.
    """
    for attempt in range(n_tries - 1):
        try:
            return action()
        except OSError:
            time.sleep(wait_seconds * 2**attempt)
            if reconnect is not None:
                reconnect()
    return action()


class _SameHostToken(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but shows the token only to the host that it was meant for."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None and urllib.parse.urlsplit(newurl).netloc != urllib.parse.urlsplit(req.full_url).netloc:
            new.remove_header("Authorization")
        return new


def _fetch_rest(
    url: str, part: Path, memo: Path, *, n_bytes: int | None, token: str | None, log: Callable[[str], None]
) -> None:
    """One connection: append what the server sends to ``part``."""
    from tqdm.auto import tqdm

    n_have = part.stat().st_size if part.exists() else 0
    known = json.loads(memo.read_text()) if memo.exists() else {}
    address = hashlib.sha256(url.encode()).hexdigest()  # an address may carry a signature: only its hash is kept
    if n_have and known.get("url_sha256") != address:
        n_have = 0  # what is there belongs to another address
    headers = {"User-Agent": "art-anomaly-notebooks"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    if n_have:
        headers["Range"] = f"bytes={n_have}-"
        if known.get("etag"):
            headers["If-Range"] = known["etag"]
    opener = urllib.request.build_opener(_SameHostToken)
    try:
        response = opener.open(urllib.request.Request(url, headers=headers), timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416 and n_have and n_have == _total(error.headers):
            return  # everything had arrived; only the hash was still to be checked
        if error.code == 416:
            part.unlink(missing_ok=True)
        raise
    with response:
        if response.status != 206:
            n_have = 0  # no ranges here, or the file has changed since
        total = _total(response.headers) or (n_have + int(response.headers.get("Content-Length") or 0)) or None
        if n_bytes is not None and total is not None and total != n_bytes:
            raise DownloadError(f"the server offers {total} bytes, expected {n_bytes}: another version of the file")
        etag = response.headers.get("ETag")
        storage.write_json(memo, {"url_sha256": address, "etag": etag if etag and not etag.startswith("W/") else None})
        if n_have:
            log(f"{part.name.removesuffix('.part')}: going on at {n_have / 1e6:.0f} MB")
        with (
            open(part, "r+b" if n_have else "wb") as file,
            tqdm(
                total=total, initial=n_have, unit="B", unit_scale=True, desc=part.stem, disable=(total or 0) < 1e7
            ) as bar,
        ):
            file.seek(n_have)
            for chunk in _chunks(response):
                file.write(chunk)
                bar.update(len(chunk))
                n_have += len(chunk)
        if total is not None and n_have < total:
            raise EOFError(f"the connection ended at {n_have} of {total} bytes")


def _chunks(response: Any) -> Iterator[bytes]:
    while chunk := response.read1(CHUNK_BYTES):
        yield chunk


def _total(headers: Any) -> int | None:
    """Size of the whole file from a range answer's ``Content-Range: bytes 5-9/10``."""
    text = (headers.get("Content-Range") or "").rpartition("/")[2]
    return int(text) if text.isdigit() else None


def _check_members(
    archive: Path, target: Path, members: list[tuple[str, int, bool]], max_files: int, max_bytes: int
) -> None:
    total = sum(size for _, size, _ in members)
    if len(members) > max_files or total > max_bytes:
        raise DownloadError(
            f"{archive} would unpack to {len(members)} files, {total / 1e9:.1f} GB; allowed are {max_files} files, "
            f"{max_bytes / 1e9:.1f} GB. If that is right, raise max_files and max_bytes."
        )
    root = target.resolve()
    for name, _, is_special in members:
        inside = (root / name).resolve().is_relative_to(root) and not name.startswith(("/", "\\"))
        if is_special or not inside or ".." in Path(name).parts or ":" in name.split("/")[0]:
            raise DownloadError(
                f"{archive} holds {name!r}, which is a link or leads outside the folder. Do not use it."
            )


def _refusal(url: str, code: int, target: Path) -> str:
    place = f"Or get the file elsewhere and put it at {target}."
    if code in (401, 403):
        return f"{_plain(url)} needs permission (HTTP {code}). Accept its licence and set HF_TOKEN. {place}"
    return f"{_plain(url)} does not exist (HTTP {code}). {place}"


def _gated(repo: str) -> str:
    return (
        f"{repo} needs your consent: open https://huggingface.co/{repo}, accept the licence, make a read token at "
        f"https://huggingface.co/settings/tokens and store it as HF_TOKEN (Colab: key symbol on the left, switch on "
        f"notebook access; elsewhere: environment variable). Then run this cell again."
    )


def _plain(url: str) -> str:
    """Address without its query, which may carry a signature."""
    return urllib.parse.urlunsplit(urllib.parse.urlsplit(url)._replace(query="", fragment=""))


def _scrub(text: str, token: str | None) -> str:
    return text.replace(token, "***") if token else text
