"The documentation site: what it shows, what it hides, and that every link of it leads somewhere"
import ast
import base64
import re
import runpy
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from nbdev.showdoc import show_doc
from nbformat import read, v4, write

from gausssafe.wgan import WGANConfig

pytest.importorskip("pypandoc", reason="the docs extra is not installed")
ROOT = Path(__file__).resolve().parent.parent
PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")


class Page(HTMLParser):
    "Anchors, links, words and tags of a page"
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.tags, self.words = set(), [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs.get("class") or ""))
        self.ids |= {attrs["id"]} if "id" in attrs else set()
        self.links += [attrs[key] for key in ("href", "src") if key in attrs]

    def handle_data(self, data): self.words.append(data)


def read_site(folder): return {p.relative_to(folder).as_posix(): Page(p) for p in folder.rglob("*.html")}


def dead_links(folder):
    "Every internal link that names no file, or no anchor of its page; the folder may lie anywhere"
    pages, root = read_site(folder), folder.resolve()
    for name, page in pages.items():
        for link in page.links:
            if link.startswith(("http:", "https:")): continue
            path, _, anchor = link.partition("#")
            target = (root / name).parent / path if path else root / name
            known = target.is_file() and target.resolve().is_relative_to(root)
            if not known or anchor and anchor not in pages[target.resolve().relative_to(root).as_posix()].ids: yield f"{name}: {link}"


def build(project): return subprocess.run([sys.executable, ROOT / "tools/docs.py", project], cwd=project, capture_output=True, text=True)


def code(source, *outputs): return v4.new_code_cell(source, outputs=list(outputs))
def result(**data): return v4.new_output("display_data", {key.replace("_", "/"): value for key, value in data.items()})
def stream(text, name="stdout"): return v4.new_output("stream", name=name, text=text)


def notebook(title, *cells):
    cells = [v4.new_markdown_cell(c) if isinstance(c, str) else c for c in (f"# {title}\n\n> About {title}", *cells)]
    return v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}})


CIRCLE = """#| export
def circle_area(
    radius: float,  # Metres; not a `parse_bytes` size
    unit: Unit | None = None,  # Of the radius
) -> float:  # Square metres
    "Area of a circle"
    return math.pi * radius**2"""
SHAPES = notebook(
    "shapes",
    code("#| default_exp shapes"),
    code("#| hide\nimport os  # hidden words"),
    code("#| export\nimport math"),
    code("#| export\nclass Unit: 'Of a length'"),
    "A circle has area $\\pi r^2$: `circle_area`. `parse_bytes` reads sizes; `GausssafeError._message` and `_rebuild` are internal.\n- a tight list",
    code(CIRCLE),
    "## A table and a figure",
    code("circle_area(2)", result(text_plain="12.566370614359172")),
    code("picture", result(image_png=base64.b64encode(PIXEL).decode(), text_plain="<Figure>")),
    code("frame", result(text_html="<table><tr><td>cell of a frame</td></tr></table>", text_plain="plain frame")),
    code("#| echo: false\nunseen_source", stream("\x1b[31mred words\x1b[0m\n 10%|#\r100%|###\n")),
    code("#| output: false\nseen_source", stream("unseen output")),
    code("1 / 0", v4.new_output("error", ename="ZeroDivisionError", evalue="division by zero", traceback=["\x1b[0m traceback"])),
    code("#| hide\nimport nbdev; nbdev.nbdev_export()"))
INDEX = notebook(
    "home",
    "[Durations](00_units.ipynb#durations), [a study](experiments/study.ipynb), [how to help](../CONTRIBUTING.md), [below](#a-section)",
    "## A section")
STUDY = notebook("study", "Back [home](../index.ipynb), see [units](../00_units.ipynb) and `format_bytes`.")


def make_project(folder, **notebooks):
    (folder / "nbs/experiments").mkdir(parents=True)
    for name in ("settings.ini", "CONTRIBUTING.md", "nbs/styles.css", "nbs/_quarto.yml", "nbs/00_units.ipynb", "nbs/01_errors.ipynb"):
        shutil.copy(ROOT / name, folder / name)
    for name, content in notebooks.items(): write(content, folder / f"nbs/{name.replace('__', '/')}.ipynb")
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    project = make_project(tmp_path_factory.mktemp("project"), **{"index": INDEX, "40_shapes": SHAPES, "experiments__study": STUDY})
    before = {p: p.read_bytes() for p in project.rglob("*") if p.is_file()}
    done = build(project)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = project / "_docs"
    after = {p: p.read_bytes() for p in project.rglob("*") if p.is_file() and folder not in p.parents}
    return SimpleNamespace(folder=folder, pages=read_site(folder), before=before, after=after)


def test_building_changes_nothing_else(site): assert site.after == site.before


def test_every_notebook_has_its_page(site):
    assert set(site.pages) == {"index.html", "units.html", "errors.html", "shapes.html", "experiments/study.html"}
    assert "units Foundations" not in site.pages["shapes.html"].text
    assert "home Experiments study Foundations units errors Architecture search shapes" in site.pages["shapes.html"].text


