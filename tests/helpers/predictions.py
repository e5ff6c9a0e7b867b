"""What a router answered, as tests compare it."""

import torch

from router import Predictions


def whole(predictions: Predictions) -> torch.Tensor:
    """The logits of a batch whose rows have equally many classes."""
    assert isinstance(predictions.logits, torch.Tensor)
    return predictions.logits
