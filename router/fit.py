"""Whether a task fits a backbone."""

from pear_store import Task
from router.adapted import AdaptedBackbone
from router.errors import RouterError, TaskError, WrongBackboneError
from router.pictures import check_reading


def check_fit(adapted: AdaptedBackbone, name: str, task: Task) -> None:
    """That a task runs on a backbone; its positions are attached.

    Args:
        name: what the task was asked for by.

    Raises:
        WrongBackboneError: it was made for another one.
        TaskError: a position or a width is not the backbone's, or its pictures are read in a way that is not known.
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
            raise TaskError(name, f"position {position!r}: widths {found}, the backbone's are {expected}")
    width = adapted.feature_width
    if task.head is not None and (takes := task.head.weight.shape[1]) != width:
        raise TaskError(name, f"its head takes {takes} features, the backbone gives {width}")
