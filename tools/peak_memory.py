"""Run a command and print the peak memory of its whole process tree (PSS: shared pages once).

    python tools/peak_memory.py wds-convnext train --shards …

Linux only: it reads /proc/PID/smaps_rollup.
"""

import subprocess
import sys
import time
from pathlib import Path

INTERVAL_S = 0.1


def process_tree(root: int) -> list[int]:
    """A process and all below it."""
    found = [root]
    for pid in found:
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                found += map(int, children.read_text().split())
            except OSError:
                continue  # it ended meanwhile
    return found


def pss_bytes(pid: int) -> int:
    """Proportional set size of a process; 0 if it is gone."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    line = next((line for line in rollup.splitlines() if line.startswith("Pss:")), "Pss: 0 kB")
    return int(line.split()[1]) * 1024


def main() -> int:
    process = subprocess.Popen(sys.argv[1:])
    peak, at_most = 0, 1
    while process.poll() is None:
        pids = process_tree(process.pid)
        total = sum(map(pss_bytes, pids))
        if total > peak:
            peak, at_most = total, len(pids)
        time.sleep(INTERVAL_S)
    print(f"peak PSS {peak / 1e6:,.0f} MB in {at_most} processes", file=sys.stderr)
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
