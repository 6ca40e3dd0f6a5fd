"""Scores that are kept: in memory, in an SQLite file, or in any store with LangChain's ``mget`` and ``mset``.

A key is a SHA-256 over the fingerprint of the model, the settings that decide a logit, the query and the text. A value
holds the raw logits of the text's windows, so that label, scale, calibration and cuts can change without scoring again.
"""

from rerank_plugins.cache._scored import ScoreCache, WindowLogits, as_store, settings_digest
from rerank_plugins.cache._stores import FileCache, MemoryCache, ScoreStore

__all__ = ["FileCache", "MemoryCache", "ScoreCache", "ScoreStore", "WindowLogits", "as_store", "settings_digest"]
