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


MEASURES = {"pairs": lambda A, **how: top_eigenpairs(A, k=3, **how), "trace": lambda A, **how: trace(A, 30, **how),
            "diagonal": lambda A, **how: diagonal(A, 40, **how), "density": lambda A, **how: spectral_density(A, n_probes=9, n_steps=6, **how)}


@pytest.fixture
def eager(monkeypatch):
    "Checkpoints are written at every chance"
    import gausssafe.spectrum as spectrum
    init = spectrum._State.__init__
    monkeypatch.setattr(spectrum._State, "__init__", lambda self, *args, **settings: init(self, *args, **{"every_s": 0, **settings}))


@pytest.mark.parametrize("other", ["scaled", "shifted", "a rank-one change of 0.1 %"])
@pytest.mark.parametrize("name", MEASURES)
def test_a_file_is_tied_to_its_matrix(name, other, tmp_path, eager):
    A = symmetric(SPECTRA["outliers"])
    u = torch.nn.functional.normalize(torch.randn(300, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), dim=0)
    B = {"scaled": 3 * A, "shifted": A + 0.01 * torch.eye(300), "a rank-one change of 0.1 %": A + 0.05 * torch.outer(u, u)}[other]
    MEASURES[name](A, checkpoint=tmp_path / "s.pt")
    MEASURES[name](A * (1 + 1e-14), checkpoint=tmp_path / "s.pt")  # Round-off is no other matrix
    with pytest.raises(InvalidInput, match=r"s.pt belongs to another matrix: a product .* Name another file, or delete it"):
        MEASURES[name](B, checkpoint=tmp_path / "s.pt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_computed_another_way_is_the_same(dtype, tmp_path, eager):
    A = symmetric(SPECTRA["outliers"]).to(dtype)
    class Pieces:
        shape, device = A.shape, A.device
        def __matmul__(self, V): return A[:, :100] @ V[:100] + A[:, 100:] @ V[100:]
    Pieces.dtype = dtype
    trace(A, 30, checkpoint=tmp_path / "s.pt")
    assert trace(Pieces(), 30, checkpoint=tmp_path / "s.pt").n_products < 30


@pytest.mark.parametrize("name", MEASURES)
def test_a_damaged_or_foreign_file_and_a_missing_folder_are_refused(name, tmp_path, eager):
    A, file = symmetric(SPECTRA["outliers"]), tmp_path / "s.pt"
    MEASURES[name](A, checkpoint=file)
    whole = file.read_bytes()
    for content in (whole[:500], whole[:-100], b"", b"text"):
        file.write_bytes(content)
        with pytest.raises(InvalidInput, match="s.pt is truncated or holds no computation to go on with: name another file"):
            MEASURES[name](A, checkpoint=file)
    for content in ({"a": 1}, torch.ones(3), [1], {"key": 1, "values": {}}):
        torch.save(content, file)
        with pytest.raises(InvalidInput, match="s.pt is truncated or holds no computation"): MEASURES[name](A, checkpoint=file)
    never = Stops(A, 1)
    for path in (tmp_path / "no/such/s.pt", file / "s.pt"):
        with pytest.raises(InvalidInput, match="no checkpoint can be written to .*: name another file"): MEASURES[name](never, checkpoint=path)
    assert never.n == 1 and [p.name for p in tmp_path.iterdir()] == ["s.pt"]


@pytest.mark.parametrize("n", range(3, 21, 2))
def test_pairs_go_on_from_any_product(n, tmp_path, eager):
    "A full basis, too, whose residual is not in the file"
    A = symmetric(SPECTRA["outliers"])
    how = dict(k=3, basis_size=8, tol=1e-6)
    with pytest.raises(KeyboardInterrupt): top_eigenpairs(Stops(A, n), checkpoint=tmp_path / "s.pt", **how)
    torch.testing.assert_close(top_eigenpairs(A, checkpoint=tmp_path / "s.pt", **how)[0], top_eigenpairs(A, **how)[0])


class Diagonal:
    "Plain: no limit of its own, no plan"
    def __init__(self, d): self.values, self.shape, self.dtype, self.device = 10 * torch.linspace(0, 1, d) ** 4, (d, d), torch.float32, "cpu"
    def __matmul__(self, V): return self.values.view(-1, *[1] * (V.ndim - 1)) * V


@pytest.mark.parametrize("n_vectors", [14, 20, 37])
@pytest.mark.parametrize("name", MEASURES)
def test_limit_holds_for_a_plain_operator_and_its_checkpoint(name, n_vectors, tmp_path, eager):
    d = 5000
    A, limit = Diagonal(d), n_vectors * 4 * d
    for checkpoint in (None, tmp_path / "s.pt", tmp_path / "s.pt"):
        with count_tensor_bytes() as counted: MEASURES[name](A, memory_limit=limit, checkpoint=checkpoint)
        assert counted.peak_bytes <= limit


@pytest.mark.parametrize("name", MEASURES)
def test_limit_that_holds_no_product(name):
    for A in (np.eye(50), np.eye(20)):  # The second is small enough to be computed exactly
        with pytest.raises(MemoryBudgetExceeded): MEASURES[name](A, memory_limit=100)


@pytest.mark.parametrize("n_vectors", [19, 33])
def test_limit_holds_for_a_hessian_of_layers(n_vectors):
    from torch import nn

    from gausssafe.hvp import HessianOperator
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 100), nn.LayerNorm(100), nn.GELU(), nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 5))
    params, d = list(model.parameters()), sum(p.numel() for p in model.parameters())
    H = HessianOperator(model, nn.functional.cross_entropy, params, [(torch.randn(24, 60), torch.randint(5, (24,)))], memory_limit=n_vectors * 4 * d)
    for measure in (lambda: trace(H, 20), lambda: diagonal(H, 20), lambda: spectral_density(H, n_probes=8, n_steps=3)):
        with count_tensor_bytes() as counted: measure()
        assert counted.peak_bytes <= H.limit_bytes


