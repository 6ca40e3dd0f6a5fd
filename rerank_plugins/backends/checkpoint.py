"""What the directory of a model says and holds, read from its files alone: no engine, no PyTorch, nothing is run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from tokenizers import Tokenizer, normalizers

from rerank_plugins.backends._files import ModelFiles
from rerank_plugins.backends._prompts import Prompt, Render, prompt_of
from rerank_plugins.backends._schema import MAX_PROMPT, MAX_TEMPLATE, JsonFile, shortened
from rerank_plugins.backends.graphs import Graph
from rerank_plugins.backends.pairs import PairEncoder
from rerank_plugins.backends.weights import is_lfs_pointer
from rerank_plugins.errors import ModelLoadError

__all__ = ["Checkpoint", "Prompt"]

_MOST_MODULES = 100
_MOST_TYPES = 2**15
_SEES_PADDING = {"canine", "convbert", "fnet"}
"""Families whose convolutions or transforms run over the padding too."""
_NO_LIMIT = 10**9
"""Beyond this a tokenizer's limit is a placeholder for "none": transformers writes int(1e30)."""
_DEFAULT_LIMIT = 512
_COUNTS_POSITIONS = re.compile(
    r"(xlm)?roberta.*|camembert|mpnet|data2vectext|longformer|xmod|ibert|m?luke|bertweet|lilt|markuplm|.*roberta", re.I
)
"""Families whose first position is ``pad_token_id + 1``: of 514 positions, 512 can be used. Without ``_`` and ``-``."""
_TWO_SEPARATORS = 2


@dataclass(frozen=True, slots=True)
class Module:
    """One step of a sentence-transformers model: its class and the folder with its files."""

    kind: str
    folder: str


