"""A cross-encoder over a sentence encoder's trunk: [CLS], similarity and shared words in one logit.

One encoder pass over the joint pair gives every token a vector that has seen both texts. The usual head reads
only the [CLS] vector and has to learn relevance from nothing. A sentence encoder's trunk already knows
similarity, so this head starts from it: the cosine of the two pooled texts and, as in ColBERT, each query
token's best match in the document. Neither sees well which words the two texts share, rare names and numbers above
all, so BM25 over their tokens is a term of its own, wherever it is known how rare each token is.

A trunk that only ever read one text at a time is lost in two: joined, its cosines rank far worse than apart.
So attention between query and document starts faint, by a constant that is subtracted from its logits, and an
untrained model ranks as the trunk does; training turns attention up where it helps.

References:
    Khattab and Zaharia, "ColBERT: Efficient and Effective Passage Search via Contextualized Late Interaction
    over BERT", SIGIR 2020 (https://arxiv.org/abs/2004.12832).
    MacAvaney et al., "Efficient Document Re-Ranking for Transformers by Precomputing Term Representations",
    SIGIR 2020 (https://arxiv.org/abs/2004.14255), where segments do not attend to each other in lower layers.
    Askari et al., "Injecting the BM25 Score as Text Improves BERT-Based Re-rankers", ECIR 2023
    (https://arxiv.org/abs/2301.09728).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Module, Transformer
from torch import Tensor

from rerank_plugins.backends._cross_encoder import CheckedTransformer, check_before, load_checked
from rerank_plugins.backends._schema import JsonFile
from rerank_plugins.backends.checkpoint import OUR_HEAD, Checkpoint
from rerank_plugins.backends.load import open_weights
from rerank_plugins.errors import InputError, ModelLoadError

_EPS = 1e-6
_CROSS_BIAS = -3.0
_K1, _B, _MEAN_LENGTH = 0.9, 0.4, 80.0
"""BM25's constants, as Anserini has them for passages, and the tokens of a document of usual length."""
_SHORT, _DAMPING = 120.0, 0.3
"""Among sentences, which share their topic, the words in common with the query say less than among passages: chosen on
held-out queries of the training data (``scripts/evaluate_held_out.py``), where 80 to 200 tokens do about as well."""
_TAKE_A_BIAS = {"bert", "electra"}
"""Model types that add a mask of four dimensions to their attention logits; DeBERTa takes it for true and false."""