def test_an_estimate_prints():
    A = symmetric(SPECTRA["outliers"])
    assert str(trace(A, 30)).endswith("(xtrace, 30 products)") and " +- " in str(trace(A, 30))
    assert str(diagonal(A, 30)).startswith("300 values from ") and str(diagonal(A, 30)).endswith("(deflated, 30 products)")


def test_all_pairs_are_exact():
    values, vectors, info = top_eigenpairs(A := symmetric(SPECTRA["few"]), k=5)
    assert info.converged and info.n_products == 5
    torch.testing.assert_close(vectors * values @ vectors.T, A)


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
        assert counted.peak_bytes <= info.peak_bytes <= limit == H.limit_bytes and info.basis_size < 28
        torch.testing.assert_close(values, free, rtol=1e-2, atol=0)
        with count_tensor_bytes() as counted: estimate = trace(H, 12)
        assert counted.peak_bytes <= limit and estimate.n_products == 12
        with count_tensor_bytes() as counted: entries = diagonal(H, 12)
        assert counted.peak_bytes <= entries.peak_bytes <= limit
        with count_tensor_bytes() as counted: spectral_density(H, n_probes=4, n_steps=3)
        assert counted.peak_bytes <= limit
    with pytest.raises(MemoryBudgetExceeded, match=r"the Lanczos basis: 9 vectors of .* beside a product needs .*Use memory_limit="):
        top_eigenpairs(operator(6 * 4 * d), k=2)


def test_bad_input():
    A = torch.eye(10)
    for call, message in ((lambda: top_eigenpairs(A, k=11), "k is a count from 1 to 10, not 11"),
            (lambda: top_eigenpairs(A, which="XX"), "which is one of LA, SA, LM, BE"),
            (lambda: top_eigenpairs(A, k=3, max_products=3), "max_products is a count, for k=3 at least 4, not 3"),
            (lambda: top_eigenpairs(A, k=3, max_products=0), "max_products is a count"), (lambda: top_eigenpairs(A, k=3, basis_size=1),
                "basis_size is a count, for k=3 at least 5, not 1"),
            (lambda: top_eigenpairs(A, k=3, tol=-1), "tol is a number, at least 0, not -1"), (lambda: top_eigenpairs(A, k=3, tol=np.nan), "tol is"),
            (lambda: trace(A + 0j), "is real, and this Tensor is of torch.complex64"), (lambda: trace(np.eye(9) + 0j), "is of complex128"),
            (lambda: spectral_density(A, n_steps=1.5), "must be counts"),
                          (lambda: trace(torch.ones(3, 4)), r"has shape \(3, 4\)"), (lambda: trace("A"), "has shape"), (lambda: trace(A, 3),
                              "at least 4, not 3"),
                          (lambda: diagonal(A, 5), "at least 6, not 5"), (lambda: spectral_density(A, n_probes=0), "n_probes=0")):
        with pytest.raises(InvalidInput, match=message): call()
    with pytest.raises(NotFinite, match="a product: 10 of 10"): top_eigenpairs(torch.full((10, 10), torch.nan), k=2)
    assert np.isclose(float(trace(torch.zeros(50, 50), 10)), 0) and float(top_eigenpairs(torch.zeros(50, 50), k=2)[0].abs().max()) == 0


@pytest.mark.parametrize("which", ["LA", "LM", "BE"])
@pytest.mark.parametrize("values", [[5.0] * 3 + [1.0] * 27, [10.0, 8, 6, 4, 2] * 2 + [0.0] * 90, [-7.0, -6, 5] + [0.1] * 60, [2.0] * 30])
def test_equal_eigenvalues_are_all_there_where_the_basis_closes(values, which):
    rng = np.random.default_rng(0)
    Q, values = np.linalg.qr(rng.normal(size=(len(values),) * 2))[0], np.array(values)
    for k in (1, 3, 4):
        found, vectors, info = top_eigenpairs((Q * values) @ Q.T, k=k, which=which, seed=1)
        order = np.sort(values)[::-1]
        wanted = {"LA": order[:k], "LM": values[np.argsort(-abs(values), kind="stable")][:k],
                  "BE": np.r_[order[:(k + 1) // 2], order[len(order) - k // 2:]]}[which]
        np.testing.assert_allclose(np.sort(found.numpy()), np.sort(wanted), atol=1e-9)
        assert info.converged and abs(vectors.T @ vectors - torch.eye(k)).max() < 1e-9
