"""What the system reads of mapped files while memory is scarce: the pages that are used, and not what lies around them.

A fault in a mapped file reads what lies around, too: up to the disk's read-ahead, 128 KiB to 8 MiB. Under a tight limit
each such read takes away other pages of the same libraries, which then fault. A process that reads its experts past the
page cache has nothing else there, so it spends its time on its own libraries (`benchmarks/offload_limits.py`).
"""

from __future__ import annotations

import ctypes
from pathlib import Path

MAPS = Path("/proc/self/maps")
MADV_RANDOM = 1  # of the kernel's headers


def read_pages_alone() -> int:
    """From now on a fault in a file that this process has mapped reads that page alone.

    Linux heeds it for data; around code it reads on. There locking the code in memory would help, which can end a
    process that would otherwise be slow, so it is left to those who start it.

    Returns:
        How many bytes of mappings have been told so; 0 on another system.
    """
    libc = ctypes.CDLL(None)
    if not MAPS.exists() or not hasattr(libc, "madvise"):
        return 0
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    told = 0
    for line in MAPS.read_text().splitlines():
        addresses, _, _, _, inode, *_ = line.split(maxsplit=5)
        begin, end = (int(address, 16) for address in addresses.split("-"))
        if inode != "0" and libc.madvise(begin, end - begin, MADV_RANDOM) == 0:
            told += end - begin
    return told
