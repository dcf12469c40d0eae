"""What MkDocs does not do by itself: pages from the repository's root, links to its files, and formulas as MathML."""

from __future__ import annotations

import html
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
# pages of the repository's root, by where they are in the site
PAGES = {"index.md": "README.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
FENCED = re.compile(r"(^ *```.*?^ *```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(\(?)(!?)\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")
# a prime is raised by its font already; as a superscript it would be raised twice
PRIMED = re.compile("<msup><mi>(.)</mi><mi>&#x02032;</mi></msup>")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the repository's root, and the pictures outside docs/ that pages show."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for page in files.documentation_pages():
        for _, mark, _, target, _ in LINK.findall(page.content_string):
            path = _in_repository(page.src_uri, target)
            if mark and not path.startswith("docs/") and files.get_file_from_path(f"pictures/{path}") is None:
                files.append(File.generated(config, f"pictures/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links as they are in the repository into the site's."""

    def replaced(match: re.Match[str]) -> str:
        bracket, mark, label, target, anchor = match.groups(default="")
        path = _in_repository(page.file.src_uri, target)
        if not (ROOT / path).exists():
            raise PluginError(f"{page.file.src_uri} links to {target}, which is not there")
        if path.startswith("docs/"):
            path = path.removeprefix("docs/")
        elif mark:
            path = f"pictures/{path}"
        elif path in PAGES.values():
            path = next(name for name, source in PAGES.items() if source == path)
        elif config.repo_url:
            return f"{bracket}[{label}]({config.repo_url.rstrip('/')}/blob/main/{path})"
        elif label.strip("`") in (path, PurePosixPath(path).name):
            return f"{bracket}`{path}`"
        else:
            return f"{bracket}{label}, `{path}`" if bracket else f"{label} (`{path}`)"
        here = os.path.relpath(path, PurePosixPath(page.file.src_uri).parent)
        return f"{bracket}{mark}[{label}]({here}{anchor})"

    parts = FENCED.split(markdown)
    return "".join(part if i % 2 else LINK.sub(replaced, part) for i, part in enumerate(parts))


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, which browsers show without a script."""

    def formula(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        primed = r'<mrow><mi>\1</mi><mo lspace="0" rspace="0">&#x02032;</mo></mrow>'
        return PRIMED.sub(primed, convert(html.unescape(match[2]), display=display))

    return FORMULA.sub(formula, content)


def _in_repository(page: str, target: str) -> str:
    """The path in the repository that a page's link leads to."""
    folder = ROOT if page in PAGES else ROOT / "docs" / PurePosixPath(page).parent
    return Path(os.path.normpath(folder / target)).relative_to(ROOT).as_posix()
