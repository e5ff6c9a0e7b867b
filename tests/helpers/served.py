"""A Ray Serve application in a process of its own: `python -m tests.helpers.served SETTINGS`, as tests ask for it.

Starts Ray and the application, prints its port, and ends when its input does.
"""

import json
import socket
import sys

import ray
from ray import serve

from router.cluster.deployment import Replicas, application


def main() -> None:
    settings = json.loads(sys.argv[1])
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
