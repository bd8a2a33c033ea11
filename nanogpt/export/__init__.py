"""Exporters, one module a format. Model files themselves are written by `checkpoint.py`."""
