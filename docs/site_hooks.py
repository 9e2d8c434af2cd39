"""What the site has beside the pages: the README as its first page, and the reference of what may be imported."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add index.md, which is the README, and reference.md, which names the modules of commands.md."""
    listed = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8").split("## As a library")[1]
    modules = re.findall(r"^\| `([\w.]+)` \| (.*?) \|", listed, flags=re.MULTILINE)
    parts = ["# Reference", "What may be imported ([As a library](commands.md#as-a-library)), from the docstrings."]
    parts += [f"::: {module}.{name}" for module, names in modules for name in re.findall(r"`(\w+)`", names)]
    pages = {"index.md": (ROOT / "README.md").read_text(encoding="utf-8"), "reference.md": "\n\n".join(parts)}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Bring links between README and docs/ to the site; of those to other files of the repository the text is left."""
    markdown = re.sub(r"\]\(docs/", "](", markdown).replace("](../README.md", "](index.md")
    # An image is never outside docs/, so only links are left to look at.
    return re.sub(r"(?<!!)\[([^\]]*)\]\((?!#|\w+:|[a-z_]+\.md\b|images/)[^)]*\)", r"\1", markdown)
