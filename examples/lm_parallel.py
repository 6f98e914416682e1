"""How the processes of `torchrun` share the training in `train_lm.py`: rows of a batch, or tokens of a window.

* Rows, ``--parallel ddp`` or ``fsdp``: each process reads some of the rows with a model of its own. FSDP keeps only a
  part of the weights, gradients and AdamW's moments in each process, and gathers the weights for every window.
* Tokens, ``--sequence-parallel S``: S processes read one window of the same rows, a part each, in a chain. The state
  of each block goes on to the next process as soon as the block has read the part, so that a process works on its
  block while the next one works on the block before; the backward sends the states' gradients back the same way. The
  numbers are those of one process that reads the whole window.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from hope_kernels.memory import MemoryState
from hope_kernels.models import HopeForCausalLM, HopeState


@dataclass(frozen=True)
class Layout:
    """This process among all: ``chain`` processes, which stand next to each other, share the tokens of a window."""

    device: torch.device
    rank: int = 0
    world: int = 1
    chain: int = 1

    @property
    def place(self) -> int:
        """In the chain."""
        return self.rank % self.chain

    def share(self, rows: int, window: int) -> tuple[slice, slice]:
        """The rows and tokens of a window that are read here.

        Raises:
            ValueError: they cannot be shared evenly.
        """
        teams = self.world // self.chain
        if rows % teams or window % self.chain:
            raise ValueError(
                f"batch is {rows}, window is {window}; want them divisible by {teams} and {self.chain} processes"
            )
        team, height, width = self.rank // self.chain, rows // teams, window // self.chain
        return slice(team * height, (team + 1) * height), slice(self.place * width, (self.place + 1) * width)


def backend_of(device: torch.device) -> str:
    """What processes talk by: NCCL between GPUs, else gloo."""
    return "nccl" if device.type == "cuda" else "gloo"


def join(chain: int) -> Layout:
    """Meet the other processes, where `torchrun` has started any.

    Raises:
        ValueError: they cannot be divided into chains.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if chain < 1 or world % chain:
        raise ValueError(f"sequence-parallel: got {chain}; want a divisor of the {world} processes")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group(backend_of(device))
    return Layout(device, rank, world, chain)


