"""The steps below the norms: moments, coefficients, apply, activations, Problem."""
