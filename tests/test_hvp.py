"Curvature products against dense float64 matrices, limits that hold, and what bad input gets"
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import cases
import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import eigsh
from torch import nn

from gausssafe import hvp
from gausssafe.errors import InvalidInput, MemoryBudgetExceeded, NotFinite
from gausssafe.hvp import FisherOperator, GGNOperator, HessianOperator
from gausssafe.memory import count_tensor_bytes

KINDS = {"hessian": HessianOperator, "ggn": GGNOperator, "fisher": FisherOperator}


def batches(x, y, *sizes):
    "Samples dealt into batches of these sizes"
    ends = np.cumsum((0, *sizes))
    cut = torch.utils._pytree.tree_map
    return [cut(lambda t, i=i, j=j: t[i:j], (x, y)) for i, j in zip(ends, ends[1:], strict=False)]


def relative_error(found, expected): return float((found.double() - expected).norm() / expected.norm())


def forced(operator, engine, chunk):
    "Take an engine and a chunk, whatever the limit says"
    operator.plan_for(1)
    if engine == "segments": assert operator._has_chain(*operator._first(), 10**9)
    make = operator._make_plan
    def plan(*args): return __import__("dataclasses").replace(make(*args), engine=engine, chunk=chunk)
    operator._make_plan, operator._plans = plan, {}
    return operator


@pytest.mark.parametrize("name", cases.CURVATURE)
@pytest.mark.parametrize("kind", KINDS)
def test_dense_matrix(name, kind):
    "Columns against float64, float32 with ragged batches; 1e-5 is what the issue asks at this size"
    model, loss_fn, x, y = cases.curvature_case(name)
    expected = reference.dense_curvature(model, loss_fn, x, y, kind)
    params = list(model.parameters())
    for engine, chunk in (("reverse", 2), ("segments", 2))[:2 if kind == "hessian" else 1]:
        operator = forced(KINDS[kind](model, loss_fn, params, batches(x, y, 5, 2)), engine, chunk)
        v = torch.randn(operator.shape[0], 3, generator=torch.Generator().manual_seed(0))
        assert relative_error(operator @ v, expected @ v.double()) < 1e-5, engine
        assert relative_error(operator @ v[:, 0], expected @ v[:, 0].double()) < 1e-5, engine


@pytest.mark.parametrize("engine", ["reverse", "segments"])
def test_float64(engine):
    model, loss_fn, x, y = cases.curvature_case("gpt")
    operator = forced(HessianOperator(model, loss_fn, list(model.parameters()), batches(x, y, 7), dtype=torch.float64), engine, 3)
    v = torch.randn(operator.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert relative_error(operator @ v, reference.double_backward(model, loss_fn, x, y, v)) < 1e-12
    assert next(model.parameters()).dtype == torch.float32


def test_layer_norm_gate_catches_the_mistake():
    "torch.func's jvp of a reverse-mode Jacobian is wrong where a norm's input and weight both depend on parameters; the gate above would see it"
    from torch.func import functional_call, jacrev, jvp
    model, loss_fn, x, y = cases.curvature_case("layer norm mlp")
    model, x = model.double(), x.double()
    params = dict(model.named_parameters())
    v = {name: torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(i)) for i, (name, p) in enumerate(params.items())}
    flat = torch.cat([t.flatten() for t in v.values()])
    exact = reference.double_backward(model, loss_fn, x, y, flat)
    product = jvp(jacrev(lambda p: loss_fn(functional_call(model, p, x), y)), (params,), (v,))[1]
    assert relative_error(torch.cat([t.flatten() for t in product.values()]), exact) > 1e-3
    ours = HessianOperator(model, loss_fn, list(model.parameters()), [(x, y)]) @ flat
    assert relative_error(ours, exact) < 1e-12


def gpt_and_tokens(n=12):
    torch.manual_seed(0)
    model, ids = cases.GPT(13, 32, 32, 2, 3), torch.randint(13, (n, 33))
    return model, ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("above, k", [(20_000_000, 3), (1_300_000, 1), (600_000, 1), *(pytest.param(above, k, marks=pytest.mark.slow) for above, k in
                                      [(20_000_000, 1), (3_000_000, 1), (3_000_000, 3), (1_300_000, 3), (600_000, 3)])])
def test_limit_holds_and_is_predicted(above, k):
    "Everything from the probes to the last chunk, v counted; fresh model each time"
    model, x, y = gpt_and_tokens()
    limit = 2 * k * 4 * sum(p.numel() for p in model.parameters()) + above
    operator = HessianOperator(model, cases.lm_loss, list(model.parameters()), batches(x, y, 9, 3), memory_limit=limit)
    v = torch.randn(k, operator.shape[0]).T if k > 1 else torch.randn(operator.shape[0])
    with count_tensor_bytes() as counted: product = operator @ v
    plan, v_bytes = operator.plan, v.numel() * 4
    assert counted.peak_bytes + v_bytes <= plan.limit_bytes
    assert plan.peak_bytes <= plan.predicted_bytes <= 1.05 * plan.peak_bytes
    exact = reference.double_backward(model, cases.lm_loss, x, y, v.reshape(operator.shape[0], -1)[:, 0])
    assert relative_error(product.reshape(operator.shape[0], -1)[:, 0], exact) < 1e-5
    if above == 600_000: assert plan.engine == "segments"


