"Features of units against the definition, on models small enough to write their Hessian down; the rules word by word"
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gausssafe.errors import InvalidInput
from gausssafe.hvp import HessianOperator
from gausssafe.language import GPT, lm_loss, lm_pairs
from gausssafe.memory import count_tensor_bytes
from gausssafe.partition import (
    CLASSES,
    count_classes,
    eigenspace_features,
    find_units,
    fisher_features,
    input_sparsity,
    measure_features,
    outliers,
    partition,
    squared_gradients,
)
from gausssafe.spectrum import top_eigenpairs


def tokens(n, length=7, seed=0): return torch.randint(5, (n, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def gpt():
    model = GPT(5, context=6, width=4, n_heads=2, n_layers=1).double().eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype))
    return model


@given(st.lists(st.sampled_from([(), (3,), (2, 3), (4, 2, 2), (1, 5)]), min_size=1, max_size=5), st.sampled_from(["row", "tensor"]))
@settings(max_examples=30, deadline=None)
def test_units_are_pieces_of_the_flat_vector(shapes, unit):
    named = {f"layers.{i}.w": torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)}
    units, flat = find_units(named, unit), torch.cat([t.reshape(-1) for t in named.values()])
    assert units.sizes.sum() == len(flat) and len(set(units.names)) == len(units) and set(units.kinds) == {"layers.*.w"}
    expected = [piece.sum() for t in named.values() for piece in (t if unit == "row" and t.ndim > 1 else [t])]
    np.testing.assert_allclose(units.sum(flat), [float(e) for e in expected], atol=1e-5)
    for i in range(len(units)): assert int(units.mask(np.arange(len(units)) == i).sum()) == units.sizes[i]


def test_heads():
    model = GPT(5, context=6, width=4, n_heads=2, n_layers=1)
    units = find_units(model.named_parameters(), "head", head_size=2)
    assert units.tensors.count("blocks.0.qkv.weight") == 6 and units.tensors.count("blocks.0.up.weight") == 16
    assert units.sizes[units.names.index("blocks.0.qkv.weight[3]")] == 8
    with pytest.raises(InvalidInput, match="unit='head' needs head_size.*12 rows of blocks.0.qkv.weight are a multiple; it is 5"):
        find_units(model.named_parameters(), "head", head_size=5)
    with pytest.raises(InvalidInput, match="unit is 'row', 'head' or 'tensor', not 'scalar'"): find_units(model.named_parameters(), "scalar")


