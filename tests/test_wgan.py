"The training is right, repeatable, measured without being disturbed, and stops where a number is lost"
import json
import math
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from reference import slope

from gausssafe import wgan
from gausssafe.errors import InvalidInput, MemoryBudgetExceeded, NotFinite
from gausssafe.networks import Critic
from gausssafe.wgan import GAN, METRICS, WGANConfig, gradient_penalty, train_wgan

TINY = dict(n_qubits=3, n_layers=2, batch_size=32, epochs=2, n_points=600, n_train=500, n_validation=50, n_critic=2, n_predictor=2,
            generator_hidden=(16, 16), critic_hidden=(16, 16), predictor_hidden=(8,))
MEASURED_ALIKE = ["epoch", "critic_loss", "generator_loss", *METRICS]


def tiny(**changes): return WGANConfig(**TINY | changes)
def train(**changes): return train_wgan(tiny(**changes), progress=False)


@pytest.fixture(scope="module")
def result(): return train()


@pytest.mark.parametrize(("settings", "message"), [
    (dict(epoch=3), "there is no field 'epoch': did you mean 'epochs'?"),
    (dict(lerning_rate=1e-3), "there is no field 'lerning_rate': did you mean 'learning_rate'?"),
    (dict(zzz=1), "there is no field 'zzz'; the fields are noise, n_qubits, "),
    (dict(noise="quantom"), "noise: Input should be 'normal', 'uniform', 'quantum' or 'shadow', not 'quantom'"),
    (dict(epochs=0), "epochs: Input should be greater than or equal to 1, not 0"),
    (dict(epochs="2"), "epochs: Input should be a valid integer, not '2'"),
    (dict(epochs=True), "epochs: Input should be a valid integer, not True"),
    (dict(batch_size=1), "batch_size: Input should be greater than or equal to 2, not 1"),
    (dict(learning_rate=0), "learning_rate: Input should be greater than 0, not 0"),
    (dict(learning_rate=math.nan), "learning_rate: Input should be "),
    (dict(seed=-1), "seed: Input should be greater than or equal to 0, not -1"),
    (dict(critic_hidden=()), "critic_hidden: Tuple should have at least 1 item"),
    (dict(critic_hidden=(8, 0)), "critic_hidden: a layer is at least 1 wide"),
    (dict(memory_limit="2 gigs"), "'2 gigs' is not a size"),
    (dict(memory_limit=0), "0 is not a size"),
    (dict(n_train=20_000), "n_train = 20,000 of n_points = 20,000 leaves fewer than 20 points to compare with"),
])
def test_a_wrong_setting_is_one_line_at_the_call(settings, message):
    with pytest.raises(InvalidInput) as refused: WGANConfig(**settings)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_configuration_is_frozen_and_survives_json():
    config = tiny(memory_limit="50MB")
    assert WGANConfig(**json.loads(config.model_dump_json())) == config
    with pytest.raises(ValueError, match="frozen"): config.epochs = 3
    with pytest.raises(InvalidInput, match="train_wgan takes a WGANConfig, not dict"): train_wgan({"epochs": 2})


@pytest.mark.parametrize(("name", "circuit"), [("4GB", (3, 1, 8)), ("8GB", (4, 2, 16)), ("16GB", (6, 3, 32))])
def test_the_profiles_of_report_a(name, circuit):
    config = WGANConfig.profile(name, epochs=1)
    assert (config.noise, config.n_qubits, config.n_layers, config.batch_size, config.epochs) == ("quantum", *circuit, 1)


def test_the_quick_profile_and_what_profiles_refuse():
    fast, full = WGANConfig.profile("fast"), WGANConfig()
    assert fast.n_critic < full.n_critic and fast.metrics_every > full.metrics_every and max(fast.generator_hidden) < 256
    with pytest.raises(InvalidInput, match="there is no profile '2GB': use 4GB, 8GB, 16GB, fast"): WGANConfig.profile("2GB")
    with pytest.raises(InvalidInput, match="did you mean 'epochs'"): WGANConfig.profile("4GB", epoch=1)


