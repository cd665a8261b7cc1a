"""The splits that a spec names, as they are on the disk, with all that may be wrong with them.

Training wants shards that are right, or one error. Checking, describing and indexing want to see
what is there: missing shards, shards that no manifest lists, a damaged manifest.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wds_convnext.errors import ShardError
from wds_convnext.shards.dataset import Dataset, read_manifest
from wds_convnext.shards.expand import expand_shards, local_path
from wds_convnext.shards.naming import missing_siblings
from wds_convnext.shards.remote import linked, localize, serve
from wds_convnext.shards.spec import (
    Shard,
    is_manifest,
    manifest_path,
    manifests_in,
    staging_path,
)
from wds_convnext.shards.tar import Member, walk_tar
from wds_convnext.storage.layout import held, is_cached
from wds_convnext.urls import is_remote


@dataclass(frozen=True)
class ShardSplit:
    """The shards of one split that a spec names, and their manifest.

    `manifest` is None where there is none, or where it is damaged (`manifest_error` says how).
    """

    manifest_path: str
    manifest: Dataset | None
    manifest_error: ShardError | None
    paths: tuple[str, ...]

    @property
    def name(self) -> str:
        return Path(self.manifest_path).stem

    @property
    def listed(self) -> dict[str, Shard]:
        """The manifest's shards, by path."""
        shards = self.manifest.shards if self.manifest else ()
        return {os.path.normpath(shard.path): shard for shard in shards}

    @property
    def is_whole(self) -> bool:
        """Whether all of the manifest's shards are named."""
        return self.listed.keys() <= set(self.paths)

    @property
    def present(self) -> list[str]:
        """The named shards that are there."""
        return [path for path in self.paths if os.path.isfile(path) or is_cached(path)]

    @property
    def is_interrupted(self) -> bool:
        """Whether a conversion began to write the split and did not finish."""
        has_manifest = os.path.isfile(self.manifest_path)
        return os.path.isdir(staging_path(self.manifest_path)) and not has_manifest


def find_shard_splits(spec: str) -> list[ShardSplit]:
    """The splits that a spec names: of a folder, all; of a manifest, all that it lists.

    Raises:
        ShardError: if it names nothing.
    """
    spec = local_path(spec)
    if is_remote(spec) and not spec.endswith(".tar"):
        spec = localize(spec)
    paths: dict[str, list[str]] = {}
    if os.path.isdir(spec):
        plans = Path(spec).glob("*.partial/plan.json")
        paths = {str(plan.parent.with_suffix(".json")): [] for plan in plans}
        splits = manifests_in(os.path.normpath(spec)).items()
        paths |= {path: [*found, *missing_siblings(found)] for path, found in splits}
    elif spec.endswith(".json") and os.path.isfile(spec):
        paths = {spec: []}
    else:
        for path, manifest in expand_shards(spec, allow_missing=True).items():
            paths.setdefault(manifest or manifest_path(path), []).append(path)
    if not paths:
        expand_shards(spec)  # says what is near
    whole = os.path.isdir(spec) or spec.endswith(".json")
    return [_open_split(path, paths[path], whole=whole) for path in sorted(paths)]


def _open_split(manifest: str, paths: list[str], *, whole: bool) -> ShardSplit:
    content = error = None
    if is_manifest(manifest) or (os.path.isfile(manifest) and not paths):  # named, or damaged
        try:
            manifest = linked(manifest) or manifest
            content = read_manifest(manifest)
        except ShardError as problem:
            error = problem
    if content:
        serve(manifest, content.shards)
    named = set(map(os.path.normpath, paths))
    if whole and content:
        named |= {os.path.normpath(shard.path) for shard in content.shards}
    return ShardSplit(manifest, content, error, tuple(sorted(named)))


def hash_keys(samples: Iterable[list[Member]]) -> np.ndarray:
    """64 bits for the key of each sample, uint64."""
    digests = (
        hashlib.blake2b(os.fsencode(members[0].key), digest_size=8).digest() for members in samples
    )
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


def repeated_values(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The values that come more than once in arrays of uint64, each once, sorted."""
    every = np.concatenate([np.zeros(0, np.uint64), *parts])
    every.sort()
    return np.unique(every[1:][every[1:] == every[:-1]])


def find_duplicate_keys(
    paths: list[str], key_hashes: list[np.ndarray], *, limit: int = 20
) -> list[tuple[str, list[str]]]:
    """Keys that come more than once in a split, each with the shards that hold it.

    Args:
        key_hashes: of each shard's samples, in order. Equal ones are looked up in the shards.
        limit: of the keys looked up.
    """
    repeated = repeated_values(key_hashes)[:limit]
    holders: dict[str, list[str]] = {}
    for path, hashes in zip(paths, key_hashes):
        hits = np.flatnonzero(np.isin(hashes, repeated))
        if len(hits):
            with held(path):
                samples = list(walk_tar(path))
            for hit in hits:
                holders.setdefault(samples[hit][0].key, []).append(path)
    return [(key, where) for key, where in sorted(holders.items()) if len(where) > 1]
