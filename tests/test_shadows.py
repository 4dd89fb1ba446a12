"Shadows against enumeration of every basis and outcome, against PennyLane's own, and the noise that is made of them"

import copy
import itertools
import math
import pickle
import threading

import numpy as np
import pennylane as qml
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gausssafe.circuits import compile_circuit
from gausssafe.errors import InvalidInput, NotFinite
from gausssafe.noise import QuantumNoise, QuantumShadowNoise
from gausssafe.shadows import classical_shadow, shadow_expval, shadow_law

TURN = [np.array([[1, 1], [1, -1]]) / math.sqrt(2), np.array([[1, -1j], [1, 1j]]) / math.sqrt(2), np.eye(2)]  # X, Y, Z to bits
PAULI = {"I": np.eye(2), "X": np.array([[0, 1], [1, 0]]), "Y": np.array([[0, -1j], [1j, 0]]), "Z": np.diag([1, -1])}


def kron(matrices):
    out = np.eye(1)
    for m in matrices: out = np.kron(out, m)
    return out


def random_state(n, seed):
    rng = np.random.default_rng(seed)
    vector = rng.normal(size=2**n) + 1j * rng.normal(size=2**n)
    return vector / np.linalg.norm(vector)


def snapshots(vector, n):
    "Every (recipes, bits, probability)"
    for recipes in itertools.product(range(3), repeat=n):
        p = np.abs(kron(TURN[r] for r in recipes) @ vector) ** 2 / 3**n
        for bits, chance in zip(itertools.product((0, 1), repeat=n), p, strict=True): yield recipes, bits, chance


def one_shot(words, recipes, bits):
    "The estimates of words, as tuple"
    found = []
    for word in words:
        value = 1.0
        for letter, r, b in zip(word, recipes, bits, strict=True):
            if letter != "I": value *= 3 * (1 - 2 * b) if "XYZ"[r] == letter else 0
        found.append(value + 0.0)
    return tuple(found)


def enumerated(vector, words):
    "The law of a shot by enumeration: {estimates: probability}"
    law = {}
    for recipes, bits, p in snapshots(vector, len(words[0])):
        value = one_shot(words, recipes, bits)
        law[value] = law.get(value, 0) + p
    return law


def masks(word):
    n = len(word)
    return tuple(sum(1 << n - 1 - i for i, letter in enumerate(word) if letter in letters) for letters in ("XY", "ZY"))


def word_of(x, z, n): return "".join("IXZY"[(x >> n - 1 - i & 1) + 2 * (z >> n - 1 - i & 1)] for i in range(n))


def looks_like(found, expected):
    "Chi-square; a true law fails about once in 10^4 (fixed seeds: never, or always)"
    assert found.sum() == round(expected.sum())
    rare = expected < 10
    f, e = np.append(found[~rare], found[rare].sum()), np.append(expected[~rare], expected[rare].sum())
    f, e = f[e > 1e-9], e[e > 1e-9]
    free = max(1, len(e) - 1)
    return ((f - e) ** 2 / e).sum() < free + 4.5 * math.sqrt(2 * free) + 20


some_words = st.lists(st.text("IXYZ", min_size=3, max_size=3).filter(lambda w: w != "III"), min_size=1, max_size=5, unique=True)


def law_is_exact(words, seed):
    vector = random_state(3, seed)
    law, n = shadow_law([masks(w) for w in words]), 3
    expectations = [(vector.conj() @ kron(PAULI[c] for c in word_of(x, z, n)) @ vector).real for x, z in law.words]
    found = {}
    for value, p in zip(law.values, law.probabilities(np.array(expectations)), strict=True):
        key = tuple(float(v) + 0.0 for v in value)
        assert key not in found and p > -1e-12
        found[key] = p
    wanted = enumerated(vector, words)
    assert all(abs(found.get(key, 0) - p) < 1e-12 for key, p in wanted.items()) and abs(sum(found.values()) - 1) < 1e-12
    assert len(law.constant) <= 3 ** len(words) and len(law.words) < 2 ** len(words)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(some_words, st.integers(0, 99))
def test_the_joint_law_is_that_of_all_bases_and_outcomes(words, seed):
    law_is_exact(words, seed)


@pytest.mark.slow
@settings(max_examples=400, deadline=None, derandomize=True)
@given(some_words, st.integers(0, 999))
def test_many_joint_laws(words, seed):
    law_is_exact(words, seed)


