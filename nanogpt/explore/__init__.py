"""Knowledge discovery: what a small model, trained on the spot, finds in a table, a log or a text.

    from nanogpt.explore import KnowledgeDiscovery, discover, read_records

Names are imported on first use, so that `python -m nanogpt.explore --help` costs no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanogpt.explore.knowledge import KnowledgeDiscovery as KnowledgeDiscovery
    from nanogpt.explore.knowledge import discover as discover
    from nanogpt.explore.reading import read_records as read_records

__all__ = ["KnowledgeDiscovery", "discover", "read_records"]


def __getattr__(name: str) -> Any:
    if name in ("KnowledgeDiscovery", "discover"):
        from nanogpt.explore import knowledge

        return getattr(knowledge, name)
    if name == "read_records":
        from nanogpt.explore.reading import read_records

        return read_records
    raise AttributeError(f"module 'nanogpt.explore' has no attribute {name!r}")
