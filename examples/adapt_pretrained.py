"""Give a pre-trained model memories that learn in context, and train nothing but their gates. Two cores, some minutes.

``python examples/adapt_pretrained.py --out OUT`` first pre-trains a small model of the Llama architecture, bytes as
tokens, on the documentation that comes with CPython: its reference topics (``pydoc_data.topics``) and the docstrings of
its library. Then ``add_cms`` puts memories into it, and it reads the sources of library modules that it has seen
nothing of, in bits per byte: memory off, memory on with gates that nobody has trained, and after training only the
gates, on documentation again. The small model stays in ``OUT/model``: ``--model OUT/model --bytes`` goes on from there;
``--model PATH`` takes any local Hugging Face checkpoint that ``add_cms`` supports in its place.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import sysconfig
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from hope_kernels.bench.machine import stamp
from hope_kernels.bench.plots import figure
from hope_kernels.integrations.transformers import add_cms, cms_parameters, save_cms

BYTES = 256
COLOURS = ("#9aa7b1", "#c9a227", "#1f77b4")
CONSOLE = Console(soft_wrap=True)


class Texts(NamedTuple):
    """Documents as strings: documentation to train on, module sources to be tested on."""

    documentation: list[str]
    sources: dict[str, str]


def library_texts() -> Texts:
    """Of the running Python: one library module in five is for testing, its docstrings are not trained on.

    A module is chosen by a checksum of its name, so the split is the same everywhere for the same Python version.
    """
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_path("stdlib"))
    documentation, sources = [topics[name] for name in sorted(topics)], {}
    for path in sorted([*library.glob("*.py"), *library.glob("[a-z]*/*.py")]):
        name = str(path.relative_to(library))
        if name.startswith(("test", "site-packages", "pydoc_data", "idlelib", "encodings")):
            continue
        text = path.read_text(errors="replace")
        if zlib.crc32(name.encode()) % 5 == 0:
            sources[name] = text
            continue
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef)
        found = (ast.get_docstring(node) for node in ast.walk(ast.parse(text)) if isinstance(node, nodes))
        documentation.append("\n\n".join(doc for doc in found if doc))
    return Texts(documentation, sources)


class Windows(NamedTuple):
    """``ids [rows, tokens]``, and how many bytes of text each row's tokens behind its first are."""

    ids: Tensor
    sizes: Tensor


def test_windows(
    sources: dict[str, str],
    encode: Callable[[str], list[int]],
    size_of: Callable[[list[int]], int],
    args: argparse.Namespace,
) -> Windows:
    """The beginnings of the ``args.test_files`` first sources that are long enough, one row each."""
    rows = [encode(text[: 8 * args.context])[: args.context + 1] for text in sources.values()]
    rows = [row for row in rows if len(row) == args.context + 1][: args.test_files]
    if not rows:
        raise SystemExit(f"adapt_pretrained: no source has {args.context + 1} tokens; want a smaller --context")
    return Windows(torch.tensor(rows), torch.tensor([size_of(row[1:]) for row in rows]))


def train_batches(stream: Tensor, context: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Endless random windows ``[batch, context + 1]``; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    windows = stream.unfold(0, context + 1, 1)
    while True:
        yield windows[torch.randint(len(windows), (batch,), generator=generator)]


def token_nats(model: nn.Module, ids: Tensor) -> Tensor:
    """Cross-entropy of each token behind the first, ``[rows, tokens - 1]``, in nats."""
    logits = model(ids[:, :-1], use_cache=False).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)


