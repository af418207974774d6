"""A hook of MkDocs: links from pages to files of the repository lead to copies of them in the site.

Pages are read on a code host as well, where ``../ARCHITECTURE.md`` is right. In the site such a
file is a page ``repository/ARCHITECTURE.md``, and so are the files that it links to. A link to a
file that does not exist stays as it is, so that a strict build fails.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parent.parent
PLACE = "repository"
_LINK = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)([^)\s#]+)(#[^)\s]*)?(?=\))")
_CODE = re.compile(r"^(```.*?^```|(?: {4}[^\n]*\n)+)", re.MULTILINE | re.DOTALL)


def _of(uri: str) -> str:
    """Where in the repository a page of the site is from."""
    inside = uri.removeprefix(f"{PLACE}/")
    return inside if inside != uri else f"docs/{uri}"


def _uri(path: str) -> str:
    """Where in the site a file of the repository is."""
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{PLACE}/{path}"


def _linked(path: str) -> set[str]:
    """The files of the repository that one of its pages links to."""
    text = _CODE.sub("", (ROOT / path).read_text(encoding="utf-8"))
    targets = {
        posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
        for link, _ in _LINK.findall(text)
    }
    return {target for target in targets if (ROOT / target).is_file()}


def on_files(files: Files, *, config: Any) -> Files:
    """Add what pages link to, and what is linked to from there."""
    todo = [_of(file.src_uri) for file in files.documentation_pages()]
    seen = set(todo)
    while todo:
        for path in sorted(_linked(todo.pop()) - seen):
            seen.add(path)
            if path.endswith(".md"):
                todo.append(path)
            if not path.startswith("docs/"):
                file = File.generated(config, _uri(path), abs_src_path=str(ROOT / path))
                file.inclusion = InclusionLevel.NOT_IN_NAV
                files.append(file)
    return files


def on_page_markdown(markdown: str, *, page: Any, files: Files, **_: Any) -> str:
    """Turn links to files of the repository into links to their copies."""
    path, uri = _of(page.file.src_uri), page.file.src_uri

    def turned(match: re.Match[str]) -> str:
        link, anchor = match[1], match[2] or ""
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
        there = files.get_file_from_path(_uri(target))
        if there is None:
            return match[0]
        return posixpath.relpath(there.src_uri, posixpath.dirname(uri) or ".") + anchor

    return _LINK.sub(turned, markdown)
