"""LitServe, with its batching (https://lightning.ai/docs/litserve/features/batching).

    python -m benchmarks.serve.peers.with_litserve PORT

LitServe's documentation has no chapter on many adapters of one backbone: `predict` is given the batch and runs it, see
model.py. A batch is what waits, which is LitServe's default (`batch_timeout` 0). Images are decoded in threads.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import litserve

from benchmarks.serve.peers.model import MAX_BATCH, SETTINGS, Classifier


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.classifier = Classifier()
        self.pool = ThreadPoolExecutor(SETTINGS["threads"])

    def decode_request(self, request: dict[str, str]) -> tuple[str, str]:
        return request["image"], request["task"]

    def batch(self, inputs: list[tuple[str, str]]) -> tuple[list[Any], list[str]]:
        return list(self.pool.map(self.classifier.decode, [image for image, _ in inputs])), [task for _, task in inputs]

    def predict(self, batch: tuple[list[Any], list[str]]) -> list[dict[str, Any]]:
        return self.classifier.predict(*batch)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    api = Api(max_batch_size=MAX_BATCH)
    server = litserve.LitServer(api, accelerator=SETTINGS.get("device", "cpu"), devices=1, timeout=300)
    server.run(host="127.0.0.1", port=parser.parse_args().port, generate_client_file=False, log_level="warning")
