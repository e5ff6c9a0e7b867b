"""Tasks on common bases: cores stay cores, and answers are those of a plain loop and of the multiplied form."""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pear_store import RawTensor, Store, Task, make_task
from pear_store.format.codes import matrix_values, up_values
from pear_store.format.manifest import to_manifest
from router import Backbone, Router, add_branch, load_backbone
from router import adapted as adapted_module
from router.kernels import can_fuse
from router.layout import BASE_DOWN, BASE_UP, CORE, HEAD, Layouts
from router.matrices import Gathered
from router.ops import PositionWeights
from router.preprocess import Preprocess
from router.tensors import from_torch, quantise
from router.use import Use
from tests.helpers.makers import floats, record
from tests.router.test_router import reference

Maker = Callable[..., Task]
WIDTHS = {"blocks.0.attn": (192, 192), "blocks.1.mlp": (192, 192), "blocks.3.attn.qkv": (192, 576),
          "blocks.4.mlp.fc2": (384, 192)}  # fmt: skip
POSITIONS = tuple(WIDTHS)
LINEARS = ("blocks.3.attn.qkv", "blocks.4.mlp.fc2")


def on_bases(
    name: str,
    seed: int,
    bases: str = "v1",
    rank: tuple[int, int] = (6, 6),
    own: int = 0,
    positions: Sequence[str] = POSITIONS,
    cores: int = 1,
    activation: str = "identity",
    bits: int | None = None,
    classes: int = 3,
) -> Task:
    """A task on common bases: those of one name and one rank are the same for all tasks.

    Args:
        own: rank of an adapter of its own at every other position.
        cores: branches on the same bases at a position.
        bits: the bases are codes.
    """
    backbone = load_backbone("pear_tiny")
    mine = torch.Generator().manual_seed(seed)
    tensors: dict[str, RawTensor] = {}
    adapters: dict[str, Any] = {}
    branches: dict[str, list[list[Any]]] = {}
    for i, position in enumerate(positions):
        d_in, d_out = WIDTHS[position]
        common = torch.Generator().manual_seed(sum(map(ord, bases)) * 100 + POSITIONS.index(position))
        sides = {"down": (f"b{i}.down", d_in, rank[0]), "basis": (f"b{i}.up", rank[1], d_out)}
        entry: dict[str, Any] = {}
        for side, (tensor, *shape) in sides.items():
            values = torch.randn(*shape, generator=common) / shape[0] ** 0.5
            entry[side] = tensor
            if bits is None:
                tensors[tensor] = from_torch(values)
                continue
            codes, scale = quantise(values, bits, 1 if side == "down" else 0)
            tensors[tensor], tensors[f"{tensor}.s"] = from_torch(codes), from_torch(scale)
            form = {"shape": shape, "scale": f"{tensor}.s"}
            entry["quant"] = {**entry.get("quant", {"bits": bits}), side: form}
        branches[position] = []
        for j in range(cores):
            tensors[f"c{i}.{j}"] = from_torch(torch.randn(*rank, generator=mine))
            adapters[f"b{i}.{j}"] = {**entry, "up": f"c{i}.{j}"}
            branches[position].append([f"b{i}.{j}", 0.5 - 0.75 * j])
        if own and i % 2 == 0:
            tensors[f"a{i}.down"] = from_torch(torch.randn(d_in, own, generator=mine) / d_in**0.5)
            tensors[f"a{i}.up"] = from_torch(torch.randn(own, d_out, generator=mine))
            adapters[f"a{i}"] = {"down": f"a{i}.down", "up": f"a{i}.up"}
            branches[position].append([f"a{i}", 0.7])
    tensors["head.weight"] = floats(torch.randn(classes, 192, generator=mine).numpy())
    tensors["head.bias"] = floats(torch.randn(classes, generator=mine).numpy())
    about = record(
        name, backbone={"model": backbone.name, "digest": backbone.digest}, activation=activation, adapters=adapters,
        positions=branches, labels=[str(i) for i in range(classes)],
    )  # fmt: skip
    return make_task(about, tensors)


