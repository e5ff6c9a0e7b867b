"""Ray Serve in a process of its own: `python -m tests.helpers.served ADDRESS`. It starts a Ray for `local`.

A line of stdin has an application's settings, and a line of stdout then says its port. The next line ends it. Ray
decides within seconds how many replicas there are: by itself it takes 30 s for more, and 10 minutes for fewer.
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
    soon: dict[str, Any] = {
        "upscale_delay_s": 0.5,
        "downscale_delay_s": 1,
        "look_back_period_s": 2,
        "metrics_interval_s": 0.5,
    }
    vars(deployment)["AutoscalingConfig"] = partial(AutoscalingConfig, **soon)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    alone: dict[str, Any] = {"num_cpus": 3, "include_dashboard": False, "object_store_memory": 200 << 20}
    ray.init(address=sys.argv[1], log_to_driver=False, **(alone if sys.argv[1] == "local" else {}))
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        for line in sys.stdin:
            serve.run(application(Replicas(**json.loads(line))))
            print(port, flush=True)
            sys.stdin.readline()
            serve.delete("default")
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
