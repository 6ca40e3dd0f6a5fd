"""Writes the student as a checkpoint that sentence-transformers loads, and as a float32 graph.

python recipes/minilm_l6/export.py OUT/student/average OUT/final
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sentence_transformers import CrossEncoder

from rerank_plugins.conversion import convert


def main() -> None:
    """Writes OUT and OUT-onnx."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    model = CrossEncoder(str(arguments.student), activation_fn=torch.nn.Identity(), device="cpu")
    model.save_pretrained(str(arguments.out), create_model_card=False)
    report = convert(str(arguments.out), arguments.out.with_name(f"{arguments.out.name}-onnx"), overwrite=True)
    print(report)


if __name__ == "__main__":
    main()
