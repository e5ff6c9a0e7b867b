"""Files as read-only memory that holds no descriptor."""

import mmap
import os
from functools import cache
from typing import Any

_MAP_FIXED = 0x10  # on Linux, macOS and the BSDs


@cache
def _system() -> Any:
    import ctypes  # here, for many commands map nothing

    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_longlong,
    )  # fmt: skip
    return library


def map_file(descriptor: int, size_bytes: int) -> mmap.mmap:
    """A file's bytes, to be read only; it stays valid when the descriptor is closed.

    A map that Python makes of a file keeps a copy of its descriptor, and a process may have few of them. So Python
    makes one of nothing, and the system puts the file in its place.

    Raises:
        OSError: the system lacks address space or has too many maps.
    """
    import ctypes

    memory = mmap.mmap(-1, size_bytes)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    mapped = _system().mmap(address, size_bytes, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0)
    if mapped != address:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return memory
