"Clusters that are there are found, those that are not do not pass for more than chance"
import numpy as np
import pandas as pd
import pytest
import torch

from gausssafe import clusters
from gausssafe.clusters import FEATURES, _class_silhouettes, _distances, _silhouette, find_clusters, normal_scores
from gausssafe.errors import InvalidInput


def units(n, shift, seed=0):
    "Features of three kinds of units, as far apart as said, and which kind each is"
    rng, kinds = np.random.default_rng(seed), np.arange(n) % 3
    table = pd.DataFrame({name: rng.normal(size=n) + shift * (kinds == i % 3) for i, name in enumerate(FEATURES)})
    return table.assign(kind="row", n_params=4), pd.Series(np.array(["func", "sens", "both"])[kinds])


@pytest.fixture
def flat(monkeypatch):
    "A map without UMAP: the first two features"
    monkeypatch.setattr(clusters, "_map", lambda X, n_neighbors, seed: X[:, :2])


@pytest.mark.parametrize("n_groups", [1, 2, 5])
def test_the_silhouette_is_that_of_sklearn(n_groups):
    from sklearn.metrics import silhouette_score
    rng = np.random.default_rng(0)
    X, labels = rng.normal(size=(40, 3)), np.append(rng.integers(0, n_groups, 39), 9)  # A group of one, too
    if n_groups == 1: assert np.isnan(_silhouette(_distances(X), np.zeros(40)))
    assert _silhouette(_distances(X), labels) == pytest.approx(silhouette_score(X, labels))


def test_normal_scores_are_ranks_as_normal_numbers():
    table = pd.DataFrame({"a": np.exp(np.arange(50.0)), "b": 1.0, "c": [np.nan] * 10 + list(range(40))})
    scores = normal_scores(table)
    assert (np.diff(scores[:, 0]) > 0).all() and abs(scores[:, 0].mean()) < 1e-9 and scores[:, 0].std() == pytest.approx(1)
    assert (scores[:, 1] == 0).all() and np.isfinite(scores).all()


@pytest.mark.slow
def test_what_is_apart_is_found():
    "With the real UMAP, which leaves torch's threads as they were"
    table, kinds = units(90, 6)
    torch.set_num_threads(1)
    found = find_clusters(table, kinds, n_maps=1, n_permutations=19)
    assert found.n_clusters == 3 and found.p == 1 / 2 and found.class_p == 1 / 20
    assert torch.get_num_threads() == 1
    assert pd.crosstab(found.points.cluster, found.points["class"]).max(axis=1).sum() > 85


def test_labels_that_mean_nothing_are_seldom_significant():
    "Of 100 null labellings, at most 12 at 5 % (more has probability 0.001)"
    p = []
    for seed in range(100):
        table, kinds = units(60, 0, seed)
        own, null = _class_silhouettes(normal_scores(table[list(FEATURES)]), kinds.to_numpy(), np.zeros(60), 39, np.random.default_rng(seed))
        p.append((1 + sum(value >= own for value in null)) / 40)
    assert np.mean(np.array(p) <= 0.05) <= 0.12


def test_the_rule_is_not_judged_by_what_it_looked_at(flat):
    "Labels made from curvature and contrast alone look like nothing in the other features"
    table, _ = units(200, 0)
    lead = table.contrast.rank() - table.curvature.rank()
    labels = pd.Series(np.select([lead > 60, lead < -60], ["sens", "func"], "both"))
    assert find_clusters(table, labels, n_maps=0, n_permutations=39).class_p > 0.05
    assert find_clusters(table, labels, rule="paper", n_maps=0, n_permutations=39).class_p == 1 / 40


def test_large_models_are_sampled_and_small_ones_refused(flat):
    table, kinds = units(300, 5)
    found = find_clusters(table, kinds, max_points=60, n_maps=0, n_permutations=9)
    assert len(found.points) == 60 and found.points.index.is_monotonic_increasing and found.p == 1
    assert (found.points["class"] == kinds.loc[found.points.index]).all()
    with pytest.raises(InvalidInput, match="a map of 19 units shows nothing: use smaller units"): find_clusters(table[:19], kinds[:19])


def test_a_class_for_all_has_no_silhouette(flat):
    table, _ = units(40, 0)
    found = find_clusters(table, pd.Series(["both"] * 40), n_maps=0, n_permutations=3)
    assert np.isnan(found.class_silhouette) and found.class_p == 1


def test_what_is_not_known_lies_in_the_middle():
    "Also where most is not known: above all ranks is not the middle"
    scores = normal_scores(pd.DataFrame({"a": [np.nan] * 30 + list(range(10))}))[:, 0]
    assert (scores[:30] == 0).all() and (scores[30:] < 0).sum() == (scores[30:] > 0).sum() == 5


def test_an_unknown_rule_is_refused_before_any_map(flat):
    with pytest.raises(InvalidInput, match="rule is 'calibrated' or 'paper', not 'papr'"): find_clusters(*units(30, 0), rule="papr")
