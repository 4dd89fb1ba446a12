"Write README.md from nbs/index.ipynb, or with --check say whether it is current"
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent


def readme() -> str:
    notebook = nbformat.read(ROOT / "nbs/index.ipynb", as_version=4)
    notebook.cells = [cell for cell in notebook.cells if not cell.source.startswith("#| hide")]
    notebook.metadata["language_info"] = {"name": "python"}
    body, _ = MarkdownExporter().from_notebook_node(notebook)
    body = re.sub(r"\n{3,}", "\n\n", body)
    lines = ["<!-- Written from nbs/index.ipynb by `make readme`: edit there. -->", "", *map(str.rstrip, body.strip().splitlines())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    path = ROOT / "README.md"
    if "--check" not in sys.argv: path.write_text(readme(), encoding="utf-8")
    elif path.read_text(encoding="utf-8") != readme(): sys.exit("README.md is not what nbs/index.ipynb says: run `make readme`")
