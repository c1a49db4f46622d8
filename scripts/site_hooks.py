"""Lets mkdocs see README, docs/ and what they link to as they lie in the repository, so that one link serves both."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parent.parent
SHOWN = ("*.md", "docs/*.md", "docs/*.svg", "docs/pictures/*")
LISTED = ("docs/decisions", "benchmarks/results")  # folders that a link may lead to: each gets a page with its files
LINKED = ("notebooks/*.ipynb", "examples/slurm/*")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Takes the repository's files in the place of those of docs/, and adds what the theme brings."""
    patterns = (*SHOWN, *LINKED, *(f"{folder}/*.md" for folder in LISTED))
    paths = [path.relative_to(ROOT).as_posix() for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    ours = [File(path, str(ROOT), config.site_dir, config.use_directory_urls) for path in paths]
    for file in ours:
        if file.src_uri.startswith(LISTED):
            file.inclusion = InclusionLevel.NOT_IN_NAV
    ours += [File.generated(config, f"{folder}/index.md", content=listing(ROOT / folder)) for folder in LISTED]
    theirs = [file for file in files if Path(file.src_dir or "") != Path(config.docs_dir)]
    return Files([*ours, *theirs])


def on_page_markdown(markdown: str, **_: object) -> str:
    """Turns a link to a folder into one to the page that lists it."""
    return re.sub(rf"\]\(((?:\.\./)*)({'|'.join(LISTED)}|decisions)/?\)", r"](\1\2/index.md)", markdown)


def listing(folder: Path) -> str:
    """Returns a page with the title of each page in a folder."""
    lines = [f"# {folder.name.capitalize()}", ""]
    for page in sorted(folder.glob("*.md")):
        title = page.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        lines.append(f"- [{title}]({page.name})")
    return "\n".join(lines) + "\n"
