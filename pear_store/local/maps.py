"""Maps files into memory, read-only, without keeping a descriptor."""

import mmap
import os
from functools import cache
from typing import Any

_MAP_FIXED = 0x10  # on Linux, macOS and the BSDs


@cache
def _system() -> Any:
    import ctypes  # here, because many commands map nothing

    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_longlong,
    )  # fmt: skip
    return library


def map_file(descriptor: int, size_bytes: int) -> mmap.mmap:
    """Maps a file. Only read the map: a write ends the process. It stays valid after the descriptor is closed.

    Python's map of a file keeps a copy of its descriptor, and a process may only have few. So Python makes an anonymous
    map here, and the system replaces it by the file's.

    Raises:
        OSError: there is no address space left, or the process has too many maps.
    """
    import ctypes

    memory = mmap.mmap(-1, size_bytes)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    mapped = _system().mmap(address, size_bytes, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0)
    if mapped != address:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return memory
