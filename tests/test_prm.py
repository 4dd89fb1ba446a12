"The whole map: the truth of a synthetic model comes back, real models stay in their limit, and nothing is claimed that was not measured"
import copy
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from gausssafe import clusters, prm_plots
from gausssafe.errors import InvalidInput, MemoryBudgetExceeded, NotFinite
from gausssafe.language import GPT, lm_loss, train_lm
from gausssafe.memory import count_tensor_bytes
from gausssafe.prm import PRMConfig, estimate_prm, run_prm
from gausssafe.synthetic import make_synthetic

TINY = dict(strengths=(0.1, 1.0), n_seeds=2, n_eigenvectors=3, n_products=12, n_curvature=16, n_gradients=16, n_maps=0, n_permutations=9,
            memory_limit="20MB")


def quiet(*_): pass


def tokens(n, seed=0): return torch.randint(11, (n, 17), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", autouse=True)
def flat_maps():
    "Maps without UMAP, whose compilation takes longer than all the rest; test_clusters and the notebooks have the real one"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clusters, "_map", lambda X, n_neighbors, seed: X[:, :2])
        yield


@pytest.fixture(scope="module")
def trained():
    "A GPT that remembers 60 random sequences"
    model = GPT(11, context=16, width=16, n_heads=2, n_layers=1)
    train_lm(model, tokens(60), epochs=25, learning_rate=1e-2)
    return model


@pytest.fixture(scope="module")
def report(trained):
    with pytest.warns(RuntimeWarning, match="60 members and 60 non-members give an AUC to within"):
        return run_prm(trained, tokens(60), tokens(60, seed=1), PRMConfig(**TINY), tell=quiet)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_synthetic_truth_comes_back(seed):
    made = make_synthetic(20, seed=seed)
    config = PRMConfig(**TINY | dict(n_curvature=80, n_gradients=80, n_products=30, strengths=(1.0,)))
    report = run_prm(made.model, made.members, made.nonmembers, config, tell=quiet)
    assert adjusted_rand_score(made.truth, report.units["class"]) > 0.9
    shown = report.table.set_index("class")
    assert abs(shown.dppl["sens"]) < 1e-9 and shown.dauc["sens"] < 0 and shown.dppl["func"] > 3 * shown.dppl["both"] > 0
    assert shown.dauc["sens"] < shown.dauc_control["sens"] and shown.dppl["sens"] < shown.dppl_control["sens"]


def test_synthetic_is_said_everywhere(tmp_path):
    made, told = make_synthetic(12), []
    with pytest.warns(RuntimeWarning, match="48 members"):
        report = run_prm(made.model, made.members, made.nonmembers, PRMConfig(**TINY | dict(n_products=60)), tell=told.append)
    report.save(tmp_path)
    assert told[0].startswith("SYNTHETIC: ") and report.source == json.loads((tmp_path / "results.json").read_text())["source"] == "synthetic"
    for frame in (report.table, report.tests, report.units, report.counts, pd.read_csv(tmp_path / "results.csv")):
        assert set(frame.source) == {"synthetic"}
    titles = [prm_plots.plot_units(report).get_title(), prm_plots.plot_clusters(report).get_title(), prm_plots.plot_phases(report).get_title()]
    titles += [plot(report)[0].figure.get_suptitle() for plot in (prm_plots.plot_responses, prm_plots.plot_statistics)]
    assert all("(synthetic)" in title for title in titles), titles


def test_a_report_of_a_real_model(report, trained, tmp_path):
    assert report.source == "measured" and "source" not in report.table
    assert report.counts.n_params.sum() == sum(p.numel() for p in trained.parameters())
    assert list(report.attacks.index) == ["loss", "min_k"] and report.attacks.auc["loss"] > 0.9
    first = report.check.iloc[0]
    assert abs(first.measured - first.predicted) < 4 * math.hypot(first.measured_stderr, first.predicted_stderr) + 0.05 * first.predicted
    assert report.verdict().startswith("No significance is claimed: with 2 seeds and 1 controls each, no corrected p-value could be below 0.67")
    assert not (report.tests.p_holm < 0.05).any()
    paths = report.save(tmp_path, note="more")
    record = json.loads(paths[0].read_text())
    assert record["note"] == "more" and record["config"]["rule"] == "calibrated" and len(record["units"]) == len(report.units)
    assert set(record) >= {"source", "estimate", "counts", "table", "tests", "attacks", "check", "clusters", "points", "peak_bytes", "verdict"}
    assert len(pd.read_csv(paths[1])) == 3 * 2 * 2 * 2 and "NaN" not in paths[0].read_text()