@pytest.mark.parametrize("name, k, limit", [("group norm cnn", 1, 21_928), ("batch norm cnn", 2, 42_361), ("layer norm mlp", 2, 3_349)])
def test_a_probe_stops_before_the_limit(name, k, limit):
    "Not after the operation that passed it, and what it was about to do is let go"
    model, loss_fn, x, y = cases.curvature_case(name)
    operator = HessianOperator(model, loss_fn, list(model.parameters()), [(x, y)], memory_limit=limit)
    v = torch.randn(operator.shape[0], k)
    with count_tensor_bytes() as counted: operator @ v
    assert counted.peak_bytes + v.numel() * 4 <= limit


def test_a_stopped_backward_pass_keeps_nothing():
    "torch holds the tensors of a backward pass that an error stopped until the next one: a planner that stops probes cannot wait for that"
    model, x, y = gpt_and_tokens(2)
    operator = HessianOperator(model, cases.lm_loss, list(model.parameters()), [(x, y)])
    step = operator._step("reverse", x, y, *(torch.zeros(1, operator.shape[0]) for _ in range(2)))
    with count_tensor_bytes() as counted, pytest.raises(hvp._OverLimit), hvp._differentiable(): hvp._capped(lambda: step(0, 2), 1_274_000)
    assert counted.peak_bytes > 1_000_000 > 10_000 > counted.alive_bytes


def test_columns_that_are_not_contiguous():
    model, x, y = gpt_and_tokens(4)
    operator = HessianOperator(model, cases.lm_loss, list(model.parameters()), [(x, y)], memory_limit="10MB")
    v = torch.randn(operator.shape[0], 4)
    with count_tensor_bytes() as counted: product = operator @ v
    assert counted.peak_bytes + v.numel() * 4 <= 10**7 and operator.plan.peak_bytes <= operator.plan.predicted_bytes
    torch.testing.assert_close(product, operator @ v.T.contiguous().T)


@pytest.mark.parametrize("engine", ["reverse", "segments"])
@pytest.mark.parametrize("block", ["blocks.1", "head", "tokens", ["blocks.0.qkv", "norm.weight"]])
def test_block_is_a_block(engine, block):
    model, loss_fn, x, y = cases.curvature_case("gpt")
    params = list(model.parameters())
    if block == "head":  # Tied: its parameter goes by the first name
        with pytest.raises(InvalidInput, match=r"block \['head'\] names none of params; names start like tokens.weight"): HessianOperator(model,
                loss_fn, params, [(x, y)], block=block)
        return
    whole, part = HessianOperator(model, loss_fn, params, [(x, y)]), forced(HessianOperator(model, loss_fn, params, [(x, y)], block=block), engine, 3)
    inside = torch.cat([torch.arange(span.start, span.stop) for name, span in whole.slices.items() if name in part.names])
    v = torch.randn(part.shape[0])
    padded = torch.zeros(whole.shape[0])
    padded[inside] = v
    torch.testing.assert_close(part @ v, (whole @ padded)[inside], atol=1e-6, rtol=1e-4)


def test_kinds_of_v():
    model, loss_fn, x, y = cases.curvature_case("tanh mlp, squares")
    params = list(model.parameters())
    H = HessianOperator(model, loss_fn, dict(model.named_parameters()), [(x, y)])
    v = torch.randn(H.shape[0])
    by_name = H @ {name: v[span].view(p.shape) for (name, span), p in zip(H.slices.items(), params, strict=True)}
    torch.testing.assert_close(torch.cat([t.flatten() for t in by_name.values()]), H @ v)
    np.testing.assert_allclose(H @ v.numpy(), (H @ v).numpy())
    scipy = HessianOperator(model, loss_fn, params, [(x, y)], dtype=torch.float64).to_scipy()
    dense = reference.dense_curvature(model, loss_fn, x, y).numpy()
    np.testing.assert_allclose(eigsh(scipy, k=3)[0], np.sort(np.linalg.eigvalsh(dense)[np.abs(np.linalg.eigvalsh(dense)).argsort()[-3:]]), rtol=1e-5)
    assert H.dtype == torch.float32 and H.shape == (len(v), len(v)) and all(p.grad is None for p in params)
    for bad in (v[1:], torch.randn(3, 4, 5), torch.zeros(len(v), 0), "v", {"0.weight": v}):
        with pytest.raises(InvalidInput, match="v "): H @ bad
    v[3] = torch.nan
    with pytest.raises(NotFinite, match=f"v: 1 of {len(v)}"): H @ v


