"Figures show what the result holds, in the right colours, and change nothing"
import math
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb

from gausssafe import plots


def score(value, stderr=0.1): return SimpleNamespace(value=value, stderr=stderr)


@pytest.fixture
def result():
    rng = np.random.default_rng(0)
    def scores(value): return dict.fromkeys(plots.METRIC_LABELS, score(value))
    history = pd.DataFrame({"epoch": [1, 2, 3], "critic_loss": [-3.0, -2.0, -1.0], "generator_loss": [1.0, 2.0, 3.0]})
    memory = pd.DataFrame({"t_s": [0.0, 1.0, 2.0], "tree_bytes": [3e8, 4e8, 5e8]})
    yield SimpleNamespace(config=SimpleNamespace(noise="quantum"), history=history, memory=memory, peak_bytes=520_000_000, limit_bytes=10**9,
                          scores={0: scores(9.0), 2: scores(2.0), 3: scores(1.0)}, ideal=scores(0.5),
                          samples={epoch: rng.normal(size=(50, 2)) for epoch in (0, 2, 3)}, target=rng.normal(size=(50, 2)))
    plt.close("all")


SINGLE = [plots.plot_samples, plots.plot_losses, plots.plot_memory, lambda result, ax=None: plots.plot_metric(result, "mmd", ax=ax)]


@pytest.mark.parametrize("plot", SINGLE)
def test_each_takes_an_axes_or_makes_one_and_labels_it(result, plot):
    _, ax = plt.subplots()
    assert plot(result, ax=ax) is ax
    n_figures = len(plt.get_fignums())
    own = plot(result)
    assert isinstance(own, Axes) and own is not ax and len(plt.get_fignums()) == n_figures + 1
    assert own.get_xlabel() and own.get_ylabel()


def test_samples_are_those_of_the_epoch(result):
    for epoch, ax in ((3, plots.plot_samples(result)), (2, plots.plot_samples(result, epoch=2))):
        target, generated = ax.collections
        np.testing.assert_array_equal(generated.get_offsets(), result.samples[epoch])
        np.testing.assert_array_equal(target.get_offsets(), result.target)
        assert ax.get_title() == f"epoch {epoch}" and ax.get_aspect() == 1
        assert to_hex(generated.get_facecolor()[0]).upper() == plots.COLOURS["quantum"]


@pytest.mark.parametrize(("n_panels", "shown"), [(1, [0]), (2, [0, 3]), (3, [0, 2, 3]), (9, [0, 2, 3])])
def test_small_multiples(result, n_panels, shown):
    assert [ax.get_title() for ax in plots.plot_training(result, n_panels=n_panels)] == [f"epoch {epoch}" for epoch in shown]


def test_losses(result):
    critic, generator = plots.plot_losses(result).lines[:2]
    assert list(critic.get_ydata()) == [-3, -2, -1] and list(generator.get_ydata()) == [1, 2, 3] and generator.get_color() == plots.COLOURS["quantum"]


def test_a_metric_begins_with_the_first_epoch_and_leaves_infinities_out(result):
    result.scores[2]["mmd"] = score(math.inf, math.inf)
    ax = plots.plot_metric(result, "mmd")
    assert ax.lines[0].get_xydata().tolist() == [[3, 1]] and ax.lines[1].get_ydata()[0] == 0.5
    assert ax.collections[0].get_paths()[0].vertices[:, 1].max() == pytest.approx(1.2)  # One and two standard errors


def test_all_metrics_of_several_results(result):
    classical = SimpleNamespace(**vars(result) | {"config": SimpleNamespace(noise="normal")})
    axes = plots.plot_metrics(result, classical)
    assert [ax.get_ylabel() for ax in axes] == list(plots.METRIC_LABELS.values())
    assert [line.get_color() for line in axes[0].lines if line.get_linestyle() == "-"] == [plots.COLOURS["quantum"], plots.COLOURS["classical"]]
    legend, = axes[0].figure.legends
    assert {text.get_text() for text in legend.get_texts()} == {"quantum noise", "normal noise", "ideal"}


def test_memory_is_shown_against_its_limit(result):
    ax = plots.plot_memory(result)
    tree, peak, limit = ax.lines
    assert list(tree.get_ydata()) == [300, 400, 500] and peak.get_ydata()[0] == 520 and limit.get_ydata()[0] == 1000
    assert ax.get_ylim()[0] == 0 and ax.get_ylim()[1] > 1000
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["process tree", "peak 520 MB", "limit 1.00 GB"]


def test_noise_before_and_after():
    before, after = np.zeros((5, 3)), np.ones((5, 3))
    ax = plots.plot_noise(before, after, qubits=(0, 2))
    assert [c.get_offsets()[0].tolist() for c in ax.collections] == [[0, 0], [1, 1]] and "Z_{2}" in ax.get_ylabel()
    plt.close("all")


DEFICIENCIES = {  # Machado et al. 2009, severity 1, on linear RGB
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("matrix", DEFICIENCIES.values(), ids=DEFICIENCIES)
def test_colours_survive_colour_blindness(matrix):
    seen = {name: np.clip(matrix @ np.array(to_rgb(colour)) ** 2.2, 0, 1) ** (1 / 2.2) for name, colour in plots.COLOURS.items()}
    pairs = ["classical quantum", "quantum target", "classical target", "quantum critic", "quantum limit", "classical limit"]
    for a, b in map(str.split, pairs): assert np.linalg.norm(seen[a] - seen[b]) > 0.2, (a, b)


def test_a_kind_of_noise_keeps_its_colour():
    assert plots.noise_colour("shadow") == plots.noise_colour("quantum") == plots.COLOURS["quantum"]
    assert plots.noise_colour("uniform") == plots.noise_colour("normal") == plots.COLOURS["classical"] != plots.COLOURS["quantum"]
