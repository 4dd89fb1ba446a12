"Plans against default.qubit and against a slow state vector: random gates, wires, templates, data re-uploading, chunks, limits"

import functools
import math
import subprocess
import sys
import threading

import numpy as np
import pennylane as qml
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import circuit_expvals

import gausssafe.circuits as circuits
from gausssafe.circuits import QuantumLayer, compile_circuit
from gausssafe.errors import InvalidInput, MemoryBudgetExceeded, NotFinite

TURNS = [qml.RX, qml.RY, qml.RZ, qml.PhaseShift]
TURNS2 = [qml.CRX, qml.CRY, qml.CRZ, qml.ControlledPhaseShift, qml.IsingXX, qml.IsingYY, qml.IsingZZ, qml.SingleExcitation]
FIXED = [qml.Hadamard, qml.S, qml.T, qml.PauliX, qml.PauliY, qml.PauliZ, qml.SX]
FIXED2 = [qml.CNOT, qml.CZ, qml.CY, qml.SWAP, qml.ISWAP, qml.CH]


@st.composite
def programs(draw):
    "A random circuit as a list of (gate, wires, angle source)"
    n = draw(st.integers(2, 4))
    gates = []
    for _ in range(draw(st.integers(2, 14))):
        kind = draw(st.sampled_from(["turn", "turn", "turn2", "fixed", "fixed2", "many"]))
        wires = draw(st.permutations(range(n)))
        source = draw(st.sampled_from(["w", "w", "inputs", "mixed", "number"]))
        at = draw(st.integers(0, 2))
        pool = {"turn": TURNS, "turn2": TURNS2, "fixed": FIXED, "fixed2": FIXED2, "many": [qml.MultiControlledX]}[kind]
        gates.append((draw(st.sampled_from(pool)), wires, kind, source, at))
    return n, gates, draw(st.sampled_from(["z", "words", "probs", "hermitian"]))


def built(program):
    n, gates, measured = program

    def circuit(inputs, w):
        for gate, wires, kind, source, at in gates:
            angle = {"w": w[at], "inputs": inputs[..., at] * 2 - 1, "mixed": inputs[..., at] * w[0] + 0.3, "number": 0.7}[source]
            if kind == "turn":
                gate(angle, wires=wires[0])
            elif kind == "turn2":
                gate(angle, wires=wires[:2])
            elif kind == "fixed":
                gate(wires=wires[0])
            elif kind == "fixed2":
                gate(wires=wires[:2])
            else:
                gate(wires=wires[:3])
        if measured == "z":
            return [qml.expval(qml.PauliZ(i)) for i in range(n)]
        if measured == "words":
            return [
                qml.expval(qml.PauliX(0) @ qml.PauliY(1)),
                qml.expval(0.5 * qml.PauliZ(0) - 2 * qml.PauliY(1) @ qml.PauliX(0) + 0.1 * qml.Identity(0)),
            ]
        if measured == "probs":
            return [qml.probs(wires=[1, 0]), qml.expval(qml.PauliY(0))]
        return [qml.expval(qml.Hermitian(np.array([[1, 2j], [-2j, 0.5]]), wires=0))]

    return circuit


def slow(circuit, n, x, w):
    node = qml.QNode(circuit, qml.device("default.qubit", wires=n), diff_method="backprop")
    return torch.stack([torch.hstack([torch.as_tensor(r).reshape(-1) for r in node(row, w)]) for row in x])


def both(plan, circuit, n, x, w):
    "((values, gradients) of the plan, the same of default.qubit)"
    cotangent = None
    for run in (lambda a, b: plan(inputs=a, w=b), lambda a, b: slow(circuit, n, a, b)):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = run(a, b)
        cotangent = torch.rand(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1)) if cotangent is None else cotangent
        grads = torch.autograd.grad(y, (a, b), cotangent.to(y.dtype), allow_unused=True) if y.requires_grad else (None, None)
        yield y.detach(), [torch.zeros_like(v) if g is None else g for g, v in zip(grads, (a, b), strict=True)]


def sample(seed, dtype=torch.float64, batch=5):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, generator=g, dtype=dtype), torch.rand(3, generator=g, dtype=dtype) * 6 - 3


def agrees(program, engine, seed):
    circuit, n = built(program), program[0]
    plan = compile_circuit(circuit, {"inputs": (3,), "w": (3,)}, engine=engine)
    (y, grads), (expected, slow_grads) = both(plan, circuit, n, *sample(seed))
    assert (y - expected).abs().max() < 1e-12
    for ours, theirs in zip(grads, slow_grads, strict=True):
        assert (ours - theirs).abs().max() < 1e-12 * max(1, theirs.abs().max())


any_program = given(programs(), st.sampled_from(["auto", "statevector"]), st.integers(0, 99))


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@any_program
def test_random_circuits_agree_with_default_qubit(program, engine, seed):
    agrees(program, engine, seed)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@any_program
def test_hundreds_of_random_circuits_agree_with_default_qubit(program, engine, seed):
    agrees(program, engine, seed)


