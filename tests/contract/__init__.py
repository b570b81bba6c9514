"""What users rely on beside the numbers: torch.nn's contract, errors, memory, compilation, custom norms."""
