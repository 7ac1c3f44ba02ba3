"""Build script; everything that is not compiled is declared in pyproject.toml."""

from setuptools import setup

setup()
