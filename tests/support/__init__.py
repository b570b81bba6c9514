"""What the tests share: float64 oracles written from plain formulas, error measures and tolerances, memory layouts."""
