"Plans with shots against exact laws (chi-square on whole outcomes), against default.qubit, across engines, chunks and threads"

import itertools
import math
import threading
import tracemalloc

import numpy as np
import pennylane as qml
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gausssafe.circuits import ExecutionPlan, QuantumLayer, ShotPlan, compile_circuit
from gausssafe.errors import InvalidInput, MemoryBudgetExceeded, NotFinite
from gausssafe.shots import draw_counts, draw_samples, eigen_law, joint_law

SHAPES = {"inputs": (3,), "w": (2, 3, 3)}


def gates(inputs, w):
    qml.AngleEmbedding(inputs, wires=range(3))
    qml.StronglyEntanglingLayers(w, wires=range(3))


def circuit_of(measure):
    def circuit(inputs, w):
        gates(inputs, w)
        return measure()

    return circuit


def arguments(batch=1, dtype=torch.float64, seed=0, same=True):
    g = torch.Generator().manual_seed(seed)
    x, w = torch.rand(1 if same else batch, 3, generator=g, dtype=dtype) * 2, torch.rand(2, 3, 3, generator=g, dtype=dtype) * 6
    return {"inputs": x.expand(batch, 3) if same else x, "w": w}


def state(given):
    @qml.qnode(qml.device("default.qubit", wires=3))
    def circuit(inputs, w):
        gates(inputs, w)
        return qml.state()

    return circuit(given["inputs"][0], given["w"]).numpy()


def looks_like(found, expected, sigmas=4.5):
    "Chi-square within `sigmas` of its mean: a true law fails about once in 10^4 (fixed seeds: never, or always)"
    rare = expected < 10
    f, e = np.append(found[~rare], found[rare].sum()), np.append(expected[~rare], expected[rare].sum())
    f, e = f[e > 1e-9], e[e > 1e-9]
    free = max(1, len(e) - 1)
    assert found.sum() == round(expected.sum())
    return ((f - e) ** 2 / e).sum() < free + sigmas * math.sqrt(2 * free) + sigmas**2


def rotated(vector, letters):
    "Probabilities in the basis of the letters"
    turn = {"X": np.array([[1, 1], [1, -1]]) / math.sqrt(2), "Y": np.array([[1, -1j], [1, 1j]]) / math.sqrt(2), "Z": np.eye(2)}
    matrix = np.eye(1)
    for letter in letters: matrix = np.kron(matrix, turn[letter])
    return np.abs(matrix @ vector) ** 2


@pytest.mark.parametrize("engine", ["auto", "statevector", "heisenberg"])
def test_words_that_share_their_shots_follow_their_joint_law(engine):
    "One-shot outcomes of XII, IYZ, XYZ: all of one group, in the basis XYZ"
    given = arguments(20_000)
    measure = circuit_of(lambda: [qml.expval(qml.X(0)), qml.expval(qml.Y(1) @ qml.Z(2)), qml.expval(qml.X(0) @ qml.Y(1) @ qml.Z(2))])
    y = compile_circuit(measure, SHAPES, shots=1, engine="auto" if engine == "heisenberg" else engine)(**given, seed=1).numpy()
    bits = np.array(list(itertools.product((0, 1), repeat=3)))
    a, b = 1 - 2 * bits[:, 0], 1 - 2 * (bits[:, 1] ^ bits[:, 2])
    p = rotated(state(given), "XYZ")
    law = np.array([p[(a == s) & (b == t)].sum() for s in (1, -1) for t in (1, -1)])
    found = np.array([((y[:, 0] == s) & (y[:, 1] == t)).sum() for s in (1, -1) for t in (1, -1)])
    assert (y[:, 2] == y[:, 0] * y[:, 1]).all() and looks_like(found, 20_000 * law)


def shallow(inputs, w):
    for q in range(3): qml.RY(inputs[q], wires=q)
    for q in range(3): qml.RY(w[0, 0, q], wires=q)
    for q in range(2): qml.IsingZZ(w[0, 1, q], [q, q + 1])


