"""A Ray Serve application in a process of its own: `python -m tests.helpers.served SETTINGS`, as tests ask for it.

Starts Ray and the application, prints its port, and ends when its input does. Ray decides within seconds how many
replicas there are: by itself it takes 30 s for more, and 10 minutes for fewer.
"""

import json
import socket
import sys
from functools import partial
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig

from router.cluster import deployment
from router.cluster.deployment import Replicas, application


def main() -> None:
    settings = json.loads(sys.argv[1])
    soon: dict[str, Any] = {
        "upscale_delay_s": 1,
        "downscale_delay_s": 3,
        "look_back_period_s": 3,
        "metrics_interval_s": 1,
    }
    vars(deployment)["AutoscalingConfig"] = partial(AutoscalingConfig, **soon)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application(Replicas(**settings)))
        print(port, flush=True)
        sys.stdin.read()
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
