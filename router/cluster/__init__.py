"""Many machines: the work of one `pear-infer` on a Ray cluster (docs/cluster.md)."""

from router.cluster.crew import Crew, make_crew
from router.cluster.infer import work_off
from router.cluster.session import ClusterError, has_gpus, session
from router.cluster.worker import Settings, shared_path

__all__ = ["ClusterError", "Crew", "Settings", "has_gpus", "make_crew", "session", "shared_path", "work_off"]
