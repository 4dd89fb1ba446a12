"Spectra from products against dense matrices whose spectra are known"
import numpy as np
import pytest
import torch
from scipy.sparse.linalg import aslinearoperator

from gausssafe.errors import InvalidInput, MemoryBudgetExceeded, NotFinite
from gausssafe.memory import count_tensor_bytes
from gausssafe.spectrum import diagonal, spectral_density, top_eigenpairs, trace


def symmetric(eigenvalues, seed=0):
    "A dense float64 matrix with these eigenvalues"
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    Q, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    return Q @ torch.diag(values) @ Q.T


SPECTRA = {"decaying": 100 * 0.9 ** torch.arange(300.0), "two signs": torch.linspace(-50, 80, 300),
    "low rank": torch.cat([torch.arange(1.0, 9.0), torch.zeros(292)]),
           "outliers": torch.cat([torch.linspace(0, 1, 290), torch.linspace(10, 50, 8), torch.tensor([-20.0, -30.0])]), "few": torch.arange(1.0, 6.0)}


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("basis_size", [None, 12])
def test_eigenpairs(name, which, basis_size):
    if which in ("SA", "BE") and name in ("decaying", "low rank") or (which, name, basis_size) == ("SA", "outliers",
            12): return  # A cluster at zero: Lanczos finds equal eigenvalues once
    A, values = symmetric(SPECTRA[name]), SPECTRA[name].double()
    order = {"LA": values.sort(descending=True)[0][:4], "SA": values.sort()[0][:4], "LM": values[values.abs().sort(descending=True)[1]][:4],
             "BE": torch.cat([values.sort(descending=True)[0][:2], values.sort(descending=True)[0][-2:]])}[which]
    found, vectors, info = top_eigenpairs(A, k=4, which=which, tol=1e-8, basis_size=basis_size, max_products=6000)
    assert info.converged
    torch.testing.assert_close(found, order, atol=1e-5, rtol=1e-6)
    true = (A @ vectors - vectors * found).norm(dim=0)
    assert (true <= info.residuals + 1e-9 * values.abs().max()).all()
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(4, dtype=torch.float64), atol=1e-8, rtol=0)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("limit", [None, 300 * 8 * 9])
def test_trace_error_is_as_reported(name, limit):
    "Over 40 seeds the errors are 1.0 (0.5 to 1.6) reported standard errors in size"
    A, true = symmetric(SPECTRA[name]), float(SPECTRA[name].sum())
    found = [trace(A, 30, seed=10 * seed, memory_limit=limit) for seed in range(40)]
    errors, stderrs = (torch.tensor(x) for x in ([e.value - true for e in found], [e.stderr for e in found]))
    if name == "few" or name == "low rank" and not limit: assert errors.abs().max() < 1e-9 * 36
    else: assert 0.5 < errors.square().mean().sqrt() / stderrs.square().mean().sqrt() < 1.6
    assert all(e.n_products <= 30 for e in found)