def without_bases(task: Task) -> Task:
    """The same task, each core multiplied into its `up`: how all tasks ran before."""
    tensors, adapters = dict(task.tensors), {}
    for name, entry in task.record["adapters"].items():
        adapters[name] = entry
        adapter = task.adapters[name]
        if adapter.core is not None:
            tensors[f"{name}.up"] = floats(np.array(up_values(adapter, task.tensors)))
            tensors[f"{name}.down"] = floats(np.array(matrix_values(adapter.down, task.tensors)))
            adapters[name] = {"down": f"{name}.down", "up": f"{name}.up"}
    named = {name for entry in adapters.values() for name in entry.values()} | {"head.weight", "head.bias"}
    return make_task({**task.record, "adapters": adapters}, {name: tensors[name] for name in named & tensors.keys()})


def router_of(backbone: Backbone, tasks: Sequence[Task], **options: Any) -> Router:
    router = Router(backbone, **{"merge": False, **options})
    for task in tasks:
        router.add(task)
    return router


def images_of(count: int) -> Tensor:
    return torch.randn(count, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def agree(found: Any, expected: Any, atol: float = 1e-5) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=atol * max(1.0, float(other.abs().max())), rtol=1e-5)


@pytest.fixture
def tasks(task_maker: Maker) -> dict[str, Task]:
    """On two bases, with and without adapters of their own, of three activations, quantised; and without bases."""
    made = [
        on_bases("a", 1),
        on_bases("b", 2, classes=5),
        on_bases("own", 3, own=2),
        on_bases("relu", 4, activation="relu", own=1),
        on_bases("gelu", 5, activation="gelu", positions=POSITIONS[1:3]),
        on_bases("twice", 6, cores=2),
        on_bases("new", 7, bases="v2", rank=(4, 5)),
        on_bases("codes", 8, bases="v3", bits=4),
        task_maker("plain", seed=9, positions=("blocks.0.attn", "blocks.1.mlp", "blocks.4.attn.qkv")),
        task_maker("bare", seed=10, headless=True),
    ]
    return {task.name: task for task in made}


MIXES = {
    "one task": ["a"] * 4,
    "common": ["a", "b", "a", "b", "b"],
    "own beside": ["a", "own", "b", "own"],
    "activations": ["a", "relu", "gelu", "relu", "own"],
    "with plain ones": ["a", "plain", "own", "bare"],
    "two cores": ["twice", "a", "twice"],
    "two bases": ["a", "new", "b", "new"],
    "many bases": ["a", "new", "codes", "twice", "plain"],
    "all": ["a", "b", "own", "relu", "gelu", "twice", "new", "codes", "plain", "bare"],
}


@pytest.mark.parametrize("mix", MIXES)
def test_every_mix_equals_a_plain_loop_and_the_multiplied_form(
    backbone: Backbone, tasks: dict[str, Task], mix: str
) -> None:
    names = MIXES[mix]
    images = images_of(len(names))
    router = router_of(backbone, list(tasks.values()))
    found = router.run(images, names).logits
    agree(found, [reference(backbone, tasks[name], image) for name, image in zip(names, images, strict=True)])
    agree(found, router_of(backbone, [without_bases(task) for task in tasks.values()]).run(images, names).logits)
    for row, name in enumerate(names):
        agree(found[row : row + 1], router.run(images[row : row + 1], name).logits)


def test_cores_matter(backbone: Backbone, tasks: dict[str, Task]) -> None:
    router = router_of(backbone, [tasks["a"], on_bases("other", 11)])
    a, other = (router.run(images_of(1), name).logits for name in ("a", "other"))
    assert (whole_of(a) - whole_of(other)).abs().max() > 0.1


def whole_of(logits: Any) -> Tensor:
    return logits if isinstance(logits, Tensor) else torch.stack(list(logits))


