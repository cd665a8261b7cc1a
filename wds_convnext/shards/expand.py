"""Which shards a spec on the command line names."""

import math
import os
import re
from collections import Counter
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

import braceexpand

from wds_convnext.errors import ShardError, WdsConvnextError, did_you_mean, listing
from wds_convnext.shards.naming import (
    MAX_FILES,
    counterpart,
    find_files,
    is_held_out,
    missing_siblings,
    purpose,
    split_of,
)
from wds_convnext.shards.remote import linked, listed_shards, localize
from wds_convnext.shards.spec import (
    is_manifest,
    load_manifest,
    manifest_path,
    manifests_in,
    remote_folder_of,
)
from wds_convnext.storage.layout import is_cached, where
from wds_convnext.urls import check_url, is_remote, names_remote, redacted

_MAX_COMMAS = 8  # in the name of a file or folder


def expand_spec(spec: str, *, allow_missing: bool = False, use: str = "train") -> list[str]:
    """The shard files that a spec names, in order.

    A spec is `data/train-<000..012>.tar`, the brace form `{000..012}`, a glob, a folder,
    a manifest, one file, a URL of one of these, or a comma list. Remote shards have local paths
    too, at which they stand when they are read, see `remote`.

    Args:
        allow_missing: name also the files that a range, a numbered series or a manifest lacks.
        use: what the samples are for, "train" or "validation": that split of a folder is taken.
    Raises:
        ShardError: if nothing matches, files are missing (they are named) and not
            `allow_missing`, or a folder leaves a choice.
    """
    return list(expand_shards(spec, allow_missing=allow_missing, use=use))


def expand_shards(
    spec: str, *, allow_missing: bool = False, use: str = "train"
) -> dict[str, str | None]:
    """The shard files that a spec names, as `expand_spec`, each with the manifest that names it.

    None where only the shard is named; its manifest, if any, is then found by its name.
    """
    found: list[tuple[str, str | None]] = []
    for part in split_spec(spec):
        if is_remote(part) and part.endswith(".tar"):
            manifest = localize(part)
            names = None if re.search(r"[*?\[]", part) else expand_braces(part)
            found += [(path, manifest) for path in listed_shards(part, names, manifest)]
            continue
        local = localize(part) if is_remote(part) else part
        named = _named_manifest(local, use)
        if named and (link := linked(named)):
            local = named = link
        found += [(path, named) for path in _expand_part(local, allow_missing, use)]
    if not found:
        raise ShardError(f"--shards {spec!r}: names no shard. Give for example data/train.json.")
    counts = Counter(os.path.abspath(path) for path, _ in found)
    twice = [where(path) for path, _ in found if counts[os.path.abspath(path)] > 1]
    if twice:
        raise ShardError(f"--shards {spec!r}: names {twice[0]} more than once. Name it once.")
    return dict(found)


def reads_remote(spec: str) -> bool:
    """Whether a spec names a URL, or a manifest whose shards are at one."""
    if names_remote(spec):
        return True
    for part in split_spec(spec):
        manifests = manifests_in(part) if os.path.isdir(part) else [part]
        for path in manifests:
            with suppress(ShardError):
                if path.endswith(".json") and is_manifest(path) and remote_folder_of(path):
                    return True
    return False


def split_specs(shards: str, val_shards: str | None) -> list[str]:
    """The specs of the training split and of its validation split, as far as files here say.

    Args:
        shards, val_shards: see `opening.open_splits`.
    """
    if val_shards is None and not reads_remote(shards):
        with suppress(WdsConvnextError):  # whoever opens them raises it
            val_shards = find_counterpart(expand_spec(shards)[0], use="validation")
    return [shards, val_shards] if val_shards else [shards]


def _named_manifest(part: str, use: str) -> str | None:
    if part.endswith(".json"):
        return part
    splits = _splits_in(part) if os.path.isdir(part) else {}
    manifest = splits and splits[_choose_split(part, list(splits), use)][0]
    return manifest if manifest and is_manifest(manifest) else None


