"Export the notebooks under nbdev 3 in a copy of the tree, and compare with gausssafe/"
import filecmp
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def index(folder: Path) -> dict:
    "The index of symbols but for empty entries: what has `auto` in its name, as autopsy, nbdev takes for its own, and nbdev 3 leaves out"
    found = runpy.run_path(str(folder / "gausssafe" / "_modidx.py"))["d"]
    return found | {"syms": {name: symbols for name, symbols in found["syms"].items() if symbols}}


def differing(copy: Path) -> list[str]:
    names = sorted({path.name for folder in (copy, ROOT) for path in (folder / "gausssafe").glob("*.py")} - {"_modidx.py"})
    return [name for name in names if not all((folder / "gausssafe" / name).exists() for folder in (copy, ROOT))
            or not filecmp.cmp(copy / "gausssafe" / name, ROOT / "gausssafe" / name, shallow=False)] + ["_modidx.py"] * (index(copy) != index(ROOT))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "gausssafe-copy"
        shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".venv*", ".git", "_proc", "_docs", "demo", "settings.ini"))
        for path in (copy / "gausssafe").glob("*.py"):
            if path.name != "__init__.py": path.unlink()
        subprocess.run([ROOT / ".venv-nbdev3/bin/nbdev-export"], cwd=copy, check=True)
        if names := differing(copy): sys.exit(f"nbdev 3 exports these differently: {', '.join(names)}")
    print("nbdev 3 exports the same modules")
