"""Prompts: from a (query, text) pair to what a model reads, by the checkpoint's chat template or its published form."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeAlias

from tokenizers import Tokenizer

from rerank_plugins.errors import MissingDependencyError, ModelLoadError, ScoringError

if TYPE_CHECKING:
    from rerank_plugins.backends.checkpoint import Checkpoint

__all__ = ["Prompt", "Render", "prompt_of"]

Render: TypeAlias = Callable[[Sequence[tuple[str, str]], str | None], list[str]]
"""Prompts of (query, text) pairs, with an instruction or None."""

_NOT_FOR_TEMPLATES = {
    "restore_suffix", "chat_template", "max_length", "padding", "truncation", "return_tensors", "tokenize",
}  # fmt: skip
"""Keywords of ``processing_kwargs`` that no template reads."""
SECONDS = 2
"""Time of a processor that a chat template may take for all probes together."""
WAIT_S = 15
"""Time for that on a busy machine, with the start of a process."""
MOST = 1_000_000
"""Characters that a chat template may make of one pair beside its texts."""

_QUERY, _TEXT, _INSTRUCTION = "QzQueryzQ", "QzTextzQ", "QzInstructionzQ"
_SLOTS = re.compile(f"({_QUERY}|{_TEXT}|{_INSTRUCTION})")
_PROBES = (
    ("alpha", "bravo"),
    ("charlie", "bravo"),
    ("alpha", "foxtrot"),
    ("  two  words \n", "\tline\n\nline \n"),
    ("<b>\"a\" & 'b'</b> {{ c }} \\n é 熊猫", "1.5 [x] <|y|> " + "long " * 400),
)
"""The first three tell whether both texts reach the prompt; all tell whether they reach it unchanged."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """How pairs become prompts.

    Attributes:
        render: Makes them.
        tokens: Ids of the tokens whose logits are the score, for relevant and irrelevant; None where the checkpoint's
            own head is read.
    """

    render: Render
    tokens: tuple[int, int | None] | None = None


def prompt_of(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Prompt | None:
    """How pairs become prompts for a checkpoint; see `Checkpoint.prompt`.

    A chat template is used where sentence-transformers uses it. The published prompt of a family is used for a
    checkpoint that carries its name, where nothing contradicts it: code of its own, or a vocabulary without its tokens.
    """
    why = "it has no chat template"
    if checkpoint.takes_messages:
        render, failure = _rendered_by_template(checkpoint)
        if render is not None:
            return Prompt(render)
        why = failure or why
    elif checkpoint.template is not None or (checkpoint.is_causal and checkpoint.modules):
        return None
    published = None
    if not checkpoint.remote_code:
        published = _published_render(checkpoint.model_type, _names(checkpoint), tokenizer.token_to_id)
    if published is not None:
        return Prompt(published[0], published[1] if checkpoint.is_causal else None)
    if checkpoint.template is None and not checkpoint.is_causal:
        return None
    own = " It brings its own code, which says how it is meant to be used." if checkpoint.remote_code else ""
    kind = "causal language model" if checkpoint.is_causal else "model with a chat template"
    raise ModelLoadError(
        f"{checkpoint.name!r} is a {kind} ({checkpoint.model_type}) without a chat template for the roles 'query' and "
        f"'document' ({why}), so its scores would mean nothing.{own} Use a reranker checkpoint that has one, or put a "
        "chat_template.jinja into its directory."
    )


def _names(checkpoint: Checkpoint) -> list[str]:
    """What a checkpoint is called: asked for by, lies in, and by its configuration and model card."""
    names = [PurePosixPath(checkpoint.name.replace("\\", "/")).name, checkpoint.files.path.name]
    origins = (checkpoint.config.get("_name_or_path"), checkpoint.config.mapping("rerank_plugins").get("source"))
    names += [origin for origin in origins if isinstance(origin, str)]
    card = checkpoint.files.path / "README.md"
    if card.is_file() and card.stat().st_size < 1 << 20:
        text = card.read_text(encoding="utf-8", errors="replace")
        names += re.findall(r"^(?:base_model: *|- |# )(.{1,200})$", text[:20_000], re.MULTILINE)
    return names


# -- chat templates -----------------------------------------------------------------------------------------------


def _messages(query: str, text: str, instruction: str | None, structured: bool) -> list[dict[str, Any]]:
    """A pair as sentence-transformers gives it to a template: one message for each role."""
    roles = [("system", instruction)] if instruction else []
    return [
        {"role": role, "content": [{"type": "text", "text": content}] if structured else content}
        for role, content in [*roles, ("query", query), ("document", text)]
    ]


def _run(template: str, variables: Mapping[str, Any], conversations: list[Any]) -> tuple[list[str], bool]:
    """Render conversations in a process with limits of time and memory.

    Returns:
        The texts, and whether the template does the same whatever stands in the messages.

    Raises:
        MissingDependencyError: jinja2 is not installed.
        ValueError: The template failed; the message says how.
    """
    size = max(len(json.dumps(conversation)) for conversation in conversations)
    asked = {
        "template": template,
        "variables": dict(variables),
        "conversations": conversations,
        "most": MOST + 10 * size,
        "seconds": SECONDS,
    }
    command = [sys.executable, "-P", str(Path(__file__).with_name("_render.py"))]
    try:
        done = subprocess.run(
            command, input=json.dumps(asked).encode(), capture_output=True, timeout=WAIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"it takes more than {SECONDS} seconds") from None
    except OSError as error:
        raise ValueError(f"no process could be started to render it in: {error}") from error
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        # Killed by the limit of the system, or out of memory where Python could not tell any more.
        raise ValueError(f"it takes more than {SECONDS} seconds or too much memory") from None
    if "missing" in answer:
        raise MissingDependencyError(
            f"A chat template needs jinja2, which could not be imported ({answer['missing']}). "
            "Install it with: pip install jinja2",
            name="jinja2",
        )
    if "error" in answer:
        raise ValueError(answer["error"])
    return list(answer["texts"]), bool(answer["plain"])


def _rendered_by_template(checkpoint: Checkpoint) -> tuple[Render | None, str | None]:
    assert checkpoint.template is not None
    names = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    special_tokens = {name: token for name in names if (token := checkpoint.token(name))}
    settings = checkpoint.settings.nested("processing_kwargs", "chat_template") if checkpoint.saved else {}
    variables = {
        "tools": None,
        "documents": None,
        "add_generation_prompt": False,
        **special_tokens,
        **{key: value for key, value in settings.items() if key not in _NOT_FOR_TEMPLATES},
    }
    return chat_render(checkpoint.template, variables, model=checkpoint.name, structured=_is_structured(checkpoint))


def _is_structured(checkpoint: Checkpoint) -> bool:
    """Whether a message holds a list of parts, as sentence-transformers decides it."""
    form = checkpoint.settings.nested("modality_config", "message").get("format") if checkpoint.saved else None
    if form in ("flat", "structured"):
        return bool(form == "structured")
    signs = ("content[0]", ".type", "'type'", '"type"', "item.type", "message.content[")
    return any(sign in (checkpoint.template or "") for sign in signs)


def chat_render(
    template: str, variables: Mapping[str, Any], *, model: str, structured: bool
) -> tuple[Render | None, str | None]:
    """How a chat template renders pairs, found by rendering probes once; no template runs while scoring.

    Args:
        template: Jinja source.
        variables: What it may read beside the messages.
        model: The model's name, for messages.
        structured: Whether a message holds a list of parts instead of a string.

    Returns:
        The renderer and None, or None and why the template cannot carry a pair.

    Raises:
        ModelLoadError: The template fails, or takes too much time or memory.
        MissingDependencyError: jinja2 is not installed.
    """
    instructions = (None, _INSTRUCTION)
    pairs = ((_QUERY, _TEXT), *_PROBES)
    conversations = [_messages(*pair, given, structured) for given in instructions for pair in pairs]
    try:
        texts, alike = _run(template, variables, conversations)
    except ValueError as error:
        raise ModelLoadError(
            f"The chat template of {model!r} cannot be rendered for a query and a document: {error}. A reranker needs "
            "one that takes the roles 'query' and 'document'."
        ) from error
    plain = texts[1:4]
    dropped = [role for role, other in (("query", plain[1]), ("document", plain[2])) if other == plain[0]]
    if dropped:
        return None, f"the chat template does not put the role {' and '.join(map(repr, dropped))} into the prompt"
    found: dict[bool, tuple[list[str], frozenset[str]]] = {}
    for with_instruction in (False, True):
        rendered = texts[len(pairs) * with_instruction :][: len(pairs)]
        pieces = _SLOTS.split(rendered[0])
        stripped = _stripped(pieces, rendered[1:], _INSTRUCTION if with_instruction else "")
        if stripped is None or not alike:
            return _each_apart(template, variables, model, structured), None
        found[with_instruction] = (pieces, stripped)

    def render(pairs: Sequence[tuple[str, str]], instruction: str | None) -> list[str]:
        pieces, stripped = found[bool(instruction)]
        return [_fill(pieces, stripped, query, text, instruction or "") for query, text in pairs]

    return render, None


def _fill(pieces: Sequence[str], stripped: frozenset[str], query: str, text: str, instruction: str) -> str:
    slots = {_QUERY: query, _TEXT: text, _INSTRUCTION: instruction}
    return "".join(
        (slots[piece].strip() if piece in stripped else slots[piece]) if piece in slots else piece for piece in pieces
    )


def _stripped(pieces: Sequence[str], rendered: Sequence[str], instruction: str) -> frozenset[str] | None:
    """Which texts a template strips, if that is all it does to them; None if it does more."""
    for chosen in product((False, True), repeat=2):
        stripped = frozenset(slot for slot, strips in zip((_QUERY, _TEXT), chosen, strict=True) if strips)
        if all(
            _fill(pieces, stripped, *pair, instruction) == text for pair, text in zip(_PROBES, rendered, strict=True)
        ):
            # The one probe of an instruction has no space around it; templates treat messages alike.
            return stripped | {_INSTRUCTION} if len(stripped) == 2 else stripped
    return None


def _each_apart(template: str, variables: Mapping[str, Any], model: str, structured: bool) -> Render:
    """Rendering by the template itself, for those that change the texts: in a process of its own, again and again."""

    def render(pairs: Sequence[tuple[str, str]], instruction: str | None) -> list[str]:
        try:
            return _run(template, variables, [_messages(*pair, instruction, structured) for pair in pairs])[0]
        except ValueError as error:
            raise ScoringError(
                f"The chat template of {model!r} cannot be rendered for these texts: {error}."
            ) from error

    return render


# -- published prompts --------------------------------------------------------------------------------------------

_QWEN3_SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
_QWEN3_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
_GEMMA_INSTRUCTION = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
    "prediction of either 'Yes' or 'No'."
)


def _qwen3(query: str, text: str, instruction: str | None) -> str:
    """The prompt of the Qwen3-Reranker model cards."""
    return (
        f"<|im_start|>system\n{_QWEN3_SYSTEM}<|im_end|>\n<|im_start|>user\n"
        f"<Instruct>: {instruction or _QWEN3_INSTRUCTION}\n<Query>: {query}\n<Document>: {text}<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def _gemma(query: str, text: str, instruction: str | None) -> str:
    """The prompt of the bge-reranker-v2-gemma model card."""
    return f"<bos>A: {query}\nB: {text}\n{instruction or _GEMMA_INSTRUCTION}"


# Family (model_type), the name that its publications and their copies carry, the prompt, and the tokens that the
# model card tells to read.
_PUBLISHED = (
    ("qwen3", re.compile(r"qwen3[-_]reranker", re.IGNORECASE), _qwen3, ("yes", "no")),
    ("gemma", re.compile(r"bge[-_]reranker[-_]v2[-_]gemma", re.IGNORECASE), _gemma, ("Yes", None)),
)


def _published_render(
    family: str | None, names: Sequence[str], token_id: Callable[[str], int | None]
) -> tuple[Render, tuple[int, int | None]] | None:
    """The published prompt of a checkpoint that says it is one of a family of rerankers, and the tokens to read.

    Args:
        family: The checkpoint's ``model_type``.
        names: What it is called: the name it was asked for by, and those that its files give.
        token_id: The tokenizer's id of a token, or None.

    Returns:
        Renderer, and ids of the tokens for relevant and (where the family has one) irrelevant; None for all others.
    """
    for model_type, name, prompt, (relevant, irrelevant) in _PUBLISHED:
        if family != model_type or not any(name.search(given) for given in names):
            continue
        ids = token_id(relevant), None if irrelevant is None else token_id(irrelevant)
        if ids[0] is None or (irrelevant is not None and ids[1] is None):
            return None

        def render(
            pairs: Sequence[tuple[str, str]],
            instruction: str | None,
            prompt: Callable[[str, str, str | None], str] = prompt,
        ) -> list[str]:
            return [prompt(query, text, instruction) for query, text in pairs]

        return render, (ids[0], ids[1])
    return None
