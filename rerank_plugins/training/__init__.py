"""Fine-tuning cross-encoders: on your own pairs, or the bundled model's recipe (extra ``train``).

The loop is the project's own rather than sentence-transformers' trainer; see `fit` for the measured reason.
"""

from rerank_plugins.training._api import TrainedModel, train, train_bundled
from rerank_plugins.training._data import Group, Pair, read_pairs
from rerank_plugins.training._loop import TrainingConfig, TrainingResult, fit

__all__ = [
    "Group",
    "Pair",
    "TrainedModel",
    "TrainingConfig",
    "TrainingResult",
    "fit",
    "read_pairs",
    "train",
    "train_bundled",
]
