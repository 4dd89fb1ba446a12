"The circuit is report A's, its gradients are right, its memory is as predicted, and its randomness is its own"
import contextlib
import copy
import math
import pickle
import random
import subprocess
import sys
import threading
import tracemalloc
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import circuit_expectations, slope
from scipy import stats

from gausssafe.errors import InvalidInput, MemoryBudgetExceeded, NotFinite
from gausssafe.noise import ClassicalNoise, QuantumNoise, QuantumShadowNoise, seed_streams


def circuit(n_qubits, n_layers, seed=0, **options): return QuantumNoise(n_qubits, n_layers, seed, **options).double()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.integers(0, 1000))
def test_expectations_are_the_reference_s(n_qubits, n_layers, batch, seed):
    noise = circuit(n_qubits, n_layers, seed)
    z = noise.sample_latents(batch)
    expected = circuit_expectations(z.numpy(), noise.weights.detach().numpy())
    np.testing.assert_allclose(noise.from_latents(z).detach().numpy(), expected, atol=1e-13)  # float64, tens of gates


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 1000))
def test_gradients_are_the_reference_s(n_qubits, n_layers, seed):
    noise = circuit(n_qubits, n_layers, seed)
    z = (0.9 * noise.sample_latents(2)).requires_grad_()
    share = torch.linspace(0.5, 1.5, 2 * n_qubits, dtype=torch.float64).view(2, n_qubits)  # Unequal, so that no two errors cancel
    to_z, to_weights = torch.autograd.grad((share * noise.from_latents(z)).sum(), [z, noise.weights])
    def loss(z, weights): return (share.numpy() * circuit_expectations(z, weights)).sum()
    z, weights = z.detach().numpy(), noise.weights.detach().numpy()
    for index in np.ndindex(weights.shape): assert to_weights[index].item() == pytest.approx(slope(lambda w: loss(z, w), weights, index), abs=1e-8)
    for index in np.ndindex(z.shape): assert to_z[index].item() == pytest.approx(slope(lambda v: loss(v, weights), z, index), abs=1e-7)


def test_couplings_of_the_last_layer_have_exactly_no_gradient():
    noise = QuantumNoise(4, 2)
    grad, = torch.autograd.grad((noise(32) ** 2).sum(), noise.weights)
    assert (grad[-1, 4:] == 0).all() and (grad.flatten()[:-3] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_edge_of_the_latents(dtype):
    noise = QuantumNoise(3, 2).to(dtype)
    z = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [0.0, 1.0], [-1.0, 0.0]], dtype=dtype, requires_grad=True)
    x = noise.from_latents(z)
    np.testing.assert_allclose(x.detach(), circuit_expectations(z.detach().double().numpy(), noise.weights.detach().double().numpy()),
                               atol=100 * torch.finfo(dtype).eps)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(x.sum(), [z, noise.weights]))


@pytest.mark.parametrize("latents", [torch.float32, torch.float64])
@pytest.mark.parametrize("weights", [torch.float32, torch.float64])
def test_dtypes(latents, weights):
    noise, result = QuantumNoise(3, 1).to(weights), torch.promote_types(latents, weights)
    z = torch.rand(5, 2, generator=torch.Generator().manual_seed(0), dtype=latents)
    x = noise.from_latents(z)
    assert x.dtype == result and noise.sample_latents(3).dtype == weights == noise(3).dtype
    exact = circuit_expectations(z.double().numpy(), noise.weights.detach().double().numpy())
    np.testing.assert_allclose(x.detach(), exact, atol=50 * torch.finfo(min(latents, weights, key=lambda d: d.itemsize)).eps)


def passes(noise, z, weights_grad, latents_grad):
    "What a forward and, if asked for, a backward pass returns"
    noise.weights.requires_grad_(weights_grad)
    z = z.clone().requires_grad_(latents_grad)
    x = noise.from_latents(z)
    wanted = [t for t in (noise.weights, z) if t.requires_grad]
    return [x.detach(), *(torch.autograd.grad(x, wanted, torch.ones_like(x)) if wanted else [])]


