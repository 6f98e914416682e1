"""Train a Hope language model on a folder of text files, byte by byte or with a tokenizer file.

    python examples/train_lm.py TEXTS OUT --preset 1m
    torchrun --nproc-per-node 8 examples/train_lm.py TEXTS OUT --preset 340m --tokenizer tokenizer.json --parallel fsdp

Documents are read window by window with the state carried on, gradients end at a window's start. A run that was killed
and is started again with the same words goes on from its last checkpoint, to the same losses. See docs/training.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_checkpoint
import torch
import torch.distributed as dist
from lm_parallel import Layout, Reading, drop_zero_gradients, join, leave, nats, sum_gradients
from lm_report import Report
from lm_text import ByteTokenizer, FileTokenizer, Reader, Window, read_folder
from torch import Tensor, nn

from hope_kernels.models import HopeConfig, HopeForCausalLM, HopeState

# What decides the losses of a run: a checkpoint is not continued with others.
DECISIVE = ("steps", "batch", "window", "span", "held_out", "seed", "lr", "warmup", "weight_decay", "clip", "through")
DECISIVE += ("dtype", "autocast", "parallel", "sequence_parallel")


def arguments_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("text", type=Path, help="folder of text files, each a document")
    add("out", type=Path, help="folder for checkpoints, metrics and the trained model")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--preset", default="1m", help="a size of HopeConfig.preset")
    model.add_argument("--config", type=Path, help="a JSON file of HopeConfig fields")
    add("--tokenizer", type=Path, help="tokenizer.json of the tokenizers library; without, a token is a byte")
    add("--held-out", type=float, default=0.1, help="share of the files, or of the one file")
    add("--steps", type=int, default=1000)
    add("--batch", type=int, default=8, help="rows of the batch, of all processes together")
    add("--window", type=int, default=256, help="tokens that gradients go back through")
    add("--span", type=int, default=8192, help="tokens after which a document is read on with a fresh state")
    add("--lr", type=float, default=1e-3)
    add("--warmup", type=int, default=100, help="steps of linear warm-up; then a cosine down to a tenth")
    add("--weight-decay", type=float, default=0.1, help="of matrices")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--through", action="store_true", help="initial memories learn in every window, not at document starts alone")
    add("--seed", type=int, default=0)
    add("--dtype", choices=("float32", "float64"), default="float32", help="of the parameters")
    add("--autocast", action="store_true", help="compute in bfloat16 where that is safe")
    add("--activation-checkpointing", action="store_true")
    add("--compile", action="store_true", help="torch.compile the loss")
    add("--parallel", choices=("ddp", "fsdp"), default="ddp", help="what processes of torchrun do with the rows")
    add("--sequence-parallel", type=int, default=1, help="processes that share the tokens of a window")
    add("--checkpoint-every", type=int, default=100, help="steps")
    add("--eval-every", type=int, default=200, help="steps")
    add("--eval-windows", type=int, default=20, help="windows of the held-out text at those steps; at the end, all")
    add("--log-every", type=int, default=10, help="steps")
    add("--no-tensorboard", dest="tensorboard", action="store_false")
    found = parser.parse_args(words)
    for name in ("steps", "batch", "window", "span", "checkpoint_every", "eval_every", "eval_windows", "log_every"):
        if getattr(found, name) < 1:
            parser.error(f"{name} is {getattr(found, name)}; want at least 1")
    return found


def config_of(arguments: argparse.Namespace, vocabulary: int) -> HopeConfig:
    """The preset with the text's vocabulary, or the file's configuration.

    Raises:
        ValueError, TypeError: the file is none, or its vocabulary is too small.
    """
    if arguments.config is None:
        return dataclasses.replace(HopeConfig.preset(arguments.preset), vocab_size=vocabulary)
    try:
        values = json.loads(arguments.config.read_text())
    except ValueError as error:
        raise ValueError(f"config: {arguments.config} is no JSON: {error}") from None
    config = HopeConfig.from_dict({"vocab_size": vocabulary, **values})
    if config.vocab_size < vocabulary:
        raise ValueError(f"config: vocab_size is {config.vocab_size}; the text needs {vocabulary}")
    return config


class Trainer:
    """A model, its optimizer, and its place in the text."""

    def __init__(self, arguments: argparse.Namespace, layout: Layout) -> None:
        self.arguments, self.layout = arguments, layout
        tokenizer = ByteTokenizer() if arguments.tokenizer is None else FileTokenizer(arguments.tokenizer)
        self.train_text, self.held_out_text = read_folder(arguments.text, tokenizer, arguments.held_out)
        self.config = config_of(arguments, tokenizer.vocab_size)
        self.rows, self.tokens = layout.share(arguments.batch, arguments.window)
        self.reader = self._reader(self.train_text.documents, arguments.seed)
        torch.manual_seed(arguments.seed)
        dtype = getattr(torch, arguments.dtype)
        self.model = HopeForCausalLM(self.config, device=layout.device, dtype=dtype)
        self.model.activation_checkpointing = arguments.activation_checkpointing
        loss = torch.compile(nats) if arguments.compile else nats
        self.reading = self._shared(Reading(self.model, layout, arguments.through, loss))
        self.parameters = dict(self.model.named_parameters())
        matrices = [p for p in self.parameters.values() if p.dim() > 1]
        vectors = [p for p in self.parameters.values() if p.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": arguments.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=arguments.lr, betas=(0.9, 0.95))
        self.state: HopeState | None = None
        self.step_count = 0

    def _reader(self, documents: list[Tensor], seed: int) -> Reader:
        return Reader(documents, self.arguments.batch, self.arguments.window, self.arguments.span, seed)

    def _shared(self, reading: Reading) -> nn.Module:
        """What the processes do with the gradients; in chains :meth:`step` sums them."""
        if self.layout.world == 1 or self.layout.chain > 1:
            return reading
        if self.arguments.parallel == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            # One group of parameters: a fresh state refers to all of them, until the backward.
            mesh = init_device_mesh(self.layout.device.type, (self.layout.world,))
            return fully_shard(reading, mesh=mesh, reshard_after_forward=False)
        # Behind a document's start, memories' initial weights have no gradient.
        return nn.parallel.DistributedDataParallel(reading, find_unused_parameters=True)

    def lr(self, step: int) -> float:
        """Of step 0, 1, .."""
        a = self.arguments
        if step < a.warmup:
            return a.lr * (step + 1) / a.warmup
        done = (step - a.warmup) / max(1, a.steps - a.warmup)
        return a.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))

    def _read(self, window: Window, state: HopeState | None) -> tuple[Tensor, HopeState | None]:
        """The loss of this process's part of a window, in nats summed, and the state behind it."""
        part = window.part(self.rows, self.tokens)
        device = self.layout.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.arguments.autocast):
            return self.reading(part.ids.to(device), part.labels.to(device), None if window.fresh else state)

    def step(self) -> dict[str, float]:
        """One update from the next window; what is worth telling of it.

        Raises:
            ArithmeticError: the gradient is not finite. The weights are as they were.
        """
        a, window = self.arguments, self.reader.next()
        loss, self.state = self._read(window, self.state)
        # Divided by the tokens that a full window has: each token of the text weighs the same, however much is padded.
        # DDP and FSDP take the mean over processes; this makes it the sum.
        averaged = self.layout.world if self.layout.chain == 1 else 1
        self.optimizer.zero_grad(set_to_none=True)
        (loss * (averaged / (a.batch * a.window))).backward()
        parameters = list(self.parameters.values())
        if self.layout.chain > 1:
            sum_gradients(parameters)
        drop_zero_gradients(parameters, self.layout.world)
        norm = nn.utils.clip_grad_norm_(parameters, a.clip)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if not norm.isfinite():
            raise ArithmeticError(
                f"step {self.step_count + 1}: the gradient's norm is {norm}; try a lower lr or lr_max"
            )
        lr = self.lr(self.step_count)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.step_count += 1
        mean = self._total(loss) / window.count
        return {"step": self.step_count, "loss": mean, "gradient_norm": norm.item(), "lr": lr, "tokens": window.count}

    def _total(self, loss: Tensor) -> float:
        loss = loss.detach().double()
        if self.layout.world > 1:
            dist.all_reduce(loss)
        return loss.item()

    @torch.no_grad()
    def held_out(self, windows: int | None = None) -> float:
        """Bits per byte of the held-out documents, or of their first ``windows`` windows in a fixed random order."""
        self.model.eval()
        text, state, total, tokens = self.held_out_text, None, 0.0, 0
        reader = self._reader(text.documents, seed=0)
        while reader.epoch == 0 and windows != 0:
            window = reader.next()
            loss, state = self._read(window, state)
            total, tokens = total + self._total(loss), tokens + window.count
            windows = None if windows is None else windows - 1
        self.model.train()
        if hasattr(self.reading, "reshard"):
            self.reading.reshard()  # FSDP does so in the backward, which there was none
        return total / tokens / math.log(2) * text.tokens / text.bytes

    def decisive(self) -> dict[str, Any]:
        """Settings and text that a checkpoint belongs to, as plain values."""
        found = {name: getattr(self.arguments, name) for name in DECISIVE}
        text = {"text": self.train_text.checksum, "processes": self.layout.world}
        return json.loads(json.dumps(found | text | {"config": self.config.to_dict()}))

    def save(self) -> None:
        values: dict[str, Any] = {
            "settings": self.decisive(),
            "step": self.step_count,
            "reader": self.reader.state_dict(),
        }
        values |= {"random": lm_checkpoint.random_state(self.layout.device)}
        values |= {"state": None if self.state is None else self.state.state_dict()}
        if self.layout.rank == 0 or self._sharded():
            values |= lm_checkpoint.weights_of(self.parameters, self.optimizer)
        lm_checkpoint.save(self.arguments.out, self.step_count, values, self.layout)

    def resume(self) -> bool:
        """Go on from the newest checkpoint, if there is one.

        Raises:
            ValueError: it is of another run.
        """
        found = lm_checkpoint.all_of(self.arguments.out)
        if not found:
            return False
        values = lm_checkpoint.load(found[-1], self.layout)
        lm_checkpoint.check(values["settings"], self.decisive())
        weights = values if "model" in values else lm_checkpoint.load(found[-1], self.layout, rank=0)
        lm_checkpoint.load_weights(weights, self.parameters, self.optimizer)
        self.reader.load_state_dict(values["reader"])
        self.step_count = values["step"]
        self.state = None if values["state"] is None else self.model.model.load_state(values["state"])
        lm_checkpoint.set_random_state(values["random"], self.layout.device)
        return True

    def _sharded(self) -> bool:
        return any(hasattr(p, "full_tensor") for p in self.parameters.values())

    def export(self) -> None:
        """The model as ``save_pretrained`` writes it, into ``OUT/model``."""
        whole = {n: p.full_tensor() if self._sharded() else p.detach() for n, p in self.parameters.items()}
        if self.layout.rank == 0:
            model = HopeForCausalLM(self.config, device="meta")
            model.load_state_dict(whole, assign=True)
            model.save_pretrained(self.arguments.out / "model")


