"""The Open Inference Protocol: by a client that nobody here wrote, and what it refuses."""

import asyncio
import base64
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import ml_dtypes
import numpy as np
import pytest
import torch

from pear_store import Store, Task
from router import Prediction, Router
from router.serve.batcher import Batcher
from router.serve.limits import RequestLimits
from tests.router.serve.conftest import PICTURES, HeldRouter
from tests.router.serve.test_app import serve, service_of
from tests.router.serve.test_serving import TOKEN, served

pytestmark = pytest.mark.slow

BASE64 = [base64.b64encode(one).decode() for one in PICTURES]


def body_of(*inputs: Any, **more: Any) -> dict[str, Any]:
    return {"inputs": list(inputs), **more}


def image_input(*files: str, **more: Any) -> dict[str, Any]:
    return {"name": "image", "datatype": "BYTES", "shape": [len(files)], "data": list(files), **more}


def outputs_of(response: httpx.Response) -> dict[str, dict[str, Any]]:
    assert response.status_code == 200, response.text
    return {output["name"]: output for output in response.json()["outputs"]}


def assert_output(found: dict[str, dict[str, Any]], expected: list[Prediction]) -> None:
    assert found["label"]["data"] == [one.label for one in expected]
    assert found["class"]["data"] == [int(one.logits.argmax()) for one in expected]
    count = len(expected[0].classes)
    assert found["probabilities"]["shape"] == [len(expected), count]
    probabilities = torch.tensor(found["probabilities"]["data"]).view(-1, count)
    torch.testing.assert_close(probabilities, torch.stack([one.probs for one in expected]), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_client_of_others_is_served(filled: Path, router: Router, tmp_path: Path) -> None:
    """tritonclient: health, metadata, images and pixels, in JSON and as binary tensors, versions, errors."""
    from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
    from tritonclient.utils import InferenceServerException

    file = tmp_path / "tokens"
    file.write_text(f"{TOKEN}\n")
    headers = {"Authorization": f"Bearer {TOKEN}"}  # infer writes into what it is given: it gets copies
    expected = [router.run(picture, "a")[0] for picture in PICTURES[:2]]
    way = router.lookup("a").preprocess
    pixels = way(PICTURES[:2]).numpy()
    with Store(filled) as store:
        store.tag("a@1", "prod")

    def image(binary: bool) -> InferInput:
        files: list[Any] = list(PICTURES[:2]) if binary else BASE64[:2]
        found = InferInput("image", [2], "BYTES")
        found.set_data_from_numpy(np.array(files, dtype=object), binary_data=binary)
        return found

    def tensor(kind: str, array: Any, binary: bool = True) -> InferInput:
        found = InferInput("pixels", list(array.shape), kind)
        found.set_data_from_numpy(array, binary_data=binary)
        return found

    with served("--store", str(filled), "--token-file", str(file)) as process:
        client = InferenceServerClient(f"127.0.0.1:{process.port}")
        assert client.is_server_live()
        assert client.is_server_ready()
        with pytest.raises(InferenceServerException, match="expected the header 'Authorization"):
            client.get_server_metadata()
        assert "binary_tensor_data" in client.get_server_metadata(headers=headers)["extensions"]
        assert client.is_model_ready("a", headers=headers)
        assert client.is_model_ready("a", "1", headers=headers)
        assert not client.is_model_ready("zebra", headers=headers)
        model = client.get_model_metadata("a", headers=headers)
        assert (model["name"], model["versions"]) == ("a", ["1"])
        assert model["inputs"][1] == {"name": "pixels", "datatype": "FP32", "shape": [-1, 3, 48, 48]}
        half = pixels.astype(np.float16)
        for given, tolerance in (
            (image(True), 1e-5),
            (image(False), 1e-5),
            (tensor("FP32", pixels), 1e-5),
            (tensor("FP32", pixels, binary=False), 1e-5),
            (tensor("FP16", half), 1e-2),
            (tensor("BF16", pixels.astype(ml_dtypes.bfloat16)), 5e-2),
        ):
            for model_name, version in (("a", ""), ("a", "1"), ("a@1", ""), ("a@prod", "")):
                answer = client.infer(model_name, [given], version, request_id="x7", headers=dict(headers))
                assert answer.get_response()["id"] == "x7"
                assert answer.get_response()["model_version"] == "1"
                found = torch.from_numpy(answer.as_numpy("probabilities").copy())
                probabilities = torch.stack([one.probs for one in expected])
                torch.testing.assert_close(found, probabilities, rtol=tolerance, atol=tolerance)
                if tolerance < 1e-3:
                    assert [label.decode() for label in answer.as_numpy("label")] == [one.label for one in expected]
                    assert answer.as_numpy("class").tolist() == [int(one.logits.argmax()) for one in expected]
        some = [InferRequestedOutput("class", binary_data=False), InferRequestedOutput("label", binary_data=True)]
        answer = client.infer("a", [image(True)], outputs=some, headers=dict(headers))
        assert answer.as_numpy("probabilities") is None
        assert answer.as_numpy("class").tolist() == [int(one.logits.argmax()) for one in expected]
        features = client.infer("features", [image(True)], headers=dict(headers)).as_numpy("features").copy()
        torch.testing.assert_close(
            torch.from_numpy(features), router.run(PICTURES[:2], "features").logits, rtol=1e-5, atol=1e-5
        )
        for name, version, status, text in (
            ("zebra", "", "404", "no task 'zebra'"),
            ("a", "7", "404", "no version 7"),
            ("foreign", "", "422", "vit_huge"),
            ("wide", "", "400", "task expects shape \\[3, 64, 64\\]"),
        ):
            with pytest.raises(InferenceServerException, match=text) as raised:
                client.infer(name, [tensor("FP32", pixels)], version, headers=dict(headers))
            assert raised.value.status() == status
        client.close()


def test_json_and_one_raw_file(shared: Router) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        expected = [shared.run(picture, "b")[0] for picture in PICTURES[:2]]
        url = "/v2/models/b/infer"
        assert_output(outputs_of(await client.post(url, json=body_of(image_input(*BASE64[:2])))), expected)
        column = {**image_input(*BASE64[:2]), "shape": [2, 1], "data": [[one] for one in BASE64[:2]]}
        assert_output(outputs_of(await client.post(url, json=body_of(column))), expected)
        raw = await client.post(url, content=PICTURES[0], headers={"Inference-Header-Content-Length": "0"})
        assert_output(outputs_of(raw), expected[:1])
        pixels = shared.lookup("b").preprocess(PICTURES[:2])
        nested = {"name": "pixels", "datatype": "FP32", "shape": [2, 3, 48, 48], "data": pixels.tolist()}
        assert_output(outputs_of(await client.post(url, json=body_of(nested))), expected)
        answer = (await client.post(url, json=body_of(image_input(BASE64[0]), id="é"))).json()
        assert (answer["model_name"], answer["model_version"], answer["id"]) == ("b", "1", "é")
        server = (await client.get("/v2")).json()
        assert server["name"] == "pear-serve"
        headless = (await client.get("/v2/models/features")).json()
        assert [output["name"] for output in headless["outputs"]] == ["features"]

    serve(shared, work)


def test_an_unknown_has_an_empty_label(judging: Router) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        for name in ("a", "mild", "strict"):
            url = f"/v2/models/{name}/infer"
            best = judging.run(PICTURES[0], name, threshold=None)[0]
            for parameters, known in (
                ({}, name != "strict"), ({"threshold": "stored"}, name != "strict"), ({"threshold": "none"}, True),
                ({"threshold": 0}, True), ({"threshold": 1}, False), ({"threshold": 1.0}, False),
            ):  # fmt: skip
                body = body_of(image_input(BASE64[0]), parameters=parameters)
                found = outputs_of(await client.post(url, json=body))
                assert found["known"] == {"name": "known", "datatype": "BOOL", "shape": [1], "data": [known]}
                assert found["label"]["data"] == [best.label if known else ""]
                assert found["class"]["data"] == [int(best.logits.argmax())], "the likeliest, also of an unknown"
        body = body_of(image_input(BASE64[0]), outputs=[{"name": "known", "parameters": {"binary_data": True}}])
        answer = await client.post("/v2/models/strict/infer", json=body)
        assert answer.content[int(answer.headers["Inference-Header-Content-Length"]) :] == b"\0"
        model = (await client.get("/v2/models/a")).json()
        assert {"name": "known", "datatype": "BOOL", "shape": [-1]} in model["outputs"]
        features = outputs_of(await client.post("/v2/models/features/infer", json=body_of(image_input(BASE64[0]))))
        assert list(features) == ["features"]
        for bad in (-0.1, 1.1, "0.5", "None", True, None, [0.5], 10**400):
            body = body_of(image_input(BASE64[0]), parameters={"threshold": bad})
            answer = await client.post("/v2/models/a/infer", json=body)
            assert answer.status_code == 400
            assert re.search('^"threshold": .*: expected a number from 0 to 1, "none" or', answer.json()["error"])

    serve(judging, work)


FLOAT = {"name": "pixels", "datatype": "FP32", "shape": [1, 3, 48, 48]}


@pytest.mark.parametrize(
    ("url", "body", "status", "text"),
    [
        ("/v2/nowhere", {}, 404, "no such path"),
        ("/v2/health/live", {}, 405, "does not take this method"),
        ("/v2/models/zebra/infer", body_of(image_input(BASE64[0])), 404, "no task 'zebra'"),
        ("/v2/models/feature/infer", body_of(image_input(BASE64[0])), 404, "there are: features"),
        ("/v2/models/a@1/versions/1/infer", body_of(image_input(BASE64[0])), 400, "expected one of"),
        ("/v2/models/a/versions/9/infer", body_of(image_input(BASE64[0])), 404, "no version 9"),
        ("/v2/models/a/infer", [], 400, "the body: expected a JSON object"),
        ("/v2/models/a/infer", {}, 400, "expected one input"),
        ("/v2/models/a/infer", body_of(), 400, "expected one input"),
        ("/v2/models/a/infer", body_of(image_input(BASE64[0]), image_input(BASE64[0])), 400, "expected one input"),
        ("/v2/models/a/infer", body_of(image_input(BASE64[0]), id=3), 400, '"id": expected text'),
        ("/v2/models/a/infer", body_of(image_input(BASE64[0]), id="\ud800"), 400, '"id": expected text'),
        ("/v2/models/a/infer", body_of(image_input("AAAA")), 400, "image 0: image of "),
        ("/v2/models/a/infer", body_of(image_input(BASE64[0], "AAAA")), 400, "image 1: image of "),
        ("/v2/models/a/infer", body_of(image_input("")), 400, "image 0: expected a file's bytes"),
        ("/v2/models/a/infer", body_of(image_input("?")), 400, "image 0: expected base64"),
        ("/v2/models/a/infer", body_of(image_input(BASE64[0], shape=[2])), 400, "1 elements: its shape says 2"),
        ("/v2/models/a/infer", body_of(image_input(BASE64[0], shape=[1, 2])), 400, "expected 'BYTES' \\[n\\]"),
        ("/v2/models/a/infer", body_of(image_input(BASE64[0], shape=[-1])), 400, "expected a shape"),
        ("/v2/models/a/infer", body_of(image_input(BASE64[0], datatype="FP32")), 400, "expected 'BYTES'"),
        ("/v2/models/a/infer", body_of(image_input(BASE64[0], name="x")), 400, 'expected "image" or "pixels"'),
        ("/v2/models/a/infer", body_of(image_input(*["AAAA"] * 9)), 413, "9 images: the limit is 8"),
        ("/v2/models/a/infer", body_of({**FLOAT, "shape": [9, 3, 48, 48], "data": []}), 413, "9 images: the limit"),
        ("/v2/models/a/infer", body_of({**FLOAT, "data": [1.0]}), 400, "expected 6912 numbers"),
        ("/v2/models/a/infer", body_of({**FLOAT, "data": ["1"] * 6912}), 400, "expected 6912 numbers"),
        ("/v2/models/a/infer", body_of({**FLOAT, "data": [None] * 6912}), 400, "expected 6912 numbers"),
        (
            "/v2/models/a/infer",
            body_of({**FLOAT, "data": ["1" * 100_000, *[1.0] * 6911]}),
            400,
            "expected 6912 numbers",
        ),
        ("/v2/models/a/infer", body_of({**FLOAT, "data": [True] * 6912}), 400, "expected 6912 numbers"),
        ("/v2/models/a/infer", body_of({**FLOAT, "data": [[1], [2, 3]]}), 400, "expected 6912 numbers"),
        ("/v2/models/a/infer", body_of({**FLOAT, "data": [10**400] * 6912}), 400, "expected 6912 numbers"),
        ("/v2/models/a/infer", body_of({**FLOAT, "data": [1e300] * 6912}), 422, "image 0: .*NaN or infinity"),
        ("/v2/models/a/infer", body_of({**FLOAT, "datatype": "FP16", "data": [1.0] * 6912}), 400, "as a binary tensor"),
        ("/v2/models/a/infer", body_of({**FLOAT, "datatype": "INT8", "data": []}), 400, "expected FP32, FP16 or BF16"),
        ("/v2/models/a/infer", body_of({**FLOAT, "datatype": [], "data": []}), 400, "expected FP32, FP16 or BF16"),
        (
            "/v2/models/a/infer",
            body_of({**FLOAT, "shape": [1, 3, 2, 2], "data": [0.5] * 12}),
            400,
            "expects shape \\[3, 48",
        ),
        ("/v2/models/a/infer", body_of(FLOAT), 400, 'expected either "data"'),
        ("/v2/models/a/infer", body_of({**FLOAT, "parameters": {"binary_data_size": 4}}), 400, "0 bytes follow"),
        (
            "/v2/models/a/infer",
            body_of(image_input(BASE64[0]), outputs=[{"name": "logits"}]),
            400,
            "no output 'logits'",
        ),
        ("/v2/models/a/infer", body_of(image_input(BASE64[0]), outputs=[{}]), 400, 'expected a "name" in each'),
        (
            "/v2/models/a/infer",
            body_of(image_input(BASE64[0]), outputs=[{"name": "label"}] * 2),
            400,
            "each output once",
        ),
        (
            "/v2/models/a/infer",
            body_of(image_input(BASE64[0]), outputs=[{"name": "label", "parameters": {"classification": 3}}]),
            400,
            "'classification' is not known",
        ),
    ],
)
def test_what_is_refused_in_the_protocols_form(shared: Router, url: str, body: Any, status: int, text: str) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        response = await client.post(url, content=json.dumps(body))
        assert response.status_code == status, response.text
        assert response.headers["content-type"] == "application/json"
        assert list(response.json()) == ["error"]
        assert re.search(text, response.json()["error"]), response.json()

    serve(shared, work, limits=RequestLimits(images=8))


@pytest.mark.parametrize(
    ("length", "tail", "text"),
    [
        (None, b"", "0 bytes follow the JSON: expected 12"),
        (10**9, b"", "the body has"),
        (-1, b"", "the body has"),
        (0, b"\xff", "image 0: image of "),
        ("whole", b"x" * 11, "11 bytes follow the JSON: expected 12"),
        ("whole", struct.pack("<I", 9) + b"x" * 8, "before an element of 9 bytes"),
        ("whole", struct.pack("<I", 5) + b"x" * 5 + b"abc", "within an element's length"),
        ("whole", struct.pack("<I", 0) + struct.pack("<I", 4) + b"abcd", "2 elements: its shape says 1"),
        ("whole", struct.pack("<I", 8) + b"x" * 8, "not an image"),
    ],
)
def test_binary_tensors_that_are_cut(shared: Router, length: int | str | None, tail: bytes, text: str) -> None:
    given = {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 12}}
    head = json.dumps(body_of(given)).encode()

    async def work(client: httpx.AsyncClient) -> None:
        size = len(head) if length == "whole" else length
        headers = {} if size is None else {"Inference-Header-Content-Length": str(size)}
        response = await client.post("/v2/models/a/infer", content=tail if size == 0 else head + tail, headers=headers)
        assert response.status_code == 400
        assert text in response.json()["error"]

    serve(shared, work)


