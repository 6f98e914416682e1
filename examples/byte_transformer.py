"""A small byte-level Transformer in plain PyTorch, and the one line that gives it CMS layers in place of its MLPs.

It learns real English: the documentation text that every CPython carries (``pydoc_data.topics``), some topics held
out. ``python examples/byte_transformer.py`` trains it with CMS layers, with ``--mlp`` without.
"""

from __future__ import annotations

import argparse
import math
import zlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hope_kernels import CMS, CMSLevel

REPEATED = 48  # characters from which on a paragraph that two topics share is a repetition, not a phrase
LEVELS = (CMSLevel(chunk_size=16), CMSLevel(chunk_size=64), CMSLevel(chunk_size=None))


class MLP(nn.Module):
    """The feed-forward half of a block, ``[B, T, dim] -> [B, T, dim]``."""

    def __init__(self, dim: int, expansion: int = 4) -> None:
        super().__init__()
        self.up = nn.Linear(dim, expansion * dim)
        self.down = nn.Linear(expansion * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Attention(nn.Module):
    """Causal self-attention, ``[B, T, dim] -> [B, T, dim]``."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Attention, then the MLP, each behind a norm and with a residual."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(dim), Attention(dim, heads)
        self.mlp_norm, self.mlp = nn.LayerNorm(dim), MLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class ByteTransformer(nn.Module):
    """Logits ``[B, T, 256]`` of the next byte for bytes ``[B, T]``, ``T <= context``."""

    def __init__(self, dim: int = 128, depth: int = 2, heads: int = 4, context: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, dim)
        self.positions = nn.Embedding(context, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 256, bias=False)
        self.dim, self.context = dim, context

    def forward(self, text: Tensor) -> Tensor:
        x = self.embedding(text) + self.positions.weight[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def use_cms(
    model: ByteTransformer, levels: Sequence[CMSLevel] = LEVELS, heads: int = 4, backend: str | None = None
) -> ByteTransformer:
    """Put a CMS layer in the place of every MLP of ``model``; returns it."""
    for block in model.blocks:
        block.mlp = CMS(model.dim, levels=levels, heads=heads, backend=backend)
    return model


def build(
    cms: bool,
    *,
    seed: int = 0,
    dim: int = 128,
    depth: int = 2,
    context: int = 256,
    backend: str | None = None,
) -> ByteTransformer:
    """A model whose parameters depend on ``seed`` alone, not on ``backend``."""
    torch.manual_seed(seed)
    model = ByteTransformer(dim, depth, context=context)
    return use_cms(model, backend=backend) if cms else model


def documentation() -> tuple[Tensor, Tensor]:
    """CPython's documentation text as bytes, int64 ``[train]`` and ``[held out]``: about one topic in ten is held out.

    A topic is held out by a checksum of its name, so the split is the same everywhere for the same Python version.
    Topics repeat long parts of one another: paragraphs that a held-out one has too are left out of the training text.
    """
    from pydoc_data.topics import topics

    held_out = {name: topics[name] for name in sorted(topics) if zlib.crc32(name.encode()) % 10 == 0}
    known = {part for text in held_out.values() for part in text.split("\n\n") if len(part) >= REPEATED}
    train = [
        "\n\n".join(part for part in topics[name].split("\n\n") if part not in known)
        for name in sorted(topics)
        if name not in held_out
    ]
    return tuple(torch.tensor(list("\n".join(t).encode()), dtype=torch.int64) for t in (train, held_out.values()))


def batches(text: Tensor, *, batch: int, context: int, seed: int) -> Iterator[Tensor]:
    """Endless random windows ``[batch, context + 1]`` of the text; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    windows = text.unfold(0, context + 1, 1)
    while True:
        yield windows[torch.randint(len(windows), (batch,), generator=generator)]


def loss_of(model: nn.Module, window: Tensor) -> Tensor:
    """Mean cross-entropy of the next byte, in nats, over a window ``[B, T + 1]``."""
    logits = model(window[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())


class Trainer:
    """AdamW with a short warm-up, then cosine decay; gradients clipped at norm 1."""

    def __init__(self, model: nn.Module, steps: int, lr: float = 3e-3) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
        warmup = max(1, steps // 20)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min(1.0, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * min(1.0, step / steps))),
        )

    def step(self, window: Tensor) -> float:
        """One update from a window ``[B, T + 1]``; returns the loss before it, in nats per byte."""
        loss = loss_of(self.model, window)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        return loss.item()


@torch.no_grad()
def bits_per_byte(model: ByteTransformer, text: Tensor, *, batch: int = 8, limit: int | None = None) -> float:
    """Mean bits per byte over consecutive windows of ``model.context`` bytes (the first ``limit`` of them)."""
    windows = text.unfold(0, model.context + 1, model.context)[:limit]
    nats = sum(loss_of(model, part).item() * len(part) for part in windows.split(batch))
    return nats / len(windows) / math.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--mlp", action="store_true", help="keep the plain MLPs")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train, held_out = documentation()
    model = build(not arguments.mlp, seed=arguments.seed)
    trainer = Trainer(model, arguments.steps)
    print(model)
    source = batches(train, batch=8, context=model.context, seed=arguments.seed)
    for step in range(arguments.steps):
        loss = trainer.step(next(source))
        if step % 20 == 0:
            print(f"step {step:4d}  loss {loss / math.log(2):.3f} bits per byte")
    print(f"held out: {bits_per_byte(model, held_out):.3f} bits per byte")


if __name__ == "__main__":
    main()
