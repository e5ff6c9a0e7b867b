"""Every fixed choice of an option, as a type: what may be said, and what each word means.

:func:`pear_train.options.check_option` judges values by these types, so nobody else lists the words.
"""

from typing import Literal, TypeAlias

Method: TypeAlias = Literal["pear", "adapters", "linear"]
"""pear: prune and share; adapters: no pruning; linear: head only."""
Activation: TypeAlias = Literal["identity", "relu", "gelu"]
"""Between `down` and `up`; those that a task checkpoint can name."""
Down: TypeAlias = Literal["own", "common"]
"""own: trained; common: frozen, the same for all tasks of a backbone."""
Importance: TypeAlias = Literal["taylor", "taylor_abs", "magnitude", "gradient", "random", "first"]
"""What ranks adapters (pear_train/importance.py); random, and first (the earlier, the higher), are controls."""
GradientScore: TypeAlias = Literal["taylor", "taylor_abs", "gradient"]
"""The importances that need gradients."""
Sharing: TypeAlias = Literal["nearest", "top", "similar", "none"]
"""How a pruned position finds the kept adapter that it borrows (pear_train/prune.py)."""
Borrow: TypeAlias = Literal["core", "scale"]
"""What a borrowed branch has of its own: a matrix of rank x rank, or one number."""
Knowledge: TypeAlias = Literal["none", "fold", "lowbit", "exact"]
"""What is preserved of a pruned adapter at its own position (pear_train/knowledge.py)."""
KnowledgeBits: TypeAlias = Literal[1, 4]
Augmentation: TypeAlias = Literal["flip", "crop", "rotate", "zoom", "color", "mixup"]
"""What training images undergo (pear_train/data/augment.py); an option joins some of these by +."""
Balance: TypeAlias = Literal["none", "weights", "sampling"]
"""How uneven classes are met: not; a rare class's images weigh more in the loss; or they come more often."""
Select: TypeAlias = Literal["best", "macro_f1", "last"]
"""Which epoch is kept: the one of the best top-1 on val, of the best macro F1, or the last."""
Dtype: TypeAlias = Literal["auto", "float32", "bfloat16"]
"""Precision of the forward in training: auto asks the machine."""
Precision: TypeAlias = Literal["float32", "bfloat16"]
"""What `auto` becomes."""
TensorDtype: TypeAlias = Literal["F16", "BF16", "F32", "Q8", "Q4", "Q2", "Q1"]
"""What adapters are written in: floats, or codes of 8, 4, 2 or 1 bits."""
CoreDtype: TypeAlias = Literal["auto", "F16", "BF16", "F32", "Q8", "Q4", "Q2"]
"""What cores are written in; auto: the floats that adapters are written in, or beside codes F16."""
HeadDtype: TypeAlias = Literal["F16", "BF16", "F32", "Q8", "Q4", "Q2"]
"""What the head is written in."""
Role: TypeAlias = Literal["knowledge", "bank", "base", "bases"]
"""What a frozen adapter is."""
OnError: TypeAlias = Literal["report", "raise"]
"""report: a task that fails gives a Failed, and the others go on; raise: its error ends the call."""