def test_plans():
    model, x, y = gpt_and_tokens()
    params = list(model.parameters())
    H = HessianOperator(model, cases.lm_loss, params, batches(x, y, 8, 4), memory_limit="5MB")
    assert H.plan.peak_bytes is None and H.plan.predicted_s > 0 and H.plan.n_vectors == 1
    H @ torch.randn(H.shape[0], 2)
    assert H.plan.n_vectors == 2 and H.plan.peak_bytes <= H.plan.limit_bytes and "limit 5.00 MB" in str(H.plan)
    with pytest.raises(MemoryBudgetExceeded, match=r"v and Hv alone needs .* 5.00 MB budget.*fewer vectors, or a block of .*, such as block='b"):
        H.plan_for(40)
    with pytest.raises(MemoryBudgetExceeded, match="for one sample at a time; v and Hv are"):
        HessianOperator(model, cases.lm_loss, params, [(x, y)], memory_limit=2 * 4 * H.shape[0] + 1000).plan  # noqa: B018
    block = HessianOperator(model, cases.lm_loss, params, batches(x, y, 8, 4), memory_limit="0.45MB", block="blocks.1")
    assert block.plan.engine == "segments"


def test_gradients_of_weights_are_never_formed():
    "A large tied vocabulary, short sequences: less than one tensor of the table's size beyond v and Hv"
    model = cases.randomize(cases.GPT(vocab=20_000, width=16)).eval()
    tokens = torch.randint(20_000, (1, 4))
    H = HessianOperator(model, cases.lm_loss, list(model.parameters()), [(tokens[:, :-1], tokens[:, 1:])])
    v = torch.randn(H.shape[0])
    error = relative_error(H @ v, reference.double_backward(model, cases.lm_loss, tokens[:, :-1], tokens[:, 1:], v))
    assert error < 1e-5 and H.plan.peak_bytes - H.plan.floor_bytes < model.tokens.weight.nbytes


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("wrt", ["input", "weights"])
def test_a_gradient_inside_the_loss_that_counts_as_a_number(create_graph, wrt):
    "It must neither be left out nor be taken for a part of the outer gradient"
    model, x, y = cases.tanh_mlp().double(), torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))

    class Weighed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            x = x.detach().requires_grad_()
            z = self.inner(x)
            of = x if wrt == "input" else self.inner[0].weight
            slope, = torch.autograd.grad(z.square().mean(), of, create_graph=create_graph, retain_graph=True)
            return z * (1 + slope.detach().norm())

    whole = Weighed().eval()
    v = torch.randn(sum(p.numel() for p in whole.parameters()), dtype=torch.float64)
    H = HessianOperator(whole, F.cross_entropy, list(whole.parameters()), [(x[:1], y[:1])])
    assert relative_error(H @ v, reference.double_backward(whole, F.cross_entropy, x[:1], y[:1], v)) < 1e-12


def test_longer_sequences_later_are_planned_anew():
    model, x, y = gpt_and_tokens(4)
    data = [(x[:, :8], y[:, :8]), (x, y), (x[:2, :16], y[:2, :16])]
    H = HessianOperator(model, cases.lm_loss, list(model.parameters()), data, memory_limit="3MB")
    v = torch.randn(H.shape[0])
    with count_tensor_bytes() as counted: product = H @ v
    assert counted.peak_bytes + v.numel() * 4 <= 3_000_000
    parts = [len(a) * reference.double_backward(model, cases.lm_loss, a, b, v) for a, b in data]
    assert relative_error(product, sum(parts) / 10) < 1e-5


class Drops(nn.Linear):
    def forward(self, x): return super().forward(F.dropout(x, 0.5))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.exp()
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g): return g


class OnlyOnce(nn.Linear):
    def forward(self, x): return Once.apply(super().forward(x))