def train(
    model: nn.Module, parameters: list[nn.Parameter], source: Iterator[Tensor], steps: int, lr: float, label: str
) -> list[float | None]:
    """AdamW with a short warm-up, then cosine decay; returns the losses in bits per token.

    A step whose gradient is not finite is left out, and its loss None: a memory whose writes were too large for one
    window has diverged there.
    """
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    losses = []
    model.train()
    for step in track(range(steps), description=label, console=CONSOLE):
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / max(1, steps // 20))
            group["lr"] = lr * warm * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        loss = token_nats(model, next(source)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        finite = bool(nn.utils.clip_grad_norm_(parameters, 1.0).isfinite())
        if finite:
            optimizer.step()
        losses.append(loss.item() / math.log(2) if finite else None)
    model.eval()
    return losses


class Reading(NamedTuple):
    """``bits`` per byte over all windows, and ``by_position``: bits per token in each sixteenth of a window."""

    bits: float
    by_position: list[float]
    seconds: float


@torch.no_grad()
def read(model: nn.Module, windows: Windows, batch: int) -> Reading:
    start = time.perf_counter()
    nats = torch.cat([token_nats(model, ids) for ids in windows.ids.split(batch)])
    seconds = time.perf_counter() - start
    bits = nats.double() / math.log(2)
    return Reading(
        (bits.sum() / windows.sizes.sum()).item(),
        [part.mean().item() for part in bits.tensor_split(16, dim=1)],
        seconds,
    )


def small_llama(context: int) -> nn.Module:
    """About a million parameters, random."""
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=BYTES,
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=2 * context,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def bytes_of(tokenizer: transformers.PreTrainedTokenizerBase, ids: list[int]) -> int:
    """Of the text that tokens stand for."""
    return len(tokenizer.decode(ids).encode())


def set_scale(model: nn.Module, scale: float) -> None:
    """Of every memory."""
    with torch.no_grad():
        for name, parameter in cms_parameters(model):
            if name.endswith(".scale"):
                parameter.fill_(scale)


def report(readings: dict[str, Reading], losses: list[float | None], args: argparse.Namespace, notes: dict) -> None:
    """A table, ``adapt.json`` and ``adapt.png``."""
    first = next(iter(readings.values()))
    table = Table(title="library sources that nothing was trained on")
    for column in ("memory", "bits per byte", "against off", "last sixteenth of a window", "seconds"):
        table.add_column(column, justify="left" if column == "memory" else "right")
    for name, reading in readings.items():
        change = f"{100 * (reading.bits / first.bits - 1):+.2f} %"
        cells = [f"{reading.bits:.4f}", change, f"{reading.by_position[-1]:.4f}", f"{reading.seconds:.1f}"]
        table.add_row(name, *cells)
    CONSOLE.print(table)
    args.out.mkdir(parents=True, exist_ok=True)
    values = stamp("adapt_pretrained") | notes
    values |= {"gate_losses": losses, "readings": {name: reading._asdict() for name, reading in readings.items()}}
    values["versions"]["transformers"] = transformers.__version__
    (args.out / "adapt.json").write_text(json.dumps(values, indent=1) + "\n")
    with figure(args.out / "adapt.png", columns=2, size=(11, 3.6)) as (bars, curve):
        bars.bar(list(readings), [reading.bits for reading in readings.values()], color=COLOURS)
        for i, reading in enumerate(readings.values()):
            bars.annotate(f"{reading.bits:.3f}", (i, reading.bits), ha="center", va="bottom")
        bars.set(ylabel="bits per byte", title="Unseen library sources")
        width = args.context / 16
        for (name, reading), colour in zip(readings.items(), COLOURS, strict=True):
            curve.plot([(i + 0.5) * width for i in range(16)], reading.by_position, label=name, color=colour)
        for size in sorted(set(notes["levels"])):
            curve.axvline(size, color="#e07b39", linewidth=0.8, linestyle=":")
        curve.set(xlabel="token of the window (dotted: the first write of each level)", ylabel="bits per token")
        curve.legend()
    CONSOLE.print(f"{args.out}/adapt.json, adapt.png and {args.out}/cms.safetensors", highlight=False)


def arguments_of(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the table's JSON, the plot, the gates")
    parser.add_argument("--model", type=Path, help="a local checkpoint instead of the small model that is trained here")
    parser.add_argument("--bytes", action="store_true", help="the checkpoint's tokens are bytes, as of OUT/model")
    parser.add_argument("--levels", type=int, nargs="+", default=[64, 256], help="chunk sizes in tokens, fastest first")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=250, help="to pre-train the small model")
    parser.add_argument("--gate-steps", type=int, default=60, help="to train the gates")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--gate-lr", type=float, default=3e-3)
    parser.add_argument("--scale", type=float, default=0.1, help="of the gates that nobody has trained")
    parser.add_argument("--test-files", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    args = arguments_of(words)
    torch.manual_seed(args.seed)
    texts = library_texts()
    stream = "\n\n".join(texts.documentation)
    if args.model is None or args.bytes:
        encode, size_of = (lambda text: list(text.encode())), len
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model, local_files_only=True)
        encode = partial(tokenizer.encode, add_special_tokens=False)
        size_of = partial(bytes_of, tokenizer)
    ids = torch.tensor(encode(stream))
    tests = test_windows(texts.sources, encode, size_of, args)
    if args.model is None:
        model = small_llama(args.context)
        source = train_batches(ids, args.context, args.batch, args.seed)
        last = train(model, list(model.parameters()), source, args.steps, args.lr, "pre-training")[-20:]
        CONSOLE.print(f"documentation, {len(ids):,} bytes: {sum(last) / len(last):.3f} bits per byte at the end")
        model.save_pretrained(args.out / "model")
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model, local_files_only=True).eval()
    count = sum(p.numel() for p in model.parameters())
    readings = {"off": read(model, tests, args.batch)}
    add_cms(model, args.levels)
    if read(model, tests, args.batch).bits != readings["off"].bits:
        raise SystemExit("adapt_pretrained: memories with scale 0 changed the model: please report this")
    set_scale(model, args.scale)
    readings["untrained gates"] = read(model, tests, args.batch)
    set_scale(model, 0.0)
    model.requires_grad_(False)
    gates = [parameter.requires_grad_(True) for _, parameter in cms_parameters(model)]
    source = train_batches(ids, args.context, args.batch, args.seed + 1)
    gate_losses = train(model, gates, source, args.gate_steps, args.gate_lr, "training the gates")
    readings["trained gates"] = read(model, tests, args.batch)
    scales = {name: parameter.item() for name, parameter in cms_parameters(model) if name.endswith(".scale")}
    new = sum(parameter.numel() for parameter in gates)
    CONSOLE.print(
        f"{count:,} parameters as they were, {new:,} of gates; scales "
        + ", ".join(f"{scale:.3f}" for scale in scales.values())
    )
    notes = {
        "model": str(args.model.name) if args.model else "a Llama of four layers, pre-trained in this run",
        "parameters": count,
        "gate_parameters": new,
        "levels": args.levels,
        "context": args.context,
        "test_files": len(tests.ids),
        "test_bytes": int(tests.sizes.sum()),
        "untrained_scale": args.scale,
        "gate_steps_left_out": gate_losses.count(None),
        "trained_scales": scales,
    }
    report(readings, gate_losses, args, notes)
    save_cms(model, args.out)


if __name__ == "__main__":
    main()
