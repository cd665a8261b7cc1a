"""How glibc hands out memory for large tensors on a CPU."""

import ctypes
import mmap
import os
import resource
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
_PAD = 2**26  # bytes by which the heap grows at least


def keep_freed_memory() -> None:
    """Have glibc keep for the next batch what one frees, and map it in huge pages.

    Large tensors come from `mmap` otherwise, and each of their pages faults in again each time.
    Pages of 4 KB are more than the TLB holds, and in a virtual machine a miss costs most
    (docs/benchmarks.md, "Huge pages on a CPU"). A process keeps what it had at most, and more
    where the heap is in pieces.

    Huge pages are asked for the next 4 GB of the heap, at most half of the machine's memory. That
    is address space, taken at once, and memory as it is used. Where so much is refused, or address
    space is limited (`ulimit -v`), pages stay small. With another allocator this does nothing.
    """
    if (libc := _glibc()) is None:
        return
    for parameter, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, _PAD)):
        libc.mallopt(parameter, value)
    size = min(2**32, os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE // 2)
    if not _is_free(size):
        return
    libc.malloc.restype = ctypes.c_void_p
    if block := libc.malloc(ctypes.c_size_t(size)):  # the end of the heap, also when it is freed
        start = block + -block % mmap.PAGESIZE
        size = (block + size - start) // mmap.PAGESIZE * mmap.PAGESIZE
        # A kernel without huge pages refuses: then pages are small, as before.
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
        libc.free(ctypes.c_void_p(block))


def give_back_freed_memory() -> None:
    """Return what is kept to the system, before a process is forked.

    A huge page that both processes hold falls apart into small ones when one of them writes to it.
    """
    if (libc := _glibc()) is not None:
        libc.malloc_trim(ctypes.c_size_t(0))


def _is_free(size: int) -> bool:
    """Whether there is address space for so many bytes; `malloc` refused moves to another heap."""
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return False
    try:
        mmap.mmap(-1, size + 2 * _PAD, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError:
        return False
    return True


def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc and no other allocator was preloaded."""
    if sys.platform != "linux":
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # musl
        return None
    ours, used = (ctypes.cast(lib.malloc, ctypes.c_void_p) for lib in (libc, ctypes.CDLL(None)))
    return libc if ours.value == used.value and hasattr(libc, "mallopt") else None