def templates(inputs, w):
    qml.AngleEmbedding(inputs, wires=range(3), rotation="X")
    qml.StronglyEntanglingLayers(w[:2], wires=range(3))
    qml.AngleEmbedding(inputs * 0.5, wires=range(3), rotation="Z")
    qml.BasicEntanglerLayers(w[2:, :, 0], wires=range(3), rotation=qml.RY)
    return [qml.expval(qml.PauliZ(i)) for i in range(3)]


def deep(inputs, w):
    qml.AngleEmbedding(inputs, wires=range(3))
    qml.StronglyEntanglingLayers(w, wires=range(3))
    return [qml.expval(qml.PauliZ(i)) for i in range(3)]


@pytest.mark.parametrize(("circuit", "depth"), [(templates, 3), (deep, 1), (deep, 12)])
def test_templates_and_reuploading(circuit, depth):
    g = torch.Generator().manual_seed(depth)
    x, w = torch.rand(9, 3, generator=g, dtype=torch.float64), torch.rand(depth, 3, 3, generator=g, dtype=torch.float64) * 6
    plan = compile_circuit(circuit, {"inputs": (3,), "w": (depth, 3, 3)})
    (y, grads), (expected, slow_grads) = both(plan, circuit, 3, x, w)
    assert (y - expected).abs().max() < 1e-12 and all((a - b).abs().max() < 1e-11 for a, b in zip(grads, slow_grads, strict=True))


@pytest.mark.parametrize("engine", ["auto", "statevector"])
def test_single_precision(engine):
    "float32: values 5e-6, gradients 1e-5 relative in norm, against float64"
    g = torch.Generator().manual_seed(5)
    x, w = torch.rand(33, 3, generator=g, dtype=torch.float64), torch.rand(12, 3, 3, generator=g, dtype=torch.float64) * 6
    plan = compile_circuit(deep, {"inputs": (3,), "w": (12, 3, 3)}, engine=engine)
    found = []
    for dtype in (torch.float64, torch.float32):
        a, b = (v.to(dtype).detach().clone().requires_grad_() for v in (x, w))
        y = plan(inputs=a, w=b)
        y.square().sum().backward()
        found.append((y.detach().double(), a.grad.double(), b.grad.double()))
    (y, gx, gw), (y32, gx32, gw32) = found
    assert (y - y32).abs().max() < 5e-6 and (gx - gx32).norm() < 1e-5 * gx.norm() and (gw - gw32).norm() < 1e-5 * gw.norm()


def test_against_an_independent_state_vector():
    gates = [("RY", 0, 0.3), ("RX", 1, -1.1), ("CNOT", (0, 2), None), ("RZ", 2, 0.8), ("RX", 2, 2.0), ("CNOT", (2, 1), None), ("RY", 1, 0.4)]

    def circuit(inputs):
        for name, wires, angle in gates:
            getattr(qml, name)(*([] if angle is None else [angle + 0 * inputs[0]]), wires=wires)
        return [qml.expval(qml.PauliZ(i)) for i in range(3)]

    y = compile_circuit(circuit, {"inputs": (1,)})(inputs=torch.zeros(2, 1, dtype=torch.float64))
    assert np.abs(y[0].numpy() - circuit_expvals(3, gates)).max() < 1e-13


@functools.cache
def limited(limit):
    return compile_circuit(deep, {"inputs": (3,), "w": (4, 3, 3)}, engine="statevector", memory_limit=limit)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.sampled_from([None, 4000, 9000, 50_000]))
def test_chunks_do_not_change_the_answer(batch, limit):
    x, w = torch.rand(batch, 3, dtype=torch.float64), torch.rand(4, 3, 3, dtype=torch.float64, requires_grad=True)
    whole, chunked = limited(None), limited(limit)
    try:
        y = chunked(inputs=x, w=w)
    except MemoryBudgetExceeded as refused:
        assert refused.needed_bytes > limit and "batch_size <=" in str(refused)
        return
    expected = whole(inputs=x, w=w)
    (gradient,) = torch.autograd.grad(y.square().sum(), w)
    assert torch.allclose(y, expected, atol=1e-13) and torch.allclose(gradient, torch.autograd.grad(expected.square().sum(), w)[0], atol=1e-11)
    if limit:
        assert chunked.estimate_bytes(batch, dtype=torch.float64) <= limit