def test_every_link_leads_somewhere(site):
    assert not list(dead_links(site.folder))
    links = site.pages["index.html"].links
    assert {"units.html#durations", "experiments/study.html", "https://github.com/gausssafe/gausssafe/blob/main/CONTRIBUTING.md"} <= set(links)
    assert {"../index.html", "../units.html#format_bytes", "../styles.css"} <= set(site.pages["experiments/study.html"].links)


def test_anchors_are_those_nbdev_links_to(site):
    assert {"circle_area", "a-table-and-a-figure"} <= site.pages["shapes.html"].ids
    assert {"parse_bytes", "format_duration"} <= site.pages["units.html"].ids
    assert "memorylimitexceeded" in site.pages["errors.html"].ids
    links = site.pages["shapes.html"].links
    assert "units.html#parse_bytes" in links
    assert {"errors.html#gausssafeerror", "errors.html"} <= set(links), "names without a heading: their class, else their page"


def test_documentation_of_names_is_written(site):
    text = site.pages["shapes.html"].text
    assert "def circle_area( radius:float, # Metres; not a `parse_bytes` size unit:Unit | None=None, # Of the radius" in text
    assert "Area of a circle" in text


def test_hidden_cells_are_absent(site):
    for page in site.pages.values():
        assert not [words for words in ("hidden words", "nbdev_export", "default_exp", "math.pi", "unseen") if words in page.text]
    assert "seen_source" in site.pages["shapes.html"].text


def test_outputs_are_shown(site):
    page = site.pages["shapes.html"]
    assert all(words in page.text for words in ("12.566370614359172", "cell of a frame", "red words 100%|###", "ZeroDivisionError: division by zero"))
    assert not [words for words in ("<Figure>", "plain frame", "10%|# ", "\x1b", "traceback", "[31m") if words in page.text]
    (image,) = [link for link in page.links if link.endswith(".png")]
    assert (site.folder / image).read_bytes() == PIXEL
    assert {"math", "li"} <= {tag for tag, _ in page.tags} and ("span", "kw") in page.tags
    assert not [tag for tag, name in page.tags if name == "math inline"], "formulas are MathML: no script has to be fetched"


def test_nothing_is_fetched_from_elsewhere(site):
    for page in site.pages.values(): assert all(link.startswith("https://github.com/gausssafe/") for link in page.links if "//" in link)


def test_search_finds_every_heading(site):
    text = (site.folder / "search.js").read_text()
    assert all(f'"{url}"' in text for url in ("shapes.html#circle_area", "units.html#durations", "experiments/study.html#top"))


def test_a_dead_link_fails_the_build(tmp_path):
    links = "[no page](99_nothing.ipynb), [no section](00_units.ipynb#nothing), [fine](01_errors.ipynb)"
    done = build(make_project(tmp_path, index=notebook("home", links)))
    assert done.returncode == 1 and "01_errors" not in done.stderr
    assert "index.html: 99_nothing.ipynb\nindex.html: 00_units.ipynb#nothing" in done.stderr


NOTEBOOKS = {path: read(path, as_version=4).cells for path in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_link_to_files_that_exist(path):
    prose = "\n".join(cell.source for cell in NOTEBOOKS[path] if cell.cell_type == "markdown")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose) if not re.match(r"[a-z]+:", link)]
    assert not [link for link in links if not (path.parent / link).exists() and not (ROOT / link).exists()]


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.name[0].isdigit()], ids=lambda p: p.stem)
def test_building_the_site_runs_no_examples(path):
    "In the notebook of a module, nbdev executes every cell with an import in it, hidden ones too: it holds nothing else"
    for cell in NOTEBOOKS[path]:
        if cell.cell_type != "code" or re.match(r"#\| *(export|eval: *false)", cell.source) or cell.source.startswith(("%", "!")): continue
        if "nbdev_export()" in cell.source: continue
        tree = ast.parse(cell.source)
        with_import = any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree))
        assert not with_import or all(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body), cell.source


def test_settings_are_shown_as_they_are_written():
    "Where nbdev has only `**data`"
    docs = runpy.run_path(str(ROOT / "tools/docs.py"))
    shown = docs["show_doc"](show_doc(WGANConfig)._repr_markdown_())
    assert "class WGANConfig(\n    noise: Literal[" in shown and "**settings" not in shown
    assert [line for line in shown.splitlines() if "n_critic" in line] == [
        "    n_critic: int = Field(5, ge=1)  # Critic steps for each of the generator"]
    assert all(f"    {name}: " in shown for name in WGANConfig.model_fields)


@pytest.mark.slow
def test_the_real_site_builds(tmp_path):
    shutil.copytree(ROOT, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*", "_docs", "_proc", "demo", "results"))
    done = build(tmp_path)
    assert done.returncode == 0, done.stderr
    assert not list(dead_links(tmp_path / "_docs"))
    assert len(read_site(tmp_path / "_docs")) == len([p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts])
