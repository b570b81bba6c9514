"""Benchmarks: `pytest bench/ --quick`, `python -m bench.report RESULTS.json`, `python -m bench.cpu_ratio`."""

import os

# Read when torch loads OpenMP: idle threads sleep instead of spinning. Where another process wants the cores, spinning threads
# wait a time slice at the end of every small kernel: 16 times slower was seen, for no fault of the layer that is timed.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