def leave() -> None:
    """Part from the other processes, where :func:`join` has met any.

    What holds their groups is freed before, models in reference cycles too: a thread of a group that is left when the
    interpreter ends may abort the process.
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


@dataclass(frozen=True)
class Described:
    """What a message says of a tensor that is to come."""

    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool = False


def map_tensors(function: Callable[[Any], Any], tree: Any) -> Any:
    """A state (dataclasses and tuples) with ``function`` of each of its tensors, in a fixed order."""
    if isinstance(tree, (Tensor, Described)):
        return function(tree)
    if isinstance(tree, tuple):
        return _tuple_like(tree, [map_tensors(function, x) for x in tree])
    if dataclasses.is_dataclass(tree):
        parts = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
        return dataclasses.replace(tree, **{name: map_tensors(function, x) for name, x in parts.items()})
    return tree


def _tuple_like(tree: tuple, parts: list[Any]) -> tuple:
    return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)


def kept(state: HopeState) -> HopeState:
    """The state for the next window: without history, and sharing no storage with the parameters, which will change.

    A memory that has not been written yet refers to its layer's parameters.
    """
    return map_tensors(lambda x: x.detach().clone(), state)


def with_initial_weights(state: Any, initial: Any) -> Any:
    """``state`` with the same numbers, its memories' weights differentiable with respect to the initial ones.

    A memory's weights are the initial ones plus what was written. Backpropagation that ends at the window's start
    forgets how the written part came about; with this it still knows the initial part, with derivative 1.
    """
    if isinstance(state, MemoryState):
        pairs = zip(state.stored_weights, initial.stored_weights, strict=True)
        return dataclasses.replace(state, stored_weights=tuple(w + (w0 - w0.detach()) for w, w0 in pairs))
    if initial is None:
        return state
    if isinstance(state, tuple):
        return _tuple_like(state, [with_initial_weights(x, x0) for x, x0 in zip(state, initial, strict=True)])
    if dataclasses.is_dataclass(state):
        names = [field.name for field in dataclasses.fields(state)]
        parts = {name: with_initial_weights(getattr(state, name), getattr(initial, name)) for name in names}
        return dataclasses.replace(state, **parts)
    return state


def nats(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of ``logits [B, T, V]``, summed, in float32 (float64 for float64)."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.flatten(0, 1).to(dtype), labels.flatten(), reduction="sum")


class Reading(nn.Module):
    """What is trained: a model that reads a window from a state on.

    A module of its own because DDP and FSDP act around one ``forward``: fresh states refer to the parameters, which
    FSDP gathers for its duration.

    Args:
        through: whether windows behind the first one teach the memories' initial weights.
        loss: :func:`nats`, or what computes the same.
    """

    def __init__(
        self, model: HopeForCausalLM, layout: Layout, through: bool, loss: Callable[[Tensor, Tensor], Tensor] = nats
    ) -> None:
        super().__init__()
        self.model, self.layout, self.through, self.loss = model, layout, through, loss

    def forward(self, ids: Tensor, labels: Tensor, state: HopeState | None) -> tuple[Tensor, HopeState | None]:
        """The loss in nats, summed over the tokens read here, and the state behind the window.

        Args:
            ids, labels: ``[rows, tokens]``.
            state: None for fresh documents; in a chain the first process alone has one.
        """
        if self.layout.place == 0:
            fresh = self.model.init_state(len(ids)) if state is None or self.through else None
            if state is None:
                state = fresh
            elif self.through:
                state = with_initial_weights(state, fresh)
        if self.layout.chain == 1:
            logits, _, state = self.model(ids, state=state)
            return self.loss(logits, labels), kept(state)
        return self._in_chain(ids, labels, state)

    def _in_chain(self, ids: Tensor, labels: Tensor, state: HopeState | None) -> tuple[Tensor, HopeState | None]:
        model, layout, blocks = self.model.model, self.layout, []
        before = layout.rank - 1 if layout.place > 0 else None
        behind = layout.rank + 1 if layout.place < layout.chain - 1 else None
        x, ties = model.embed(ids), []
        sent: list[Sent] = []
        for index, block in enumerate(model.blocks):
            if before is None:
                held = state.blocks[index]
            else:
                held, tie = receive_state(before, layout.device)
                ties.append(tie)
            if model.activation_checkpointing and self.training and torch.is_grad_enabled():
                x, held = checkpoint(block.stream, x, held, use_reentrant=False)
            else:
                x, held = block.stream(x, held)
            if behind is not None:
                ties.append(send_state(held, behind, sent))
            blocks.append(held)
        loss = self.loss(self.model.logits(model.norm(x)), labels) + sum(ties)
        wait(sent)
        # The last process has read the window's end; the first one begins the next window there.
        first, last = layout.rank - layout.place, layout.rank - layout.place + layout.chain - 1
        if behind is None:
            with torch.no_grad():
                for held in kept(tuple(blocks)):
                    send_state(held, first, sent)
                wait(sent)
        if before is not None:
            return loss, None
        with torch.no_grad():
            blocks = tuple(receive_state(last, layout.device)[0] for _ in blocks)
        return loss, HopeState(state.position + layout.chain * ids.shape[1], len(ids), blocks)


Sent = tuple[Any, Tensor]  # a message under way, and its content, which must live as long


def wait(sent: list[Sent]) -> None:
    """Until all messages have gone."""
    while sent:
        sent.pop()[0].wait()


def _send(x: Tensor, to: int, sent: list[Sent]) -> None:
    if x.numel():
        x = x.detach().contiguous()
        sent.append((dist.isend(x, to), x))


def _receive(like: Described, source: int, device: torch.device) -> Tensor:
    x = torch.empty(like.shape, dtype=like.dtype, device=device)
    if x.numel():
        dist.recv(x, source)
    return x


class _Sending(torch.autograd.Function):
    """Its backward receives the gradients of the tensors that were sent."""

    @staticmethod
    def forward(ctx: Any, to: int, *tensors: Tensor) -> Tensor:
        ctx.to, ctx.device = to, tensors[0].device
        ctx.like = [Described(x.shape, x.dtype) for x in tensors]
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:
        return None, *(_receive(like, ctx.to, ctx.device) for like in ctx.like)


class _Receiving(torch.autograd.Function):
    """Its backward sends the gradients of the tensors that were received."""

    @staticmethod
    def forward(ctx: Any, source: int, tie: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.source = source
        return tie.clone(), *(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, _: Tensor, *gradients: Tensor) -> tuple[Any, ...]:
        sent: list[Sent] = []
        for gradient in gradients:
            _send(gradient, ctx.source, sent)
        wait(sent)
        return None, None, *(None for _ in gradients)


def send_state(state: Any, to: int, sent: list[Sent]) -> Tensor:
    """Hand a block's state on. The zero it returns must be added to the loss: its backward fetches the gradients."""
    tensors: list[Tensor] = []

    def describe(x: Tensor) -> Described:
        tensors.append(x)
        return Described(x.shape, x.dtype, x.requires_grad)

    described = pickle.dumps(map_tensors(describe, state))
    device = tensors[0].device
    header = torch.frombuffer(bytearray(described), dtype=torch.uint8).to(device)
    _send(torch.tensor([len(header)], device=device), to, sent)
    for x in (header, *tensors):
        _send(x, to, sent)
    traced = [x for x in tensors if x.requires_grad]
    return _Sending.apply(to, *traced) if traced else torch.zeros((), device=device)


