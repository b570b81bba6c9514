"""The benchmark itself: cases, providers, clocks, results, report."""
