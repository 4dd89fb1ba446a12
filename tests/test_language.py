"Language models: every number against the definition, whatever the chunk and the padding; loading; what is refused"
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import double_backward
from torch import nn

from gausssafe.errors import InvalidInput, MemoryBudgetExceeded, NotFinite
from gausssafe.hvp import HessianOperator
from gausssafe.language import (
    GPT,
    Characters,
    cut_sequences,
    jargon_file,
    lm_loss,
    lm_pairs,
    load_lm,
    perplexity,
    score_tokens,
    sequence_losses,
    train_lm,
)
from gausssafe.memory import count_tensor_bytes


def gpt(seed=0): return GPT(11, context=16, width=8, n_heads=2, n_layers=2, seed=seed).eval()


def ragged(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(11, (n,), generator=generator) for n in lengths]


@given(st.lists(st.integers(2, 17), min_size=1, max_size=9), st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_scores_are_those_of_each_sequence_alone(lengths, chunk, seed):
    model, rows = gpt(seed), ragged(lengths, seed)
    scores, losses = score_tokens(model, rows, chunk=chunk), sequence_losses(model, rows, chunk=chunk)
    for i, row in enumerate(rows):
        log_p = model(row[None, :-1])[0].detach().double().log_softmax(-1)
        true = log_p.gather(1, row[1:, None])[:, 0]
        mean = (log_p.exp() * log_p).sum(1)
        std = (log_p.exp() * (log_p - mean[:, None]) ** 2).sum(1).sqrt()
        for found, expected in ((scores.log_probs, true), (scores.means, mean), (scores.stds, std)):
            torch.testing.assert_close(found[i, :len(row) - 1].double(), expected, atol=2e-5, rtol=2e-5)
            assert found[i, len(row) - 1:].isnan().all()
        assert abs(float(losses[i] + true.mean())) < 2e-5 and abs(float(scores.losses[i] + true.mean())) < 2e-5


def test_the_model_sees_nothing_of_what_comes():
    model, row = gpt(), torch.arange(11)[None]
    changed = row.clone()
    changed[0, 6:] = 0
    torch.testing.assert_close(model(row)[:, :6], model(changed)[:, :6])


def test_the_embedding_is_the_output():
    assert sum(p.numel() for p in gpt().parameters()) == 11 * 8 + 16 * 8 + 2 * (12 * 64 + 13 * 8) + 16


def test_the_text_can_be_coded_and_cut():
    text = jargon_file()
    assert text.isascii() and text.count("\n") > 1000 and "hacker" in text
    characters = Characters(text)
    sequences = cut_sequences(characters.encode(text), 65)
    assert characters.decode(sequences.flatten()) == text[:sequences.numel()] and len(text) - sequences.numel() < 65


@pytest.mark.parametrize("limit", ["150kB", "400kB", "1MB"])
def test_scoring_stays_in_its_limit(limit):
    model, sequences = gpt(), torch.stack(ragged([17] * 60))
    with count_tensor_bytes() as counted: scores = score_tokens(model, sequences, memory_limit=limit)
    limit_bytes = {"150kB": 150_000, "400kB": 400_000, "1MB": 1_000_000}[limit]
    outputs_bytes = 3 * 60 * 16 * 4
    assert scores.peak_bytes <= limit_bytes and abs(scores.predicted_bytes / scores.peak_bytes - 1) < 0.05
    assert counted.peak_bytes <= limit_bytes + 4 * outputs_bytes  # The pieces, and their join


def test_training_with_less_memory_is_the_same_training():
    sequences = torch.stack(ragged([13] * 20))
    found = []
    for limit in ("20MB", "150kB"):
        model = gpt().double()
        training = train_lm(model, sequences, epochs=3, batch_size=10, memory_limit=limit)
        found.append((training, torch.cat([p.flatten() for p in model.parameters()])))
        assert not model.training and all(p.grad is None for p in model.parameters())
    (large, a), (small, b) = found
    assert small.chunk < large.chunk == 10 and small.peak_bytes <= 150_000 < large.peak_bytes
    torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-6)
    assert large.losses[-1] < large.losses[0] == pytest.approx(small.losses[0])


@pytest.mark.parametrize("epochs", [1, 20])
def test_training_of_a_single_step_and_of_twenty(epochs):
    "Twenty steps once divided by zero, and one step had no rate"
    model, start = gpt(), gpt()
    train_lm(model, torch.stack(ragged([13] * 8)), epochs=epochs)
    assert max(float((p - q).detach().abs().max()) for p, q in zip(model.parameters(), start.parameters(), strict=True)) > 1e-4


def test_a_training_that_is_refused_or_breaks_leaves_the_model_in_eval_mode():
    broken = gpt()
    with torch.no_grad(): broken.tokens.weight[0] = torch.nan
    for model, limit, error in ((gpt(), "2kB", MemoryBudgetExceeded), (broken, None, NotFinite)):
        with pytest.raises(error): train_lm(model, torch.stack(ragged([13] * 8)), epochs=3, memory_limit=limit)
        assert not model.training and all(p.grad is None for p in model.parameters())