class LateInteractionScore(Module):  # type: ignore[misc]
    """One relevance logit from the token vectors of a jointly encoded (query, document) pair.

    ``logit = scale * (w.[CLS] + a * cos(mean query, mean document) + c * maxsim + d * lexical + bias) + shift``

    where *maxsim* is the mean over query tokens of their largest cosine with a document token, and *lexical* the mean
    over query tokens, each weighted by its ``idf``, of BM25's ``tf / (tf + k1 * (1 - b + b * length / 80))``, times
    ``(length / 120) ** 0.3`` for documents of less than 120 tokens: from 0 to 1, and 0 until `know_rarity` has been
    told of documents. The special tokens take no part in any of them.
    ``scale`` and ``shift`` are a calibration fitted after training (1 and 0 until then).

    Reads ``token_embeddings`` (batch, tokens, dim), ``input_ids``, ``attention_mask`` and BERT-style
    ``token_type_ids`` (0 for the query, 1 for the document); writes ``scores``, float32 (batch, 1), raw logits.

    Args:
        hidden_size: Dimension of the token vectors.
        vocab_size: Entries of ``idf``, the tokenizer's tokens.
        cosine_weight: Where ``a`` starts.
        maxsim_weight: Where ``c`` starts.
        lexical_weight: Where ``d`` starts.
        exclude_special: Leave [CLS] and [SEP] out of both pools.
        cross_bias: What `bias_attention` adds in the trunk under this head, 0 for nothing; kept here since the
            trunk's own configuration has no place for it.
    """

    config_keys: list[str] = [  # noqa: RUF012
        "hidden_size",
        "vocab_size",
        "cosine_weight",
        "maxsim_weight",
        "lexical_weight",
        "exclude_special",
        "cross_bias",
    ]

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        cosine_weight: float = 14.0,
        maxsim_weight: float = 6.0,
        lexical_weight: float = 7.0,
        exclude_special: bool = True,
        cross_bias: float = 0.0,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.cosine_weight = cosine_weight
        self.maxsim_weight = maxsim_weight
        self.lexical_weight = lexical_weight
        self.exclude_special = exclude_special
        self.cross_bias = cross_bias
        self.linear = torch.nn.Linear(hidden_size, 1)
        torch.nn.init.zeros_(self.linear.weight)
        torch.nn.init.zeros_(self.linear.bias)
        # All weights are stored divided by ten: Adam moves every parameter by about the learning rate,
        # whatever its size.
        self.weights = torch.nn.Parameter(torch.tensor([cosine_weight, maxsim_weight, lexical_weight]) / 10)
        self.idf: Tensor
        self.register_buffer("idf", torch.zeros(vocab_size))
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds ``scores``, float32 of shape (batch, 1), to ``features``.

        Raises:
            ModelLoadError: If the tokenizer gives no ``token_type_ids``, so that query and document cannot be
                told apart.
        """
        if "token_type_ids" not in features:
            raise ModelLoadError(
                "LateInteractionScore needs token_type_ids (0 for the query, 1 for the document), and this "
                "tokenizer gives none. Use a BERT-style tokenizer and trunk."
            )
        hidden = features["token_embeddings"].float()
        mask = features["attention_mask"].to(hidden.dtype)
        second = features["token_type_ids"].to(hidden.dtype)
        query, document = mask * (1 - second), mask * second
        if self.exclude_special:
            # [CLS] opens the first segment and [SEP] closes both: drop the positions with no like neighbour
            # there.
            edge = torch.zeros_like(mask[:, :1])
            query = query * torch.cat([edge, query[:, :-1]], 1) * torch.cat([query[:, 1:], edge], 1)
            document = document * torch.cat([document[:, 1:], edge], 1)

        unit = hidden / (hidden.square().sum(-1, keepdim=True) + _EPS).sqrt()
        pooled_query = (hidden * query.unsqueeze(-1)).sum(1) / query.sum(1, keepdim=True).clamp(min=1)
        pooled_document = (hidden * document.unsqueeze(-1)).sum(1) / document.sum(1, keepdim=True).clamp(min=1)
        norms = (pooled_query.square().sum(-1) + _EPS).sqrt() * (pooled_document.square().sum(-1) + _EPS).sqrt()
        cosine = (pooled_query * pooled_document).sum(-1) / norms

        similar = unit @ unit.transpose(1, 2) - 4 * (1 - document).unsqueeze(1)
        best = similar.amax(-1).clamp(min=-1)
        maxsim = (best * query).sum(1) / query.sum(1).clamp(min=1)

        weights = self.weights * 10
        lexical = self.lexical(features["input_ids"], query, document)
        terms = weights[0] * cosine + weights[1] * maxsim + weights[2] * lexical
        logit = self.linear(hidden[:, 0]).squeeze(-1) + terms
        features["scores"] = (self.scale * logit + self.shift).unsqueeze(-1)
        return features

    def lexical(self, ids: Tensor, query: Tensor, document: Tensor) -> Tensor:
        """The BM25 term alone, from 0 to 1, float (batch,).

        Args:
            ids: Token ids, (batch, tokens).
            query: 1.0 at the query's tokens, otherwise 0.0, (batch, tokens).
            document: The same for the document's.
        """
        same = (ids.unsqueeze(2) == ids.unsqueeze(1)).to(document.dtype)
        found = (same @ document.unsqueeze(-1)).squeeze(-1)
        length = document.sum(1, keepdim=True)
        usual = _K1 * (1 - _B + _B / _MEAN_LENGTH * length)
        rarity = self.idf[ids] * query
        shared = (rarity * found / (found + usual)).sum(1) / rarity.sum(1).clamp(min=_EPS)
        return shared * (length.squeeze(1) / _SHORT).clamp(max=1) ** _DAMPING

    def know_rarity(self, documents: Iterable[Sequence[int]], special: Sequence[int] = ()) -> None:
        """Sets ``idf`` to ``log(1 + (n - df + 0.5) / (df + 0.5))`` of each token over ``n`` documents.

        Args:
            documents: Token ids of each document.
            special: Tokens that are no words, [UNK] among them: their ``idf`` is 0.

        Raises:
            InputError: If there is no document.
        """
        counts = torch.zeros(self.vocab_size)
        n_documents = 0
        for ids in documents:
            n_documents += 1
            counts[list(set(ids))] += 1
        if not n_documents:
            raise InputError("The rarity of words needs at least one document, and there is none.")
        self.idf.copy_(torch.log1p((n_documents - counts + 0.5) / (counts + 0.5)))
        self.idf[list(special)] = 0

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Writes ``config.json`` and ``model.safetensors`` to ``output_path``."""
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        init_defaults: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> LateInteractionScore:
        """Loads what `save` wrote, from a directory or a Hub id."""
        where: dict[str, Any] = {
            "subfolder": subfolder,
            "token": token,
            "cache_folder": cache_folder,
            "revision": revision,
            "local_files_only": local_files_only,
        }
        model = cls(**cls.load_config(model_name_or_path, **where))
        loaded: LateInteractionScore = cls.load_torch_weights(model_name_or_path, model=model, **where)
        return loaded


def bias_attention(trunk: Any, bias: float) -> None:
    """Adds ``bias`` to every attention logit between the query and the document, in all layers of ``trunk``.

    The logits towards [CLS] stay as they are: both texts read it, as they did alone.

    Args:
        trunk: A BERT-style encoder, called with ``attention_mask`` and ``token_type_ids``, both (batch, tokens).
        bias: At -3 a token of the other text counts a twentieth of what it would.
    """
    if bias:
        trunk.cross_bias = bias
        # No hook: sentence-transformers calls the method itself. Bound to the trunk, a deep copy gets its own.
        trunk.forward = MethodType(_joined_faintly, trunk)