def test_products_of_a_top_ten():
    "Residual 1e-3 without a restart on a spectrum like a trained network's: ten that stand out of a decaying bulk"
    values = torch.cat([torch.logspace(2, 1, 10), 5 * 0.97 ** torch.arange(490.0)])
    found, _, info = top_eigenpairs(symmetric(values), k=10)
    assert info.converged and info.n_restarts == 0 and info.n_products <= 40
    torch.testing.assert_close(found, values[:10].double(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", ["torch", "numpy", "scipy", "float32"])
def test_any_operator(kind):
    A = symmetric(SPECTRA["outliers"])
    operator = {"torch": A, "numpy": A.numpy(), "scipy": aslinearoperator(A.numpy()), "float32": A.float()}[kind]
    values, vectors, _ = top_eigenpairs(operator, k=3, seed=1)
    torch.testing.assert_close(values.double(), torch.tensor([50.0, 44.285713, 38.571426], dtype=torch.float64), rtol=1e-3, atol=0)
    assert vectors.shape == (300, 3) and values.dtype == (torch.float32 if kind == "float32" else torch.float64)
    assert trace(operator, 40).value == pytest.approx(float(A.trace()), rel=0.1)
    assert trace(operator, 300).value == pytest.approx(float(A.trace()), rel=1e-4)
    torch.testing.assert_close(diagonal(operator, 300).value.double(), A.diagonal(), rtol=1e-3, atol=1e-3)
    assert spectral_density(operator, n_probes=4, n_steps=20).moment(1) == pytest.approx(float(A.trace()) / 300, abs=0.3)


@pytest.mark.parametrize("n_products", [30, 90])
def test_diagonal_error_is_as_reported(n_products):
    "Root mean square over 300 entries and 10 seeds; deflation beats plain probes"
    A = symmetric(SPECTRA["decaying"])
    found = [diagonal(A, n_products, seed=10 * seed) for seed in range(10)]
    errors = torch.stack([e.value - A.diagonal() for e in found])
    stderrs = torch.stack([e.stderr for e in found])
    assert 0.7 < errors.square().mean().sqrt() / stderrs.square().mean().sqrt() < 1.4
    signs = torch.randint(2, (300, n_products), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    plain = (signs * (A @ signs)).mean(1) - A.diagonal()
    assert errors.square().mean().sqrt() < (0.95 if n_products == 30 else 0.2) * plain.square().mean().sqrt()


def test_density_moments_and_shares():
    "Moments are exact for each probe, so their means err as 8 probes do: within 4 standard errors, sqrt(2 / (8 d)) of the spread"
    values = SPECTRA["two signs"].double()
    density = spectral_density(symmetric(values), n_probes=8, n_steps=30)
    for power in (1, 2):
        spread = float((values**power).std()) * (2 / (8 * 300)) ** 0.5
        assert abs(density.moment(power) - float((values**power).mean())) < 4 * spread
    assert density.share(0, 100).value == pytest.approx(8 / 13, abs=0.05)
    grid = torch.linspace(-80, 110, 2000)
    smooth = density.smooth(grid, width=4)
    assert float(smooth.sum() * (grid[1] - grid[0])) == pytest.approx(1, abs=1e-3) and (smooth >= 0).all()
    torch.testing.assert_close(density.weights.sum(1), torch.ones(8, dtype=torch.float64))


def test_density_of_few_eigenvalues():
    density = spectral_density(symmetric([1.0, 1.0, 1.0, 5.0, 5.0, 9.0]), n_probes=64, n_steps=40)
    assert density.share(0, 2).value == pytest.approx(0.5, abs=3 * density.share(0, 2).stderr)
    used = density.weights > 1e-9
    assert torch.isclose(density.nodes[used][:, None], torch.tensor([1.0, 5.0, 9.0], dtype=torch.float64)).any(1).all()


class Stops:
    "A matrix that fails at its n-th product, once"

    def __init__(self, A, n): self.A, self.shape, self.dtype, self.device, self.n = A, A.shape, A.dtype, A.device, n

    def __matmul__(self, v):
        self.n -= 1
        if not self.n: raise KeyboardInterrupt
        return self.A @ v


@pytest.mark.parametrize("measure", [lambda A, f: top_eigenpairs(A, k=3, tol=1e-6, checkpoint=f)[0], lambda A,
    f: torch.tensor(trace(A, 60, checkpoint=f).value),
                                     lambda A, f: diagonal(A, 90, checkpoint=f).value, lambda A, f: spectral_density(A, n_probes=16, n_steps=5,
                                         checkpoint=f).nodes])
def test_goes_on_from_a_file(measure, tmp_path, monkeypatch):
    import gausssafe.spectrum as spectrum
    init = spectrum._State.__init__
    monkeypatch.setattr(spectrum._State, "__init__", lambda self, *args, **settings: init(self, *args, **{"every_s": 0, **settings}))
    A, file, calls = symmetric(SPECTRA["outliers"]), tmp_path / "state.pt", []
    whole = Stops(A, 10**9)
    expected = measure(whole, None)
    interrupted = Stops(A, n := 8)
    with pytest.raises(KeyboardInterrupt): measure(interrupted, file)
    assert file.exists()
    rest = Stops(A, 10**9)
    torch.testing.assert_close(measure(rest, file), expected, rtol=1e-5, atol=1e-8)
    assert 10**9 - rest.n < 10**9 - whole.n and calls == [] and n == 8
    with pytest.raises(InvalidInput, match="state.pt holds a computation of"): measure(torch.eye(299), file)


def test_a_file_of_another_matrix_is_refused(tmp_path):
    A = symmetric(SPECTRA["two signs"])
    import gausssafe.spectrum as spectrum
    matrix = spectrum._Matrix(A, None)
    lanczos = spectrum._Lanczos(matrix, 36, {})
    lanczos.start(0)
    for _ in range(9): lanczos.grow(1)
    spectrum._State(tmp_path / "s.pt", matrix, k=4, which="LA", seed=0, basis_size=36).save(lanczos.values, now=True)
    with pytest.raises(InvalidInput, match="belongs to another matrix"): top_eigenpairs(2 * A, k=4, checkpoint=tmp_path / "s.pt")


def test_limit_holds_for_a_hessian():
    "Basis, products and probes together; a smaller basis restarts and finds the same"
    import cases

    from gausssafe.hvp import HessianOperator
    torch.manual_seed(0)
    model, ids = cases.GPT(13, 8, 12, 1, 1), torch.randint(13, (3, 9))
    params = list(model.parameters())
    d = sum(p.numel() for p in params)
    def operator(limit): return HessianOperator(model, cases.lm_loss, params, [(ids[:, :-1], ids[:, 1:])], memory_limit=limit)
    free, _, info = top_eigenpairs(operator("50MB"), k=2)
    assert info.n_restarts == 0
    for limit in (24 * 4 * d,):
        H = operator(limit)
        with count_tensor_bytes() as counted: values, _, info = top_eigenpairs(H, k=2, max_products=60)
        assert counted.peak_bytes <= limit and H.limit_bytes == limit and info.basis_size < 28
        torch.testing.assert_close(values, free, rtol=1e-2, atol=0)
        with count_tensor_bytes() as counted: estimate = trace(H, 12)
        assert counted.peak_bytes <= limit and estimate.n_products == 12
        for measure in (lambda H: diagonal(H, 12), lambda H: spectral_density(H, n_probes=4, n_steps=3)):
            with count_tensor_bytes() as counted: measure(H)
            assert counted.peak_bytes <= limit
    with pytest.raises(MemoryBudgetExceeded, match=r"the Lanczos basis: 9 vectors of .* beside a product needs .*Use memory_limit="):
        top_eigenpairs(operator(6 * 4 * d), k=2)


def test_bad_input():
    A = torch.eye(10)
    for call, message in ((lambda: top_eigenpairs(A, k=11), "k is a count from 1 to 10, not 11"),
            (lambda: top_eigenpairs(A, which="XX"), "which is one of LA, SA, LM, BE"),
                          (lambda: trace(torch.ones(3, 4)), r"has shape \(3, 4\)"), (lambda: trace("A"), "has shape"), (lambda: trace(A, 3),
                              "at least 4, not 3"),
                          (lambda: diagonal(A, 5), "at least 6, not 5"), (lambda: spectral_density(A, n_probes=0), "n_probes=0")):
        with pytest.raises(InvalidInput, match=message): call()
    with pytest.raises(NotFinite, match="a product: 10 of 10"): top_eigenpairs(torch.full((10, 10), torch.nan), k=2)
    assert np.isclose(float(trace(torch.zeros(50, 50), 10)), 0) and float(top_eigenpairs(torch.zeros(50, 50), k=2)[0].abs().max()) == 0
