"""How glibc hands out memory for large tensors on a CPU."""

import ctypes
import mmap
import resource
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
_RESERVED = 2**32  # bytes of address space


def keep_freed_memory() -> None:
    """Have glibc keep for the next batch what one frees, and map it in huge pages.

    Large tensors come from `mmap` otherwise, and each of their pages faults in again each time.
    Pages of 4 KB are more than the TLB holds, and in a virtual machine a miss costs most
    (docs/benchmarks.md, "Huge pages on a CPU"). What is kept is the most that was in use at once.
    Huge pages are asked for the next 4 GB of the heap, of which address space is taken at once
    and memory as it is used; where address space is limited (`ulimit -v`), pages stay small.
    Elsewhere than with glibc this does nothing.
    """
    if (libc := _glibc()) is None:
        return
    for parameter, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 2**26)):
        libc.mallopt(parameter, value)
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return
    libc.malloc.restype = ctypes.c_void_p
    # The end of the heap, which stays there when it is freed; NULL if it is refused.
    if block := libc.malloc(ctypes.c_size_t(_RESERVED)):
        start = block + -block % mmap.PAGESIZE
        size = (block + _RESERVED - start) // mmap.PAGESIZE * mmap.PAGESIZE
        # A kernel without huge pages refuses: then pages are small, as before.
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
        libc.free(ctypes.c_void_p(block))


def give_back_freed_memory() -> None:
    """Return what is kept to the system, before a process is forked.

    A huge page that both processes hold falls apart into small ones when one of them writes to it.
    """
    if (libc := _glibc()) is not None:
        libc.malloc_trim(ctypes.c_size_t(0))


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
