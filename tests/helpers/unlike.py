"""pear-infer on a cluster whose workers have other weights than this process."""

from typing import Any

from router import cluster
from router.cluster import Settings
from router.infer.cli import main as pear_infer


def main(args: list[str]) -> None:
    def unlike(backbone: str, weights: str | None, _: str, *others: Any) -> Settings:
        return Settings(backbone, weights, "sha256:" + "0" * 64, *others)

    vars(cluster)["Settings"] = unlike
    pear_infer(args)