def test_gradients_twice_and_threads():
    x, w = torch.rand(20, 3), torch.rand(4, 3, 3, requires_grad=True)
    plan = compile_circuit(deep, {"inputs": (3,), "w": (4, 3, 3)}, engine="statevector")
    y = plan(inputs=x, w=w)
    (first,) = torch.autograd.grad(y.sum(), w, retain_graph=True)
    plan(inputs=torch.rand(20, 3), w=w).sum().backward()
    assert torch.equal(first, torch.autograd.grad(y.sum(), w)[0])
    found = {}

    def work(i):
        found[i] = [plan(inputs=x * i, w=w).detach() for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, ys in found.items():
        assert all(torch.equal(a, plan(inputs=x * i, w=w)) for a in ys)


def test_second_derivative_is_an_error():
    w = torch.rand(1, 3, 3, requires_grad=True)
    plan = compile_circuit(deep, {"inputs": (3,), "w": (1, 3, 3)})
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(plan(inputs=torch.rand(2, 3), w=w).sum(), w, create_graph=True)


def test_the_calls_of_the_manual():
    @qml.qnode(qml.device("default.qubit", wires=4))
    def qnode(inputs, w):
        qml.AngleEmbedding(inputs, wires=range(4))
        qml.StronglyEntanglingLayers(w, wires=range(4))
        return [qml.expval(qml.PauliZ(i)) for i in range(4)]

    layer = QuantumLayer(qnode, {"w": (3, 4, 3)}, memory_limit="200MB")
    x = torch.rand(2, 5, 4, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    stock = qml.qnn.TorchLayer(qnode, {"w": (3, 4, 3)}, init_method={"w": layer.w.detach()})
    assert y.shape == (2, 5, 4) and (y - stock(x)).abs().max() < 5e-6 and x.grad.shape == x.shape and layer.w.grad is not None
    assert (layer(x[0, 0]) - stock(x[0, 0])).abs().max() < 5e-6
    plan = compile_circuit(qnode, {"inputs": (4,), "w": (3, 4, 3)})
    assert torch.equal(plan(inputs=x[0], w=layer.w), layer(x[0])) and plan.engine in plan.explain() and plan.estimate_bytes(batch=4096) > 0


def one(inputs):
    qml.RY(torch.arcsin(inputs[0]), wires=0)
    return qml.expval(qml.PauliZ(0))


def measured_halfway(inputs):
    qml.RX(inputs[0], wires=0)
    qml.measure(0)
    return qml.expval(qml.PauliZ(0))


def noisy(inputs):
    qml.RX(inputs[0], wires=0)
    qml.AmplitudeDamping(0.1, wires=0)
    return qml.expval(qml.PauliZ(0))


@qml.qnode(qml.device("default.qubit", wires=2))
def elsewhere(inputs):
    qml.RX(inputs[0], wires=0)
    return qml.expval(qml.PauliZ(7))


@pytest.mark.parametrize(
    ("circuit", "message"),
    [
        (measured_halfway, "deferred measurement"),
        (noisy, "default.mixed"),
        (elsewhere, "wire 7.*wires \\[0, 1\\]"),
        (lambda inputs: [], "zero qubits"),
        (lambda inputs: (qml.RX(inputs[0], wires=0), qml.var(qml.PauliZ(0)))[1], "not supported: return expval"),
    ],
)
def test_what_cannot_be_compiled(circuit, message):
    with pytest.raises(InvalidInput, match=message):
        compile_circuit(circuit, {"inputs": (1,)})


@pytest.mark.parametrize("engine", ["heisenberg", "statevector"])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.tensor([[0.2], [1.5]]), InvalidInput, r"1 of 2 values of inputs lie outside \[-1, 1\] \(largest magnitude 1.5\)"),
        (torch.tensor([[0.2], [math.nan]]), NotFinite, "inputs: 1 of 2"),
        (torch.zeros(3, 2), InvalidInput, r"shape \(3, 2\); the circuit was compiled for \(batch, 1\)"),
        (torch.zeros(3, 1, dtype=torch.int64), InvalidInput, "float32 or float64"),
    ],
)
def test_bad_arguments(engine, x, error, message):
    with pytest.raises(error, match=message):
        compile_circuit(one, {"inputs": (1,)}, engine=engine)(inputs=x)


def test_bad_weights_and_limits():
    plan = compile_circuit(deep, {"inputs": (3,), "w": (1, 3, 3)}, engine="statevector")
    with pytest.raises(NotFinite, match="w: 9 of 9"):
        plan(inputs=torch.rand(2, 3), w=torch.full((1, 3, 3), math.inf))
    with pytest.raises(InvalidInput, match="takes inputs, w; it was given inputs"):
        plan(inputs=torch.rand(2, 3))
    small = compile_circuit(deep, {"inputs": (3,), "w": (1, 3, 3)}, engine="statevector", memory_limit=100)
    with pytest.raises(MemoryBudgetExceeded, match="Even one sample needs"):
        small(inputs=torch.rand(2, 3), w=torch.rand(1, 3, 3))


def test_without_a_limit_what_is_left_of_the_machine_bounds_the_plan(monkeypatch):
    monkeypatch.setattr(circuits, "read_limit", lambda limit: 9000 if limit is None else limit)
    plan = compile_circuit(deep, {"inputs": (3,), "w": (4, 3, 3)}, engine="statevector")
    assert plan.estimate_bytes(8, dtype=torch.float64) <= 9000
    with pytest.raises(MemoryBudgetExceeded, match="batch_size <="):
        plan(inputs=torch.rand(4096, 3), w=torch.rand(4, 3, 3))


def test_importing_does_not_import_pennylane():
    code = "import sys, gausssafe.circuits; assert 'pennylane' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_equal_circuits_share_an_engine():
    plans = [compile_circuit(deep, {"inputs": (3,), "w": (2, 3, 3)}) for _ in range(2)]
    assert plans[0]._engine is plans[1]._engine and len(circuits._engines) >= 1
