"""Cross-encoder reranking for LangChain and LlamaIndex, from one shared scoring core.

`rerank_plugins.langchain` and `rerank_plugins.llama_index` hold the adapters; `Reranker` works without a framework.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rerank_plugins.calibration import Calibration
    from rerank_plugins.errors import (
        ConfigurationError,
        InputError,
        MissingDependencyError,
        ModelLoadError,
        QueryError,
        RerankError,
        ScoringError,
        ServerError,
        ServerTimeout,
    )
    from rerank_plugins.reranker import Reranker
    from rerank_plugins.settings import Settings
    from rerank_plugins.types import BackendName, Candidate, Precision, RankedCandidate, Ranking, Scale

__all__ = [
    "BackendName",
    "Calibration",
    "Candidate",
    "ConfigurationError",
    "InputError",
    "MissingDependencyError",
    "ModelLoadError",
    "Precision",
    "QueryError",
    "RankedCandidate",
    "Ranking",
    "RerankError",
    "Reranker",
    "Scale",
    "ScoringError",
    "ServerError",
    "ServerTimeout",
    "Settings",
    "__version__",
]

__version__ = "0.1.0"

_HOMES = {"Calibration": "calibration", "Reranker": "reranker", "Settings": "settings"}


def __getattr__(name: str) -> object:
    # At first use: NumPy alone takes most of the time that an eager import would.
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES.get(name) or ("errors" if name.endswith(("Error", "Timeout")) else "types")
    return getattr(import_module(f"rerank_plugins.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
