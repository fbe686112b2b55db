"""Anchors of headings, as the pages of a repository have them."""

from __future__ import annotations

import re


def slug(heading: str) -> str:
    """Return the anchor that a Git forge gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
