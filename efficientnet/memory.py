"""What the C library does with memory that is freed. No torch here: it is told before the first tensor."""

import ctypes
import functools
import os
import sys

# glibc's mallopt: how much free memory at the end of the heap goes back to the system, and how many large blocks are
# mappings of their own, which go back when they are freed: more plainly said than by M_MMAP_THRESHOLD, of which older
# versions take no more than 32 MB.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
ALL = -1  # as unsigned, more than there is
ENVIRONMENT = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")


@functools.cache  # once a process; data workers inherit it when they are forked
def keep_freed_memory() -> bool:
    """Tell glibc to keep memory that is freed for the next tensors, and say whether it was told.

    Otherwise large tensors, and the end of the heap after every step, go back to the system, which hands out empty
    pages again one by one (docs/benchmarks.md has what that costs a training step). The price is that the process keeps
    what it needed most, in pieces that do not always fit what comes next.

    It is not told where the user's environment says it already (MALLOC_TRIM_THRESHOLD_ and the like, GLIBC_TUNABLES
    with glibc.malloc), nor on macOS, Windows or with musl, which have no such setting.
    """
    chosen = any(name in os.environ for name in ENVIRONMENT) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" and not chosen else None
    if mallopt is None:
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, ALL) and mallopt(M_MMAP_MAX, 0))
