"""What `index` is to read: splits on the disk, or shards at URLs that no manifest describes."""

import os

from wds_convnext.check.splits import ShardSplit, find_shard_splits
from wds_convnext.engine import shared_path
from wds_convnext.errors import ShardError, UsageError, listing
from wds_convnext.files import unwritable
from wds_convnext.shards.dataset import Dataset
from wds_convnext.shards.expand import expand_braces, split_spec
from wds_convnext.shards.naming import missing_siblings, split_of
from wds_convnext.storage.cache import current_cache
from wds_convnext.storage.layout import is_cached, where
from wds_convnext.urls import (
    check_url,
    is_remote,
    join,
    name_in,
    names_remote,
    parent,
    redacted,
    refuse_remote,
)


def find_splits(spec: str, out: str | None, *, is_shared: bool) -> list[ShardSplit]:
    """The splits to index.

    Args:
        out: the folder for manifests and indexes of remote shards; None for local ones.
        is_shared: machines of an engine see the paths.
    Raises:
        ShardError: if the spec names nothing.
        UsageError: if `out` does not fit, or holds such a manifest already.
    """
    if not names_remote(spec):
        if out is not None:
            raise UsageError(f"--out {out}: {spec} is local; its index is written next to it.")
        splits = find_shard_splits(shared_path(spec, is_shared=is_shared))
        if there := next((s.manifest_path for s in splits if is_cached(s.manifest_path)), None):
            raise UsageError(
                f"{where(there)}: the index of shards at URLs. To make it again, delete it and its "
                ".index, and index the URLs."
            )
        return splits
    if is_shared:
        refuse_remote(spec, what="an engine's machines have no cache of remote shards")
    if out is None:
        raise UsageError(
            f"{redacted(spec)}: nothing is written to a store. Say where: --out FOLDER."
        )
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {unwritable(error.filename or out, error)}") from None
    if not os.access(out, os.W_OK | os.X_OK):  # before anything is fetched
        raise UsageError(f"--out {out}: cannot be written. Choose another folder.")
    return _place(spec, out)


def _place(spec: str, out: str) -> list[ShardSplit]:
    """The splits of shards at URLs, their manifests to be written into a local folder.

    Args:
        spec: URLs of shards, with ranges or globs, or of folders.
    Raises:
        ShardError: if one is not there, or a folder cannot be listed.
        UsageError: if a manifest is there already, or one would be of shards in two folders.
    """
    wanted: dict[str, list[str]] = {}  # names and globs, by folder
    for part in split_spec(spec):
        if not is_remote(part) or part.endswith(".json"):
            raise UsageError(
                f"{part}: not shards at a URL, or a folder of them. Index one or the other."
            )
        urls = expand_braces(part) if part.endswith(".tar") else [join(part, "*.tar")]
        for url in urls:
            wanted.setdefault(parent(url), []).append(name_in(url))
    splits: dict[str, list[str]] = {}
    for folder, names in wanted.items():
        globs = [name for name in names if set("*?[") & set(name)]
        placed = current_cache().place(folder, [n for n in names if n not in globs], globs)
        for shard in placed:
            check_url(shard.url)  # of what a listing gave: a manifest with it could not be read
        found = [name_in(shard.url) for shard in placed]
        if globs and (missing := list(missing_siblings(found))):
            raise ShardError(
                f"{folder}: {listing(missing, limit=3)} of the same series are not there. Upload "
                "them, or name those that are there."
            )
        for shard in placed:
            manifest = os.path.join(out, f"{split_of(shard.path)}.json")
            splits.setdefault(manifest, []).append(shard.path)
    for manifest, paths in splits.items():
        if len({os.path.dirname(path) for path in paths}) > 1:
            raise UsageError(
                f"{manifest}: would list shards of several folders. Index one after the other, "
                "each with an --out of its own."
            )
        if os.path.lexists(manifest):
            raise UsageError(f"{manifest}: is there already. Delete it, or give another --out.")
    return [ShardSplit(path, None, None, tuple(sorted(s))) for path, s in sorted(splits.items())]


def keep_fetched(manifests: dict[str, Dataset]) -> None:
    """Let the shards that were indexed, and are still in the cache, serve a training."""
    for path, dataset in manifests.items():
        url = parent(dataset.shards[0].where)
        paths = [shard.path for shard in dataset.shards]
        current_cache().keep(paths, os.path.abspath(path), url)