@pytest.mark.parametrize(("dtype", "wires"), [(torch.complex128, None), (torch.complex64, (2, 0)), (torch.complex128, (1,))])
def test_bits_and_recipes_follow_their_law(dtype, wires):
    "All recipes and outcomes of one shot of 30,000 equal states, and of 30,000 shots of one"
    vector = random_state(3, 1)
    order = wires or (0, 1, 2)
    law = {}
    for recipes, bits, p in snapshots(vector, 3):
        key = tuple(recipes[w] for w in order), tuple(bits[w] for w in order)
        law[key] = law.get(key, 0) + p
    keys = list(law)
    states = torch.as_tensor(vector).to(dtype)[None]
    for batch, shots in ((30_000, 1), (1, 30_000)):
        bits, recipes = (t.reshape(-1, len(order)).tolist() for t in classical_shadow(states.expand(batch, 8), shots, wires=wires, seed=3))
        place = {key: i for i, key in enumerate(keys)}
        found = np.bincount([place[tuple(r), tuple(b)] for r, b in zip(recipes, bits, strict=True)], minlength=len(keys))
        assert looks_like(found, 30_000 * np.array([law[key] for key in keys]))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 99), st.integers(1, 6), st.sampled_from([1, 2, 3, 5]))
def test_estimates_are_those_of_pennylane(seed, n_words, k):
    rng = np.random.default_rng(seed)
    bits, recipes = rng.integers(0, 2, (3, 31, 4)), rng.integers(0, 3, (3, 31, 4))
    wires = ["a", 5, 0, 2]
    observables = []
    for _ in range(n_words):
        words = ["".join(rng.choice(list("IXYZ"), 4)) for _ in range(2)]
        place = dict(zip(wires, range(4), strict=True))
        parts = [c * qml.pauli.string_to_pauli_word(w, place) for c, w in zip(rng.normal(size=2), words, strict=True)]
        observables.append(parts[0] + parts[1])
    ours = shadow_expval(torch.as_tensor(bits), torch.as_tensor(recipes), observables, k=k, wires=wires)
    for row in range(3):
        theirs = qml.ClassicalShadow(bits[row], recipes[row], wire_map=wires).expval(observables, k)
        assert np.abs(ours[row].numpy() - theirs).max() < 1e-10
        single = qml.ClassicalShadow(bits[row], recipes[row], wire_map=wires).expval(observables[0], k)
        assert abs(float(shadow_expval(torch.as_tensor(bits), torch.as_tensor(recipes), observables[0], k=k, wires=wires)[row]) - single) < 1e-10


FEW, MANY = ["XI", "IZ", "XZ"], ["XI", "IZ", "XZ", "YY", "ZX", "IY", "ZZ"]


def bell(inputs, w):
    qml.RY(inputs[0], wires=0)
    qml.RX(w[0], wires=1)
    qml.CNOT([0, 1])
    qml.RZ(w[1], wires=0)
    qml.RY(w[2], wires=0)


def vector_of(x, w):
    @qml.qnode(qml.device("default.qubit", wires=2))
    def node(inputs, w):
        bell(inputs, w)
        return qml.state()

    return node(x, w).numpy()


X, W = torch.tensor([0.7], dtype=torch.float64), torch.tensor([0.4, 1.1, -0.6], dtype=torch.float64)


def plan_of(words, shots, k=1):
    def circuit(inputs, w):
        bell(inputs, w)
        return qml.shadow_expval([qml.pauli.string_to_pauli_word(word, {0: 0, 1: 1}) for word in words], k=k)

    return compile_circuit(circuit, {"inputs": (1,), "w": (3,)}, shots=shots)


@pytest.mark.parametrize("words", [FEW, MANY])
@pytest.mark.parametrize("shots", [1, 2])
def test_plans_draw_whole_outcomes_by_their_law(words, shots):
    "All estimates together: one shot, and the mean of two, by chi-square; few words by the joint law, many by states"
    plan = plan_of(words, shots)
    assert ("law of" in plan.explain()) == (words is FEW) and ("bits and recipes" in plan.explain()) == (words is MANY)
    y = plan(inputs=X.expand(30_000, 1), w=W, seed=1).numpy()
    single = enumerated(vector_of(X, W), words)
    law = {}
    for chosen in itertools.product(single.items(), repeat=shots):
        key = tuple((np.sum([c[0] for c in chosen], 0) / shots).tolist())
        law[key] = law.get(key, 0) + math.prod(c[1] for c in chosen)
    place = {key: i for i, key in enumerate(law)}
    found = np.bincount([place[tuple(row)] for row in (y + 0.0).tolist()], minlength=len(law))
    assert looks_like(found, 30_000 * np.array(list(law.values())))


