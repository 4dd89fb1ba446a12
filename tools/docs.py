"""Build the documentation site from the notebooks: `python tools/docs.py [project]`

nbdev runs the imports and the exported cells and writes each name's documentation; pandoc makes pages of what is left.
No quarto, no network, and nothing is written beside the notebooks: all work is done in a temporary copy.
"""
import ast
import base64
import contextlib
import importlib
import inspect
import json
import posixpath
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path
from textwrap import dedent
from urllib.parse import unquote

import pypandoc
import yaml
from nbdev.config import get_config
from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parent.parent
GROUPS = {"Foundations": range(10), "Memory": range(10, 12), "Circuits": (*range(12, 20), 22, 27), "GANs": range(20, 29), "Curvature": range(29, 32),
          "Privacy": range(32, 40), "Architecture search": range(40, 50), "Figures": range(50, 57), "Guarded runs": range(57, 70),
          "Commands": range(70, 80)}  # By the number of the notebook; the first that fits
ORDER = ["", "Tutorials", "Experiments", *GROUPS]
FORMAT = "markdown-smart-citations-subscript-superscript-implicit_figures+lists_without_preceding_blankline+autolink_bare_uris"
OPTIONS = [f"--template={ROOT / 'tools/docs.html'}", "--mathml", "--toc", "--wrap=preserve"]
IMAGES = {"image/png": "png", "image/jpeg": "jpg", "image/svg+xml": "svg"}
SETTINGS = re.compile(r"(?P<before>(?P<module>\w+/\w+)\.py#.*?)def (?P<name>\w+)\(\n *\*\*(settings|data\S*)\n\)(->None)?:", re.S)
UNSEEN = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|^.*\r(?!\n)", re.M)  # Colours, and what a progress bar wrote over


def process(project: Path, work: Path) -> Path:
    "nbdev's own processing, in a copy; returns the folder of processed notebooks"
    shutil.copytree(project / "nbs", work / "nbs", ignore=shutil.ignore_patterns("results", ".ipynb_checkpoints"))
    shutil.copy(project / "settings.ini", work)
    return proc_nbs(n_workers=0)


# From a cell to markdown

def fence(text: str, attributes: str) -> str:
    ticks = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{ticks} {{{attributes}}}\n{UNSEEN.sub('', text).rstrip()}\n{ticks}"


def settings(doc: re.Match) -> str:
    "A pydantic class as its fields are written, comments and all, those of its bases first; nbdev would show `**data`"
    fields, cls = [], getattr(importlib.import_module(doc["module"].replace("/", ".")), doc["name"])
    if not isinstance(cls, type): return doc[0]
    for base in reversed([base for base in cls.__mro__ if base.__module__.partition(".")[0] == cls.__module__.partition(".")[0]]):
        source = dedent(inspect.getsource(base))
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign): fields += source.splitlines()[node.lineno - 1:node.end_lineno]
    return "\n".join([f"{doc['before']}class {doc['name']}(", *fields, ")"])


def show_doc(text: str) -> str:
    "nbdev links names in signatures too, where markdown is not read, and calls the notebook's own classes `__main__`: take that out"
    text = SETTINGS.sub(settings, text)
    return re.sub(r"^```.*?^```", lambda code: re.sub(r"\[(`[^`]+`)\]\([^)]*\)|\b__main__\.", r"\1", code[0]), text, flags=re.M | re.S)


def image(mime: str, content: str, stem: Path) -> str:
    path = stem.with_name(f"{stem.name}.{IMAGES[mime]}")
    path.write_bytes(content.encode() if mime == "image/svg+xml" else base64.b64decode(content))
    return f"![]({path.name}){{.figure}}"


def output(out: dict, stem: Path) -> str:
    "Markdown of one output; `stem` is where its image would go"
    if out["output_type"] == "error": return fence(f"{out['ename']}: {out['evalue']}", ".error")
    if out["output_type"] == "stream": return fence("".join(out["text"]), f".{out['name']}")
    data = {mime: content if isinstance(content, str) else "".join(content) for mime, content in out["data"].items() if not mime.endswith("json")}
    if "text/markdown" in data: return show_doc(data["text/markdown"])
    for mime in filter(data.get, IMAGES): return image(mime, data[mime], stem)
    if "text/html" in data: return fence(data["text/html"], "=html")
    return data["text/latex"] if "text/latex" in data else fence(data.get("text/plain", ""), ".result")


def code_cell(cell: dict, stem: Path) -> str:
    "Code and outputs, minus what the cell's `#| echo: false` and the like turn off"
    source = "".join(cell["source"])
    options = dict(re.findall(r"^#\| *([\w-]+): *(.*?) *$", source, re.M))
    parts, off = [], {key for key, value in options.items() if value == "false"}
    source = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip()
    if source and not off & {"echo", "include"}: parts.append(fence(source, ".python"))
    outputs = [output(out, stem.with_name(f"{stem.name}-{i}")) for i, out in enumerate(cell["outputs"]) if not off & {"output", "include"}]
    parts += outputs if options.get("output") == "asis" else [f"::: output\n{text}\n:::" for text in outputs]
    return "\n\n".join(parts)


# From a notebook to a page

@dataclass
class Page:
    name: str  # of the notebook, from nbs/
    url: str  # from the root of the site
    title: str
    description: str
    text: str  # markdown
    html: str = ""

    @property
    def group(self) -> str:
        if "/" in self.name: return self.name.partition("/")[0].capitalize()
        return next(group for group, numbers in GROUPS.items() if int(self.name[:2]) in numbers) if self.name[0].isdigit() else ""


