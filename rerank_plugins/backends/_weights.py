"""The weights of a checkpoint: which files hold them, and what stands in their headers. Never a pickle."""

from __future__ import annotations

import json
import struct
from pathlib import Path, PurePosixPath

from rerank_plugins.backends._files import ModelFiles
from rerank_plugins.backends._schema import JsonFile, shortened
from rerank_plugins.errors import ModelLoadError

__all__ = ["LFS_POINTER", "is_lfs_pointer", "pickles", "read_header", "weight_files"]

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
