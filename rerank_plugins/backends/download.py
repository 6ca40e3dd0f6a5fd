"""From a model's name to its files: a local directory, the Hub's disk cache, or the Hub."""

from __future__ import annotations

import errno
import fnmatch
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rerank_plugins.backends._files import ModelFiles
from rerank_plugins.errors import ConfigurationError, ModelLoadError

__all__ = ["fetch_command", "open_files", "torch_files"]

logger = logging.getLogger("rerank_plugins")

_SMALL = ("*.json", "*.jinja", "README.md")
"""What tells about a model, in its directory and one level below."""
_TORCH = ("*.txt", "*.model", "model*.safetensors", "adapter_model*.safetensors")
_ELSEWHERE = ("onnx/*", "openvino/*", "runs/*", "checkpoint*/*", "*/*/*", ".*", "*.onnx", "original/*")
_NOT_JSON = ("vocab.json", "*.bin.index.json", "*.h5.index.json", "*.msgpack.index.json")
_NO_WRITING = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.ENOTDIR)


def open_files(model: str, *, revision: str | None = None) -> ModelFiles:
    """Find a model, downloading only what tells about it; `ModelFiles.fetch` gets the rest.

    Args:
        model: A local directory or a Hub id.
        revision: Branch, tag or commit on the Hub; None is the default branch.

    Raises:
        ConfigurationError: `revision` beside a local directory.
        ModelLoadError: No such directory or repository, or it is not cached and the Hub cannot be reached.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ConfigurationError(
                f"revision={revision!r} only means something for a Hub id, but {model!r} is a local directory. "
                "Leave revision at None."
            )
        return ModelFiles(path, model)
    _check_name(model, path)
    return _from_hub(model, revision)


def _check_name(model: str, path: Path) -> None:
    """Refuse what is meant for a path and is none."""
    if path.is_file():
        raise ModelLoadError(f"{model!r} is a file. Give the directory it lies in: {str(path.parent)!r}.")
    # What nobody would write for a Hub id.
    if (
        path.is_absolute()
        or model.startswith((".", "~"))
        or "\\" in model
        or (model.count("/") > 1 and "//" not in model)
    ):
        raise ModelLoadError(
            f"There is no directory {str(path)!r}. Give a directory with a model, or a Hub id such as "
            "'cross-encoder/ms-marco-MiniLM-L6-v2'."
        )


def torch_files(files: ModelFiles, *, code: bool = False) -> list[str]:
    """Names of what PyTorch's libraries read of a model.

    Args:
        files: The model.
        code: The repository's Python files as well.
    """
    patterns = (*_SMALL, *_NOT_JSON[:1], *_TORCH, *(("*.py",) if code else ()))
    return [name for name in files.names if _matches(name, patterns) and not _matches(name, _ELSEWHERE)]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """By the whole name, or the name within one folder."""
    last = name.rpartition("/")[2]
    return any(fnmatch.fnmatchcase(name if "/" in pattern else last, pattern) for pattern in patterns)


def fetch_command(model: str, revision: str | None) -> str:
    """The command that downloads a whole model."""
    return f"hf download {model}" + (f" --revision {revision}" if revision else "")


def _from_hub(model: str, revision: str | None) -> ModelFiles:
    try:
        listed = _listing(model, revision)
        small = [name for name in listed if _matches(name, _SMALL) and not _matches(name, (*_ELSEWHERE, *_NOT_JSON))]
        path = _snapshot(model, revision, small)
    except Exception as error:
        # Whatever went wrong: a copy that is there is used.
        try:
            path = _snapshot(model, revision, None)
        except Exception:
            raise _told(error, model, revision) from error
        logger.info("%s: the Hub gave nothing (%s); the copy in the local cache is used", model, _short(error))
        cause = error
        return ModelFiles(path, model, partial=lambda what: _told(cause, model, revision, what))

    def fetch(names: list[str]) -> None:
        try:
            _snapshot(model, path.name, names)
        except Exception as error:
            raise _told(error, model, revision, ", ".join(names[:5])) from error

    return ModelFiles(path, model, listed=listed, fetch=fetch)


def _listing(model: str, revision: str | None) -> list[str]:
    from huggingface_hub import HfApi

    siblings = HfApi().model_info(model, revision=revision).siblings or []
    return [sibling.rfilename for sibling in siblings if ".." not in sibling.rfilename.split("/")]


def _snapshot(model: str, revision: str | None, names: list[str] | None) -> Path:
    """The directory of a model in the Hub's disk cache, with some files; None takes what is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

    if names is None:
        # Asked for no file in particular: some versions refuse a copy that lacks any that they were asked for.
        return Path(snapshot_download(model, revision=revision, local_files_only=True, allow_patterns=[]))
    # A pattern is what fnmatch takes, and a name may have brackets.
    allow = [re.sub(r"([\[*?])", r"[\1]", name) for name in names]
    return Path(snapshot_download(model, revision=revision, allow_patterns=allow, tqdm_class=Silent))


