"""Puts the pages of the site together in build/docs and builds it, warnings as errors: ``python docs/build.py``.

A page is a file of the repository and stays readable where it lies. Its links are followed from there: to another page,
to a picture, which is taken along, to a program, which is shown where the link is a line of its own, or to any other
file, which is named. A link to nothing is an error.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "build" / "docs"
PAGES = {  # title: file; rooms without a README are left out
    "add_ops": "README.md",
    "Quick start": "docs/quick-start.md",
    "Worked examples": "docs/examples.md",
    "Your own videos": "docs/own-videos.md",
    "The method": "docs/method.md",
    "API": "docs/api.md",
    "Frequency attention": "add_ops/frequency_attention/README.md",
    "Multi-view attention": "add_ops/multi_view/README.md",
    "Sliced Wasserstein": "add_ops/sliced_wasserstein/README.md",
    "Benchmarks": "docs/benchmarks.md",
    "Study": "docs/study.md",
    "Reports and intervals": "training/report/README.md",
    "Extending": "docs/extending.md",
    "Environment variables": "docs/environment.md",
    "Troubleshooting": "docs/troubleshooting.md",
    "Contributing": "CONTRIBUTING.md",
    "Changelog": "CHANGELOG.md",
}
HEADINGS = {  # of the API: module or room, in the order of the page; others follow by their own names
    "add_loss": "ADD over layers",
    "frequency_attention": "Frequency attention",
    "multi_view": "Multi-view attention",
    "sliced_wasserstein": "Sliced Wasserstein",
    "_dispatch": "Backends",
    "version": "Version",
}
PICTURES = {".png", ".jpg", ".svg"}
LINK = re.compile(r'(?P<text>!?\[[^\[\]]*\])\((?P<to>[^()\s]+)\)|(?P<attribute>src|srcset)="(?P<file>[^"]+)"')
SHOWN = re.compile(r"^\[[^\[\]]*\]\(([^()\s]+\.py)\)$", flags=re.MULTILINE)  # a line that is only a link to a program
FENCE = re.compile(r"(^```.*?^```$)", flags=re.MULTILINE | re.DOTALL)
ROLE = re.compile(r":(?:func|meth|class|data|mod|attr):`[.~]*([^`]+)`")


def pages() -> dict[str, Path]:
    """Title and file of every page that exists."""
    return {title: ROOT / name for title, name in PAGES.items() if (ROOT / name).exists()}


def name_on_site(page: Path) -> str:
    """``index.md`` for the README, the room's name for a room's, else the file's own in small letters."""
    if page.name == "README.md":
        return "index.md" if page.parent == ROOT else f"{page.parent.name}.md"
    return page.name.lower()


def public_names() -> dict[str, list[str]]:
    """The names of ``add_ops.__all__`` by room, read off the imports of its __init__.py."""
    tree = ast.parse((ROOT / "add_ops" / "__init__.py").read_text())
    (listed,) = (
        ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__"
    )
    groups: dict[str, list[str]] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (names := [n.name for n in node.names if n.name in listed]):
            groups.setdefault(node.module.partition(".")[0], []).extend(names)
    return groups


def api() -> str:
    """A heading per room and an entry per public name, for mkdocstrings."""
    found, parts = public_names(), []
    for room in sorted(found, key=lambda room: [*HEADINGS, room].index(room)):
        heading = HEADINGS.get(room, room.strip("_").replace("_", " ").capitalize())
        parts += [f"## {heading}", *(f"::: add_ops.{name}" for name in found[room])]
    return "\n\n".join(parts) + "\n"


def _sources() -> None:
    """The package with reStructuredText's roles in its docstrings as links of the site."""
    listed = {name for names in public_names().values() for name in names}

    def link(match: re.Match) -> str:
        name = match[1].split(".")[0]
        return f"[`{match[1]}`][add_ops.{name}]" if name in listed else f"`{match[1].rpartition('.')[2]}`"

    for path in (ROOT / "add_ops").rglob("*.py"):
        copy = TARGET / "source" / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(ROLE.sub(link, path.read_text()))


def with_links_of_the_site(text: str, page: Path) -> str:
    """The text of a page with its links as the site needs them; pictures are taken along.

    Raises:
        ValueError: a link to a file that does not exist.
    """
    known = {path: name_on_site(path) for path in pages().values()}

    def follow(match: re.Match) -> str:
        to, _, anchor = (match["to"] or match["file"]).partition("#")
        if not to or ":" in to:
            return match[0]
        file = Path(os.path.normpath(page.parent / to))
        if not file.exists():
            raise ValueError(f"{page.relative_to(ROOT)}: links to '{to}', which does not exist")
        if file.suffix in PICTURES:
            target = f"pictures/{file.name}"
            (TARGET / "pages" / "pictures").mkdir(parents=True, exist_ok=True)
            shutil.copy(file, TARGET / "pages" / target)
            return f'{match["attribute"]}="{target}"' if match["file"] else f"{match['text']}({target})"
        if file in known:
            return f"{match['text']}({known[file]}{'#' * bool(anchor)}{anchor})"
        name, text = file.relative_to(ROOT).as_posix(), match["text"].strip("[]")
        return f"`{name}`" if text.strip("`") in name else f"{text} (`{name}`)"

    text = SHOWN.sub(lambda match: f"```python\n{(page.parent / match[1]).read_text(encoding='utf-8')}```", text)
    parts = FENCE.split(text)
    return "".join(part if FENCE.fullmatch(part) else LINK.sub(follow, part) for part in parts)


def assemble() -> Path:
    """Write everything that the generator reads; returns its configuration."""
    shutil.rmtree(TARGET, ignore_errors=True)
    (TARGET / "pages").mkdir(parents=True)
    nav = []
    for title, page in pages().items():
        text = with_links_of_the_site(page.read_text(encoding="utf-8"), page)
        text += f"\n{api()}" if page.name == "api.md" else ""
        (TARGET / "pages" / name_on_site(page)).write_text(text, encoding="utf-8")
        nav.append(f"{{ {json.dumps(title)} = {json.dumps(name_on_site(page))} }}")
    _sources()
    settings = (ROOT / "docs" / "zensical.toml").read_text()
    assert "\nnav = []\n" in settings
    configuration = TARGET / "zensical.toml"
    configuration.write_text(settings.replace("\nnav = []\n", f"\nnav = [{', '.join(nav)}]\n"))
    return configuration


if __name__ == "__main__":
    from add_ops._output import outliving_readers

    command = [Path(sys.executable).with_name("zensical"), "build", "--strict", "-f", assemble()]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with outliving_readers():
        print(done.stdout)
    sys.exit(done.returncode or "griffe:" in done.stdout)  # what it says of docstrings is no warning to --strict
