"""Metadata lives in pyproject.toml; the CUDA extension will be added here, as building it depends on the machine."""

from setuptools import setup

setup()
