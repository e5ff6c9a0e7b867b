"""Training end to end on small real problems, through the command where a user would."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner, Result

from pear_store import Store, read_checkpoint
from pear_store.format.codes import up_values
from pear_train import ConfigError, DivergedError, TrainConfig, open_dataset, train
from pear_train.cli import main
from pear_train.data import Dataset
from pear_train.group import next_batch, step_together
from pear_train.job import ActiveJob, Job
from pear_train.report import Step, stored_bytes
from pear_train.run import TaskRun
from pear_train.start import attached
from router import AdaptedBackbone, Backbone, BackboneError, Preprocess, Router, load_backbone
from tests.helpers.backbones import random_module


@pytest.fixture(scope="module")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three classes of noisy stripes, which a few steps learn and chance does not: 60 train, 30 val, 60 test images."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {"classes": np.array(["flat", "tall", "none"])}
    for name, count in (("train", 60), ("val", 30), ("test", 60)):
        y = np.arange(count) % 3
        x = rng.normal(128, 40, (count, 24, 24))
        wave = 60 * np.sign(np.sin(np.arange(24) * np.pi / 3))
        x[y == 0] += wave[:, None]
        x[y == 1] += wave[None, :]
        arrays[f"x_{name}"], arrays[f"y_{name}"] = np.clip(x, 0, 255).astype(np.uint8), y
    path = tmp_path_factory.mktemp("data") / "stripes.npz"
    np.savez(path, **arrays)
    return str(path)


def config(**changes: Any) -> TrainConfig:
    base = {"task": "stripes", "epochs": 4, "prune_epoch": 2, "rank": 4, "positions": "blocks", "ratio": 0.5}
    return TrainConfig(**{**base, "dtype": "float32", **changes})


def task_run(config: TrainConfig, backbone: Backbone, data: Dataset) -> TaskRun:
    return TaskRun(config, AdaptedBackbone(backbone, torch.device("cpu"), torch.float32, for_training=True), data)


def finish(run: TaskRun, out: Path) -> Any:
    """Trains a run to its end, keeping the last epoch's weights in it."""
    active = ActiveJob(Job(run.config, lambda: run.dataset, out), run, 0.0)
    while not run.finished:
        step_together([(run, next_batch(run))])
        run.after_step()
    return active.finish()