def absolute_spec(spec: str, *, start: str | os.PathLike = ".") -> str:
    """A spec that names from any working directory what this one names from `start`."""
    return ",".join(
        part if is_remote(part) else os.path.abspath(os.path.join(start, part))
        for part in split_spec(spec)
    )


def stated_spec(spec: str, folder: str | os.PathLike, *, use: str = "train") -> str:
    """A spec as a run's folder states it: version 0.1.0 kept paths relative to where it started.

    Where that was is not known. Tried are the working directory, the folder and those above it; the
    first in which the spec names shards, all of which are there, is taken.
    """
    if reads_remote(spec):  # paths in other parts of it are of versions that keep them absolute
        return spec
    here = Path(folder).absolute()
    for start in (Path.cwd(), here, *here.parents):
        placed = absolute_spec(spec, start=start)
        with suppress(ShardError):
            expand_spec(placed, use=use)
            return placed
    return spec


def split_spec(spec: str) -> list[str]:
    """The paths, patterns and URLs of a comma list.

    A comma inside braces belongs to its part, and so does one in the name of a file or folder that
    is there.
    """
    pieces, depth = [""], 0
    for char in spec:
        depth += (char == "{") - (char == "}")
        if char == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += char
    parts = []
    while pieces:
        for num in range(min(len(pieces), _MAX_COMMAS + 1), 0, -1):
            part = local_path(",".join(pieces[:num]).strip())
            if num == 1 or _is_there(part):
                break
        del pieces[:num]
        parts += [part] if part else []
    return parts


def _is_there(path: str) -> bool:
    """Whether there is a file or folder with such commas, or one for files that match a pattern."""
    folder = os.path.dirname(path)
    return os.path.exists(path) or ("," in folder and os.path.isdir(folder))


def _expand_part(part: str, allow_missing: bool, use: str) -> list[str]:
    braces = _with_braces(part)
    if braces.endswith(".json"):
        return [shard.path for shard in load_manifest(braces)[1]]
    if os.path.isdir(braces):
        return _expand_folder(part, allow_missing, use)
    if os.path.isfile(braces):
        return [braces]
    if "{" in braces:
        names = expand_braces(braces)
        missing = [name for name in names if not os.path.isfile(name)]
        if len(missing) == len(names):
            return _nothing(part)
    else:
        found = [path for path in find_files(braces) if path.endswith(".tar")]
        if not found:
            return _nothing(part)
        missing = [*missing_siblings(found), *_unlisted(found, braces)]
        names = sorted({*found, *missing})
    if not allow_missing:
        _refuse_missing(part, missing, len(names))
    return names


def _with_braces(part: str) -> str:
    return re.sub(r"<([^<>]*\.\.[^<>]*)>", r"{\1}", part)


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern's ranges `<000..012>` and braces stand for; globs stay.

    Raises:
        ShardError: if they are too many, or do not pair.
    """
    pattern = _with_braces(pattern)
    # Counted first: ranges are expanded in memory, whole.
    ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)[^{}]*\}", pattern)
    total = math.prod(abs(int(last) - int(first)) + 1 for first, last in ranges)
    if total > MAX_FILES:
        raise ShardError(
            f"{pattern}: its ranges name {total:,} files, the limit is {MAX_FILES:,}. "
            "Look at the numbers."
        )
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError:
        raise ShardError(f"{pattern}: its braces do not pair. Write {{000..012}}.") from None


def _expand_folder(folder: str, allow_missing: bool, use: str) -> list[str]:
    splits = _splits_in(folder)
    if not splits:
        return _nothing(folder)
    manifest, found = splits[_choose_split(folder, list(splits), use)]
    if is_manifest(manifest):
        listed = [shard.path for shard in load_manifest(manifest)[1]]
        return [*listed, *sorted({*found} - {*listed})]
    missing = list(missing_siblings(found))
    if not allow_missing:
        _refuse_missing(folder, missing, len(found) + len(missing))
    return sorted([*found, *missing])


def _splits_in(folder: str) -> dict[str, tuple[str, list[str]]]:
    """By name, the path of each split's manifest, there or not, and the shards that are there."""
    return {Path(path).stem: (path, found) for path, found in manifests_in(folder).items()}


