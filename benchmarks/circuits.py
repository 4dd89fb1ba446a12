"""Circuits: peers and us in turn, in one run, forward + backward, fresh latents and moved weights at every timed call.

    python benchmarks/circuits.py [--quick] [--out benchmarks/results]

Peers that are not installed are named and skipped. Values and gradients are compared with default.qubit (float64) in the
same run wherever it can hold the circuit. One thread; medians. Memory is the rise of the peak resident size in a process
of its own. JAX peers are called with NumPy latents and their results are waited for; their compilation is not counted.
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import numpy as np
import pennylane as qml
import torch

from gausssafe.circuits import compile_circuit

CASES = [  # name, circuit, qubits, layers, batch, group
    ("n=4 L=2 B=16", "reports", 4, 2, 16, "shallow"),
    ("n=6 L=2 B=256", "reports", 6, 2, 256, "shallow"),
    ("n=6 L=3 B=256", "reports", 6, 3, 256, "shallow"),
    ("n=10 L=3 B=256", "reports", 10, 3, 256, "shallow"),
    ("n=12 L=2 B=256", "reports", 12, 2, 256, "shallow"),
    ("n=20 L=2 B=4096", "reports", 20, 2, 4096, "shallow"),
    ("n=10 L=6 B=256", "reports", 10, 6, 256, "deep"),
    ("n=8 L=4 B=256 distinct", "distinct", 8, 4, 256, "distinct inputs"),
    ("n=10 L=4 B=256 distinct", "distinct", 10, 4, 256, "distinct inputs"),
    ("n=8 L=4 B=256 re-uploaded", "uploads", 8, 4, 256, "distinct inputs"),
]
TOO_LARGE = {"broadcasting": 12, "jax": 12, "tensorcircuit": 16}  # qubits past which a peer is not run


def reports(x, w, g):
    n = (len(w[0]) + 1) // 2
    for q in range(n):
        g.ry(q, g.arcsin(x[..., 0]))
        g.rz(q, g.arcsin(x[..., 1]))
    for layer in w:
        for q in range(n):
            g.ry(q, layer[q])
        for q in range(n - 1):
            g.cnot(q, q + 1)
            g.rz(q + 1, layer[n + q])
            g.cnot(q, q + 1)


def entangling(layer, n, g):
    for q in range(n):
        g.rz(q, layer[q, 0])
        g.ry(q, layer[q, 1])
        g.rz(q, layer[q, 2])
    for q in range(n):
        g.cnot(q, (q + 1) % n)


def distinct(x, w, g):
    n = len(w[0])
    for q in range(n):
        g.ry(q, x[..., q])
    for layer in w:
        entangling(layer, n, g)


def uploads(x, w, g):
    n = len(w[0])
    for layer in w:
        for q in range(n):
            g.ry(q, x[..., q])
        entangling(layer, n, g)


CIRCUITS = {"reports": reports, "distinct": distinct, "uploads": uploads}


def shapes(kind, n, layers):
    return ((2,), (layers, 2 * n - 1)) if kind == "reports" else ((n,), (layers, n, 3))


class PennyLaneGates:
    def __init__(self, numpy):
        self.arcsin = numpy.arcsin

    def ry(self, q, a):
        qml.RY(a, wires=q)

    def rz(self, q, a):
        qml.RZ(a, wires=q)

    def cnot(self, a, b):
        qml.CNOT([a, b])


class TensorCircuitGates:
    def __init__(self, circuit, numpy):
        self.c, self.arcsin = circuit, numpy.arcsin

    def ry(self, q, a):
        self.c.ry(q, theta=a)

    def rz(self, q, a):
        self.c.rz(q, theta=a)

    def cnot(self, a, b):
        self.c.cnot(a, b)


def torch_step(run):
    "(x, w) -> (values, gradient to w), from a differentiable torch function"

    def step(x, w):
        w = torch.from_numpy(w).requires_grad_()
        y = run(torch.from_numpy(x), w)
        y.sum().backward()
        return y.detach(), w.grad

    return step


def ours(kind, n, layers):
    data, weights = shapes(kind, n, layers)

    def circuit(inputs, w):
        CIRCUITS[kind](inputs, w, PennyLaneGates(torch))
        return [qml.expval(qml.PauliZ(q)) for q in range(n)]

    plan = compile_circuit(circuit, {"inputs": data, "w": weights})
    step = torch_step(lambda x, w: plan(inputs=x, w=w))
    step.engine = plan.engine
    return step


def broadcasting(kind, n, layers):
    @qml.qnode(qml.device("default.qubit", wires=n), diff_method="backprop")
    def circuit(x, w):
        CIRCUITS[kind](x, w, PennyLaneGates(torch))
        return [qml.expval(qml.PauliZ(q)) for q in range(n)]

    return torch_step(lambda x, w: torch.stack(circuit(x, w), -1))


def jax_step(one):
    import jax

    value = jax.jit(lambda x, w: (lambda y: (y.sum(), y))(jax.vmap(one, (0, None))(x, w)))
    both = jax.jit(jax.value_and_grad(lambda w, x: value(x, w), has_aux=True))

    def step(x, w):
        (_, y), g = both(w, x)
        return np.asarray(y), np.asarray(g)

    return step


def jax(kind, n, layers):
    import jax.numpy as jnp

    @qml.qnode(qml.device("default.qubit", wires=n), diff_method="backprop", interface="jax")
    def circuit(x, w):
        CIRCUITS[kind](x, w, PennyLaneGates(jnp))
        return [qml.expval(qml.PauliZ(q)) for q in range(n)]

    return jax_step(lambda x, w: jnp.stack(circuit(x, w)))


def tensorcircuit(kind, n, layers):
    import jax.numpy as jnp
    import tensorcircuit as tc

    tc.set_backend("jax")

    def one(x, w):
        c = tc.Circuit(n)
        CIRCUITS[kind](x, w, TensorCircuitGates(c, jnp))
        return jnp.stack([jnp.real(c.expectation_ps(z=[q])) for q in range(n)])

    return jax_step(one)


NEEDS = {"ours": ("gausssafe",), "broadcasting": ("pennylane",), "jax": ("jax",), "tensorcircuit": ("jax", "tensorcircuit")}
PEERS = {"ours": ours, "broadcasting": broadcasting, "jax": jax, "tensorcircuit": tensorcircuit}


def missing(peer):
    return [need for need in NEEDS[peer] if importlib.util.find_spec(need) is None]


def draws(kind, n, layers, batch, dtype=np.float32, seed=0):
    g = np.random.default_rng(seed)
    data, weights = shapes(kind, n, layers)
    while True:
        yield (g.random((batch, *data)) * 2 - 1).astype(dtype), ((g.random(weights) * 2 - 1) * np.pi).astype(dtype)


def timed(steps, inputs, budget_s):
    "Median ms of each step, the steps taking turns"
    for step in steps.values():
        step(*next(inputs))
    times, end = {name: [] for name in steps}, time.perf_counter() + budget_s
    while time.perf_counter() < end or min(map(len, times.values())) < 3:
        for name, step in steps.items():
            x, w = next(inputs)
            spent = time.perf_counter()
            for _ in range(20):  # quick ones several times a turn
                start = time.perf_counter()
                step(x, w)
                times[name].append(time.perf_counter() - start)
                x, w = next(inputs)
                if time.perf_counter() - spent > 0.02:
                    break
    return {name: 1e3 * float(np.median(found)) for name, found in times.items()}


def checked(steps, kind, n, layers):
    "Largest errors of value and gradient (relative in norm) against default.qubit in float64, on 8 samples"
    x, w = next(draws(kind, n, layers, 8, np.float64, seed=1))
    if n > 12:
        return {}
    y, g = (np.asarray(v) for v in broadcasting(kind, n, layers)(x, w))
    found = {}
    for name, step in steps.items():
        a, b = (np.asarray(v) for v in step(x.astype(np.float32), w.astype(np.float32)))
        found[name] = {"value": float(np.abs(a - y).max()), "gradient": float(np.linalg.norm(b - g) / np.linalg.norm(g))}
    return found


def rise_bytes(peer, kind, n, layers, batch):
    "Rise of the peak resident size of two steps, in a fresh process that has run one of two samples"
    command = [sys.executable, __file__, "--memory", json.dumps([peer, kind, n, layers, batch])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


def measure_memory(peer, kind, n, layers, batch):
    step = PEERS[peer](kind, n, layers)
    step(*next(draws(kind, n, layers, 2)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        step(*next(draws(kind, n, layers, batch)))
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def run_case(case, quick):
    name, kind, n, layers, batch, group = case
    steps, left_out = {}, {}
    for peer, make in PEERS.items():
        if missing(peer):
            left_out[peer] = "not installed: " + ", ".join(missing(peer))
            continue
        if n > TOO_LARGE.get(peer, 99):
            left_out[peer] = "too large"
            continue
        try:
            steps[peer] = make(kind, n, layers)
            steps[peer](*next(draws(kind, n, layers, batch)))
        except Exception as error:
            left_out[peer] = f"{type(error).__name__}: {error}"[:200]
            steps.pop(peer, None)
    row = {
        "case": name,
        "group": group,
        "engine": steps["ours"].engine,
        "ms": timed(steps, draws(kind, n, layers, batch), 1.5 if quick else 10),
        "errors": checked(steps, kind, n, layers),
        "left_out": left_out,
    }
    if not quick:
        row["rise_bytes"] = {peer: rise_bytes(peer, kind, n, layers, batch) for peer in steps}
    return row


def machine():
    return {
        "platform": platform.platform(),
        "processor": platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "torch": torch.__version__,
        "pennylane": qml.__version__,
        "python": platform.python_version(),
    }


def table(rows):
    lines = [
        "| case | engine | " + " | ".join(f"{p}, ms" for p in PEERS) + " | best peer / ours | value error | gradient error |",
        "|" + "---|" * (len(PEERS) + 5),
    ]
    for r in rows:
        peers = [t for p, t in r["ms"].items() if p != "ours"]
        ratio = f"{min(peers) / r['ms']['ours']:.1f}x" if peers else "-"
        error = r["errors"].get("ours", {})
        cells = [f"{r['ms'][p]:.3f}" if p in r["ms"] else "-" for p in PEERS]
        lines.append(
            f"| {r['case']} | {r['engine']} | "
            + " | ".join(cells)
            + f" | {ratio} | {error.get('value', float('nan')):.1e} | {error.get('gradient', float('nan')):.1e} |"
        )
    return "\n".join(lines)


def figure(rows, path):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    colours = dict(zip(PEERS, ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=True))
    fig, ax = plt.subplots(figsize=(9, 4.5))
    for peer, colour in colours.items():
        at = [i for i, r in enumerate(rows) if peer in r["ms"]]
        ax.semilogy(at, [rows[i]["ms"][peer] for i in at], "o" if peer == "ours" else "s", color=colour, label=peer)
    ax.set_xticks(range(len(rows)), [r["case"] for r in rows], rotation=35, ha="right")
    ax.set(ylabel="ms a step, forward and backward", title="One thread, medians")
    ax.legend()
    fig.tight_layout()
    fig.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--memory")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        measure_memory(*json.loads(options.memory))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for case in CASES:
        rows.append(run_case(case, options.quick))
        print(table(rows[-1:]).splitlines()[-1], rows[-1]["left_out"], flush=True)
        (options.out / "circuits.json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))
    (options.out / "circuits.md").write_text(table(rows) + "\n")
    figure(rows, options.out / "circuits.png")
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
