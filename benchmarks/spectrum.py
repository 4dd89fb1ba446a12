"""Eigenpairs and traces of Hessians from products alone: how many products an answer costs, on a small GPT and a CNN.

    python benchmarks/spectrum.py [--cases gpt cnn] [--seeds 10] [--out benchmarks/results/spectrum.json]

Eigenpairs: products until all residuals of the top ten are below 1e-3 of their eigenvalues; PyHessian's power iteration, where it can be imported, is
stopped at the same tolerance of its own. Trace: the median over seeds of the relative error at 30 products, against five times as many with
another seed. Both models are trained a little first: at random weights a Hessian has no structure to find. One thread.
"""
import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]


def make_case(name):
    "(model, loss_fn, x, y), trained for a while"
    import torch
    import torch.nn.functional as F
    from hvp import make_case as untrained
    if name == "gpt":
        from gausssafe.language import GPT, Characters, cut_sequences, jargon_file, lm_loss, lm_pairs, train_lm
        text = jargon_file()
        characters = Characters(text)
        sequences = cut_sequences(characters.encode(text), 65)
        model = GPT(len(characters), width=48, n_layers=3)
        train_lm(model, sequences[:500], epochs=6, learning_rate=1e-2)
        return model, lm_loss, *lm_pairs(sequences[1000:1032])[0]
    model, loss_fn, x, _ = untrained("cnn")
    y = torch.nn.functional.avg_pool2d(x[:, :1], 16).flatten(1).argmax(1)  # The brightest quarter: something to learn
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), loss_fn, x, y


def pyhessian_products(model, loss_fn, x, y, k):
    "How many products PyHessian's power iteration takes for k eigenvalues"
    import pyhessian.hessian as ph
    calls, own = [0], ph.hessian_vector_product
    def counted(*arguments):
        calls[0] += 1
        return own(*arguments)
    ph.hessian_vector_product = counted
    try: ph.hessian(model, loss_fn, data=(x, y), cuda=False).eigenvalues(maxIter=200, tol=1e-3, top_n=k)
    finally: ph.hessian_vector_product = own
    return calls[0]


def measure(name, n_seeds):
    "A row"
    from gausssafe.hvp import HessianOperator
    from gausssafe.spectrum import top_eigenpairs, trace
    model, loss_fn, x, y = make_case(name)
    H = HessianOperator(model, loss_fn, list(model.parameters()), [(x, y)], memory_limit="500MB")
    started = time.perf_counter()
    values, _, info = top_eigenpairs(H, k=10, tol=1e-3)
    seconds, residual = time.perf_counter() - started, float((info.residuals / values.abs()).max())
    reference = trace(H, 150, seed=10**6).value
    errors = [abs(trace(H, 30, seed=seed).value / reference - 1) for seed in range(n_seeds)]
    peer = pyhessian_products(model, loss_fn, x, y, 10) if importlib.util.find_spec("pyhessian") else None
    return {"case": name, "d": H.shape[0], "n_products": info.n_products, "n_restarts": info.n_restarts, "residual": residual, "seconds": seconds,
            "pyhessian_products": peer, "largest": float(values[0]), "tenth": float(values[-1]), "trace": reference,
            "trace_error_median": statistics.median(errors), "trace_error_largest": max(errors), "n_seeds": n_seeds}


def table(rows):
    "Markdown"
    lines = ["| case | d | top ten: products | residual | PyHessian | trace at 30 products: median off by | most |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        peer = "-" if row["pyhessian_products"] is None else row["pyhessian_products"]
        lines.append(f"| {row['case']} | {row['d']:,} | {row['n_products']} | {row['residual']:.1e} | {peer} | {row['trace_error_median']:.2%} "
                     f"| {row['trace_error_largest']:.2%} |")
    return "\n".join(lines)


def main():
    "Command line"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["gpt", "cnn"], choices=["gpt", "cnn"])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/spectrum.json"))
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    from hvp import machine
    torch.set_num_threads(1)
    rows = [measure(case, arguments.seeds) for case in arguments.cases]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__": main()
