"""Data sets of the Hugging Face Hub: a local cache folder, or `hf://datasets/owner/name`.

Both lead to a folder of files of one revision, which is then read as any other folder is.
"""

import os
import re
from typing import NamedTuple

from wds_convnext.errors import UsageError, listing

_URL = re.compile(
    r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+)"
    r"(@(?P<revision>refs/(pr|convert)/[^/]+|[^/]+))?(/(?P<config>.+?))?/?"
)
_FOLDER = re.compile(r"datasets--(?:.+--)?(.+)")


class HubFolder(NamedTuple):
    """Where the files of one revision stand, and what the data set is called."""

    path: str
    dataset: str


def find_folder(source: str) -> HubFolder | None:
    """The folder that a Hub source leads to; None for any other source.

    A cache folder is `datasets--owner--name`, with `refs/` and `snapshots/`: the revision of the
    ref `main` is taken, else that of the only ref. A URL is `hf://datasets/owner/name`, with
    `@revision` and `/config` if need be: its parquet files are downloaded to the Hub's cache.

    Raises:
        UsageError: if the revision is not clear or not there, or the download fails.
    """
    if source.startswith("hf://"):
        return _download(source)
    refs, snapshots = os.path.join(source, "refs"), os.path.join(source, "snapshots")
    if not (os.path.isdir(refs) and os.path.isdir(snapshots)):
        return None
    found = {
        os.path.relpath(os.path.join(folder, name), refs): os.path.join(folder, name)
        for folder, _, names in os.walk(refs)
        for name in names
    }
    if "main" not in found and len(found) != 1:
        raise UsageError(
            f"{source}: which revision? It has the refs {listing(sorted(found)) or 'none'}. "
            f"Name the folder of one in {snapshots}."
        )
    with open(found.get("main") or next(iter(found.values())), encoding="utf-8") as file:
        revision = file.read(200).strip()
    path = os.path.join(snapshots, revision)
    if not re.fullmatch(r"[0-9a-f]{4,64}", revision) or not os.path.isdir(path):
        raise UsageError(
            f"{source}: revision {revision!r} is not in {snapshots}. Download it again."
        )
    named = _FOLDER.fullmatch(os.path.basename(os.path.abspath(source)))
    return HubFolder(path, named[1] if named else os.path.basename(os.path.abspath(source)))


def _download(url: str) -> HubFolder:
    match = _URL.fullmatch(url)
    if not match:
        raise UsageError(
            f"{url}: not hf://datasets/OWNER/NAME, with @REVISION and /CONFIG if need be."
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UsageError(
            f"{url}: needs huggingface_hub. Install it: pip install 'wds-convnext[data]'."
        ) from None
    config = f"{match['config']}/" if match["config"] else ""
    try:
        folder = snapshot_download(
            match["repo"],
            repo_type="dataset",
            revision=match["revision"],
            allow_patterns=f"{config}*.parquet",  # its * also stands for folders
        )
    except Exception as error:  # of the hub, of its HTTP client, of the disk
        reason = " ".join(str(error).split())
        raise UsageError(f"{url}: not downloaded ({type(error).__name__}: {reason}).") from None
    path = os.path.join(folder, match["config"] or "")
    if not any(name.endswith(".parquet") for _, _, names in os.walk(path) for name in names):
        raise UsageError(
            f"{url}: no parquet files. The Hub converts many data sets itself: try "
            f"hf://datasets/{match['repo']}@refs/convert/parquet, and /CONFIG behind it."
        )
    return HubFolder(path, match["repo"].split("/")[1])
