"Membership attacks against slow, obvious counts; intervals against their promise; splits that are none"
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from gausssafe.errors import InvalidInput
from gausssafe.language import GPT
from gausssafe.membership import (
    _Curves,
    _min_k,
    attack_result,
    attack_scores,
    auc_difference,
    auc_half_width,
    check_split,
    require_sequences,
    run_attacks,
    split_sequences,
)

SCORES = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=12)


def tokens(n, length=9, seed=0): return torch.randint(11, (n, length), generator=torch.Generator().manual_seed(seed))


@given(SCORES, SCORES, st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_curves_are_those_of_the_sequences_written_out(members, nonmembers, seed):
    "A weight is a number of copies; ties count one half"
    rng, curves = np.random.default_rng(seed), _Curves(np.array(members), np.array(nonmembers))
    weights = rng.integers(0, 4, (3, len(members) + len(nonmembers))).astype(float)
    weights[:, 0], weights[:, -1] = 1, 1
    for row, auc, tpr in zip(weights.astype(int), curves.auc(weights), curves.tpr(weights, 0.25), strict=True):
        a, b = np.repeat(members, row[:len(members)]), np.repeat(nonmembers, row[len(members):])
        assert auc == pytest.approx(np.mean((a[:, None] > b) + 0.5 * (a[:, None] == b)))
        labels, values = np.r_[np.ones(len(a)), np.zeros(len(b))], np.r_[a, b]
        assert auc == pytest.approx(roc_auc_score(labels, values))
        false, true, _ = roc_curve(labels, values, drop_intermediate=False)
        assert tpr == pytest.approx(true[false <= 0.25].max())


def test_intervals_hold_what_they_say():
    "Of 100 samples, 95 % intervals hold the true AUC in all but a few: 88 or more with probability 0.996"
    truth, n_held = 0.5 * (1 + math.erf(0.5 / 2)), 0  # Normal, one half apart
    for seed in range(100):
        rng = np.random.default_rng(seed)
        result = attack_result(rng.normal(0.5, 1, 80), rng.normal(0, 1, 80), n_draws=200, seed=seed)
        n_held += result.auc_low <= truth <= result.auc_high
    assert n_held >= 88


def test_the_half_width_is_that_of_the_bootstrap():
    rng = np.random.default_rng(0)
    result = attack_result(rng.normal(size=400), rng.normal(size=300), n_draws=1000)
    assert (result.auc_high - result.auc_low) / 2 == pytest.approx(auc_half_width(400, 300), rel=0.12)
    assert auc_half_width(2000, 2000) == pytest.approx(0.018, abs=2e-4)


def test_a_paired_difference_is_narrow():
    rng = np.random.default_rng(0)
    members, nonmembers = rng.normal(0.5, 1, 300), rng.normal(0, 1, 300)
    after = members + rng.normal(0, 0.05, 300), nonmembers + rng.normal(0, 0.05, 300)
    difference = auc_difference((members, nonmembers), after)
    results = attack_result(members, nonmembers), attack_result(*after)
    assert difference.value == pytest.approx(results[1].auc - results[0].auc)
    assert difference.high - difference.low < 0.3 * (results[0].auc_high - results[0].auc_low)
    assert difference == auc_difference((members, nonmembers), after)


def test_min_k_of_one_is_the_mean_and_ends_do_not_count():
    model = GPT(11, context=16, width=8, n_heads=2, n_layers=1).eval()
    rows = [tokens(1, n, seed=n)[0] for n in (9, 4, 7)]
    found = attack_scores(model, rows, min_k=0.5)
    for i, row in enumerate(rows):
        log_p = model(row[None, :-1])[0].detach().log_softmax(-1)
        true, mean = log_p.gather(1, row[1:, None])[:, 0], (log_p.exp() * log_p).sum(1)
        z = (true - mean) / ((log_p.exp() * (log_p - mean[:, None]) ** 2).sum(1)).sqrt()
        assert float(found["min_k"][i]) == pytest.approx(float(z.sort().values[:math.ceil(0.5 * len(z))].mean()), rel=1e-3)
        assert float(found["loss"][i]) == pytest.approx(float(true.mean()), rel=1e-4)


@pytest.mark.parametrize("frac, n, n_least", [(0.3, 50, 15), (0.6, 25, 15), (0.2, 15, 3), (0.2, 16, 4), (1.0, 7, 7)])
def test_min_k_takes_its_share_to_the_token(frac, n, n_least):
    "0.3 of 50 is a little more than 15 in float32"
    scores = SimpleNamespace(log_probs=torch.arange(n)[None].float(), means=torch.zeros(1, n), stds=torch.ones(1, n))
    assert float(_min_k(scores, frac)) == (n_least - 1) / 2


def test_a_model_is_no_reference_for_itself():
    model = GPT(11, context=16, width=8, n_heads=2, n_layers=1).eval()
    report = run_attacks(model, tokens(60), tokens(60, seed=1), reference=model, decode=lambda ids: str(ids.tolist()))
    assert report.table.auc["reference"] == 0.5 and list(report.table.index) == ["loss", "min_k", "zlib", "reference"]
    assert (report.table.auc_low <= report.table.auc).all() and (report.table.auc <= report.table.auc_high).all()


@given(st.integers(2, 40), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_splits_have_no_sequence_twice(n, seed):
    sequences = torch.randint(3, (n, 3), generator=torch.Generator().manual_seed(seed))
    n_different = len({tuple(row.tolist()) for row in sequences})
    if n_different < 2: return
    a, b = split_sequences(sequences, (1, n_different - 1), seed=seed)
    assert len({tuple(row.tolist()) for row in torch.cat([a, b])}) == n_different
    with pytest.raises(InvalidInput, match=f"need {n_different + 1} different sequences.*there are {n_different} "):
        split_sequences(sequences, (1, n_different))


def test_splits_that_are_none():
    members, nonmembers = tokens(100), tokens(100, seed=1)
    with pytest.raises(InvalidInput, match="2 of 100 members are also non-members, such as member 3 and non-member 100: draw both by split_seq"):
        run_attacks(GPT(11).eval(), members, torch.cat([nonmembers, members[3:5]]))
    with pytest.warns(RuntimeWarning, match="1 of 201 sequences are there more than once"): check_split(torch.cat([members, members[:1]]), nonmembers)


def test_intervals_that_cannot_be_had():
    with pytest.raises(InvalidInput, match=r"give an AUC to within \+-0.036 \(95 %\), not \+-0.018: give 1,978 a side, or ask for half_width=0.036"):
        require_sequences(500, 500, 0.018)
    require_sequences(1978, 1978, 0.018)
    with pytest.warns(RuntimeWarning, match=r"30 members and 40 non-members give an AUC to within \+-0.14"): require_sequences(30, 40, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        require_sequences(500, 500, None)


@pytest.mark.parametrize("call, message", [
    (lambda: attack_result([1.0, math.nan], [0.0]), "scores are finite numbers"),
    (lambda: attack_result([], [0.0]), "at least one a side"),
    (lambda: auc_difference(([1.0], [0.0]), ([1.0, 2.0], [0.0])), r"the same sequences: (1, 1) members and non-members before, (2, 1) after"),
    (lambda: attack_scores(GPT(11).eval(), tokens(3), min_k=0), "min_k is a share of the tokens, above 0 and at most 1, not 0"),
])
def test_refused(call, message):
    with pytest.raises(InvalidInput) as caught: call()
    assert message in str(caught.value)
