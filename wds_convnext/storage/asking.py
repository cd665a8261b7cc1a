"""What is fetched before shards are: a folder's manifests, or one file. Run as a program.

The program, whose argument is its parent, reads a request as JSON from stdin and prints the answer,
see `programs`.
"""

import json
import os
import signal
import sys

from wds_convnext.errors import AbsentError, WdsConvnextError
from wds_convnext.storage.programs import end_with
from wds_convnext.storage.transfer import Counts, Store


def ask(request: dict) -> dict:
    """Fetch the manifests of a folder, or one file.

    Args:
        request: `url`, `to` (a path), `timeout_s`, `max_bytes` of each file; of a folder also
            `stems`, names of manifests that a folder may hold where its store has no listings.
    """
    store = Store.of(request["timeout_s"], Counts())
    url, to, max_bytes = request["url"], request["to"], request["max_bytes"]
    if "stems" not in request:
        store.fetch_unchecked(url, to, max_bytes=max_bytes)
        return {}
    names = store.names(url)
    stems = request["stems"]
    if names is not None:
        indexed = {name.removesuffix(".index") for name in names if name.endswith(".index")}
        stems = [name[:-5] for name in names if name.endswith(".json") and name[:-5] in indexed]
    found = []
    for stem in stems:
        try:
            path = os.path.join(to, f"{stem}.json")
            store.fetch_unchecked(f"{url}/{stem}.json", path, max_bytes=max_bytes)
            found.append(stem)
        except AbsentError:
            os.unlink(path)
            if names is not None:
                raise
    return {"stems": found}


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