def test_equal_configurations_give_equal_reports(report, trained):
    with pytest.warns(RuntimeWarning): again = run_prm(trained, tokens(60), tokens(60, seed=1), PRMConfig(**TINY), tell=quiet)
    pd.testing.assert_frame_equal(report.table, again.table)
    pd.testing.assert_frame_equal(report.units, again.units)


@pytest.mark.filterwarnings("ignore:.*give an AUC:RuntimeWarning")
@pytest.mark.parametrize("limit", ["2MB", pytest.param("8MB", marks=pytest.mark.slow)])
def test_the_limit_is_kept_and_predicted(trained, limit):
    config, sides = PRMConfig(**TINY | dict(memory_limit=limit, strengths=(1.0,), n_seeds=1)), (tokens(60), tokens(60, seed=1))
    estimate = estimate_prm(trained, *sides, config)
    with count_tensor_bytes() as counted: report = run_prm(trained, *sides, config, tell=quiet)
    limit_bytes = int(limit[0]) * 10**6
    assert counted.peak_bytes <= report.peak_bytes <= min(limit_bytes, 1.15 * counted.peak_bytes) and estimate.limit_bytes == limit_bytes
    assert estimate.predicted_bytes <= limit_bytes and 0.6 < report.peak_bytes / estimate.predicted_bytes < 1.1


def test_a_warning_is_given_once(trained):
    members = torch.cat([tokens(60), tokens(1)])
    with pytest.warns(RuntimeWarning) as told: run_prm(trained, members, tokens(60, seed=1), PRMConfig(**TINY), tell=quiet)
    assert [sum(what in str(w.message) for w in told) for what in ("next to nothing", "more than once")] == [1, 1]


def test_a_paper_class_stays_empty(trained):
    with pytest.warns(RuntimeWarning): report = run_prm(trained, tokens(60), tokens(60, seed=1), PRMConfig(**TINY | dict(rule="paper")), tell=quiet)
    empty = report.counts.index[report.counts.n_units == 0]
    assert report.counts.index.tolist() == ["func", "sens", "both"] and not set(empty) & set(report.table["class"])


def test_a_block_and_other_units(trained):
    config = PRMConfig(**TINY | dict(block="blocks.0", unit="tensor", noise="equal_norm"))
    with pytest.warns(RuntimeWarning): report = run_prm(trained, tokens(60), tokens(60, seed=1), config, tell=quiet)
    assert set(report.units.tensor.str[:8]) == {"blocks.0"} and len(report.units) == 12 and report.clusters is None
    assert "no map" in prm_plots.plot_units(report).texts[0].get_text()