@pytest.fixture(scope="module")
def other(stripes: str, backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another trained task, for mixed batches."""
    out = tmp_path_factory.mktemp("other") / "o.safetensors"
    train(config(task="other", method="adapters", seed=5), backbone, open_dataset(stripes), out)
    return out


@pytest.mark.parametrize(
    "method",
    ["linear", pytest.param("adapters", marks=pytest.mark.slow), pytest.param("pear", marks=pytest.mark.slow)],
)
def test_methods_learn_and_report_what_they_wrote(
    method: str, stripes: str, backbone: Backbone, tmp_path: Path
) -> None:
    steps: list[Step] = []
    result = train(config(method=method), backbone, open_dataset(stripes), tmp_path / "t.safetensors", steps.append)
    assert result.val_top1 > 0.6
    assert result.test_top1 is not None
    task = read_checkpoint(tmp_path / "t.safetensors")
    assert stored_bytes(task) == (result.adapter_bytes, result.knowledge_bytes, result.head_bytes)
    assert result.file_bytes == (tmp_path / "t.safetensors").stat().st_size
    count = {"linear": 0, "adapters": 12, "pear": 6}[method]
    cores = len({*result.pruned, *result.borrowed.values()})
    assert result.adapter_bytes == count * 2 * 192 * 4 * 2 + cores * 4 * 4 * 2
    assert sum("basis" in entry for entry in task.record["adapters"].values()) == cores
    assert result.head_bytes == 2 * (3 * 192 + 3)
    borrowed = 6 if method == "pear" else 0
    assert result.trainable_params == count * 2 * 192 * 4 + 3 * 193 + cores * 16
    assert len(result.borrowed) == len(result.pruned) == borrowed
    metrics = task.record["metrics"]
    assert metrics["val_top1"] == result.val_top1 and metrics["test_top1"] == result.test_top1
    assert metrics["val_macro_f1"] == pytest.approx(np.mean(task.record["training"]["f1"]["val"]), abs=1e-4)
    assert set(metrics) == {"val_top1", "val_macro_f1", "test_top1", "test_macro_f1"}
    assert len(task.positions) == (0 if method == "linear" else 12)
    assert [step.epoch for step in steps if step.val_top1 is not None] == [1, 2, 3, 4]
    if method == "pear":
        assert result.best_epoch > 2
        assert min(result.importance.values()) > 0


@pytest.mark.slow
def test_one_seed_gives_one_file_and_another_gives_another(stripes: str, backbone: Backbone, tmp_path: Path) -> None:
    data = open_dataset(stripes)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(config(seed=seed), backbone, data, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


FORMS = [
    ("nearest", "scale", "none", 1),
    ("nearest", "core", "none", 1),
    ("top", "core", "exact", 1),
    ("similar", "scale", "lowbit", 4),
    ("none", "scale", "lowbit", 1),
]
FOLDS = [("similar", "scale", "fold", 1), ("nearest", "core", "fold", 1)]
"""For identity alone: test_options_that_clash."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "sharing", "borrow", "knowledge", "bits"),
    [("identity", *form) for form in FORMS + FOLDS] + [("relu", *form) for form in FORMS],
)
def test_what_is_trained_is_what_is_routed(
    activation: str,
    sharing: str,
    borrow: str,
    knowledge: str,
    bits: int,
    stripes: str,
    other: Path,
    backbone: Backbone,
    tmp_path: Path,
) -> None:
    """Logits of the trainer's modules and of the router from the written file agree, single and mixed."""
    data = open_dataset(stripes)
    made = config(activation=activation, sharing=sharing, borrow=borrow, knowledge=knowledge, knowledge_bits=bits,
                  tensor_dtype="F32", head_dtype="F32", select="last")  # fmt: skip
    run = task_run(made, backbone, data)
    result = finish(run, tmp_path / "t.safetensors")
    rows = torch.arange(12)
    with torch.no_grad():
        trained = run.head(run.features(run.val_pixels, rows))
    images = Preprocess(run.preprocess)([data.val.image(i) for i in range(12)])
    router = Router(backbone)
    router.add(tmp_path / "t.safetensors")
    router.add(other)
    torch.testing.assert_close(router.run(images, "stripes").logits, trained, atol=1e-5, rtol=1e-5)
    mixed = router.run(images, ["stripes", "other"] * 6).logits
    torch.testing.assert_close(mixed[::2], trained[::2], atol=1e-5, rtol=1e-5)
    knowledge_share = {"none": 0, "fold": 0, "exact": 1 / 2, "lowbit": bits / 32}[knowledge]
    exact_bytes = 6 * 2 * 192 * 4 * 4
    scales = 6 * 2 * 4 * 2 if knowledge == "lowbit" else 0
    cores = len(run.adapters.cores())
    assert (cores > 0) == (borrow == "core")
    assert result.adapter_bytes == exact_bytes + cores * 4 * 4 * 4
    assert result.knowledge_bytes == exact_bytes * knowledge_share + scales


@pytest.mark.slow
def test_an_exact_knowledge_checkpoint_keeps_the_function(stripes: str, backbone: Backbone) -> None:
    """Borrowing that starts at zero beside an exact copy changes nothing but the copy's rounding."""
    run = task_run(config(knowledge="exact"), backbone, open_dataset(stripes))
    with torch.no_grad():
        for up in run.adapters.up.values():
            up.normal_(0, 0.1)
    rows = torch.arange(10)
    before = run.adapted.features(run.train_pixels.images(rows), run.adapters.position_weights())
    run.prune()
    after = run.adapted.features(run.train_pixels.images(rows), run.adapters.position_weights())
    assert len(run.adapters.down) == 6
    torch.testing.assert_close(after, before, atol=2e-2, rtol=1e-2)
    run.adapters.frozen.clear()
    for branches in run.adapters.branches.values():
        branches[:] = [branch for branch in branches if not branch.adapter.startswith("k")]
    without = run.adapted.features(run.train_pixels.images(rows), run.adapters.position_weights())
    assert (without - before).abs().max() > 0.1


def test_sources_forget_their_moments_and_others_keep_them(stripes: str, backbone: Backbone) -> None:
    run = task_run(config(ratio=0.25, knowledge="none", borrow="scale"), backbone, open_dataset(stripes))
    for _ in range(2):
        loss = run.head(run.features(run.train_pixels, torch.arange(20))).square().mean()
        run.optimiser.zero_grad()
        loss.backward()
        run.optimiser.step()
    before = dict(run.adapters.up.items())
    run.prune()
    sources = {run.adapters.own[source] for source in run.sources.values()}
    for name, parameter in before.items():
        kept = name in run.adapters.up
        assert (parameter in run.optimiser.state) == (kept and name not in sources)
    assert run.head.weight in run.optimiser.state
    trained = {id(p) for group in run.optimiser.param_groups for p in group["params"]}
    assert {id(scale) for scale in run.adapters.scales().values()} <= trained
    assert len(run.adapters.scales()) == 3


