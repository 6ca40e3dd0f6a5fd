"""Fine-tuning on your own data: cross-encoders, and bi-encoders for the first stage.

Bi-encoders are trained by sentence-transformers' trainer, cross-encoders by a loop of our own (`fit` gives the measured
reason). Needs the extra ``train``.
"""

from rerank_plugins._judgements import Pair, Triple
from rerank_plugins.training._api import train
from rerank_plugins.training._data import Group, is_trained_on, read_pairs, read_triples
from rerank_plugins.training._loop import fit
from rerank_plugins.training._negatives import MinedTriples, mine
from rerank_plugins.training._results import TrainedModel, TrainedRetriever, TrainingResult
from rerank_plugins.training._retriever import train_retriever
from rerank_plugins.training.settings import RetrieverSettings, TrainingConfig, TrainSettings

__all__ = [
    "Group",
    "MinedTriples",
    "Pair",
    "RetrieverSettings",
    "TrainSettings",
    "TrainedModel",
    "TrainedRetriever",
    "TrainingConfig",
    "TrainingResult",
    "Triple",
    "fit",
    "is_trained_on",
    "mine",
    "read_pairs",
    "read_triples",
    "train",
    "train_retriever",
]
