"""`examples/train_lm.py`: what it reads, what it learns from, and that a killed run continues exactly."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hope_kernels.memory import MemoryState
from hope_kernels.models import HopeForCausalLM
from tests.examples.training import CONFIGS, EXAMPLES, metrics, run, train_lm, words_of, write_inputs

pytest.importorskip("rich", reason="the trainer's progress needs rich")
pytest.importorskip("safetensors", reason="the trainer stores its model with safetensors")

import lm_checkpoint
import lm_parallel
import lm_text
from lm_parallel import Layout, Reading, drop_zero_gradients, join
from lm_text import NO_LABEL, ByteTokenizer, Reader, read_folder

ROOT = EXAMPLES.parent
ALONE = Layout(torch.device("cpu"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def whole(inputs: Path) -> list[dict[str, float]]:
    """The metrics of a run that nothing has stopped."""
    return run(inputs, "whole")


def trainer_of(inputs: Path, out: str, more: str = "") -> train_lm.Trainer:
    return train_lm.Trainer(train_lm.arguments_of(words_of(inputs, out, more)), ALONE)


def documents_of(*lengths: int) -> list[torch.Tensor]:
    """Documents in which every token is another number."""
    numbers = torch.arange(sum(lengths), dtype=torch.int32)
    return list(numbers.split(list(lengths)))


# What is read


def test_an_epoch_reads_every_token_once_each_document_from_its_beginning_to_its_end():
    documents = documents_of(30, 2, 9, 17, 8, 26, 3)
    reader = Reader(documents, rows=3, window=4, span=12, seed=5)
    rows, read = {}, []
    while reader.epoch == 0:
        window = reader.next()
        if window.fresh:
            read += rows.values()
            rows = {row: [] for row in range(3)}
        for row in range(3):
            real = window.labels[row] != NO_LABEL
            rows[row] += zip(window.ids[row][real].tolist(), window.labels[row][real].tolist(), strict=True)
            assert not real.diff().any() or not real[-1], "nothing is left out in the middle of a document"
    read += rows.values()
    want = []
    for document in documents:
        pairs = list(zip(document[:-1].tolist(), document[1:].tolist(), strict=True))
        want += [pairs[first : first + 12] for first in range(0, len(pairs), 12)]
    assert sorted(part for part in read if part) == sorted(want)


def test_epochs_differ_in_order_and_groups_hold_documents_of_about_one_length():
    reader = Reader(documents_of(*range(2, 50)), rows=4, window=4, span=100, seed=0)
    first = [reader.next() for _ in range(len(reader.groups))]
    padded = sum(int((window.labels == NO_LABEL).sum()) for window in first)
    assert padded < 0.4 * sum(window.labels.numel() for window in first)
    again = Reader(documents_of(*range(2, 50)), rows=4, window=4, span=100, seed=0)
    orders = []
    for epoch in range(2):
        again.load_state_dict({"epoch": epoch, "group": 0, "step": 0})
        orders.append([part for group in again.groups for part in group])
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_a_reader_goes_on_from_its_place():
    documents = documents_of(30, 2, 9, 17, 8)
    reader = Reader(documents, rows=2, window=4, span=12, seed=1)
    for _ in range(25):  # into the second epoch
        place = reader.state_dict()
        window = reader.next()
        other = Reader(documents, rows=2, window=4, span=12, seed=1)
        other.load_state_dict(place)
        same = other.next()
        assert torch.equal(same.ids, window.ids) and torch.equal(same.labels, window.labels)
        assert same.fresh == window.fresh
    assert reader.epoch > 0


def test_files_are_held_out_by_their_names_alone(tmp_path: Path):
    def split() -> tuple[set[bytes], set[bytes]]:
        parts = read_folder(tmp_path, ByteTokenizer(), 0.3)
        return tuple({bytes(document.tolist()) for document in part.documents} for part in parts)

    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
    (tmp_path / ".hidden").write_text("not this")
    train, held_out = split()
    assert len(train) + len(held_out) == 40 and not train & held_out and 4 <= len(held_out) <= 20
    (tmp_path / "new.txt").write_text("more text")
    later = split()
    assert train <= later[0] and held_out <= later[1]


def test_of_one_file_the_end_is_held_out_and_no_character_is_cut(tmp_path: Path):
    (tmp_path / "one.txt").write_text("é" * 100)
    train, held_out = read_folder(tmp_path, ByteTokenizer(), 0.105)
    assert (train.bytes, held_out.bytes) == (180, 20)
    assert bytes(train.documents[0].tolist()).decode() == "é" * 90


# What it learns from


@pytest.mark.parametrize("mixer", CONFIGS)
def test_windows_with_the_state_carried_read_a_document_as_one_call_does(inputs: Path, mixer: str):
    trainer = trainer_of(inputs, "unused", f"--config IN/{mixer}.json")
    document = torch.randint(256, (2, 25), generator=torch.Generator().manual_seed(0))
    ids, labels = document[:, :-1], document[:, 1:]
    whole, _ = trainer.reading(ids, labels, None)
    state, parts = None, []
    for first in range(0, 24, 8):
        loss, state = trainer.reading(ids[:, first : first + 8], labels[:, first : first + 8], state)
        parts.append(loss)
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)


def memories_of(state: Any) -> list[MemoryState]:
    """Those in a state, in a fixed order."""
    if isinstance(state, MemoryState):
        return [state]
    if dataclasses.is_dataclass(state):
        state = tuple(getattr(state, field.name) for field in dataclasses.fields(state))
    return [found for part in state for found in memories_of(part)] if isinstance(state, tuple) else []


def test_a_later_window_teaches_initial_weights_as_if_they_were_the_weights_it_finds(inputs: Path):
    """The gradients of the memories' carried weights go to the initial ones, summed over the rows."""
    trainer = trainer_of(inputs, "unused", "--through")
    random = torch.Generator().manual_seed(0)
    first, ids, labels = (torch.randint(256, (3, 8), generator=random) for _ in range(3))
    _, state = trainer.reading(first, ids, None)
    parameters = list(trainer.parameters.values())
    loss, _ = trainer.reading(ids, labels, state)
    found = torch.autograd.grad(loss, parameters)

    held = [w for memory in memories_of(state) for w in memory.stored_weights]
    assert len(held) >= 8 and all(w.dim() == 4 and not w.requires_grad for w in held), "written; gradients end here"
    for w in held:
        w.requires_grad_()
    alone, _ = Reading(trainer.model, ALONE, through=False)(ids, labels, state)
    direct = torch.autograd.grad(alone, [*parameters, *held], allow_unused=True)
    initial = [w for memory in memories_of(trainer.model.init_state(3)) for w in memory.stored_weights]
    sums = [g.sum(0) for g in direct[len(parameters) :]]
    through = torch.autograd.grad(initial, parameters, sums, allow_unused=True)
    assert None in direct and found[0] is not None
    for g, *parts in zip(found, direct, through, strict=False):
        want = sum((part for part in parts if part is not None), torch.zeros_like(g))
        torch.testing.assert_close(g, want, rtol=1e-10, atol=1e-14)