def test_linear_probe_equals_the_backbones_own_features(stripes: str, backbone: Backbone, tmp_path: Path) -> None:
    run = task_run(config(method="linear"), backbone, open_dataset(stripes))
    rows = torch.tensor([5, 2])
    with torch.no_grad():
        direct = run.adapted.features(run.val_pixels.images(rows), {})
    torch.testing.assert_close(run.features(run.val_pixels, rows), direct, atol=1e-5, rtol=1e-5)


def test_a_rank_above_a_matrix_s_side_is_refused_before_training(backbone: Backbone, stripes: str) -> None:
    """Pruned adapters could not be folded into a kept one."""
    sides = AdaptedBackbone(backbone, torch.device("cpu"), torch.float32)
    least = min(min(sides.widths[position]) for position in attached(sides, "blocks"))
    data = open_dataset(stripes)
    task_run(config(rank=least), backbone, data)
    with pytest.raises(ConfigError, match=f"rank {least + 1}: expected at most {least}, the smaller side at blocks"):
        task_run(config(rank=least + 1), backbone, data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": 1.0}, "ratio 1.0: expected at least 0 and below 1"),
        ({"prune_epoch": 4}, "prune epoch 4 of 4 epochs"),
        ({"epochs": 1, "prune_epoch": None}, "epochs 1: method 'pear' needs at least 2"),
        ({"prune_epoch": 0}, "prune epoch 0 of 4 epochs"),
        ({"rank": 0}, "rank 0: expected at least 1"),
        ({"lr": 0.0}, "lr 0.0: expected above 0"),
        ({"sharing": "best"}, "sharing 'best': expected one of nearest, top, similar, none"),
        ({"knowledge": "fold", "activation": "relu"}, "knowledge 'fold' needs activation 'identity'"),
        ({"knowledge": "fold", "down": "common"}, "knowledge 'fold' rewrites down, which down 'common' forbids"),
        ({"patience": 0}, "patience 0: expected at least 1"),
        ({"drop_branch": 1.0}, "drop branch 1.0: expected at least 0 and below 1"),
        ({"augment": "cutmix"}, "augment 'cutmix': expected none, or some of flip, crop, rotate, zoom, color, mixup"),
        ({"head_dtype": "Q1"}, "head dtype 'Q1': expected one of F16, BF16, F32, Q8, Q4, Q2"),
        ({"knowledge_bits": 2}, "knowledge bits 2: expected one of 1, 4"),
    ],
)
def test_options_that_clash(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes).check_pruning()


def test_a_loss_that_explodes_is_said(stripes: str, backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="stripes: training diverged: .*; lower the learning rate, it is 1000"):
        train(
            config(method="adapters", lr=1000, weight_decay=1000),
            backbone,
            open_dataset(stripes),
            tmp_path / "t.safetensors",
        )
    assert not (tmp_path / "t.safetensors").exists()


# ---- the command ------------------------------------------------------------------------------


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], catch_exceptions=False)


@pytest.mark.slow
def test_command_to_store_to_router(stripes: str, backbone: Backbone, tmp_path: Path) -> None:
    out = tmp_path / "t.safetensors"
    options = ("--epochs", 3, "--set", "prune_epoch=1", "--rank", 2, "--json")
    done = run("stripes", "--data", stripes, "--out", out, *options)
    assert done.exit_code == 0, done.stderr
    assert "a NumPy archive; 3 classes; 60 train, 30 val, 60 test images" in done.stderr
    report = json.loads(done.stdout)
    expected = {
        "task", "method", "val_top1", "test_top1", "trainable_params", "adapter_bytes", "knowledge_bytes", "head_bytes",
        "file_bytes", "epochs", "seconds", "borrowed",
    }  # fmt: skip
    assert expected <= set(report)
    with Store.create(tmp_path / "s") as store:
        assert store.add(out).changed
        data = open_dataset(stripes)
        router = Router(backbone, store)
        assert data.test is not None
        images = [data.test.image(i) for i in range(60)]
        labels = router.run(images, "stripes").labels
    right = sum(label == data.classes[int(y)] for label, y in zip(labels, data.test.targets, strict=True))
    assert right / 60 == pytest.approx(report["test_top1"])


