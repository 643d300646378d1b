"""Benchmarks: one number beside its ceiling and its peers, from the same interleaved run."""