X, Y = torch.randn(6, 4), torch.randint(3, (6,))
NAN = X.clone()
NAN[0] = torch.nan
MISTAKES = {
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.1)), {}, InvalidInput,
        r"not deterministic: 1 drops 10% of its input. Call model.eval\(\)"),
    "hidden dropout": (lambda: Drops(4, 3), {}, InvalidInput, r"not deterministic: two losses of the same 2 samples are .* Call model.eval\(\)"),
    "batch norm": (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), {}, InvalidInput, r"1 normalises over the batch.*model.eval\(\)"),
    "no second derivative": (lambda: OnlyOnce(4, 3), {}, InvalidInput, "no second derivative"),
    "no batches": (None, {"data": []}, InvalidInput, "no batches.*drop_last"),
    "generator": (None, {"data": iter([(X, Y)])}, InvalidInput, "read only once.*DataLoader"),
    "not pairs": (None, {"data": [X]}, InvalidInput, r"a pair \(x, y\), not Tensor of 6"),
    "vector loss": (None, {"loss_fn": lambda z, y: F.cross_entropy(z, y, reduction="none")}, InvalidInput, r"one number.*not \(2,\)"),
    "summed loss": (None, {"loss_fn": lambda z, y: F.cross_entropy(z, y, reduction="sum")}, InvalidInput,
        "not a mean over samples.*reduction='mean'"),
    "untouched": (lambda: nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(2, 2)}), {"forward": "a"}, InvalidInput,
        "does not depend on b.bias, b.weight: leave them out"),
    "NaN": (None, {"data": [(NAN, Y)]}, NotFinite, "the loss of the first 2 samples: 1 of 1"),
    "NaN later": (None, {"data": [(X, Y), (NAN, Y)]}, NotFinite, "the loss: 1 of 1"),
    "limit": (None, {"memory_limit": "a lot"}, InvalidInput, "memory_limit: 'a lot' is not a size"),
    "block": (None, {"block": "layer9"}, InvalidInput, "names none of params; names start like weight, bias"),
    "no module": (lambda: (lambda x: x), {"params": [torch.zeros(2)]}, InvalidInput, "torch.nn.Module, not function"),
    "strange params": (None, {"params": [nn.Parameter(torch.zeros(3))]}, InvalidInput, "1 of the 1 given are not"),
    "no params": (None, {"params": []}, InvalidInput, "0 of the 0 given"),
    "no group": (None, {"distributed": True}, InvalidInput, "init_process_group"),
}


class Chosen(nn.Module):
    def __init__(self, model, name):
        super().__init__()
        self.a, self.b, self.name = model["a"], model["b"], name

    def forward(self, x): return getattr(self, self.name)(x)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name):
    make, changes, error, message = MISTAKES[name]
    changes = dict(changes)
    model = make() if make else nn.Linear(4, 3)
    if "forward" in changes: model = Chosen(model, changes.pop("forward"))
    settings = {"loss_fn": F.cross_entropy, "data": [(X, Y)], "memory_limit": None} | changes
    params = settings.pop("params", None) or ([] if "params" in changes else list(model.parameters()))
    with pytest.raises(error, match=message):
        H = HessianOperator(model, settings.pop("loss_fn"), params, settings.pop("data"), **settings)
        H @ torch.randn(H.shape[0])


def test_data_that_change_between_products_are_noticed():
    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(50, 4), torch.randint(3, (50,))), batch_size=16, shuffle=True,
        drop_last=True)
    model = nn.Linear(4, 3)
    H = HessianOperator(model, F.cross_entropy, list(model.parameters()), loader)
    v = torch.randn(H.shape[0])
    H @ v
    with pytest.raises(InvalidInput, match="data changed between two products.*shuffle=True with drop_last=True"): H @ v
    steady = torch.utils.data.DataLoader(loader.dataset, batch_size=16, shuffle=True)
    H = HessianOperator(model, F.cross_entropy, list(model.parameters()), steady)
    torch.testing.assert_close(H @ v, H @ v)
    model.weight.data.mul_(2)  # New parameters may have a new loss
    H @ v


def test_a_model_that_differentiates_inside():
    "A third derivative: torch's own kernels take over"
    class Slope(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 5), nn.GELU(), nn.Linear(5, 1))

        def forward(self, x):
            x = x.detach().requires_grad_()
            with torch.enable_grad(): return torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]
    torch.manual_seed(0)
    model, x, y = Slope(), torch.randn(6, 2), torch.randn(6, 2)
    params = [p for name, p in model.named_parameters() if name != "net.2.bias"]
    H, v = HessianOperator(model, F.mse_loss, params, [(x, y)]), torch.randn(sum(p.numel() for p in params))
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(F.mse_loss(model(x), y), params, create_graph=True)])
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(gradient @ v, params)])
    torch.testing.assert_close(H @ v, expected, atol=1e-6, rtol=1e-4)


class Twice(nn.Module):
    "One module by two names"
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(4, 4), nn.Linear(4, 3)
        self.b = self.a

    def forward(self, x): return self.out(torch.tanh(self.b(torch.tanh(self.a(x)))))


def test_the_model_is_itself_again():
    "A module by two names too, and after an error in the middle of a product"
    model = cases.randomize(Twice())
    before = [(id(p), type(p)) for m in model.modules() for p in m._parameters.values()]
    H, v = HessianOperator(model, F.cross_entropy, list(model.parameters()), [(X, Y)]), torch.randn(35)
    assert relative_error(H @ v, reference.double_backward(model, F.cross_entropy, X.double(), Y, v)) < 1e-5
    def failing(z, y): raise KeyboardInterrupt
    H._objective.loss_fn = failing
    with pytest.raises(KeyboardInterrupt): H @ v
    assert [(id(p), type(p)) for m in model.modules() for p in m._parameters.values()] == before


