"""A trained task in other number formats: what is rounded, what stays, and that its figures are of after."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from pear_store import Store, Task, make_task, read_checkpoint
from pear_store.format.codes import matrix_values
from pear_store.format.record import Matrix
from pear_train import open_dataset, train
from pear_train.cli import main
from pear_train.dtypes import Written, code_bits
from pear_train.errors import ConfigError
from pear_train.report import stored_bytes
from pear_train.rounding import round_task
from router import Backbone, Preprocess, Router
from router.tensors import fake_quantise
from tests.pear_train.test_bases import bases as bases
from tests.pear_train.test_bases import config
from tests.pear_train.test_bases import sources as sources
from tests.pear_train.test_many import folder as folder  # the same data

pytestmark = pytest.mark.slow

FORMS: dict[str, dict[str, Any]] = {
    "pruned and shared": {"rank": 4, "ratio": 0.75, "prune_epoch": 2},
    "pruned, with scales": {"rank": 4, "ratio": 0.5, "borrow": "scale", "prune_epoch": 2},
    "knowledge in few bits": {"rank": 4, "ratio": 0.5, "knowledge": "lowbit", "borrow": "scale", "prune_epoch": 2},
    "unpruned": {"rank": 2, "method": "adapters", "tensor_dtype": "F32"},
    "on bases": {"own_rank": 2, "own_bytes": 3000, "prune_epoch": 2},
    "linear": {"method": "linear"},
}


@pytest.fixture(scope="module")
def tasks(
    bases: Task,
    folder: Path,
    backbone: Backbone,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Task]:
    made, data = tmp_path_factory.mktemp("tasks"), open_dataset(str(folder / "t0.npz"))
    for i, (form, options) in enumerate(FORMS.items()):
        on = bases if form == "on bases" else None
        train(config("t0", **options, threshold_accuracy=0.5), backbone, data, made / str(i), bases=on)
    return {form: read_checkpoint(made / str(i)) for i, form in enumerate(FORMS)}


def rounded(task: Task, backbone: Backbone, folder: Path, out: Path, **formats: Any) -> Task:
    round_task(task, backbone, open_dataset(str(folder / "t0.npz")), out, **formats)
    return read_checkpoint(out)


def values(matrix: Matrix, task: Task) -> torch.Tensor:
    return torch.from_numpy(matrix_values(matrix, task.tensors).astype("f4"))


def as_codes(matrix: Matrix, task: Task, dtype: Written | None) -> torch.Tensor:
    bits = None if dtype is None else code_bits(dtype)
    there = values(matrix, task)
    return there if bits is None else fake_quantise(there, bits, matrix.rank_axis)


@pytest.mark.parametrize("form", FORMS)
def test_every_matrix_of_its_own_is_rounded_and_nothing_else(
    form: str,
    tasks: dict[str, Task],
    bases: Task,
    folder: Path,
    backbone: Backbone,
    tmp_path: Path,
) -> None:
    task, wanted = tasks[form], {"head_dtype": "Q8"}
    if task.adapters:
        wanted |= {"tensor_dtype": "Q4"}
    if any(one.core for one in task.adapters.values()):
        wanted |= {"core_dtype": "Q2"}
    made = rounded(task, backbone, folder, tmp_path / "q", **wanted)
    assert list(made.positions) == list(task.positions)
    for position, branches in task.positions.items():
        for before, after in zip(branches, made.positions[position], strict=True):
            assert before.scale == after.scale
            one, other = task.adapters[before.adapter], made.adapters[after.adapter]
            shared = one.role == "knowledge" or (form == "on bases" and one.core is not None)
            around: Written | None = None if shared else "Q4"
            pairs: list[tuple[Matrix, Matrix, Written | None]] = [
                (one.down, other.down, around),
                (one.up, other.up, around),
            ]
            if one.core is not None:
                assert other.core is not None
                pairs.append((one.core, other.core, "Q2"))
            for old, new, dtype in pairs:
                torch.testing.assert_close(values(new, made), as_codes(old, task, dtype), atol=0, rtol=1e-6)
                assert new.bits == (old.bits if dtype is None else code_bits(dtype))
    head, now = task.head, made.head
    assert head is not None and now is not None and now.weight.bits == 8
    torch.testing.assert_close(values(now.weight, made), as_codes(head.weight, task, "Q8"), atol=0, rtol=1e-6)
    assert sum(stored_bytes(made)) < sum(stored_bytes(task))
    assert made.record["format"] == task.record["format"]
    assert wanted.items() <= made.record["training"].items()
    if form == "on bases":
        assert {t.digest for t in bases.tensors.values()} <= {t.digest for t in made.tensors.values()}
    again = rounded(made, backbone, folder, tmp_path / "again", **wanted)
    assert again.tensors.keys() == made.tensors.keys()
    assert all(again.tensors[name] == raw for name, raw in made.tensors.items()), "codes are rounded to themselves"


def test_figures_are_those_of_the_rounded_task(
    tasks: dict[str, Task],
    folder: Path,
    backbone: Backbone,
    tmp_path: Path,
) -> None:
    task, data = tasks["on bases"], open_dataset(str(folder / "t0.npz"))
    out = tmp_path / "q"
    made = round_task(task, backbone, data, out, "Q2", "Q2", "Q2", name="small")
    back = read_checkpoint(out)
    assert (made.task, back.name) == ("small", "small") and made.file_bytes == out.stat().st_size
    router = Router(backbone)
    router.add(back)
    images = Preprocess(task.preprocess)([data.val.image(i) for i in range(len(data.val))])
    found = np.stack([logits.numpy() for logits in router.run(images, "small").logits]).argmax(1)
    val = float((found == data.val.targets.numpy()).mean())
    assert made.top1["val"][0] == task.record["metrics"]["val_top1"]
    assert made.top1["val"][1] == pytest.approx(val)
    assert back.record["metrics"]["val_top1"] == made.top1["val"][1]
    assert back.record["metrics"]["test_top1"] == made.top1["test"][1]
    assert made.threshold == (task.record["threshold"], back.record.get("threshold"))
    told = back.record["training"]["rounded"]
    assert told["from"] == {"tensor_dtype": "F16", "core_dtype": "F16", "head_dtype": "F16"}
    assert told["data"] == data.fingerprint and told["loss"]["val"] == list(made.loss["val"])
    assert made.adapter_bytes < stored_bytes(task)[0] / 3, "of 16 bits, with a scale for each index"


def test_cores_keep_their_format_if_adapters_alone_are_rounded(
    tasks: dict[str, Task],
    folder: Path,
    backbone: Backbone,
    tmp_path: Path,
) -> None:
    made = rounded(tasks["pruned and shared"], backbone, folder, tmp_path / "q", tensor_dtype="Q8")
    assert {one.core.bits for one in made.adapters.values() if one.core is not None} == {None}
    assert made.record["training"]["core_dtype"] == "F16", "what auto meant before"
    floats = rounded(made, backbone, folder, tmp_path / "f", tensor_dtype="F32", core_dtype="BF16")
    assert {one.down.bits for one in floats.adapters.values()} == {None}
    one = next(name for name, adapter in made.adapters.items() if adapter.core is not None)
    torch.testing.assert_close(
        values(floats.adapters[one].down, floats), values(made.adapters[one].down, made), atol=0, rtol=0
    )
    core = floats.adapters[one].core
    assert core is not None and floats.tensors[core.name].dtype == "BF16"


def test_tasks_of_other_programs_are_rounded(
    tasks: dict[str, Task], folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    """What a record says of training is not needed, and may be wrong."""
    for number, training in enumerate(({"method": "lora"}, {"rounded": "yes", "threshold_accuracy": "x"})):
        plain = tasks["unpruned"]
        task = make_task({**plain.record, "training": training}, plain.tensors)
        made = rounded(task, backbone, folder, tmp_path / str(number), tensor_dtype="Q8", head_dtype="Q8")
        assert made.record["training"]["rounded"]["from"] == {"tensor_dtype": "F32", "head_dtype": "F16"}
        assert made.record["training"]["tensor_dtype"] == "Q8" and "threshold" not in made.record


def test_mistakes(
    tasks: dict[str, Task],
    sources: list[Task],
    bases: Task,
    folder: Path,
    backbone: Backbone,
    tmp_path: Path,
) -> None:
    data, out = open_dataset(str(folder / "t0.npz")), tmp_path / "x"
    plain, linear = tasks["unpruned"], tasks["linear"]
    banked = tmp_path / "banked"
    train(config("t0", rank=4, ratio=0.5, prune_epoch=2), backbone, data, banked, bank=sources)
    cores_alone = tmp_path / "cores"
    train(config("t0", epochs=2), backbone, data, cores_alone, bases=bases)
    body = {name: raw for name, raw in plain.tensors.items() if not name.startswith("head.")}
    headless = make_task({**plain.record, "head": None, "labels": []}, body)
    cases: list[tuple[Task, dict[str, Any], str]] = [
        (plain, {}, "task 't0': expected a number format to round to: give tensor, core or head dtype"),
        (plain, {"core_dtype": "Q4"}, "task 't0': it has no cores: leave core dtype out"),
        (linear, {"tensor_dtype": "Q4"}, "task 't0': it has no adapters of its own: leave tensor dtype out"),
        (read_checkpoint(cores_alone), {"tensor_dtype": "Q4"}, "it has no adapters of its own"),
        (bases, {"tensor_dtype": "Q4"}, "task 'common': it is common bases, which stay floats: give a task"),
        (read_checkpoint(banked), {"tensor_dtype": "Q4"}, "it has adapters of a base set or a bank, and a store"),
        (headless, {"head_dtype": "Q4"}, "task 't0': it has no head, so it cannot be evaluated: give a task"),
        (tasks["pruned and shared"], {"core_dtype": "auto"}, "core dtype 'auto' is no format to round to: name one"),
    ]
    for task, formats, message in cases:
        with pytest.raises(ConfigError, match=message):
            round_task(task, backbone, data, out, **formats)
    far = make_task({**plain.record, "backbone": {"model": "x", "digest": "sha256:" + "0" * 64}}, plain.tensors)
    with pytest.raises(ConfigError, match="task 't0': expected its backbone x sha256:0+…, found pear_tiny "):
        round_task(far, backbone, data, out, head_dtype="Q4")
    with pytest.raises(ConfigError, match="task 't0': expected data of its"):
        round_task(plain, backbone, open_dataset(str(folder / "t2.npz")), out, head_dtype="Q4")
    assert not out.exists()
    less = rounded(read_checkpoint(banked), backbone, folder, tmp_path / "less", head_dtype="Q4", core_dtype="Q4")
    with pytest.raises(ConfigError, match="it has adapters of a base set or a bank"):
        round_task(less, backbone, data, out, "Q4")


def test_command(tasks: dict[str, Task], folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    def run(*args: object) -> Any:
        return CliRunner().invoke(main, [str(arg) for arg in args], catch_exceptions=False)

    with Store.create(tmp_path / "s") as store:
        store.add(tasks["pruned and shared"])
    asked = ("small", "--round", "t0", "--from-store", tmp_path / "s", "--data", folder / "t0.npz", "--out",
             tmp_path / "o")  # fmt: skip
    done = run(*asked, "--head-dtype", "Q4", "--tensor-dtype", "Q4", "--core-dtype", "Q8", "--epochs", 3)
    assert done.exit_code == 0, done.stderr
    assert "now tensor Q4, core Q8, head Q4; " in done.stdout and "val: " in done.stdout
    assert "common bases" not in done.stdout
    assert "note      --epochs has no effect: a task that is rounded keeps its own options\n" in done.stderr
    assert read_checkpoint(tmp_path / "o").name == "small"
    twice = run(*asked, "--head-dtype", "Q4")
    assert twice.exit_code == 1 and "there is already a task checkpoint" in twice.stderr
    over = run(*asked, "--head-dtype", "Q4", "--overwrite", "--json")
    assert json.loads(over.stdout)["head_bytes"] < stored_bytes(tasks["pruned and shared"])[2]
    nothing = run(*asked, "--overwrite")
    assert nothing.exit_code == 2 and "--round needs --tensor-dtype, --core-dtype or" in nothing.stderr
    trained = run("small", "--data", folder / "t0.npz", "--out", tmp_path / "o")
    assert trained.exit_code == 1 and "trained already, but differently" in trained.stderr
    for args, message in (
        (("--tasks", "d", "--round", "x"), "--round takes no --tasks: it only writes one task anew"),
        (("t", "--data", "d", "--round", "x", "--bases", "b"), "--round takes no --bases: it only"),
        (("t", "--data", "d", "--round", "x", "--plot"), "--round takes no --plot: it only"),
    ):
        refused = run(*args, "--out", tmp_path / "p")
        assert refused.exit_code == 2 and message in refused.stderr
