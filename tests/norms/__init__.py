"""Every norm function against its float64 oracle."""
