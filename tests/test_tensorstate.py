"States by torch operations, on the device of the tensors: run here on the CPU, against default.qubit and the compiled states"

import pytest
import torch
from circuit_cases import CASES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_circuits import EVERYDAY, LOOSE, any_program, both, built, sample

import gausssafe.circuits as circuits
from gausssafe.circuits import compile_circuit
from gausssafe.errors import InvalidInput, MemoryBudgetExceeded, NotFinite
from gausssafe.memory import count_tensor_bytes


def elsewhere(plan):
    "The plan as it runs where tensors are not on the CPU"
    return lambda **arguments: circuits._on_device(plan, plan._prepared(arguments)[0])


def agrees(circuit, n, shapes, x, w, loose=1e-12):
    plan = compile_circuit(circuit, shapes, engine="statevector")
    (y, grads), (expected, slow_grads) = both(elsewhere(plan), circuit, n, x, w)
    assert (y - expected).abs().max() < loose
    for ours, theirs in zip(grads, slow_grads, strict=True): assert (ours - theirs).abs().max() < loose * max(1, theirs.abs().max())


def case_agrees(name):
    g = torch.Generator().manual_seed(3)
    x, w = torch.rand(3, 4, generator=g, dtype=torch.float64), torch.rand(4, generator=g, dtype=torch.float64) * 4 - 2
    agrees(CASES[name], None, {"inputs": (4,), "w": (4,)}, x, w, LOOSE.get(name, 1e-12))


@pytest.mark.parametrize("name", EVERYDAY)
def test_what_people_write(name): case_agrees(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"sparse"}))
def test_everything_people_write(name): case_agrees(name)


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@any_program
def test_random_circuits_agree_with_default_qubit(program, _, seed):
    agrees(built(program), program[0], {"inputs": (3,), "w": (3,)}, *sample(seed))


def latent(z, w):
    import pennylane as qml
    for q in range(5): qml.RY(torch.arcsin(z[0]), q); qml.RZ(torch.arcsin(z[1]), q)
    for layer in w:
        for q in range(5): qml.RX(layer[q] * z[0], q); qml.CNOT([q, (q + 1) % 5])
    return [qml.expval(qml.Z(q)) for q in range(5)] + [qml.probs(wires=[4, 1]), qml.expval(qml.X(0) @ qml.Y(3))]


def plan_of(limit=None): return compile_circuit(latent, {"z": (2,), "w": (3, 5)}, per_sample=("z",), engine="statevector", memory_limit=limit)


def drawn(batch, dtype=torch.float64):
    g = torch.Generator().manual_seed(batch)
    return [(torch.rand(shape, generator=g, dtype=torch.float64) * 1.9 - 0.95).to(dtype).requires_grad_() for shape in ((batch, 2), (3, 5))]


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 40), st.sampled_from(["70kB", "100kB", "1MB", None]))
def test_chunks_do_not_change_the_answer(batch, limit):
    (z, w), found = drawn(batch), []
    for run in (elsewhere(plan_of(limit)), plan_of()):
        y = run(z=z, w=w)
        cotangent = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
        found.append([y, *torch.autograd.grad(y, (z, w), cotangent, retain_graph=True)])
        for first, again in zip(found[-1][1:], torch.autograd.grad(y, (z, w), cotangent), strict=True): assert torch.equal(first, again)
    for a, b in zip(*found, strict=True): assert (a - b).abs().max() < 1e-12 * max(1, b.abs().max())


@pytest.mark.parametrize("limit", [30_000, 45_000, 64_000])
def test_logical_bytes_stay_within_the_limit(limit):
    (z, w), run = drawn(32, torch.float32), elsewhere(plan_of(limit))
    with count_tensor_bytes() as count: run(z=z, w=w).sum().backward()
    assert 0.6 * limit < count.peak_bytes - 4 * (32 * 10 + 32 * 2 + 15) <= limit  # beyond results and gradients


def test_single_precision():
    z, w = drawn(64, torch.float32)
    y, expected = elsewhere(plan_of())(z=z, w=w), plan_of()(z=z.double(), w=w.double())
    assert y.dtype == torch.float32 and (y - expected).abs().max() < 5e-6
    for ours, theirs in zip(torch.autograd.grad(y.sum(), (z, w)), torch.autograd.grad(expected.sum(), (z, w)), strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm() and ours.dtype == torch.float32


def test_what_bad_input_gets():
    (z, w), run = drawn(4), elsewhere(plan_of())
    for bad, error, text in (
        (torch.full((4, 2), float("nan")), NotFinite, "z: 8 of 8 values are NaN"), (torch.full((4, 2), 1.5), InvalidInput, "lie outside [-1, 1]"),
        (torch.rand(4, 3), InvalidInput, "the circuit was compiled for (batch, 2)"),
    ):
        with pytest.raises(error) as refused: run(z=bad.to(w), w=w)
        assert text in str(refused.value)
    with pytest.raises(MemoryBudgetExceeded, match="Even one sample needs"): elsewhere(plan_of(1000))(z=z, w=w)
    with pytest.raises(RuntimeError, match="no second derivatives"): torch.autograd.grad(run(z=z, w=w).sum(), z, create_graph=True)


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["auto", "statevector"])
def test_tensors_on_a_gpu(engine):
    plan, (z, w) = compile_circuit(latent, {"z": (2,), "w": (3, 5)}, per_sample=("z",), engine=engine, memory_limit="1MB"), drawn(300)
    expected = plan(z=z, w=w)
    z_there, w_there = (t.detach().cuda().requires_grad_() for t in (z, w))
    y = plan(z=z_there, w=w_there)
    assert y.device == z_there.device and (y.cpu() - expected).abs().max() < 1e-12
    for ours, theirs in zip(torch.autograd.grad(y.sum(), (z_there, w_there)), torch.autograd.grad(expected.sum(), (z, w)), strict=True):
        assert ours.device == z_there.device and (ours.cpu() - theirs).abs().max() < 1e-11
