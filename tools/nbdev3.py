"Export the notebooks under nbdev 3 in a copy of the tree, and compare with gausssafe/"
import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def differing(copy: Path) -> list[str]:
    names = sorted({path.name for folder in (copy, ROOT) for path in (folder / "gausssafe").glob("*.py")})
    return [name for name in names if not all((folder / "gausssafe" / name).exists() for folder in (copy, ROOT))
            or not filecmp.cmp(copy / "gausssafe" / name, ROOT / "gausssafe" / name, shallow=False)]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "gausssafe-copy"
        shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".venv*", ".git", "_proc", "_docs", "demo", "settings.ini"))
        for path in (copy / "gausssafe").glob("*.py"):
            if path.name != "__init__.py": path.unlink()
        subprocess.run([ROOT / ".venv-nbdev3/bin/nbdev-export"], cwd=copy, check=True)
        if names := differing(copy): sys.exit(f"nbdev 3 exports these differently: {', '.join(names)}")
    print("nbdev 3 exports the same modules")
