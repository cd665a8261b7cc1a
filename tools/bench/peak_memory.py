"""Run a command and print the peak memory of its whole process tree (PSS: shared pages once).

    python tools/bench/peak_memory.py wds-convnext train --shards …

Linux only: it reads /proc/PID/smaps_rollup.
"""

import subprocess
import sys
import time

from wds_convnext.check.measure import process_tree, pss_bytes

INTERVAL_S = 0.1


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
