"""Texts for the demo: Python's own manual, or the user's files."""

from __future__ import annotations

import ast
import builtins
import hashlib
import inspect
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rerank_plugins._extras import import_extra
from rerank_plugins.errors import InputError, MissingDependencyError

__all__ = ["Corpus", "Document", "Passage", "files_corpus", "langchain_community", "manual_corpus", "split"]

SUFFIXES = (".txt", ".md", ".rst", ".html", ".htm", ".pdf")
CHUNK_SIZE = 600
CHUNK_OVERLAP = 60
_SHORTEST = 100
"""Docstrings with fewer characters say little more than the name."""
_MODULES = """
abc argparse ast asyncio base64 bisect calendar codecs collections concurrent configparser
contextlib copy csv dataclasses datetime decimal difflib enum fileinput fnmatch fractions
functools getpass glob graphlib gzip hashlib heapq hmac html http inspect io ipaddress json
linecache logging multiprocessing operator os pathlib pickle pprint queue random re sched
secrets selectors shelve shlex shutil signal socket socketserver sqlite3 ssl statistics string
subprocess tarfile tempfile textwrap threading timeit tomllib traceback types typing unittest
urllib uuid warnings weakref webbrowser zipfile zoneinfo
"""
"""Modules that programs use every day: an index of all others takes twice as long to build."""
_NAMED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Document(NamedTuple):
    """A text, where it is from, and a title to put before each of its passages."""

    source: str
    text: str
    title: str = ""


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a text, small enough to be embedded whole, and where it is from."""

    text: str
    source: str


@dataclass(slots=True)
class Corpus:
    """A collection that is read only when its index has to be built.

    Attributes:
        name: What it is called on the screen.
        key: Hash of its content.
        read: Reads it.
        notes: What could not be read, and why; filled by `read`.
    """

    name: str
    key: str
    read: Callable[[], list[Document]]
    notes: list[str] = field(default_factory=list)


def split(documents: list[Document]) -> list[Passage]:
    """Cut documents into passages; equal passages once."""
    splitters: Any = import_extra("langchain_text_splitters", "demo")
    splitter = splitters.RecursiveCharacterTextSplitter(chunk_size=CHUNK_SIZE, chunk_overlap=CHUNK_OVERLAP)
    passages: dict[str, Passage] = {}
    for document in documents:
        for part in splitter.split_text(document.text):
            if any(character.isalnum() for character in part):
                text = f"{document.title}: {part}" if document.title else part
                passages.setdefault(text, Passage(text, document.source))
    return list(passages.values())


def manual_corpus() -> Corpus:
    """This Python's language reference, and the docstrings of its standard library."""
    sources = list(_library())
    digest = hashlib.sha256(sys.version.encode())
    for module, path in sources:
        digest.update(f"{module}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    version = ".".join(map(str, sys.version_info[:2]))

    def read() -> list[Document]:
        from pydoc_data.topics import topics

        documents = [*_manual(topics), *_builtins()]
        for module, path in sources:
            documents += _docstrings(module, path)
        return documents

    return Corpus(f"the manual of Python {version}", digest.hexdigest(), read)


def _manual(topics: dict[str, str]) -> Iterator[Document]:
    """The topics of the language reference; a paragraph that several have stays in the shortest one."""
    seen: set[str] = set()
    for name, text in sorted(topics.items(), key=lambda item: (len(item[1]), item[0])):
        # Underlines of headings say nothing.
        lines = [line for line in text.strip().splitlines() if not line or set(line) - set("*=-~^")]
        paragraphs = [part.strip("\n") for part in "\n".join(lines[1:]).split("\n\n")]
        body = "\n\n".join(part for part in paragraphs if part not in seen)
        seen.update(paragraphs)
        yield Document(f"manual: {name}", body.strip(), lines[0] if len(lines[0]) <= 60 else name)


def _library() -> Iterator[tuple[str, Path]]:
    """The public source files of `_MODULES`."""
    library = Path(sysconfig.get_path("stdlib"))
    for name in _MODULES.split():
        if (library / f"{name}.py").is_file():
            paths = [library / f"{name}.py"]
        else:
            paths = sorted((library / name).rglob("*.py"))
        for path in paths:
            parts = path.relative_to(library).with_suffix("").parts
            module = ".".join(parts).removesuffix(".__init__")
            if not any(part.startswith("_") or part in ("test", "tests") for part in module.split(".")):
                yield module, path


def _docstrings(module: str, path: Path) -> list[Document]:
    """Docstrings of a module and of its public functions, classes and methods, read without importing it."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []
    found: list[Document] = []

    def visit(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> None:
        text = ast.get_docstring(node) or ""
        if len(text) >= _SHORTEST:
            found.append(Document(name, text, name))
        if isinstance(node, ast.Module | ast.ClassDef):
            for child in node.body:
                if isinstance(child, _NAMED) and not child.name.startswith("_"):
                    visit(child, f"{name}.{child.name}")

    visit(tree, module)
    return found


def _builtins() -> list[Document]:
    """Docstrings of the built-in functions, and of the methods of the built-in types."""
    found = []
    for name, value in sorted(vars(builtins).items()):
        if name.startswith("_") or not callable(value):
            continue
        members = {name: value}
        if isinstance(value, type) and not issubclass(value, BaseException):
            members |= {f"{name}.{key}": item for key, item in sorted(vars(value).items()) if not key.startswith("_")}
        for member, item in members.items():
            text = inspect.getdoc(item) or ""
            if len(text) >= _SHORTEST // 2:
                found.append(Document(member, text, member))
    return found


def files_corpus(path: Path) -> Corpus:
    """A file, or all files of a folder, with one of the suffixes of `SUFFIXES`.

    Raises:
        InputError: There is none.
    """
    path = path.expanduser()
    if not path.exists():
        raise InputError(f"{path} does not exist. Give a folder or a file of {_any_of(SUFFIXES)}.")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    visible = [file for file in files if file == path or not _hidden(file.relative_to(path))]
    chosen = [file for file in visible if file.suffix.lower() in SUFFIXES]
    if not chosen:
        raise InputError(
            f"{path} has nothing to search: expected files of {_any_of(SUFFIXES)}, found {len(visible)} others."
        )
    base = path if path.is_dir() else path.parent
    digest = hashlib.sha256()
    for file in chosen:
        digest.update(f"{file.relative_to(base)}\0".encode(errors="surrogateescape"))
        try:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        except OSError as error:
            digest.update(str(error.errno).encode())

    def read() -> list[Document]:
        documents: list[Document] = []
        for file in chosen:
            name = str(file.relative_to(base))
            try:
                pages = [page for page in _load(file, name) if page.text.strip()]
            except MissingDependencyError:
                raise
            except Exception as error:
                reason = error.__cause__ or error
                corpus.notes.append(f"{name} was left out: {type(reason).__name__}: {reason}")
                continue
            if not pages:
                corpus.notes.append(f"{name} was left out: it has no text.")
            documents += pages
        if not documents:
            raise InputError(f"{path} has nothing to search.\n" + "\n".join(corpus.notes))
        return documents

    corpus = Corpus(str(path), digest.hexdigest(), read)
    return corpus


def _any_of(suffixes: tuple[str, ...]) -> str:
    return f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _load(file: Path, name: str) -> list[Document]:
    """The document in a file; one for each page, where it has pages."""
    loaders = langchain_community("document_loaders")
    suffix = file.suffix.lower()
    if suffix == ".pdf":
        import_extra("pypdf", "demo")
        loader = loaders.PyPDFLoader(str(file))
        return [Document(f"{name}, page {page.metadata['page'] + 1}", page.page_content) for page in loader.load()]
    if suffix in (".html", ".htm"):
        import_extra("bs4", "demo")
        loader = loaders.BSHTMLLoader(
            str(file),
            open_encoding="utf-8-sig",
            bs_kwargs={"features": "html.parser"},
            get_text_separator="\n",
        )
    else:
        loader = loaders.TextLoader(str(file), encoding="utf-8-sig")
    return [Document(name, page.page_content) for page in loader.load()]


def langchain_community(module: str) -> Any:
    """A module of langchain-community, without the notice of its sunset that comes with the import.

    Raises:
        MissingDependencyError: It is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return import_extra(f"langchain_community.{module}", "demo")