@pytest.mark.parametrize("words", [FEW, MANY])
def test_means_and_covariances(words):
    "100 shots: within 5.5 standard errors of the exact law, for every entry (about 1 in 10^7 each)"
    rows, law = 4000, enumerated(vector_of(X, W), words)
    values, p = np.array(list(law)), np.array(list(law.values()))
    mean = p @ values
    cov = ((values.T * p) @ values - np.outer(mean, mean)) / 100
    y = plan_of(words, 100)(inputs=X.expand(rows, 1), w=W, seed=2).numpy()
    assert (np.abs(y.mean(0) - mean) < 5.5 * np.sqrt(cov.diagonal() / rows)).all()
    spread = np.sqrt((np.outer(cov.diagonal(), cov.diagonal()) + cov**2) / rows)
    assert (np.abs(np.cov(y.T) - cov) < 5.5 * 1.1 * spread).all()


def test_default_qubit_agrees():
    "Its own shadow_expval, 400 calls of 20 shots, one by one: means and covariances within 5 standard errors of ours"
    @qml.set_shots(20)
    @qml.qnode(qml.device("default.qubit", wires=2, seed=1))
    def node(seed):
        bell(X, W)
        return qml.shadow_expval([qml.pauli.string_to_pauli_word(word, {0: 0, 1: 1}) for word in FEW], seed=seed)

    theirs = np.array([node(seed + 1) for seed in range(400)])
    ours = plan_of(FEW, 20)(inputs=X.expand(20_000, 1), w=W, seed=4).numpy()
    assert (np.abs(theirs.mean(0) - ours.mean(0)) < 5 * theirs.std(0) / 20).all()
    wanted = np.cov(ours.T)
    assert (np.abs(np.cov(theirs.T) - wanted) < 5 * np.sqrt((np.outer(wanted.diagonal(), wanted.diagonal()) + wanted**2) / 400) * 1.2).all()


def test_the_median_of_means_has_one_law_either_way():
    "k = 5 of 21 shots, from the joint law and from bits: whole histograms of the first word agree (chi-square of two samples)"
    few = plan_of(FEW, 21, 5)(inputs=X.expand(20_000, 1), w=W, seed=1)[:, 0]
    many = plan_of(MANY, 21, 5)(inputs=X.expand(20_000, 1), w=W, seed=2)[:, 0]
    values = torch.cat([few, many]).round(decimals=9).unique()
    a, b = (np.bincount(np.searchsorted(values.numpy(), v.round(decimals=9).numpy()), minlength=len(values)) for v in (few, many))
    used = a + b >= 20
    assert used.sum() > 5 and ((a - b) ** 2 / (a + b + 1e-9))[used].sum() < used.sum() + 4.5 * math.sqrt(2 * used.sum()) + 20


def test_bits_and_recipes_of_a_plan():
    def circuit(inputs, w):
        bell(inputs, w)
        return qml.classical_shadow(wires=[1, 0])

    plan = compile_circuit(circuit, {"inputs": (1,), "w": (3,)}, shots=30_000)
    bits, recipes = plan(inputs=X[None], w=W, seed=1)
    assert bits.shape == recipes.shape == (1, 30_000, 2) and bits.dtype == torch.int8
    law = {(r[::-1], b[::-1]): p for r, b, p in snapshots(vector_of(X, W), 2)}
    place = {key: i for i, key in enumerate(law)}
    found = np.bincount([place[tuple(r), tuple(b)] for r, b in zip(recipes[0].tolist(), bits[0].tolist(), strict=True)], minlength=len(law))
    assert looks_like(found, 30_000 * np.array(list(law.values())))


def test_rows_do_not_depend_on_their_batch():
    states = torch.as_tensor(np.stack([random_state(3, i) for i in range(6)]))
    whole = classical_shadow(states, 50, seed=5)
    assert all(torch.equal(a[:4], b) for a, b in zip(whole, classical_shadow(states[:4], 50, seed=5), strict=True))
    assert not torch.equal(whole[0][0], whole[0][1]) and not torch.equal(whole[1][0], whole[1][1])


def test_bad_input():
    states = torch.as_tensor(random_state(2, 0))[None]
    bits, recipes = classical_shadow(states, 10, seed=1)
    with pytest.raises(InvalidInput, match="at least 1, not 0"): classical_shadow(states, 0)
    with pytest.raises(NotFinite, match="states: 2 of 8"): classical_shadow(states * torch.tensor([math.nan, 1, 1, 1]), 5)
    with pytest.raises(InvalidInput, match="name each wire once, 0 to 1"): classical_shadow(states, 5, wires=(0, 2))
    with pytest.raises(InvalidInput, match="3 numbers is not 2"): classical_shadow(states[:, :3], 5)
    with pytest.raises(InvalidInput, match="acts on wire 2, but the shadow has only the wires"): shadow_expval(bits, recipes, qml.X(0) @ qml.Z(2))
    with pytest.raises(InvalidInput, match="no sum of Pauli words"): shadow_expval(bits, recipes, qml.Hermitian(np.eye(2), 0))
    with pytest.raises(InvalidInput, match="leave a part without any"): shadow_expval(bits, recipes, qml.X(0), k=6)
    with pytest.raises(InvalidInput, match="leave a part without any"): plan_of(FEW, 10, 6)
    with pytest.raises(InvalidInput, match="must both be"): shadow_expval(bits, recipes[:, :5], qml.X(0))