def test_the_defaults_are_the_reports():
    config = WGANConfig()
    assert (config.seed, config.batch_size, config.learning_rate, config.gradient_penalty) == (41, 256, 1e-3, 0.2)
    assert config.n_critic == config.n_predictor == 5
    assert (config.generator_hidden, config.critic_hidden, config.predictor_hidden) == ((256, 256), (256, 256), (128, 128))
    assert (config.z_dim, config.epochs, config.n_points, config.n_train, config.killer, config.killer_weight) == (4, 50, 20_000, 16_000, False, 100)


def test_the_penalty_is_that_of_finite_differences():
    critic = Critic(hidden=(8, 8), generator=torch.Generator().manual_seed(0)).double()
    real, fake = (torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    share = torch.rand(5, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    def score(x): return critic(torch.from_numpy(x)).sum().item()
    between = (real + share * (fake - real)).numpy()
    slopes = np.array([[slope(score, between, (i, j)) for j in range(2)] for i in range(5)])
    naive = np.mean((np.linalg.norm(slopes, axis=1) - 1) ** 2)
    assert gradient_penalty(critic, real, fake, generator=torch.Generator().manual_seed(3)).item() == pytest.approx(naive, rel=1e-6)


def test_the_history_has_its_columns(result):
    assert list(result.history) == [*MEASURED_ALIKE, "seconds", "peak_bytes"] and list(result.history.epoch) == [1, 2]
    assert result.history.notna().all().all() and (result.history.seconds > 0).all()
    assert 10**8 < result.history.peak_bytes.max() <= result.peak_bytes < result.limit_bytes
    assert set(result.scores) == set(result.samples) == {0, 1, 2} and set(result.ideal) == set(METRICS)
    for name in METRICS: assert result.history[name].iloc[-1] == result.scores[2][name].value
    assert list(result.memory)[:2] == ["t_s", "tree_bytes"] and result.n_threads == 1


def test_the_circuit_learns_with_the_generator(result):
    moved = result.weights_after != result.weights_before
    assert moved[0].all() and moved[1].tolist() == [True, True, True, False, False]  # The last couplings have no effect
    np.testing.assert_array_equal(result.weights_before, GAN(tiny()).noise.weights.detach())
    np.testing.assert_array_equal(result.weights_after, result.gan.noise.weights.detach())


def test_one_seed_one_history(result):
    again = train()
    pd.testing.assert_frame_equal(result.history[MEASURED_ALIKE], again.history[MEASURED_ALIKE], check_exact=True)
    for epoch, x in result.samples.items(): np.testing.assert_array_equal(x, again.samples[epoch])
    np.testing.assert_array_equal(result.weights_after, again.weights_after)
    assert not np.array_equal(result.samples[2], train(seed=42).samples[2])


def test_one_seed_one_history_in_other_processes_with_other_threads(result):
    code = ("import sys, json, hashlib; from test_wgan import *; r = train(); "
            "print(r.history[MEASURED_ALIKE].to_json(double_precision=15), hashlib.sha256(r.samples[2].tobytes()).hexdigest())")
    printed = set()
    for n_threads, seed in (("1", "0"), ("2", "1")):
        env = os.environ | {"OMP_NUM_THREADS": n_threads, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], cwd=os.path.dirname(__file__), env=env, check=True, capture_output=True, text=True)
        printed.add(done.stdout)
    assert len(printed) == 1
    assert json.loads(printed.pop().rsplit(" ", 1)[0])["mmd"]["1"] == pytest.approx(result.history.mmd[1], rel=1e-12)


def test_nothing_global_is_touched():
    torch.manual_seed(1), np.random.seed(1)
    torch_state, numpy_state, n_threads = torch.get_rng_state(), np.random.get_state()[1].copy(), torch.get_num_threads()
    train(epochs=1)
    assert torch.equal(torch_state, torch.get_rng_state()) and (numpy_state == np.random.get_state()[1]).all()
    assert torch.get_num_threads() == n_threads


def test_global_seeds_do_not_matter(result):
    torch.manual_seed(999), np.random.seed(999)
    pd.testing.assert_frame_equal(result.history[MEASURED_ALIKE], train().history[MEASURED_ALIKE], check_exact=True)


def test_measuring_does_not_disturb_training(result):
    seldom = train(metrics_every=5)
    assert seldom.history[list(METRICS)].isna().all(axis=1).tolist() == [True, False]
    pd.testing.assert_frame_equal(result.history[MEASURED_ALIKE[:3]], seldom.history[MEASURED_ALIKE[:3]], check_exact=True)
    np.testing.assert_array_equal(result.samples[2], seldom.samples[2])


@pytest.mark.parametrize("changes", [dict(noise="normal"), dict(noise="uniform"), dict(generator="direct"), dict(killer=True),
                                     dict(target="uniform_square", noise="normal"), dict(n_critic=1), dict(gradient_penalty=0.0),
                                     dict(batch_size=700)])
def test_every_variant_trains(changes):
    result = train(epochs=1, **changes)
    assert result.history[["critic_loss", "generator_loss"]].notna().all().all()
    assert (result.weights_before is None) == (changes.get("noise") == "normal" or changes.get("noise") == "uniform")


def test_samples_are_fresh_or_the_same_as_the_seed_says(result):
    assert torch.equal(result.gan.sample(20, seed=1), result.gan.sample(20, seed=1)) and result.gan.sample(20, seed=1).shape == (20, 2)
    assert not torch.equal(result.gan.sample(20, seed=1), result.gan.sample(20, seed=2))
    assert not result.gan.sample(3).requires_grad and not result.gan.training


def test_settling_takes_the_averages_of_now():
    gan = GAN(tiny(noise="normal"))
    norms = [module for module in gan.modules() if isinstance(module, torch.nn.BatchNorm1d)]
    gan.settle(n=500, seed=3)
    with wgan._reseeded(gan, 3):
        first = gan.generator.body[0](gan.noise(500))
    torch.testing.assert_close(norms[0].running_mean, first.mean(0))
    torch.testing.assert_close(norms[0].running_var, first.var(0))
    assert gan.training and [norm.momentum for norm in norms] == [0.1, 0.1]


@pytest.mark.parametrize("step", [1, 7, 20])
def test_a_lost_loss_is_named_with_its_step(monkeypatch, step):
    real_step = wgan._Training.generator_step
    monkeypatch.setattr(wgan._Training, "generator_step", lambda self: real_step(self) * (math.nan if self.step == step else 1.0))
    with pytest.raises(NotFinite, match=f"losses: 1 of 3 values are NaN or infinite at step {step}$"): train()


@pytest.mark.parametrize(("poison", "message"), [
    (lambda gan: gan.noise.weights[0].fill_(math.nan), "weights: 5 of 10 values are NaN or infinite"),
    (lambda gan: gan.generator.mean.bias.fill_(math.inf), "samples: 100 of 100 values are NaN or infinite at step 0"),
])
def test_lost_samples_never_become_a_metric(monkeypatch, poison, message):
    make = wgan.GAN
    def poisoned(config):
        gan = make(config)
        with torch.no_grad(): poison(gan)
        return gan
    monkeypatch.setattr(wgan, "GAN", poisoned)
    with pytest.raises(NotFinite, match=message): train()


def test_lost_weights_are_named(monkeypatch):
    real_round = wgan._Training.round
    def spoil(self):
        losses = real_round(self)
        with torch.no_grad(): self.gan.noise.weights[1, 4] = math.nan  # A coupling without effect: no loss would ever tell
        return losses
    monkeypatch.setattr(wgan._Training, "round", spoil)
    with pytest.raises(NotFinite, match="noise's weights: 1 of 10 values are NaN or infinite at step 2$"): train()


def test_a_run_away_learning_rate_is_reported():
    with pytest.raises(NotFinite) as astray: train(noise="normal", learning_rate=1e30)
    assert astray.value.step >= 1


def test_noise_from_shots_trains_and_repeats():
    first, second = (train(noise="shadow", n_observables=2, shots=20) for _ in range(2))
    pd.testing.assert_frame_equal(first.history[MEASURED_ALIKE], second.history[MEASURED_ALIKE])
    assert torch.equal(first.gan.sample(50, seed=1), first.gan.sample(50, seed=1)) and first.gan.noise.dim == 2


def test_a_limit_that_nothing_fits_is_refused_before_training():
    with pytest.raises(MemoryBudgetExceeded, match="14 qubits x batch"): train(n_qubits=14, memory_limit="10kB")


def test_a_limit_chunks_the_noise_and_changes_nothing_much(result):
    chunked = train(memory_limit="76kB")
    pd.testing.assert_frame_equal(result.history[MEASURED_ALIKE], chunked.history[MEASURED_ALIKE], rtol=1e-3)


def test_progress_is_lines_on_standard_error(capsys):
    train_wgan(tiny(metrics_every=2))
    out, err = capsys.readouterr()
    lines = err.strip().splitlines()
    assert out == "" and len(lines) == 2
    assert lines[0].startswith("epoch 1/2: critic_loss ") and "log_likelihood" not in lines[0]
    assert "log_likelihood" in lines[1] and lines[1].endswith(("MB", "GB"))
    train_wgan(tiny(epochs=1), progress=False)
    assert capsys.readouterr() == ("", "")


def test_a_callback_sees_each_row_and_can_end_it():
    seen = []
    result = train_wgan(tiny(epochs=5), progress=False, callback=lambda row: seen.append(row) or len(seen) == 2)
    assert [row["epoch"] for row in seen] == [1, 2] == list(result.history.epoch)


def test_what_is_saved(result, tmp_path):
    folder = result.save(tmp_path / "new" / "folder", answer="both")
    assert sorted(path.name for path in folder.iterdir()) == ["results.json", "samples.npz"]
    record = json.loads((folder / "results.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert WGANConfig(**record["config"]) == result.config and record["answer"] == "both" and record["n_threads"] == 1
    assert [row["critic_loss"] for row in record["history"]] == list(result.history.critic_loss)
    assert record["scores"]["2"]["mmd"]["value"] == result.scores[2]["mmd"].value and "stderr" in record["scores"]["ideal"]["wasserstein"]
    with np.load(folder / "samples.npz") as saved:
        assert set(saved) == {"target", "epoch_0", "epoch_1", "epoch_2", "weights_before", "weights_after"}
        np.testing.assert_array_equal(saved["epoch_2"], result.samples[2])


def test_a_failed_save_leaves_the_old_file(result, tmp_path):
    result.save(tmp_path, answer="old")
    with pytest.raises(TypeError): result.save(tmp_path, answer=object())
    assert json.loads((tmp_path / "results.json").read_text())["answer"] == "old" and len(list(tmp_path.iterdir())) == 2


def test_the_killer_empties_the_left():
    changes = dict(noise="normal", epochs=8, n_points=2500, n_train=2000, batch_size=64, n_validation=300, metrics_every=8)
    plain, killed = (train(killer=killer, **changes) for killer in (False, True))
    assert abs(plain.scores[8]["is_positive"].value) < 0.9 < killed.scores[8]["is_positive"].value


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["normal", "uniform", "quantum"])
def test_both_modes_are_found(noise):
    result = train_wgan(WGANConfig(noise=noise, epochs=10, metrics_every=10), progress=False)
    x, centres = result.gan.sample(2000, seed=1), torch.tensor([[-5.0, 5.0], [5.0, 5.0]])
    shares = (torch.cdist(x, centres) < 3).float().mean(0)
    assert (shares > 0.35).all() and result.scores[10]["log_likelihood"].value > -4.5
