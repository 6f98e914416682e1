"""Text for `train_lm.py`: a folder of files as documents of tokens, and the windows in which a batch reads them.

All rows of a batch begin a document together, each a document of its own, and read it window by window; the group
ends with its longest document, and the next begins with fresh states. So a state never passes from one document to
another, and one `HopeState`, whose rows share their position, serves the batch. Documents of a group have about the
same length, so little is padded.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

NO_LABEL = -100  # what HopeForCausalLM leaves out of its loss


@dataclass(frozen=True)
class Corpus:
    """Documents of at least two tokens, int32 (uint8 for bytes) ``[n]`` each, and the bytes that they were."""

    documents: list[Tensor]
    bytes: int

    @property
    def tokens(self) -> int:
        return sum(map(len, self.documents))

    @property
    def checksum(self) -> int:
        """Of all tokens in their order: two runs read the same text when it agrees."""
        found = 0
        for document in self.documents:
            found = zlib.crc32(document.numpy().tobytes(), zlib.crc32(str(len(document)).encode(), found))
        return found


class ByteTokenizer:
    """A token is a byte; any file can be read."""

    vocab_size = 256

    def encode(self, content: bytes, name: str) -> Tensor:
        return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


class FileTokenizer:
    """The tokenizer of a ``tokenizer.json``, by the `tokenizers` library; files are UTF-8.

    Raises:
        ImportError: the library is not installed.
        ValueError: the file is no tokenizer.
    """

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ImportError("a tokenizer file needs tokenizers: pip install 'hope_kernels[train]'") from None
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"tokenizer: {path} cannot be read: {error}") from error
        self.vocab_size = self.tokenizer.get_vocab_size()

    def encode(self, content: bytes, name: str) -> Tensor:
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"text: {name} is not UTF-8 ({error}); leave the tokenizer out to read bytes") from None
        return torch.tensor(self.tokenizer.encode(text).ids, dtype=torch.int32)


def read_folder(folder: Path, tokenizer: ByteTokenizer | FileTokenizer, share: float) -> tuple[Corpus, Corpus]:
    """The files of a folder, a document each in the order of their paths: those to train on, and those held out.

    Several files: those whose path has a checksum among the lowest ``share`` of all checksums, at least one and never
    all; which ones does not depend on the others. One file: its last ``share``. Hidden files are left out.

    Raises:
        ValueError: there is no text in the folder, or a file is no text.
    """
    if not 0 < share < 1:
        raise ValueError(f"held-out: got {share}; want a share between 0 and 1")
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    files = {name: files[name] for name in sorted(files) if not any(part[0] == "." for part in name.split("/"))}
    if not files:
        raise ValueError(f"text: {folder} is no folder with files in it")
    contents = {name: path.read_bytes() for name, path in files.items()}
    if len(contents) == 1:
        ((name, content),) = contents.items()
        cut = len(content) - round(len(content) * share)
        while cut < len(content) and content[cut] & 0xC0 == 0x80:  # not inside a character
            cut += 1
        parts = [{name: content[:cut]}, {name: content[cut:]}]
    else:
        checksum = {name: zlib.crc32(name.encode()) for name in contents}
        order = sorted(contents, key=lambda name: (checksum[name], name))
        low = sum(value < share * 2**32 for value in checksum.values())
        held_out = set(order[: min(max(1, low), len(order) - 1)])
        parts = [{n: c for n, c in contents.items() if (n in held_out) == held} for held in (False, True)]
    corpora = []
    for part, what in zip(parts, ("to train on", "held out"), strict=True):
        found = [(tokenizer.encode(content, name), len(content)) for name, content in part.items()]
        found = [(document, size) for document, size in found if len(document) > 1]
        if not found:
            raise ValueError(f"text: {folder} has no document of two tokens {what}; want more text")
        corpora.append(Corpus([document for document, _ in found], sum(size for _, size in found)))
    return corpora[0], corpora[1]


@dataclass(frozen=True)
class Window:
    """``ids`` and ``labels [rows, window]`` int64, ``labels`` being what follows; ``fresh`` where documents begin."""

    ids: Tensor
    labels: Tensor
    fresh: bool

    @property
    def count(self) -> int:
        """Tokens that are predicted."""
        return int((self.labels != NO_LABEL).sum())

    def part(self, rows: slice, tokens: slice) -> Window:
        return Window(self.ids[rows, tokens], self.labels[rows, tokens], self.fresh)


class Reader:
    """Endless windows of a corpus, each epoch in another order; the place in it is three numbers.

    Args:
        documents: ``[n]`` each.
        rows, window: of a batch.
        span: a longer document is read in parts of this many tokens, each as a document (no token is lost between).
        seed: of the order; None keeps documents in the order of their lengths.
    """

    def __init__(self, documents: list[Tensor], rows: int, window: int, span: int, seed: int | None) -> None:
        self.documents, self.rows, self.window, self.seed = documents, rows, window, seed
        # (document, first token, tokens predicted): the last token of a part is the first input of the next one.
        self.parts = [
            (index, start, min(span, len(document) - 1 - start))
            for index, document in enumerate(documents)
            for start in range(0, len(document) - 1, span)
        ]
        self.epoch = self.group = self.step = 0
        self._order()

    def _order(self) -> None:
        """Parts in a random order, sorted by windows (stably), cut into groups; the groups in a random order."""
        parts = self.parts
        random = torch.Generator()
        if self.seed is not None:
            random.manual_seed((self.seed << 20) + self.epoch)
            parts = [parts[i] for i in torch.randperm(len(parts), generator=random)]
        parts = sorted(parts, key=lambda part: self._windows(part[2]))
        groups = [parts[i : i + self.rows] for i in range(0, len(parts), self.rows)]
        if self.seed is not None:
            groups = [groups[i] for i in torch.randperm(len(groups), generator=random)]
        self.groups = groups

    def _windows(self, tokens: int) -> int:
        return -(-tokens // self.window)

    def next(self) -> Window:
        """The next window; rows whose document has ended, or that have none, predict nothing."""
        parts = self.groups[self.group]
        ids = torch.zeros(self.rows, self.window, dtype=torch.int64)
        labels = torch.full((self.rows, self.window), NO_LABEL, dtype=torch.int64)
        first = self.step * self.window
        for row, (index, start, tokens) in enumerate(parts):
            count = min(self.window, tokens - first)
            if count > 0:
                text = self.documents[index][start + first : start + first + count + 1].long()
                ids[row, :count], labels[row, :count] = text[:-1], text[1:]
        fresh = self.step == 0
        self.step += 1
        if self.step == max(self._windows(tokens) for *_, tokens in parts):
            self.step, self.group = 0, self.group + 1
        if self.group == len(self.groups):
            self.group, self.epoch = 0, self.epoch + 1
            self._order()
        return Window(ids, labels, fresh)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "group": self.group, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.epoch, self.group, self.step = (state_dict[name] for name in ("epoch", "group", "step"))
        self._order()
