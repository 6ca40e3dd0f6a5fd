"""Checkpoints as sentence-transformers' `CrossEncoder`, with every weight read from the files, and nothing else run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules.logit_score import LogitScore
from tokenizers import Tokenizer, normalizers

from rerank_plugins._extras import import_extra
from rerank_plugins.backends._schema import JsonFile
from rerank_plugins.backends.checkpoint import Checkpoint, Prompt
from rerank_plugins.backends.weights import check_says
from rerank_plugins.errors import ModelLoadError, RerankError

__all__ = ["CheckedTransformer", "can_pad", "check_before", "load_checked", "reading"]

_KNOWN_MODULES = {
    "Dense", "Dropout", "LayerNorm", "LogitScore", "Normalize", "Pooling", "Router", "Transformer",
    "WeightedLayerPooling",
}  # fmt: skip
"""Classes of sentence-transformers that ``modules.json`` may name without consent to code."""
_ACTIVATIONS = {
    "torch.nn.modules.activation.Sigmoid": torch.nn.Sigmoid,
    "torch.nn.modules.linear.Identity": torch.nn.Identity,
    "torch.nn.Sigmoid": torch.nn.Sigmoid,
    "torch.nn.Identity": torch.nn.Identity,
}


def check_before(checkpoint: Checkpoint, *, trust_remote_code: bool) -> None:
    """Refuse what PyTorch's libraries would read or run of a checkpoint and should not, before they see it.

    Raises:
        ModelLoadError: Its weights are missing, damaged, a pickle, or not those of a reranker; or it names code to run.
    """
    check_says(checkpoint, trust_remote_code=trust_remote_code)
    if not trust_remote_code:
        _check_code(checkpoint)


def _check_code(checkpoint: Checkpoint) -> None:
    """Refuse classes of a checkpoint that are not those of sentence-transformers and PyTorch."""
    for module in checkpoint.modules:
        package, _, kind = module.kind.rpartition(".")
        if not package.startswith("sentence_transformers.") or kind not in _KNOWN_MODULES:
            raise ModelLoadError(
                f"modules.json of {checkpoint.name!r} names the class {module.kind!r}, which is code of its own. The "
                "repository brings its own code: read it, then pass trust_remote_code=True."
            )
        settings = JsonFile(checkpoint.files.path / module.folder / "config.json", checkpoint.name)
        activation = settings.text("activation_function") if kind == "Dense" else None
        if activation is not None and not activation.startswith("torch.nn."):
            raise settings.wrong("activation_function", "a class of torch.nn", activation)


def load_checked(
    checkpoint: Checkpoint,
    *,
    device: str | None = None,
    trust_remote_code: bool = False,
    max_length: int | None = None,
    model_kwargs: dict[str, Any] | None = None,
) -> CrossEncoder:
    """Load a checkpoint whose files are on disk.

    Args:
        checkpoint: The model.
        device: torch device; None takes a GPU where there is one.
        trust_remote_code: Run Python code of the repository.
        max_length: Tokens per pair; None takes what the files say.
        model_kwargs: For transformers' ``from_pretrained``.

    Raises:
        ModelLoadError: It cannot be loaded, or lacks weights that its architecture needs.
    """
    check_before(checkpoint, trust_remote_code=trust_remote_code)
    path = str(checkpoint.files.path)
    config_kwargs: dict[str, Any] = {}
    if "pad_token_id" in checkpoint.config.values and checkpoint.pad_id is None and checkpoint.counts_positions:
        config_kwargs["pad_token_id"] = 1
    shared: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    processor_kwargs = {} if max_length is None else {"model_max_length": max_length}
    try:
        if checkpoint.modules:
            model = CrossEncoder._load_with_module_classes(
                path,
                {
                    module.kind: CheckedTransformer
                    for module in checkpoint.modules
                    if module.kind.startswith("sentence_transformers.") and module.kind.endswith(".Transformer")
                },
                device=device,
                local_files_only=True,
                activation_fn=torch.nn.Identity(),
                model_kwargs=model_kwargs,
                processor_kwargs=processor_kwargs,
                config_kwargs=config_kwargs,
                **shared,
            )
        else:
            transformer = CheckedTransformer(
                path,
                transformer_task="text-generation" if checkpoint.is_causal else "sequence-classification",
                model_kwargs={**shared, **(model_kwargs or {})},
                processor_kwargs={**shared, **processor_kwargs},
                config_kwargs={**shared, **config_kwargs},
            )
            modules: list[Any] = [transformer]
            if checkpoint.is_causal:
                modules.append(_yes_no(checkpoint, transformer.tokenizer))
            model = CrossEncoder(modules=modules, device=device, activation_fn=torch.nn.Identity(), **shared)
    except MissingWeights as error:
        raise _missing(checkpoint, error, trust_remote_code=trust_remote_code) from None
    except RerankError:
        raise
    except RecursionError as error:
        raise ModelLoadError(f"The files of {checkpoint.name!r} are nested too deeply.") from error
    except Exception as error:
        hint = (
            " The repository brings its own code: read it, then pass trust_remote_code=True."
            if "trust_remote_code" in str(error)
            else ""
        )
        raise ModelLoadError(
            f"sentence-transformers cannot load {checkpoint.name!r} as a CrossEncoder: {str(error)[:2000]}{hint}"
        ) from error
    for module in model:
        if type(module) is CheckedTransformer:
            # What is saved later names its class.
            module.__class__ = Transformer
    model.activation_fn = _activation(checkpoint, model.num_labels)
    return model


def reading(checkpoint: Checkpoint, model: Any) -> tuple[Tokenizer, Prompt | None]:
    """The tokenizer of a loaded model, and how pairs become prompts for it.

    The published ``tokenizer.json``, as on every engine; only without one, what transformers makes.

    Args:
        checkpoint: The model.
        model: Its `CrossEncoder`. For a published prompt its last module is made to read that one's tokens.

    Raises:
        ModelLoadError: There is no tokenizer of such a kind, or no prompt that a pair could go into.
    """
    hf_tokenizer = model.tokenizer
    if checkpoint.folder_has("tokenizer.json"):
        tokenizer = checkpoint.tokenizer()
    elif (raw := getattr(hf_tokenizer, "backend_tokenizer", None)) is not None:
        # A copy: nobody else's truncation or padding settings can reach it.
        tokenizer = Tokenizer.from_str(raw.to_str())
        _normalise_as_sentencepiece(checkpoint, tokenizer)
    else:
        raise ModelLoadError(
            f"{checkpoint.name!r} has a tokenizer that is written in Python ({type(hf_tokenizer).__name__}); a "
            "tokenizer.json is needed. Save one with transformers' AutoTokenizer(...).save_pretrained(DIR)."
        )
    prompt = checkpoint.prompt(tokenizer)
    checkpoint.check_ids(tokenizer, with_types="token_type_ids" in hf_tokenizer.model_input_names)
    if prompt is not None and prompt.tokens is not None:
        relevant, irrelevant = prompt.tokens
        model[1] = LogitScore(true_token_id=relevant, false_token_id=irrelevant)
    return tokenizer, prompt


def _normalise_as_sentencepiece(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    """Put back the table of characters of a sentencepiece model, which transformers leaves out of what it builds."""
    names = [name for name in checkpoint.files.names if name.endswith(".model") and "/" not in name]
    if len(names) != 1 or "Precompiled" in repr(tokenizer.normalizer):
        return
    sentencepiece: Any = import_extra("sentencepiece.sentencepiece_model_pb2", "torch")

    try:
        stored = sentencepiece.ModelProto.FromString((checkpoint.files.path / names[0]).read_bytes())
    except Exception as error:
        raise ModelLoadError(f"{names[0]} of {checkpoint.name!r} is no sentencepiece model: {error}") from error
    if table := stored.normalizer_spec.precompiled_charsmap:
        own = [tokenizer.normalizer] if tokenizer.normalizer is not None else []
        parts = [normalizers.Precompiled(table), *own, normalizers.Strip()]
        tokenizer.normalizer = normalizers.Sequence(parts)


def can_pad(model: Any) -> bool:
    """Let a decoder with a head find the last token of each text: it looks for the padding after it.

    Returns:
        False where no token stands for padding, so that texts can only be scored one at a time.
    """
    trunk = model[0].auto_model
    if not type(trunk).__name__.endswith("ForSequenceClassification"):
        return True
    inner = trunk.config.get_text_config()
    if getattr(inner, "pad_token_id", None) is not None:
        return True
    pad_id = model.tokenizer.pad_token_id
    inner.pad_token_id = trunk.config.pad_token_id = pad_id
    return pad_id is not None


def _activation(checkpoint: Checkpoint, n_labels: int) -> torch.nn.Module:
    """What `CrossEncoder.predict` would put after the logits: one of two, by its name. Nothing is imported by it."""
    named = checkpoint.config.mapping("sentence_transformers").get("activation_fn")
    named = named or checkpoint.config.get("sbert_ce_default_activation_function")
    default = torch.nn.Sigmoid if n_labels == 1 else torch.nn.Identity
    return (_ACTIVATIONS.get(named, default) if isinstance(named, str) else default)()


def _yes_no(checkpoint: Checkpoint, tokenizer: Any) -> LogitScore:
    vocabulary = tokenizer.get_vocab()
    if not {"yes", "no"} <= set(vocabulary):
        raise ModelLoadError(
            f"{checkpoint.name!r} is a causal language model without the tokens 'yes' and 'no', and without a "
            "modules.json that says which ones its score is read from."
        )
    return LogitScore(true_token_id=vocabulary["yes"], false_token_id=vocabulary["no"])


def _missing(checkpoint: Checkpoint, error: MissingWeights, *, trust_remote_code: bool) -> ModelLoadError:
    hint = "The checkpoint is incomplete, or of another architecture than its config.json says: fetch it again."
    if checkpoint.remote_code and not trust_remote_code:
        hint = "The repository brings its own code: read it, then pass trust_remote_code=True."
    elif error.only_head:
        hint = "It has no classification head: an embedding model is no reranker."
    return ModelLoadError(f"{checkpoint.name!r} cannot be loaded on PyTorch: {error}. {hint}")


class CheckedTransformer(Transformer):  # type: ignore[misc]
    """A `Transformer` whose weights were all in the checkpoint.

    Raises:
        ModelLoadError: Some were not: transformers makes random ones and goes on.
    """

    def _load_model(
        self,
        model_name_or_path: str,
        transformer_task: str,
        config: Any,
        backend: str,
        is_peft_model: bool,
        **model_kwargs: Any,
    ) -> Any:
        seen: list[tuple[type, dict[str, Any]]] = []
        given = {**model_kwargs, "use_safetensors": True}
        if is_peft_model:
            model, info = self._load_adapted(model_name_or_path, transformer_task, config, given)
            seen.append((type(model), info))
        else:
            model = super()._load_model(
                model_name_or_path, transformer_task, config, backend, False, **given, output_loading_info=True
            )
            if isinstance(model, tuple):
                model, info = model
                seen.append((type(model), info))
        if not seen:
            raise ModelLoadError(
                f"{model_name_or_path!r} cannot be checked for missing weights with this version of "
                'sentence-transformers. Install one that fits: pip install "rerank-plugins[torch]"'
            )
        kind, info = seen[0]
        missing = sorted({*info.get("missing_keys", ()), *(_key(item) for item in info.get("mismatched_keys", ()))})
        if transformer_task == "feature-extraction":
            # What the head reads are the token vectors.
            missing = [name for name in missing if "pooler." not in name]
        if missing:
            raise MissingWeights(kind.__name__, missing, getattr(model, "base_model_prefix", ""))
        return model

    def _load_adapted(self, adapter: str, task: str, config: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """A base model with the weights of an adapter; what the base lacks, the adapter must have."""
        settings = json.loads(Path(adapter, given.get("subfolder") or "", "adapter_config.json").read_text("utf-8"))
        base = settings["base_model_name_or_path"]
        for name in ("revision", "subfolder"):
            given.pop(name, None)
        plain = super()._load_model(base, task, config, "torch", False, **given, output_loading_info=True)
        model, info = plain
        loaded = model.load_adapter(adapter)
        found = {name for name, _ in model.named_parameters()}
        replaced = {name.split(".modules_to_save.")[0] for name in found if ".modules_to_save." in name}
        info = dict(info)
        info["missing_keys"] = [
            name for name in info.get("missing_keys", ()) if not any(name.startswith(f"{part}.") for part in replaced)
        ]
        told = loaded.to_dict() if hasattr(loaded, "to_dict") else {}
        info["missing_keys"] += list(told.get("missing_keys", ()))
        return model, info


def _key(item: Any) -> str:
    return str(item[0]) if isinstance(item, tuple | list) else str(item)


class MissingWeights(ModelLoadError):
    """Weights that an architecture needs and a checkpoint does not have; without the hint that a checkpoint gives."""

    def __init__(self, kind: str, names: Sequence[str], prefix: str) -> None:
        self.kind, self.names = kind, list(names)
        self.only_head = all(not name.startswith(f"{prefix}.") for name in names) if prefix else False
        listing = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        super().__init__(f"it lacks weights that {kind} needs: {listing}")