# -- what went wrong ----------------------------------------------------------------------------------------------


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was raised from, the innermost first."""
    links: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in links:
        links.append(current)
        current = current.__cause__ or current.__context__
    return reversed(links)


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _is(error: BaseException, *names: str) -> bool:
    """By the names of its classes: the HTTP client of huggingface_hub is another one in each of its versions."""
    return any(kind.__name__ in names for kind in type(error).__mro__)


def _told(error: BaseException, model: str, revision: str | None, missing: str = "") -> ModelLoadError:
    """What the user can do about an error of the Hub's library."""
    at = f" at revision {revision!r}" if revision else ""
    command = fetch_command(model, revision)
    links = list(_chain(error))
    named = {name: link for link in links for name in (kind.__name__ for kind in type(link).__mro__)}
    if "HFValidationError" in named:
        return ModelLoadError(
            f"{model!r} is neither a local directory nor a Hub id of the form 'organisation/name': {error}"
        )
    if not missing and (known := _known(named, model, revision, at)):
        return ModelLoadError(known)
    what = f"{model!r}{at} is not a local directory, and is not in the local cache"
    if missing:
        what = f"{model!r}{at} is in the local cache without {missing}"
    cause, remedy = _cause(links)
    return ModelLoadError(
        f"{what}; {cause}. {remedy or 'Fetch it once where there is a network'}: {command}\n"
        "Or use Reranker(model=None): the bundled model needs no download."
    )


def _known(named: Mapping[str, BaseException], model: str, revision: str | None, at: str) -> str | None:
    """What the Hub says of a model that it does not give to this user; None where it said nothing."""
    if "GatedRepoError" in named:
        return f"{model!r} is gated: accept its terms on the Hub and log in with `hf auth login`, or set HF_TOKEN."
    if "RevisionNotFoundError" in named:
        return f"{model!r} has no revision {revision!r} on the Hub."
    if "RepositoryNotFoundError" in named:
        return (
            f"{model!r} is neither a local directory nor a repository on the Hub that you may read{at}. Check the "
            "name; for a private one log in with `hf auth login`. `rerank-plugins models` lists published ones."
        )
    return None


def _cause(links: Sequence[BaseException]) -> tuple[str, str]:
    """Why the Hub did not give a file, and what to do first; an empty remedy where only another network helps."""
    for link in links:
        status = getattr(getattr(link, "response", None), "status_code", None)
        short = _short(link)
        if _is(link, "OfflineModeIsEnabled"):
            return "the Hub is not asked, since HF_HUB_OFFLINE is set", ""
        if _is(link, "ProxyError"):
            return f"the proxy refuses ({short})", "Check HTTPS_PROXY and NO_PROXY, or fetch it elsewhere"
        if isinstance(link, ImportError):
            return f"a package is missing ({short})", "Install it (for a SOCKS proxy: pip install socksio), then"
        barred = isinstance(link, PermissionError | NotADirectoryError | FileExistsError)
        if barred or getattr(link, "errno", None) in _NO_WRITING:
            return f"the Hub's cache cannot be written ({short})", "Set HF_HOME to a directory that can be, then"
        if isinstance(link, RuntimeError) and "home" in str(link).lower():
            return f"there is no home directory ({short})", "Set HF_HOME to a directory, then"
        if status == 401:
            return "the Hub does not accept the access token (401)", "Log in with `hf auth login` or set HF_TOKEN, then"
        if status == 403:
            return f"access is refused (403: {short})", "Ask for access, or check the proxy, then"
        if status == 407:
            return "the proxy wants a login (407)", "Put it into HTTPS_PROXY, then"
        if status == 429:
            return (
                "the Hub has had too many requests from here (429)",
                "Wait some minutes, or log in with HF_TOKEN, then",
            )
        if status is not None:
            return f"the Hub answered with status {status} ({short})", ""
        if _is(link, "TimeoutException", "RemoteProtocolError", "ReadError", "WriteError", "ConnectionResetError"):
            return f"the connection to the Hub broke off ({short})", "Try again"
        if isinstance(link, ValueError) and _is(link, "JSONDecodeError", "ValidationError"):
            return (
                f"what answered is not the Hub ({short}); it may be the login page of a network",
                "Open a web page once, check HF_ENDPOINT, then",
            )
    last = next((link for link in links if _is(link, "TransportError", "ConnectionError", "OSError")), links[-1])
    return f"the Hub cannot be reached ({_short(last)})", ""