def test_what_a_window_tells_nothing_of_is_left_alone():
    silent, heard = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([silent, heard], lr=0.1)
    for factor in (1.0, 0.0):
        silent.grad, heard.grad = torch.full((2,), factor), torch.tensor([0.0, 1.0])
        drop_zero_gradients([silent, heard], world=1)
        before = silent.detach().clone(), heard.detach().clone()
        optimizer.step()
        assert torch.equal(silent, before[0]) == (factor == 0) and not torch.equal(heard, before[1])


def test_every_token_of_the_text_weighs_the_same_however_much_is_padded(inputs: Path):
    trainer = trainer_of(inputs, "unused", "--clip 1e9")
    while (window := trainer.reader.next()).count == window.labels.numel():
        pass
    trainer.reader.next, count = lambda: window, window.count
    told = trainer.step()
    loss, _ = trainer_of(inputs, "unused").reading(window.ids, window.labels, None)
    assert told["tokens"] == count and math.isclose(told["loss"], loss.item() / count, rel_tol=1e-12)
    fresh = trainer_of(inputs, "unused")
    loss, _ = fresh.reading(window.ids, window.labels, None)
    (loss / window.labels.numel()).backward()
    want = math.sqrt(sum(float(p.grad.square().sum()) for p in fresh.parameters.values() if p.grad is not None))
    assert math.isclose(told["gradient_norm"], want, rel_tol=1e-9)


