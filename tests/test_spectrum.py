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


SPECTRA = {"decaying": 100 * 0.9 ** torch.arange(300.0), "two signs": torch.linspace(-50, 80, 300), "low rank": torch.cat([torch.arange(1.0, 9.0), torch.zeros(292)]),
           "outliers": torch.cat([torch.linspace(0, 1, 290), torch.linspace(10, 50, 8), torch.tensor([-20.0, -30.0])]), "few": torch.arange(1.0, 6.0)}


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("basis_size", [None, 12])
def test_eigenpairs(name, which, basis_size):
    A, values = symmetric(SPECTRA[name]), SPECTRA[name].double()
    order = {"LA": values.sort(descending=True)[0][:4], "SA": values.sort()[0][:4], "LM": values[values.abs().sort(descending=True)[1]][:4],
             "BE": torch.cat([values.sort(descending=True)[0][:2], values.sort(descending=True)[0][-2:]])}[which]
    found, vectors, info = top_eigenpairs(A, k=4, which=which, tol=1e-8, basis_size=basis_size, max_products=3000)
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
