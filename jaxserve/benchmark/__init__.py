"""Benchmarks of the engine: a trace of requests, its replay, and the figures it gives."""