@pytest.mark.parametrize("engine", ["reverse", "segments"])
def test_a_penalty_on_the_parameters(engine):
    "Found where the model's parameters are looked up; refused where a list of them was made before"
    model, loss_fn, x, y = cases.curvature_case("tanh mlp, squares")
    params = list(model.parameters())
    def penalised(model): return lambda z, y: loss_fn(z, y) + sum((p**4).sum() for p in model.parameters())
    H, v = forced(HessianOperator(model, penalised(model), params, [(x, y)]), engine, 3), torch.randn(sum(p.numel() for p in params))
    bend = torch.cat([12 * p.detach().double().flatten() ** 2 for p in params]) * v.double()
    assert relative_error(H @ v, reference.double_backward(model, loss_fn, x.double(), y.double(), v) + bend) < 1e-5
    with pytest.raises(InvalidInput, match=r"the loss reads .* from a reference made before.*model.parameters\(\) inside loss_fn"):
        HessianOperator(model, lambda z, y: loss_fn(z, y) + sum(p.square().sum() for p in params), params, [(x, y)])


class Stack(nn.Module):
    "Blocks between two linear layers; `run` says how"
    def __init__(self, run, n=3, shared=False):
        super().__init__()
        self.into, self.out, self.run = nn.Linear(4, 5), nn.Linear(5, 3), run
        blocks = [nn.Sequential(nn.Tanh(), nn.Linear(5, 5)) for _ in range(1 if shared else n)]
        self.blocks = nn.ModuleList(blocks * n if shared else blocks)

    def forward(self, x): return self.out(torch.tanh(self.run(self, self.into(x))))


def through(model, h):
    for block in model.blocks: h = block(h)
    return h


def hooked(kind, block):
    model = Stack(through)
    getattr(model.blocks[block], f"register_forward_{kind}")(lambda module, *seen: (2 * seen[0][0],) if kind == "pre_hook" else 2 * seen[1])
    return model


def keeping_all(use):
    def run(model, h):
        seen = [h]
        for block in model.blocks: seen.append(block(seen[-1]))
        return use(seen)
    return Stack(run)


class Remembering(nn.Linear):
    "A block with a cache, which the model empties before each pass"
    def forward(self, h, cache):
        cache.append(super().forward(h))
        return sum(cache) / 3 ** len(cache)


def cached():
    def run(model, h):
        for block in model.blocks: h = block(h, [])
        return h
    model = Stack(run)
    model.blocks = nn.ModuleList(Remembering(5, 5) for _ in range(3))
    return model


CHAINS = {  # (model, whether its blocks are a chain)
    "one block three times": (lambda: Stack(through, shared=True), True),
    "a head with a block's weight": (lambda: Stack(lambda m, h: F.linear(through(m, h), m.blocks[1][1].weight.t())), True),
    "a head that is a part of a block": (lambda: Stack(lambda m, h: m.blocks[0][1](through(m, h))), True),
    "a skip around the blocks": (lambda: Stack(lambda m, h: through(m, h) + h.sin()), True),
    **{f"{kind} on block {i}": (lambda kind=kind, i=i: hooked(kind, i), True) for kind in ("pre_hook", "hook") for i in (0, 1, 2)},
    "the middle is read later": (lambda: keeping_all(lambda seen: seen[-1] + seen[1]), False),
    "the middle is read as a number": (lambda: keeping_all(lambda seen: seen[-1] * seen[1].detach()), False),
    "changed in place afterwards": (lambda: Stack(lambda m, h: through(m, h).mul_(2)), False),
    "a block that remembers": (cached, False),
}


@pytest.mark.parametrize("name", CHAINS)
def test_segments_are_right_or_left_out(name):
    make, applies = CHAINS[name]
    model = cases.randomize(make())
    H = HessianOperator(model, F.cross_entropy, list(model.parameters()), [(X, Y)])
    found = H._has_chain(*H._first(), 10**9)  # Else a part of one block may be
    assert (found and H._chain.blocks == list(model.blocks)) is applies
    if found: H = forced(H, "segments", 4)
    v = torch.randn(H.shape[0], generator=torch.Generator().manual_seed(0))
    assert relative_error(H @ v, reference.double_backward(model, F.cross_entropy, X.double(), Y, v)) < 1e-5


def test_a_model_that_takes_another_path_later():
    def run(model, h): return through(model, h) if h.sum() > 0 else model.blocks[2].forward(model.blocks[1](model.blocks[0](h)))
    model, x = Stack(run), torch.randn(6, 4)
    model.into.weight.data.fill_(1)
    x[:3], x[3:] = 5 + x[:3].abs(), -5 - x[3:].abs()
    H = forced(HessianOperator(model, F.cross_entropy, list(model.parameters()), [(x, Y)]), "segments", 3)
    with pytest.raises(InvalidInput, match="another order or manner than for the first sample.*larger memory_limit"): H @ torch.randn(H.shape[0])


