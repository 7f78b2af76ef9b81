"""Build entry point. Everything is declared in pyproject.toml; nothing is compiled here.

The package is pure Python: an installation needs no compiler, no GPU and no network beyond the index.
"""

from setuptools import setup

setup()
