"""The tests of normfused; `conftest.py` says how to select a backend."""
