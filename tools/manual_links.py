"""A hook of MkDocs: links from the manual to files of the repository that are not pages of it.

In the repository they open the file. In the site they open it at `repo_url`, if mkdocs.yml names one; otherwise the
link's text stays, with the path behind it.
"""

import posixpath
import re
from typing import Any

LINK = re.compile(r"\[([^\]]+)\]\((\.\.?/[^)\s]+)\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Called by MkDocs with the text of every page."""
    return rewritten(markdown, page.file.src_uri, config.repo_url)


def rewritten(markdown: str, page: str, repository: str | None) -> str:
    """The text with the links that leave the folder docs rewritten.

    Args:
        page: its path in docs, such as `objectives/dpo.md`.
        repository: the address of the repository; None if there is none yet.
    """

    def link(found: re.Match[str]) -> str:
        text, place = found.groups()
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), place))
        if path.startswith("docs/"):
            return found[0]
        return f"[{text}]({repository.rstrip('/')}/blob/main/{path})" if repository else f"{text} (`{path}`)"

    return LINK.sub(link, markdown)
