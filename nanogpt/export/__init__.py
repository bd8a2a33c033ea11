"""Exporters, one module a format: what a trained model becomes for other programs.

    from nanogpt.export import export_model

Names are imported on first use, so that `python -m nanogpt.export --help` costs no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanogpt.export.command import export_model as export_model

__all__ = ["export_model"]


def __getattr__(name: str) -> Any:
    if name == "export_model":
        from nanogpt.export.command import export_model

        return export_model
    raise AttributeError(f"module 'nanogpt.export' has no attribute {name!r}")
