"""Fine-tuning of both stages: cross-encoders and bi-encoders on your own data.

Bi-encoders are trained by sentence-transformers' trainer; for cross-encoders the loop is the project's own, see `fit`
for the measured reason. Needs the extra ``train``.
"""

from rerank_plugins.evaluation._pairs import Pair, Triple
from rerank_plugins.training._api import TrainedModel, train
from rerank_plugins.training._config import TrainingConfig, TrainingResult
from rerank_plugins.training._data import Group, read_pairs, read_triples
from rerank_plugins.training._loop import fit
from rerank_plugins.training._negatives import MinedTriples, mine
from rerank_plugins.training._retriever import TrainedRetriever, train_retriever

__all__ = [
    "Group",
    "MinedTriples",
    "Pair",
    "TrainedModel",
    "TrainedRetriever",
    "TrainingConfig",
    "TrainingResult",
    "Triple",
    "fit",
    "mine",
    "read_pairs",
    "read_triples",
    "train",
    "train_retriever",
]
