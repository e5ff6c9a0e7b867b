"""BentoML, with adaptive batching (https://docs.bentoml.com/en/latest/get-started/adaptive-batching.html).

    bentoml serve benchmarks.serve.peers.with_bentoml:Server --port PORT

A batchable method takes one parameter, so an image and its task are one item, as the documentation says. It has no
chapter on many adapters of one backbone: the method is given the batch and runs it, see model.py. `max_latency_ms` is
so large that no request is refused.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import bentoml
from pydantic import BaseModel

from benchmarks.serve.peers.model import MAX_BATCH, SETTINGS, Classifier


class Item(BaseModel):
    image: str
    """A file, in base64."""
    task: str


@bentoml.service(traffic={"timeout": 300}, workers=1)
class Server:
    def __init__(self) -> None:
        self.classifier = Classifier()
        self.pool = ThreadPoolExecutor(SETTINGS["threads"])

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=60_000)
    def predict(self, items: list[Item]) -> list[dict[str, Any]]:
        images = list(self.pool.map(self.classifier.decode, [item.image for item in items]))
        return self.classifier.predict(images, [item.task for item in items])