class Checkpoint:
    """A model as its files describe it.

    Args:
        files: The files. What tells about the model is on disk.
        base: The checkpoint that an adapter was trained on; None for others.

    Raises:
        ModelLoadError: A file has a value that no model has; the message names file and key.
    """

    def __init__(self, files: ModelFiles, base: Checkpoint | None = None) -> None:
        self.files = files
        self.name = files.name
        self.base = base
        self._prompted: list[Prompt | None] = []
        self.modules = self._read_modules()
        self.folder = self.modules[0].folder if self.modules else ""
        own = self._json("config.json")
        self.config: JsonFile = own if own.values or base is None else base.config
        self.tokenizer_config = self._json("tokenizer_config.json")
        self.adapter_config = self._json("adapter_config.json")
        self.settings = self._json("sentence_bert_config.json")
        self.prompts = self._json("config_sentence_transformers.json", root=True)
        self._check()

    # -- what it says ---------------------------------------------------------------------------------------------

    def _json(self, name: str, *, root: bool = False) -> JsonFile:
        return JsonFile(self.files.path / ("" if root else self.folder) / name, self.name)

    def _read_modules(self) -> list[Module]:
        listing = JsonFile(self.files.path / "modules.json", self.name, listed=True)
        if len(listing.items) > _MOST_MODULES:
            raise listing.wrong(None, f"a list of at most {_MOST_MODULES} modules", listing.items)
        modules = []
        for item in listing.items:
            kind, folder = (item.get(key) if isinstance(item, dict) else None for key in ("type", "path"))
            place = PurePosixPath(folder.replace("\\", "/")) if isinstance(folder, str) else PurePosixPath("..")
            if not isinstance(kind, str) or place.is_absolute() or ".." in place.parts:
                raise listing.wrong(None, "a list of modules with 'type' and a 'path' inside of the directory", item)
            modules.append(Module(kind, "" if str(place) == "." else str(place)))
        return modules

    def _check(self) -> None:
        config, files = self.config, self.files
        if not (config.values or self.modules or self.adapter_config.values or self.graph_only):
            found = sorted(files.names)[:20]
            raise ModelLoadError(
                f"{self.name!r} is no model directory: expected config.json in {files.path}, found "
                f"{found or 'nothing'}. Give a Hub id, or a directory with config.json, a tokenizer and weights, or "
                "with an ONNX graph and tokenizer.json."
            )
        _ = self.labels
        config.check_numbers()
        for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
            # With a slash it would be a repository whose code is fetched and run.
            if isinstance(value := config.get(key), str) and "/" in value:
                raise config.wrong(key, "the name of an implementation of transformers", value)
        config.texts("architectures")
        config.text("model_type", 200)
        config.mapping("rerank_plugins")
        self.tokenizer_config.text("tokenizer_class", 200)
        self.tokenizer_config.integer("pad_token_type_id", 0, _MOST_TYPES)
        for file in (config, self.tokenizer_config):
            for names in file.mapping("auto_map").values():
                parts = names if isinstance(names, list) else [names]
                if not all(part is None or isinstance(part, str) for part in parts):
                    raise file.wrong("auto_map", "an object of names of classes", names)
        vocabulary = config.integer("vocab_size", 0)
        if vocabulary and self.pad_id is not None and self.pad_id >= vocabulary:
            raise config.wrong("pad_token_id", f"below vocab_size, {vocabulary}", self.pad_id)
        self._check_settings()
        # Read once, so that what is wrong with them is told before anything is loaded.
        _ = self.pad_id, self.limit(), self.default_prompt, self.template

    def _check_settings(self) -> None:
        """Refuse settings of sentence-transformers that lead out of the directory or switch a check off."""
        for key in ("model_args", "model_kwargs", "tokenizer_args", "processor_kwargs", "config_args", "config_kwargs"):
            given = self.settings.mapping(key)
            odd = sorted(set(given) & _OUTSIDE)
            if odd or any(
                "/" in str(given.get(name, "")) for name in ("attn_implementation", "experts_implementation")
            ):
                raise self.settings.wrong(key, "settings that stay within the model's directory", odd or given)
        if other := self.settings.text("tokenizer_name_or_path"):
            raise self.settings.wrong("tokenizer_name_or_path", "left out: the tokenizer is the model's own", other)

    @property
    def architecture(self) -> str:
        """The class of transformers that the configuration names; empty where it names none."""
        names = self.config.texts("architectures")
        return names[0] if names else ""

    @property
    def model_type(self) -> str | None:
        """The family, e.g. ``"bert"``."""
        return self.config.text("model_type", 200)

    @property
    def is_causal(self) -> bool:
        """Whether this is a decoder that is scored by its next token, not by a classification head."""
        return self.architecture.endswith(("ForCausalLM", "LMHeadModel"))

    @property
    def remote_code(self) -> bool:
        """Whether the checkpoint brings Python code of its own."""
        return bool(self.config.mapping("auto_map")) or any(
            name.endswith(".py") and "/" not in name for name in self.files.names
        )

    @property
    def graph_only(self) -> bool:
        """Whether there are graphs and a tokenizer, and nothing else that tells about the model."""
        graphs = any(name.endswith(".onnx") for name in self.files.names)
        return graphs and not self.config.values

    @cached_property
    def labels(self) -> tuple[str, ...] | None:
        """Class names by column; None where the files do not tell."""
        return self.config.labels()

    @property
    def saved(self) -> bool:
        """Whether sentence-transformers or this package saved it, so that its settings for both are meant."""
        return bool(self.modules or self.config.mapping("rerank_plugins"))

    @cached_property
    def default_prompt(self) -> str | None:
        """The prompt that sentence-transformers would put before the query."""
        prompts = self.prompts.mapping("prompts")
        name = self.prompts.text("default_prompt_name")
        if not self.saved or name is None:
            return None
        if name not in prompts:
            raise self.prompts.wrong("default_prompt_name", f"one of {shortened(sorted(prompts))}", name)
        prompt = prompts[name]
        if prompt is not None and (not isinstance(prompt, str) or len(prompt) > MAX_PROMPT):
            raise self.prompts.wrong("prompts", f"strings of at most {MAX_PROMPT} characters", prompt)
        return prompt or None

    @cached_property
    def hidden_size(self) -> int | None:
        """Width of the token vectors, where the configuration tells."""
        return self.config.integer("hidden_size", 1)

    # -- lengths and padding --------------------------------------------------------------------------------------

    def limit(self, graph: Graph | None = None) -> int:
        """Most tokens that the model takes: the smallest limit of tokenizer, settings and positions.

        Args:
            graph: The graph that will run; it knows its positions where the configuration does not.
        """
        found = [_NO_LIMIT]
        for file, keys in (
            (self.tokenizer_config, ("model_max_length",)),
            (self.settings if self.saved else None, ("max_seq_length",)),
        ):
            found += [value for key in keys if file is not None and (value := file.integer(key, 1, 10**40))]
        if self.saved:
            found += self._processing_limits()
        if (positions := self.positions(graph)) is not None:
            found.append(positions)
        ours = self.config.mapping("rerank_plugins").get("max_length")
        if isinstance(ours, int) and not isinstance(ours, bool) and ours > 0:
            found.append(ours)
        least = min(found)
        if least >= _NO_LIMIT:
            least = self._published_length() or _DEFAULT_LIMIT
        return least

    def _processing_limits(self) -> list[int]:
        found = []
        for kind in ("common", "text", "chat_template"):
            values = self.settings.nested("processing_kwargs", kind)
            length = values.get("max_length")
            if length is None:
                continue
            if isinstance(length, bool) or not isinstance(length, int) or length < 1:
                raise self.settings.wrong(f"processing_kwargs.{kind}.max_length", "a number of tokens", length)
            found.append(length)
        for key in ("tokenizer_args", "processor_kwargs"):
            length = self.settings.mapping(key).get("model_max_length")
            if isinstance(length, int) and not isinstance(length, bool) and length > 0:
                found.append(length)
        return found

    def positions(self, graph: Graph | None = None) -> int | None:
        """Tokens that the table of positions has room for; None where there is no such table, or none is told."""
        rows = self.config.integer("max_position_embeddings", -1)
        if rows is None or rows < 1:
            rows = None
        if graph is not None and graph.positions is not None:
            rows = graph.positions if rows is None else min(rows, graph.positions)
        if rows is None:
            return None
        pad = self.config.integer("pad_token_id", -1)
        offset = (1 if pad is None or pad < 0 else pad) + 1 if self.counts_positions_of(graph) else 0
        return max(1, rows - offset)

    @property
    def counts_positions(self) -> bool:
        """Whether positions are counted from the padding on, by the files alone."""
        return self.counts_positions_of(None)

    def counts_positions_of(self, graph: Graph | None) -> bool:
        """Whether positions are counted from the padding on, by the family or, where it is not told, by other signs."""
        family = self.model_type or self.architecture.removesuffix("ForSequenceClassification").removesuffix("Model")
        if family:
            plain = re.sub(r"[-_]", "", family)
            if _COUNTS_POSITIONS.fullmatch(plain):
                return True
            if self.model_type:
                return False
        if graph is not None:
            return graph.counts_positions
        # The tokenizers of these families put two separators between the texts of a pair.
        return self._separators >= _TWO_SEPARATORS

    @cached_property
    def _separators(self) -> int:
        try:
            tokenizer = self.tokenizer()
        except ModelLoadError:
            return 1
        types = tokenizer.encode("a", "a").sequence_ids
        inner = types[types.index(0) : len(types) - types[::-1].index(1)] if 0 in types and 1 in types else []
        return inner.count(None)

    def _published_length(self) -> int | None:
        """The length that ``tokenizer.json`` cuts at, where nothing else tells."""
        if self.tokenizer_config.values or not self.files.there(self._in("tokenizer.json")):
            return None
        cut = self.tokenizer(keep_truncation=True).truncation
        return int(cut["max_length"]) if cut else None

    @cached_property
    def pad_id(self) -> int | None:
        """Token id of padding, by the configuration; None where it tells none."""
        found = self.config.integer("pad_token_id", -1)
        return None if found is None or found < 0 else found

    def token(self, name: str) -> str | None:
        """A special token of the tokenizer's configuration, e.g. ``"pad_token"``."""
        for file in (self.tokenizer_config, self._json("special_tokens_map.json")):
            value = file.get(name)
            content = value.get("content") if isinstance(value, dict) else value
            if content is not None and not isinstance(content, str):
                raise file.wrong(name, "a token", value)
            if content:
                return content
        return None

    # -- tokenizer and prompt -------------------------------------------------------------------------------------

    def _in(self, name: str) -> str:
        return f"{self.folder}/{name}" if self.folder else name

    @property
    def reads_segments(self) -> bool:
        """Whether the model is told which tokens are the query's: its tokenizer may say that it is not."""
        names = self.tokenizer_config.texts("model_input_names")
        return not names or "token_type_ids" in names

    @property
    def sees_padding(self) -> bool:
        """Whether the architecture mixes padding into a score, so that pairs of different lengths share no batch."""
        return self.model_type in _SEES_PADDING

    def folder_has(self, name: str) -> bool:
        """Whether a file is there beside the configuration, on disk or on the Hub."""
        return self._in(name) in self.files.names

    def tokenizer(self, *, keep_truncation: bool = False) -> Tokenizer:
        """A tokenizer of its own, read from the published ``tokenizer.json``.

        Raises:
            ModelLoadError: The file is missing or broken.
        """
        file = self.files.path / self._in("tokenizer.json")
        if not file.is_file():
            raise ModelLoadError(
                f"{self.name!r} has no tokenizer.json, which the onnx and openvino backends need. Use backend='torch', "
                "or convert the model once: rerank-plugins convert MODEL OUT"
            )
        if is_lfs_pointer(file):
            raise ModelLoadError(f"{file} is a Git LFS pointer, not the tokenizer. Fetch it with: git lfs pull")
        try:
            tokenizer = Tokenizer.from_file(str(file))
            probe = tokenizer.encode("a", "b")
            highest = max([*tokenizer.get_vocab().values(), *probe.type_ids], default=0)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:
            # The library's panics are no Exception.
            raise ModelLoadError(f"{file} of {self.name!r} cannot be read: {error}") from error
        if highest > np.iinfo(np.int32).max:
            raise ModelLoadError(f"{file} of {self.name!r} has the id {highest}; expected ids below 2**31.")
        if self.saved and self.settings.flag("do_lower_case") and not _lowers(tokenizer.normalizer):
            parts = [normalizers.Lowercase(), *([tokenizer.normalizer] if tokenizer.normalizer else [])]
            tokenizer.normalizer = normalizers.Sequence(parts)
        if not keep_truncation:
            tokenizer.no_truncation()
        return tokenizer

    @cached_property
    def template(self) -> str | None:
        """Source of the chat template; None where there is none."""
        wanted = self.settings.nested("processing_kwargs", "chat_template").get("chat_template")
        given = self.tokenizer_config.get("chat_template")
        file = self.files.path / self._in("chat_template.jinja")
        separate = self._json("chat_template.json").get("chat_template")
        if file.is_file():
            try:
                given = file.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise ModelLoadError(f"{file} of {self.name!r} cannot be read: {error}") from error
        elif given is None:
            given = separate
        if isinstance(given, list):
            if not all(isinstance(item, dict) and _is_named_template(item) for item in given):
                raise self.tokenizer_config.wrong("chat_template", "objects with 'name' and 'template'", given)
            named = {item["name"]: item["template"] for item in given}
            given = named.get(wanted if isinstance(wanted, str) and wanted in named else "default")
        elif isinstance(wanted, str):
            given = wanted
        if given is not None and (not isinstance(given, str) or len(given) > MAX_TEMPLATE):
            raise self.tokenizer_config.wrong(
                "chat_template", f"a template of at most {MAX_TEMPLATE} characters", given
            )
        return given or None

    @property
    def takes_messages(self) -> bool:
        """Whether pairs go through the chat template, as sentence-transformers decides it."""
        if self.template is None:
            return False
        # What was saved says so; otherwise a template is there to be used.
        return not self.saved or "message" in self.settings.mapping("modality_config")

    def prompt(self, tokenizer: Tokenizer) -> Prompt | None:
        """How pairs become prompts; None where the model reads a query and a text as they are.

        Args:
            tokenizer: The model's tokenizer.

        Raises:
            ModelLoadError: A decoder has no prompt that a pair could go into, or its template fails.
        """
        if not self._prompted:
            self._prompted = [prompt_of(self, tokenizer)]
        return self._prompted[0]

    @property
    def keeps_suffix(self) -> bool:
        """Whether the end of a prompt survives a cut."""
        return self.settings.nested("processing_kwargs", "chat_template").get("restore_suffix") is not False

    def check_ids(self, tokenizer: Tokenizer, *, with_types: bool) -> None:
        """Refuse a tokenizer that makes tokens which the model has no vector for.

        Args:
            tokenizer: The model's tokenizer.
            with_types: Whether the model reads segment ids.

        Raises:
            ModelLoadError: It does.
        """
        checks = [("vocab_size", max(tokenizer.get_vocab().values(), default=0), "a token")]
        if with_types:
            checks.append(("type_vocab_size", max(tokenizer.encode("a", "b").type_ids, default=0), "a segment"))
        for key, highest, what in checks:
            size = self.config.integer(key, 0)
            if size and highest >= size:
                raise ModelLoadError(
                    f"{self.files.path / self._in('tokenizer.json')} of {self.name!r} has {what} {highest}, but the "
                    f"model has {size} of them ({key} of config.json). The two are not of one model."
                )

    def encoder(
        self, tokenizer: Tokenizer | None = None, *, graph: Graph | None = None, prompt: Prompt | None = None
    ) -> PairEncoder:
        """Tokenises pairs for this model.

        Args:
            tokenizer: None reads ``tokenizer.json``.
            graph: The graph that will run, if one will.
            prompt: What `prompt` gave.
        """
        tokenizer = tokenizer or self.tokenizer()
        pad = self.token("pad_token")
        known = tokenizer.token_to_id(pad) if pad else None
        suffix: Sequence[int] = ()
        if prompt is not None and self.keeps_suffix:
            suffix = _common_suffix(tokenizer, prompt.render)
        return PairEncoder(
            tokenizer,
            limit=self.limit(graph),
            pad_id=int(known if known is not None else self.pad_id or 0),
            pad_type_id=self.tokenizer_config.integer("pad_token_type_id", 0, _MOST_TYPES) or 0,
            # The next token of a causal model is read at the last position.
            pad_left=self.is_causal,
            render=prompt.render if prompt else None,
            suffix_ids=suffix,
            instruction=self.default_prompt,
        )


_OUTSIDE = {
    "adapter_kwargs", "adapter_name", "cache_dir", "code_revision", "config", "gguf_file", "ignore_mismatched_sizes",
    "key_mapping", "local_files_only", "output_loading_info", "pretrained_model_name_or_path", "proxies", "revision",
    "state_dict", "subfolder", "token", "tokenizer_file", "use_safetensors", "vocab_file", "weights_only",
}  # fmt: skip
"""Keywords of transformers that lead out of the directory, or switch a check off."""


def _is_named_template(item: dict[str, Any]) -> bool:
    return isinstance(item.get("name"), str) and isinstance(item.get("template"), str)


def _lowers(normalizer: Any) -> bool:
    return "Lowercase" in repr(normalizer) or "lowercase=True" in repr(normalizer)


def _common_suffix(tokenizer: Tokenizer, render: Render) -> list[int]:
    """The tokens that end every prompt, whatever stands in it."""
    prompts = render([("0", "0"), ("1 2 3 4", "1 2 3 4")], None)
    first, second = (tokenizer.encode(text, add_special_tokens=False).ids for text in prompts)
    count = 0
    while count < min(len(first), len(second)) and first[-1 - count] == second[-1 - count]:
        count += 1
    return list(first[len(first) - count :])
