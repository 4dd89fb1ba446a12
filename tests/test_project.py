"The project's own promises: layers, generated code, settings in agreement, a light import"
import ast
import configparser
import filecmp
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
MODULES = {p.stem.split("_", 1)[1]: int(p.stem.split("_", 1)[0]) for p in (ROOT / "nbs").glob("[0-9][0-9]_*.ipynb")}


def imported_modules(path):
    "Names of gausssafe's modules that a module imports, at its top (nbdev makes these relative) or inside functions"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import): assert not any(alias.name.startswith("gausssafe") for alias in node.names), "write from gausssafe..."
        if not isinstance(node, ast.ImportFrom) or not (node.level or node.module.split(".")[0] == "gausssafe"): continue
        parts = [part for part in (node.module or "").split(".") if part not in ("", "gausssafe")]
        yield from parts[:1] or [alias.name for alias in node.names]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_down(name):
    upward = [other for other in imported_modules(ROOT / f"gausssafe/{name}.py") if MODULES[other] >= MODULES[name]]
    assert not upward, f"{name} (layer {MODULES[name]}) imports {upward} from its own height or above"


def test_every_module_has_its_notebook():
    exported = {p.stem for p in (ROOT / "gausssafe").glob("*.py")} - {"__init__", "_modidx"}
    assert exported == set(MODULES)


def test_export_and_clean_change_nothing(tmp_path):
    "The generated package is what the notebooks say, and the notebooks are clean"
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".venv*", ".git", "_proc", "_docs", "demo", "results", "__pycache__"))
    script = ("from nbdev.doclinks import nbdev_export as e; from nbdev.clean import nbdev_clean as c; "
              "getattr(e, '__wrapped__', e)(); getattr(c, '__wrapped__', c)()")
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    subprocess.run([sys.executable, "-c", script], cwd=copy, check=True, env=env)
    for folder, pattern in (("gausssafe", "*.py"), ("nbs", "**/*.ipynb")):
        ours, theirs = ({p.relative_to(r): p for p in (r / folder).glob(pattern)} for r in (ROOT, copy))
        assert set(ours) == set(theirs)
        drifted = [str(name) for name in ours if not filecmp.cmp(ours[name], theirs[name], shallow=False)]
        assert not drifted, f"run `make notebooks`: {drifted}"


def test_settings_agree_with_pyproject():
    ini = configparser.ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini")
    toml = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for key, value in toml["tool"]["nbdev"].items():
        text = " ".join(value) if isinstance(value, list) else str(value)
        assert ini["DEFAULT"][key] == text, key
    assert toml["project"]["name"] == ini["DEFAULT"]["lib_name"]
    assert toml["project"]["requires-python"] == f">={ini['DEFAULT']['min_python']}"


def test_parameters_tag_survives_cleaning():
    ini = configparser.ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini")
    assert "tags" in ini["DEFAULT"]["allowed_cell_metadata_keys"].split()
    for path in (ROOT / "nbs/experiments").glob("*.ipynb"):
        tagged = [c for c in nbformat.read(path, as_version=4).cells if "parameters" in c.metadata.get("tags", [])]
        assert len(tagged) == 1, f"{path.name} needs one cell tagged parameters"


def test_no_cell_exports_nothing():
    "nbdev 2 and 3 disagree on what that is"
    assert [path.name for path in NOTEBOOKS for cell in nbformat.read(path, as_version=4).cells if cell.source.strip() == "#| export"] == []


def test_quarto_file_is_linked():
    assert (ROOT / "nbs/_quarto.yml").is_symlink() and (ROOT / "nbs/_quarto.yml").resolve() == ROOT / "_quarto.yml"


def test_readme_is_the_index_notebook():
    subprocess.run([sys.executable, ROOT / "tools/readme.py", "--check"], check=True)


def test_import_is_light():
    heavy = ("torch", "pennylane", "umap", "papermill", "numpy", "fastcore", "nbdev")
    code = f"import sys, gausssafe; bad = [m for m in {heavy} if m in sys.modules]; assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_nothing_exported_needs_the_developers_tools():
    for path in (ROOT / "gausssafe").glob("*.py"):
        if path.name == "_modidx.py": continue
        names = {node.module or "" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}
        names |= {a.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import) for a in node.names}
        assert not {n.split(".")[0] for n in names} & {"fastcore", "nbdev", "execnb"}, path.name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_begins_as_the_site_needs(path):
    first = nbformat.read(path, as_version=4).cells[0]
    lines = [line for line in first.source.splitlines() if line.strip()]
    assert first.cell_type == "markdown" and len(lines) == 2 and lines[0].startswith("# ") and lines[1].startswith("> ")