def test_a_model_that_knows_nothing_needs_eight_bits_per_byte(inputs: Path):
    trainer = trainer_of(inputs, "unused")
    nn.init.zeros_(trainer.model.model.embedding.weight)  # which is the head too
    assert math.isclose(trainer.held_out(), 8.0, rel_tol=1e-9)


def test_the_learning_rate_rises_then_falls_to_a_tenth(inputs: Path):
    trainer = trainer_of(inputs, "unused", "--steps 103 --warmup 3 --lr 0.3")
    rates = [trainer.lr(step) for step in range(104)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3]) and rates[103] == pytest.approx(0.03)
    assert rates[53] == pytest.approx(0.3 * 0.55) and rates[3:] == sorted(rates[3:], reverse=True)


def test_vectors_do_not_decay(inputs: Path):
    groups = trainer_of(inputs, "unused").optimizer.param_groups
    decays = {p.dim(): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays[1] == 0 and decays[2] == decays[3] == 0.1


def test_it_learns(whole: list[dict[str, float]]):
    losses = [told["loss"] for told in whole if "loss" in told]
    assert len(losses) == 12 and min(losses[-3:]) < losses[0] - 0.5
    held_out = [told["held_out_bits_per_byte"] for told in whole if "loss" not in told]
    assert len(held_out) == 2 and held_out[1] < held_out[0] < 8.1


def test_activation_checkpointing_changes_the_numbers_by_rounding_only(inputs: Path, whole: list[dict[str, float]]):
    trainer = trainer_of(inputs, "unused", "--activation-checkpointing")
    for want in whole[:3]:
        assert trainer.step() == pytest.approx(want, rel=1e-9)


def test_autocast_computes_nearly_the_same(inputs: Path):
    found = []
    for more in ("", "--autocast"):
        trainer = trainer_of(inputs, "unused", f"--dtype float32 {more}")
        found.append([trainer.step()["loss"] for _ in range(3)])
    assert found[1] == pytest.approx(found[0], rel=0.01) and found[0] != found[1]


# Going on


def test_a_killed_run_continues_to_the_same_numbers_bit_for_bit(
    inputs: Path, whole: list[dict[str, float]], monkeypatch: pytest.MonkeyPatch
):
    killed = (
        "import os, signal, sys; sys.path.insert(0, 'examples'); import train_lm\n"
        "honest = train_lm.Trainer.step\n"
        "def step(self):\n"
        "    if self.step_count == 8: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return honest(self)\n"
        "train_lm.Trainer.step = step\n"
        "train_lm.main(sys.argv[1:])\n"
    )
    # Sums over other numbers of threads differ in their last bits.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    found = subprocess.run(
        [sys.executable, "-c", killed, *words_of(inputs, "killed")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert found.returncode == -signal.SIGKILL, found.stderr
    out = inputs / "killed"
    assert metrics(out)[-1]["step"] == 8
    (checkpoint,) = lm_checkpoint.all_of(out)
    values = lm_checkpoint.load(checkpoint, ALONE)
    assert values["step"] == 7 and values["reader"]["step"] > 0, "it stands inside documents"
    # Killed again, in the middle of writing the next checkpoint.
    honest = torch.save
    with monkeypatch.context() as context:

        def torn(values, file):
            honest({"half": 1}, file)
            raise KeyboardInterrupt

        context.setattr(torch, "save", torn)
        with pytest.raises(KeyboardInterrupt):
            run(inputs, "killed")
    assert lm_checkpoint.all_of(out) == [checkpoint]
    assert run(inputs, "killed") == whole
    weights = [(inputs / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    assert run(inputs, "killed") == whole, "a run that has ended says the same once more"


@pytest.mark.slow
@pytest.mark.parametrize("step", range(13))
def test_a_run_stopped_behind_any_step_continues_to_the_same_numbers(
    inputs: Path, whole: list[dict[str, float]], monkeypatch: pytest.MonkeyPatch, step: int
):
    honest, out = train_lm.Trainer.held_out if step == 12 else train_lm.Trainer.step, f"stopped-{step}"

    def stopping(self, *arguments):
        if self.step_count == step:
            raise KeyboardInterrupt
        return honest(self, *arguments)

    with monkeypatch.context() as context:
        context.setattr(train_lm.Trainer, honest.__name__, stopping)
        with pytest.raises(KeyboardInterrupt):
            run(inputs, out)
    assert run(inputs, out) == whole
    weights = [(inputs / name / "model" / "model.safetensors").read_bytes() for name in ("whole", out)]
    assert weights[0] == weights[1]


def test_the_state_of_a_memory_not_yet_written_does_not_follow_the_parameters(inputs: Path):
    """Else it would differ from the one that a checkpoint brings back."""
    trainer = trainer_of(inputs, "unused", "--window 2")
    trainer.step()
    memories = memories_of(trainer.state)
    assert len(memories) >= 4 and all(memory.chunk_index == 0 for memory in memories)
    before = [memory.stored_weights[0].clone() for memory in memories]
    with torch.no_grad():
        for parameter in trainer.parameters.values():
            parameter.add_(1.0)
    assert all(torch.equal(m.stored_weights[0], w) for m, w in zip(memories, before, strict=True))


def test_the_trained_model_is_stored(inputs: Path, whole: list[dict[str, float]]):
    trainer = trainer_of(inputs, "whole")
    assert trainer.resume()
    stored = HopeForCausalLM.from_pretrained(inputs / "whole" / "model").state_dict()
    assert all(torch.equal(stored[name], parameter) for name, parameter in trainer.parameters.items())
    assert len(stored) == len(trainer.parameters)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("--lr 0.02", "lr was 0.01 and is 0.02"),
        ("--window 4", "window was 8 and is 4"),
        ("--held-out 0.5", "text was"),
    ],
)
def test_a_run_with_other_settings_is_not_continued(inputs: Path, whole: list[dict[str, float]], more: str, told: str):
    with pytest.raises(SystemExit, match=f"cannot continue exactly.*{told}"):
        run(inputs, "whole", more)


def test_a_gradient_that_is_not_finite_ends_the_run_before_it_spoils_the_weights(inputs: Path):
    trainer = trainer_of(inputs, "unused")
    honest = trainer.reading.loss
    trainer.reading.loss = lambda *arguments: honest(*arguments) * torch.inf
    before = [parameter.clone() for parameter in trainer.parameters.values()]
    with pytest.raises(ArithmeticError, match="step 1: the gradient's norm is"):
        trainer.step()
    assert all(torch.equal(p, b) for p, b in zip(trainer.parameters.values(), before, strict=True))


@pytest.mark.slow
def test_a_compiled_loss_is_the_same(inputs: Path, whole: list[dict[str, float]]):
    trainer = trainer_of(inputs, "unused", "--compile")
    assert trainer.reading.loss is not lm_parallel.nats
    for want in whole[:3]:
        assert trainer.step() == pytest.approx(want, rel=1e-9)


def test_a_broken_checkpoint_is_named(inputs: Path, tmp_path: Path):
    place = tmp_path / "checkpoint-00000003"
    place.mkdir()
    (place / "process-00000.pt").write_bytes(b"no file of torch")
    with pytest.raises(ValueError, match=r"process-00000\.pt cannot be read"):
        lm_checkpoint.load(place, ALONE)
    torch.save({"step": 3, "state": None}, place / "process-00000.pt")
    with pytest.raises(ValueError, match=r"is no checkpoint of a training: it lacks .*'settings'"):
        lm_checkpoint.load(place, ALONE)
    (place / "process-00001.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="written by 2 processes; want 1"):
        lm_checkpoint.load(place, ALONE)


# Words that do not fit


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("--config missing.json", "missing.json"),
        ("--sequence-parallel 2", "divisor of the 1 processes"),
        ("--held-out 1.5", "share between 0 and 1"),
        ("--tokenizer missing.json", "tokenizer"),
    ],
)
def test_what_does_not_fit_is_named(inputs: Path, more: str, told: str):
    with pytest.raises(SystemExit, match=told):
        run(inputs, "refused", more)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (json.dumps({**CONFIGS["titans"], "vocab_size": 100}), "config: vocab_size is 100; the text needs 256"),
        ('{"dim": 8', r"config: .*broken\.json is no JSON"),
        ('{"width": 8}', r"HopeConfig: got unknown names \['width'\]"),
    ],
)
def test_a_config_that_does_not_fit_is_named(inputs: Path, text: str, told: str):
    (inputs / "broken.json").write_text(text)
    with pytest.raises(SystemExit, match=told):
        run(inputs, "refused", "--config IN/broken.json")