def read_page(path: Path, name: str, folder: Path) -> Page:
    "A processed notebook begins with its front matter; its images go to `folder`"
    front, *cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    meta = next(yaml.safe_load_all("".join(front["source"])))
    texts = [code_cell(cell, folder / f"{name.removesuffix('.ipynb')}-{i}") if cell["cell_type"] == "code" else "".join(cell["source"])
             for i, cell in enumerate(cells, 1)]
    return Page(name, posixpath.join(posixpath.dirname(name), meta["output-file"]), meta["title"], meta.get("description", ""), "\n\n".join(texts))


def sidebar(pages: list[Page], here: Page) -> str:
    lines, group = ["<ul>"], ""
    for page in pages:
        if page.group != group: lines.append(f"</ul><h2>{(group := page.group)}</h2><ul>")
        lines.append(f'<li><a href="/{page.url}"{" aria-current=page" * (page is here)}>{escape(page.title)}</a></li>')
    return "\n".join([*lines, "</ul>"])


def render(page: Page, pages: list[Page]) -> str:
    "HTML of a page; links of the template and of nbdev are written from the root, `relink` makes them relative"
    config = get_config()
    variables = {"site": config.title, "nav": sidebar(pages, page), "root": "../" * page.url.count("/"), "title": escape(page.title),
                 "description": escape(page.description), "source": f"{config.git_url}/blob/{config.branch}/nbs/{page.name}"}
    return pypandoc.convert_text(page.text, "html5", FORMAT, OPTIONS + [f"--variable={key}={value}" for key, value in variables.items()])


# Links

def in_page(page: Page, anchor: str, by_nbdev: bool) -> str | None:
    "nbdev links methods and private names too: where they have no heading, their class or their page is meant"
    tries = [anchor] + [anchor.rpartition(".")[0], ""] * by_nbdev
    found = next((a for a in tries if not a or f'id="{escape(a)}"' in page.html), None)
    return None if found is None else f"{page.url}#{found}".rstrip("#")


def locate(link: str, here: Page, pages: list[Page], project: Path) -> str | None:
    "Where a link leads, from the root of the site: to a page, a file beside it, or the repository's own web page; None: nowhere"
    path, _, anchor = unquote(link).partition("#")
    path = posixpath.normpath(posixpath.join("/", posixpath.dirname(here.url), path))[1:] if path else here.url
    for page in pages:
        if path.removeprefix("nbs/") in (page.url, page.name): return in_page(page, anchor, link.startswith("/"))
    if Path(path).is_file(): return path
    config = get_config()
    return f"{config.git_url}/blob/{config.branch}/{path}" if (project / path).exists() else None


def relink(here: Page, pages: list[Page], project: Path) -> list[str]:
    "Make a page's internal links relative to it, and return those that lead nowhere"
    broken = []

    def relative(match):
        link = unescape(match[2])
        found = link if re.match(r"[a-z]+:", link) else locate(link, here, pages, project)
        if found is None: broken.append(f"{here.url}: {link}")
        elif not re.match(r"[a-z]+:", found): found = posixpath.relpath(found, posixpath.dirname(here.url) or ".")
        return f'{match[1]}="{escape(found or link)}"'

    here.html = re.sub(r'\b(href|src)="([^"]*)"', relative, here.html)
    return broken


# The site

def plain(html: str) -> str: return " ".join(unescape(re.sub(r"<annotation.*?</annotation>|<[^>]+>", " ", html)).split())


def sections(page: Page) -> list[dict[str, str]]:
    "What the search box looks through: every heading, and the text below it"
    main = page.html[page.html.index("<main>"):page.html.index("</main>")]
    headings = re.findall(r'<h\d[^>]*\bid="([^"]+)"[^>]*>(.*?)</h\d>(.*?)(?=<h\d|\Z)', main, re.S)
    return [{"url": f"{page.url}#{anchor}", "page": page.title, "title": plain(title), "text": plain(text)} for anchor, title, text in headings]


def build(project: Path, site: Path) -> list[str]:
    "Write the site into the current folder's `site`, and return its broken links"
    proc = process(project, Path.cwd())
    shutil.copytree(proc, site, ignore=shutil.ignore_patterns("*.ipynb", "*.yml"))
    names = sorted((p.relative_to(proc).as_posix() for p in proc.rglob("*.ipynb")), key=lambda n: (n != "index.ipynb", n))
    pages = sorted((read_page(proc / name, name, site) for name in names), key=lambda page: ORDER.index(page.group))
    for page in pages: page.html = render(page, pages)
    (site / "search.js").write_text(f"window.SECTIONS = {json.dumps([s for page in pages for s in sections(page)])}\n")
    with contextlib.chdir(site): broken = [link for page in pages for link in relink(page, pages, project)]
    for page in pages: (site / page.url).write_text(page.html, encoding="utf-8")
    return broken


if __name__ == "__main__":
    project = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT).resolve()
    with tempfile.TemporaryDirectory() as work:
        site = Path(work) / "site"
        with contextlib.chdir(work): broken = build(project, site)
        shutil.rmtree(project / "_docs", ignore_errors=True)
        shutil.move(site, project / "_docs")
    if broken: sys.exit("These links lead nowhere:\n" + "\n".join(broken))
    print(f"Open {project / '_docs/index.html'}")
