"""Common bases: made from stored tasks, trained on, and tasks that stand on them."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from click.testing import Result as Ran
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pear_store import Store, Task, make_task, read_checkpoint, write_checkpoint
from pear_store.format.codes import matrix_values
from pear_store.format.container import read_container
from pear_train import ConfigError, Job, TrainConfig, make_backbone_bases, make_bases, open_dataset, train, train_many
from pear_train.bank import Bank, stored_adapter
from pear_train.bases import bases_at
from pear_train.cli import main
from pear_train.errors import DivergedError
from pear_train.evaluate import calibrated
from pear_train.fitting import held_energy
from pear_train.group import stack_weights
from pear_train.identity import differences
from pear_train.knowledge import common_bases, in_common_bases
from pear_train.output import partial_path
from pear_train.prune import choose_within
from pear_train.rebase import rebase
from pear_train.recall import scores_of
from pear_train.report import Step, bases_bytes, stored_bytes
from pear_train.run import TaskRun
from pear_train.source_tasks import sources_at
from router import AdaptedBackbone, Backbone, PositionWeights, Preprocess, Router, RouterError, add_branch
from router.exports.plain import PlainModel
from router.tensors import from_torch, to_torch
from tests.pear_train.test_many import folder as folder  # the same data
from tests.pear_train.test_many import matrices

WIDTH, R, POSITIONS = 192, 6, 12
BASES_BYTES = POSITIONS * 2 * WIDTH * R * 2


def config(name: str = "t0", **changes: Any) -> TrainConfig:
    base = {"task": name, "epochs": 4, "batch_size": 16, "dtype": "float32", "select": "last", "lr": 1e-2,
            "positions": "blocks"}  # fmt: skip
    return TrainConfig(**{**base, **changes})


@pytest.fixture(scope="module")
def sources(folder: Path, backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> list[Task]:
    """Two tasks of rank 4: one unpruned, one pruned, whose positions have cores."""
    made = tmp_path_factory.mktemp("sources")
    for i, method in enumerate(("adapters", "pear")):
        told = config(f"t{i}", method=method, rank=4, ratio=0.5, epochs=3, prune_epoch=1)
        train(told, backbone, open_dataset(str(folder / f"t{i}.npz")), made / f"t{i}")
    return [read_checkpoint(made / f"t{i}") for i in range(2)]


@pytest.fixture(scope="module")
def bases(sources: list[Task], backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Task:
    out = tmp_path_factory.mktemp("bases") / "b.safetensors"
    make_bases(config("common", rank=R), backbone, sources, out)
    return read_checkpoint(out)


# ---- the maths ----------------------------------------------------------------------------------------------------


def test_common_bases_hold_all_if_wide_enough_and_more_than_others_if_not() -> None:
    random = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(20, r, generator=random), torch.randn(r, 30, generator=random)) for r in (3, 2)]
    deltas = [down @ up for down, up in pairs]

    def error(d: torch.Tensor, u: torch.Tensor) -> float:
        found = 0.0
        for delta in deltas:
            core = d.t() @ delta @ u.t()  # the best, as both are orthonormal
            found += float((delta - d @ core @ u).square().sum())
        return found

    d, u = common_bases(pairs, 5)
    torch.testing.assert_close(d.t() @ d, torch.eye(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(u @ u.t(), torch.eye(5), atol=1e-5, rtol=0)
    assert error(d, u) < 1e-6
    d, u = common_bases(pairs, 3)
    assert (tuple(d.shape), tuple(u.shape)) == ((20, 3), (3, 30))
    for _ in range(20):
        other = torch.linalg.qr(torch.randn(20, 3, generator=random)).Q
        right = torch.linalg.qr(torch.randn(30, 3, generator=random)).Q.t()
        assert error(d, u) < error(other, right)
    assert error(d, u) <= error(torch.linalg.qr(pairs[0][0]).Q, torch.linalg.qr(pairs[0][1].t()).Q.t())
    for (down, up), delta in zip(pairs, deltas, strict=True):
        torch.testing.assert_close(in_common_bases(down, up, d, u), d.t() @ delta @ u.t(), atol=1e-4, rtol=1e-4)
        # bases that are not orthonormal: least squares
        core = in_common_bases(down, up, 2 * d, u + 0.1 * u.flip(0))
        assert float((2 * d @ core @ (u + 0.1 * u.flip(0)) - d @ d.t() @ delta @ u.t() @ u).abs().max()) < 1e-4


def test_own_adapters_are_kept_by_importance_as_far_as_bytes_reach() -> None:
    importance, sizes = {"a": 1.0, "b": 3.0, "c": 2.0, "d": 2.0}, {"a": 1, "b": 4, "c": 4, "d": 3}
    assert choose_within(importance, sizes, 0) == ["a", "b", "c", "d"]
    assert choose_within(importance, sizes, 8) == ["a", "d"]
    assert choose_within(importance, sizes, 7) == ["a", "c"], "c no longer fits, d does"
    assert choose_within(importance, sizes, 12) == []


# ---- bases as a file ----------------------------------------------------------------------------------------------


def test_bases_are_a_task_without_head_that_adds_nothing(bases: Task, backbone: Backbone, sources: list[Task]) -> None:
    assert bases.head is None and len(bases.positions) == POSITIONS
    assert all(branch.scale == 0 for branches in bases.positions.values() for branch in branches)
    energy = bases.record["training"]["energy"]
    assert energy.keys() == {"t0", "t1"} and all(0.3 < share <= 1 for share in energy.values())
    for position in bases.positions:
        adapter = bases.adapters[bases.positions[position][0].adapter]
        d, u = matrix_values(adapter.down, bases.tensors), matrix_values(adapter.up, bases.tensors)
        np.testing.assert_allclose(d.astype("f4").T @ d, np.eye(R), atol=2e-3)
        np.testing.assert_allclose(u.astype("f4") @ u.T, np.eye(R), atol=2e-3)
    router = Router(backbone)
    router.add(bases)
    images = torch.rand(2, 3, 48, 48)
    bare = AdaptedBackbone(backbone, torch.device("cpu"), torch.float32).features(images, {})
    torch.testing.assert_close(router.run(images, "common").logits, bare, atol=1e-5, rtol=1e-5)


def test_tasks_that_do_not_fit_are_passed_over(
    sources: list[Task], bases: Task, folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    other = Task({**sources[0].record, "task": "far", "backbone": {"model": "x", "digest": "sha256:" + "0" * 64}},
                 sources[0].tensors)  # fmt: skip
    said: list[str] = []
    made = make_bases(config("b", rank=3), backbone, [other, bases, sources[0]], tmp_path / "b", say=said.append)
    assert list(made.energy) == ["t0"]
    assert said == ["note      far is skipped: another backbone", "note      common is skipped: common bases"]
    with pytest.raises(ConfigError, match="bases: none of 1 stored tasks fits pear_tiny"):
        make_bases(config("b"), backbone, [other], tmp_path / "c")
    with pytest.raises(
        ConfigError, match=r"at least 5 directions, the rank, at 'blocks.0.attn', found 4 in 1 task\(s\)"
    ):
        make_bases(config("b", rank=5), backbone, [sources[0]], tmp_path / "c")
    two = [config(f"t{i}", rank=3, img_size=size) for i, size in enumerate((48, 64))]
    data = [open_dataset(str(folder / f"t{i}.npz")) for i in range(2)]
    with pytest.raises(ConfigError, match=r"bases: expected tasks of one input size, found \(48, 48\) and \(64, 64\)"):
        make_bases(config("b", rank=3), backbone, sources, tmp_path / "c", two, data)
    with pytest.raises(ConfigError, match="bases: expected tensor dtype F16, BF16 or F32, found Q4: bases are floats"):
        make_bases(config("b", tensor_dtype="Q4"), backbone, sources, tmp_path / "c")
    with pytest.raises(ConfigError, match="bases: expected activation 'identity', which cores need, found 'relu'"):
        make_bases(config("b", activation="relu", knowledge="none"), backbone, sources, tmp_path / "c")


@pytest.mark.slow
def test_bases_that_are_trained_on_change_and_stay_orthonormal(
    bases: Task, sources: list[Task], folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    configs = [config(f"t{i}", rank=R, epochs=2) for i in (0, 2)]
    data = [open_dataset(str(folder / f"t{i}.npz")) for i in (0, 2)]
    steps: list[Step] = []
    made = make_bases(config("common", rank=R), backbone, sources, tmp_path / "b", configs, data, steps.append)
    assert len(steps) == 2 * 3 and made.val_top1.keys() == {"t0", "t2"}
    again = make_bases(config("common", rank=R), backbone, sources, tmp_path / "c", configs, data)
    assert again.val_top1 == made.val_top1
    assert (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes(), "one seed, one file"
    trained, before = matrices(tmp_path / "b"), bases
    for name, stack in trained.items():
        gram = stack.mT @ stack if name.endswith("down") else stack @ stack.mT
        torch.testing.assert_close(gram, torch.eye(R).expand(POSITIONS, R, R), atol=3e-3, rtol=0)
        assert read_checkpoint(tmp_path / "b").tensors[name].digest != before.tensors[name].digest


# ---- tasks on bases -----------------------------------------------------------------------------------------------


FORMS: list[dict[str, Any]] = [
    {},
    {"own_rank": 2},
    {"own_rank": 2, "own_bytes": 3000, "prune_epoch": 2},
    {"own_rank": 2, "own_bytes": 1000, "prune_epoch": 2, "tensor_dtype": "Q4", "core_dtype": "Q4", "head_dtype": "Q4"},
    {"core_dtype": "Q2", "head_dtype": "Q2"},
    {"core_dtype": "Q8", "head_dtype": "Q8"},
]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_what_is_trained_is_what_is_routed_and_what_a_plain_loop_gives(
    form: dict[str, Any], bases: Task, folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    data, out = open_dataset(str(folder / "t2.npz")), tmp_path / "t2"
    told = config("t2", **form)
    result = train(told, backbone, data, out, bases=bases)
    task = read_checkpoint(out)
    core_bytes = R * R * 2
    if bits := {"Q8": 8, "Q4": 4, "Q2": 2}.get(told.core_dtype):
        core_bytes = R * R * bits // 8 + R * 2
        assert result.history[-1]["val_top1"] == pytest.approx(result.val_top1, abs=1e-6), "trained as written"
    own = 2 * WIDTH * 2 * 2 if told.tensor_dtype == "F16" else 2 * WIDTH * 2 // 2 + 2 * 2 * 2
    kept = POSITIONS if "own_rank" in form else 0
    if "own_bytes" in form:
        kept = POSITIONS - len(result.pruned)
        assert kept == form["own_bytes"] // own >= 1
        assert max(result.importance, key=result.importance.__getitem__) not in result.pruned
        assert result.borrowed == {}
    assert result.adapter_bytes == POSITIONS * core_bytes + kept * own
    assert result.bases_bytes == BASES_BYTES == bases_bytes(task)
    assert stored_bytes(task) == (result.adapter_bytes, 0, result.head_bytes)
    assert result.trainable_params == POSITIONS * R * R + kept * 2 * WIDTH * 2 + 4 * (WIDTH + 1)
    assert task.record["training"]["bases"] == "common"
    shared = {tensor.digest for tensor in bases.tensors.values()}
    assert shared <= {tensor.digest for tensor in task.tensors.values()}

    router = Router(backbone)
    router.add(task)
    images = Preprocess(task.preprocess)([data.val.image(i) for i in range(8)])
    weights = {}
    for position, branches in task.positions.items():
        delta = torch.zeros(WIDTH, WIDTH)
        for branch in branches:  # scale · down · core · up, in float32
            adapter = task.adapters[branch.adapter]
            product = np.eye(WIDTH, dtype="f4")
            for matrix in adapter.matrices:
                product = product @ matrix_values(matrix, task.tensors).astype("f4")
            delta += branch.scale * torch.from_numpy(product)
        weights[position] = delta
    expected = plain_features(backbone, images, weights)
    assert task.head is not None
    weight = matrix_values(task.head.weight, task.tensors).astype("f4")
    assert task.head.weight.bits == {"Q8": 8, "Q4": 4, "Q2": 2}.get(told.head_dtype)
    logits = expected @ torch.from_numpy(weight).t() + matrices(out)["head.bias"]
    torch.testing.assert_close(router.run(images, "t2").logits, logits, atol=2e-4, rtol=2e-4)


def plain_features(backbone: Backbone, images: torch.Tensor, deltas: dict[str, torch.Tensor]) -> torch.Tensor:
    """The backbone's features with x · delta added to each module's output."""
    module: Any = backbone.sized((images.shape[2], images.shape[3]))
    hooks = [
        module.get_submodule(position).register_forward_hook(lambda _, given, out, delta=delta: out + given[0] @ delta)
        for position, delta in deltas.items()
    ]
    try:
        with torch.no_grad():
            found: torch.Tensor = module(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@pytest.mark.slow
def test_two_tasks_share_their_bases_in_a_store(bases: Task, folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    for i in (0, 2):
        train(config(f"t{i}", epochs=2), backbone, open_dataset(str(folder / f"t{i}.npz")), tmp_path / f"t{i}",
              bases=bases)  # fmt: skip
    with Store.create(tmp_path / "s") as store:
        store.add(bases)
        own = 0
        before = store.stats().unique_bytes
        for i in (0, 2):
            added, task = store.add(tmp_path / f"t{i}"), read_checkpoint(tmp_path / f"t{i}")
            own += sum(stored_bytes(task))
            assert added.shared_bytes == BASES_BYTES
            assert added.new_bytes == sum(stored_bytes(task)) == task.size_bytes - BASES_BYTES
        assert (before, store.stats().unique_bytes) == (BASES_BYTES, BASES_BYTES + own)
        shared = {tensor.digest for tensor in bases.tensors.values()}
        assert shared <= set(store.get("t0").tensors)
        store.remove("common")
        store.gc()
        assert shared <= set(store.get("t2").tensors), "as long as a task names them"


@pytest.mark.slow
def test_a_task_on_bases_is_the_same_from_its_file_and_from_a_store(
    bases: Task, folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    """Its file has one tensor beside the bases. All else has its cores, scales and head by themselves."""
    names = ["t0", "t2"]
    for name, form in zip(names, ({}, FORMS[3]), strict=True):
        data = open_dataset(str(folder / f"{name}.npz"))
        train(config(name, epochs=2, **{**form, "prune_epoch": 1}), backbone, data, tmp_path / name, bases=bases)
        metadata, tensors = read_container(tmp_path / name)
        assert json.loads(metadata["pear"])["format"] == "pear-task/3"
        common = {tensor.digest for tensor in bases.tensors.values()}
        assert [tensor.dtype for tensor in tensors.values() if tensor.digest not in common] == ["U8"]
    files, images = Router(backbone), torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(4))
    expected = {name: files.run(images, files.add(tmp_path / name)).logits for name in names}
    with Store.create(tmp_path / "s") as store:
        for name in names:
            store.add(tmp_path / name)
        router = Router(backbone, store)
        together = router.run_all(images, names)
        for name in names:
            torch.testing.assert_close(router.run(images, name).logits, expected[name], atol=0, rtol=0)
            torch.testing.assert_close(together[name].logits, expected[name], atol=2e-5, rtol=2e-5)
            plain = PlainModel(backbone, store.get(name)).eval()
            torch.testing.assert_close(plain(images), expected[name], atol=2e-4, rtol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS[:1] + FORMS[3:4])
def test_an_interrupted_run_on_bases_ends_in_the_same_file(
    form: dict[str, Any], bases: Task, folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    data, told = open_dataset(str(folder / "t1.npz")), config("t1", select="best", **form)
    train(told, backbone, data, tmp_path / "whole", bases=bases)
    for stopped in (1, 3):
        out = tmp_path / f"out{stopped}"

        def stop(step: Step, stopped: int = stopped) -> None:
            if step.epoch == stopped + 1:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            train(told, backbone, data, out, stop, bases=bases)
        assert partial_path(out).exists()
        seen: list[Step] = []
        train(told, backbone, data, out, seen.append, bases=bases)
        assert seen[0].epoch == stopped + 1
        assert out.read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.slow
def test_tasks_on_bases_train_together_as_alone(
    bases: Task, folder: Path, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms = {0: {}, 2: {**FORMS[2], "own_bytes": 6144}}  # room for two own adapters in F32
    jobs = [
        Job(config(f"t{i}", tensor_dtype="F32", **form), partial(open_dataset, str(folder / f"t{i}.npz")),
            tmp_path / f"t{i}")
        for i, form in forms.items()
    ]  # fmt: skip
    steps: list[dict[str, PositionWeights]] = []

    def stack(weights: Any) -> dict[str, PositionWeights]:
        steps.append(stack_weights(weights))
        return steps[-1]

    monkeypatch.setattr("pear_train.group.stack_weights", stack)
    assert len(list(train_many(jobs, backbone, together=2, bases=bases))) == 2
    shapes = {
        (one.down.shape, one.up.shape, one.core.shape)
        for step in steps
        for one in step.values()
        if one.core is not None
    }
    assert shapes == {((WIDTH, R), (R, WIDTH), (2, R, R))}, "one product with the bases for both tasks"
    assert all(len(step) == POSITIONS for step in steps)
    for job in jobs:
        train(job.config, backbone, job.dataset(), tmp_path / "alone", bases=bases)
        alone, together = matrices(tmp_path / "alone"), matrices(job.out)
        assert alone.keys() == together.keys()
        for name, tensor in alone.items():
            torch.testing.assert_close(together[name], tensor, atol=4e-3, rtol=4e-2, msg=f"{job.config.task} {name}")


def random_weights(seed: int, widths: tuple[int, int], rank: int) -> PositionWeights:
    random = torch.Generator().manual_seed(seed)
    down, up = torch.randn(widths[0], rank, generator=random), torch.randn(rank, widths[1], generator=random)
    return PositionWeights(down, up, "identity")


def delta_of(added: PositionWeights) -> torch.Tensor:
    """What a position adds, as one matrix."""
    delta = added.down @ (added.up if added.core is None else added.core @ added.up)
    return delta if added.beside is None else delta + delta_of(added.beside)


@pytest.mark.parametrize("bases_each", ["one", "several"])
def test_what_tasks_add_together_is_what_each_adds_alone(bases_each: str) -> None:
    """With and without an own part, on bases or not, or nothing at all; on one bases, or each on its own."""
    random = torch.Generator().manual_seed(0)
    widths = {"a": (6, 9), "b": (5, 5)}
    common = {p: random_weights(7, widths[p], 3) for p in widths}

    def on_bases(task: int, own: int) -> dict[str, PositionWeights]:
        found = {}
        for p in widths:
            bases = common[p] if bases_each == "one" else random_weights(10 + task, widths[p], 3)
            beside = random_weights(20 + task, widths[p], own) if own else None
            found[p] = replace(bases, core=torch.randn(3, 3, generator=random), beside=beside)
        return found

    tasks: list[dict[str, PositionWeights]] = [
        on_bases(0, 0), on_bases(1, 2), {"b": random_weights(3, widths["b"], 4)}, {}, on_bases(4, 1),
    ]  # fmt: skip
    stacked = stack_weights(tasks)
    assert stacked.keys() == widths.keys()
    for position, (d_in, d_out) in widths.items():
        assert (stacked[position].core is not None) == (bases_each == "one")
        x, y = torch.randn(2 * len(tasks), 4, d_in, generator=random), torch.randn(2 * len(tasks), 4, d_out)
        together = add_branch(y, x, stacked[position]).split(2)
        for i, task in enumerate(tasks):
            alone = y[2 * i : 2 * i + 2]
            if position in task:
                alone = alone + x[2 * i : 2 * i + 2] @ delta_of(task[position])
            torch.testing.assert_close(together[i], alone, atol=1e-4, rtol=1e-4)


def test_branches_on_bases_that_are_dropped_are_made_up_for(bases: Task, folder: Path, backbone: Backbone) -> None:
    adapted = AdaptedBackbone(backbone, torch.device("cpu"), torch.float32, for_training=True)
    told = config(own_rank=2, drop_branch=0.5)
    run = TaskRun(told, adapted, open_dataset(str(folder / "t0.npz")), bases=bases)
    with torch.no_grad():
        for parameter in (*run.adapters.cores().values(), *run.adapters.up.values()):
            parameter.normal_(generator=run.generator)
    whole, kept = run.adapters.position_weights(), run.step_weights()
    assert 0 < len(kept) < POSITIONS
    for position, added in kept.items():
        assert added.down is whole[position].down and added.up is whole[position].up, "bases stay common"
        torch.testing.assert_close(delta_of(added), 2 * delta_of(whole[position]), atol=1e-4, rtol=1e-4)


def test_controls_of_the_score(bases: Task, folder: Path, backbone: Backbone) -> None:
    data = open_dataset(str(folder / "t0.npz"))
    adapted = AdaptedBackbone(backbone, torch.device("cpu"), torch.float32, for_training=True)
    kept = {}
    for importance in ("first", "random"):
        run = TaskRun(config(own_rank=1, own_bytes=4 * 768, importance=importance), adapted, data, bases=bases)
        run.prune()
        kept[importance] = [p for p in run.adapters.own if p not in run.pruned]
        assert [len(branches) for p, branches in run.adapters.branches.items() if p in run.pruned] == [1] * 8
    assert kept["first"] == [f"blocks.{i}.{part}" for i in range(2) for part in ("attn", "mlp")]
    assert len(kept["random"]) == 4 and kept["random"] != kept["first"]


def test_pruned_adapters_are_taken_over_by_cores(bases: Task, folder: Path, backbone: Backbone) -> None:
    data = open_dataset(str(folder / "t0.npz"))
    adapted = AdaptedBackbone(backbone, torch.device("cpu"), torch.float32, for_training=True)
    for knowledge in ("fold", "none"):
        told = config(own_rank=2, own_bytes=0, importance="first", knowledge=knowledge)
        run = TaskRun(told, adapted, data, bases=bases)
        with torch.no_grad():
            for (position, name), up in zip(run.adapters.own.items(), run.adapters.up.values(), strict=True):
                d, u = run.adapters.matrices(run.adapters.branches[position][0].adapter)
                run.adapters.down[name].copy_(d[:, :2])  # all of it within reach of the cores
                up.copy_(torch.randn(2, R, generator=run.generator) @ u)
        before = {p: delta_of(w) for p, w in run.adapters.position_weights().items()}
        run.prune()
        after = {p: delta_of(w) for p, w in run.adapters.position_weights().items()}
        for position, delta in before.items():
            if knowledge == "fold":
                torch.testing.assert_close(after[position], delta, atol=5e-3, rtol=5e-3)
            else:
                assert not after[position].any() and delta.any()


# ---- mistakes -----------------------------------------------------------------------------------------------------


def changed(bases: Task, **record: Any) -> Task:
    return Task({**bases.record, **record}, bases.tensors)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ("stranger", {}, "found ones of x sha256:000000000000…: make bases with this backbone"),
        ("task", {}, "bases 't0': expected common bases, found a task: give a checkpoint that --make-bases wrote"),
        ("", {"positions": "mlp,attn,qkv"}, "bases 'common': have nothing at 'blocks.0.attn.qkv': leave positions out"),
        ("", {"rank": 8}, "bases 'common': expected rank 6, found 8: leave rank out, or choose other bases"),
        ("", {"method": "linear"}, "bases 'common': expected method 'pear', found 'linear'"),
        ("", {"activation": "relu", "knowledge": "none"}, "bases 'common': its activation is 'identity': train"),
        ("", {"own_bytes": 9, "knowledge": "exact"}, "bases 'common': expected knowledge 'fold' or 'none' on"),
        ("", {"own_bytes": 767}, "own bytes 767: expected at least 768, which the smallest adapter of rank 1 takes"),
        ("", {"own_bytes": 9, "own_rank": 2, "tensor_dtype": "Q4"}, "own bytes 9: expected at least 392, which the"),
        ("", {"own_rank": 193}, "own rank 193: expected at most 192, the smaller side at blocks.0.attn"),
        ("none", {}, "bases 'common': have nothing at any position: give a checkpoint that --make-bases wrote"),
        ("one", {}, "bases 'common': expected an adapter of its own at 'blocks.0.mlp', found 'b0#0' of"),
        ("narrow", {}, r"bases 'common': expected widths \(192, 192\) at 'blocks.0.attn', found \(5, 5\)"),
    ],
)  # fmt: skip
def test_bases_that_do_not_fit(
    change: str, options: dict[str, Any], message: str, bases: Task, sources: list[Task], folder: Path,
    backbone: Backbone, tmp_path: Path,
) -> None:  # fmt: skip
    if change == "stranger":
        bases = changed(bases, backbone={"model": "x", "digest": "sha256:" + "0" * 64})
    elif change == "task":
        bases = sources[0]
    elif change == "none":
        bases = make_task({**bases.record, "positions": {}}, bases.tensors)
    elif change == "one":  # a task on them would have one core for all positions
        bases = changed(bases, positions={position: [["b0", 0.0, 0]] for position in bases.positions})
    elif change == "narrow":
        from tests.helpers.makers import floats

        small = {
            n: floats(np.ones((POSITIONS, 5, R) if n.endswith("down") else (POSITIONS, R, 5))) for n in bases.tensors
        }
        bases = make_task(bases.record, small)
    with pytest.raises(ConfigError, match=message) as raised:
        train(config(**options), backbone, open_dataset(str(folder / "t0.npz")), tmp_path / "t", bases=bases)
    assert "\n" not in str(raised.value)


def test_bases_beside_a_base_set_are_refused(
    bases: Task, sources: list[Task], folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    data = open_dataset(str(folder / "t0.npz"))
    with pytest.raises(ConfigError, match="bases 'common': cannot be used with base 't0': choose one of them"):
        train(config(), backbone, data, tmp_path / "t", bases=bases, base=sources[0])
    with pytest.raises(ConfigError, match="base 'common': expected a base set, found common bases: give them as"):
        train(config(rank=R), backbone, data, tmp_path / "t", base=bases)


def test_options_that_came_later_do_not_make_finished_runs_others() -> None:
    there = {"rank": 8, "given": None}
    assert differences(there, {**there, "own_rank": 0, "own_bytes": None, "core_lr": 2.0, "bases_lr": 0.3}) == []
    assert differences(there, {**there, "own_rank": 2}) == ["no record of its own rank"]


def test_options_without_a_use_are_named() -> None:
    plain = TrainConfig(task="t", own_bytes=4000, core_lr=1.0)
    assert plain.own_rank == 1
    assert plain.unused(base=False, bank=False) == ["own_rank", "own_bytes", "core_lr"]
    assert plain.unused(base=False, bank=False, bases=True) == []
    told = TrainConfig(task="t", ratio=0.5, importance="random", prune_epoch=3)
    assert told.unused(base=False, bank=False, bases=True) == ["prune_epoch", "ratio", "importance"]
    making = TrainConfig(task="t", rank=8, epochs=5, lr=0.1, bases_lr=0.1, own_rank=2, head_dtype="Q4", ratio=0.5)
    assert making.unused_by_bases(trained=True) == ["ratio", "head_dtype", "own_rank"]
    assert making.unused_by_bases(trained=False) == ["epochs", "ratio", "lr", "head_dtype", "own_rank", "bases_lr"]


# ---- the command --------------------------------------------------------------------------------------------------


def run(*args: object) -> Ran:
    return CliRunner().invoke(main, [str(arg) for arg in args], catch_exceptions=False)


@pytest.mark.slow
def test_command_from_stored_tasks_to_a_task_on_their_bases(sources: list[Task], folder: Path, tmp_path: Path) -> None:
    store, out = tmp_path / "s", tmp_path / "b.safetensors"
    with Store.create(store) as opened:
        for task in sources:
            opened.add(task)
    making = ("common", "--make-bases", "--from-store", store, "--rank", R, "--positions", "blocks", "--out", out)
    done = run(*making)
    assert done.exit_code == 0, done.stderr
    assert "note" not in done.stderr
    twice = run(*making[:-1], tmp_path / "twice", "--from-tasks", "t0,t1,t0", "--own-rank", 2)
    assert "from 2 tasks" in twice.stdout, "a task that is named twice counts once"
    assert "note      --own-rank has no effect: common bases are made without it\n" in twice.stderr
    assert matrices(tmp_path / "twice").keys() == matrices(out).keys()
    assert all(torch.equal(one, matrices(out)[name]) for name, one in matrices(tmp_path / "twice").items())
    assert f"common bases of rank {R} at 12 positions from 2 tasks" in done.stdout
    done = run(*making, "--json")
    assert "made already, with the same options, tasks and data; --force makes them again" in done.stderr
    assert json.loads(done.stdout)["energy"].keys() == {"t0", "t1"}
    one = run(*making, "--from-tasks", "t0")
    assert one.exit_code == 1 and "trained already, but differently: made from other tasks or bases" in one.stderr
    with Store(store) as opened:
        opened.add(out)
    on = ("t2", "--data", folder / "t2.npz", "--epochs", 2, "--batch-size", 16, "--out", tmp_path / "t2")
    done = run(*on, "--bases", "common", "--from-store", store, "--own-rank", 1, "--own-bytes", 1600)
    assert done.exit_code == 0, done.stderr
    assert f"; common bases {BASES_BYTES:,})" in done.stdout and "note" not in done.stderr
    assert "common bases alone" in done.stdout
    plain = run(*on, "--bases", "t0", "--from-store", store, "--rank", 12, "--force")
    assert "bases 't0': expected common bases, found a task" in plain.stderr
    default = run(*on, "--bases", out, "--rank", 12, "--force")
    assert default.exit_code == 1, "the default of --rank, if it was asked for"
    assert f"expected rank {R}, found 12: leave rank out" in default.stderr
    (tmp_path / "ranks.toml").write_text(f'rank = 12\n[tasks.t2]\ndata = "{folder / "t2.npz"}"\n')
    listed = run("--tasks", tmp_path / "ranks.toml", "--bases", out, "--out", tmp_path / "many")
    assert listed.exit_code == 1 and f"expected rank {R}, found 12: leave rank out" in listed.stderr
    again = run(*on, "--bases", out, "--own-rank", 1, "--own-bytes", 1600, "--json")
    assert "trained already, with the same options and data" in again.stderr
    assert json.loads(again.stdout)["bases_bytes"] == BASES_BYTES
    (tmp_path / "tasks.toml").write_text(f'[tasks.t2]\ndata = "{folder / "t2.npz"}"\nepochs = 2\nbatch_size = 16\n')
    done = run(*making[:-1], tmp_path / "v2", "--tasks", tmp_path / "tasks.toml")
    assert done.exit_code == 0, done.stderr
    assert read_checkpoint(tmp_path / "v2").record["training"]["val_top1"].keys() == {"t2"}


@pytest.mark.slow
def test_bases_from_data_alone(folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    """They are those of unpruned tasks of these data, trained further; a stopped command goes on from these tasks."""
    tasks = "".join(f'[tasks.t{i}]\ndata = "{folder / f"t{i}.npz"}"\n' for i in range(2))
    (tmp_path / "tasks.toml").write_text(f"epochs = 2\nbatch_size = 16\n{tasks}")
    alone = ("common", "--make-bases", "--tasks", tmp_path / "tasks.toml", "--rank", R, "--positions", "blocks")
    made = run(*alone, "--dtype", "float32", "--out", tmp_path / "b")
    assert made.exit_code == 0, made.stderr
    assert f"common bases of rank {R} at 12 positions from 2 tasks" in made.stdout and "note" not in made.stderr
    assert not sources_at(tmp_path / "b").exists()
    data = [open_dataset(str(folder / f"t{i}.npz")) for i in range(2)]
    told = [config(f"t{i}", rank=R, epochs=2, select="best") for i in range(2)]
    common = replace(told[0], task="common")
    by_hand = [tmp_path / f"t{i}" for i in range(2)]
    for one, dataset, out in zip(told, data, by_hand, strict=True):
        train(replace(one, method="adapters", rank=8, select="last"), backbone, dataset, out)
    make_bases(common, backbone, [read_checkpoint(out) for out in by_hand], tmp_path / "two", told, data)
    first, same = read_checkpoint(tmp_path / "b"), read_checkpoint(tmp_path / "two")
    for name, raw in same.tensors.items():
        assert first.tensors[name] == raw
    assert first.record["training"]["energy"] == same.record["training"]["energy"]

    def stop(step: Step) -> None:
        if step.task == "bases":
            raise KeyboardInterrupt

    seen: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        make_bases(common, backbone, [], tmp_path / "again", told, data, stop)
    (sources_at(tmp_path / "again") / "mine").write_text("not theirs")
    make_bases(common, backbone, [], tmp_path / "again", told, data, lambda step: seen.append(step.task))
    assert set(seen) == {"bases"}, "no task is trained twice"
    assert [path.name for path in sources_at(tmp_path / "again").iterdir()] == ["mine"]
    assert first.record["training"]["given"] is None
    assert read_checkpoint(tmp_path / "again").tensors == first.tensors
    with pytest.raises(ConfigError, match="bases: expected stored tasks or data, found neither"):
        make_bases(config("b"), backbone, [], tmp_path / "c")
    other = replace(told[0], lr=0.1)
    train(replace(other, method="adapters", rank=8, select="last"), backbone, data[0], tmp_path / "other")
    sources_at(tmp_path / "d").mkdir()
    (tmp_path / "other").rename(kept := sources_at(tmp_path / "d") / "t0.safetensors")
    with pytest.raises(ConfigError, match=r"t0.safetensors: trained already, but differently: lr 0.1 there, 0.01 now"):
        make_bases(common, backbone, [], tmp_path / "d", told, data)
    assert read_checkpoint(kept).record["training"]["lr"] == 0.1
    for changes, message in (
        ({"rank": R + 1}, f"bases: task 't0': expected rank {R}, as the bases have, found {R + 1}: give it for"),
        ({"positions": "qkv"}, "bases: task 't0': expected positions blocks, as the bases have, found qkv"),
    ):
        every = [replace(one, **changes) for one in told]
        with pytest.raises(ConfigError, match=message):
            make_bases(common, backbone, [], tmp_path / "c", every, data)
    wide = [replace(one, rank=193) for one in (common, *told)]
    with pytest.raises(ConfigError, match="a rank of at most 192, the smaller side at 'blocks.0.attn', found 193"):
        make_bases(wide[0], backbone, [], tmp_path / "c", wide[1:], data)
    assert not sources_at(tmp_path / "c").exists(), "nothing was trained"
    taken = tmp_path / "tasks2.toml"
    taken.write_text((tmp_path / "tasks.toml").read_text().replace(str(folder / "t0.npz"), "c.sources/t0.safetensors"))
    lost = run(*alone[:3], taken, *alone[4:], "--out", tmp_path / "c")
    assert lost.exit_code == 2 and "c.sources/t0.safetensors" in " ".join(lost.stderr.split())
    sources_at(tmp_path / "c").write_text("a file")
    with pytest.raises(ConfigError, match=r"c\.sources: the folder cannot be made: File exists: move away"):
        make_bases(common, backbone, [], tmp_path / "c", told, data)
    Store.create(tmp_path / "s").close()
    empty = run(*alone, "--from-store", tmp_path / "s", "--out", tmp_path / "c")
    assert empty.exit_code == 1 and "s: has no task: add some, or leave it out and give --tasks" in empty.stderr
    assert not (tmp_path / "c").exists()


def test_bases_from_the_backbone_alone(backbone: Backbone, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "b.safetensors"
    making = ("common", "--make-bases", "--from-backbone", "--rank", R, "--out", out)
    done = run(*making)
    assert f"common bases of rank {R} at 24 positions from the backbone" in done.stdout
    assert "made already" in run(*making).stderr
    bases, weights = read_checkpoint(out), backbone.module.state_dict()
    adapted = AdaptedBackbone(backbone, torch.device("cpu"), torch.float32)
    adapted.attach(list(bases.positions))
    for position, one in bases_at(bases, adapted, list(bases.positions)).items():
        left, values, right = torch.linalg.svd(weights[f"{position}.weight"])
        nearest = (left[:, :R] * values[:R]) @ right[:R]
        assert torch.allclose((one.down @ one.up).t(), nearest, atol=2e-3 * float(values[0]))
        assert torch.allclose(one.down.t() @ one.down, torch.eye(R), atol=1e-2)
    data = open_dataset(str(folder / "t0.npz"))
    told = config(positions="auto", core_dtype="Q4", epochs=2)
    made = train(told, backbone, data, tmp_path / "t0", bases=bases)
    task = read_checkpoint(tmp_path / "t0")
    assert set(task.positions) == set(bases.positions)
    assert (made.adapter_bytes, made.bases_bytes) == (24 * (R * R // 2 + 2 * R), bases_bytes(task))
    with Store.create(tmp_path / "s") as store:
        store.add(out)
        assert store.add(tmp_path / "t0").new_bytes < made.adapter_bytes + made.head_bytes + 100, "bases are there"
        found = Router(backbone, store).run([data.val.image(i) for i in range(len(data.val))], task="t0").logits
    right = torch.stack(list(found)).argmax(1) == data.val.targets
    assert float(right.float().mean()) == pytest.approx(made.val_top1)


def test_bases_from_1x1_convolutions(tmp_path: Path) -> None:
    backbone = Backbone(timm.create_model("mobilenetv3_small_050", pretrained=False, num_classes=0), "mobilenet")
    made = make_backbone_bases(config("b", positions="*.conv_pwl", rank=4), backbone, tmp_path / "b")
    assert made.positions == 10
    with pytest.raises(
        ConfigError, match="expected a Linear or a 1x1 convolution at 'blocks.0.0.conv_dw', found Conv2d"
    ):
        make_backbone_bases(config("b", positions="*.conv_dw", rank=4), backbone, tmp_path / "c")


def test_a_stopped_command_says_where_its_tasks_are(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "b"
    (tmp_path / "tasks.toml").write_text(f'[tasks.t0]\ndata = "{folder / "t0.npz"}"\n')

    def stopped(*_: Any, **__: Any) -> None:
        sources_at(out).mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr("pear_train.cli.work.make_bases", stopped)
    done = run("common", "--make-bases", "--tasks", tmp_path / "tasks.toml", "--out", out)
    assert done.exit_code == 130
    assert f"Stopped: what is trained is kept in {sources_at(out)}; the same command resumes" in done.stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (
            ("--make-bases",),
            2,
            "--make-bases needs --from-store, the store of the tasks that they are made from, --tasks, the data that",
        ),
        (("--make-bases", "--from-backbone", "--tasks", "t"), 2, "--from-backbone takes no --tasks"),
        (("--make-bases", "--from-backbone", "--from-store", "s", "--from-tasks", "t"), 2, "no --from-store or --from"),
        (("t", "--data", "d", "--from-backbone"), 2, "--from-backbone needs --make-bases"),
        (("--make-bases", "--from-backbone", "--positions", "blocks"), 1, "a Linear or a 1x1 convolution at 'blocks.0"),
        (("--make-bases", "--from-backbone", "--rank", "193"), 1, "a rank of at most 192, the smaller side at"),
        (("--make-bases", "--tasks", "t", "--from-tasks", "a"), 2, "--from-tasks needs --from-store: it names tasks"),
        (("--make-bases", "--from-store", "s", "--bank", "s"), 2, "--make-bases takes no --bank"),
        (("--make-bases", "--tasks", "s", "--ray", "auto", "--workers", "2"), 2, "takes no --ray or --workers"),
        (("t", "--data", "d", "--from-store", "s"), 2, "--from-store needs --make-bases, --bases or"),
        (("t", "--data", "d", "--bases", "b", "--from-tasks", "a"), 2, "--from-tasks needs --make-bases"),
        (("t", "--data", "d", "--bases", "b", "--base", "c", "--bank", "e"), 2, "--bases takes no --base or --bank"),
        (("--make-bases", "--from-store", "nowhere"), 3, "nowhere"),
    ],
)
def test_mistakes(args: tuple[str, ...], code: int, message: str, tmp_path: Path) -> None:
    done = run(*args, "--out", tmp_path / "o")
    assert done.exit_code == code
    assert message in " ".join(done.stderr.split()) and "Traceback" not in done.stderr


def test_bases_by_a_name_or_file_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    on = ("t0", "--data", folder / "t0.npz", "--out", tmp_path / "o", "--bases", tmp_path / "b")
    done = run(*on)
    assert done.exit_code == 3 and "no such file" in done.stderr and done.stderr.count("\n") == 1
    Store.create(tmp_path / "s").close()
    done = run(*on[:-1], "common", "--from-store", tmp_path / "s")
    assert done.exit_code == 3 and "common" in done.stderr and done.stderr.count("\n") == 1


def test_energy_is_what_the_bases_hold(bases: Task, sources: list[Task], tmp_path: Path) -> None:
    pair = {"p": (torch.eye(4)[:, :2], torch.eye(4)[:2])}
    assert held_energy(pair, {"p": (torch.eye(4)[:, :1], torch.eye(4)[:1])}) == pytest.approx(0.5)
    assert held_energy(pair, {"p": (torch.eye(4)[:, :3], torch.eye(4)[:3])}) == pytest.approx(1)
    write_checkpoint(tmp_path / "again", bases)
    assert read_checkpoint(tmp_path / "again").record == bases.record


@pytest.mark.slow
def test_what_stands_on_bases_can_be_borrowed(bases: Task, folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    """One adapter of a stack leaves the others there: in a bank, and as a base set."""
    told = config("t0", epochs=2, own_rank=1, core_dtype="Q4")
    train(told, backbone, open_dataset(str(folder / "t0.npz")), tmp_path / "t0", bases=bases)
    task = read_checkpoint(tmp_path / "t0")
    adapted = AdaptedBackbone(backbone, torch.device("cpu"), torch.float32)
    adapted.attach(list(task.positions))
    for cores in (True, False):
        bank = Bank([task], adapted, "identity", cores)
        assert len(bank) == 2 * POSITIONS
    for name, adapter in task.adapters.items():
        frozen = stored_adapter(task, name, "bank")
        assert frozen.entry is not None and "stack" not in frozen.entry and frozen.place is None
        written = {key: value for key, value in task.record.items() if key != "format"}
        names = {
            "positions": {"blocks.0.attn": [["a", 1.0]]},
            "adapters": {"a": frozen.entry},
            "head": None,
            "labels": [],
        }
        alone = make_task({**written, **names, "format": "pear-task/1"}, frozen.tensors)
        for mine, theirs in zip(alone.adapters["a"].matrices, adapter.matrices, strict=True):
            np.testing.assert_array_equal(matrix_values(mine, alone.tensors), matrix_values(theirs, task.tensors))


# ---- other bases --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_task_moves_to_other_bases_with_its_measured_loss(
    bases: Task, sources: list[Task], folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    data = open_dataset(str(folder / "t2.npz"))
    told = config("t2", epochs=2, own_rank=1, head_dtype="F32", threshold_accuracy=0.9)
    train(told, backbone, data, tmp_path / "t2", bases=bases)
    task = read_checkpoint(tmp_path / "t2")
    turned = tmp_path / "turned"  # the same directions in other coordinates
    turn = torch.linalg.qr(torch.randn(R, R, generator=torch.Generator().manual_seed(3))).Q
    written = {}
    for name, raw in bases.tensors.items():
        stack = to_torch(raw).float()
        written[name] = from_torch(stack @ turn if name.endswith("down") else turn @ stack)
    write_checkpoint(turned, make_task({**bases.record, "task": "turned"}, written))
    moved = rebase(task, read_checkpoint(turned), backbone, data, tmp_path / "moved", "t3")
    assert (moved.task, moved.bases) == ("t3", "turned") and moved.held > 0.9999
    back = read_checkpoint(tmp_path / "moved")
    router = Router(backbone)
    for one in (task, back):
        router.add(one)
    images = Preprocess(task.preprocess)([data.val.image(i) for i in range(8)])
    torch.testing.assert_close(router.run(images, "t3").logits, router.run(images, "t2").logits, atol=2e-2, rtol=2e-2)
    for split in ("val", "test"):
        assert abs(moved.loss[split][0] - moved.loss[split][1]) < 1e-2
    assert moved.top1["val"][0] == task.record["metrics"]["val_top1"]
    assert back.record["metrics"]["test_top1"] == moved.top1["test"][1]
    assert {t.digest for t in read_checkpoint(turned).tensors.values()} <= {t.digest for t in back.tensors.values()}
    assert back.record["training"]["bases"] == "turned" and back.record["training"]["rebased"]["from"] == "common"

    make_bases(config("narrow", rank=2), backbone, sources, tmp_path / "narrow")  # hold less: that is told
    less = rebase(task, read_checkpoint(tmp_path / "narrow"), backbone, data, tmp_path / "less")
    assert 0 < less.held < 0.99 and less.loss["val"][0] != less.loss["val"][1]
    assert less.adapter_bytes < moved.adapter_bytes

    # what was measured on val before the move holds no more; every fourth answer is made wrong
    wrong = torch.where(torch.arange(len(data.val)) % 4 == 0, 3 - data.val.targets, data.val.targets)
    val = replace(data.val, targets=wrong)
    stale = make_task({**task.record, "threshold": 0.123}, task.tensors)
    again = rebase(stale, read_checkpoint(tmp_path / "narrow"), backbone, replace(data, val=val), tmp_path / "again")
    lossy = read_checkpoint(tmp_path / "again")
    router.add(lossy)
    pixels = Preprocess(task.preprocess)([val.image(i) for i in range(len(val))])
    logits = torch.stack(list(router.run(pixels, lossy.name).logits))
    confidence, predicted = logits.softmax(1).max(1)
    scores = scores_of(predicted, wrong, len(task.labels))
    assert again.threshold == (0.123, lossy.record.get("threshold"))
    assert again.threshold[1] == calibrated(predicted == wrong, confidence, 0.9)
    assert lossy.record["metrics"]["val_macro_f1"] == scores.macro_f1
    assert lossy.record["training"]["recall"]["val"] == scores.recall
    by_hand = {**stale.record, "training": {**task.record["training"], "threshold_accuracy": None}}
    fewer = replace(data, test=None)
    dropped = rebase(make_task(by_hand, task.tensors), bases, backbone, fewer, tmp_path / "dropped", device="cpu")
    of_val = read_checkpoint(tmp_path / "dropped").record
    assert dropped.threshold == (0.123, None) and "threshold" not in of_val
    assert of_val["metrics"].keys() == {"val_top1", "val_macro_f1"}, "no figure is of before the move"
    assert of_val["training"]["images"] == fewer.counts and "test" not in of_val["training"]["recall"]
    assert of_val["training"]["rebased"]["data"] == fewer.fingerprint
    with pytest.raises(RouterError, match="device 'nonsense' cannot be used"):
        rebase(task, bases, backbone, data, tmp_path / "x", device="nonsense")

    odd = make_task({**task.record, "training": {**task.record["training"], "lr": "x"}}, task.tensors)
    with pytest.raises(ConfigError, match="task 't2': field 'training': lr 'x': expected float"):
        rebase(odd, bases, backbone, data, tmp_path / "x")
    with pytest.raises(ConfigError, match="task 't0': it uses no common bases: give a task"):
        rebase(sources[0], bases, backbone, data, tmp_path / "x")
    with pytest.raises(ConfigError, match="task 't2': expected data of its 4 classes, found"):
        rebase(task, bases, backbone, open_dataset(str(folder / "t0.npz")), tmp_path / "x")
    assert not (tmp_path / "x").exists()

    asked = (
        "t4",
        "--rebase",
        tmp_path / "t2",
        "--bases",
        turned,
        "--data",
        folder / "t2.npz",
        "--out",
        tmp_path / "t4",
    )
    done = run(*asked)
    assert done.exit_code == 0, done.stderr
    assert "now on turned, which keep 100.0 % of the cores' sum" in done.stdout and "val: " in done.stdout
    assert run(*asked).exit_code == 1 and "there is already a task checkpoint" in run(*asked).stderr
    overwritten = run(*asked, "--overwrite", "--json", "--core-dtype", "Q2", "--device", "cpu")
    assert overwritten.stderr.count("has no effect") == 1
    assert "note      --core-dtype has no effect: a task that is moved keeps its own options\n" in overwritten.stderr
    assert json.loads(overwritten.stdout)["held"] > 0.9999


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("t", "--data", "d", "--rebase", "x"), "--rebase needs --bases: it says which bases the task moves to"),
        (("t", "--data", "d", "--rebase", "x", "--bases", "b", "--plot"), "--rebase takes no --plot: it"),
        (("t", "--data", "d", "--rebase", "x", "--bases", "b", "--html", "h"), "--rebase takes no --html: it"),
        (("--tasks", "d", "--rebase", "x", "--bases", "b"), "--rebase takes no --tasks: it moves one task"),
    ],
)  # fmt: skip
def test_moves_that_make_no_sense(args: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = run(*args, "--out", tmp_path / "o")
    assert done.exit_code == 2 and message in done.stderr


# ---- what users get wrong -------------------------------------------------------------------------------------------


def tasks_file(folder: Path, where: Path, options: str = "", count: int = 2) -> Path:
    """A file of tasks that train for an epoch, at `where`."""
    tasks = "".join(f'[tasks.t{i}]\ndata = "{folder / f"t{i}.npz"}"\n' for i in range(count))
    where.write_text(f"epochs = 1\nbatch_size = 16\n{options}\n{tasks}")
    return where


@pytest.mark.slow
def test_only_what_such_a_run_made_is_removed_or_replaced(folder: Path, tmp_path: Path) -> None:
    """One epoch is enough, for nothing is pruned."""
    out = tmp_path / "b"
    tasks = tasks_file(folder, tmp_path / "tasks.toml", 'method = "adapters"\nprune_epoch = 9\ndown = "common"')
    making = ("common", "--make-bases", "--tasks", tasks, "--rank", R, "--positions", "blocks", "--out", out)
    made = run(*making)
    assert made.exit_code == 0, made.stderr
    mine, other = sources_at(out) / "t0.safetensors", sources_at(out) / "t1.safetensors"
    sources_at(out).mkdir()
    mine.write_text("precious")
    trained = run("t1", "--data", folder / "t1.npz", "--out", other, "--epochs", 2, "--batch-size", 16)
    assert trained.exit_code == 0, trained.stderr
    held = other.read_bytes()
    assert "made already" in run(*making).stderr
    assert (mine.read_text(), other.read_bytes()) == ("precious", held)
    for extra in ((), ("--overwrite",), ("--force",)):
        refused = run(*making[:-1], tmp_path / "b", *extra, "--lr", 0.5)
        assert refused.exit_code == 1 and mine.read_text() == "precious" and other.read_bytes() == held
    mine.unlink()
    forced = run(*making, "--force")
    assert forced.exit_code == 0, forced.stderr
    assert not sources_at(out).exists(), "another run's checkpoint is replaced, and removed as this run's own"


def test_a_note_says_where_bases_are_wider_than_their_tasks(
    sources: list[Task], bases: Task, folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    twin = make_task({**sources[0].record, "task": "twin"}, dict(sources[0].tensors))
    nothing = make_task(
        {**sources[1].record, "task": "nothing"},
        {name: raw if "down" in name else from_torch(0 * to_torch(raw)) for name, raw in sources[1].tensors.items()},
    )
    for given in ([sources[0], sources[0]], [sources[0], twin], [sources[0], nothing]):
        said: list[str] = []
        make_bases(config("b", rank=5), backbone, given, tmp_path / "b", say=said.append)
        assert len(said) == 1
        assert said[0].startswith(
            "note      at 12 of 12 positions the tasks have fewer directions than the rank, 5: 4 at"
        )
    with pytest.raises(ConfigError, match="found 0 in 1 task"):
        make_bases(config("b", rank=1), backbone, [nothing], tmp_path / "b")
    on_them = []
    for i in range(2):
        told = config(f"on{i}", epochs=1)
        train(told, backbone, open_dataset(str(folder / f"t{i}.npz")), tmp_path / told.task, bases=bases)
        on_them.append(read_checkpoint(tmp_path / told.task))
    del said[:]
    make_bases(config("b", rank=R), backbone, on_them, tmp_path / "b", say=said.append)
    assert not said
    make_bases(config("b", rank=R + 1), backbone, on_them, tmp_path / "b", say=said.append)
    assert len(said) == 1 and f"than the rank, {R + 1}: {R} at" in said[0]
    with pytest.raises(ConfigError, match="a rank of at most 192, the smaller side"):
        make_bases(config("b", rank=193), backbone, sources, tmp_path / "b")


@pytest.mark.slow
def test_bases_record_the_options_that_they_were_made_with(
    sources: list[Task], folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    data = [open_dataset(str(folder / f"t{i}.npz")) for i in range(2)]
    told = [config(f"t{i}", rank=4, epochs=1, lr=3e-3, img_size=64, seed=5) for i in range(2)]
    make_bases(config("b", rank=4, seed=1), backbone, sources, tmp_path / "b", told, data)
    made = read_checkpoint(tmp_path / "b")
    found = {name: made.record["training"][name] for name in ("epochs", "lr", "img_size", "seed", "batch_size")}
    assert found == {"epochs": 1, "lr": 3e-3, "img_size": 64, "seed": 5, "batch_size": 16}
    assert made.preprocess["input_size"] == [3, 64, 64]
    make_bases(config("b", rank=4, seed=1), backbone, sources, tmp_path / "first")
    make_bases(config("b", rank=4, seed=2, lr=1.0), backbone, sources, tmp_path / "second")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes(), "nothing is trained"
    nowhere = [replace(one, device="cuda:99") for one in told]
    with pytest.raises((ConfigError, RouterError), match="cuda:99"):
        make_bases(config("b", rank=4), backbone, sources, tmp_path / "c", nowhere, data)


def test_configs_that_do_not_go_together(backbone: Backbone, folder: Path, tmp_path: Path) -> None:
    data = [open_dataset(str(folder / f"t{i}.npz")) for i in range(2)]
    one, other = config("t0", rank=4), config("t1", rank=4, epochs=3)
    for configs, message in (
        ([one, replace(one, task="T0")], "bases: task 't0': another task has the same name, but for case"),
        ([one], "bases: expected one config for each of 2 data sets, found 1: give as many"),
        ([], "bases: expected one config for each of 2 data sets, found 0: give as many"),
        ([one, other], "bases: epochs: expected one value for all tasks, found 4 for 't0' and 3 for 't1'"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_bases(config("b", rank=4), backbone, [], tmp_path / "b", configs, data)
    assert not sources_at(tmp_path / "b").exists()


@pytest.mark.slow
def test_a_run_that_diverges_leaves_no_empty_folder_and_no_warning(
    sources: list[Task], folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    data = [open_dataset(str(folder / f"t{i}.npz")) for i in range(2)]
    wild = {"rank": 4, "lr": 1000, "weight_decay": 1000, "bases_lr": 1000, "max_grad_norm": 1e12}
    told = [config(f"t{i}", **wild) for i in range(2)]
    for given in ([], sources):
        with pytest.raises(DivergedError, match="training diverged"):
            make_bases(config("b", rank=4), backbone, given, tmp_path / "b", told, data)
        assert not sources_at(tmp_path / "b").exists()


@pytest.mark.slow
def test_a_bank_offers_no_bases_and_notes_name_what_has_no_effect(
    sources: list[Task], bases: Task, folder: Path, tmp_path: Path
) -> None:
    with Store.create(tmp_path / "s") as store:
        store.add(sources[0])
        store.add(bases)
    data = ("--data", folder / "t2.npz", "--batch-size", 16, "--positions", "blocks")
    borrowing = run("t2", *data, "--bank", tmp_path / "s", "--epochs", 2, "--rank", 4, "--out", tmp_path / "t2")
    assert borrowing.exit_code == 0, borrowing.stderr
    assert "note      common is skipped: common bases, and a bank has tasks\n" in borrowing.stderr
    write_checkpoint(tmp_path / "bases", bases)
    on = run("t2", *data, "--bases", tmp_path / "bases", "--epochs", 1, "--out", tmp_path / "on",
             "--tensor-dtype", "Q4", "--set", "down=common")  # fmt: skip
    assert on.exit_code == 0, on.stderr
    assert "--tensor-dtype has no effect" in on.stderr and "--set down has no effect" in on.stderr
    v1 = run("b", "--make-bases", "--from-store", tmp_path / "s", "--rank", 2, "--positions", "blocks",
             "--out", tmp_path / "b", "--max-pixels", 3, "--train-split", "x", "--data-root", "/nowhere")  # fmt: skip
    for option in ("--max-pixels", "--train-split", "--data-root"):
        assert f"note      {option} has no effect: common bases are made without it\n" in v1.stderr
    own = run("t2", *data, "--bases", tmp_path / "bases", "--epochs", 2, "--out", tmp_path / "own", "--own-bytes", 3000,
              "--own-rank", 0)  # fmt: skip
    assert own.exit_code == 0 and "note" not in own.stderr, own.stderr
    early = run("t2", *data, "--rebase", tmp_path / "gone", "--bases", tmp_path / "bases", "--out", tmp_path / "r")
    assert early.exit_code == 3 and "gone" in early.stderr and "backbone" not in early.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": 99}, "ValueError: epoch 99 of 4"),
        ({"history": None, "frozen": None}, "AttributeError"),
        ({"branches": {}}, "ValueError: other positions"),
        ("generator", "KeyError: 'generator'"),
        ("now head.weight", "KeyError: 'now head.weight'"),
    ],
)
def test_a_state_that_is_changed_is_one_line(
    change: dict[str, Any] | str, message: str, bases: Task, folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    def stop(step: Step) -> None:
        if step.epoch == 2:
            raise KeyboardInterrupt

    dataset = open_dataset(str(folder / "t0.npz"))
    with pytest.raises(KeyboardInterrupt):
        train(config(), backbone, dataset, tmp_path / "t", stop, bases=bases)
    state = partial_path(tmp_path / "t")
    with safe_open(state, "pt") as file:
        record = json.loads((file.metadata() or {})["run"])
        tensors = load_file(state)
    if isinstance(change, str):
        del tensors[change]
    else:
        record |= change
    save_file(tensors, state, {"run": json.dumps(record)})
    with pytest.raises(
        ConfigError, match=rf"t\.partial: expected the whole state .*{message}.*move it away to begin anew"
    ):
        train(config(), backbone, dataset, tmp_path / "t", bases=bases)
    assert state.exists()
