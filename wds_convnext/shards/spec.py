"""What is known of a shard, its manifest, and the files that belong to a split."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from wds_convnext.door import MAX_COUNT, base_name, count, read_json, text
from wds_convnext.errors import ShardError, UsageError
from wds_convnext.shards.naming import find_files, split_of
from wds_convnext.storage.layout import is_cached, origin_of, where
from wds_convnext.urls import check_url, is_remote, name_in, parent

MANIFEST_FORMAT = "wds_convnext 1"


def _check_pair(value: object) -> str:
    return "" if isinstance(value, list) and len(value) == 2 else "columns of image and label"


def _check_place(value: object) -> str:
    """A shard is named, next to its manifest, or by its URL."""
    if not isinstance(value, str) or not is_remote(value):
        return base_name(value)
    try:
        return base_name(name_in(check_url(value))) if is_remote(parent(value)) else "a whole URL"
    except UsageError as error:
        return str(error)


_SHARD = {"url": _check_place, "nsamples": count, "filesize?": count, "sha256?": text}
_MANIFEST = {
    "format?": lambda value: "" if value == MANIFEST_FORMAT else repr(MANIFEST_FORMAT),
    "shardlist": [_SHARD],
    "class_names": [text],
    "name?": text,
    "split?": text,
    "source?": [text],
    "options?": {"label_field?": text, "columns?": _check_pair},
}


@dataclass(frozen=True)
class Shard:
    """One tar file of samples. `num_bytes` and `sha256` are None where no manifest states them."""

    path: str
    num_samples: int
    num_bytes: int | None = None
    sha256: str | None = None

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    @cached_property  # readers ask for each sample: it took a tenth of a thumbnail's time
    def where(self) -> str:
        """The path or, of a remote shard, the URL."""
        return where(self.path)

    @cached_property
    def is_remote(self) -> bool:
        """Whether the path is one in a cache, where the shard stands only at times."""
        return is_cached(self.path)


def total_bytes(shards: Iterable[Shard]) -> int:
    """Bytes of shards, of which those count that are known."""
    return sum(shard.num_bytes or 0 for shard in shards)


def remote_folder_of(path: str | os.PathLike) -> str | None:
    """The URL of the folder that holds a manifest's shards; None for those next to it.

    Raises:
        ShardError: as `load_manifest`.
    """
    return _read(path)[1]


def load_manifest(path: str | os.PathLike) -> tuple[dict, tuple[Shard, ...]]:
    """The content of a manifest, and its shards, their paths joined to its folder.

    Raises:
        ShardError: if it is missing, not a manifest, or written by a newer version, or if it names
            shards elsewhere (see `remote.linked`).
    """
    content, remote = _read(path)
    folder = os.path.dirname(path)
    if remote and remote != origin_of(folder):
        raise ShardError(
            f"{where(str(path))}: its shards are in {remote}, not next to it. Copy manifest and "
            "index into a local folder, and train, eval, inspect, verify or bench with that."
        )
    shards = tuple(
        Shard(
            os.path.join(folder, name_in(entry["url"])),
            entry["nsamples"],
            entry.get("filesize"),
            entry.get("sha256"),
        )
        for entry in content["shardlist"]
    )
    return content, shards


def _read(path: str | os.PathLike) -> tuple[dict, str | None]:
    """The content of a manifest, and the remote folder of its shards, if any."""
    try:
        content = read_json(path, _MANIFEST)
        if sum(entry["nsamples"] for entry in content["shardlist"]) > MAX_COUNT:
            raise ValueError("more samples than there can be")
        urls = [entry["url"] for entry in content["shardlist"]]
        folders = {parent(url) if is_remote(url) else None for url in urls}
        if len(folders) > 1:
            raise ValueError("shards in more than one folder")
    except FileNotFoundError:
        raise ShardError(
            f"{path}: no such manifest. Write shards with wds-convnext shards."
        ) from None
    except (ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ShardError(f"{path}: not a manifest of shards ({reason}). Write it again.") from None
    return content, next(iter(folders), None)


def manifest_path(shard_path: str | os.PathLike) -> str:
    """Where the manifest of a shard stands: `data/train-000.tar` -> `data/train.json`."""
    folder, name = os.path.split(shard_path)
    return os.path.join(folder, split_of(name) + ".json")


def index_path(manifest_path: str | os.PathLike) -> str:
    """Where the index of a manifest's samples stands: `data/train.json` -> `data/train.index`."""
    return str(manifest_path).removesuffix(".json") + ".index"


def sources_path(manifest_path: str | os.PathLike) -> str:
    """Where the digests of images that were shrunk stand: `data/train.sources`."""
    return str(manifest_path).removesuffix(".json") + ".sources"


def staging_path(manifest_path: str | os.PathLike) -> str:
    """Where the shards of a manifest stand until all are complete: `data/train.partial`."""
    return str(manifest_path).removesuffix(".json") + ".partial"


def is_manifest(path: str | os.PathLike, *, in_place: bool = True) -> bool:
    """Whether a file is a manifest of ours, whole or damaged.

    JSON of another kind (of wids, COCO, img2dataset) may stand next to shards, even where our
    manifest would; it says nothing about them.

    Args:
        in_place: the manifest of shards would stand here, so what is no JSON at all is a damaged
            one.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except FileNotFoundError:
        return False
    except OSError:
        return in_place  # reading it says why
    if b'"wds_convnext' in head or (b'"wids_version"' in head and b'"class_names"' in head):
        return True
    return in_place and head.lstrip()[:1] not in (b"{", b"[")


def manifests_in(folder: str | os.PathLike) -> dict[str, list[str]]:
    """The shards that are in a folder, by the path of their split's manifest, there or not."""
    found = find_files(os.path.join(folder, "*.json"))
    splits: dict[str, list[str]] = {path: [] for path in found if is_manifest(path, in_place=False)}
    for path in find_files(os.path.join(folder, "*.tar")):
        splits.setdefault(manifest_path(path), []).append(path)
    return dict(sorted(splits.items()))


def check_size(shard: Shard) -> None:
    """Compare a shard's size with its manifest's. A remote one's is, when it is fetched.

    Raises:
        ShardError: if the shard is missing or has another size.
    """
    if shard.is_remote and not os.path.exists(shard.path):
        return
    try:
        num_bytes = os.path.getsize(shard.path)
    except OSError as error:
        raise ShardError(
            f"{shard.path}: {error.strerror}. Copy the shard again, or write it again."
        ) from None
    refuse_size(shard, num_bytes)


def refuse_size(shard: Shard, num_bytes: int) -> None:
    """Raise ShardError if a shard that is `num_bytes` long is said to have another size."""
    if shard.num_bytes not in (None, num_bytes):
        raise ShardError(
            f"{shard.path}: {num_bytes:,} bytes, but its manifest says {shard.num_bytes:,}. "
            "The shard is cut short or another file: copy it again, or write it again."
        )


def check_sha256(shard: Shard) -> None:
    """Compare a shard's bytes with its manifest's checksum, if it has one.

    Raises:
        ShardError: if they differ.
    """
    if shard.sha256 is None:
        return
    with open(shard.path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != shard.sha256:
        raise ShardError(
            f"{shard.path}: its SHA-256 is {found[:16]}…, but its manifest says "
            f"{shard.sha256[:16]}…. Copy the shard again, or write it again."
        )
