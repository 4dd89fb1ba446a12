"Every experiment runs under papermill at tiny parameters, and leaves what it promises"
import ast
import json
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest

from gausssafe.wgan import WGANConfig

EXPERIMENTS = Path(__file__).resolve().parent.parent / "nbs/experiments"


def parameters(name):
    "{name: default} of the notebook's parameters cell, and its source lines"
    cell, = (cell for cell in nbformat.read(EXPERIMENTS / f"{name}.ipynb", as_version=4).cells if "parameters" in cell.metadata.get("tags", []))
    nodes = ast.parse(cell.source).body
    names = [(node.target if isinstance(node, ast.AnnAssign) else node.targets[0]).id for node in nodes]
    return dict(zip(names, (ast.literal_eval(node.value) for node in nodes), strict=True)), cell.source.splitlines()


def run(name, folder, **values):
    return papermill.execute_notebook(EXPERIMENTS / f"{name}.ipynb", folder / "out.ipynb", values, cwd=folder, progress_bar=False)


def test_the_parameters_of_the_quantum_gan_are_fields_with_a_comment_each():
    defaults, lines = parameters("quantum_gan")
    assert list(defaults) == ["noise", "n_qubits", "n_layers", "batch_size", "epochs", "seed", "memory_limit", "out_dir"]
    assert WGANConfig(**defaults).batch_size == 256 and (defaults["n_qubits"], defaults["n_layers"]) == (6, 2)
    assert sum("  # " in line for line in lines) >= len(defaults) - 1  # batch_size says it itself


@pytest.mark.parametrize("noise", ["quantum", *(pytest.param(noise, marks=pytest.mark.slow) for noise in ("normal", "shadow"))])
def test_quantum_gan(tmp_path, noise):
    nb = run("quantum_gan", tmp_path, noise=noise, n_qubits=2, n_layers=2, batch_size=4000, epochs=2, memory_limit="60MB", out_dir="found")
    pictures = {"training.png", "metrics.png", "losses.png", "memory.png"} | ({"noise.png"} if noise == "quantum" else set())
    folder = tmp_path / "found"
    assert {path.name for path in folder.iterdir()} == pictures | {"results.json", "samples.npz"}
    drawn = [(folder / name).read_bytes() for name in pictures]
    assert all(picture.startswith(b"\x89PNG") and len(picture) > 10_000 for picture in drawn)
    record = json.loads((folder / "results.json").read_text())
    assert record["config"]["noise"] == noise and [row["epoch"] for row in record["history"]] == [1, 2]
    assert set(record["answer"]) == {"found_both_modes", "left", "right", "weights_moved"}
    assert (record["answer"]["weights_moved"] > 0) == (noise != "normal")
    with np.load(folder / "samples.npz") as samples: assert samples["epoch_2"].shape == (500, 2)
    said = "".join(output.text for cell in nb.cells if cell.cell_type == "code" for output in cell.outputs if output.get("name") == "stdout")
    assert said.count("of the points lie at the left mode") == 1 and said.rstrip().endswith("training.png")


def test_a_parameter_that_cannot_be_is_told_in_the_notebook(tmp_path):
    message = "InvalidInput: there is no noise 'quantom': did you mean 'quantum'?"
    with pytest.raises(papermill.PapermillExecutionError, match=message):
        run("quantum_gan", tmp_path, noise="quantom")


def test_the_background_load_holds_what_it_says_and_ends(tmp_path):
    nb = run("background_load", tmp_path, megabytes=50, seconds=0.5)
    assert any("image/png" in output.get("data", {}) for output in nb.cells[-1].outputs)


SMALL_GPT = dict(n_sequences=120, length=17, width=8, n_layers=1, seed=0, memory_limit="20MB", out_dir="found")


def said_by(nb): return "".join(o.text for cell in nb.cells if cell.cell_type == "code" for o in cell.outputs if o.get("name") == "stdout")


@pytest.mark.parametrize("name", ["prm_map", "hessian_spectrum"])
def test_parameters_have_a_type_and_a_comment_each(name):
    defaults, lines = parameters(name)
    assert len(defaults) == len(lines) and all(": " in line.split(" = ")[0] and "  # " in line for line in lines)
    assert defaults["memory_limit"] == "100MB" and defaults["n_sequences"] == 500


