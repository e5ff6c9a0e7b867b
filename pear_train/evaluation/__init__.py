"""Measures tasks on labelled images: figures, comparisons, a gate and a report (extra `eval`)."""

from pear_train.evaluation.answers import Answers, Subject
from pear_train.evaluation.compare import Comparison
from pear_train.evaluation.evaluated import Evaluated, Evaluation, evaluate
from pear_train.evaluation.figures import Figures
from pear_train.evaluation.gate import Gate
from pear_train.evaluation.sample import Sample

__all__ = ["Answers", "Comparison", "Evaluated", "Evaluation", "Figures", "Gate", "Sample", "Subject", "evaluate"]
