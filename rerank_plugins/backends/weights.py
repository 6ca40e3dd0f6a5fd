"""The weights of a checkpoint: which files hold them, and what stands in their headers. Never a pickle."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from rerank_plugins.backends._files import ModelFiles
from rerank_plugins.backends._schema import JsonFile, shortened
from rerank_plugins.errors import ModelLoadError

if TYPE_CHECKING:
    from rerank_plugins.backends.checkpoint import Checkpoint

__all__ = ["check_says", "is_lfs_pointer", "tensors", "weight_names", "why_no_head", "why_no_weights"]

_SCORING = ("ForSequenceClassification", "ForCausalLM", "LMHeadModel")
_HEAD = re.compile(r"(.*\.)?(classifier|score|classification_head|logits_proj|sequence_summary|out_proj|head)(\.|$)")
"""Names of the weights of classification heads in transformers."""
LFS_POINTER = b"version https://git-lfs"
_MAX_HEADER = 100 << 20
"""What the safetensors library takes."""


def is_lfs_pointer(file: Path) -> bool:
    """Whether a Git LFS checkout has left a pointer in place of the file."""
    try:
        with file.open("rb") as stream:
            return stream.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def weight_files(files: ModelFiles, folder: str = "", stem: str = "model") -> list[str]:
    """Names of the safetensors files that hold the weights of one folder, by its index if there is one.

    Returns:
        Names relative to the model's directory, whether they are there or not; empty where nothing names any.

    Raises:
        ModelLoadError: The index names a file outside of the folder.
    """
    place = f"{folder}/" if folder else ""
    single, index = f"{place}{stem}.safetensors", f"{place}{stem}.safetensors.index.json"
    if single in files.names:
        return [single]
    if index not in files.names:
        return []
    files.fetch([index])
    listing = JsonFile(files.path / index, files.name)
    shards = listing.mapping("weight_map")
    for shard in shards.values():
        if not isinstance(shard, str) or not _is_inside(shard):
            raise ModelLoadError(
                f"{files.path / index} of {files.name!r} names weights outside of the model's directory: "
                f"{shortened(shard)}. Expected the name of a safetensors file beside it."
            )
    return sorted({f"{place}{shard}" for shard in shards.values()})


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name.replace("\\", "/"))
    return name.endswith(".safetensors") and not path.is_absolute() and ".." not in path.parts and ":" not in name


def pickles(files: ModelFiles, folder: str = "") -> list[str]:
    """Names of the pickles that PyTorch code would read where a folder has no safetensors."""
    place = f"{folder}/" if folder else ""
    return sorted(
        name
        for name in files.names
        if name.startswith(place)
        and "/" not in name[len(place) :]
        and (name.endswith((".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".pkl")))
        and not name.endswith(("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth"))
        # OpenVINO's weights lie beside their graph.
        and f"{name.removesuffix('.bin')}.xml" not in files.names
    )


def read_header(file: Path, model: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Types and shapes of the tensors in a safetensors file, by name.

    Raises:
        ModelLoadError: It is no such file, or only a part of one.

    References:
        The format: https://huggingface.co/docs/safetensors (eight bytes of length, then JSON).
    """
    if is_lfs_pointer(file):
        raise ModelLoadError(
            f"{file} of {model!r} is a Git LFS pointer, not the weights. Fetch them with: git lfs pull"
        )
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size - 8, _MAX_HEADER):
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
        found = {name: (str(entry["dtype"]), tuple(map(int, entry["shape"]))) for name, entry in tensors.items()}
    except (
        OSError,
        struct.error,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        RecursionError,
    ) as error:
        raise ModelLoadError(f"{file} of {model!r} is no safetensors file, or damaged: {error}") from error
    if size < 8 + length + end:
        raise ModelLoadError(
            f"{file} of {model!r} is cut off: expected {8 + length + end} bytes, found {size}. Fetch it again."
        )
    return found


def weight_names(checkpoint: Checkpoint) -> list[str]:
    """Names of the files with the weights of a checkpoint's trunk, or of its adapter, whether they are there or not."""
    stem = "adapter_model" if checkpoint.adapter_config.values else "model"
    return weight_files(checkpoint.files, checkpoint.folder, stem)


