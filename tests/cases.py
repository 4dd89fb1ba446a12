"Small models, losses and data that many tests share"
import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    "Pre-norm attention and MLP"

    def __init__(self, width, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        n, t, c = x.shape
        q, k, v = (z.view(n, t, self.n_heads, -1).transpose(1, 2) for z in self.qkv(self.norm1(x)).split(c, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, t, c))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    "A small nanoGPT: learned positions, tied input and output embedding"

    def __init__(self, vocab=11, context=8, width=16, n_heads=2, n_layers=2):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, n_heads) for _ in range(n_layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)
        self.head.weight = self.tokens.weight
        for p in self.parameters():
            if p.ndim == 2: nn.init.normal_(p, std=0.02 if width > 64 else 0.2)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks: x = block(x)
        return self.head(self.norm(x))


class Tupled(nn.Module):
    "A block that returns a tuple and takes a mask, as those of many language models"

    def __init__(self, width):
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(width), nn.Linear(width, width)

    def forward(self, x, mask, *, scale): return (x + scale * F.silu(self.linear(self.norm(x))) * mask[..., None], None)


class TupleModel(nn.Module):
    "Named arguments in, a dict out; a skip connection around all blocks"

    def __init__(self, vocab=7, width=6):
        super().__init__()
        self.embed, self.layers, self.head = nn.Embedding(vocab, width), nn.ModuleList(Tupled(width) for _ in range(3)), nn.Linear(width, vocab)

    def forward(self, ids, mask):
        x = first = self.embed(ids)
        for layer in self.layers: x = layer(x, mask, scale=0.5)[0]
        return {"logits": self.head(x + first), "note": None}


def lm_loss(logits, y): return F.cross_entropy(logits.flatten(0, 1), y.flatten())
def dict_loss(outputs, y): return lm_loss(outputs["logits"], y)


def norm_mlp(): return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 6), nn.LayerNorm(6), nn.SiLU(), nn.Linear(6, 3))
def tanh_mlp(): return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def cnn(norm):
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), norm(4), nn.GELU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), norm(4), nn.SiLU(), nn.Flatten(),
        nn.Linear(16, 3))


def randomize(model, seed=0):
    "Norms away from 1 and 0, running statistics away from their start, eval mode"
    generator = torch.Generator().manual_seed(seed)
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.ndim == 1 and t.is_floating_point(): t.data += (0.3 + ("var" in name)) * torch.rand(t.shape, generator=generator)
    return model.eval()


def _images(generator): return torch.randn(7, 1, 8, 8, generator=generator), torch.randint(3, (7,), generator=generator)
def _points(generator): return torch.randn(7, 4, generator=generator), torch.randint(3, (7,), generator=generator)
def _tokens(generator): return tuple(torch.randint(5, (2, 7, 4), generator=generator))


def _named_tokens(generator):
    ids, y = torch.randint(7, (2, 7, 5), generator=generator)
    return {"ids": ids, "mask": torch.rand(7, 5, generator=generator)}, y


def _targets(generator): return torch.randn(7, 4, generator=generator), torch.randn(7, 3, generator=generator)


CURVATURE = {
    "gpt": (lambda: GPT(5, 4, 4), lm_loss, _tokens),
    "layer norm mlp": (norm_mlp, F.cross_entropy, _points),
    "tanh mlp, squares": (tanh_mlp, F.mse_loss, _targets),
    "batch norm cnn": (lambda: cnn(nn.BatchNorm2d), F.cross_entropy, _images),
    "group norm cnn": (lambda: cnn(lambda n: nn.GroupNorm(2, n)), F.cross_entropy, _images),
    "rms norm, tuples, dicts, a skip": (TupleModel, dict_loss, _named_tokens),
    "dropout that is off": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.GELU(), nn.Linear(6, 3)), F.cross_entropy, _points),
}


def curvature_case(name, seed=0):
    "(model, loss_fn, x, y) of 7 samples"
    model, loss_fn, samples = CURVATURE[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = randomize(model(), seed)
    return model, loss_fn, *samples(torch.Generator().manual_seed(seed + 1))
