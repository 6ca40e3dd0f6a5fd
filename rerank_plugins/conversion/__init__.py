"""From a cross-encoder checkpoint to one ONNX file that the base install can run, and proof that it scores the same."""

from rerank_plugins.conversion._convert import ConversionReport, convert

__all__ = ["ConversionReport", "convert"]
