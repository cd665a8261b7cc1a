"""Remote shards as local paths: their manifest and index are fetched, and they when they are read.

A remote folder stands for its shards under a local one (`storage.cache`). Paths in it name what may
not be there yet; whoever opens one waits for it.
"""

import os
import re
from fnmatch import fnmatchcase
from shlex import quote

from wds_convnext import urls
from wds_convnext.errors import ShardError, did_you_mean, listing
from wds_convnext.shards.index import RECORD, open_index
from wds_convnext.shards.naming import split_of
from wds_convnext.shards.spec import (
    Shard,
    index_path,
    is_manifest,
    load_manifest,
    remote_folder_of,
)
from wds_convnext.storage.cache import current_cache
from wds_convnext.storage.layout import Object, is_cached, where

_MAX_FOOTER = 1 << 28  # bytes of an index besides its records
_PATTERN = re.compile(r"[*?\[<{]")


def _advice(url: str) -> str:
    """What to do where manifest or index are not next to what a URL names."""
    if not url.endswith(".tar") and urls.scheme_of(url) in ("http", "https"):
        url = urls.join(url, "train-<000..012>.tar")  # no listings there
    return (
        "Remote shards need both. Write them into a local folder, and name that: "
        f"wds-convnext index {quote(url)} --out FOLDER."
    )


def linked(manifest: str) -> str | None:
    """The manifest, as in a cache, of a local one whose shards are at URLs; None for all others.

    Raises:
        ShardError: if its index is missing.
    """
    url = remote_folder_of(manifest) if is_manifest(manifest) else None
    if url is None or is_cached(manifest):
        return None
    if not os.path.isfile(index_path(manifest)):
        raise ShardError(
            f"{index_path(manifest)}: missing, and the shards are at {url}. Delete {manifest} and "
            "run wds-convnext index again."
        )
    manifest = os.path.abspath(manifest)
    return os.path.join(current_cache().link(manifest, url), os.path.basename(manifest))


def localize(url: str) -> str:
    """The local folder, or manifest, that a URL names; of shards, the manifest that lists them.

    Raises:
        ShardError: if it is not there or cannot be read.
    """
    if not url.endswith((".json", ".tar")):
        if _PATTERN.search(url):
            raise ShardError(f"{url}: expected shards, a manifest or a folder. End it with .tar.")
        folder = current_cache().folder(url.rstrip("/"))
        if not any(name.endswith(".json") for name in os.listdir(folder)):
            raise ShardError(f"{url}: no manifest with an index is there. {_advice(url)}")
        return folder
    folder_url, name = urls.parent(url), urls.name_in(url)
    if _PATTERN.search(folder_url):
        raise ShardError(f"{url}: a pattern in a remote folder's name. Name one folder.")
    if name.endswith(".json"):
        stem = name.removesuffix(".json")
    else:
        stem = split_of(_PATTERN.split(name)[0].removesuffix(".tar").rstrip("-_.") + ".tar")
    folder = current_cache().folder(folder_url, stem=stem)
    manifest = os.path.join(folder, f"{stem}.json")
    if not is_manifest(manifest):
        raise ShardError(
            f"{urls.join(folder_url, stem)}.json: no manifest with an index is there. "
            f"{_advice(url if url.endswith('.tar') else folder_url)}"
        )
    return manifest


def listed_shards(url: str, names: list[str] | None, manifest: str) -> list[str]:
    """The local paths of shards that a URL names.

    Args:
        names: those that its braces stand for; None for a glob.
        manifest: that `localize` gave.
    Raises:
        ShardError: if the manifest does not list them.
    """
    listed = {shard.name: shard.path for shard in load_manifest(manifest)[1]}
    if names is None:
        found = [path for name, path in listed.items() if fnmatchcase(name, urls.name_in(url))]
        missing = [] if found else [url]
    else:
        wanted = [urls.name_in(name) for name in names]
        found = [listed[name] for name in wanted if name in listed]
        missing = [name for name in wanted if name not in listed]
    if missing:
        raise ShardError(
            f"{url}: {where(manifest)} does not list {listing(missing, limit=5)}."
            f"{did_you_mean(urls.name_in(missing[0]), listed)} Name those that it lists."
        )
    return found


def serve(manifest: str, shards: tuple[Shard, ...]) -> None:
    """Fetch the index of a remote manifest, and let its shards be waited for; of a local one, none.

    Args:
        manifest: its local path.
        shards: all that it lists.
    Raises:
        ShardError: if there is no index that was made from them, or no checksums of them.
    """
    if not shards or not shards[0].is_remote:
        return
    without = [shard for shard in shards if shard.sha256 is None or shard.num_bytes is None]
    if without:
        raise ShardError(
            f"{where(manifest)}: states no size or SHA-256 of {without[0].name}, so what arrives "
            f"could not be checked. {_advice(urls.parent(without[0].where))}"
        )
    odd = [shard.name for shard in shards if not shard.name.endswith(".tar")]
    if odd:  # it would take the place of another file in the cache's folder
        raise ShardError(f"{where(manifest)}: lists {odd[0]}, expected names that end in .tar.")
    index = index_path(manifest)
    num_samples = sum(shard.num_samples for shard in shards)
    limit = num_samples * RECORD.itemsize + _MAX_FOOTER
    current_cache().bring(where(index), index, max_bytes=limit)
    file = open_index(index)
    if file is None or not all(file.find(shard) for shard in shards):
        raise ShardError(
            f"{where(index)}: not the index of the shards in its manifest. "
            f"{_advice(urls.parent(shards[0].where))}"
        )
    current_cache().add(
        [
            Object(where(shard.path), shard.path, shard.num_bytes or 0, shard.sha256)
            for shard in shards
        ]
    )
