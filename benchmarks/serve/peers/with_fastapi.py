"""A plain FastAPI endpoint around a PEFT model: each request switches to its adapter and runs alone.

    uvicorn benchmarks.serve.peers.with_fastapi:app --port PORT

A model has one active adapter, so switching and running are under a lock. Images are decoded before that, in FastAPI's
threads.
"""

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from benchmarks.serve.peers.model import Classifier


class Item(BaseModel):
    image: str
    """A file, in base64."""
    task: str


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.classifier = Classifier()
    yield


app = FastAPI(lifespan=lifespan)
lock = threading.Lock()


@app.get("/health")
def health() -> str:
    return "ok"


@app.post("/predict")
def predict(item: Item) -> dict[str, Any]:
    classifier: Classifier = app.state.classifier
    image = classifier.decode(item.image)
    with lock:
        return classifier.predict([image], [item.task])[0]
