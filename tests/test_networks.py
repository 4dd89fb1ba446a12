"The networks are seeded, shaped and bounded as they say"
import math

import pytest
import torch
from torch.nn import functional as F

from gausssafe.networks import Critic, DirectGenerator, GaussianGenerator, mlp, sign_loss, sign_reward

GENERATORS = [DirectGenerator, GaussianGenerator]


def seeded(seed=0): return torch.Generator().manual_seed(seed)
def flat(module): return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("make", [*GENERATORS, lambda n_in, **options: Critic(n_in, **options)])
def test_seeded_without_the_global_generator(make):
    before = torch.get_rng_state()
    first, twin, other = (flat(make(4, generator=seeded(seed))) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, twin) and not torch.equal(first, other)


def test_layers_begin_as_torch_s_own_do():
    ours = mlp((50, 400), generator=seeded())[0]
    for parameter in ours.parameters():
        assert parameter.abs().max() <= 50**-0.5 and parameter.requires_grad
        assert parameter.std().item() == pytest.approx(50**-0.5 / math.sqrt(3), rel=0.1)  # Of a uniform law; 400 draws of the bias give 3 %


@pytest.mark.parametrize("make", GENERATORS)
@pytest.mark.parametrize("hidden", [(8,), (16, 8), (8, 8, 8)])
def test_generators(make, hidden):
    generator, noise = make(3, hidden=hidden, generator=seeded()), torch.randn(10, 3, generator=seeded(1), requires_grad=True)
    x = generator(noise)
    assert x.shape == (10, 2)
    grads = torch.autograd.grad(x.square().sum(), [noise, *generator.parameters()])
    assert all(grad.isfinite().all() for grad in grads) and grads[0].abs().sum() > 0
    assert sum(isinstance(layer, torch.nn.BatchNorm1d) for layer in generator.modules()) == len(hidden)
    assert [layer.negative_slope for layer in generator.modules() if isinstance(layer, torch.nn.LeakyReLU)] == [0.2] * len(hidden)


def test_the_gaussian_generator_draws_what_its_heads_say():
    generator, noise = GaussianGenerator(3, hidden=(8,), generator=seeded()).eval(), torch.randn(1, 3, generator=seeded(1)).expand(40_000, 3)
    mean, std = (head[0] for head in generator.heads(noise))
    x = generator(noise).detach()
    assert torch.allclose(x.mean(0), mean, atol=4 * std.max().item() / 200) and torch.allclose(x.std(0), std, rtol=4 / math.sqrt(2 * 40_000))


@pytest.mark.parametrize(("log_variance", "std"), [(0.0, 1.1), (2.0, 1.1 * math.e), (-1.0, 1.1 * math.exp(-0.5)), (-2.0, 0.5), (-50.0, 0.5)])
def test_the_width_has_a_scale_and_a_floor(log_variance, std):
    generator = GaussianGenerator(3, hidden=(8,), generator=seeded())
    with torch.no_grad():
        generator.log_variance.weight.zero_()
        generator.log_variance.bias.fill_(log_variance)
    assert torch.allclose(generator.heads(torch.randn(5, 3, generator=seeded()))[1], torch.full((5, 2), std))


def test_the_generator_s_own_draws_are_seeded_and_move_on():
    noise = torch.randn(5, 3, generator=seeded(1))
    first, twin = (GaussianGenerator(3, hidden=(8,), generator=seeded()).eval() for _ in range(2))
    x = first(noise)
    assert torch.equal(x, twin(noise)) and not torch.equal(x, first(noise))


def test_the_critic_judges_each_point_alone():
    critic, x = Critic(hidden=(16, 16), generator=seeded()).double(), torch.randn(20, 2, generator=seeded(1), dtype=torch.float64)
    together = critic(x)
    alone = torch.cat([critic(x[i:i + 1]) for i in range(20)])
    assert together.shape == (20,)
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_the_sign_loss_is_binary_cross_entropy():
    x, logits = torch.randn(50, 2, generator=seeded(), dtype=torch.float64), torch.randn(50, generator=seeded(1), dtype=torch.float64)
    probability = logits.sigmoid()
    naive = -torch.stack([probability[i].log() if x[i, 0] >= 0 else (1 - probability[i]).log() for i in range(50)]).mean()
    torch.testing.assert_close(sign_loss(logits, x), naive)


def test_the_reward_grows_with_the_logits_and_never_flattens_on_the_left():
    logits = torch.linspace(-50, 50, 11, requires_grad=True)
    slopes, = torch.autograd.grad(11 * sign_reward(logits), logits)
    assert (slopes >= 0).all() and (slopes[:5] > 0.99).all() and sign_reward(logits) < 0
    torch.testing.assert_close(sign_reward(logits), F.logsigmoid(logits).mean())