def test_a_shallow_circuit_draws_from_the_law_of_words():
    "The same counts, in law, from expectations (no state) and from bit strings: binomial counts of every pattern"
    def circuit(inputs, w):
        shallow(inputs, w)
        return [qml.expval(qml.Z(0) @ qml.Z(1)), qml.expval(qml.Z(2)), qml.probs(wires=[0])]

    given, found = arguments(20_000), []
    for engine in ("auto", "statevector"):
        plan = compile_circuit(circuit, SHAPES, shots=7, engine=engine)
        y = plan(**given, seed=5).numpy()[:, :2]
        found.append(np.histogram2d(*((y * 7 + 7).T / 2), bins=[np.arange(9) - 0.5] * 2)[0].ravel())
        assert ("law" in plan.explain()) == (engine == "auto")
    joint = (found[0] + found[1]) / 2
    used = joint >= 10
    chi2 = ((found[0] - found[1]) ** 2 / (found[0] + found[1] + 1e-9))[used].sum()
    assert chi2 < used.sum() + 4.5 * math.sqrt(2 * used.sum()) + 20


MEASURED = {
    "groups": lambda: [qml.expval(o) for o in (qml.Z(0), qml.X(1), qml.Z(0) @ qml.Z(1), qml.Y(1) @ qml.Y(2), qml.Z(2))],
    "sums": lambda: [
        qml.expval(0.5 * qml.Z(0) - 2 * qml.X(0) @ qml.Y(1) + 0.7 * qml.Z(2) + 0.1 * qml.I(0)), qml.expval(qml.Z(0)), qml.probs(wires=[2, 0])
    ],
    "matrix": lambda: [qml.expval(qml.Hermitian(np.array([[1, 2j], [-2j, 0.5]]), wires=1)), qml.expval(qml.Projector([0, 1], wires=[0, 2]))],
    "probs": lambda: [qml.probs(wires=[0, 1]), qml.probs(wires=[1, 2])],
}


@pytest.mark.parametrize("name", MEASURED)
def test_means_and_covariances_are_those_of_default_qubit(name):
    "3000 samples of 30 shots from both: every entry within 5.5 standard errors of a difference (about 1 in 10^6 for each)"
    rows, shots, given = 3000, 30, arguments(3000)
    ours = compile_circuit(circuit_of(MEASURED[name]), SHAPES, shots=shots)(**given, seed=2).numpy()

    @qml.set_shots(shots)
    @qml.qnode(qml.device("default.qubit", wires=3, seed=7))
    def node(inputs, w):
        for q in range(3): qml.RX(inputs[:, q], wires=q)
        qml.StronglyEntanglingLayers(w, wires=range(3))
        return MEASURED[name]()

    theirs = np.concatenate([np.asarray(r).reshape(rows, -1) for r in node(given["inputs"].numpy(), given["w"].numpy())], 1)
    exact = compile_circuit(circuit_of(MEASURED[name]), SHAPES)(**{**given, "inputs": given["inputs"][:1]})[0].numpy()
    error = np.sqrt(ours.var(0) / rows) + 1e-12
    assert (np.abs(ours.mean(0) - exact) < 5.5 * error).all()
    found, wanted = np.cov(ours.T), np.cov(theirs.T)
    spread = np.sqrt(2 * (np.outer(wanted.diagonal(), wanted.diagonal()) + wanted**2) / rows)
    assert (np.abs(found - wanted) < 5.5 * spread + 1e-12).all()


