"""Benchmarks: ``pytest benchmarks/ --benchmark-only``. README.md says how to run them and what a row means."""