def _joined_faintly(trunk: Any, *, attention_mask: Tensor, token_type_ids: Tensor, **given: Any) -> Any:
    dtype = next(trunk.parameters()).dtype
    crossing = (token_type_ids.unsqueeze(2) != token_type_ids.unsqueeze(1)).to(dtype)
    after_first = (torch.arange(attention_mask.shape[1], device=attention_mask.device) > 0).to(dtype)
    padding = (1 - attention_mask.to(dtype)).unsqueeze(1) * (torch.finfo(dtype).min / 2)
    mask = (padding + crossing * after_first * trunk.cross_bias).unsqueeze(1)
    return type(trunk).forward(trunk, attention_mask=mask, token_type_ids=token_type_ids, **given)


def build_cross_encoder(
    trunk: str | os.PathLike[str],
    *,
    max_length: int = 512,
    cross_bias: float | None = None,
    model_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> CrossEncoder:
    """A fresh cross-encoder: a pretrained encoder under an untrained `LateInteractionScore`.

    Args:
        trunk: Directory or Hub id of a BERT-style encoder.
        max_length: Tokens per pair, special tokens included.
        cross_bias: See `bias_attention`; None is -3 for the types of trunk that take one, otherwise 0.
        model_kwargs: Passed on to the trunk (``{"attn_implementation": "eager"}``).
        **kwargs: Passed on to `CrossEncoder` (``device=...``).

    Raises:
        ModelLoadError: If the tokenizer gives no ``token_type_ids``.
    """
    body = Transformer(
        os.fspath(trunk),
        transformer_task="feature-extraction",
        max_seq_length=max_length,
        model_kwargs=model_kwargs,
    )
    if "token_type_ids" not in body.tokenizer.model_input_names:
        raise ModelLoadError(
            f"{os.fspath(trunk)!r} has no token_type_ids, so a late-interaction head cannot tell the query "
            "from the document. Use a BERT-style trunk."
        )
    config = body.auto_model.config
    config.num_labels = 1
    if cross_bias is None:
        cross_bias = _CROSS_BIAS if config.model_type in _TAKE_A_BIAS else 0.0
    bias_attention(body.auto_model, cross_bias)
    head = LateInteractionScore(int(config.hidden_size), int(config.vocab_size), cross_bias=cross_bias)
    built: CrossEncoder = CrossEncoder(modules=[body, head], **kwargs)
    return built


def has_our_head(path: str | os.PathLike[str]) -> bool:
    """Whether a local directory holds a model with this head."""
    modules = JsonFile(Path(path) / "modules.json", os.fspath(path), listed=True).items
    return any(isinstance(module, dict) and module.get("type") == OUR_HEAD for module in modules)


def load_cross_encoder(model: Checkpoint | str | os.PathLike[str], **kwargs: Any) -> CrossEncoder:
    """Loads any cross-encoder, ours included, without running remote code.

    sentence-transformers imports module classes from outside its own package only under
    ``trust_remote_code=True``. A local directory that names our head in its ``modules.json`` is therefore put
    together here; everything else goes to `load_checked`.

    Args:
        model: A local directory, a Hub id, or an opened checkpoint whose files are on disk.
        **kwargs: See `load_checked`.

    Raises:
        ModelLoadError: If it cannot be loaded, or lacks weights that its architecture needs.
    """
    if not isinstance(model, Checkpoint):
        model = open_weights(os.fspath(model), trust_remote_code=bool(kwargs.get("trust_remote_code")))
    if not any(module.kind == OUR_HEAD for module in model.modules):
        return load_checked(model, **kwargs)
    check_before(model, trust_remote_code=bool(kwargs.get("trust_remote_code")))
    path = os.fspath(model.files.path)
    model_kwargs = {**(kwargs.get("model_kwargs") or {}), "use_safetensors": True}
    try:
        loaded: list[Any] = [
            LateInteractionScore.load(path, subfolder=module.folder)
            if module.kind == OUR_HEAD
            else CheckedTransformer.load(
                path, subfolder=module.folder, local_files_only=True, model_kwargs=dict(model_kwargs)
            )
            for module in model.modules
        ]
        loaded[0].auto_model.config.num_labels = 1
        bias_attention(loaded[0].auto_model, loaded[1].cross_bias)
        loaded[0].__class__ = Transformer
        if kwargs.get("max_length") is not None:
            loaded[0].max_seq_length = int(kwargs["max_length"])
        return CrossEncoder(modules=loaded, device=kwargs.get("device"), activation_fn=torch.nn.Sigmoid())
    except Exception as error:
        raise ModelLoadError(f"{path} names a late-interaction head but could not be loaded: {error}") from error
