"""Commands beside the pipeline: the benchmark, `init`, and the generated reference."""