def exact_noise(noise, z):
    @qml.qnode(qml.device("default.qubit", wires=noise.n_qubits))
    def node(z, weights):
        n = noise.n_qubits
        for q in range(n): qml.RY(torch.arcsin(z[0]), q); qml.RZ(torch.arcsin(z[1]), q)
        for row in weights:
            for q in range(n): qml.RY(row[q], q)
            for q in range(n - 1): qml.CNOT([q, q + 1]); qml.RZ(row[n + q], q + 1); qml.CNOT([q, q + 1])
        return [qml.expval(word) for word in noise.observables]

    return torch.stack([torch.stack(node(row, noise.weights)) for row in z])


@pytest.mark.parametrize("n_observables", [3, 7])
def test_noise_estimates_its_words_with_the_exact_gradient(n_observables):
    "Mean of 3000 draws of 5 shots within 5.5 standard errors; gradients to weights and latents within rounding"
    noise = QuantumShadowNoise(3, 2, n_observables, shots=5, seed=4).double()
    z = torch.tensor([[0.3, -0.8], [-0.5, 0.1]], dtype=torch.float64, requires_grad=True)
    exact = exact_noise(noise, z)
    wanted = torch.autograd.grad(exact.square().sum(), (noise.weights, z), retain_graph=True)
    drawn = noise.from_latents(z)
    given = torch.autograd.grad(drawn, (noise.weights, z), 2 * exact.detach())
    assert all((a - b).abs().max() < 1e-11 for a, b in zip(wanted, given, strict=True))
    many = noise.from_latents(z[:1].detach().expand(3000, 2)).detach()
    assert ((many.mean(0) - exact[0]).abs() < 5.5 * many.std(0) / math.sqrt(3000)).all()
    bits, recipes = noise.shadow(z[:1].expand(3000, 2))
    by_bits = shadow_expval(bits, recipes, noise.observables)
    assert bits.shape == (3000, 5, 3) and ((by_bits.mean(0) - exact[0]).abs() < 5.5 * by_bits.std(0) / math.sqrt(3000)).all()


def test_noise_is_seeded_saved_and_copied():
    a, b, c = (QuantumShadowNoise(4, 1, seed=s) for s in (1, 1, 2))
    assert torch.equal(a(9), b(9)) and a.words == b.words and a.words != c.words and len(set(a.words)) == 3 and "IIII" not in a.words
    assert torch.equal(a.weights, QuantumNoise(4, 1, seed=1).weights) and torch.equal(a.sample_latents(3), b.sample_latents(3))
    state = copy.deepcopy(a.state_dict())
    expected, resumed = a(10), QuantumShadowNoise(4, 1, seed=1)
    resumed.load_state_dict(state)
    assert torch.equal(resumed(10), expected) and not torch.equal(resumed(10), expected)
    for twin in (copy.deepcopy(a), pickle.loads(pickle.dumps(a))): assert torch.equal(twin(4), copy.deepcopy(a)(4))


def test_noise_limits_threads_and_dtypes():
    free, tight = (QuantumShadowNoise(4, 2, shots=30, seed=3, memory_limit=m) for m in (None, "38kB"))
    assert torch.equal(free(500), tight(500)) and tight.estimate_bytes(500) <= 38_000
    assert free(7).shape == (7, 3) and free.dim == 3 and free.double()(2).dtype == torch.float64
    shared, drawn = QuantumShadowNoise(3, 1, seed=5), []
    threads = [threading.Thread(target=lambda: drawn.extend(shared(8) for _ in range(5))) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert len(drawn) == 20 and len({tuple(x.flatten().tolist()) for x in drawn}) == 20


def test_all_words_of_two_qubits_and_none_too_many():
    every = QuantumShadowNoise(2, 1, n_observables=15)
    assert sorted(every.words) == sorted("".join(w) for w in itertools.product("IXYZ", repeat=2) if w != ("I", "I")) and every(2).shape == (2, 15)
    with pytest.raises(InvalidInput, match=r"n_observables = 16, but 2 qubits have only 4\^2 - 1 = 15"): QuantumShadowNoise(2, 1, n_observables=16)
    with pytest.raises(InvalidInput, match="shots is a whole number, at least 1, not 0"): QuantumShadowNoise(2, shots=0)
    with pytest.raises(InvalidInput, match="of z lie outside"): QuantumShadowNoise(2).from_latents(torch.tensor([[0.0, 1.5]]))
    assert len(set(QuantumShadowNoise(14, 1, n_observables=50, seed=1).words)) == 50