def test_alignment_is_the_cosine_with_the_projection(gpt):
    units = find_units(gpt.named_parameters())
    w = torch.cat([p.detach().flatten() for p in gpt.parameters()])
    V = torch.linalg.qr(torch.randn(len(w), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    found = eigenspace_features(units, w, V)
    for i in range(0, len(units), 7):
        part = slice(units.starts[i], units.starts[i] + units.sizes[i])
        projected = V[part] @ torch.linalg.pinv(V[part]) @ w[part]
        cosine = float(w[part] @ projected / (w[part].norm() * projected.norm()).clamp_min(1e-30))
        if units.sizes[i] > 3: assert found.alignment[i] == pytest.approx(cosine, abs=1e-6)
        share = float(V[part].square().sum()) / 3
        assert found.enrichment[i] == pytest.approx(share / (units.sizes[i] / units.d))


def test_alignment_with_eigenvectors_that_have_no_part_in_a_unit():
    "Directions that are not there are none to be aligned with"
    units, V, w = find_units({"w": torch.zeros(3, 6)}), torch.zeros(18, 3), torch.arange(1.0, 19)
    V[6:12, 0], V[12, 1], V[13, 2] = 6**-0.5, 1, 1
    wanted = [0, float(w[6:12].sum() / (6**0.5 * w[6:12].norm())), float(w[12:14].norm() / w[12:].norm())]
    assert eigenspace_features(units, w, V).alignment.tolist() == pytest.approx(wanted)


def test_random_weights_have_uniform_p_values():
    "Kolmogorov-Smirnov at 1 % over 400 units of 32 weights, fixed seed"
    from scipy.stats import kstest
    units, generator = find_units({"w": torch.zeros(400, 32)}), torch.Generator().manual_seed(1)
    V = torch.linalg.qr(torch.randn(units.d, 10, generator=generator))[0]
    found = eigenspace_features(units, torch.randn(units.d, generator=generator), V)
    assert kstest(found.alignment_p, "uniform").pvalue > 0.01
    wide = find_units({"w": torch.zeros(50, 128)})
    V = torch.linalg.qr(torch.randn(wide.d, 10, generator=generator))[0]
    assert eigenspace_features(wide, torch.randn(wide.d, generator=generator), V).alignment.mean() == pytest.approx(0.28, abs=0.02)


def test_all_features_of_a_small_model(gpt):
    x = tokens(12)
    params = list(gpt.parameters())
    H = HessianOperator(gpt, lm_loss, params, lm_pairs(x), memory_limit="200MB")
    dense = H @ torch.eye(H.shape[0], dtype=torch.float64)
    units = find_units(gpt.named_parameters())
    table = measure_features(gpt, H, units, tokens(5, seed=1), tokens(5, seed=2), n_eigenvectors=4, n_products=H.shape[0])
    np.testing.assert_allclose(table.trace, units.sum(dense.diagonal()), atol=1e-9)
    values, V, _ = top_eigenpairs(dense, k=4, which="LM", tol=1e-8)
    exact = eigenspace_features(units, torch.cat([p.detach().flatten() for p in params]), V)
    np.testing.assert_allclose(table.enrichment, exact.enrichment, atol=1e-2)
    np.testing.assert_allclose(table.curvature, 0.5 * table.noise_variance * table.trace)
    by_hand = np.zeros(len(units))
    for row in tokens(5, seed=1):
        grads = torch.autograd.grad(lm_loss(gpt(row[None, :-1]), row[None, 1:]), params)
        by_hand += units.sum(torch.cat([g.flatten() ** 2 for g in grads])) / 5
    np.testing.assert_allclose(table.fisher_members, by_hand)
    np.testing.assert_allclose(table.contrast, (table.fisher_members - table.fisher_nonmembers) / (table.fisher_members + table.fisher_nonmembers))
    np.testing.assert_allclose(squared_gradients(gpt, params, tokens(5, seed=1), units), by_hand)


def test_a_unit_that_only_members_use_has_contrast_one():
    class Keyed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 5)

        def forward(self, ids): return self.table(ids)
    model = Keyed()
    members, others = torch.tensor([[0, 1, 0, 1]]), torch.tensor([[2, 1, 2, 1]])
    found = fisher_features(model, list(model.parameters()), members, others, find_units(model.named_parameters()))
    assert found.contrast[0] == 1 and found.contrast[2] == -1 and abs(found.contrast[1]) < 1 and found.contrast[4] == 0


def test_sparsity_is_that_of_the_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.hidden, self.out = nn.Embedding(5, 4), nn.Linear(4, 6), nn.Linear(6, 5)

        def forward(self, ids): return self.out(torch.relu(self.hidden(self.embed(ids))))
    torch.manual_seed(0)
    model, x = Two(), tokens(20)
    params = dict(model.named_parameters())
    units = find_units(params)
    found = dict(zip(units.names, input_sparsity(model, params, x, units), strict=True))
    inputs = x[:, :-1]
    embedded = model.embed(inputs)
    hidden = torch.relu(model.hidden(embedded))
    for i in range(5): assert found[f"embed.weight[{i}]"] == pytest.approx(float((inputs != i).float().mean()))
    counts = [float((part.abs() < 0.1 * part.square().mean().sqrt()).sum()) for part in hidden]  # A sequence at a time
    assert found["out.weight[2]"] == found["out.weight[0]"] == pytest.approx(sum(counts) / hidden.numel())
    assert found["hidden.bias"] == 0 and outliers(units, params).min() > 0


def test_sparsity_does_not_see_what_fills_up_shorter_sequences(gpt):
    params = dict(gpt.named_parameters())
    units, rows = find_units(params), [row[:n].clamp_min(1) for row, n in zip(tokens(5), (7, 3, 2, 2, 5), strict=True)]
    alone, lengths = [input_sparsity(gpt, params, [row], units) for row in rows], [len(row) - 1 for row in rows]
    found = input_sparsity(gpt, params, rows, units)
    np.testing.assert_allclose(found, np.average(alone, axis=0, weights=lengths), atol=1e-6)
    assert found[0] == 1


def test_sparsity_holds_a_sequence_at_a_time(gpt):
    params, peaks = dict(gpt.named_parameters()), []
    for n in (1, 16):
        with count_tensor_bytes() as counted: input_sparsity(gpt, params, tokens(n), find_units(params))
        peaks.append(counted.peak_bytes)
    assert peaks[1] < 2 * peaks[0]


def table_of(**columns): return pd.DataFrame({"n_params": 1, **columns})


def test_the_paper_rule_word_by_word():
    table = table_of(alignment=[0.7, 0.69, 0.3, 0.3, 0.31, 0.9], sparsity=[0.49, 0.1, 0.9, 0.89, 0.95, 0.5])
    assert partition(table, "paper").tolist() == ["func", "both", "sens", "both", "both", "both"]
    assert partition(table_of(alignment=[0.9], sparsity=[np.nan]), "paper").tolist() == ["both"]


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(0, 10)), min_size=3, max_size=40), st.floats(0.05, 0.5))
@settings(max_examples=40, deadline=None)
def test_the_calibrated_rule_has_its_shares(rows, share):
    table = table_of(contrast=[c for c, _ in rows], curvature=[h for _, h in rows])
    counts = count_classes(table, partition(table, share=share))
    n = min(round(share * len(table)), len(table) // 2)
    assert counts.n_units["func"] == counts.n_units["sens"] == n and counts.n_units.sum() == len(table)


def test_the_calibrated_rule_puts_extremes_where_they_belong():
    table = table_of(contrast=[1.0, 0.0, -1.0], curvature=[0.0, 1.0, 2.0])
    assert partition(table).tolist() == ["sens", "both", "func"] and count_classes(table, partition(table)).index.tolist() == list(CLASSES)
    with pytest.raises(InvalidInput, match="share is above 0 and at most 0.5, not 0.6"): partition(table, share=0.6)
    with pytest.raises(InvalidInput, match="rule is 'paper' or 'calibrated', not 'mine'"): partition(table, "mine")