def test_rows_that_cannot_be_shared_are_refused():
    with pytest.raises(ValueError, match="batch is 3, window is 8; want them divisible by 2 and 1"):
        Layout(torch.device("cpu"), world=2).share(3, 8)
    with pytest.raises(ValueError, match="divisible by 1 and 2"):
        Layout(torch.device("cpu"), world=2, chain=2).share(3, 9)
    assert join(1) == Layout(join(1).device)


def test_a_folder_without_text_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="no folder with files"):
        read_folder(tmp_path, ByteTokenizer(), 0.1)
    (tmp_path / "short.txt").write_text("abc")
    with pytest.raises(ValueError, match="no document of two tokens held out"):
        read_folder(tmp_path, ByteTokenizer(), 0.1)


# What need not be installed


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["memory reads and é writes, "] * 9, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_a_tokenizer_file_is_used_and_bits_are_per_byte(inputs: Path, tokenizer_file: Path):
    trainer = trainer_of(inputs, "tokens", f"--tokenizer {tokenizer_file}")
    text = trainer.held_out_text
    assert trainer.config.vocab_size == 270 and text.tokens < 0.6 * text.bytes
    nn.init.zeros_(trainer.model.model.embedding.weight)
    assert math.isclose(trainer.held_out(), math.log2(270) * text.tokens / text.bytes, rel_tol=1e-9)
    assert trainer.step()["loss"] == pytest.approx(math.log(270), rel=1e-9)


