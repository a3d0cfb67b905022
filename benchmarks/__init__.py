"""Benchmarks: ``pytest benchmarks/ --benchmark-only``. README.md says how to run them and what a row means."""

import os

# Before torch is imported. Waiting OpenMP threads spin for microseconds, not milliseconds, as in the efficientnet command line:
# as fast on an idle machine; on a busy one, where a spinning thread keeps the one it waits for off the core, tens of times as fast.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
