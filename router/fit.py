"""Checks that a task fits a backbone."""

from pear_store import Task
from router.adapted import AdaptedBackbone
from router.errors import RouterError, TaskError, WrongBackboneError
from router.pictures import check_reading


def check_fit(adapted: AdaptedBackbone, name: str, task: Task) -> None:
    """Checks that a task runs on a backbone, and attaches its positions.

    Args:
        name: the reference by which the task was asked for.
    Raises:
        WrongBackboneError: the task was made for another backbone.
        TaskError: a position or a width is not the backbone's, or the rule for reading its pictures is unknown.
    """
    backbone = adapted.backbone
    if task.backbone_digest != backbone.digest:
        raise WrongBackboneError(name, task.backbone_model, task.backbone_digest, backbone.name, backbone.digest)
    try:
        check_reading(task.preprocess)
        if not task.positions.keys() <= adapted.widths.keys():
            adapted.attach(task.positions)
    except RouterError as error:
        raise TaskError(name, str(error)) from None
    for position, branches in task.positions.items():
        found, expected = task.adapters[branches[0].adapter].shape, adapted.widths[position]
        if found != expected:
            raise TaskError(name, f"position {position!r}: expected the backbone's widths {expected}, found {found}")
    width = adapted.feature_width
    if task.head is not None and (takes := task.head.weight.shape[1]) != width:
        raise TaskError(name, f"its head: expected the backbone's {width} features, found {takes}")
