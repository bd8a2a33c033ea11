"""What every report shares: the look of the page, in page.html.j2, which the others extend."""

from functools import cache
from typing import Any


@cache
def template(name: str) -> Any:
    """A template of this folder; everything it prints is escaped unless it says otherwise."""
    import jinja2

    loader = jinja2.PackageLoader("nanogpt.report", "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name)