def test_a_model_that_drops_at_random_is_not_scored():
    "Its losses would be others at each call"
    model = nn.Sequential(nn.Embedding(13, 4), nn.Dropout(0.1), nn.Linear(4, 13))
    for score in (score_tokens, sequence_losses):
        with pytest.raises(InvalidInput, match=r"1 drops 10% of its input. Call model.eval\(\) first"): score(model, torch.stack(ragged([9] * 3)))
    assert sequence_losses(model.eval(), torch.stack(ragged([9] * 3))).shape == (3,)


def test_bytes_of_any_length_are_tokens():
    "What fills up shorter ones does not fit in uint8"
    rows = ragged([9, 3, 5])
    torch.testing.assert_close(sequence_losses(gpt(), [row.to(torch.uint8) for row in rows], chunk=3), sequence_losses(gpt(), rows, chunk=3))


def test_forbidden_symbols_do_not_spoil_what_the_model_expects():
    "A vocabulary filled up with symbols at minus infinity is the vocabulary without them"
    class Bigrams(nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.logits = nn.Parameter(logits)

        def forward(self, ids): return self.logits[ids]
    logits, ids = torch.randn(9, 11, generator=torch.Generator().manual_seed(0)), torch.arange(9).repeat(2)[None]
    without, forbidden = score_tokens(Bigrams(logits), ids), score_tokens(Bigrams(torch.cat([logits, torch.full((9, 2), -torch.inf)], 1)), ids)
    for name in ("log_probs", "means", "stds"): torch.testing.assert_close(getattr(forbidden, name), getattr(without, name))
    with pytest.raises(NotFinite): score_tokens(Bigrams(logits.masked_fill(torch.eye(9, 11).bool().roll(1, 1), -torch.inf)), ids)


def test_training_learns_what_can_be_known():
    "A cycle of three symbols costs nothing once it is known"
    model = GPT(3, context=8, width=16, n_heads=2, n_layers=1)
    train_lm(model, torch.arange(3).repeat(60).view(-1, 9), epochs=60, batch_size=5)
    losses = sequence_losses(model, torch.arange(3).repeat(3)[None])
    assert float(losses) < 0.2 and perplexity(losses) < 1.3


@pytest.mark.parametrize("call, message", [
    (lambda: Characters("ab").encode("abc"), "1 characters that the vocabulary lacks, such as 'c'"),
    (lambda: Characters(""), "the text is empty"),
    (lambda: cut_sequences([1, 2, 3], 4), "3 tokens do not fill a single sequence of 4"),
    (lambda: cut_sequences([1, 2, 3], 1), "length is a count of tokens, at least 2, not 1"),
    (lambda: GPT(11, width=9, n_heads=2), "width a multiple of n_heads, not width=9, n_heads=2"),
    (lambda: gpt()(torch.zeros(1, 17, dtype=torch.long)), "17 tokens are more than the context of 16"),
    (lambda: sequence_losses(gpt(), []), "there are no sequences"),
    (lambda: sequence_losses(gpt(), torch.zeros(2, 5)), "sequences are token ids: an integer tensor"),
    (lambda: sequence_losses(gpt(), [torch.tensor([1])]), "a sequence has at least 2 tokens"),
    (lambda: sequence_losses(gpt(), torch.tensor([[1, 2, 11]])), "the model knows token ids below 11, and there is 11"),
    (lambda: score_tokens(gpt(), torch.tensor([[1, 2, 500]])), "code the text with the model's own tokenizer"),
    (lambda: train_lm(gpt(), torch.tensor([[1, 2, 12]])), "the model knows token ids below 11, and there is 12"),
    (lambda: score_tokens(gpt(), torch.tensor([[1, -100, 3]])), "token ids are at least 0"),
    (lambda: train_lm(gpt(), torch.zeros(4, 5, dtype=torch.long), epochs=0), "epochs=0 and batch_size=32 are counts"),
])
def test_refused(call, message):
    with pytest.raises(InvalidInput) as caught: call()
    assert message in str(caught.value)


def test_a_limit_for_less_than_one_sequence_is_refused():
    sequences = torch.stack(ragged([17] * 3))
    with pytest.raises(MemoryBudgetExceeded, match="losses of one sequence of 17 tokens needs more than the limit of 2.00 kB.*or shorter sequences"):
        sequence_losses(gpt(), sequences, memory_limit="2kB")


def test_nan_is_named():
    model = gpt()
    model.norm.weight.data[0] = torch.nan
    sequences = torch.stack(ragged([9] * 3))
    with pytest.raises(NotFinite, match="losses of sequences: 3 of 3 values are NaN"): sequence_losses(model, sequences)
    with pytest.raises(NotFinite, match="log-probabilities: 24 of 24 values are NaN"): score_tokens(model, sequences)
    with pytest.raises(NotFinite, match="the loss: 1 of 1"): train_lm(model, sequences)


class Guesser(nn.Module):
    "A loss that does not depend on one of its parameters"
    def __init__(self):
        super().__init__()
        self.table, self.idle = nn.Embedding(11, 11), nn.Parameter(torch.ones(3))

    def forward(self, ids): return self.table(ids)


def test_the_loss_is_one_that_curvature_accepts():
    model, rows = gpt(), torch.stack(ragged([9] * 7))
    (x, y), = lm_pairs(rows)
    H = HessianOperator(model, lm_loss, list(model.parameters()), lm_pairs(rows, 3))
    v = torch.randn(H.shape[0], generator=torch.Generator().manual_seed(0))
    exact = double_backward(model, lm_loss, x, y, v)
    assert float(((H @ v).double() - exact).norm() / exact.norm()) < 1e-5
    with pytest.raises(InvalidInput, match="does not depend on idle"): HessianOperator(g := Guesser(), lm_loss, g.parameters(), lm_pairs(rows))


# Hugging Face, on tiny models saved here

transformers = pytest.importorskip("transformers")


def saved(folder, kind="opt"):
    "A tiny model and a tokenizer of whole words in a folder"
    from tokenizers import Tokenizer, models, pre_tokenizers
    torch.manual_seed(0)
    if kind == "opt":
        config = transformers.OPTConfig(vocab_size=11, hidden_size=8, num_hidden_layers=2, ffn_dim=16, num_attention_heads=2, word_embed_proj_dim=8,
                                        max_position_embeddings=32)
        model = transformers.OPTForCausalLM(config)
    elif kind == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=11, n_embd=8, n_layer=2, n_head=2, n_positions=32))
    else:
        config = transformers.LlamaConfig(vocab_size=11, hidden_size=8, num_hidden_layers=2, intermediate_size=16, num_attention_heads=2,
                                          num_key_value_heads=1, max_position_embeddings=32)
        model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "foo": 1, "bar": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("kind", ["opt", "gpt2", "llama"])