def test_a_batch_on_the_same_bases_multiplies_by_them_once(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [on_bases(f"t{i}", i) for i in range(4)]
    router = router_of(backbone, made)
    seen: list[PositionWeights] = []

    def keep(y: Tensor, x: Tensor, weights: PositionWeights, in_place: bool = False) -> Tensor:
        seen.append(weights)
        return add_branch(y, x, weights, in_place)

    monkeypatch.setattr("router.adapted.add_branch", keep)
    router.run(images_of(4), [task.name for task in made])
    assert [w.down.ndim for w in seen] == [w.up.ndim for w in seen] == [2] * len(POSITIONS)
    assert [w.core.shape for w in seen if w.core is not None] == [(4, 6, 6)] * len(POSITIONS)
    assert all(w.beside is None for w in seen)
    held = {
        one.values.data_ptr() for one in router._slots._tasks.popitem()[1].entries if isinstance(one.values, Tensor)
    }
    assert {w.down.data_ptr() for w in seen} | {w.up.data_ptr() for w in seen} <= held, "no copy of a base is made"


def test_bases_lie_on_the_device_once(backbone: Backbone, tasks: dict[str, Task]) -> None:
    router = router_of(backbone, [on_bases(f"t{i}", i, own=2) for i in range(8)], dtype=torch.bfloat16)
    sizes = []
    for i in range(8):
        router.preload(f"t{i}").result(60)
        sizes.append(router.stats().size_bytes)
    bases = sum(2 * 6 * sum(widths) for widths in WIDTHS.values())  # 2 bytes a number, as the cores have
    cores = len(POSITIONS) * 6 * 6 * 2
    own = sum((2 * d_in + 4 * d_out) * 2 for d_in, d_out in list(WIDTHS.values())[::2])
    head = 3 * 193 * 4
    assert sizes == [bases + (i + 1) * (cores + own + head) for i in range(8)]
    entries = router._slots._tasks.popitem()[1].entries
    of_tensors = sum(e.values.nbytes for e in entries if e.key[0] != HEAD and isinstance(e.values, Tensor))
    assert of_tensors == bases


def use_of(task: Task) -> Use:
    return Use.of(task, to_manifest(task), Layouts(torch.float32), Preprocess(task.preprocess))


def test_what_a_task_brings_for_several_positions_runs_as_before(backbone: Backbone, task_maker: Maker) -> None:
    """As Pear's own borrowed branches do: no other task has these bases."""
    task = task_maker("pear", positions=("blocks.0.attn", "blocks.2.mlp"))
    tensors = {**task.tensors, "c.up": floats(np.eye(4, dtype="<f4")), "d.up": floats(2 * np.eye(4, dtype="<f4"))}
    entry = task.record["adapters"]["a0"]
    adapters = {**task.record["adapters"], "c": {**entry, "up": "c.up", "basis": entry["up"]}}
    borrowed = make_task({**task.record, "adapters": adapters,
                          "positions": {**task.record["positions"], "blocks.1.mlp": [["c", 1.0]]}},
                         {name: tensors[name] for name in tensors if name != "d.up"})  # fmt: skip
    for made in (borrowed, folded(task, tensors)):
        use = use_of(made)
        assert not use.layout.on_bases and not use.stands
        assert not {part.side for part in use.layout.parts} & {BASE_DOWN, BASE_UP, CORE}
        router = router_of(backbone, [made])
        images = images_of(2)
        agree(router.run(images, "pear").logits, [reference(backbone, made, image) for image in images])


def folded(task: Task, tensors: dict[str, RawTensor]) -> Task:
    """Both positions have a core in one basis."""
    entry = task.record["adapters"]["a0"]
    adapters = {name: {**entry, "up": f"{name}.up", "basis": entry["up"]} for name in "cd"}
    positions = {"blocks.0.attn": [["c", 1.0]], "blocks.2.mlp": [["d", 0.5]]}
    names = {*entry.values(), "c.up", "d.up", "head.weight", "head.bias"}
    return make_task({**task.record, "adapters": adapters, "positions": positions}, {n: tensors[n] for n in names})


def test_slots_evict_and_reload(backbone: Backbone, store: Store) -> None:
    made = [on_bases(f"t{i}", i, own=i % 2) for i in range(4)] + [on_bases("new", 9, bases="v2", rank=(8, 4))]
    for task in made:
        store.add(task)
    images = images_of(2)
    expected = {task.name: [reference(backbone, task, image) for image in images] for task in made}
    sizes = [sum(use_of(task).sizes().values()) for task in made]
    router = Router(backbone, store, merge=False, slot_bytes=max(sizes) + 4000)
    for turn in range(3):
        for task in made[turn:] + made[:turn]:
            agree(router.run(images, task.name).logits, expected[task.name])
    stats = router.stats()
    assert stats.evictions > 5
    assert stats.size_bytes <= max(sizes) + 4000
    router.close()
    assert router.stats().size_bytes == 0


def test_an_evicted_base_stays_for_who_runs_with_it(backbone: Backbone) -> None:
    """A batch has the very tensors of the slots: what is loaded meanwhile must not write to them."""
    router = router_of(backbone, [on_bases("a", 1), on_bases("b", 2, bases="v2")])
    router.preload("a").result(60)
    use = router._find("a").use
    loaded = router._slots.find([use])
    assert loaded is not None
    units = dict.fromkeys(POSITIONS, np.array([0]))
    weights = router._slots.matrices.gather(loaded, units).weights["blocks.1.mlp"]
    before = weights.down.clone(), weights.up.clone()
    router._slots.evict(use.key)
    router.preload("b").result(60)
    assert torch.equal(weights.down, before[0]) and torch.equal(weights.up, before[1])


@pytest.mark.parametrize("merge", [True, False])
def test_a_task_merged(backbone: Backbone, merge: bool) -> None:
    task = on_bases("t", 1, own=2, positions=LINEARS)
    router = router_of(backbone, [task, on_bases("u", 2)], merge=merge)
    images = images_of(3)
    expected = [reference(backbone, task, image) for image in images]
    agree(router.run(images, "t").logits, expected, 1e-4)
    agree(router.run(images[:2], ["t", "u"]).logits[:1], expected[:1])
    assert router._merger.merges == int(merge)


def test_run_all_shares_what_tasks_have_in_common(backbone: Backbone, tasks: dict[str, Task]) -> None:
    router = router_of(backbone, list(tasks.values()))
    images = images_of(3)
    names = list(tasks)
    together = router.run_all(images, names)
    for name in names:
        agree(together[name].logits, [reference(backbone, tasks[name], image) for image in images])


def test_run_all_parts_where_cores_part(backbone: Backbone) -> None:
    """Two tasks that have the same core at a position, and another at the next, are one row until then."""
    first, second = on_bases("p", 1), on_bases("q", 2)
    same = {**second.tensors, "c0.0": first.tensors["c0.0"]}
    tasks = [first, make_task(second.record, same)]
    router = router_of(backbone, tasks)
    rows: list[int] = []
    for block in ("blocks.0.norm1", "blocks.1.norm1"):
        module = router._adapted._module((48, 48)).get_submodule(block)
        module.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    images = images_of(2)
    together = router.run_all(images, ["p", "q"])
    assert rows == [2, 4]
    for task in tasks:
        agree(together[task.name].logits, [reference(backbone, task, image) for image in images])


@pytest.mark.parametrize("limit", [1, 3 * 4 * 48 * 48 * 3])
def test_blocks_take_large_batches_in_parts(
    backbone: Backbone, tasks: dict[str, Task], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixes = (["a"] * 7, ["a", "b"] * 3 + ["own"], ["a", "a", "own", "own"], [*tasks])
    images = images_of(len(tasks))
    monkeypatch.setattr(adapted_module, "PART_BYTES", limit)
    router = router_of(backbone, list(tasks.values()))
    for mix in mixes:
        expected = [reference(backbone, tasks[name], image) for name, image in zip(mix, images, strict=False)]
        agree(router.run(images[: len(mix)], mix).logits, expected)
    together = router.run_all(images[:2], [*tasks])
    for name, task in tasks.items():
        agree(together[name].logits, [reference(backbone, task, image) for image in images[:2]])


def test_bfloat16_is_as_near_as_the_multiplied_form(backbone: Backbone, tasks: dict[str, Task]) -> None:
    chosen = [tasks[name] for name in ("a", "b", "own", "new")]
    images, names = images_of(8), [task.name for task in chosen] * 2
    exact = whole_of(torch.cat([row[:3] for row in router_of(backbone, chosen).run(images, names).logits]))
    errors = []
    for form in (chosen, [without_bases(task) for task in chosen]):
        low = router_of(backbone, form, dtype=torch.bfloat16).run(images, names).logits
        errors.append(float((torch.cat([row[:3] for row in low]) - exact).abs().mean()))
    assert errors[0] < 1.5 * errors[1]


# ---- forms of a batch ------------------------------------------------------------------------------------------------


def gathered(router: Router, names: Sequence[str], into: Gathered | None = None) -> Gathered:
    order = list(dict.fromkeys(names))
    router.preload(order).result(60)
    loaded = router._slots.find([router._find(name).use for name in order])
    assert loaded is not None
    runs = np.array([*(order.index(name) for name in names), -1])
    return router._slots.matrices.gather(loaded, dict.fromkeys(router._adapted.widths, runs), padded=True, into=into)


def adds(weights: PositionWeights, d_out: int) -> Tensor:
    x = torch.randn(
        len(next(iter_masks(weights))), 5, weights.down.shape[-2], generator=torch.Generator().manual_seed(0)
    )
    return add_branch(torch.zeros(len(x), 5, d_out), x, weights)


def iter_masks(weights: PositionWeights) -> Any:
    assert not isinstance(weights.activation, str)
    return iter(weights.activation.values())


def test_a_batch_may_be_gathered_into_the_memory_of_another(backbone: Backbone, tasks: dict[str, Task]) -> None:
    """As recorded forwards do; and what lies in slots is not written to."""
    router = router_of(backbone, list(tasks.values()))
    mixes = (["a", "new", "relu"], ["plain", "b", "own"], ["a", "a", "a"], ["new", "gelu", "codes"])
    for mix in (*mixes, [*tasks]):
        gathered(router, mix)
    before = {
        entry.key: entry.values.clone() for loaded in router._slots._tasks.values()
        for entry in loaded.entries if isinstance(entry.values, Tensor)
    }  # fmt: skip
    held = gathered(router, mixes[0]).own()
    for mix in mixes:
        fresh, again = gathered(router, mix), gathered(router, mix, held)
        assert again is held
        assert held.weights.keys() == fresh.weights.keys()
        for position, weights in fresh.weights.items():
            d_out = router._adapted.widths[position][1]
            torch.testing.assert_close(adds(held.weights[position], d_out), adds(weights, d_out))
    for loaded in router._slots._tasks.values():
        for entry in loaded.entries:
            assert not isinstance(entry.values, Tensor) or torch.equal(entry.values, before[entry.key])


def test_padded_batches_keep_their_form(backbone: Backbone, tasks: dict[str, Task]) -> None:
    router = router_of(backbone, list(tasks.values()))

    def form(names: Sequence[str]) -> list[Any]:
        found = gathered(router, names)
        return [
            (position, tuple(w.down.shape), tuple(w.up.shape), w.core is None, w.beside is None)
            for position, w in found.weights.items()
        ]

    router.preload(["a", "b", "own", "relu"]).result(60)
    first = form(["a", "b", "own", "relu"])
    for names in (["a", "a", "a", "a"], ["relu", "a", "own", "b"], ["b", "relu", "relu", "a"]):
        assert form(names) == first


# ---- the op ---------------------------------------------------------------------------------------------------------


def plain_loop(y: Tensor, x: Tensor, weights: PositionWeights) -> Tensor:
    out = []
    for row in range(len(y)):
        pick = [m if m is None or m.ndim == 2 else m[row] for m in (weights.down, weights.core, weights.up)]
        down, core, up = pick
        assert down is not None and up is not None
        h = x[row] @ down
        if isinstance(weights.activation, str):
            names = [weights.activation]
        else:
            names = [name for name, mask in weights.activation.items() if mask[row].item()]
        for name in names:
            h = {"identity": lambda h: h, "relu": torch.relu, "gelu": torch.nn.functional.gelu}[name](h)
        out.append(y[row] + (h if core is None else h @ core) @ up)
    found = torch.stack(out)
    return found if weights.beside is None else plain_loop(found, x, weights.beside)


@given(st.integers(0, 10**6))
def test_the_op_equals_a_plain_loop(seed: int) -> None:
    """Any of the matrices common or each row's own, with a core or without, masks, and others beside."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    rows, tokens, d_in, d_out = rng.randint(2, 5), rng.randint(1, 4), 7, 6
    masks = torch.rand(rows) < 0.5
    by_row = {"identity": masks.view(-1, 1, 1), rng.choice(["relu", "gelu"]): ~masks.view(-1, 1, 1)}
    activation: Any = rng.choice(["identity", "relu", "gelu", by_row])

    def draw(*shape: int) -> Tensor:
        return torch.randn(*([rows] if rng.random() < 0.5 else []), *shape, dtype=torch.float64) / math.sqrt(shape[0])

    weights: PositionWeights | None = None
    for _ in range(rng.randint(1, 3)):
        r, s = rng.randint(1, 4), rng.randint(1, 4)
        core = draw(r, s) if rng.random() < 0.7 else None
        weights = PositionWeights(draw(d_in, r), draw(r if core is None else s, d_out), activation, core, weights)
    assert weights is not None
    x, y = torch.randn(rows, tokens, d_in, dtype=torch.float64), torch.randn(rows, tokens, d_out, dtype=torch.float64)
    expected, before = plain_loop(y, x, weights), y.clone()
    torch.testing.assert_close(add_branch(y, x, weights), expected)
    assert torch.equal(y, before)
    start = rng.randrange(rows)
    stop = rng.randint(start + 1, rows)
    part = weights.of_rows(start, stop, rows)
    if weights.runs is None:
        part = weights
    if part.runs is not None or isinstance(activation, str):
        torch.testing.assert_close(add_branch(y[start:stop], x[start:stop], part), expected[start:stop])
    torch.testing.assert_close(add_branch(y, x, weights, in_place=True), expected)


def test_it_differentiates() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, 5, dtype=torch.float64), torch.randn(4, 3, 6, dtype=torch.float64)
    down, core, up = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 2), (4, 2, 3), (3, 6))
    )
    assert torch.autograd.gradcheck(
        lambda d, c, u: add_branch(y, x, PositionWeights(d, u, "gelu", c)), (down, core, up)
    )


def test_the_kernel_knows_no_cores() -> None:
    plain = PositionWeights(torch.zeros(4, 2), torch.zeros(2, 4), "identity")
    x = torch.zeros(1, 3, 4)
    for weights in (
        PositionWeights(plain.down, plain.up, "identity", torch.zeros(2, 2)),
        PositionWeights(plain.down, plain.up, "identity", beside=plain),
    ):
        assert not can_fuse(x, x, weights)


# ---- random mixes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_any_mix_of_tasks_on_bases_equals_a_plain_loop(backbone: Backbone, task_maker: Maker, seed: int) -> None:
    rng = random.Random(seed)
    made = []
    for i in range(rng.randint(2, 8)):
        if rng.random() < 0.2:
            rank = rng.randint(1, 5)
            made.append(task_maker(f"t{i}", seed=i, rank=rank, positions=("blocks.0.attn", "blocks.1.mlp")))
            continue
        bases = rng.choice(["v1", "v1", "v1", "v2", "v3", "v4"])
        task = on_bases(
            f"t{i}",
            100 * seed + i,
            bases,
            {"v1": (6, 6), "v2": (8, 4), "v3": (3, 5), "v4": (6, 6)}[bases],
            own=rng.choice([0, 0, 1, 3]),
            positions=rng.sample(POSITIONS, rng.randint(1, 4)),
            cores=rng.choice([1, 1, 2]),
            activation=rng.choice(["identity", "identity", "relu", "gelu"]),
            bits=rng.choice([None, None, 8]),
            classes=rng.randint(1, 4),
        )
        made.append(task)
    router = router_of(backbone, made)
    picks = [rng.randrange(len(made)) for _ in range(rng.randint(1, 9))]
    images = images_of(len(picks))
    found = router.run(images, [made[pick].name for pick in picks]).logits
    agree(found, [reference(backbone, made[pick], image) for pick, image in zip(picks, images, strict=True)])
    together = router.run_all(images[:2], [task.name for task in made])
    for task in made:
        agree(together[task.name].logits, [reference(backbone, task, image) for image in images[:2]])