def train(arguments: argparse.Namespace, layout: Layout) -> None:
    """All of it.

    Raises:
        ValueError, ImportError: a setting does not fit, or what it needs is not installed.
    """
    if arguments.parallel == "fsdp" and layout.chain > 1:
        raise ValueError("parallel is fsdp and sequence-parallel above 1; want one of the two")
    trainer = Trainer(arguments, layout)
    resumed = trainer.resume()
    report = Report(arguments.out, trainer.step_count, arguments.steps, arguments.tensorboard, layout.rank == 0)
    report.say(
        f"{trainer.model.parameter_count():,} parameters, {trainer.train_text.tokens:,} tokens to train on, "
        f"{trainer.held_out_text.tokens:,} held out, {layout.world} processes on {layout.device.type}"
    )
    if resumed:
        report.say(f"goes on behind step {trainer.step_count}")
    with report:
        while trainer.step_count < arguments.steps:
            start = time.perf_counter()
            told = trainer.step()
            step = trainer.step_count
            report.step(told, time.perf_counter() - start, loudly=step % arguments.log_every == 0)
            if step % arguments.eval_every == 0 and step < arguments.steps:
                report.held_out(step, trainer.held_out(arguments.eval_windows))
            if step % arguments.checkpoint_every == 0 or step == arguments.steps:
                trainer.save()
        report.held_out(arguments.steps, trainer.held_out())
    trainer.export()
    report.say(f"the model is in {arguments.out / 'model'}")


def main(words: Sequence[str] | None = None) -> None:
    arguments = arguments_of(words)
    try:
        layout = join(arguments.sequence_parallel)
        train(arguments, layout)
    except (ValueError, TypeError, ImportError, OSError, ArithmeticError) as error:
        raise SystemExit(f"train_lm: {error}") from error
    finally:
        leave()


if __name__ == "__main__":
    main()