def test_models_of_hugging_face(tmp_path, kind):
    theirs = saved(tmp_path, kind)
    model, tokenizer = load_lm(tmp_path)
    assert not model.training and tokenizer("foo bar qux")["input_ids"] == [1, 2, 0]
    rows = ragged([9, 9, 5, 9])
    for row, found in zip(rows, sequence_losses(model, rows), strict=True):
        with torch.no_grad(): assert float(theirs(row[None], labels=row[None]).loss) == pytest.approx(float(found), abs=1e-5)
    x, y = lm_pairs(rows[:2])[0]
    H = HessianOperator(model, lm_loss, list(model.parameters()), [(x, y)], memory_limit="50MB")
    v = torch.randn(H.shape[0], generator=torch.Generator().manual_seed(0))
    exact = double_backward(model, lm_loss, x, y, v)
    assert float(((H @ v).double() - exact).norm() / exact.norm()) < 1e-5


def test_weights_in_another_precision_and_format(tmp_path):
    theirs = saved(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    for path in tmp_path.glob("tokenizer*"): path.unlink()
    model, tokenizer = load_lm(tmp_path, dtype=torch.float64)
    assert tokenizer is None
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    torch.testing.assert_close(model.model.decoder.embed_tokens.weight.float(), theirs.model.decoder.embed_tokens.weight)


def test_a_pickle_that_runs_code_does_not(tmp_path):
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Trap(str(tmp_path / "ran"))}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InvalidInput, match="no causal language model could be loaded"): load_lm(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_not_all_there_or_broken(tmp_path):
    from safetensors.torch import load_file, save_file
    saved(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.decoder.layers.1.fc1.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidInput, match="lack 1 tensors, such as model.decoder.layers.1.fc1.weight: they would be random"): load_lm(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(InvalidInput, match="no causal language model could be loaded"): load_lm(tmp_path)


class Trap:
    "Makes a file when it is unpickled"
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (self.path, "w")


def test_folders_that_cannot_be_loaded(tmp_path):
    with pytest.raises(InvalidInput, match="has no config.json: it is not a model saved by save_pretrained"): load_lm(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    with pytest.raises(InvalidInput, match=r"brings code of its own \(auto_map in config.json\)"): load_lm(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InvalidInput, match=r"has no weights: neither \*.safetensors nor \*.bin"): load_lm(tmp_path)
    with pytest.raises(InvalidInput, match="could be loaded from 'nobody/nothing'"): load_lm("nobody/nothing", local_only=True)


def test_curvature_of_an_encoder_with_rotary_positions_local_attention_and_gates():
    "ModernBERT, tiny"
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    config = transformers.ModernBertConfig(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2,
                                           max_position_embeddings=32, global_attn_every_n_layers=2, local_attention=4, **special)
    torch.manual_seed(0)
    model, x = transformers.ModernBertForMaskedLM(config).eval(), torch.stack(ragged([12] * 5))
    params = [p for p in model.parameters() if p.requires_grad]
    for limit in ("100MB", "450kB"):
        H = HessianOperator(model, lm_loss, params, [(x, x)], memory_limit=limit)
        v = torch.randn(H.shape[0], generator=torch.Generator().manual_seed(0))
        exact = double_backward(model, lm_loss, x, x, v)
        assert float(((H @ v).double() - exact).norm() / exact.norm()) < 1e-5, H.plan