def test_padded_transformer_encoder():
    "Whose fast path, which has no second derivative, must stay shut where no gradient is asked for"
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, 0.1, batch_first=True), 3)

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.encoder = nn.Linear(4, 4), encoder

        def forward(self, x, padding): return self.encoder(self.into(x), src_key_padding_mask=padding)[:, 0]
    model, x, padding = cases.randomize(Padded()).eval(), torch.randn(4, 5, 4), torch.zeros(4, 5, dtype=torch.bool)
    padding[1, 3:] = padding[2, 4:] = True
    v, y = torch.randn(sum(p.numel() for p in model.parameters())), torch.randn(4, 4)
    whole, parts = (forced(HessianOperator(model, F.mse_loss, list(model.parameters()), [((x, padding), y)], dtype=torch.float64), engine, 3)
                    for engine in ("reverse", "segments"))
    assert relative_error(parts @ v, whole @ v) < 1e-12 and torch.backends.mha.get_fastpath_enabled()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
def test_hugging_face_models_in_segments(kind):
    "Which fill a cache of keys and values as they run, if nobody tells them not to"
    transformers = pytest.importorskip("transformers")
    shared = {"vocab_size": 11, "bos_token_id": 0, "eos_token_id": 0}
    model = (transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=64, n_embd=16, n_layer=4, n_head=2, **shared)) if kind == "GPT2" else
             transformers.LlamaForCausalLM(transformers.LlamaConfig(hidden_size=16, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
                                                                    num_key_value_heads=1, max_position_embeddings=64, **shared))).eval()
    ids = torch.randint(11, (4, 33))
    def loss_fn(out, y): return F.cross_entropy(out.logits.flatten(0, 1), y.flatten())
    tight, free = (HessianOperator(model, loss_fn, list(model.parameters()), [(ids[:, :-1], ids[:, 1:])], memory_limit=limit)
                   for limit in ("500kB", None))
    v = torch.randn(tight.shape[0])
    assert relative_error(tight @ v, (free @ v).double()) < 1e-5 and tight.plan.engine == "segments" and model.config.use_cache


TOKENS, PADDED = torch.randint(4, (8, 6)), torch.randint(4, (8, 6))
PADDED[4:, 3:] = -100
WEIGHTS, CLASSES = torch.tensor([1.0, 5.0, 10.0]), torch.tensor([0, 0, 1, 2, 1, 2, 0, 1])


def token_loss(z, y): return F.cross_entropy(z.flatten(0, 1), y.flatten())
def weighted_loss(z, y): return F.cross_entropy(z, y, weight=WEIGHTS)


@pytest.mark.parametrize("case", ["padded", "weighted", "in a later batch", "two alike"])
def test_a_loss_that_is_no_mean_though_its_first_samples_are_alike(case):
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4)) if case in ("padded", "two alike") else nn.Linear(4, 3)
    x = torch.randn(8, 4)
    data, loss_fn = {"padded": ([(TOKENS, PADDED)], token_loss), "weighted": ([(x, CLASSES)], weighted_loss),
                     "in a later batch": ([(x, 0 * CLASSES), (x, CLASSES)], weighted_loss), "two alike": ([(TOKENS, TOKENS)], token_loss)}[case]
    expectation = pytest.raises(InvalidInput, match=r"not a mean over samples: .* for two of them together \(samples 0 and")
    with nullcontext() if case == "two alike" else expectation:
        H = HessianOperator(model, loss_fn, list(model.parameters()), data)
        H @ torch.randn(H.shape[0])


class Stream(torch.utils.data.IterableDataset):
    "Samples that come once; `iterate` says how"
    def __init__(self, iterate): self.samples, self.iterate = iter(list(zip(X, Y, strict=True))), iterate
    def __iter__(self): return self.iterate(self.samples)


@pytest.mark.parametrize("iterate, message", [(iter, "can be read only once"), (lambda samples: (s for s in samples), "4 samples and then no more")])
def test_a_stream_is_no_data_set(iterate, message):
    model, loader = nn.Linear(4, 3), torch.utils.data.DataLoader(Stream(iterate), batch_size=2)
    with pytest.raises(InvalidInput, match=message): HessianOperator(model, F.cross_entropy, list(model.parameters()), loader) @ torch.randn(15)


