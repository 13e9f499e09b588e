"""Commands in addition to the pipeline: the benchmark, `init`, and the generated reference."""
