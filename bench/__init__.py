"""The benchmark for pytest-benchmark (`pytest bench/ --quick`), its results, and what belongs to this repository alone.

`python -m normfused bench` is the benchmark itself; `python -m bench.cpu_ratio`, `python -m bench.host_cost` and `python -m bench.gpu` are
for those who change the library.
"""

import os

# Read when torch loads OpenMP: idle threads sleep instead of spinning. Where another process wants the cores, spinning threads
# wait a time slice at the end of every small kernel: 16 times slower was seen, for no fault of the layer that is timed.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