def test_a_tokenizer_needs_utf8(tmp_path: Path, tokenizer_file: Path):
    for name in "ab":
        (tmp_path / name).write_bytes(b"caf\xe9 and more")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_folder(tmp_path, lm_text.FileTokenizer(tokenizer_file), 0.5)


def test_a_missing_tokenizers_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'hope_kernels\[train\]'"):
        lm_text.FileTokenizer(tmp_path / "tokenizer.json")


def test_tensorboard_shows_what_the_metrics_say(inputs: Path):
    pytest.importorskip("tensorboard")
    from lm_report import Report
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Report(inputs / "board", 0, 2, tensorboard=True, speaks=True) as report:
        for step in (1, 2):
            told = {"step": step, "loss": 5.0 / step, "gradient_norm": 1.0, "lr": 0.1, "tokens": 6}
            report.step(told, seconds=0.5, loudly=step == 2)
        report.held_out(2, 3.5)
    events = EventAccumulator(str(inputs / "board" / "tensorboard")).Reload()
    found = {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert found["train/loss"] == [5.0, 2.5] and found["held_out/bits_per_byte"] == [3.5]
    assert found["train/tokens_per_second"] == [12.0]


def test_a_missing_tensorboard_is_said(inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    from lm_report import Report

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    Report(inputs / "no-board", 0, 2, tensorboard=True, speaks=True)
    assert "TensorBoard is not installed" in capsys.readouterr().out
