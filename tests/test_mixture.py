"Target distributions: densities, draws and refusals"
import dataclasses
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from gausssafe.errors import InvalidInput, NotFinite
from gausssafe.mixture import GaussianMixture, Points, UniformBox, grid, read_points, ring, two_gaussians, uniform_square

TARGETS = [two_gaussians(), uniform_square()]


@st.composite
def mixtures(draw):
    d, k = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    means = draw(st.lists(st.tuples(*[st.floats(-20, 20)] * d), min_size=k, max_size=k))
    parts = draw(st.lists(st.floats(0.1, 1), min_size=k, max_size=k))
    return GaussianMixture(tuple(means), std=draw(st.floats(0.2, 5)), weights=tuple(p / sum(parts) for p in parts))


@given(mixtures(), st.integers(0, 1000))
@settings(deadline=None, max_examples=50)
def test_density_agrees_with_torch_distributions(mixture, seed):
    means = torch.tensor(mixture.means, dtype=torch.float64)
    components = Independent(Normal(means, torch.full_like(means, mixture.std)), 1)
    reference = MixtureSameFamily(Categorical(torch.tensor(mixture.weights, dtype=torch.float64)), components)
    x = 10 * torch.randn(7, mixture.n_features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(mixture.log_prob(x), reference.log_prob(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_density_integrates_to_one(target):
    (x0, x1), (y0, y1) = ((low - 2, high + 2) for low, high in target.extent)
    u, v = (torch.linspace(a, b, 801, dtype=torch.float64) for a, b in ((x0, x1), (y0, y1)))
    mass = target.log_prob(torch.cartesian_prod(u, v)).exp().mean().item() * (x1 - x0) * (y1 - y0)
    assert mass == pytest.approx(1, abs=0.01)  # The square's edges fall between grid points


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_samples_have_the_moments_of_the_density(target):
    "Mean and covariance by quadrature against 40,000 draws"
    (x0, x1), (y0, y1) = ((low - 2, high + 2) for low, high in target.extent)
    grid = torch.cartesian_prod(*(torch.linspace(a, b, 801, dtype=torch.float64) for a, b in ((x0, x1), (y0, y1))))
    p = target.log_prob(grid).exp()
    p = p / p.sum()
    x = target.sample(40_000, seed=5).double()
    mean, cov = p @ grid, (grid.T * p) @ grid
    assert torch.allclose(x.mean(0), mean, atol=0.15) and torch.allclose(x.T @ x / len(x), cov, rtol=0.03, atol=0.5)


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_draws_are_float32_seeded_and_leave_the_global_generator_alone(target):
    before = torch.get_rng_state()
    a, b = target.sample(100, seed=3), target.sample(100, seed=3)
    assert a.dtype == torch.float32 and a.shape == (100, 2) and torch.equal(a, b)
    generator = torch.Generator().manual_seed(3)
    first, second = target.sample(100, generator=generator), target.sample(100, generator=generator)
    assert torch.equal(first, a) and not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_log_prob_keeps_the_dtype(target, dtype):
    assert target.log_prob(target.sample(5).to(dtype)).dtype == dtype


def test_far_away_is_a_small_number_and_outside_is_minus_infinity():
    far = torch.tensor([[1000.0, 5.0]], dtype=torch.float64)
    assert two_gaussians().log_prob(far).item() == pytest.approx(-math.log(4 * math.pi) - 995**2 / 2)
    edge = torch.tensor([[10.0, 10.0], [10.001, 0.0], [math.inf, 0.0]])
    assert uniform_square().log_prob(edge).tolist() == [pytest.approx(-math.log(400)), -math.inf, -math.inf]


def test_gradients_reach_the_points():
    x = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    two_gaussians().log_prob(x + torch.tensor([-4.0, 5.0])).sum().backward()
    assert torch.allclose(x.grad, torch.tensor([-1.0, 0.0], dtype=torch.float64).expand(3, 2), atol=1e-6)


def test_entropy_says_how_it_was_found():
    assert uniform_square().entropy().method == GaussianMixture(((0.0, 0.0),)).entropy().method == "closed form"
    monte_carlo = two_gaussians().entropy(n=20_000, seed=1)
    assert monte_carlo.method == "Monte Carlo, 20,000 points, seed 1"
    assert abs(float(monte_carlo) - math.log(4 * math.pi * math.e)) < 4 * monte_carlo.stderr


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_frozen_hashable_and_pickled(target):
    assert pickle.loads(pickle.dumps(target)) == target and len({target, target}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError): target.name = "other"


@pytest.mark.parametrize(("call", "says"), [
    (lambda: two_gaussians().sample(0), "n is a count of samples, at least 1, not 0"),
    (lambda: two_gaussians().sample(2.5), "not 2.5"),
    (lambda: two_gaussians().sample(True), "not True"),
    (lambda: uniform_square().log_prob(torch.zeros(4)), r"shape \(n, 2\), not \(4,\)"),
    (lambda: uniform_square().log_prob(torch.zeros(4, 3)), r"not \(4, 3\)"),
    (lambda: uniform_square().log_prob(torch.zeros(4, 2, dtype=torch.long)), "floating-point.*int64"),
    (lambda: uniform_square().log_prob([[0.0, 0.0]]), "not list"),
    (lambda: GaussianMixture(()), "one tuple of coordinates a component"),
    (lambda: GaussianMixture(((0.0,), (0.0, 1.0))), "all of one length"),
    (lambda: GaussianMixture(((math.nan, 0.0),)), "not finite"),
    (lambda: GaussianMixture(((0.0, 0.0),), std=0.0), "std is a positive number, not 0"),
    (lambda: GaussianMixture(((0.0, 0.0),), weights=(0.5, 0.5)), "1 means need 1 weights, not 2"),
    (lambda: GaussianMixture(((0.0,), (1.0,)), weights=(1.2, -0.2)), "positive and sum to 1"),
    (lambda: UniformBox((0.0, 0.0), (1.0, 0.0)), "low is below high"),
    (lambda: UniformBox((0.0,), (1.0, 1.0)), "low is below high"),
])
def test_refusals(call, says):
    with pytest.raises(InvalidInput, match=says): call()


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_nan_is_counted(target):
    with pytest.raises(NotFinite, match="points: 2 of 6 values"): target.log_prob(torch.tensor([[math.nan, 0.0], [0.0, 0.0], [1.0, math.nan]]))


def test_many_modes():
    assert torch.tensor(ring(5, radius=3).means).norm(dim=1).tolist() == pytest.approx([3] * 5) and len(ring().means) == 8
    assert sorted(grid(2, spacing=2).means) == [(-1, -1), (-1, 1), (1, -1), (1, 1)]


@pytest.mark.parametrize(("text", "error", "says"), [
    ("", InvalidInput, "is no table of numbers"), ("1,2\n3,4,5\n", InvalidInput, "is no table of numbers"), ("x,y\n", InvalidInput, "not empty"),
    ("1,2\n3,four\n", InvalidInput, "'four' in line 2, column 2, is not a number"), ("a,b\n1,2\nnan,4\n", NotFinite, "target p.csv: 1 of 4 values"),
    ("1,2\n3,inf\n", NotFinite, "1 of 4 values")])
def test_bad_tables_are_told(tmp_path, text, error, says):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(error, match=says): read_points(tmp_path / "p.csv")


def test_points_of_ones_own(tmp_path):
    with pytest.raises(InvalidInput, match="there is no file"): read_points(tmp_path / "gone.csv")
    for bad in ([[1.0]], torch.zeros(3), torch.zeros(0, 2), torch.zeros(3, 2, dtype=torch.long)):
        with pytest.raises(InvalidInput, match="a target is a floating-point tensor"): Points(bad)
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    drawn = Points(x).sample(50, seed=1)
    assert torch.equal(drawn.sort(0).values, x.sort(0).values) and torch.equal(Points(x).sample(9, seed=2), Points(x).sample(9, seed=2))
    with pytest.raises(InvalidInput, match="51 different points cannot be drawn from 50"): Points(x).sample(51)
    (tmp_path / "p.csv").write_text("\n".join(",".join(map(repr, row)) for row in x.double().tolist()))
    assert torch.equal(read_points(tmp_path / "p.csv").points, x)