def _choose_split(folder: str, splits: list[str], use: str) -> str:
    """The one split of a folder that is for this use; a test split is taken only if named.

    Without a name that says so, a single split that is not held out is the training split.
    """
    fitting = [split for split in splits if purpose(split) == use]
    if not fitting and use == "train":
        fitting = [split for split in splits if not is_held_out(split)]
    if len(fitting) == 1:
        return fitting[0]
    found = f"several {use} splits," if fitting else f"no {use} split, but"
    example = os.path.join(folder, f"{(fitting or ['NAME'])[0]}*.tar")
    raise ShardError(
        f"{where(os.path.join(folder, ''))}: the folder holds {found} "
        f"{listing(fitting or splits)}. Name the shards, for example '{where(example)}'."
    )


def _refuse_missing(part: str, missing: list[str], total: int) -> None:
    if missing:
        raise ShardError(
            f"{part}: {len(missing)} of {total} shards are missing: {listing(missing, limit=5)}. "
            "Copy or write them, or name only those that are there."
        )


def _unlisted(found: list[str], pattern: str) -> list[str]:
    """The shards that match a glob and stand in the manifests of others, but are not there."""
    manifests = [path for path in dict.fromkeys(map(manifest_path, found)) if is_manifest(path)]
    return [
        shard.path
        for path in manifests
        for shard in load_manifest(path)[1]
        if fnmatch(shard.path, pattern) and not os.path.exists(shard.path)
    ]


def _nothing(part: str) -> list[str]:
    folder = part
    if not os.path.isdir(part):
        folder = os.path.dirname(re.split(r"[<{*?\[]", part)[0])
    if not os.path.isdir(folder or "."):
        raise ShardError(
            f"{part}: no shard matches: there is no folder {folder}. "
            "Write shards with wds-convnext shards."
        )
    # Two levels: a mistyped path in a home folder must not be answered by a walk of it all.
    here = [
        path for deep in ("*.tar", "*/*.tar") for path in find_files(os.path.join(folder, deep))
    ]
    hint = did_you_mean(part, here) or (f" There is {here[0]}." if here else "")
    raise ShardError(f"{part}: no shard matches.{hint} Write shards with wds-convnext shards.")


def find_counterpart(train_shard: str, *, use: str) -> str | None:
    """A spec of the "validation" or "test" shards next to a training shard; None without any."""
    folder = os.path.dirname(train_shard)
    links = [path for path in find_files(os.path.join(folder, "*.json")) if os.path.islink(path)]
    if links and is_cached(train_shard):  # its manifest is a local file, next to others
        folder = os.path.dirname(where(links[0]))
    splits = _splits_in(folder)
    split = counterpart(split_of(train_shard), splits, use=use)
    if split is None:
        return None
    manifest, found = splits[split]
    if is_manifest(manifest):
        return where(manifest)
    first = os.path.basename(found[0])
    joint = first[len(split)] if first[len(split)] in "-_." else "[0-9]"
    return found[0] if first == f"{split}.tar" else os.path.join(folder, f"{split}{joint}*.tar")


def local_path(url: str) -> str:
    """The local path that a part of a spec names; a remote URL as it is.

    Raises:
        ShardError: for `pipe:`, which is never read.
        UsageError: for a URL that holds credentials.
    """
    if is_remote(url):
        return check_url(url)
    if url.startswith("pipe:"):
        raise ShardError(f"{redacted(url)}: pipes run a shell, so they are not read. Name files.")
    return os.path.expanduser(url.removeprefix("file://"))
