"""Everything is declared in pyproject.toml; this file lets older front ends find it."""

from setuptools import setup

setup()