@pytest.mark.parametrize("name", [*MEASURED, "shadow", "many"])
def test_the_gradient_is_the_exact_one(name):
    words = [qml.X(0), qml.Y(1) @ qml.Z(2), qml.Z(0), qml.Y(0), qml.X(2), qml.Z(1) @ qml.X(2), qml.Y(2)]
    observables = {"shadow": words[:3], "many": words}.get(name)
    drawn = MEASURED.get(name) or (lambda: qml.shadow_expval(observables))
    exact = MEASURED.get(name) or (lambda: [qml.expval(o) for o in observables])
    given, grads = arguments(5, same=False), []
    for plan in (compile_circuit(circuit_of(drawn), SHAPES, shots=10), compile_circuit(circuit_of(exact), SHAPES)):
        leaves = {k: v.clone().requires_grad_() for k, v in given.items()}
        y = plan(**leaves)
        cotangent = torch.rand(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
        grads.append(torch.autograd.grad(y, list(leaves.values()), cotangent))
    for a, b in zip(*grads, strict=True): assert (a - b).abs().max() < 1e-12
    plan = compile_circuit(circuit_of(drawn), SHAPES, shots=10)
    only_w = {**given, "w": given["w"].clone().requires_grad_()}
    y = plan(**only_w)
    assert (torch.autograd.grad(y, only_w["w"], cotangent)[0] - grads[1][1]).abs().max() < 1e-12


EVERY = lambda: [  # noqa: E731
    qml.expval(qml.X(0)), qml.probs(wires=[2, 0]), qml.sample(wires=[1, 0]), qml.counts(), qml.classical_shadow(wires=[2, 0]),
    qml.shadow_expval([qml.X(0), qml.Z(1)]), qml.expval(qml.Hermitian(np.diag([1.0, 3.0]), wires=2)),
]


def flat(results):
    return [r if isinstance(r, list) else torch.cat([t.reshape(-1).double() for t in (r if isinstance(r, tuple) else (r,))]) for r in results]


def same(a, b): return all(x == y if isinstance(x, list) else torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


@pytest.mark.parametrize("limit", ["18kB", "25kB", "35kB"])
def test_chunks_do_not_change_what_is_drawn(limit):
    given = arguments(50, same=False)
    free, tight = (compile_circuit(circuit_of(EVERY), SHAPES, shots=20, memory_limit=m) for m in (None, limit))
    assert tight.chunk_size < 50 and tight.estimate_bytes(50, dtype=torch.float64) <= int(limit[:-2]) * 1000
    whole = free(**given, seed=3)
    assert same(whole, tight(**given, seed=3)) and not same(whole, free(**given, seed=4))
    first = free(**{**given, "inputs": given["inputs"][:7]}, seed=3)
    assert torch.equal(first[2], whole[2][:7]) and first[3] == whole[3][:7]


def test_threads_and_generators():
    given, plan = arguments(64, same=False), compile_circuit(circuit_of(EVERY), SHAPES, shots=20)
    alone, found = [plan(**given, seed=i) for i in range(4)], {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: [plan(**given, seed=i) for _ in range(3)]})) for i in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert all(same(again, alone[i]) for i in range(4) for again in found[i])
    a, b = (plan(**given, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert same(a, b)
    torch.manual_seed(1)
    a = plan(**given)
    torch.manual_seed(1)
    assert same(a, plan(**given)) and not same(a, plan(**given))


def test_samples_counts_and_probs_of_one_circuit_are_the_same_shots():
    given = arguments(4, same=False)
    measure = lambda: [qml.sample(wires=[0, 2]), qml.counts(wires=[2, 0]), qml.counts(all_outcomes=True), qml.probs(wires=[2])]  # noqa: E731
    bits, counts, every, probs = compile_circuit(circuit_of(measure), SHAPES, shots=40)(**given, seed=1)
    assert bits.shape == (4, 40, 2) and bits.dtype == torch.int64
    for row in range(4):
        assert counts[row] == {f"{b}{a}": n for a in (0, 1) for b in (0, 1) if (n := int(((bits[row] == torch.tensor([a, b])).all(1)).sum()))}
        assert len(every[row]) == 8 and sum(every[row].values()) == 40
    assert torch.allclose(probs[:, 1], bits[..., 1].double().mean(1))


def test_samples_follow_the_state():
    "20,000 bit strings by chi-square, and no memory of the shot before"
    given = arguments(1)
    bits = compile_circuit(circuit_of(lambda: qml.sample()), SHAPES, shots=20_000)(**given, seed=2)[0].numpy()
    number = bits @ [4, 2, 1]
    p = rotated(state(given), "ZZZ")
    assert looks_like(np.bincount(number, minlength=8), 20_000 * p)
    pairs = np.bincount(number[:-1:2] * 8 + number[1::2], minlength=64)
    assert looks_like(pairs, 10_000 * np.outer(p, p).ravel())


def test_a_matrix_shows_its_eigenvalues():
    y = compile_circuit(circuit_of(MEASURED["matrix"]), SHAPES, shots=1)(**arguments(500), seed=0).numpy()
    eigenvalues = np.linalg.eigvalsh(np.array([[1, 2j], [-2j, 0.5]]))
    assert np.abs(y[:, :1] - eigenvalues).min(1).max() < 1e-12 and set(np.round(y[:, 1], 9)) <= {0.0, 1.0}


def test_very_many_shots_find_the_exact_value():
    "10^8 shots: binomials, not a loop; within 6 standard errors"
    given, measure = arguments(20, same=False), circuit_of(MEASURED["groups"])
    y, exact = compile_circuit(measure, SHAPES, shots=10**8)(**given, seed=3), compile_circuit(measure, SHAPES)(**given)
    assert (y - exact).abs().max() < 6e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_and_layers(dtype):
    @qml.set_shots(25)
    @qml.qnode(qml.device("default.qubit", wires=3))
    def node(inputs, w):
        gates(inputs, w)
        return [qml.expval(qml.Z(i)) for i in range(3)]

    layer = QuantumLayer(node, {"w": (2, 3, 3)}).to(dtype)
    y = layer(torch.rand(4, 2, 3, dtype=dtype))
    y.sum().backward()
    assert y.shape == (4, 2, 3) and y.dtype == dtype and layer.w.grad.abs().max() > 0
    assert ((y.detach() * 25 + 25) / 2 - ((y.detach() * 25 + 25) / 2).round()).abs().max() < 1e-5
    assert isinstance(layer.plan(3), ShotPlan) and type(compile_circuit(node.func, SHAPES)) is ExecutionPlan
    assert layer.plan(3).explain().startswith("25 shots: ")


def test_the_limit_holds():
    "Bytes of NumPy arrays, by tracemalloc, on 10 qubits: sampling, and backward through noisy probabilities"
    def circuit(inputs, w):
        qml.AngleEmbedding(inputs, wires=range(10))
        qml.BasicEntanglerLayers(w, wires=range(10))
        return qml.sample(wires=range(10)), qml.expval(qml.X(0)), qml.shadow_expval([qml.Z(i) for i in range(8)])

    plans = [compile_circuit(circuit, {"inputs": (10,), "w": (depth, 10)}, shots=10, memory_limit="1MB") for depth in (2, 3)]
    x = torch.rand(200, 10)
    for depth, plan in zip((2, 3), plans, strict=True):  # The first one warms up
        w = torch.rand(depth, 10, requires_grad=True)
        tracemalloc.start()
        bits, y, _ = plan(inputs=x, w=w, seed=1)
        y.sum().backward()
        bits, y, _ = plan(inputs=x, w=w, seed=2)
        y.sum().backward()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert plan.estimate_bytes(200) <= 1_000_000 and plan.chunk_size < 200
    assert peak < 1_080_000 + 3 * bits.numel() * 8 + 50_000


@st.composite
def observables(draw):
    letters = st.text("IXYZ", min_size=3, max_size=3)
    words = draw(st.lists(letters, min_size=1, max_size=5, unique=True))
    coefficients = draw(st.lists(st.floats(-2, 2), min_size=len(words), max_size=len(words)))
    return list(zip(words, coefficients, strict=True))


def unbiased(wanted, kind, engine, seed):
    "4000 samples of 3 shots: within 5.5 standard errors of the exact value"
    def measure():
        found = [c * qml.pauli.string_to_pauli_word(word, {0: 0, 1: 1, 2: 2}) for word, c in wanted]
        if kind == "shadow": return qml.shadow_expval([sum(found[1:], found[0]), *found])
        return [qml.expval(sum(found[1:], found[0])), *(qml.expval(o) for o in found)]

    def exact(): return [qml.expval(o) for o in m.H] if isinstance(m := measure(), qml.measurements.ShadowExpvalMP) else m

    given = arguments(4000, seed=seed)
    y = compile_circuit(circuit_of(measure), SHAPES, shots=3, engine=engine)(**given, seed=seed)
    truth = compile_circuit(circuit_of(exact), SHAPES)(**{**given, "inputs": given["inputs"][:1]})[0]
    assert ((y.mean(0) - truth).abs() <= 5.5 * y.std(0) / math.sqrt(4000) + 1e-9).all()


any_observable = given(observables(), st.sampled_from(["expval", "shadow"]), st.sampled_from(["auto", "statevector"]), st.integers(0, 9))


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@any_observable
def test_random_observables_are_unbiased(wanted, kind, engine, seed):
    unbiased(wanted, kind, engine, seed)


@pytest.mark.slow
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@any_observable
def test_many_random_observables_are_unbiased(wanted, kind, engine, seed):
    unbiased(wanted, kind, engine, seed)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.text("XYZ", min_size=4, max_size=4), st.lists(st.integers(0, 15), min_size=1, max_size=6), st.integers(0, 99))
def test_a_joint_law_is_that_of_a_rotated_state(basis, supports, seed):
    "Every category by enumeration of the 16 bit strings of a random state"
    rng = np.random.default_rng(seed)
    vector = rng.normal(size=16) + 1j * rng.normal(size=16)
    vector /= np.linalg.norm(vector)
    x, z = (sum(1 << 3 - i for i, letter in enumerate(basis) if letter in letters) for letters in ("XY", "ZY"))
    law = joint_law([(x & s, z & s) for s in supports])
    p, signs = rotated(vector, basis), lambda mask: 1.0 - 2 * (np.bitwise_count(np.arange(16) & mask) & 1)
    exact = law.probabilities(np.array([p @ signs(a | b) for a, b in law.words]))
    shown = np.stack([signs(s) for s in supports], 1)
    wanted = np.array([p[(shown == row).all(1)].sum() for row in law.values])
    assert np.abs(exact - wanted).max() < 1e-12


def test_eigen_laws_on_two_wires():
    rng = np.random.default_rng(1)
    matrix, vector = rng.normal(size=(4, 4)) + 1j * rng.normal(size=(4, 4)), rng.normal(size=8) + 1j * rng.normal(size=8)
    matrix, vector = matrix + matrix.conj().T, vector / np.linalg.norm(vector)
    law = eigen_law(matrix, (2, 0), 3)
    pauli = {"I": np.eye(2), "X": np.array([[0, 1], [1, 0]]), "Y": np.array([[0, -1j], [1j, 0]]), "Z": np.diag([1, -1])}
    def expectation(x, z):
        m = np.eye(1)
        for q in range(3): m = np.kron(m, pauli["IXZY"[(x >> 2 - q & 1) + 2 * (z >> 2 - q & 1)]])
        return (vector.conj() @ m @ vector).real
    turned = vector.reshape(2, 2, 2).transpose(2, 0, 1).reshape(4, 2)  # Rows: wires 2 and 0
    reduced = turned @ turned.conj().T
    eigenvalues, vectors = np.linalg.eigh(matrix)
    wanted = np.einsum("ik,ij,jk->k", vectors.conj(), reduced, vectors).real
    assert np.abs(law.probabilities(np.array([expectation(*word) for word in law.words])) - wanted).max() < 1e-12


def test_bad_input():
    plan, given = compile_circuit(circuit_of(MEASURED["groups"]), SHAPES, shots=5), arguments(3)
    for shots in (0, -3, 1.5, True):
        with pytest.raises(InvalidInput, match="shots is a whole number, at least 1"):
            compile_circuit(circuit_of(MEASURED["groups"]), SHAPES, shots=shots)
    with pytest.raises(InvalidInput, match="needs a number of shots"): compile_circuit(circuit_of(lambda: qml.counts()), SHAPES)
    with pytest.raises(NotFinite, match="inputs: 3 of 9"): plan(inputs=torch.tensor([[math.nan, 0, 0]] * 3, dtype=torch.float64), w=given["w"])
    with pytest.raises(InvalidInput, match=r"in \[0, 2\^64\)"): plan(**given, seed=-1)
    with pytest.raises(InvalidInput, match="both given"): plan(**given, seed=1, generator=torch.Generator())
    node = qml.QNode(circuit_of(lambda: qml.shadow_expval(qml.X(9))), qml.device("default.qubit", wires=3))
    with pytest.raises(InvalidInput, match="wire 9"): compile_circuit(node, SHAPES, shots=5)
    with pytest.raises(InvalidInput, match="vector of shots"):
        compile_circuit(qml.set_shots(qml.QNode(circuit_of(MEASURED["groups"]), qml.device("default.qubit", wires=3)), (5, 5)), SHAPES)
    with pytest.raises(MemoryBudgetExceeded, match="5 shots of one sample"):
        compile_circuit(circuit_of(MEASURED["groups"]), SHAPES, shots=5, memory_limit=300)(**given)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        y = plan(**{**given, "w": (w := given["w"].clone().requires_grad_())})
        torch.autograd.grad(y.sum(), w, create_graph=True)
    with pytest.raises(InvalidInput, match="at least 0 and not all 0"): draw_counts(torch.zeros(2, 3), 5)
    with pytest.raises(NotFinite, match="probabilities"): draw_samples(torch.full((2, 3), math.nan), 5)
