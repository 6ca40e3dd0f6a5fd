"""Writes the student as a checkpoint that sentence-transformers loads, and as a float32 graph.

    python recipes/minilm_l6/export.py OUT/student/last OUT/final --calibration OUT/calibration.json

The calibration becomes part of the head: weights times the slope, bias times the slope plus the intercept.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from sentence_transformers import CrossEncoder

from rerank_plugins.conversion import convert


def main() -> None:
    """Writes OUT and OUT-onnx."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--calibration", type=Path)
    arguments = parser.parse_args()
    model = CrossEncoder(str(arguments.student), activation_fn=torch.nn.Identity(), device="cpu")
    head = model[0].model.classifier
    if arguments.calibration:
        found = json.loads(arguments.calibration.read_text())
        with torch.no_grad():
            head.weight.mul_(found["slope"])
            head.bias.mul_(found["slope"]).add_(found["intercept"])
    model.save_pretrained(str(arguments.out), create_model_card=False)
    report = convert(str(arguments.out), arguments.out.with_name(f"{arguments.out.name}-onnx"), overwrite=True)
    print(report)


if __name__ == "__main__":
    main()
