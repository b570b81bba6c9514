"""Benchmarks: `pytest bench/ --quick`, `python -m bench.report RESULTS.json`, `python -m bench.cpu_ratio`."""