@pytest.mark.slow
def test_it_reads_well_without_json(stripes: str, tmp_path: Path) -> None:
    done = run("stripes", "--data", stripes, "--out", tmp_path / "t", "--epochs", 2, "--rank", 1)
    assert "borrows blocks." in done.stdout
    assert "stripes (pear): val" in done.stdout


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["../x"], 1, "task name '../x'"),
        (["t", "--data", "/nowhere"], 1, "/nowhere: no such file or folder: expected"),
        (["t", "--backbone", "resnet_99"], 1, "timm has no model of that name"),
        (["t", "--weights", "/nowhere.safetensors"], 1, "/nowhere.safetensors: no such file"),
        (["t", "--positions", "layers.*"], 1, "positions 'layers.*' match no module"),
        (["t", "--ratio", "2"], 1, "ratio 2.0"),
        (["t", "--out", "/nowhere/t"], 1, "folder /nowhere does not exist"),
        (["t", "--device", "gpu"], 1, "device 'gpu' cannot be used"),
        (["t", "--device", "meta"], 1, "device 'meta' cannot be used"),
        (["t", "--img-size", "50"], 1, "cannot take 50 x 50 pixels"),
        (["t", "--method", "magic"], 2, "Invalid value for '--method'"),
    ],
)
def test_mistakes(args: list[str], code: int, message: str, stripes: str, tmp_path: Path) -> None:
    if "--data" not in args:
        args += ["--data", stripes]
    if "--out" not in args:
        args += ["--out", str(tmp_path / "t")]
    done = run(*args)
    assert done.exit_code == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "t").exists()


def test_auto_takes_qkv_and_mlp_or_blocks_where_no_qkv_runs(backbone: Backbone) -> None:
    adapted = AdaptedBackbone(backbone, torch.device("cpu"), torch.float32)
    assert attached(adapted, "auto") == attached(adapted, "qkv,mlp")
    torch.manual_seed(0)
    model: Any = timm.create_model("eva02_tiny_patch14_224", num_classes=5, img_size=28, depth=2)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 28, 28)}
    eva = AdaptedBackbone(load_backbone(model), torch.device("cpu"), torch.float32)
    assert attached(eva, "auto") == ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"]
    with pytest.raises(BackboneError, match="runs 0 times"):
        attached(eva, "qkv,mlp")
    model = timm.create_model("eva02_base_patch14_224", num_classes=5, img_size=28, depth=1, embed_dim=48, num_heads=3)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 28, 28)}
    apart = AdaptedBackbone(load_backbone(model), torch.device("cpu"), torch.float32)
    assert attached(apart, "auto") == ["blocks.0.attn", "blocks.0.mlp"], "q, k and v have modules of their own"


def test_gradients_are_clipped_together(stripes: str, backbone: Backbone) -> None:
    moved = []
    for limit in (1e-3, 1e9):
        run = task_run(config(max_grad_norm=limit), backbone, open_dataset(stripes))
        step_together([(run, next_batch(run))])
        before = torch.cat([p.grad.flatten() for p in run.tensors().values() if p.grad is not None])
        run.move()
        after = torch.cat([p.grad.flatten() for p in run.tensors().values() if p.grad is not None])
        moved.append((float(before.norm()), float(after.norm())))
    (norm, clipped), (same, kept) = moved
    assert norm == same == kept > 1e-3
    assert clipped == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "positions", "ratio"),
    [("test_resnet", ["layer1.0", "layer2.0", "layer3.0", "layer4.0"], 0.0),
     ("mobilenetv3_small_050", ["blocks.0.0", "blocks.5.0"], 0.5), ("convnext_atto", ["stages.0.blocks.0.mlp"], 0.5)],
)  # fmt: skip
def test_convolutional_networks_train_prune_and_run_mixed(
    model: str, positions: list[str], ratio: float, stripes: str, tmp_path: Path
) -> None:
    """By default; the weights are random, so nothing is asked of accuracy."""
    network = Backbone(random_module(model), model)
    data = open_dataset(stripes)
    store = Store.create(tmp_path / "store")
    for name, method in (("a", "pear"), ("b", "linear")):
        options: dict[str, Any] = {"positions": "auto", "ratio": ratio, "img_size": 64, "seed": 1, "lr": 3e-3}
        result = train(config(task=name, method=method, **options), network, data, tmp_path / name)
        store.add(tmp_path / name)
        if method == "pear":
            task = read_checkpoint(tmp_path / name)
            assert set(positions) <= task.positions.keys()
            assert bool(result.pruned) == (ratio > 0) and min(result.importance.values()) > 0
            assert all(up_values(adapter, task.tensors).any() for adapter in task.adapters.values())
    images = [np.random.default_rng(i).integers(0, 256, (24, 24), np.uint8) for i in range(4)]
    with Router(network, store) as router:
        names = ["a", "b", "b", "a"]
        alone = [router.run(image, name).logits[0] for image, name in zip(images, names, strict=True)]
        for mixed, expected in zip(router.run(images, names).logits, alone, strict=True):
            torch.testing.assert_close(mixed, expected, atol=1e-4 * max(1.0, float(expected.abs().max())), rtol=0)
    store.close()