BAD = {
    "members are non-members": (lambda m: run_prm(m, tokens(60), tokens(60)), InvalidInput, "60 of 60 members are also non-members"),
    "too few": (lambda m: run_prm(m, tokens(60), tokens(60, 1), PRMConfig(half_width=0.01)), InvalidInput, r"not +-0.01: give 6,404 a side"),
    "no room": (lambda m: run_prm(m, tokens(150), tokens(150, 1), PRMConfig(memory_limit="20kB")), MemoryBudgetExceeded, "v and Hv alone needs"),
    "no room for a basis": (lambda m: run_prm(m, tokens(150), tokens(150, 1), PRMConfig(memory_limit="600kB")), MemoryBudgetExceeded,
                            "the Lanczos basis: 25 vectors of "),
    "unknown ids": (lambda m: run_prm(m, tokens(150), 11 + tokens(150, 1)), InvalidInput, "the model knows token ids below 11, and there is 21"),
    "no sequences": (lambda m: run_prm(m, [], tokens(5)), InvalidInput, "there are no sequences"),
    "rule": (lambda m: PRMConfig(rule="papr"), InvalidInput, "there is no rule 'papr': did you mean 'paper'?"),
    "field": (lambda m: PRMConfig(strength=1.0), InvalidInput, "there is no field 'strength': did you mean 'strengths'?"),
    "strengths": (lambda m: PRMConfig(strengths=(0.0,)), InvalidInput, "every strength is above 0, and finite"),
    "strengths twice": (lambda m: PRMConfig(strengths=(0.1, 0.1)), InvalidInput, "every strength is there once"),
    "bfloat16": (lambda m: run_prm(copy.deepcopy(m).bfloat16(), tokens(150), tokens(150, 1)), InvalidInput, "use model.float()"),
    "profile": (lambda m: PRMConfig.profile("huge"), InvalidInput, "there is no profile 'huge': use small, medium, opt-125m"),
    "block": (lambda m: run_prm(m, tokens(150), tokens(150, 1), PRMConfig(block="layers")), InvalidInput, "names none of params"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_before_work_starts(trained, name):
    call, error, message = BAD[name]
    told = []
    with pytest.raises(error) as caught: call(trained)
    assert message in str(caught.value) and not told


def test_nan_and_what_the_loss_does_not_touch(trained):
    broken = GPT(11, context=16, width=16, n_heads=2, n_layers=2).eval()
    broken.norm.weight.data[0] = math.nan
    with pytest.raises(NotFinite, match="the loss of the first 2 samples"): run_prm(broken, tokens(150), tokens(150, 1), tell=quiet)
    idle = GPT(11, context=16, width=16, n_heads=2, n_layers=2).eval()
    idle.extra = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(InvalidInput, match="the loss does not depend on extra"): run_prm(idle, tokens(150), tokens(150, 1), tell=quiet)
    noisy = torch.nn.Sequential(trained, torch.nn.Dropout(0.5)).train()
    with pytest.raises(InvalidInput, match=r"not deterministic.*Call model.eval\(\) first"): run_prm(noisy, tokens(150), tokens(150, 1), tell=quiet)


def test_the_profiles_are_those_of_the_design():
    small, medium = (PRMConfig.profile(name) for name in ("small", "medium"))
    assert (small.n_seeds, len(small.strengths), small.memory_limit, small.half_width) == (3, 4, "100MB", None)
    assert medium.n_seeds >= 20 and medium.half_width == 0.018
    labels = medium.n_seeds * medium.n_controls
    assert len(medium.strengths) / (1 + labels) < 0.05  # A corrected p-value can be significant at all
    assert np.isfinite(float(lm_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.long))))


def test_a_report_is_written_whole_or_not_at_all(report, tmp_path, monkeypatch):
    report.save(tmp_path)
    before = [(tmp_path / name).read_bytes() for name in ("results.json", "results.csv")]
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): report.save(tmp_path, note="more")
    assert [(tmp_path / name).read_bytes() for name in ("results.json", "results.csv")] == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.csv", "results.json"]


@pytest.mark.filterwarnings("ignore:.*give an AUC:RuntimeWarning")
def test_the_peak_is_that_of_the_attacks_too():
    "They had the whole limit to themselves, and were not in what the report says"
    model, sides = GPT(12, context=16, width=64, n_heads=2, n_layers=1).eval(), (tokens(60)[:, :12], tokens(60, seed=1)[:, :12])
    config = PRMConfig(**TINY | dict(block="blocks.0.up", memory_limit="1100kB", n_products=6, n_eigenvectors=1, n_curvature=4, strengths=(0.1,),
                                     n_seeds=1))
    with count_tensor_bytes() as counted: report = run_prm(model, *sides, config, tell=quiet)
    assert counted.peak_bytes <= min(report.peak_bytes, 1_100_000)
