"""Exporters, one module a format, with what they verify. `checkpoint.py` writes model files itself."""
