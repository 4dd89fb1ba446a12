"""Circuits: peers and us in turn, in one run, forward + backward, fresh latents and moved weights at every timed call.

    python benchmarks/circuits.py [--quick] [--only steps,memory,largest,training] [--cases distinct,n=10] [--out benchmarks/results]

- steps: time of a step. Values and gradients of everybody are compared with default.qubit (float64) in the same run, wherever it can
  hold the circuit. Shallow rows, deep ones (L >= 6) and rows with distinct inputs are apart, and the engine of ours is named.
- memory: rise of the peak resident size above a step with two samples, in a fresh process, against the number of qubits.
- largest: the largest n of which a step is done within 1 GB for the process tree (`gausssafe`'s own guard) and two minutes.
- training: a round of the GAN on quantum noise against one on classical noise; shadow noise against PennyLane's shadows.

One core (the process is pinned to it), one thread, medians; each turn begins with a call that is not timed, unless calls take seconds. JAX
peers are compiled beforehand, and their results are waited for; expectations are read from probabilities, which is faster for them than asking
for each observable. Peers that are not installed are named.
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

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import numpy as np
import pennylane as qml
import torch

from gausssafe.circuits import compile_circuit
from gausssafe.guard import high_water_bytes

CASES = [  # name, circuit, qubits, layers, batch, group
    ("n=4 L=2 B=16", "reports", 4, 2, 16, "shallow"),
    ("n=6 L=2 B=256", "reports", 6, 2, 256, "shallow"),
    ("n=6 L=3 B=256", "reports", 6, 3, 256, "shallow"),
    ("n=10 L=3 B=256", "reports", 10, 3, 256, "shallow"),
    ("n=12 L=2 B=256", "reports", 12, 2, 256, "shallow"),
    ("n=20 L=2 B=4096", "reports", 20, 2, 4096, "shallow"),
    ("n=10 L=6 B=256", "reports", 10, 6, 256, "deep"),
    ("n=8 L=4 B=256", "distinct", 8, 4, 256, "distinct inputs"),
    ("n=10 L=4 B=256", "distinct", 10, 4, 256, "distinct inputs"),
    ("n=12 L=4 B=256", "distinct", 12, 4, 256, "distinct inputs"),
    ("n=14 L=4 B=64", "distinct", 14, 4, 64, "distinct inputs"),
    ("n=8 L=4 B=256", "uploads", 8, 4, 256, "re-uploaded inputs"),
    ("n=10 L=4 B=256", "uploads", 10, 4, 256, "re-uploaded inputs"),
]
# Qubits past which a step, or compiling it, takes minutes
TOO_LARGE = {"loop": 6, "broadcasting": 14, "device": 14, "pyqtorch": 14, "jax": 8, "tensorcircuit": 14}
MOST_BYTES = 12 * 10**9  # Of a peer, where its memory is measured
COLOURS = {"ours": "#0072B2", "device": "#56B4E9", "loop": "#999999", "broadcasting": "#D55E00", "pyqtorch": "#E69F00", "jax": "#009E73",
           "tensorcircuit": "#CC79A7"}
TITLES = {"ours": "ours", "device": "ours, as a PennyLane device", "loop": "PennyLane loop", "broadcasting": "PennyLane broadcasting",
          "pyqtorch": "pyqtorch", "jax": "PennyLane-JAX", "tensorcircuit": "TensorCircuit-NG"}


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


class PyqtorchGates:
    "Collects operations, and the values of their parameters"

    def __init__(self):
        import pyqtorch

        self.pyq, self.ops, self.values, self.arcsin = pyqtorch, [], {}, torch.arcsin

    def _turn(self, gate, q, a):
        name = f"p{len(self.values)}"
        self.values[name] = a
        self.ops.append(gate(q, name))

    def ry(self, q, a):
        self._turn(self.pyq.RY, q, a)

    def rz(self, q, a):
        self._turn(self.pyq.RZ, q, a)

    def cnot(self, a, b):
        self.ops.append(self.pyq.CNOT(a, b))


def from_probabilities(p, n, stack):
    "<Z_q> of all qubits from probabilities (2,) * n + rest"
    found = []
    for q in range(n):
        z = p.sum(tuple(a for a in range(n) if a != q))
        found.append(z[0] - z[1])
    return stack(found, -1)


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


def qnode(kind, n, numpy, device="default.qubit", **options):
    @qml.qnode(qml.device(device, wires=n), **options)
    def circuit(x, w):
        CIRCUITS[kind](x, w, PennyLaneGates(numpy))
        return [qml.expval(qml.PauliZ(q)) for q in range(n)]

    return circuit


def device(kind, n, layers):
    circuit = qnode(kind, n, torch, "gausssafe.qubit")
    return torch_step(lambda x, w: torch.stack(circuit(x, w), -1))


def loop(kind, n, layers):
    circuit = qnode(kind, n, torch, diff_method="backprop")
    return torch_step(lambda x, w: torch.stack([torch.stack(circuit(row, w)) for row in x]))


def broadcasting(kind, n, layers):
    circuit = qnode(kind, n, torch, diff_method="backprop")
    return torch_step(lambda x, w: torch.stack(circuit(x, w), -1))


def pyqtorch(kind, n, layers):
    import pyqtorch as pyq

    def run(x, w):
        gates = PyqtorchGates()
        CIRCUITS[kind](x, w, gates)
        if not made:
            made.append(pyq.QuantumCircuit(n, gates.ops).to(torch.complex64))
        state = made[0](state=pyq.zero_state(n, dtype=torch.complex64), values=gates.values)
        return from_probabilities(state.abs().square(), n, torch.stack)

    made = []
    return torch_step(run)


def jax_step(one):
    import jax

    def loss(w, x):
        y = jax.vmap(one, (0, None))(x, w)
        return y.sum(), y

    both = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def step(x, w):
        (_, y), g = both(w, x)
        return np.asarray(y), np.asarray(g)

    return step


def jax(kind, n, layers):
    import jax.numpy as jnp

    circuit = qnode(kind, n, jnp, diff_method="backprop", interface="jax")
    return jax_step(lambda x, w: jnp.stack(circuit(x, w)))


def tensorcircuit(kind, n, layers):
    import jax.numpy as jnp
    import tensorcircuit as tc

    tc.set_backend("jax")

    def one(x, w):
        c = tc.Circuit(n)
        CIRCUITS[kind](x, w, TensorCircuitGates(c, jnp))
        return from_probabilities((jnp.abs(c.state()) ** 2).reshape((2,) * n), n, jnp.stack)

    return jax_step(one)


PEERS = {f.__name__: f for f in (ours, device, loop, broadcasting, pyqtorch, jax, tensorcircuit)}
NEEDS = {"jax": ["jax"], "tensorcircuit": ["jax", "tensorcircuit"], "pyqtorch": ["pyqtorch"]}


def missing(peer):
    return [need for need in NEEDS.get(peer, []) if importlib.util.find_spec(need) is None]


def draws(kind, n, layers, batch, dtype=np.float32, seed=0):
    g = np.random.default_rng(seed)
    data, weights = shapes(kind, n, layers)
    while True:
        yield (g.random((batch, *data)) * 2 - 1).astype(dtype), ((g.random(weights) * 2 - 1) * np.pi).astype(dtype)


def timed(steps, inputs, budget_s):
    "Median ms of each step, the steps taking turns"
    times, end = {name: [] for name in steps}, time.perf_counter() + budget_s
    while time.perf_counter() < end or min(map(len, times.values())) < 3:
        for name, step in steps.items():
            if times[name] and times[name][-1] < 1: step(*next(inputs))  # after its neighbour, everybody finds cold caches; a training does not
            spent = time.perf_counter()
            for _ in range(20):  # quick ones several times a turn
                arguments = next(inputs)
                start = time.perf_counter()
                step(*arguments)
                times[name].append(time.perf_counter() - start)
                if time.perf_counter() - spent > 0.02:
                    break
    return {name: 1e3 * float(np.median(found)) for name, found in times.items()}


def checked(steps, kind, n, layers):
    "Largest errors of value and gradient (relative in norm) against default.qubit in float64, on 8 samples; of values alone, on 2, past 14 qubits"
    large = n > 14
    x, w = next(draws(kind, n, layers, 2 if large else 8, np.float64, seed=1))
    if large:
        circuit = qnode(kind, n, torch, diff_method=None)
        y = torch.stack([torch.stack(circuit(torch.from_numpy(row), torch.from_numpy(w))) for row in x]).numpy()
    else:
        y, g = (np.asarray(v) for v in broadcasting(kind, n, layers)(x, w))
    found = {}
    for name, step in steps.items():
        a, b = (np.asarray(v) for v in step(x.astype(np.float32), w.astype(np.float32)))
        found[name] = {"value": float(np.abs(a - y).max())}
        if not large:
            found[name]["gradient"] = float(np.linalg.norm(b - g) / np.linalg.norm(g))
    return found


def run_case(case, quick):
    name, kind, n, layers, batch, group = case
    steps, left_out, compile_s = {}, {}, {}
    for peer, make in PEERS.items():
        if missing(peer) or n > TOO_LARGE.get(peer, 99) or (peer == "loop" and (quick or batch * n > 256 * 6)):
            left_out[peer] = "not installed" if missing(peer) else "too slow here"
            continue
        start = time.perf_counter()
        try:
            steps[peer] = make(kind, n, layers)
            steps[peer](*next(draws(kind, n, layers, batch)))
        except Exception as error:
            left_out[peer] = f"{type(error).__name__}: {error}"[:200]
            steps.pop(peer, None)
        compile_s[peer] = round(time.perf_counter() - start, 2)
    ms = timed(steps, draws(kind, n, layers, batch), 1.5 if quick else 6)
    errors = checked(steps, kind, n, layers)
    return {"case": name, "group": group, "engine": steps["ours"].engine, "ms": ms, "errors": errors, "first_call_s": compile_s, "left_out": left_out}


def table(rows):
    lines = [
        "| " + " | ".join(["circuit", "case", "engine", *TITLES.values(), "over broadcasting", "over TC-NG", "value error", "gradient error"]) + " |",
        "|" + "---|" * (len(PEERS) + 7),
    ]
    for r in rows:
        ms, error = r["ms"], r["errors"].get("ours", {})
        ratios = [f"{ms[p] / ms['ours']:.0f}x" if p in ms else "-" for p in ("broadcasting", "tensorcircuit")]
        cells = [f"{ms[p]:.3g}" if p in ms else "-" for p in PEERS]
        errors = [f"{error[k]:.1e}" if k in error else "-" for k in ("value", "gradient")]
        lines.append("| " + " | ".join([r["group"], r["case"], r["engine"], *cells, *ratios, *errors]) + " |")
    return "\n".join(lines)


def steps_part(options, before):
    "Rows of all cases; those that are not asked for stay as they were"
    rows = {(row["group"], row["case"]): row for row in before}
    for case in CASES:
        key = case[-1], case[0]
        if options.cases and not any(part in " ".join(key) for part in options.cases.split(",")): continue
        rows[key] = run_case(case, options.quick) | {"load": os.getloadavg()[0]}
        print(table([rows[key]]).splitlines()[-1], {p: why for p, why in rows[key]["left_out"].items() if ":" in why} or "", flush=True)
        yield [rows[case[-1], case[0]] for case in CASES if (case[-1], case[0]) in rows]


def rise_bytes(peer, kind, n, layers, batch):
    "Rise of the peak resident size of two steps, in a fresh process that has run one of two samples; None if it takes over three minutes"
    command = [sys.executable, __file__, "--step", json.dumps([peer, kind, n, layers, batch])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=os.environ)
    except subprocess.TimeoutExpired:
        return None
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


def peak_bytes():
    "Of this very program: getrusage would remember the peak of whoever started it"
    return high_water_bytes(os.getpid())


def one_step(peer, kind, n, layers, batch):
    "In a process of its own, which ends rather than take the machine down: prints the rise of the peak"
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
    step = PEERS[peer](kind, n, layers)
    step(*next(draws(kind, n, layers, 2)))
    before = peak_bytes()
    for _ in range(2):
        step(*next(draws(kind, n, layers, batch)))
    print(peak_bytes() - before)


def over_qubits(options, measure):
    "{peer: {n: measure(peer, n)}}, until a peer gives up"
    found = {}
    for peer in PEERS:
        if missing(peer) or peer == "loop":
            continue
        found[peer] = {}
        for n in (4, 8, 12) if options.quick else (4, 6, 8, 10, 12, 14, 16, 18, 20):
            value = measure(peer, n)
            if value is None:
                break
            found[peer][n] = value
        print(TITLES[peer], found[peer], flush=True)
    return found


def memory_part(options, _):
    yield over_qubits(options, lambda peer, n: rise_bytes(peer, "reports", n, 2, 256))


def largest_part(options, _):
    "Distinct inputs, L = 4, B = 256: no shallow-circuit trick applies"
    from gausssafe.guard import run_guarded

    found = {}
    for peer in PEERS:
        if missing(peer) or peer in ("loop", "device"):
            continue
        for n in range(8, 21, 2):
            command = [sys.executable, __file__, "--step", json.dumps([peer, "distinct", n, 4, 256])]
            status = run_guarded(command, memory_limit="1GB", timeout_s=120)
            done = status["reason"] == "exited" and status["exit_code"] == 0
            why = f"{status['reason']} at n = {n}" + ("" if status["reason"] != "exited" else f", exit {status['exit_code']}")
            found[peer] = {"n": n if done else found.get(peer, {}).get("n"), "stopped_by": None if done else why}
            if not done:
                break
        print(TITLES[peer], found[peer], flush=True)
        yield found


def training_part(options, _):
    "Medians, in turn: rounds of the GAN, draws of shadow noise"
    from gausssafe import wgan
    from gausssafe.noise import QuantumShadowNoise

    rounds = {}
    for noise in ("quantum", "normal", "shadow"):
        training = wgan._Training(wgan.WGANConfig(noise=noise, z_dim=6, seed=1))
        rounds[noise] = lambda _, training=training: training.round()
    shadow = QuantumShadowNoise(6, 2, 3, 100)
    rounds["shadow noise alone"] = lambda _: shadow(256).sum().backward()
    times = {name: [] for name in rounds}
    for _ in range(20 if options.quick else 100):
        for name, step in rounds.items():
            start = time.perf_counter()
            step(None)
            times[name].append(time.perf_counter() - start)
    ms = {name: 1e3 * float(np.median(found)) for name, found in times.items()}
    ms["PennyLane shadows alone, forward, one of 256 samples"] = pennylane_shadow_ms()
    ratios = [b / a for a, b in zip(times["normal"], times["quantum"], strict=True)]
    print({name: round(v, 3) for name, v in ms.items()}, f"quantum / classical round: {np.median(ratios):.3f}", flush=True)
    yield {"ms": ms, "quantum_over_classical": float(np.median(ratios))}


def pennylane_shadow_ms():
    @qml.set_shots(100)
    @qml.qnode(qml.device("default.qubit", wires=6), diff_method=None)
    def circuit(x, w):
        reports(x, w, PennyLaneGates(torch))
        return qml.shadow_expval([qml.X(0) @ qml.Y(1), qml.Z(2), qml.Z(3) @ qml.X(4)])

    inputs, times = draws("reports", 6, 2, 1), []
    for _ in range(10):
        x, w = next(inputs)
        start = time.perf_counter()
        circuit(torch.from_numpy(x[0]), torch.from_numpy(w))
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))


def machine():
    return {
        "platform": platform.platform(),
        "processor": next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "torch": torch.__version__,
        "pennylane": qml.__version__,
        "python": platform.python_version(),
    }


def figure(results):
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(11, 4.6), constrained_layout=True)
    rows = [r for r in results.get("steps", []) if r["group"] == "distinct inputs"]
    for peer, colour in COLOURS.items():
        at = [(int(r["case"].split()[0][2:]), r["ms"][peer] / int(r["case"].split("B=")[1]) * 256) for r in rows if peer in r["ms"]]
        if at:
            axes[0].semilogy(*zip(*at, strict=True), "o-" if peer == "ours" else "s--", color=colour, label=TITLES[peer])
        curve = results.get("memory", {}).get(peer)
        if curve:
            axes[1].semilogy([int(n) for n in curve], [max(b, 4096) / 1e6 for b in curve.values()], "o-" if peer == "ours" else "s--", color=colour,
                             label=TITLES[peer])
    axes[0].set(xlabel="qubits", ylabel="ms a step of 256", title="Distinct inputs, four layers")
    axes[1].set(xlabel="qubits", ylabel="MB above a step of two samples", title="The reports' circuit, two layers, batch 256")
    shown = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=3, fontsize="small")
    fig.suptitle("Forward and backward, one core")
    return fig


PARTS = {"steps": steps_part, "memory": memory_part, "largest": largest_part, "training": training_part}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats and fewer qubits")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run")
    parser.add_argument("--cases", help="parts of the names of the steps to measure again; the others stay as they were")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    torch.set_num_threads(1)
    if options.step:
        one_step(*json.loads(options.step))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    saved = options.out / "circuits.json"
    results = json.loads(saved.read_text()) if saved.exists() else {}
    for name in options.only.split(","):
        for found in PARTS[name](options, results.get(name, [])):  # what there is so far, saved each time
            results |= {"machine": machine(), name: found}
            saved.write_text(json.dumps(results, indent=1))
    if "steps" in results:
        (options.out / "circuits.md").write_text(table(results["steps"]) + "\n")
        print("\n" + table(results["steps"]))
    import matplotlib

    matplotlib.use("agg")
    figure(results).savefig(options.out / "circuits.png", dpi=120)


if __name__ == "__main__":
    main()