@pytest.mark.parametrize("kind", ["ggn", "fisher"])
def test_what_a_gauss_newton_matrix_cannot_see(kind):
    class Losing(nn.Linear):
        def forward(self, x, y): return {"loss": F.cross_entropy(z := super().forward(x), y), "logits": z}
    model, data = Losing(4, 3), [((X, Y), Y)]
    params = list(model.parameters())
    with pytest.raises(InvalidInput, match=r"an output of shape \(\).*take the loss .*the logits"):
        KINDS[kind](model, lambda out, y: out["loss"], params, data)
    def loss_fn(out, y): return F.cross_entropy(out["logits"], y)
    linear = nn.Linear(4, 3)
    linear.load_state_dict(model.state_dict())
    expected = reference.dense_curvature(linear, F.cross_entropy, X, Y, kind)
    assert relative_error(KINDS[kind](model, loss_fn, params, data) @ torch.eye(15), expected) < 1e-5
    with pytest.raises(InvalidInput, match="reads parameters past the tensors that the model returns"):
        KINDS[kind](model, lambda out, y: loss_fn(out, y) + model.weight.square().sum(), params, data)
    with pytest.raises(InvalidInput, match="linear in the model's outputs" if kind == "ggn" else r"shape \(6,\) for 2 samples"):
        KINDS[kind](linear, lambda z, y: z.mean(), list(linear.parameters()), [(X, Y)])
        flat = nn.Sequential(nn.Linear(4, 3), nn.Flatten(0))
        KINDS[kind](flat, lambda z, y: z.square().mean(), list(flat.parameters()), [(X, Y)])


@pytest.mark.parametrize("layer", [lambda: nn.InstanceNorm1d(3, track_running_stats=True),
                                   lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))])
def test_a_model_that_changes_as_it_runs(layer):
    model = nn.Sequential(nn.Linear(4, 4), layer(), nn.Flatten(), nn.Linear(12, 3))
    x, before = torch.randn(6, 3, 4), {name: t.clone() for name, t in model.named_buffers()}
    with pytest.raises(InvalidInput, match=r"its buffer 1.* got other values. Call model.eval\(\)"):
        HessianOperator(model, F.cross_entropy, list(model.parameters()), [(x, Y)])
    for name, t in model.named_buffers(): torch.testing.assert_close(t, before[name], atol=0, rtol=0)
    HessianOperator(model.eval(), F.cross_entropy, list(model.parameters()), [(x, Y)])


def test_half_precision_needs_no_other_dtype():
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)).bfloat16()
    H, v = HessianOperator(model, F.cross_entropy, list(model.parameters()), [(X.bfloat16(), Y)]), torch.randn(67)
    assert relative_error(H @ v, reference.double_backward(model, F.cross_entropy, X.bfloat16().double(), Y, v)) < 0.05


def test_v_of_other_kinds():
    model = nn.Linear(4, 3)
    H = HessianOperator(model, F.cross_entropy, list(model.parameters()), [(X, Y)])
    parts = {name: torch.randn(p.shape) for name, p in model.named_parameters()}
    exact, v = H @ parts, torch.randn(15)
    for name, t in (H @ {name: t.numpy() for name, t in parts.items()}).items(): torch.testing.assert_close(t, exact[name])
    np.testing.assert_allclose(H @ v.numpy()[::-1], (H @ v.flip(0)).numpy(), rtol=1e-6)
    np.testing.assert_allclose(H @ v.numpy().astype(">f4"), (H @ v).numpy(), rtol=1e-6)
    for wrong, message in ((v.to(torch.complex64), "v is real, not torch.complex64"), (v.numpy() * 1j, "v is real, not complex64"),
                           (parts | {"weight": parts["weight"].T}, r"v has shape \(3, 4\) at weight, not \(4, 3\)"),
                           (parts | {"bias": [1.0, 2.0, 3.0]}, r"v has shape \(3,\) at bias, not list")):
        with pytest.raises(InvalidInput, match=message): H @ wrong


@pytest.mark.parametrize("data, message", [([(X[:0], Y[:0])], "has no samples"), ([(X, Y), (X[:0], Y[:0])], "has no samples"),
                                           ([(X[:4], Y)], "have 4 and 6 entries along the first dimension")])
def test_batches_that_do_not_fit(data, message):
    model = nn.Linear(4, 3)
    with pytest.raises(InvalidInput, match=message): HessianOperator(model, F.cross_entropy, list(model.parameters()), data) @ torch.randn(15)


class Run(nn.Module):
    "Two linear layers and a norm; `run` says how"
    def __init__(self, run):
        super().__init__()
        self.a, self.b, self.norm, self.run = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4), run

    def forward(self, x): return self.run(self, x)


def residual(m, x):
    h = m.a(x)
    h += x
    return m.b(m.norm(h).sin())


def attend(m, x, **mask):
    h = m.a(x)[:, None]
    h = F.scaled_dot_product_attention(h, h, h, **mask)
    return h[:, 0]


def attend_in_place(m, x):
    h = attend(m, x)
    h += 1
    return m.b(m.norm(h).sin())


