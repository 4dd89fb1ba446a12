"Encodings on some or all qubits, then anything: every engine that takes the circuit against the states, values and gradients"

import pennylane as qml
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gausssafe.circuits import compile_circuit

AFTER1, AFTER2 = [qml.RX, qml.RY, qml.RZ, qml.PhaseShift], [qml.CRX, qml.CRY, qml.CRZ, qml.IsingXX, qml.IsingZZ, qml.ControlledPhaseShift]
MEASURED = {
    "z": lambda n: [qml.expval(qml.Z(i)) for i in range(n)],
    "words": lambda n: [qml.expval(qml.X(0) @ qml.Y(n - 1)), qml.expval(0.3 * qml.Y(0) - qml.Z(n - 1) @ qml.X(0) + 0.2 * qml.Identity(0))],
    "probs": lambda n: [qml.probs(wires=[n - 1, 0]), qml.expval(qml.Y(0))],
}


@st.composite
def encoded(draw):
    "(qubits, turns of the groups, gates between, gates after, what is measured)"
    n = draw(st.integers(2, 5))
    angle = st.tuples(st.sampled_from(["input", "latent", "weight", "number"]), st.integers(0, 2))
    turn = st.tuples(st.sampled_from([qml.RX, qml.RY, qml.RZ, qml.PhaseShift]), angle)
    group = st.tuples(st.sets(st.integers(0, n - 1), min_size=1), st.lists(turn, min_size=1, max_size=3))
    groups = draw(st.lists(group, min_size=1, max_size=2))
    pair = st.permutations(range(n)).map(lambda wires: wires[:2])
    between = draw(st.lists(st.tuples(st.sampled_from([qml.CNOT, qml.SWAP]), pair), max_size=1))
    after = draw(st.lists(st.tuples(st.sampled_from(AFTER1 + AFTER2), pair, st.integers(0, 2)), max_size=8))
    return n, groups, between, after, draw(st.sampled_from(sorted(MEASURED)))


def built(program):
    n, groups, between, after, measured = program

    def circuit(inputs, w):
        angles = {"input": lambda i: inputs[i], "latent": lambda i: torch.arcsin(inputs[i]), "weight": lambda i: w[i], "number": lambda i: 0.4 + i}
        for wires, turns in groups:
            for wire in sorted(wires):
                for gate, (kind, i) in turns: gate(angles[kind](i), wires=wire)
            for gate, wires2 in between: gate(wires=wires2)
        for gate, wires2, i in after: gate(w[i], wires=wires2[: 1 if gate in AFTER1 else 2])
        return MEASURED[measured](n)

    return circuit


def run(plan, x, w):
    "Values and gradients, the way back taken twice"
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = plan(inputs=x, w=w)
    cotangent = torch.linspace(-1, 1.3, y.numel(), dtype=torch.float64).reshape(y.shape).to(y)
    (gx, gw), (hx, hw) = (torch.autograd.grad(y, (x, w), cotangent, retain_graph=True) for _ in range(2))
    assert torch.equal(gx, hx) and torch.equal(gw, hw)
    return y.detach(), gx, gw


def agrees(program, batch):
    shapes, g = {"inputs": (3,), "w": (3,)}, torch.Generator().manual_seed(batch)
    x, w = torch.rand(batch, 3, generator=g, dtype=torch.float64) * 1.8 - 0.9, torch.rand(3, generator=g, dtype=torch.float64) * 6 - 3
    expected = run(compile_circuit(built(program), shapes, engine="statevector"), x, w)
    for engine in ("symmetric", "heisenberg"):
        try: plan = compile_circuit(built(program), shapes, engine=engine)
        except ValueError: continue
        for a, b in zip(run(plan, x, w), expected, strict=True): assert (a - b).abs().max() <= 1e-12 * max(1, b.abs().max())
        y, *slopes = run(plan, x.float(), w.float())
        assert y.dtype == torch.float32 and (y - expected[0]).abs().max() < 5e-6
        for a, b in zip(slopes, expected[1:], strict=True): assert (a - b).norm() <= 1e-5 * max(batch**0.5, b.norm())  # samples may cancel


any_encoding = given(encoded(), st.sampled_from([1, 2, 7, 255, 256, 257, 600]))


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@any_encoding
def test_random_encodings_agree(program, batch): agrees(program, batch)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@any_encoding
def test_hundreds_of_random_encodings_agree(program, batch): agrees(program, batch)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(encoded(), st.sampled_from([1, 5, 70]))
def test_without_room_for_diagonals_phases_are_passes(program, batch):
    shapes = {"inputs": (3,), "w": (3,)}
    x, w = torch.rand(batch, 3, dtype=torch.float64) * 1.8 - 0.9, torch.rand(3, dtype=torch.float64) * 6 - 3
    whole, lean = (compile_circuit(built(program), shapes, engine="statevector", memory_limit=limit) for limit in ("1GB", 1))
    lean.limit_bytes = 10**7
    assert not lean._engine.program.n_tables
    for a, b in zip(run(lean, x, w), run(whole, x, w), strict=True): assert (a - b).abs().max() <= 1e-12 * max(1, b.abs().max())


def layered(inputs, w):
    for i in range(10): qml.RY(torch.arcsin(inputs[0]), wires=i)
    for row in w:
        for i in range(10): qml.RY(row[i], wires=i)
        for i in range(9): qml.IsingZZ(row[i], wires=[i, i + 1])
    return [qml.expval(qml.Z(i)) for i in range(10)]


def test_auto_takes_an_engine_that_fits_and_depth_costs_no_states():
    plans = [compile_circuit(layered, {"inputs": (1,), "w": (60, 10)}, memory_limit=limit) for limit in ("50MB", "200kB")]
    assert [plan.engine for plan in plans] == ["symmetric", "statevector"]
    x, w = torch.rand(3, 1, dtype=torch.float64), torch.rand(60, 10, dtype=torch.float64)
    for a, b in zip(*(run(plan, x, w) for plan in plans), strict=True): assert (a - b).abs().max() <= 1e-11 * max(1, b.abs().max())
    assert plans[1].estimate_bytes(3, dtype=torch.float64) < 200_000 < plans[0].estimate_bytes(3, dtype=torch.float64)