def tensors(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Types and shapes of the trunk's weights, by name, of the files that are on disk.

    Raises:
        ModelLoadError: A file is damaged.
    """
    return {
        name: info
        for file in weight_names(checkpoint)
        if checkpoint.files.there(file)
        for name, info in read_header(checkpoint.files.path / file, checkpoint.name).items()
    }


def check_says(checkpoint: Checkpoint, *, trust_remote_code: bool) -> None:
    """Refuse a checkpoint that PyTorch's libraries cannot make a reranker of, by its files.

    Raises:
        ModelLoadError: Its weights are missing, damaged, a pickle, or not those of a reranker.
    """
    why = why_no_weights(checkpoint)
    if why is not None and checkpoint.files.partial is not None:
        raise checkpoint.files.partial("its weights")
    if why is None and not trust_remote_code:
        why = why_no_head(checkpoint)
    if why is not None:
        hint = ""
        if checkpoint.remote_code and not trust_remote_code and "pickle" not in why:
            hint = " The repository brings its own code: read it, then pass trust_remote_code=True."
        raise ModelLoadError(f"{checkpoint.name!r} cannot be loaded on PyTorch: {why}.{hint}")
    # Read here, where what is wrong with them can be told.
    tensors(checkpoint)


def why_no_weights(checkpoint: Checkpoint) -> str | None:
    """Why PyTorch has nothing to load here; None where there are weights in safetensors."""
    files = checkpoint.files
    names = weight_names(checkpoint)
    modules = {module.folder for module in checkpoint.modules if module.folder}
    for folder in sorted({name.rpartition("/")[0] for name in files.names}):
        # A router's parts lie in folders of its own.
        read = folder == checkpoint.folder or any(f"{folder}/".startswith(f"{module}/") for module in modules)
        found = pickles(files, folder) if read and not weight_files(files, folder) else []
        if found and not (folder == checkpoint.folder and names):
            return (
                f"its weights are in a pickle ({found[0]}), which can run code when it is read. Expected safetensors: "
                "load it once where you trust it, with transformers, and save_pretrained() it to a directory"
            )
    if missing := [name for name in names if name not in files.names]:
        return f"it lacks {', '.join(missing[:5])}, which its index of weights names"
    if names:
        return None
    if any(name.endswith(".onnx") for name in files.names):
        what = ""
        if checkpoint.is_causal:
            what = " of a causal language model"
        elif checkpoint.architecture and not checkpoint.architecture.endswith(_SCORING):
            what = f" of a {checkpoint.architecture}, which has no classification head"
        return (
            f"it holds only an ONNX graph{what}, and no weights for PyTorch (model.safetensors). Leave backend at "
            "'auto', or use backend='onnx' or 'openvino'"
        )
    other = next((name for name in sorted(files.names) if name.endswith(("openvino_model.xml", ".gguf"))), None)
    if other is not None:
        return f"it holds weights for another engine only, OpenVINO or GGUF ({other}); expected model.safetensors"
    return f"it has no weights: expected model.safetensors in {files.path / checkpoint.folder}"


def why_no_head(checkpoint: Checkpoint) -> str | None:
    """Why a checkpoint is no reranker, by what its files say; None where nothing speaks against it."""
    if checkpoint.modules:
        kinds = [module.kind.rpartition(".")[2] for module in checkpoint.modules]
        foreign = any(not module.kind.startswith("sentence_transformers.") for module in checkpoint.modules)
        scores = any(_writes_scores(checkpoint, module.folder) for module in checkpoint.modules if module.folder)
        task = checkpoint.settings.text("transformer_task")
        if foreign or "LogitScore" in kinds or task == "sequence-classification" or scores:
            return None
        return f"it has no classification head (its modules are {', '.join(kinds)}): an embedding model is no reranker"
    if not checkpoint.architecture or checkpoint.architecture.endswith(_SCORING):
        return None
    found = tensors(checkpoint)
    if not found or any(_HEAD.match(name) for name in found):
        return None
    return f"it has no classification head (it is a {checkpoint.architecture}): an embedding model is no reranker"


def _writes_scores(checkpoint: Checkpoint, folder: str) -> bool:
    settings = JsonFile(checkpoint.files.path / folder / "config.json", checkpoint.name)
    return bool(settings.get("module_output_name") == "scores")
