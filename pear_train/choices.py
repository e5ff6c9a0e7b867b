"""Every fixed choice of an option, as a type: which words it takes, and what each one means.

:func:`pear_train.options.check_option` checks values by these types. So no other module lists the words.
"""

from typing import Literal, TypeAlias

Method: TypeAlias = Literal["pear", "adapters", "linear"]
"""pear: prune and share. adapters: no pruning. linear: only the head."""
Activation: TypeAlias = Literal["identity", "relu", "gelu"]
"""The function between `down` and `up`."""
Down: TypeAlias = Literal["own", "common"]
"""own: trained. common: frozen, the same for all tasks of a backbone."""
Importance: TypeAlias = Literal["taylor", "taylor_abs", "magnitude", "gradient", "random", "first"]
"""How adapters are ranked (pear_train/importance.py). random and first (the earlier, the higher) are controls."""
GradientScore: TypeAlias = Literal["taylor", "taylor_abs", "gradient"]
"""The importances that need gradients."""
Sharing: TypeAlias = Literal["nearest", "top", "similar", "none"]
"""Which kept adapter a pruned position borrows (pear_train/prune.py)."""
Borrow: TypeAlias = Literal["core", "scale"]
"""What a borrowed branch trains of its own: a matrix of rank x rank, or one number."""
Knowledge: TypeAlias = Literal["none", "fold", "lowbit", "exact"]
"""What a pruned position keeps of its adapter (pear_train/knowledge.py)."""
KnowledgeBits: TypeAlias = Literal[1, 4]
Augmentation: TypeAlias = Literal["flip", "crop", "rotate", "zoom", "color", "mixup"]
"""How training images are changed at random (pear_train/data/augment.py). An option joins several by +."""
Balance: TypeAlias = Literal["none", "weights", "sampling"]
"""What is done about rare classes. none: nothing. weights: more weight in the loss. sampling: they come more often."""
Select: TypeAlias = Literal["best", "macro_f1", "last"]
"""Which epoch is kept: the one with the best top-1 on val, the one with the best macro F1 on val, or the last."""
Dtype: TypeAlias = Literal["auto", "float32", "bfloat16"]
"""Precision of the forward in training. auto: the faster one on this machine."""
Precision: TypeAlias = Literal["float32", "bfloat16"]
"""What `auto` is replaced by."""
TensorDtype: TypeAlias = Literal["F16", "BF16", "F32", "Q8", "Q4", "Q2", "Q1"]
"""How adapters are written: as floats, or as codes of 8, 4, 2 or 1 bits."""
CoreDtype: TypeAlias = Literal["auto", "F16", "BF16", "F32", "Q8", "Q4", "Q2"]
"""How cores are written. auto: in the same floats as adapters; F16 if adapters are codes."""
HeadDtype: TypeAlias = Literal["F16", "BF16", "F32", "Q8", "Q4", "Q2"]
"""How the head is written."""
Role: TypeAlias = Literal["knowledge", "bank", "base", "bases"]
"""Where a frozen adapter comes from."""
OnError: TypeAlias = Literal["report", "raise"]
"""report: a task that fails gives a Failed, and the others go on. raise: its error ends the call."""
