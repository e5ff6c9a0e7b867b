"""Says which file system a path is on."""

import os
import warnings
from functools import lru_cache
from pathlib import Path

NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "glusterfs", "lustre", "9p", "fuse.sshfs",
           "fuse.s3fs", "fuse.gcsfuse", "fuse.rclone", "fuse.glusterfs", "beegfs", "gpfs"}  # fmt: skip


def network_file_system(path: Path, mounts: Path = Path("/proc/self/mounts")) -> str | None:
    """The kind of network file system that a path is on. None: it is on a local one, or the system does not tell."""
    try:
        lines = mounts.read_text().splitlines()
        real = os.path.realpath(path)
    except OSError:
        return None
    found = ("", "")
    for line in lines:
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = fields[1].replace("\\040", " ")
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(found[0]):
            found = (point, fields[2])
    return found[1] if found[1] in NETWORK else None


def warn_of_network(path: Path) -> None:
    """Warns if a store is on a network file system."""
    kind = _kind(os.stat(path).st_dev, path)
    if kind:
        warnings.warn(
            f"{path} is on a network file system ({kind}): its locks and memory maps are not reliable enough for an "
            "index; keep the store on a local disk",
            stacklevel=3,
        )


@lru_cache(64)
def _kind(device: int, path: Path) -> str | None:
    """:func:`network_file_system`, looked up once for a path on a device."""
    return network_file_system(path)
