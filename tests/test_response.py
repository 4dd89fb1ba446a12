"Perturbations that leave nothing behind, controls that match, tests that keep their error rate"
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gausssafe.errors import InvalidInput, MemoryBudgetExceeded, NotFinite
from gausssafe.language import GPT, sequence_losses
from gausssafe.membership import attack_result
from gausssafe.memory import count_tensor_bytes
from gausssafe.partition import CLASSES, find_units
from gausssafe.response import (
    Responses,
    _rank_p,
    cliffs_delta,
    compare_with_controls,
    holm,
    measure_responses,
    n_passes,
    permute_labels,
    perturbed,
    strata_of,
    summarize_responses,
)


def tokens(n, seed=0): return torch.randint(7, (n, 9), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def setup():
    model = GPT(7, context=8, width=8, n_heads=2, n_layers=2).eval()
    params = dict(model.named_parameters())
    return model, params, find_units(params)


@pytest.mark.parametrize("kind", ["relative", "absolute", "equal_norm"])
def test_noise_is_as_strong_as_said_and_goes_away(setup, kind):
    model, params, units = setup
    before = {name: p.detach().clone() for name, p in params.items()}
    mask = np.array([name.startswith("blocks.0") for name in units.names])
    with pytest.raises(KeyError), perturbed(params, units, mask, strength=0.2, seed=3, kind=kind):
        moves = {name: (p - before[name]).detach() for name, p in params.items()}
        raise KeyError
    assert all(torch.equal(p, before[name]) for name, p in params.items())
    assert all(bool(move.abs().sum()) == (name.startswith("blocks.0") and float(before[name].std(correction=0)) > 0 or
                                          name.startswith("blocks.0") and kind == "absolute") for name, move in moves.items())
    z = torch.randn(units.d, generator=torch.Generator().manual_seed(3)) * units.mask(mask)
    flat, stds = torch.cat([m.flatten() for m in moves.values()]), torch.cat([p.std(correction=0).expand(p.numel()) for p in before.values()])
    expected = z if kind == "absolute" else z * stds
    if kind == "equal_norm": expected = expected * (torch.cat([p.flatten() for p in before.values()]).norm() / expected.norm())
    torch.testing.assert_close(flat, 0.2 * expected, atol=1e-6, rtol=1e-4)


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(CLASSES)), min_size=1, max_size=30), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_controls_keep_the_counts_of_every_stratum(rows, seed):
    strata, labels = np.array([s for s, _ in rows]), np.array([label for _, label in rows])
    permuted = permute_labels(labels, strata, np.random.default_rng(seed))
    for stratum in set(strata): assert sorted(labels[strata == stratum]) == sorted(permuted[strata == stratum])


def test_strata_are_kinds_and_sizes(setup):
    _, _, units = setup
    strata = strata_of(units)
    assert len(set(strata)) == len({(kind, size) for kind, size in zip(units.kinds, units.sizes, strict=True)})
    a, b = (units.names.index(f"blocks.{i}.up.weight[0]") for i in (0, 1))
    assert strata[a] == strata[b]


def test_responses_are_those_of_the_perturbed_model(setup):
    model, params, units = setup
    members, nonmembers = tokens(20), tokens(30, seed=1)
    classes = np.random.default_rng(0).choice(CLASSES, len(units))
    found = measure_responses(model, params, units, classes, members, nonmembers, strengths=(0.1, 0.4), n_seeds=2, n_controls=2)
    assert len(found.table) + 1 == n_passes(classes, n_strengths=2, n_seeds=2, n_controls=2) == 1 + 3 * 2 * 2 * 3
    base = [-sequence_losses(model, side) for side in (members, nonmembers)]
    assert found.base["auc"] == pytest.approx(attack_result(*base, n_draws=2).auc)
    assert found.base["ppl"] == pytest.approx(float(torch.exp(-base[1].double().mean())))
    row = found.table.query("`class` == 'sens' and control == -1 and strength == 0.4 and seed == 1").iloc[0]
    with perturbed(params, units, classes == "sens", strength=0.4, seed=1):
        now = [-sequence_losses(model, side) for side in (members, nonmembers)]
    assert row.dauc == pytest.approx(attack_result(*now, n_draws=2).auc - found.base["auc"], abs=1e-9)
    assert row.dloss == pytest.approx(float(base[1].double().mean() - now[1].double().mean()), abs=1e-6)


def test_equal_seeds_give_equal_noise_to_all_classes(setup):
    "A class that holds every unit is its own control"
    model, params, units = setup
    everything = np.array(["both"] * len(units))
    found = measure_responses(model, params, units, everything, tokens(10), tokens(10, seed=1), strengths=(0.3,), n_seeds=2).table
    own, control = (found[side].reset_index(drop=True) for side in (found.control < 0, found.control >= 0))
    pd.testing.assert_series_equal(own.dloss, control.dloss)
    with pytest.raises(InvalidInput, match="noise is one of relative, absolute, equal_norm, not 'huge'"):
        measure_responses(model, params, units, everything, tokens(3), tokens(3, seed=1), kind="huge")