def test_prm_map(tmp_path):
    nb = run("prm_map", tmp_path, **SMALL_GPT, epochs=3, n_seeds=2, strengths=[0.1, 1.0], n_maps=0)
    folder = tmp_path / "found"
    pictures = {"umap_visualization", "prm_phase_diagram", "noise_response_curves", "statistical_summary", "parameter_clustering"}
    assert {path.name for path in folder.iterdir()} == {f"{name}.png" for name in pictures} | {"results.json", "results.csv"}
    assert all((folder / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in pictures)
    record = json.loads((folder / "results.json").read_text())
    assert record["source"] == "measured" and record["config"]["strengths"] == [0.1, 1.0] and record["model"]["name"] == "gpt"
    assert {row["name"] for row in record["attacks"]} == {"loss", "min_k", "zlib", "reference"}
    assert record["peak_bytes"] <= 20_000_000 and record["check"][0]["ratio"] == pytest.approx(1, abs=0.3)
    assert "No significance is claimed" in said_by(nb) and "training included" in said_by(nb)


def test_hessian_spectrum(tmp_path):
    nb = run("hessian_spectrum", tmp_path, **SMALL_GPT, n_curvature=16, epochs=2, k=2, n_probes=2, n_steps=8)
    record = json.loads((tmp_path / "found/spectrum.json").read_text())
    assert (tmp_path / "found/spectral_density.png").exists() and record["n_params"] == 93 * 8 + 16 * 8 + 12 * 64 + 13 * 8 + 16
    assert all(stage["product_peak_bytes"] <= 20_000_000 for stage in (record["before"], record["after"]))
    assert "Training took the largest eigenvalue from" in said_by(nb)


SMALL = dict(n_qubits=2, n_layers=1, batch_size=64, hidden=8, epochs=3, n_points=1200, out_dir="found")


@pytest.mark.parametrize("name", ["quantum_vs_classical", "gan_2d"])
def test_every_parameter_says_what_it_is(name):
    defaults, lines = parameters(name)
    assert sum("  # " in line for line in lines) >= len(defaults) - 1 and set(SMALL) <= set(defaults)


def test_quantum_vs_classical(tmp_path):
    small = dict(SMALL, noises="normal map quantum", n_seeds=2, metrics_every=2, n_final=500)
    run("quantum_vs_classical", tmp_path, **small)
    folder = tmp_path / "found"
    record = json.loads((folder / "results.json").read_text())
    assert {path.name for path in folder.iterdir()} == {"runs", "results.json", "final.png", "samples.png", "training.png"}
    assert len(record["final"]) == 6 and set(record["differences"]) == {"quantum - normal", "quantum - map"}
    assert all(row["sliced_wasserstein"] > 0 for row in record["final"]) and set(record["batch_seconds"]) == {"normal", "map", "quantum"}
    assert {answer["answer"] for answer in record["differences"].values()} <= {"better", "worse", "cannot be told apart"}
    by_hand = [row["sliced_wasserstein"] * (1 if row["noise"] == "quantum" else -1) for row in record["final"] if row["noise"] != "map"]
    assert record["differences"]["quantum - normal"]["mean"] == pytest.approx(sum(by_hand) / 2)


@pytest.mark.parametrize("changes", [dict(noise="quantum"), pytest.param(dict(noise="normal", target="uniform_square", generator="bounded"),
                                                                           marks=pytest.mark.slow)])
def test_gan_2d(tmp_path, changes):
    nb = run("gan_2d", tmp_path, **SMALL, metrics_every=2, **changes)
    folder = tmp_path / "found"
    pictures = {"training.png", "losses.png", "metrics.png", "modes.png", "noise.png", "memory.png"}
    assert {path.name for path in folder.iterdir() if path.is_file() and path.name[0] != "."} == pictures | {
        "results.json", "samples.npz", "trace.json", "tracking.jsonl"}
    record = json.loads((folder / "results.json").read_text())
    assert [row["epoch"] for row in record["history"]] == [1, 2, 3] and record["answer"]["resumed_from"] >= 1
    assert ("worst_balance" in record["answer"]) == (changes["noise"] == "quantum")
    assert any("interrupted" in output.get("text", "") for cell in nb.cells if cell.cell_type == "code" for output in cell.outputs)
