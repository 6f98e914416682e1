"""What the models learn: recall of pairs, a needle in a haystack, bytes of real text; batches to train on and tests.

Every task gives token ids ``[B, T]`` and labels ``[B, T]``, the token that follows each id, -100 where nothing is
asked; the same for the same seed. Tests are drawn from a seed of their own and are the same for every model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from hope_kernels.cli.demo_training import load_example

NO_LABEL = -100
TEST_SEED = 1_000_000  # far from the seeds that training takes


@dataclass(frozen=True)
class Questions:
    """Sequences to be read, and what is averaged over them.

    Attributes:
        ids, labels: int64 ``[B, T]``.
        conditions: by name, which labels count, bool ``[B, T]``.
    """

    ids: Tensor
    labels: Tensor
    conditions: dict[str, Tensor]


class Task(Protocol):
    """A task; ``metric`` is ``"accuracy"`` (of the asked tokens) or ``"bits"`` (per byte, of all tokens)."""

    name: str
    metric: str
    vocab_size: int
    length: int

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Ids and labels of ``size`` training sequences."""
        ...

    def tests(self) -> list[Questions]:
        """What a trained model is asked."""
        ...


def _pairs(count: int, keys: int, values: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Different keys ``0 .. keys - 1`` of every row, ``[size, count]``, and their values ``0 .. values - 1``."""
    key = torch.rand(size, keys, generator=generator).argsort(1)[:, :count]
    return key, torch.randint(values, (size, count), generator=generator)


@dataclass(frozen=True)
class Recall:
    """Multi-query associative recall, after *Zoology* (Arora et al., arXiv 2312.04927).

    A sequence begins with pairs ``key value key value ..``; behind them every key comes once more, in any order, and
    its value is asked. Questions stand at every second place at most; as there, short gaps are far more frequent than
    long ones (place ``i`` has the weight ``i^-0.99``). One blank token fills what is between, and a question's answer
    is not written down.

    Token 0 is the blank, then come the keys, then the values. Keys of a sequence are all different, values are drawn
    independently. A training batch has as many pairs as one of ``pairs``; tests have ``asked``, pairs and tokens, more
    pairs than were trained on among them.
    """

    length: int = 32
    pairs: tuple[int, ...] = (4, 8)
    asked: tuple[tuple[int, int], ...] = ((4, 32), (8, 32), (12, 48), (16, 64))
    keys: int = 16
    values: int = 16
    test_size: int = 128

    @property
    def vocab_size(self) -> int:
        return 1 + self.keys + self.values

    def sequences(self, count: int, length: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Ids and labels ``[size, length]`` with ``count`` pairs.

        Raises:
            ValueError: the pairs and their questions do not fit, or there are fewer keys than pairs.
        """
        slots = (length - 2 * count) // 2
        if not 1 <= count <= min(slots, self.keys):
            raise ValueError(f"count is {count}; want 1 to {min(length // 4, self.keys)} pairs in {length} tokens")
        key, value = _pairs(count, self.keys, self.values, size, generator)
        key, value = key + 1, value + 1 + self.keys
        ids = torch.zeros(size, length, dtype=torch.int64)
        labels = torch.full_like(ids, NO_LABEL)
        ids[:, 0 : 2 * count : 2], ids[:, 1 : 2 * count : 2] = key, value
        weight = torch.arange(1, slots + 1, dtype=torch.float64) ** -0.99
        # The pairs are in random order, so which slot goes to which of them need not be drawn again.
        place = 2 * count + 2 * torch.multinomial(weight.expand(size, -1), count, generator=generator)
        ids.scatter_(1, place, key)
        labels.scatter_(1, place, value)
        return ids, labels

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        count = self.pairs[torch.randint(len(self.pairs), (), generator=generator)]
        return self.sequences(count, self.length, size, generator)

    def tests(self) -> list[Questions]:
        generator = torch.Generator().manual_seed(TEST_SEED)
        found = []
        for count, length in self.asked:
            ids, labels = self.sequences(count, length, self.test_size, generator)
            found.append(Questions(ids, labels, {f"mqar {count}": labels != NO_LABEL}))
        return found


@dataclass(frozen=True)
class Needle:
    """A few needles, ``key value``, anywhere in a haystack; at the end every key is asked.

    The haystack is drawn from tokens of its own. Questions, ``key value``, follow one another at the end in random
    order; the labels are their values. Keys and values are those of :class:`Recall`; behind them come the tokens of the
    haystack. Tests are up to eight times as long as what is trained on, with as many needles.
    """

    length: int = 32
    needles: int = 4
    keys: int = 16
    values: int = 16
    straw: int = 32
    test_size: int = 100
    times: tuple[int, ...] = (1, 2, 4, 8)

    @property
    def vocab_size(self) -> int:
        return 1 + self.keys + self.values + self.straw

    def sequences(self, length: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Ids and labels ``[size, length]``.

        Raises:
            ValueError: needles and questions do not fit.
        """
        count = self.needles
        hay = length - 2 * count
        if hay < 2 * count:
            raise ValueError(f"length is {length}; want at least {4 * count} for {count} needles")
        ids = torch.randint(self.vocab_size - self.straw, self.vocab_size, (size, length), generator=generator)
        labels = torch.full_like(ids, NO_LABEL)
        key, value = _pairs(count, self.keys, self.values, size, generator)
        key, value = key + 1, value + 1 + self.keys
        # Sorted places in a haystack without needles, each moved on by the needles before it: none overlaps.
        free = hay - 2 * count + 1
        place = torch.randint(free, (size, count), generator=generator).sort(1).values + 2 * torch.arange(count)
        order = torch.rand(size, count, generator=generator).argsort(1)
        asked = hay + 2 * torch.arange(count).expand(size, -1)
        for places, k, v in ((place, key, value), (asked, key.gather(1, order), value.gather(1, order))):
            ids.scatter_(1, places, k).scatter_(1, places + 1, v)
        labels.scatter_(1, asked, value.gather(1, order))
        return ids, labels

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.sequences(self.length, size, generator)

    def tests(self) -> list[Questions]:
        generator = torch.Generator().manual_seed(TEST_SEED)
        found = []
        for times in self.times:
            ids, labels = self.sequences(times * self.length, self.test_size, generator)
            found.append(Questions(ids, labels, {f"needle {times}x": labels != NO_LABEL}))
        return found


@dataclass(frozen=True)
class Pairs:
    """Recall and needles, one training for both: a coin says which of the two a batch is of."""

    recall: Recall = Recall()
    needle: Needle = Needle()
    name: str = "recall"
    metric: str = "accuracy"

    @property
    def vocab_size(self) -> int:
        return max(self.recall.vocab_size, self.needle.vocab_size)

    @property
    def length(self) -> int:
        return self.needle.length

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        part = (self.recall, self.needle)[torch.randint(2, (), generator=generator)]
        return part.batch(size, generator)

    def tests(self) -> list[Questions]:
        return self.recall.tests() + self.needle.tests()


@dataclass(frozen=True)
class Text:
    """The next byte of real text: CPython's documentation (``pydoc_data.topics``), one topic in ten held out.

    Trains on windows of ``length`` bytes from anywhere. Tests read windows of ``longest`` held-out bytes one behind the
    other from a fresh state, at most ``test_size`` of them, and average by position in the window.
    """

    length: int = 256
    longest: int = 1024
    test_size: int = 41
    name: str = "text"
    metric: str = "bits"
    vocab_size: int = field(default=256, init=False)

    @cached_property
    def _texts(self) -> tuple[Tensor, Tensor]:
        return load_example("byte_transformer").documentation()

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        windows = self._texts[0].unfold(0, self.length + 1, 1)
        window = windows[torch.randint(len(windows), (size,), generator=generator)]
        return window[:, :-1], window[:, 1:]

    def tests(self) -> list[Questions]:
        windows = self._texts[1].unfold(0, self.longest + 1, self.longest)[: self.test_size]
        ids, labels = windows[:, :-1], windows[:, 1:]
        position = torch.arange(self.longest).expand_as(ids)
        edges = [0, self.length // 4, self.length]
        while edges[-1] < self.longest:
            edges.append(min(2 * edges[-1], self.longest))
        conditions = {f"0-{self.length}": position < self.length}
        for low, high in pairwise(edges):
            conditions[f"{low}-{high}"] = (position >= low) & (position < high)
        return [Questions(ids, labels, conditions)]


TASKS: dict[str, type[Task]] = {"recall": Pairs, "text": Text}
