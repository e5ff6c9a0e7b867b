"""`pear-infer` on the machines of a Ray cluster (docs/cluster.md). `pear-train` also connects to Ray through it."""

from router.cluster.crew import Crew, make_crew
from router.cluster.infer import work_off
from router.cluster.session import ClusterError, fitting, has_gpus, reason_of, room, session
from router.cluster.worker import Settings, shared_path

__all__ = [
    "ClusterError",
    "Crew",
    "Settings",
    "fitting",
    "has_gpus",
    "make_crew",
    "reason_of",
    "room",
    "session",
    "shared_path",
    "work_off",
]
