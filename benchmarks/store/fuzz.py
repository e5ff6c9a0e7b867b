#!/usr/bin/env python3
"""Coverage-guided fuzzing of the store's readers with atheris (pip install atheris).

    python -m benchmarks.store.fuzz checkpoint -max_total_time=300 runs/checkpoints
    python -m benchmarks.store.fuzz pack -max_total_time=300 runs/packs
    python -m benchmarks.store.fuzz row -max_total_time=300 runs/rows

    checkpoint  a task checkpoint
    pack        a pack's header, records and manifests
    row         a row of the index

Options and corpus folders are libFuzzer's; an empty folder is begun with what Pear itself writes. Checksums and lengths
are made right, for to guess them would be all that a fuzzer does. Any exception but our own, 2 GiB of memory or 10
seconds for one input end the run with the input.
"""

import hashlib
import json
import sys
import tempfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["pear_store"]):
    from pear_store import PearStoreError, Store, write_checkpoint
    from pear_store.format.checkpoint import task_from_container
    from pear_store.format.container import parse_container, read_header
    from pear_store.format.manifest import manifest_digests
    from pear_store.format.pack import records_in
    from pear_store.local.rows import (
        ContentsRow,
        ManifestRow,
        NameRow,
        PackRow,
        RemovedRow,
        TagRow,
        TensorRow,
        VersionRow,
        parse_tag_key,
        parse_version_key,
        sealed,
    )
from tests.helpers.makers import small_task

ROWS: dict[str, list[Callable[[bytes, bytes], object]]] = {
    "tensors": [
        TensorRow.decode, lambda key, row: TensorRow.peek(row), lambda key, row: TensorRow.number_and_length(row),
    ],
    "packs": [PackRow.decode],
    "contents": [lambda key, row: ContentsRow.decode(key, row, 1000)],
    "manifests": [
        ManifestRow.decode, lambda key, row: ManifestRow.unpack(row), lambda key, row: ManifestRow.manifest_of(row),
        lambda key, row: manifest_digests(ManifestRow.manifest_of(row)),
    ],
    "versions": [VersionRow.decode, lambda key, row: parse_version_key(key)],
    "names": [NameRow.decode],
    "tags": [TagRow.decode, lambda key, row: parse_tag_key(key)],
    "removed": [RemovedRow.decode],
}  # fmt: skip
KINDS = list(ROWS)


def checkpoint(content: bytes) -> None:
    header, _, data = content.partition(b"\n")
    whole = len(header).to_bytes(8, "little") + header + data
    for attempt in (content, whole):
        with suppress(PearStoreError):
            task_from_container(*parse_container(BytesIO(attempt), "fuzz"), "fuzz")


def pack(content: bytes) -> None:
    """The header itself; and the first line as a record, the others as manifests."""
    whole = len(content).to_bytes(8, "little") + content
    with suppress(PearStoreError):
        records_in(Path("fuzz"), read_header(BytesIO(whole), "fuzz", len(whole)).metadata)
    text, *manifests = content.decode("utf-8", "replace").split("\n")
    metadata = {hashlib.sha256(one.encode("utf-8", "replace")).hexdigest(): one for one in manifests}
    for number, name in enumerate(metadata):
        text = text.replace(f"${number}", name)
    digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
    with suppress(PearStoreError):
        records, _ = records_in(Path("fuzz"), {"pear": text, "pear.sha256": digest, **metadata})
        records.highest_numbers()
        for version in records.versions:
            with suppress(ValueError):  # what a rebuild names
                manifest_digests(version.manifest)


def row(content: bytes) -> None:
    """A table, the length of its key, the key, and the row without its checksum."""
    if len(content) < 2:
        return
    key, body = content[2 : 2 + content[1]], content[2 + content[1] :]
    kind = KINDS[content[0] % len(KINDS)]
    if kind == "manifests" and len(body) >= 8:
        end = 8 + 4 * int.from_bytes(body[4:8], "little")
        value = zlib.crc32(key + body[8:end]).to_bytes(4, "little") + body[4:]
    else:
        value = sealed(key, body)
    for read in ROWS[kind]:
        with suppress(PearStoreError):
            try:
                read(key, value)
            except ValueError:
                if kind != "manifests":  # there, it says that it is no manifest
                    raise


def begin(target: str, folder: Path) -> None:
    """Writes what Pear itself writes into an empty corpus."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        return
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "task.safetensors"
        write_checkpoint(file, small_task())
        raw = file.read_bytes()
        if target == "checkpoint":
            (folder / "task").write_bytes(raw)
            (folder / "header").write_bytes(raw[8:].replace(b"}}", b"}}\n", 1))
            return
        with Store.create(Path(place) / "store") as store:
            list(store.add_many([small_task(), small_task("other", seed=1)]))
            store.tag("dtd", "prod")
            store.add(small_task(seed=2))
            store.remove("other")
            if target == "row":
                with store._open.read() as view:
                    for table in ROWS:
                        for at, (key, value) in enumerate(view.rows(table)):
                            body = value if table == "manifests" else value[:-4]
                            (folder / f"{table}{at}").write_bytes(bytes([KINDS.index(table), len(key)]) + key + body)
                return
        for at, found in enumerate(sorted((Path(place) / "store" / "packs").rglob("*.safetensors"))):
            header = found.read_bytes()
            header = header[8 : 8 + int.from_bytes(header[:8], "little")]
            metadata = json.loads(header)["__metadata__"]
            lines = [metadata.pop("pear")]
            metadata.pop("pear.sha256")
            for number, (name, manifest) in enumerate(metadata.items()):
                lines[0] = lines[0].replace(name, f"${number}")
                lines.append(manifest)
            (folder / f"header{at}").write_bytes(header)
            (folder / f"record{at}").write_bytes("\n".join(lines).encode())


TARGETS = {"checkpoint": checkpoint, "pack": pack, "row": row}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        print(f"Usage: python -m benchmarks.store.fuzz {'|'.join(TARGETS)} [OPTION]... CORPUS\n\n{__doc__}")
        sys.exit(0 if "--help" in sys.argv else 2)
    target = sys.argv.pop(1)
    folders = [word for word in sys.argv[1:] if not word.startswith("-")]
    if folders:
        begin(target, Path(folders[0]))
    atheris.Setup([*sys.argv, "-max_len=4096", "-rss_limit_mb=2048", "-timeout=10"], TARGETS[target])
    atheris.Fuzz()
