"""glibc's allocator, set for programs that allocate large blocks again and again.

By default glibc maps every large block anew and unmaps it when it is freed, so each step's activations and
logits page-fault again: some 30 % of a training step on a CPU, and of encoding text. Kept on the heap, freed blocks
are reused as they are.
"""

import ctypes
import sys

# From glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def give_back_freed_memory() -> None:
    """Return what is free to the system, once; nothing where there is no glibc."""
    if sys.platform.startswith("linux") and (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        malloc_trim(0)


def keep_freed_memory() -> str:
    """Tell malloc to keep freed memory in this process. Returns one line that says what was done."""
    if not sys.platform.startswith("linux"):
        return f"allocator: left as it is ({sys.platform} has no glibc)"
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl has none
        return "allocator: left as it is (this C library has no mallopt)"
    # -1 never gives the top of the heap back; 0 never maps a block of its own.
    if not (mallopt(M_TRIM_THRESHOLD, -1) and mallopt(M_MMAP_MAX, 0)):
        return "allocator: left as it is (mallopt refused)"
    return "allocator: freed memory is kept for reuse (malloc: no trimming, no mapped blocks), faster on a CPU"
