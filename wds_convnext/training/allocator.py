"""How glibc hands out memory for large tensors on a CPU."""

import ctypes
import mmap
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
_MOST = 2**31 - 1  # bytes that mallopt can have kept
_HUGE = 15 * 2**27  # bytes that are mapped in huge pages; less, or freeing them gave them back


def keep_freed_memory() -> None:
    """Have glibc keep for the next batch what one frees, and map it in huge pages.

    Large tensors come from `mmap` otherwise, and each of their pages faults in again each time.
    Of pages of 4 KB a step touches more than a CPU knows the places of, which counts most in a
    virtual machine (docs/benchmarks.md, "CIFAR-10"). Address space is taken for the first 2 GB
    of the heap, memory not before it is used. Elsewhere than with glibc this does nothing.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    for parameter, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _MOST), (_TOP_PAD, 2**26)):
        libc.mallopt(parameter, value)
    libc.malloc.restype = ctypes.c_void_p
    # The end of the heap, which stays there when it is freed; None where so much is not given.
    if block := libc.malloc(ctypes.c_size_t(_HUGE)):
        start = block + -block % mmap.PAGESIZE
        size = (block + _HUGE - start) // mmap.PAGESIZE * mmap.PAGESIZE
        # It may be refused, as by a kernel without them: then pages are small, as before.
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
        libc.free(ctypes.c_void_p(block))
