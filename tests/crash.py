"""A conversion that dies at every moment in turn; for the tests of `convert`.

`python crash.py SOURCE OUT [again | fresh | replace OLD]`: a process dies before its first change
to the disk, the next one before its second, and so on; the last one finishes. Each goes on where
the one before stopped (`again`), or begins with nothing (`fresh`) or with a copy of a complete
folder that it is to overwrite (`replace`), and is then followed by one that lives. Prints a line
per process: its exit status and what a reader finds in OUT.
"""

import os
import shutil
import sys

from wds_convnext.conversion import convert
from wds_convnext.errors import ShardError
from wds_convnext.shards.opening import open_dataset

CHANGES = ("replace", "fsync", "unlink", "rmdir", "mkdir")
RESUMED_AT = 12  # changes that each process of `again` lives to make, at least


def die_before(change: int) -> None:
    """Make this process die before its change number `change` to the disk, without a trace."""
    num_left = change

    def dying(function):
        def call(*args, **kwargs):
            nonlocal num_left
            num_left -= 1
            if num_left < 0:
                os._exit(9)
            return function(*args, **kwargs)

        return call

    for name in CHANGES:
        setattr(os, name, dying(getattr(os, name)))


def found(out: str) -> str:
    """What a reader that takes all shards finds."""
    try:
        return f"{len(open_dataset(os.path.join(out, 'train-*.tar')))} samples"
    except ShardError:
        return "unfinished"


def main(source: str, out: str, how: str, old: str | None = None) -> None:
    def convert_all() -> None:
        convert(source, out=out, num_shards=3, overwrite=how == "replace", jobs=1, quiet=True)

    status, change = 9, 0
    while status == 9:
        if how != "again":
            shutil.rmtree(out, ignore_errors=True)
        if old:
            shutil.copytree(old, out)
        child = os.fork()
        if child == 0:
            die_before(RESUMED_AT + change % 7 if how == "again" else change)
            convert_all()
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, found(out), flush=True)
        if how != "again" and status == 9:
            convert_all()
            print("after", found(out), flush=True)
        change += 1


if __name__ == "__main__":
    main(*sys.argv[1:])
