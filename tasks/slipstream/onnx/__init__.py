"""ONNX models: reading and rewriting graphs, running them, comparing answers, and quantization."""
