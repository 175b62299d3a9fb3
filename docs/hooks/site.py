"""What MkDocs does beside its own: adds the generated pages, and the files of the repository that
pages link to, so that a link works on GitHub, in the site and without a network.
"""

import posixpath
import re
from pathlib import Path

import reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = reference.ROOT
SHIM, COPY = "https://unpkg.com/iframe-worker/shim", "assets/iframe-worker.js"
SEARCH = 'data-md-component="search" role="dialog"'
# files of the repository that are pages of the site as they are
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
PAGES["benchmarks/speedrun.md"] = "results/speedrun.md"
PAGES |= {
    f"benchmarks/results/{name}.md": f"results/{name}.md"
    for name in ("collapse", "faults", "mutants", "speed_cpu", "speed_cuda")
}
# and those that pages of the site are made from
MADE = {"conf": "reference/index.md", "conf/config.yaml": "reference/shared.md"}
MADE |= {f"conf/{group}": f"reference/{group}.md" for group in reference.GROUPS}
MADE |= {"ssl_bench/runs/units.py": "reference/metrics.md"}
MADE |= {"launchers": "reference/launcher.md"}
MADE |= {"examples/from_python.ipynb": "tutorials/notebook.md"}
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)((?:#[^)]*)?\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    made = reference.pages() | {there: (ROOT / here).read_text() for here, there in PAGES.items()}
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    for page in [*files.documentation_pages()]:
        source = origin(page.src_uri)
        for _, target, _ in LINK.findall(page.content_string):
            here = repository_path(source, target)
            if here and placed(here) == f"files/{here}" and f"files/{here}" not in files.src_uris:
                copied = File.generated(config, f"files/{here}", abs_src_path=str(ROOT / here))
                files.append(copied)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files of the repository lead to their copies, or to the pages made of them."""
    source, folder = origin(page.file.src_uri), posixpath.dirname(page.file.src_uri)
    if source.startswith("benchmarks/") or source == "CHANGELOG.md":
        page.meta["search"] = {"boost": 0.2}  # long tables, in which every word occurs
    elif page.file.src_uri.startswith("reference/"):
        page.meta["search"] = {"boost": 2}  # who looks for a key wants its meaning

    def moved(link: re.Match) -> str:
        here = repository_path(source, link[2])
        if not here:
            return link[0]
        path, mark, anchor = placed(here).partition("#")
        return f"{link[1]}{posixpath.relpath(path, folder or '.')}{mark}{anchor}{link[3]}"

    return LINK.sub(moved, markdown)


def origin(uri: str) -> str:
    """Where a page of the site lies in the repository."""
    return next((here for here, there in PAGES.items() if there == uri), f"docs/{uri}")


def placed(path: str) -> str:
    """Where a file or a folder of the repository is in the site."""
    folder, name = posixpath.split(path)
    if path in PAGES or path in MADE:
        return PAGES.get(path) or MADE[path]
    if folder in MADE:  # a choice
        return f"{MADE[folder]}#{name.removesuffix('.yaml')}"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}"


def repository_path(source: str, target: str) -> str | None:
    """The file or folder of the repository that a link of `source` means; None: none."""
    if re.match(r"\w+:", target):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    return path if Path(ROOT, path).exists() else None


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """The theme's one address outside of the site is a copy inside of it; its search has a name."""
    here = posixpath.relpath(COPY, posixpath.dirname(page.url) or ".")
    return output.replace(SHIM, here).replace(SEARCH, f'{SEARCH} aria-label="Search"')


def on_post_template(output_content: str, template_name: str, config: MkDocsConfig) -> str:
    """Likewise on the page for addresses that aren't there."""
    return output_content.replace(SHIM, f"/{COPY}")