@pytest.mark.parametrize("grads", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("limit_bytes", [9_000, 20_000, 10**9])
def test_chunks_change_nothing(grads, limit_bytes):
    whole, chunked = circuit(3, 2), circuit(3, 2, memory_limit=limit_bytes)
    z = whole.sample_latents(67)
    for a, b in zip(passes(whole, z, *grads), passes(chunked, z, *grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grads", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("n_qubits", "n_layers"), [(1, 1), (6, 2), (5, 8), (12, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prediction_holds(n_qubits, n_layers, dtype, grads):
    noise = QuantumNoise(n_qubits, n_layers).to(dtype)
    passes(noise, noise.sample_latents(2), *grads)  # Compiles, and makes a workspace for two
    z = noise.sample_latents(4000)
    with traced_bytes() as traced: returned = passes(noise, z, *grads)
    outside = z.nbytes + sum(2 * r.nbytes for r in returned)  # A copy of z, and results with the gradients that backward starts from
    assert traced.peak_bytes - outside <= noise.estimate_bytes(4000) + 50_000  # Python's own objects


@contextlib.contextmanager
def traced_bytes():
    "What NumPy and Python allocate"
    tracemalloc.start()
    found = types.SimpleNamespace()
    try: yield found
    finally:
        found.peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


@pytest.mark.parametrize("share", [0.95, 0.8])
def test_a_limit_is_kept(share):
    limit_bytes = int(share * QuantumNoise(6, 2).estimate_bytes(100))
    assert QuantumNoise(6, 2, memory_limit=limit_bytes).estimate_bytes(100) <= limit_bytes


def test_what_cannot_fit_is_refused_before_it_is_tried():
    noise = QuantumNoise(20, 2, memory_limit="10kB")
    message = r"20 qubits x batch 4 needs 1\d.\d kB; 10.0 kB of the 10.0 kB budget is left. Even one sample needs"
    with pytest.raises(MemoryBudgetExceeded, match=message): noise(4)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: QuantumNoise(0), "n_qubits is a whole number, at least 1, not 0"),
    (lambda: QuantumNoise(2.0), "n_qubits is a whole number, at least 1, not 2.0"),
    (lambda: QuantumNoise(2, True), "n_layers is a whole number, at least 1, not True"),
    (lambda: QuantumNoise(2, 1, -1), "seed is a whole number, at least 0, not -1"),
    (lambda: QuantumNoise(2, 1, memory_limit="2 gigs"), "memory_limit: '2 gigs' is not a size"),
    (lambda: QuantumNoise(2, 1)(0), "the number of samples is a whole number, at least 1, not 0"),
    (lambda: QuantumNoise(2, 1).sample_latents("8"), "the number of samples is a whole number, at least 1, not '8'"),
    (lambda: QuantumNoise(2, 1).from_latents(torch.zeros(3)), r"are a float32 or float64 tensor of shape \(batch, 2\), not \(3,\) torch.float32"),
    (lambda: QuantumNoise(2, 1).from_latents(torch.zeros(0, 2)), r"not \(0, 2\)"),
    (lambda: QuantumNoise(2, 1).from_latents(torch.zeros(1, 2, dtype=torch.half)), "not .* torch.float16"),
    (lambda: QuantumNoise(2, 1).from_latents([[0, 0]]), "not list"),
    (lambda: QuantumNoise(2, 1).from_latents(torch.tensor([[1.5, 0]])), r"1 of 2 values of z lie outside \[-1, 1\] \(largest magnitude 1.5\)"),
    (lambda: ClassicalNoise("gauss"), "kind is \"normal\" or \"uniform\", not 'gauss'"),
    (lambda: ClassicalNoise(dim=0), "dim is a whole number, at least 1, not 0"),
    (lambda: ClassicalNoise()(-1), "the number of samples is a whole number"),
])
def test_bad_input_fails_at_the_call(call, message):
    with pytest.raises(InvalidInput, match=message): call()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_latents_that_are_not_numbers(bad):
    z = torch.tensor([[0, bad], [0.5, 0]])
    with pytest.raises(NotFinite, match="z: 1 of 4 values are NaN or infinite"): QuantumNoise(2, 1).from_latents(z)


def test_distributions():
    n = 4000
    noise = QuantumNoise(6, 200, seed=3)
    checks = {"latents": (noise.sample_latents(n), stats.uniform(-1, 2)), "weights": (noise.weights.detach(), stats.uniform(-math.pi, 2 * math.pi)),
              "normal": (ClassicalNoise(dim=3, seed=1)(n), stats.norm), "uniform": (ClassicalNoise("uniform", 3, seed=1)(n), stats.uniform(-1, 2))}
    for name, (x, law) in checks.items(): assert stats.kstest(x.flatten().numpy(), law.cdf).pvalue > 1e-3, name