def test_all_images_of_a_request_run_in_one_version(
    held: HeldRouter, filled: Path, task_maker: Callable[..., Task]
) -> None:
    """A new version comes while they wait; it has other classes."""
    expected = held.lookup("b")

    async def work(client: httpx.AsyncClient) -> None:
        batcher = service_of(client).batcher
        asking = asyncio.create_task(client.post("/v2/models/b/infer", json=body_of(image_input(*BASE64[:4]))))
        while not batcher._flow.running:
            await asyncio.sleep(0.002)
        with Store(filled) as store:
            store.add(task_maker("b", seed=70, classes=7))
        await client.post("/v1/refresh")
        held.go.set()
        answer = await asking
        assert answer.json()["model_version"] == "1"
        assert outputs_of(answer)["probabilities"]["shape"] == [4, len(expected.task.labels)]
        answer = await client.post("/v2/models/b/infer", json=body_of(image_input(BASE64[0])))
        assert answer.json()["model_version"] == "2"
        assert (await client.get("/v2/models/b")).json()["versions"] == ["1", "2"]

    serve(held, work, batcher=Batcher(held, max_batch=1, workers=1))


def test_health_follows_the_server(held: HeldRouter) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        assert (await client.get("/v2/health/ready")).json() == {"ready": True}
        assert (await client.get("/v2/models/a/ready")).json() == {"name": "a", "ready": True}
        await service_of(client).batcher.close()
        for url in ("/v2/health/ready", "/v2/models/a/ready"):
            ended = await client.get(url)
            assert ended.status_code == 503
            assert "shutting down" in ended.json()["error"]
        assert (await client.get("/v2/health/live")).json() == {"live": True}

    serve(held, work)
