"""Hooks of MkDocs (mkdocs.yml): the pages as they are in the repository, with links that work on the site.

README.md becomes the page overview.md. A link to a page in docs/ stays on the site; one to any other file or
folder leads to the repository, if it is there. MkDocs itself checks links within the site.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchors import slug

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
OVERVIEW = "overview.md"
_LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)")
_MARKER = re.compile(r"^<!-- docs-test\n.*?-->\n+", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def site_link(link: str, page: Path, repository: str) -> str:
    """Return where a relative link of a page (a file of the repository) leads on the site.

    Raises ValueError if nothing is there.
    """
    target = Path(os.path.normpath(page.parent / link))
    if not target.exists():
        raise ValueError(f"{page.relative_to(ROOT)}: {link} does not exist")
    if target == ROOT / "README.md":
        return OVERVIEW
    if target.is_relative_to(DOCS) and target.suffix != ".py":
        return target.relative_to(DOCS).as_posix()
    kind = "tree" if target.is_dir() else "blob"
    return f"{repository}/{kind}/main/{target.relative_to(ROOT).as_posix()}"


def site_page(text: str, page: Path, repository: str) -> str:
    """Return the Markdown of a page for the site: other links, and no comments for the docs test."""
    text = _MARKER.sub("", text)
    parts, begin = [], 0
    for block in (*_CODE.finditer(text), None):
        prose = text[begin : block.start() if block else len(text)]
        parts.append(_LINK.sub(lambda match: site_link(match[1], page, repository), prose))
        parts.append(block[0] if block else "")
        begin = block.end() if block else begin
    return "".join(parts)


# --- what MkDocs calls --------------------------------------------------------------------------------------
def on_config(config: MkDocsConfig) -> None:
    """Give headings the anchors that they have in the repository."""
    config.mdx_configs["toc"]["slugify"] = lambda heading, separator: slug(heading)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README.md."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, OVERVIEW, content=(ROOT / "README.md").read_text()))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: MkDocsConfig, **_: Any) -> str:
    """Replace the links of a page."""
    from mkdocs.exceptions import PluginError

    name = page.file.src_uri
    file = ROOT / "README.md" if name == OVERVIEW else DOCS / name
    try:
        return site_page(markdown, file, config.repo_url or "")
    except ValueError as error:
        raise PluginError(str(error)) from None  # one line, and exit code 1