def test_seeds():
    make = [lambda s: QuantumNoise(3, 1, s), lambda s: ClassicalNoise("normal", 3, s), lambda s: ClassicalNoise("uniform", 3, s)]
    for noise in make: assert torch.equal(noise(5)(7), noise(5)(7)) and not torch.equal(noise(5)(7), noise(6)(7))
    noise = QuantumNoise(3, 1, 5)
    assert not torch.equal(noise(7), noise(7))  # It moves on
    assert torch.equal(QuantumNoise(3, 1, 5).sample_latents(4), QuantumNoise(6, 2, 5).sample_latents(4))  # The shape of the weights does not matter
    assert not np.allclose(QuantumNoise(1, 2, 5).weights.detach() / math.pi, QuantumNoise(1, 2, 5).sample_latents(1).T)  # Nor are they the same draw
    assert len({s for seed in range(100) for s in seed_streams(seed, 5)}) == 500


def test_nothing_global_is_touched():
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate(), torch.get_default_dtype(), torch.get_num_threads()
    noise = QuantumNoise(3, 2, memory_limit="10kB")
    noise(50).sum().backward()
    ClassicalNoise()(5)
    after = torch.get_rng_state(), np.random.get_state()[1], random.getstate(), torch.get_default_dtype(), torch.get_num_threads()
    assert torch.equal(before[0], after[0]) and (before[1] == after[1]).all() and before[2:] == after[2:]


def test_no_device_is_made(monkeypatch):
    import pennylane as qml
    monkeypatch.setattr(qml, "device", lambda *a, **k: pytest.fail("a simulator device was made"))
    monkeypatch.setattr(qml.devices.DefaultQubit, "__init__", lambda *a, **k: pytest.fail("a simulator device was made"))
    QuantumNoise(2, 1)(3).sum().backward()


def test_pennylane_is_imported_only_when_a_circuit_runs():
    code = "import sys, gausssafe.noise as n; n.ClassicalNoise()(2); q = n.QuantumNoise(); assert 'pennylane' not in sys.modules; q(1)"
    subprocess.run([sys.executable, "-c", code + "; assert 'pennylane' in sys.modules"], check=True)


def test_a_saved_state_goes_on_where_it_was():
    noise = QuantumNoise(3, 1)
    noise(10)
    state = copy.deepcopy(noise.state_dict())
    expected, resumed = noise(10), QuantumNoise(3, 1, seed=99)
    resumed.load_state_dict(state)
    assert torch.equal(resumed(10), expected)
    for twin in (copy.deepcopy(noise), pickle.loads(pickle.dumps(noise))): assert torch.equal(twin(4), copy.deepcopy(noise)(4))


def test_a_shadow_goes_on_with_its_observables():
    noise, other = QuantumShadowNoise(4, 1, seed=1), QuantumShadowNoise(4, 1, seed=2)
    assert noise.words != other.words
    other.load_state_dict(copy.deepcopy(noise.state_dict()))
    assert noise.words == other.words and torch.equal(noise(8), other(8))
    with pytest.raises(InvalidInput, match="of 3 observables, and this noise has 2"): QuantumShadowNoise(4, 1, 2).load_state_dict(noise.state_dict())


def test_threads_get_what_one_would_have_got():
    noise, latents = QuantumNoise(3, 2), []
    def work():
        for _ in range(20): latents.append(noise.sample_latents(8))
    run_threads(work, 6)
    alone = QuantumNoise(3, 2)
    def sortable(zs): return sorted(tuple(z.flatten().tolist()) for z in zs)
    assert sortable(latents) == sortable(alone.sample_latents(8) for _ in range(120))


def test_threads_do_not_mix_their_circuits():
    noises = [QuantumNoise(n, 2, seed=n) for n in (2, 3, 4, 5)]
    zs = [noise.sample_latents(16) for noise in noises]
    def gradients(i): return torch.autograd.grad((noises[i].from_latents(zs[i]) ** 2).sum(), noises[i].weights)[0]
    expected, found = [gradients(i) for i in range(4)], {}
    run_threads(lambda i: found.update({(i, k): gradients(i) for k in range(5)}), 4, numbered=True)
    assert len(found) == 20 and all(torch.equal(grad, expected[i]) for (i, _), grad in found.items())


def run_threads(work, n, numbered=False):
    threads = [threading.Thread(target=work, args=(i,) if numbered else ()) for i in range(n)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_device():
    noise = QuantumNoise(6, 2)
    expected = noise.from_latents(z := noise.sample_latents(64))
    x = noise.cuda().from_latents(z.cuda())
    assert x.is_cuda and noise(5).is_cuda and ClassicalNoise().cuda()(5).is_cuda
    torch.testing.assert_close(x.cpu(), expected, rtol=0, atol=1e-5)
    x.sum().backward()
    assert noise.weights.grad.is_cuda
