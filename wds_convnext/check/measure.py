"""What a loader costs: rate, CPU time, memory and start, over its whole process tree.

Linux only where it reads /proc; elsewhere memory and CPU time are None.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LoaderCost:
    """What was measured of one loader."""

    images_per_s: float
    cpu_ms_per_image: float | None  # user and system time of all processes
    peak_pss_mib: float | None  # pages that processes share are counted once
    first_batch_s: float  # from the first `next` to its batch


def measure_loader(
    batches: Iterator, *, batch_size: int, num_images: int, warmup_batches: int
) -> LoaderCost:
    """Take batches: the first, some to warm up, then about num_images under the clock.

    Memory is looked at after each of the three, never under the clock: a look takes 10 to 20 ms.
    """
    started = time.perf_counter()
    next(batches)
    first_batch_s = time.perf_counter() - started
    looks = [tree_pss_mib()]
    for _ in range(warmup_batches):
        next(batches)
    looks.append(tree_pss_mib())
    num_batches = max(1, num_images // batch_size)
    cpu_before, started = tree_cpu_s(), time.perf_counter()
    for _ in range(num_batches):
        next(batches)
    seconds, cpu_after = time.perf_counter() - started, tree_cpu_s()
    looks.append(tree_pss_mib())
    measured = num_batches * batch_size
    cpu_s = None if cpu_before is None or cpu_after is None else cpu_after - cpu_before
    return LoaderCost(
        images_per_s=measured / seconds,
        cpu_ms_per_image=None if cpu_s is None else 1e3 * cpu_s / measured,
        peak_pss_mib=max(looks) or None,
        first_batch_s=first_batch_s,
    )


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


def tree_pss_mib() -> float:
    """Memory of this process and all below it; 0 where it is not known."""
    return sum(map(pss_bytes, process_tree(os.getpid()))) / 2**20


def tree_cpu_s() -> float | None:
    """CPU seconds of this process and all below it, those that ended included."""
    ticks: int | None = None
    for pid in process_tree(os.getpid()):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        ticks = (ticks or 0) + sum(map(int, fields[11:15]))
    return None if ticks is None else ticks / os.sysconf("SC_CLK_TCK")


def available_memory() -> int | None:
    """Bytes that this process and the page cache may still take; None where it is not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    try:
        return min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))  # of a container
    except (OSError, ValueError):  # there is no limit
        return free


def cpu_lacks_bf16() -> bool:
    """Whether the CPU is known to compute bfloat16 by detours; False where it is not known."""
    try:
        return "bf16" not in Path("/proc/cpuinfo").read_text()  # avx512_bf16, amx_bf16, Arm's bf16
    except OSError:
        return False
