"Process bytes of a call, way back included, against the limit of its plan: each in a fork of a process that has loaded the kernels"

import ctypes
import gc
import itertools
import json
import os
import subprocess
import sys

import pytest

MB = 10**6
FAST = [
    ("statevector", 10, 1, 1, 16, 0), ("statevector", 10, 12, 5, 4096, 0), ("statevector", 18, 1, 5, 1, 0), ("symmetric", 14, 1, 20, 4096, 0),
    ("symmetric", 10, 12, 5, 65536, 0), ("heisenberg", 14, 1, 20, 65536, 0), ("auto", 18, 1, 5, 4096, 0),
    ("auto", 14, 12, 5, 1, 0), ("auto", 4, 12, 20, 65536, 0), ("probs", 4, 2, 20, 65536, 20), ("auto", 4, 1, 20, 65536, 20),
    ("symmetric", 14, 1, 1, 65536, 20), ("symmetric", 20, 12, 500, 16, 0), ("statevector", 16, 12, 5, 1, 0), ("statevector", 4, 1, 1, 65536, 0),
    ("probs", 4, 1, 1, 65536, 20), ("tangled", 4, 3, 1, 65536, 0), ("tangled", 4, 3, 20, 65536, 20),
    ("two", 4, 3, 1, 65536, 0), ("two", 4, 3, 5, 262144, 20),
]  # (engine, qubits, layers, limit in MB, batch, shots)


def circuit_of(n, kind):
    import pennylane as qml
    import torch

    def circuit(inputs, w, more=()):
        for i in range(n): qml.RY(torch.arcsin(inputs[0]), i); qml.RZ(inputs[1], i)
        for i in range(len(more)): qml.RX(more[i], i % n); qml.RY(inputs[i], i % n)
        for row in w:
            for i in range(n): qml.RY(row[i] * torch.sin(inputs[0]) if kind == "tangled" else row[i], i)
            for i in range(n - 1): qml.IsingZZ(row[n + i], [i, i + 1])
        return qml.probs(wires=range(min(n, 4))) if kind == "probs" else [qml.expval(qml.Z(i)) for i in range(n)]

    return circuit


def held(key):
    with open("/proc/self/status") as file: return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def rise(engine, n, depth, limit, batch, shots):
    "(bytes beyond inputs, results and their gradients, whether the plan refused)"
    import torch

    from gausssafe.circuits import compile_circuit
    from gausssafe.errors import MemoryBudgetExceeded

    kind, of_samples = engine, {"inputs": (8,), "more": (8,)} if engine == "two" else {"inputs": (2,)}
    shapes = of_samples | {"w": (depth, 2 * n - 1)}
    plan = compile_circuit(circuit_of(n, kind), shapes, per_sample=tuple(of_samples), memory_limit=limit, shots=shots or None,
                           engine="auto" if kind in ("probs", "tangled", "two") else engine)
    given = {name: torch.rand(*(batch,) * (name in of_samples), *shape).requires_grad_() for name, shape in shapes.items()}
    if kind == "tangled": plan._beside_bytes  # noqa: B018, what the graph takes is counted once
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file: file.write("5")
    before, known = held("VmRSS"), 0
    try:
        y = plan(**given)
        y.backward(torch.ones_like(y))
        known = 4 * (2 * y.numel() + sum(t.numel() for t in given.values()))
    except MemoryBudgetExceeded as refused: assert refused.needed_bytes > limit
    return held("VmHWM") - before - known, not known


def forked(case):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, json.dumps(rise(*case[:3], case[3] * MB, *case[4:])).encode())
        os._exit(0)
    os.close(write)
    with open(read) as file: found = file.read()
    os.waitpid(child, 0)
    return json.loads(found)


def main(cases):
    engines = "heisenberg", "symmetric", "statevector"
    for engine, batch, limit in itertools.product(engines, (1, 300), (5000, MB)): rise(engine, 3, 1, limit, batch, 0)
    for kind, batch, shots in itertools.product(("tangled", "two"), (1, 300), (0, 20)): rise(kind, 3, 1, MB, batch, shots)
    for engine, batch in itertools.product(("auto", "probs"), (1, 300)): rise(engine, 3, 1, MB, batch, 20), rise(engine, 4, 12, MB, batch, 20)
    print(json.dumps([forked(case) for case in cases]))


def check(cases):
    code = f"import test_plan_memory; test_plan_memory.main({cases!r})"
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=os.path.dirname(__file__), capture_output=True, text=True)
    assert not found.returncode, found.stderr[-2000:]
    for case, (rose, refused) in zip(cases, json.loads(found.stdout), strict=True):
        limit = case[3] * MB
        assert rose <= (0 if refused else 1.08 * limit) + 4 * MB, f"{case} rose by {rose / MB:.1f} MB"
        yield case, rose, refused


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@linux
def test_process_bytes_stay_within_the_limit():
    found = list(check(FAST))
    assert sum(refused for *_, refused in found) <= 2, found


@linux
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["statevector", "symmetric", "auto", "probs", "tangled", "two"])
@pytest.mark.parametrize("limit", [1, 5, 20, 100, 500])
def test_process_bytes_of_a_wide_grid(engine, limit):
    sizes = [(n, depth, batch) for n in (4, 10, 14, 16, 18, 20) for depth in (1, 12) for batch in (16, 256, 4096, 65536)]
    work = {"statevector": 2**26, "symmetric": 2**31, "auto": 2**31 if limit >= 100 else 2**26}.get(engine, 2**25)  # That there is time for
    cases = [(engine, n, d, limit, b, s) for n, d, b in sizes for s in (0, 20) if 2**n * d * b <= work]
    assert list(check(cases))
