__version__ = "0.1.0"


def load_ipython_extension(shell):
    "`%load_ext gausssafe`: the magics `%%memory` and `%memory_limit`"
    from .magics import load_ipython_extension
    load_ipython_extension(shell)
