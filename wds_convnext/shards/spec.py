"""Which shards a spec on the command line names, and what is known of each."""

import hashlib
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import braceexpand

from wds_convnext.door import MAX_COUNT, base_name, count, read_json, text
from wds_convnext.errors import ShardError, did_you_mean, listing
from wds_convnext.shards.naming import split_of

MANIFEST_FORMAT = "wds_convnext 1"
_SHARD = {"url": base_name, "nsamples": count, "filesize?": count, "sha256?": text}
_MANIFEST = {
    "format?": lambda value: "" if value == MANIFEST_FORMAT else repr(MANIFEST_FORMAT),
    "shardlist": [_SHARD],
    "class_names": [text],
    "name?": text,
    "split?": text,
    "source?": [text],
    "options?": {"label_field?": text, "columns?": [text]},
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


def load_manifest(path: str | os.PathLike) -> tuple[dict, tuple[Shard, ...]]:
    """The content of a manifest, and its shards, their paths joined to its folder.

    Raises:
        ShardError: if it is missing, not a manifest, or written by a newer version.
    """
    try:
        content = read_json(path, _MANIFEST)
        if sum(entry["nsamples"] for entry in content["shardlist"]) > MAX_COUNT:
            raise ValueError("more samples than there can be")
    except FileNotFoundError:
        raise ShardError(f"{path}: no such manifest. Run make shards.") from None
    except (ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ShardError(
            f"{path}: not a manifest of shards ({reason}). Write it again with make shards."
        ) from None
    folder = os.path.dirname(path)
    shards = tuple(
        Shard(
            os.path.join(folder, entry["url"]),
            entry["nsamples"],
            entry.get("filesize"),
            entry.get("sha256"),
        )
        for entry in content["shardlist"]
    )
    return content, shards


def manifest_path(shard_path: str | os.PathLike) -> str:
    """Where the manifest of a shard stands: `data/train-000.tar` -> `data/train.json`."""
    folder, name = os.path.split(shard_path)
    return os.path.join(folder, split_of(name) + ".json")


def index_path(manifest_path: str | os.PathLike) -> str:
    """Where the index of a manifest's samples stands: `data/train.json` -> `data/train.index`."""
    return str(manifest_path).removesuffix(".json") + ".index"


def staging_path(manifest_path: str | os.PathLike) -> str:
    """Where the shards of a manifest stand until all are complete: `data/train.partial`."""
    return str(manifest_path).removesuffix(".json") + ".partial"


def expand_spec(spec: str, *, allow_missing: bool = False) -> list[str]:
    """The shard files that a spec names, in order.

    A spec is `data/train-<000..012>.tar`, the brace form `{000..012}`, a glob, a folder,
    a manifest, one file, or a comma list of these.

    Raises:
        ShardError: if nothing matches, or a range has missing files (they are named) and not
            `allow_missing`.
    """
    paths = []
    for part in _split_commas(spec):
        paths += _expand_part(local_path(part), allow_missing)
    if not paths:
        raise ShardError(f"--shards {spec!r}: names no shard. Give for example data/train.json.")
    counts = Counter(map(os.path.abspath, paths))
    twice = [path for path in paths if counts[os.path.abspath(path)] > 1]
    if twice:
        raise ShardError(f"--shards {spec!r}: names {twice[0]} more than once. Name it once.")
    return paths


def _split_commas(spec: str) -> list[str]:
    """The parts of a comma list; a comma inside braces belongs to its part."""
    parts, depth = [""], 0
    for char in spec:
        depth += (char == "{") - (char == "}")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


def _expand_part(part: str, allow_missing: bool) -> list[str]:
    braces = re.sub(r"<([^<>]*\.\.[^<>]*)>", r"{\1}", part)
    if braces.endswith(".json"):
        return [shard.path for shard in load_manifest(braces)[1]]
    if os.path.isdir(braces):
        found = sorted(str(path) for path in Path(braces).glob("*.tar"))
        splits = sorted({split_of(path) for path in found})
        if len(splits) > 1:
            raise ShardError(
                f"{part}: the folder holds the splits {listing(splits)}. "
                f"Name one, for example {os.path.join(part, splits[0])}.json."
            )
        return found or _nothing(part)
    if "{" in braces:
        try:
            names = list(braceexpand.braceexpand(braces))
        except braceexpand.UnbalancedBracesError:
            raise ShardError(f"{part}: its braces do not pair. Write {{000..012}}.") from None
        missing = [name for name in names if not os.path.isfile(name)]
        if len(missing) == len(names):
            return _nothing(part)
        if missing and not allow_missing:
            shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
            raise ShardError(
                f"{part}: {len(missing)} of {len(names)} shards are missing: {shown}. "
                "Correct the range, or write them with make shards."
            )
        return names
    if os.path.isfile(braces):
        return [braces]
    if re.search(r"[*?\[]", braces):
        anchor = Path(braces).anchor or "."
        found = sorted(str(path) for path in Path(anchor).glob(braces.removeprefix(anchor)))
        return [path for path in found if path.endswith(".tar")] or _nothing(part)
    return _nothing(part)


def _nothing(part: str) -> list[str]:
    folder = os.path.dirname(re.split(r"[<{*?\[]", part)[0]) or "."
    if not os.path.isdir(folder):
        raise ShardError(
            f"{part}: no shard matches: there is no folder {folder}. Run make shards first."
        )
    # Two levels: a mistyped path in a home folder must not be answered by a walk of it all.
    here = sorted(str(path) for deep in ("*.tar", "*/*.tar") for path in Path(folder).glob(deep))
    hint = did_you_mean(part, here) or (f" There is {here[0]}." if here else "")
    raise ShardError(f"{part}: no shard matches.{hint} Run make shards to write shards.")


def local_path(url: str) -> str:
    """The local file behind a shard's URL: the one place through which every shard is reached.

    Raises:
        ShardError: for remote URLs, which are not read yet, and for `pipe:`, which never is.
    """
    scheme = re.match(r"([a-z][a-z0-9+]*)://|(pipe):", url)
    if not scheme or scheme[1] == "file":
        return url.removeprefix("file://")
    if scheme[2]:
        raise ShardError(f"{url}: pipes run a shell, so they are not read. Name files.")
    raise ShardError(f"{url}: {scheme[1]} shards cannot be read. Copy them to a local folder.")


def check_size(shard: Shard) -> None:
    """Compare a shard's size with its manifest's.

    Raises:
        ShardError: if the shard is missing or has another size.
    """
    try:
        num_bytes = os.path.getsize(shard.path)
    except OSError as error:
        raise ShardError(f"{shard.path}: {error.strerror}. Run make shards.") from None
    refuse_size(shard, num_bytes)


def refuse_size(shard: Shard, num_bytes: int) -> None:
    """Raise ShardError if a shard that is `num_bytes` long is said to have another size."""
    if shard.num_bytes not in (None, num_bytes):
        raise ShardError(
            f"{shard.path}: {num_bytes:,} bytes, but its manifest says {shard.num_bytes:,}. "
            "The shard is cut short or another file: copy it again, or run make shards."
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
            f"{shard.sha256[:16]}…. Copy the shard again, or write it again with make shards."
        )