def receive_state(source: int, device: torch.device) -> tuple[Any, Tensor]:
    """The state that :func:`send_state` hands on, and a zero to add to the loss: its backward returns the gradients."""
    length = _receive(Described(torch.Size([1]), torch.int64), source, device)
    header = _receive(Described(torch.Size([int(length)]), torch.uint8), source, device)
    described = pickle.loads(bytes(header.cpu().tolist()))
    like: list[Described] = []
    map_tensors(like.append, described)
    tensors = [_receive(x, source, device) for x in like]
    tie = torch.zeros((), device=device, requires_grad=True)
    traced = [i for i, x in enumerate(like) if x.requires_grad]
    if traced:
        tie, *received = _Receiving.apply(source, tie, *(tensors[i] for i in traced))
        for i, x in zip(traced, received, strict=True):
            tensors[i] = x
    found = iter(tensors)
    return map_tensors(lambda _: next(found), described), tie


def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Gradients become their sum over all processes; one that no process has stays None."""
    present = torch.tensor([p.grad is not None for p in parameters], device=parameters[0].device).int()
    dist.all_reduce(present)
    for count, p in zip(present.tolist(), parameters, strict=True):
        if count and p.grad is None:
            p.grad = torch.zeros_like(p)
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for g, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        g.copy_(total.view_as(g))


def drop_zero_gradients(parameters: Sequence[Tensor], world: int) -> None:
    """Gradients that are zero everywhere, in all processes, become None: AdamW then leaves the parameter alone.

    Whether a parameter that a window does not depend on has a zero gradient or none depends on how the window is
    shared between processes; what comes out must not.
    """
    held = [p for p in parameters if p.grad is not None]
    local = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in held]
    alive = torch.stack([g.any() for g in local]).int()
    if world > 1:
        dist.all_reduce(alive, dist.ReduceOp.MAX)
    for p, any_alive in zip(held, alive.tolist(), strict=True):
        if not any_alive:
            p.grad = None
