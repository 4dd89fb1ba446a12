"The training is right, repeatable, measured without being disturbed, and stops where a number is lost"
import copy
import hashlib
import json
import math
import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from reference import slope
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gausssafe import wgan
from gausssafe.errors import InvalidInput, MemoryBudgetExceeded, NotFinite
from gausssafe.networks import Critic
from gausssafe.wgan import GAN, METRICS, WGANConfig, gradient_penalty, train_wgan

TINY = dict(n_qubits=3, n_layers=2, batch_size=32, epochs=2, n_points=600, n_train=500, n_validation=50, n_critic=2, n_predictor=2,
            hidden=(16, 16), critic_hidden=(16, 16), predictor_hidden=(8,))
ALL = [*METRICS, "wasserstein_axes"]
MEASURED_ALIKE = ["epoch", "critic_loss", "generator_loss", *ALL]


def tiny(**changes): return WGANConfig(**TINY | changes)
def train(**changes): return train_wgan(tiny(**changes), progress=False)


@pytest.fixture(scope="module")
def result(): return train()


@pytest.mark.parametrize(("settings", "message"), [
    (dict(epoch=3), "there is no field 'epoch': did you mean 'epochs'?"),
    (dict(lerning_rate=1e-3), "there is no field 'lerning_rate': did you mean 'learning_rate'?"),
    (dict(zzz=1), "there is no field 'zzz'; there are noise, n_qubits, "),
    (dict(noise="quantom"), "there is no noise 'quantom': did you mean 'quantum'?"),
    (dict(noise="zzz"), "there is no noise 'zzz'; there are normal, uniform, quantum, shadow, map"),
    (dict(generator="gausian"), "there is no generator 'gausian': did you mean 'gaussian'?"),
    (dict(target="two_gausians"), "there is no target 'two_gausians': did you mean 'two_gaussians'?"),
    (dict(metrics=("mmd", "wassersten")), "there is no metric 'wassersten': did you mean 'wasserstein'?"),
    (dict(best_by="is_positive"), "best_by = 'is_positive' is no distance: use one of wasserstein, "),
    (dict(device="tpu"), "device: 'tpu' is neither 'cpu' nor 'cuda'"),
    pytest.param(dict(device="cuda"), "device: torch sees no graphics card here: use 'cpu'",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")),
    (dict(epochs=0), "epochs: Input should be greater than or equal to 1, not 0"),
    (dict(epochs="2"), "epochs: Input should be a valid integer, not '2'"),
    (dict(epochs=True), "epochs: Input should be a valid integer, not True"),
    (dict(batch_size=1), "batch_size: Input should be greater than or equal to 2, not 1"),
    (dict(learning_rate=0), "learning_rate: Input should be greater than 0, not 0"),
    (dict(learning_rate=math.nan), "learning_rate: Input should be "),
    (dict(learning_rate=math.inf), "learning_rate: Input should be a finite number, not inf"),
    (dict(killer_weight=math.inf), "killer_weight: Input should be a finite number, not inf"),
    (dict(gradient_penalty=math.inf), "gradient_penalty: Input should be a finite number"),
    (dict(n_threads=5000), "n_threads: 5,000 threads on "),
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
    assert fast.n_critic < full.n_critic and fast.metrics_every > full.metrics_every and max(fast.hidden) < 256
    with pytest.raises(InvalidInput, match="there is no profile '2GB': use 4GB, 8GB, 16GB, fast"): WGANConfig.profile("2GB")
    with pytest.raises(InvalidInput, match="did you mean 'epochs'"): WGANConfig.profile("4GB", epoch=1)


def test_the_defaults_are_the_reports():
    config = WGANConfig()
    assert (config.seed, config.batch_size, config.learning_rate, config.gradient_penalty) == (41, 256, 1e-3, 0.2)
    assert config.n_critic == config.n_predictor == 5
    assert (config.hidden, config.critic_hidden, config.predictor_hidden) == ((256, 256), (256, 256), (128, 128))
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
    assert set(result.scores) == set(result.samples) == {0, 1, 2} and set(result.ideal) == set(ALL)
    for name in ALL: assert result.history[name].iloc[-1] == result.scores[2][name].value
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


def test_one_seed_one_history_in_another_process_with_other_threads(result):
    code = ("import sys, json, hashlib; from test_wgan import *; r = train(); "
            "print(r.history[MEASURED_ALIKE].to_json(double_precision=15), hashlib.sha256(r.samples[2].tobytes()).hexdigest())")
    env = os.environ | {"OMP_NUM_THREADS": "1" if torch.get_num_threads() > 1 else "2", "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], cwd=os.path.dirname(__file__), env=env, check=True, capture_output=True, text=True)
    history, digest = done.stdout.strip().rsplit(" ", 1)
    assert history == result.history[MEASURED_ALIKE].to_json(double_precision=15)
    assert digest == hashlib.sha256(result.samples[2].tobytes()).hexdigest()


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
    cheap = list(wgan.CHEAP)
    assert seldom.history[[n for n in ALL if n not in cheap]].isna().all(axis=1).tolist() == [True, False]
    assert set(seldom.scores[1]) == set(cheap) and set(seldom.samples) == {0, 2}
    pd.testing.assert_frame_equal(result.history[cheap], seldom.history[cheap], check_exact=True)
    pd.testing.assert_frame_equal(result.history[MEASURED_ALIKE[:3]], seldom.history[MEASURED_ALIKE[:3]], check_exact=True)
    np.testing.assert_array_equal(result.samples[2], seldom.samples[2])


@pytest.mark.parametrize("changes", [dict(noise="normal"), dict(noise="map"), dict(noise="uniform"), dict(generator="direct"), dict(killer=True),
                                     dict(generator="bounded", noise="normal"), dict(generator="residual"), dict(target="ring"), dict(target="grid"),
                                     dict(critic_hidden=(8,)), dict(critic_hidden=(8, 4, 8)), dict(metrics=("mmd",), best_by="wasserstein_axes"),
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
    def poisoned(*arguments):
        gan = make(*arguments)
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
    with pytest.raises(MemoryBudgetExceeded, match="14 qubits x batch"):
        train(n_qubits=14, n_layers=4, memory_limit="60kB", metrics=("mmd",), best_by="mmd")


def test_a_limit_chunks_the_noise_and_changes_nothing_much(result):
    chunked = train(memory_limit="76kB")
    pd.testing.assert_frame_equal(result.history[MEASURED_ALIKE], chunked.history[MEASURED_ALIKE], rtol=1e-3)


def test_progress_is_lines_on_standard_error(capsys):
    train_wgan(tiny(metrics_every=2))
    out, err = capsys.readouterr()
    lines = err.strip().splitlines()
    assert out == "" and len(lines) == 2
    assert lines[0].startswith("epoch 1/2: critic_loss ") and "log_likelihood" in lines[0]
    assert "wasserstein_axes" in lines[1] and lines[1].endswith(("MB", "GB"))
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


def test_nothing_is_written_without_a_folder(result, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(epochs=1)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InvalidInput, match="there is no out_dir to save to"): result.save()


def test_a_failed_save_leaves_the_old_file(result, tmp_path):
    result.save(tmp_path, answer="old")
    with pytest.raises(TypeError): result.save(tmp_path, answer=object())
    assert json.loads((tmp_path / "results.json").read_text())["answer"] == "old" and len(list(tmp_path.iterdir())) == 2


def test_the_killer_empties_the_left():
    changes = dict(noise="normal", epochs=8, n_points=2500, n_train=2000, batch_size=64, n_validation=300, metrics_every=8, averaging=0.9)
    plain, killed = (train(killer=killer, **changes) for killer in (False, True))
    assert abs(plain.scores[8]["is_positive"].value) < 0.9 < killed.scores[8]["is_positive"].value


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["normal", "uniform", "quantum"])
def test_both_modes_are_found(noise):
    result = train_wgan(WGANConfig(noise=noise, epochs=10, metrics_every=10), progress=False)
    x, centres = result.gan.sample(2000, seed=1), torch.tensor([[-5.0, 5.0], [5.0, 5.0]])
    shares = (torch.cdist(x, centres) < 3).float().mean(0)
    assert (shares > 0.35).all() and result.scores[10]["log_likelihood"].value > -4.5


def test_the_step_by_hand_is_that_of_the_textbook():
    generator = torch.Generator().manual_seed(0)
    for hidden, d, weight in (((8,), 2, 0.2), ((16, 8), 3, 10.0), ((8, 16, 8, 4), 1, 1.0)):
        critic = Critic(d, hidden=hidden, generator=generator).double()
        real, fake = (torch.randn(20, d, dtype=torch.float64, generator=generator) for _ in range(2))
        penalty = gradient_penalty(critic, real, fake, generator=torch.Generator().manual_seed(3))
        loss = critic(fake).mean() - critic(real).mean() + weight * penalty
        expected = torch.autograd.grad(loss, list(critic.parameters()))
        found = wgan.CriticStep(critic, 20, weight)(real, fake, torch.rand(20, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
        assert found.item() == pytest.approx(loss.item(), rel=1e-12)
        for ours, theirs in zip(critic.parameters(), expected, strict=True): torch.testing.assert_close(ours.grad, theirs, rtol=1e-10, atol=1e-12)


def bfloat16_error(seed):
    "Of a random critic's gradient, against float64, relative to its norm"
    g = torch.Generator().manual_seed(seed)
    hidden = tuple(torch.randint(16, 65, (1 + seed % 3,), generator=g).tolist())
    critic = Critic(hidden=hidden, generator=g)
    exact = copy.deepcopy(critic).double()
    points = [torch.randn(32, 2, generator=g), torch.randn(32, 2, generator=g), torch.rand(32, 1, generator=g)]
    critic.body.dtype = torch.bfloat16
    found, expected = wgan.CriticStep(critic, 32, 0.2)(*points), wgan.CriticStep(exact, 32, 0.2)(*(p.double() for p in points))
    assert abs(found - expected) <= 0.005 and all(p.dtype == p.grad.dtype == torch.float32 for p in critic.parameters())
    ours, theirs = (torch.cat([p.grad.double().flatten() for p in net.parameters()]) for net in (critic, exact))
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_bfloat16_keeps_the_critics_gradient():
    "Eight significant bits a factor, and a few kinks taken on the other side: 1.5 % is usual, a sixth the worst of 600 where the gradient cancels"
    errors = sorted(map(bfloat16_error, range(60)))
    assert errors[30] <= 0.03 and errors[-1] <= 0.3


def test_bfloat16_trains_and_is_repeatable():
    first, again = train(precision="bfloat16"), train(precision="bfloat16")
    pd.testing.assert_frame_equal(first.history[MEASURED_ALIKE], again.history[MEASURED_ALIKE])
    exact = train()
    assert (first.history[MEASURED_ALIKE] != exact.history[MEASURED_ALIKE]).any(axis=None)
    np.testing.assert_allclose(first.history["wasserstein"], exact.history["wasserstein"], rtol=0.1)


class StandInGraph(TorchDispatchMode):
    "A CUDA graph on the processor: operations are written down, and replayed into the tensors that they gave at first"

    def __init__(self):
        super().__init__()
        self.calls, self.n_replays = [], 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        self.calls.append((operation, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        self.n_replays += 1
        if self.n_replays == 1: return  # On a card recording runs nothing; here it did
        for operation, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(operation(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr(): old.copy_(new)


def stand_in_card(monkeypatch):
    @contextmanager
    def record(graph):
        with graph: yield
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {"Stream": lambda: stream, "current_stream": lambda: stream, "stream": lambda _: nullcontext(), "CUDAGraph": StandInGraph,
                        "graph": record}.items(): monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(wgan, "_on_card", lambda tensor: True)


@pytest.mark.parametrize("changes", [dict(), dict(precision="bfloat16"), dict(killer=True), dict(noise="normal", gradient_penalty=0.0)])
def test_a_recorded_step_is_the_step(changes, monkeypatch):
    eager = wgan._Training(tiny(**changes))
    expected = torch.stack([eager.round() for _ in range(6)])
    stand_in_card(monkeypatch)
    training = wgan._Training(tiny(**changes))
    found = torch.stack([training.round() for _ in range(6)])
    assert training.critic_update.graph.n_replays == 6 * 2 - 3
    assert torch.equal(found, expected)
    for ours, theirs in zip(training.critic.parameters(), eager.critic.parameters(), strict=True): assert torch.equal(ours, theirs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a graphics card")
def test_training_on_a_card():
    row = train(device="cuda", noise="normal", epochs=4).history.iloc[-1]
    assert np.isfinite(row[["critic_loss", "generator_loss"]].astype(float)).all()


def test_points_between_that_do_not_slope_give_no_nan():
    critic = Critic(hidden=(4,), generator=torch.Generator())
    with torch.no_grad(): critic.head.weight.zero_()
    step = wgan.CriticStep(critic, 5, 1.0)
    assert step(torch.zeros(5, 2), torch.ones(5, 2), torch.zeros(5, 1)).item() == 1 and all(p.grad.isfinite().all() for p in critic.parameters())


def test_the_call_of_the_manual(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = WGANConfig(noise="shadow", n_qubits=6, n_layers=2, batch_size=256, epochs=30, hidden=(256, 256), critic_hidden=(256, 256), n_critic=5,
                     killer=True, metrics_every=1, seed=41, memory_limit="1GB", out_dir="runs/a")
    cfg = WGANConfig(**cfg.model_dump() | dict(epochs=1, n_points=600, n_train=500))
    res = train_wgan(cfg, progress=False)
    assert len(res.history) == 1 and res.sample(1000).shape == (1000, 2) and res.peak_bytes > 10**8 and res.seconds > 0 and res.stopped_early is False
    res2 = train_wgan(cfg, resume="runs/a", progress=False)
    pd.testing.assert_frame_equal(res.history, res2.history, check_exact=True)
    np.testing.assert_array_equal(res.sample(10, seed=3), res2.sample(10, seed=3))
    assert {path.name for path in (tmp_path / "runs/a").iterdir()} == {"checkpoints", "results.json", "samples.npz"}


def stop_at(n):
    def callback(row):
        if row["epoch"] == n: raise KeyboardInterrupt
    return callback


@pytest.mark.parametrize("changes", [dict(noise="normal", killer=True), dict(noise="shadow", n_observables=2, shots=10), dict(metrics_every=3)])
def test_a_run_goes_on_as_if_nothing_had_happened(tmp_path, changes):
    config = tiny(epochs=5, out_dir=str(tmp_path / "run"), **changes)
    whole = train_wgan(WGANConfig(**config.model_dump() | dict(out_dir=None)), progress=False)
    for n in (2, 4):
        with pytest.raises(KeyboardInterrupt): train_wgan(config, resume=config.out_dir, progress=False, callback=stop_at(n))
    resumed = train_wgan(config, resume=config.out_dir, progress=False)
    assert resumed.resumed_from == 3 and resumed.peak_bytes >= resumed.history.peak_bytes.max()
    pd.testing.assert_frame_equal(whole.history[MEASURED_ALIKE], resumed.history[MEASURED_ALIKE], check_exact=True)
    assert whole.scores.keys() == resumed.scores.keys() and whole.samples.keys() == resumed.samples.keys()
    for epoch, scores in whole.scores.items():
        assert [(n, s.value, s.stderr, s.definition) for n, s in scores.items()] == [(n, s.value, s.stderr, s.definition) for n, s in
                                                                                     resumed.scores[epoch].items()]
    for epoch, x in whole.samples.items(): np.testing.assert_array_equal(x, resumed.samples[epoch])
    for a, b in zip(whole.gan.parameters(), resumed.gan.parameters(), strict=True): assert torch.equal(a, b)
    pd.testing.assert_frame_equal(whole.summary(), resumed.summary())


def test_checkpoints_are_few(tmp_path):
    config = tiny(noise="normal", epochs=12, out_dir=str(tmp_path), metrics_every=2)
    result = train_wgan(config, progress=False)
    kept = wgan.Checkpoints(tmp_path / "checkpoints").list()
    assert len(kept) <= 8 and [c.epoch for c in kept][-5:] == [8, 9, 10, 11, 12] and all(c.light for c in kept[:-5])
    ranked = result.history.dropna(subset=["wasserstein"]).sort_values("wasserstein").epoch.tolist()[:3]
    assert set(ranked) <= {c.epoch for c in kept}
    if kept[0].light:
        with pytest.raises(InvalidInput, match="was kept for its score and holds the generator alone"): train_wgan(config, resume=kept[0].path)
    longer = train_wgan(WGANConfig(**config.model_dump() | dict(epochs=13)), resume=tmp_path, progress=False)
    assert longer.resumed_from == 12 and len(longer.history) == 13


def test_what_cannot_be_resumed(tmp_path):
    config = tiny(noise="normal", out_dir=str(tmp_path / "run"), n_critic=1)
    with pytest.raises(InvalidInput, match="there is no run .*gone to go on from"): train_wgan(config, resume=tmp_path / "gone")
    with pytest.raises(InvalidInput, match="there is no run .* to go on from"): train_wgan(config, resume=tmp_path)
    with pytest.raises(KeyboardInterrupt): train_wgan(config, progress=False, callback=stop_at(2))
    with pytest.raises(InvalidInput, match="ended at epoch 1 before it was finished: go on with resume="): train_wgan(config, progress=False)
    with pytest.raises(InvalidInput, match="is of another configuration: hidden was .16, 16., is .16, 8."):
        train_wgan(WGANConfig(**config.model_dump() | dict(hidden=(16, 8))), resume=config.out_dir)
    with pytest.raises(InvalidInput, match="another configuration: points was"): train_wgan(config, data=torch.randn(600, 2), resume=config.out_dir)
    newest = wgan.Checkpoints(tmp_path / "run/checkpoints").latest().path
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.raises(InvalidInput, match="epoch_00001.safetensors is truncated"): train_wgan(config, resume=config.out_dir, progress=False)
    wgan.Checkpoints(tmp_path / "other").save(1, {"w": torch.zeros(2)}, {})
    with pytest.raises(InvalidInput, match="is no checkpoint of a WGAN"): train_wgan(config, resume=tmp_path / "other/epoch_00001.safetensors")


def test_a_damaged_newest_checkpoint_is_told_and_passed_over(tmp_path):
    config = tiny(noise="normal", n_critic=1, epochs=3, out_dir=str(tmp_path / "run"))
    whole = train_wgan(config, progress=False)
    paths = [c.path for c in wgan.Checkpoints(tmp_path / "run/checkpoints").list()]
    flipped = bytearray(paths[1].read_bytes())
    flipped[20] ^= 255
    for damage in (paths[2].read_bytes()[:-100], b"", bytes(flipped)):
        paths[2].write_bytes(damage)
        with pytest.warns(UserWarning, match="epoch_00003.safetensors is truncated .*Going on from epoch_00002.safetensors instead"):
            again = train_wgan(config, resume=config.out_dir, progress=False)
        assert again.resumed_from == 2
        pd.testing.assert_frame_equal(whole.history[MEASURED_ALIKE], again.history[MEASURED_ALIKE], check_exact=True)
        assert wgan.Checkpoints(tmp_path / "run/checkpoints").latest().epoch == 3
    for path in paths: path.write_bytes(b"")
    with pytest.raises(InvalidInput, match="epoch_00003.safetensors is truncated .*begin again in another out_dir, or delete .*checkpoints"):
        train_wgan(config, resume=config.out_dir, progress=False)


@pytest.mark.parametrize("changes", [dict(metrics_every=2), dict(metrics_every=4, early_stop=True, patience=2, window=1, min_delta=10.0)])
def test_a_run_made_longer_is_the_long_run(tmp_path, changes):
    config = tiny(noise="normal", n_critic=1, epochs=9, **changes)
    straight = train_wgan(config, progress=False)
    for epochs in (3, 5, 9):
        longer = WGANConfig(**config.model_dump() | dict(epochs=epochs, out_dir=str(tmp_path)))
        grown = train_wgan(longer, resume=tmp_path, progress=False)
        assert "mmd" in grown.scores[len(grown.history)]
    pd.testing.assert_frame_equal(straight.history[MEASURED_ALIKE], grown.history[MEASURED_ALIKE], check_exact=True)
    assert straight.scores.keys() == grown.scores.keys() and straight.samples.keys() == grown.samples.keys()
    assert all(straight.scores[epoch].keys() == grown.scores[epoch].keys() for epoch in straight.scores)


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").write_text("mine")
    def never(row): raise AssertionError("it trained")
    for out_dir in ("file", "file/below", "run"):
        config = tiny(noise="normal", checkpoint_every=100, out_dir=str(tmp_path / out_dir))
        with pytest.raises(InvalidInput, match="nothing can be written to .* take another out_dir"):
            train_wgan(config, progress=False, callback=never)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_finished_run_may_be_replaced(tmp_path):
    config = tiny(noise="normal", n_critic=1, out_dir=str(tmp_path))
    train_wgan(config, progress=False)
    again = train_wgan(WGANConfig(**config.model_dump() | dict(epochs=1, seed=3)), progress=False)
    assert again.resumed_from == 0 and [c.epoch for c in wgan.Checkpoints(tmp_path / "checkpoints").list()] == [1]


KILLED = ("import os, signal, sys, threading; from test_wgan import *\n"
          "threading.Timer(float(sys.argv[2]), os.kill, (os.getpid(), signal.SIGKILL)).start()\n"
          "train_wgan(long_enough_to_kill(sys.argv[1], sys.argv[3]), resume=sys.argv[1], progress=False)")


def long_enough_to_kill(folder, noise): return tiny(noise=noise, epochs=4, n_train=2000, n_points=2500, out_dir=folder and str(folder))


def kill_often(folder, n_kills, noise, seed):
    random, n_hit = np.random.default_rng(seed), 0
    for _ in range(n_kills):
        command = [sys.executable, "-c", KILLED, str(folder), str(round(random.uniform(0.01, 1.2), 3)), noise]
        n_hit += subprocess.run(command, cwd=os.path.dirname(__file__), capture_output=True).returncode == -9
    whole = train_wgan(long_enough_to_kill(None, noise), progress=False)
    last = train_wgan(long_enough_to_kill(folder, noise), resume=folder, progress=False)
    pd.testing.assert_frame_equal(whole.history[MEASURED_ALIKE], last.history[MEASURED_ALIKE], check_exact=True)
    return n_hit


def test_killed_twice_and_the_history_is_the_same(tmp_path): kill_often(tmp_path, 2, "normal", 0)


@pytest.mark.torture
@pytest.mark.parametrize("noise", ["normal", "shadow"])
def test_killed_at_twenty_random_moments(tmp_path, noise): assert kill_often(tmp_path, 20, noise, 1) > 0


def test_a_target_of_ones_own(tmp_path):
    data = torch.randn(300, 3, generator=torch.Generator().manual_seed(0)) + 3
    config = tiny(noise="normal", n_validation=40, epochs=1)
    result = train_wgan(config, data=data, progress=False)
    assert result.sample(7).shape == (7, 3) and set(result.ideal) == {"is_positive", "wasserstein", "mmd", "mmd_multiscale", "wasserstein_axes"}
    (tmp_path / "mine.csv").write_text("\n".join(",".join(map(repr, row)) for row in data.double().tolist()))
    by_file = train_wgan(tiny(noise="normal", n_validation=40, epochs=1, target=str(tmp_path / "mine.csv")), progress=False)
    pd.testing.assert_frame_equal(result.history[["critic_loss", "wasserstein"]], by_file.history[["critic_loss", "wasserstein"]], check_exact=True)
    with pytest.raises(InvalidInput, match="log_likelihood needs a target whose density is known"):
        train_wgan(tiny(noise="normal", metrics=("log_likelihood",)), data=data, progress=False)
    with pytest.raises(InvalidInput, match="leave fewer than 20 to compare with"): train_wgan(config, data=data[:50])
    with pytest.raises(InvalidInput, match="not empty"): train_wgan(config, data=data[:0])
    with pytest.raises(InvalidInput, match="there is no file"): train_wgan(tiny(target=str(tmp_path / "gone.csv")))
    data[4, 1] = math.nan
    with pytest.raises(NotFinite, match="target data: 1 of 900 values"): train_wgan(config, data=data)


@pytest.mark.parametrize(("values", "stale"), [([], 0), ([1.0] * 4, 0), ([1.0] * 5, 0), ([1.0] * 9, 4), ([9 - k for k in range(9)], 0),
                                               ([5, 4, 3, 2, 1, 1, 1, 1, 1, 1, 1], 2), ([1, 1, 1, 1, 1, 1 - 1e-6, 1 - 1e-6], 2)])
def test_how_long_nothing_got_better(values, stale): assert wgan.n_stale([float(v) for v in values]) == stale


def test_a_run_that_converged_ends(tmp_path):
    config = tiny(noise="normal", epochs=30, early_stop=True, patience=2, window=2, min_delta=1e3, best_by="wasserstein_axes", out_dir=str(tmp_path))
    result = train_wgan(config, progress=False)
    assert result.stopped_early and len(result.history) == 4
    again = train_wgan(config, resume=tmp_path, progress=False)
    assert again.stopped_early and len(again.history) == 4 and not train(epochs=1).stopped_early


def test_a_trace_can_be_written(tmp_path):
    table = wgan.profile_wgan(tiny(noise="normal"), trace=tmp_path / "trace.json", n_rounds=1)
    assert table.loc["aten::mm", "calls"] > 0 and json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
