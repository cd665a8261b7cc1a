"""What is asked before shards are fetched: a folder's manifests, one file, sizes. Run as a program.

The program, whose argument is its parent, reads a request as JSON from stdin and prints the answer,
see `programs`.
"""

import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase

from wds_convnext.errors import AbsentError, ShardError, WdsConvnextError
from wds_convnext.storage.programs import end_with
from wds_convnext.storage.transfer import Counts, Store
from wds_convnext.urls import join

_NUM_SIZES = 16  # requests at a time


def ask(request: dict) -> dict:
    """Fetch the manifests of a folder, or one file; or look for shards.

    Args:
        request: `url`, `timeout_s`; of what is fetched `to` (a path), and `max_bytes` of each file;
            of manifests also `stems`, those that a folder may hold where its store has no listings;
            of shards `names` and `globs`, each of which has to name some.
    """
    store = Store.of(request["timeout_s"], Counts())
    if "names" in request:
        return {"sizes": _sizes(store, request["url"], request["names"], request["globs"])}
    if "stems" in request:
        return {"stems": _fetch_manifests(store, request)}
    store.fetch_unchecked(request["url"], request["to"], max_bytes=request["max_bytes"])
    return {}


def _fetch_manifests(store: Store, request: dict) -> list[str]:
    url, stems = request["url"], request["stems"]
    names = store.names(url)
    if names is not None:
        indexed = {name.removesuffix(".index") for name in names if name.endswith(".index")}
        stems = [name[:-5] for name in names if name.endswith(".json") and name[:-5] in indexed]
    found = []
    for stem in stems:
        path = os.path.join(request["to"], f"{stem}.json")
        try:
            store.fetch_unchecked(f"{url}/{stem}.json", path, max_bytes=request["max_bytes"])
            found.append(stem)
        except AbsentError:
            os.unlink(path)
            if names is not None:
                raise
    return found


def _sizes(store: Store, url: str, names: list[str], globs: list[str]) -> dict[str, int]:
    """The bytes of shards, by name."""
    if globs:
        listed = store.names(url)
        if listed is None:
            raise ShardError(
                f"{url}: web servers have no listings. Name the shards: train-<000..012>.tar."
            )
        for glob in globs:
            found = [n for n in listed if n.endswith(".tar") and fnmatchcase(n, glob)]
            if not found:
                raise ShardError(f"{url}: no shards named {glob} are there.")
            names = [*names, *found]
    names = sorted(set(names))
    with ThreadPoolExecutor(min(_NUM_SIZES, len(names) or 1)) as pool:
        stores = [Store.of(store.timeout_s, Counts()) for _ in names[:_NUM_SIZES]]
        # A client is of one thread.
        parts = [names[start :: len(stores)] for start in range(len(stores))]
        asked = pool.map(lambda s, part: {n: s.size(join(url, n)) for n in part}, stores, parts)
        sizes = {name: size for part in asked for name, size in part.items()}
    return {name: sizes[name] for name in names}


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to us, too
    end_with(int(sys.argv[1]))
    try:
        answer = ask(json.load(sys.stdin))
    except WdsConvnextError as error:
        answer = {"error": str(error), "kind": type(error).__name__}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
