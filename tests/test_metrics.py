"Metrics: agreement with slow references, bounded memory, calibrated errors, refusals"
import dataclasses
import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gausssafe import metrics
from gausssafe.errors import InvalidInput, MemoryBudgetExceeded, NotFinite
from gausssafe.memory import count_tensor_bytes
from gausssafe.mixture import GaussianMixture, Points, grid, two_gaussians, uniform_square

MIXTURE = two_gaussians()


def cloud(n, d=2, seed=0, scale=1.0, offset=0.0):
    return offset + scale * torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@st.composite
def pairs_of_clouds(draw):
    "Two clouds: any scale and offset, duplicates, one and two points, one to three dimensions"
    d, scale, offset = draw(st.sampled_from([1, 2, 2, 2, 3])), 10.0 ** draw(st.integers(-3, 3)), draw(st.sampled_from([0.0, 1.0, -1e4]))
    n, m = draw(st.integers(2, 70)), draw(st.integers(2, 400))
    x = cloud(n, d, draw(st.integers(0, 99)), scale, offset)
    y = cloud(m, d, draw(st.integers(100, 199)), scale, offset + scale * draw(st.sampled_from([0.0, 1.0, 8.0])))
    if draw(st.booleans()): x = x[torch.arange(n) // 2]
    if draw(st.booleans()): y[: m // 3] = y[0].clone()
    return x.to(draw(st.sampled_from([torch.float32, torch.float64]))), y, scale


@given(pairs_of_clouds(), st.sampled_from([1e-3, 0.1, 1.0, 10.0, 1e6]))
@settings(deadline=None, max_examples=150)
def test_mmd_equals_the_naive_sums(clouds, relative_gamma):
    x, y, scale = clouds
    score = metrics.mmd(x, y, gamma=relative_gamma / scale**2)
    squared = reference.squared_mmd(x.double().numpy(), y.numpy(), relative_gamma / scale**2)
    assert score.value**2 == pytest.approx(squared, rel=1e-9, abs=1e-12)  # 1e-12 of kernel values up to 1: rounding of the three sums
    assert score.value >= 0 and score.stderr >= 0


@given(pairs_of_clouds())
@settings(deadline=None, max_examples=60)
def test_multiscale_equals_the_naive_sums(clouds):
    x, y, _ = clouds
    median = reference.median_squared_distance(y.numpy())
    if median == 0:
        with pytest.raises(InvalidInput, match="mostly duplicates"): metrics.mmd_multiscale(x, y)
        return
    gammas = [1 / (2 * median * f) for f in (0.1, 0.5, 1, 2, 5)]
    assert metrics.mmd_multiscale(x, y).value == pytest.approx(reference.unbiased_mmd(x.double().numpy(), y.numpy(), gammas), rel=1e-9, abs=1e-12)


@given(st.floats(-4, 3), st.floats(0, 4), st.floats(0, 4), st.integers(0, 10**6))
@example(0.0, 0.0, 0.0, 0)
@settings(deadline=None, max_examples=60)
def test_features_are_exact_wherever_they_claim_to_hold(log_gamma, log_width, log_height, seed):
    gamma = 10**log_gamma
    half_width = tuple(0.3 * w / math.sqrt(gamma) for w in (log_width, log_height))  # Up to a box of 2.4 bandwidths; zero is a line or a point
    features = metrics.KernelFeatures(gamma, half_width)
    rng = np.random.default_rng(seed)
    box = torch.tensor(rng.uniform(-1, 1, (10, 2)) * half_width)
    around = torch.tensor(rng.uniform(-1, 1, (10, 2)) * (np.array(half_width) + features.reach))
    assert features.covers(around) and not features.covers(around + 2 * (features.reach + sum(half_width)))
    points = torch.cat([box, around])  # 20 points: a group each
    ours = metrics._embed(points, features)
    plain = torch.exp(-gamma * ((points[:, None] - points[None]) ** 2).sum(-1))
    assert (ours @ ours.T - plain).abs().max() < 1e-12


def test_both_engines_and_every_tile_give_one_number():
    x, y = MIXTURE.sample(150, seed=1), MIXTURE.sample(4000, seed=2)
    plain = metrics.mmd(x, y, gamma=0.05)
    far = torch.cat([x, torch.tensor([[1e3, 1e3]])])
    assert plain.plan.engine == "features" and metrics.mmd(far, y, gamma=0.05).plan.engine == "pairs"
    tight = metrics.mmd(x, y, gamma=0.05, memory_limit="400kB")
    assert tight.plan.engine == "pairs" and tight.plan.n_chunks > plain.plan.n_chunks
    assert tight.value == pytest.approx(plain.value, rel=1e-9) and tight.stderr == pytest.approx(plain.stderr, rel=1e-9)
    squared = reference.squared_mmd(far.double().numpy(), y.double().numpy(), 0.05)
    assert metrics.mmd(far, y, gamma=0.05).value == pytest.approx(math.sqrt(squared), rel=1e-9)


def test_a_prepared_target_gives_the_cold_number_and_is_not_changed_from_outside():
    x, y = MIXTURE.sample(100, seed=1), MIXTURE.sample(3000, seed=2)
    target = metrics.Target(y)
    cold = metrics.mmd(x, y).value, metrics.mmd_multiscale(x, y).value, metrics.wasserstein(x, y).value, metrics.kl_histogram(x, y).value
    y += 100
    for _ in range(2):
        assert (metrics.mmd(x, target).value, metrics.mmd_multiscale(x, target).value, metrics.wasserstein(x, target).value,
                metrics.kl_histogram(x, target).value) == cold
    wide = x * 50
    assert metrics.mmd(wide, target).value == pytest.approx(metrics.mmd(wide, y - 100).value, rel=1e-5)  # y + 100 - 100 rounds


@pytest.mark.parametrize("name", ["mmd", "mmd_multiscale", "wasserstein"])
@pytest.mark.parametrize(("n", "m", "d", "scale"), [
    (500, 20_000, 2, 1.0), (500, 3000, 2, 1e3), (37, 5001, 2, 1.0), (700, 900, 3, 1.0), (1200, 300, 1, 1.0), (3, 2, 2, 1.0)])
def test_bytes_are_predicted_and_kept(name, n, m, d, scale):
    metric = getattr(metrics, name)
    x, y = cloud(n, d, 1, scale).float(), cloud(m, d, 2, scale).float()
    target = metrics.Target(y)
    for side in (y, target, target):
        promised = metrics.estimate_bytes(name, x, side) if side is y else None
        with count_tensor_bytes() as counted: score = metric(x, side)
        assert counted.peak_bytes <= score.plan.predicted_bytes <= score.plan.limit_bytes == 50_000_000
        assert counted.peak_bytes >= 0.95 * score.plan.predicted_bytes - 16_384  # The allowance for small things
        if promised: assert promised == score.plan.predicted_bytes


@pytest.mark.parametrize("limit", ["500kB", "1500kB", "10MB", 10**9])
def test_a_limit_changes_the_plan_not_the_number(limit):
    x, y = cloud(200, seed=1), cloud(4000, seed=2)
    with count_tensor_bytes() as counted: score = metrics.mmd(x, y, memory_limit=limit)
    assert counted.peak_bytes <= score.plan.predicted_bytes <= score.plan.limit_bytes
    assert score.value == pytest.approx(metrics.mmd(x, y).value, rel=1e-9)


def test_a_limit_too_small_is_refused_with_the_numbers():
    x, y = cloud(500), cloud(20_000)
    with pytest.raises(MemoryBudgetExceeded, match=r"comparing 500 samples with 20,000 points needs 1.* of the 100 kB budget is left") as caught:
        metrics.mmd(x, y, memory_limit="100kB")
    assert caught.value.needed_bytes > caught.value.limit_bytes == 100_000
    with pytest.raises(MemoryBudgetExceeded, match="median of 1,999,000 squared distances needs 16"): metrics.mmd_multiscale(x, y, memory_limit="2MB")
    with pytest.raises(MemoryBudgetExceeded, match="assigning 500 points needs 2.*fewer n_points"): metrics.wasserstein(x, y, memory_limit="1MB")
    assert metrics.wasserstein(x, y, n_points=100, memory_limit="1MB").value > 0


def test_mmd_none_means_what_the_machine_has_left():
    score = metrics.mmd(cloud(50), cloud(60), memory_limit=None)
    assert score.plan.limit_bytes > 10**8


@pytest.mark.parametrize("n", [2, 4, 6])
def test_wasserstein_is_the_cheapest_assignment(n):
    x, y = cloud(n, seed=n), cloud(n, seed=50 + n)
    assert metrics.wasserstein(x, y).value == pytest.approx(reference.cheapest_assignment(x.numpy(), y.numpy()), rel=1e-12)


@given(st.integers(1, 3), st.integers(1, 60), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_wasserstein_of_a_shift_is_its_length(d, n, seed):
    x, shift = cloud(n, d, seed), cloud(1, d, seed + 1)
    assert metrics.wasserstein(x + shift, x).value == pytest.approx(shift.norm().item(), rel=1e-9)


def test_wasserstein_sees_what_no_axis_shows():
    "The same marginals, another dependence: a per-axis distance is zero"
    z = torch.randn(400, generator=torch.Generator().manual_seed(0))
    assert metrics.wasserstein(torch.stack([z, z], 1), torch.stack([z, -z], 1)).value > 0.5


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_kl_divergence_of_gaussians_in_closed_form(scale):
    mixture, d = GaussianMixture(((3.0, -2.0),), std=1.0, name="unit"), 2
    x = (mixture.sample(8000, seed=1) - torch.tensor(mixture.means)) * scale + torch.tensor(mixture.means)
    score = metrics.kl_divergence(x, mixture)
    assert abs(score.value - d * (scale**2 / 2 - 0.5 - math.log(scale))) < 4 * score.stderr + 0.03  # 0.03: the estimator's bias in the tails
    assert metrics.kl_divergence(x, mixture, n_neighbors=3).value == pytest.approx(score.value, abs=0.08)


def test_kl_has_the_sign_it_should():
    "Worse samples score higher; a forgotten mode costs log 2"
    good, wide = MIXTURE.sample(4000, seed=1), GaussianMixture(MIXTURE.means, std=2.0).sample(4000, seed=2)
    one = GaussianMixture(MIXTURE.means[:1]).sample(4000, seed=3)
    scores = [metrics.kl_divergence(x, MIXTURE) for x in (good, wide, one)]
    assert abs(scores[0].value) < 0.05 and scores[1].value > 1
    assert scores[2].value == pytest.approx(math.log(2), abs=0.08)


@pytest.mark.parametrize(("x", "mixture"), [
    (torch.full((20, 2), 3.0), MIXTURE), (torch.cat([uniform_square().sample(50), torch.tensor([[10.5, 0.0]])]), uniform_square())])
def test_true_infinities(x, mixture):
    score = metrics.kl_divergence(x, mixture)
    assert (score.value, score.stderr) == (math.inf, math.inf)
    assert math.isfinite(metrics.kl_histogram(x, mixture.sample(1000)).value)


def test_log_likelihood_and_its_infinity():
    x = uniform_square().sample(50)
    assert metrics.log_likelihood(x, uniform_square()).value == pytest.approx(-math.log(400))
    score = metrics.log_likelihood(torch.cat([x, torch.tensor([[0.0, 11.0]])]), uniform_square())
    assert (score.value, score.stderr) == (-math.inf, math.inf)
    y = MIXTURE.sample(500)
    assert metrics.log_likelihood(y, MIXTURE).value == pytest.approx(MIXTURE.log_prob(y.double()).mean().item(), rel=1e-12)


def test_histogram_by_hand():
    "Four cells of a box from 0 to 2; one sample in each of two cells and two outside"
    y = torch.tensor([[0.0, 0.0], [2.0, 2.0], [0.5, 1.5], [1.5, 0.5]])
    x = torch.tensor([[0.2, 0.2], [1.9, 1.9], [5.0, 0.0], [0.0, -1.0]])
    q = np.array([1.5, 1.5, 0.5]) / 6.5
    assert metrics.kl_histogram(x, y, bins=2).value == pytest.approx(sum(p * math.log(p / r) for p, r in zip((0.25, 0.25, 0.5), q, strict=True)))


@given(st.lists(st.floats(-5, 5, allow_subnormal=False), min_size=1, max_size=50))
def test_is_positive_counts_signs(values):
    x = torch.tensor([[v, -v] for v in values])
    expected = sum(1 if v >= 0 else -1 for v in x[:, 0].tolist()) / len(values)
    score = metrics.is_positive(x)
    assert score.value == pytest.approx(expected) and score.stderr > 0


GENERATORS = {"perfect": MIXTURE, "shifted": GaussianMixture(((-4.0, 5.0), (5.5, 5.0))),
              "lopsided": GaussianMixture(MIXTURE.means, weights=(0.8, 0.2)), "wide": GaussianMixture(MIXTURE.means, std=1.6)}


@pytest.mark.slow
@pytest.mark.parametrize("name", GENERATORS)
def test_standard_errors_are_calibrated(name):
    "For samples that match the target the errors of the MMDs are on the safe side: the positive part of a variance is taken"
    check_calibration(GENERATORS[name], n_draws=200, low=0.75, high=1.9 if name == "perfect" else 1.5)


def test_standard_errors_are_calibrated_quickly():
    check_calibration(GENERATORS["shifted"], n_draws=40, low=0.6, high=1.6)


def check_calibration(generator, n_draws, low, high):
    "Root mean square of the claimed errors over the scatter of fresh draws of both clouds; 40 draws know the scatter to 11 %"
    scores = []
    for seed in range(n_draws):
        x, target = generator.sample(300, seed=10_000 + seed), metrics.Target(MIXTURE.sample(1500, seed=20_000 + seed))
        scores.append([metrics.mmd(x, target), metrics.mmd_multiscale(x, target), metrics.wasserstein(x, target, n_points=200),
                       metrics.kl_histogram(x, target), metrics.kl_divergence(x, MIXTURE), metrics.log_likelihood(x, MIXTURE),
                       metrics.is_positive(x)])
    for column in zip(*scores, strict=True):
        ratio = math.sqrt(np.mean([s.stderr**2 for s in column])) / np.std([s.value for s in column], ddof=1)
        assert low < ratio < high, f"{column[0].name}: claimed over true error {ratio:.2f}"


def test_multiscale_is_unbiased():
    "Over draws of perfect samples the mean is zero, to its own standard error"
    values = [metrics.mmd_multiscale(MIXTURE.sample(60, seed=i), MIXTURE.sample(150, seed=1000 + i)).value for i in range(100)]
    assert abs(np.mean(values)) < 4 * np.std(values, ddof=1) / 10 and min(values) < 0


def test_too_few_points_for_an_error_say_so():
    x, y = cloud(2), cloud(50, seed=1)
    assert metrics.mmd(x, y).stderr == math.inf and metrics.wasserstein(x, y).stderr == math.inf
    assert metrics.mmd(cloud(1), y).value > 0 and metrics.log_likelihood(cloud(1), MIXTURE).stderr == math.inf


def test_identical_clouds_are_at_distance_zero():
    y = cloud(400)
    assert metrics.mmd(y, y).value == pytest.approx(0, abs=1e-6) and metrics.wasserstein(y, y).value == 0
    assert math.isfinite(metrics.mmd(y, y).stderr)


def test_scores_are_frozen_and_say_what_they_are():
    score = metrics.mmd(cloud(20), cloud(30), gamma=2.5)
    assert "kernel exp(-2.5 |x-y|^2)" in score.definition and float(score) == score.value and str(score).startswith("mmd ")
    with pytest.raises(dataclasses.FrozenInstanceError): score.value = 0.0


def test_global_state_is_left_alone():
    before = torch.get_rng_state()
    x, y = cloud(50), cloud(100)
    for metric in (metrics.mmd, metrics.mmd_multiscale, metrics.wasserstein, metrics.kl_histogram): metric(x, y)
    assert torch.equal(torch.get_rng_state(), before) and torch.get_default_dtype() == torch.float32


def test_gradients_do_not_leak():
    x = cloud(30).requires_grad_()
    assert isinstance(metrics.mmd(x, cloud(40)).value, float) and x.grad is None


METRICS_OF_TARGET = [metrics.mmd, metrics.mmd_multiscale, metrics.wasserstein, metrics.kl_histogram, metrics.sliced_wasserstein,
                     metrics.wasserstein_axes]


@pytest.mark.parametrize("metric", METRICS_OF_TARGET, ids=lambda f: f.__name__)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_never_become_a_metric(metric, bad):
    x, y = cloud(10), cloud(20)
    x[0, 1] = x[3, 0] = y[5, 0] = bad
    with pytest.raises(NotFinite, match="samples: 2 of 20 values") as caught: metric(x, cloud(20))
    assert (caught.value.n_bad, caught.value.n_total) == (2, 20)
    with pytest.raises(NotFinite, match="target: 1 of 40 values"): metric(cloud(10), y)


@pytest.mark.parametrize("metric", [lambda x: metrics.kl_divergence(x, MIXTURE), lambda x: metrics.log_likelihood(x, MIXTURE), metrics.is_positive])
def test_nan_in_the_other_metrics(metric):
    x = cloud(10)
    x[0, 0] = math.nan
    with pytest.raises(NotFinite, match="samples: 1 of 20 values"): metric(x)


@pytest.mark.parametrize(("call", "says"), [
    (lambda: metrics.mmd(cloud(5, 3), cloud(5, 2)), r"samples have shape \(n, 2\)"),
    (lambda: metrics.mmd(cloud(5)[:, 0], cloud(5)), r"not \(5,\)"),
    (lambda: metrics.mmd(cloud(5)[:0], cloud(5)), "n >= 1"),
    (lambda: metrics.mmd([[0.0, 1.0]], cloud(5)), "not list"),
    (lambda: metrics.mmd(torch.zeros(5, 2, dtype=torch.long), cloud(5)), "floating-point tensor, not torch.int64"),
    (lambda: metrics.mmd(cloud(5), cloud(5), gamma=0), "gamma is a positive number, not 0"),
    (lambda: metrics.mmd(cloud(5), cloud(5), gamma=math.nan), "gamma is a positive number"),
    (lambda: metrics.mmd(cloud(5), cloud(5), memory_limit="2 gigs"), "2 gigs"),
    (lambda: metrics.mmd_multiscale(cloud(1), cloud(5)), "n >= 2"),
    (lambda: metrics.mmd_multiscale(cloud(5), cloud(1)), "at least 2 points"),
    (lambda: metrics.mmd_multiscale(cloud(5), torch.ones(9, 2)), "mostly duplicates"),
    (lambda: metrics.wasserstein(cloud(5), cloud(5), n_points=0), "n_points is a count"),
    (lambda: metrics.kl_divergence(cloud(5), MIXTURE), "n >= 6"),
    (lambda: metrics.kl_divergence(cloud(9, 3), MIXTURE), r"shape \(n, 2\)"),
    (lambda: metrics.kl_divergence(cloud(9), MIXTURE, n_neighbors=0), "n_neighbors is a count"),
    (lambda: metrics.kl_histogram(cloud(9), cloud(9), bins=0), "bins is a count"),
    (lambda: metrics.kl_histogram(cloud(9), cloud(9), bins=1001), "more than 10.6 cells"),
    (lambda: metrics.log_likelihood(cloud(9, 1), MIXTURE), r"shape \(n, 2\)"),
    (lambda: metrics.kl_divergence(cloud(9), metrics.Target(cloud(9))), "a density is needed.*not Target"),
    (lambda: metrics.mmd_multiscale(cloud(9), cloud(9, scale=1e200)), "distance within the target is inf"),
    (lambda: metrics.estimate_bytes("mdm", cloud(9), cloud(9)), "there is no metric to plan 'mdm': did you mean 'mmd'?"),
    (lambda: metrics.wasserstein(cloud(5), cloud(5), order=3), "order is 1 or 2, not 3"),
    (lambda: metrics.sliced_wasserstein(cloud(5), cloud(5), n_projections=0), "n_projections is a count"),
    (lambda: metrics.wasserstein_axes(cloud(5, 3), cloud(5)), r"samples have shape \(n, 2\)"),
    (lambda: metrics.kl_kde(cloud(2), MIXTURE), "n >= 3"),
    (lambda: metrics.modes(cloud(5), uniform_square()), "modes need a GaussianMixture, not UniformBox"),
    (lambda: metrics.measure(("wassersten",), cloud(9), metrics.Target(cloud(9)), MIXTURE), "no metric 'wassersten': did you mean 'wasserstein'?"),
    (lambda: metrics.measure(("kl_kde",), cloud(9), metrics.Target(cloud(9)), Points(cloud(9))), "kl_kde needs a target whose density is known"),
    (lambda: metrics.Target(cloud(9)[0]), r"target have shape \(n, d\)"),
])
def test_refusals(call, says):
    with pytest.raises(InvalidInput, match=says): call()


def test_overflow_is_reported_too():
    huge = torch.tensor([[-1e308, 0.0], [1.7e308, 0.0]], dtype=torch.float64)
    with pytest.raises(NotFinite, match="distances from the target's centre: 2 of 4 values"): metrics.mmd(cloud(5), huge)
    with pytest.raises(NotFinite, match="kernel sums"): metrics.mmd(cloud(5, scale=1e200), cloud(5), gamma=1e300)
    with pytest.raises(NotFinite, match="distances: "): metrics.wasserstein(cloud(5, scale=1e300), cloud(5))


def test_a_sweep_of_kernels_does_not_grow_the_target_for_ever():
    x, target = cloud(10), metrics.Target(cloud(50))
    for gamma in range(1, 41): metrics.mmd(x, target, gamma=gamma)
    assert len(target._terms) == metrics.N_KERNELS
    assert metrics.mmd(x, target, gamma=1).value == metrics.mmd(x, cloud(50), gamma=1).value
    metrics.mmd_multiscale(x, target)
    assert metrics.mmd_multiscale(x, target).value == metrics.mmd_multiscale(x, cloud(50)).value


@given(st.integers(1, 25), st.integers(1, 25), st.sampled_from([1, 2]), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_along_a_line_as_by_replication(n, m, order, seed):
    "n points and m points: each repeated until both are n m, then matched in order"
    x, y = cloud(n, 1, seed), cloud(m, 1, seed + 1)
    a, b = x.flatten().sort().values.repeat_interleave(m), y.flatten().sort().values.repeat_interleave(n)
    assert metrics.wasserstein_axes(x, y, order=order).value == pytest.approx((a - b).abs().pow(order).mean().item() ** (1 / order), rel=1e-9)


@pytest.mark.parametrize("order", [1, 2])
def test_the_axes_agree_with_the_assignment_in_one_dimension(order):
    x, y = cloud(80, 1, 1), cloud(80, 1, 2)
    assert metrics.wasserstein_axes(x, y, order=order).value == pytest.approx(metrics.wasserstein(x, y, order=order).value, rel=1e-9)
    sliced = metrics.sliced_wasserstein(x, y, order=order, n_projections=3)
    assert sliced.value == pytest.approx(metrics.wasserstein(x, y, order=order).value, rel=1e-9)


def test_the_second_order_is_at_least_the_first():
    x, y = MIXTURE.sample(300, seed=1), MIXTURE.sample(300, seed=2)
    assert metrics.wasserstein(x, y, order=2).value >= metrics.wasserstein(x, y).value
    naive = reference.cheapest_assignment(x[:6].double().numpy(), y[:6].double().numpy(), order=2)
    assert metrics.wasserstein(x[:6], y[:6], order=2).value == pytest.approx(naive, rel=1e-6)


@pytest.mark.parametrize("limit", ["3MB", "6MB", "50MB"])
def test_lines_stay_under_their_limit(limit):
    x, target = MIXTURE.sample(500, seed=1), metrics.Target(MIXTURE.sample(20_000, seed=2))
    with count_tensor_bytes() as counted: score = metrics.sliced_wasserstein(x, target, memory_limit=limit)
    assert counted.peak_bytes <= score.plan.limit_bytes and score.value == pytest.approx(metrics.sliced_wasserstein(x, target).value, rel=1e-12)
    with pytest.raises(MemoryBudgetExceeded, match="along a line"): metrics.sliced_wasserstein(x, target, memory_limit="1MB")


def test_kde_leaves_each_point_out():
    points, width = cloud(30), 0.7
    naive = [torch.exp(-((points - point) ** 2).sum(1) / (2 * width**2)) / (2 * math.pi * width**2) for point in points]
    left_out = [(density.sum() - density[i]).item() / 29 for i, density in enumerate(naive)]
    assert metrics._leave_one_out(points, [width])[0].item() == pytest.approx(np.mean(np.log(left_out)), rel=1e-12)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_kde_divergence_of_gaussians_in_closed_form(scale):
    mixture = GaussianMixture(((0.0, 0.0),), name="unit")
    score = metrics.kl_kde(mixture.sample(3000, seed=1) * scale, mixture)
    assert score.value == pytest.approx(2 * (scale**2 / 2 - 0.5 - math.log(scale)), abs=0.08 + 4 * score.stderr)


def test_modes_are_counted_and_weighed():
    mixture = grid(3)
    x = mixture.sample(9000, seed=1)
    table = metrics.modes(x, mixture)
    assert len(table) == 9 and table.share.sum() == pytest.approx(1) and (table.width - 1).abs().max() < 0.06 and table.offset.max() < 0.12
    kept = x[(x - torch.tensor(mixture.means[4])).norm(dim=1) > 2]
    assert metrics.mode_coverage(kept, mixture).value == pytest.approx(8 / 9) and metrics.mode_balance(kept, mixture).value < 0.05
    assert 0.85 < metrics.mode_balance(x, mixture).value <= 1 and metrics.mode_balance(x, mixture).floor == pytest.approx(0.95, abs=0.05)


def test_floors_are_what_perfect_samples_score():
    y = MIXTURE.sample(4000, seed=3)
    target = metrics.Target(y, source=MIXTURE)
    for metric in (metrics.mmd, metrics.kl_histogram, metrics.wasserstein_axes):
        perfect = [metric(MIXTURE.sample(300, seed=50 + i), target) for i in range(8)]
        values = [score.value for score in perfect]
        assert abs(perfect[0].floor - np.mean(values)) < 4 * np.std(values, ddof=1) * (1 / 8 + 1 / metrics.N_FLOORS) ** 0.5
        split = metric(MIXTURE.sample(300, seed=50), y)
        assert 0.3 < split.floor / perfect[0].floor < 3 and math.isnan(metric(y[:3000], y).floor)
    assert metrics.log_likelihood(y, MIXTURE).floor == -MIXTURE.entropy().value and math.isnan(metrics.is_positive(y).floor)


def test_what_can_be_measured_depends_on_the_target():
    everything = set(metrics.METRICS)
    assert set(metrics.measurable(MIXTURE)) == everything and set(metrics.measurable(uniform_square())) == everything - set(metrics.NEED_MODES)
    assert set(metrics.measurable(Points(cloud(9)))) == everything - set(metrics.NEED_MODES) - set(metrics.NEED_DENSITY)


@pytest.mark.gpu
def test_tensors_stay_on_their_device():
    x, y = MIXTURE.sample(500, seed=1), MIXTURE.sample(20_000, seed=2)
    for metric in METRICS_OF_TARGET:
        assert metric(x.cuda(), metrics.Target(y.cuda())).value == pytest.approx(metric(x, y).value, rel=1e-9)
    with pytest.raises(InvalidInput, match="samples are on cpu, the target on cuda"): metrics.mmd(x, y.cuda())
