"""A hook of the documentation site: links to files outside of docs/ lead to the repository."""

import os
import re
from typing import Any

LINK = re.compile(r"\]\((?P<path>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turns each relative link out of docs/ into a link to the repository."""

    def lead(match: re.Match[str]) -> str:
        folder = os.path.dirname(page.file.src_uri)
        path = os.path.normpath(os.path.join("docs", folder, match["path"]))
        if path.startswith("docs/"):
            return match[0]
        root = str(config.site_url or "https://example.org/pear").rstrip("/")
        return f"]({root}/{path}{match['anchor'] or ''})"

    return LINK.sub(lead, markdown)