BLIND = torch.ones(3, 3, dtype=torch.bool).tril()
BLIND[0] = False
LAYERS = {
    "relu in place": lambda m, x: m.b(m.norm(F.relu(m.a(x), inplace=True))),
    "a residual in place": residual,
    "masked in place": lambda m, x: m.b(m.norm(m.a(x).masked_fill_(x > 1, 0.0)).sin()),
    "attention, then in place": attend_in_place,
    "a query that may look nowhere": lambda m, x: m.b(m.norm(attend(m, x, attn_mask=BLIND)).sin()),
    "a norm of a vector": lambda m, x: m.b(torch.tanh(m.a(x) * m.norm(m.a.bias))),
    "a checkpoint": lambda m, x: m.b(torch.utils.checkpoint.checkpoint(lambda x: m.norm(F.gelu(m.a(x))), x, use_reentrant=False)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_in_three_dimensions(name):
    model, x, y = cases.randomize(Run(LAYERS[name])), torch.randn(5, 3, 4), torch.randn(5, 3, 4)
    H, v = HessianOperator(model, F.mse_loss, list(model.parameters()), [(x, y)]), torch.randn(48)
    assert relative_error(H @ v, reference.double_backward(model, F.mse_loss, x.double(), y.double(), v)) < 1e-5


def test_autocast_inside():
    "bfloat16 has 8 bits"
    def run(m, x):
        with torch.autocast("cpu", torch.bfloat16): return m.b(F.gelu(m.norm(m.a(x)))).float()
    model, x, y = cases.randomize(Run(run)), torch.randn(5, 3, 4), torch.randn(5, 3, 4)
    H, v = HessianOperator(model, F.mse_loss, list(model.parameters()), [(x, y)]), torch.randn(48)
    model.run = lambda m, x: m.b(F.gelu(m.norm(m.a(x))))
    assert relative_error(H @ v, reference.double_backward(model, F.mse_loss, x.double(), y.double(), v)) < 0.05


@pytest.mark.parametrize("normalize", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_weight_norm(normalize):
    "Against central differences: torch's own second derivative of it is wrong"
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    normalize(model[0])
    params, x = list(model.parameters()), X.double()
    H, v = HessianOperator(model, F.cross_entropy, params, [(x, Y)]), torch.randn(sum(p.numel() for p in params)).double()

    def gradient(step):
        for p, part in zip(params, v.split([p.numel() for p in params]), strict=True): p.data.add_(step * part.view_as(p))
        return torch.cat([g.flatten() for g in torch.autograd.grad(F.cross_entropy(model(x), Y), params)])
    product = H @ v
    up, down = gradient(1e-5), gradient(-2e-5)
    assert relative_error(product, (up - down) / 2e-5) < 1e-7


def test_checkpoints_that_hide_parameters():
    model = Run(lambda m, x: m.b(torch.utils.checkpoint.checkpoint(lambda x: m.norm(m.a(x)), x.requires_grad_(), use_reentrant=True)))
    with pytest.raises(InvalidInput, match="the model uses torch.utils.checkpoint: leave it out.*use_reentrant=True"):
        HessianOperator(model, F.mse_loss, list(model.parameters()), [(X, X)])


RANK = """
import sys, torch, torch.distributed as dist, torch.nn.functional as F
sys.path.insert(0, {tests!r})
import cases, reference
from gausssafe.hvp import HessianOperator
from gausssafe.errors import InvalidInput, NotFinite, RunFailed
rank, size, store = int(sys.argv[1]), 2, sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=size)
model, loss_fn, x, y = cases.curvature_case("gpt")
params = list(model.parameters())
mine = slice(0, 5) if rank == 0 else slice(5, 7)
H = HessianOperator(model, loss_fn, params, [(x[mine], y[mine])], distributed=True)
v = torch.randn(H.shape[0], 2, generator=torch.Generator().manual_seed(0))
exact = reference.double_backward(model, loss_fn, x, y, v[:, 0])
error = ((H @ v)[:, 0].double() - exact).norm() / exact.norm()
assert error < 1e-6, error
bad = v.clone()
if rank: bad[0] = torch.nan
linear, points = torch.nn.Linear(4, 3), torch.randn(4, 4)
if rank: points[3] = torch.nan
H = HessianOperator(linear, F.cross_entropy, list(linear.parameters()), [(points, torch.zeros(4, dtype=torch.long))], distributed=True)
try: H @ torch.ones(H.shape[0])
except (NotFinite, RunFailed) as failure: print(type(failure).__name__, failure)
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
try: HessianOperator(model, loss_fn, list(model.parameters()), [(x, y)], distributed=True)
except InvalidInput as failure: print(failure)
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes(tmp_path):
    "Shares of 5 and 2 samples; an error on one process reaches the other; FSDP2 is refused by name"
    script = RANK.format(tests=str(Path(__file__).parent))
    ranks = [subprocess.Popen([sys.executable, "-c", script, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}) for rank in range(2)]
    outs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outs
    assert "the product failed on 1 of 2 processes" in outs[0][0] and "NotFinite the loss" in outs[1][0]
    assert all("FSDP2" in out and "whole copy" in out for out, _ in outs)