def test_noise_that_breaks_the_model_is_named_and_taken_back(setup):
    model, params, units = setup
    before = model.norm.weight.detach().clone()
    with pytest.raises(NotFinite, match="losses of sequences"):
        measure_responses(model, params, units, np.array(["both"] * len(units)), tokens(5), tokens(5, seed=1), strengths=(1e38,), kind="absolute")
    assert torch.equal(model.norm.weight, before)


def made(effect, n_seeds=12, n_controls=4, seed=0):
    "Responses of one class that is so far from its controls"
    rng, rows = np.random.default_rng(seed), []
    losses = {"base": rng.normal(2, 0.3, 80)}
    for s in range(n_seeds):
        for control in range(-1, n_controls):
            value = rng.normal(effect * (control < 0), 1)
            rows.append({"class": "func", "control": control, "strength": 1.0, "seed": s, "dppl": value, "dauc": rng.normal()})
    losses["func", 1.0] = np.stack([losses["base"] + rng.normal(0, 0.1, 80) for _ in range(n_seeds)])
    return Responses(pd.DataFrame(rows), {}, losses, 40)


def test_labels_that_mean_nothing_are_seldom_significant():
    "Of 200 null studies, fewer than 20 at 5 % (more has probability 0.002 for an exact test, and this one is conservative)"
    p = [compare_with_controls(made(0, seed=seed)).query("outcome == 'dppl'").p.item() for seed in range(200)]
    assert np.mean(np.array(p) <= 0.05) < 0.1
    strong = compare_with_controls(made(6)).query("outcome == 'dppl'").iloc[0]
    assert strong.p == strong.p_floor == 1 / 49 and strong.cliffs_delta > 0.95 and strong.difference == pytest.approx(6, abs=1)


def test_summaries_hold_their_means():
    summary = summarize_responses(made(0)).iloc[0]
    assert summary.dauc_low < summary.dauc_high and summary.n_seeds == 12 and np.isfinite(summary.dppl_control)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_holm_by_its_steps(p):
    order, expected, largest = np.argsort(p), np.zeros(len(p)), 0.0
    for i, place in enumerate(order): expected[place] = largest = max(largest, min(1.0, (len(p) - i) * p[place]))
    np.testing.assert_allclose(holm(np.array(p)), expected)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=8), st.lists(st.integers(-3, 3), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_cliffs_delta_by_counting(a, b):
    wins = sum((x > y) - (x < y) for x in a for y in b)
    assert cliffs_delta(a, b) == pytest.approx(wins / (len(a) * len(b))) == pytest.approx(-cliffs_delta(b, a))


def test_the_rank_test_is_exact_where_all_are_exchangeable():
    "Over all orders of five numbers, each p-value comes as often as it should"
    p = [_rank_p(order[0], np.array(order[1:])) for order in permutations([0.0, 1.0, 3.0, 7.0, 20.0])]
    for level in (0.2, 0.4, 0.6, 0.8): assert np.mean(np.array(p) <= level + 1e-9) <= level + 1e-9


@pytest.mark.parametrize("kind", ["relative", "absolute", "equal_norm"])
def test_the_limit_holds_noise_as_well_as_passes(kind):
    model = GPT(400, context=8, width=32, n_heads=2, n_layers=1).eval()
    params = dict(model.named_parameters())
    units, limit_bytes = find_units(params), 1_000_000
    classes = np.resize(CLASSES, len(units))
    def measure(limit): return measure_responses(model, params, units, classes, tokens(20), tokens(20, 1), strengths=(0.1,), n_seeds=1, kind=kind,
                                                 memory_limit=limit)
    with count_tensor_bytes() as counted: measure(limit_bytes)
    assert 14 * units.d / 2 < counted.peak_bytes <= limit_bytes
    with pytest.raises(MemoryBudgetExceeded, match="noise in .* parameters"): measure(14 * units.d)


def test_a_perplexity_that_no_float_holds_is_named(setup):
    model, params, units = setup
    with pytest.raises(NotFinite, match="the mean loss is .* nats, and no float holds its perplexity: use weaker noise"):
        measure_responses(model, params, units, np.resize(CLASSES, len(units)), tokens(5), tokens(5, 1), strengths=(1e5,), kind="absolute")


def test_controls_that_cannot_differ_are_told(setup):
    model, params, _ = setup
    units = find_units(params, "tensor")
    classes = np.where([name.startswith("tokens") for name in units.names], "func", "both")
    with pytest.warns(RuntimeWarning, match="matched random controls of func, both are the class itself"):
        found = measure_responses(model, params, units, classes, tokens(5), tokens(5, 1), strengths=(0.3,), n_seeds=1)
    assert (compare_with_controls(found).difference.abs() < 1e-12).all()
