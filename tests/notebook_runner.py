"What `nbdev_test` does for one notebook, in a process that was forked with the imports of notebooks done"
import os
import sys
from pathlib import Path

from nbdev.test import nbdev_test


def run():
    "Run the notebook whose path comes on standard input; exits with 1 if it fails"
    os.chdir(Path(__file__).parent.parent)
    nbdev_test(path=sys.stdin.readline().strip(), n_workers=0, do_print=True)
