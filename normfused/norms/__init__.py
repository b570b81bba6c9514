"""One file a norm: its function, its layers, their docstrings."""
