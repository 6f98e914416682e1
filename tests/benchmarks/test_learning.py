"""The learning benchmark asks what it says: answers are in the context and nowhere else, scores are computed right."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.learning import inner_step as sweep  # noqa: E402
from benchmarks.learning import report as reporting  # noqa: E402
from benchmarks.learning.models import MODELS, TOLERANCE, Size, config_of, inner_step, parameters_of  # noqa: E402
from benchmarks.learning.tasks import NO_LABEL, TASKS, Needle, Pairs, Questions, Recall, Text  # noqa: E402
from benchmarks.learning.train import Recipe, Run, means, score_test, train  # noqa: E402
from hope_kernels.models import HopeConfig, HopeOutput  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("task", [Recall(), Needle(), Pairs(), Text()], ids=repr)
def test_batches_depend_on_the_seed_alone_and_stay_in_the_vocabulary(task) -> None:
    ids, labels = task.batch(4, seeded(1))
    again, other = task.batch(4, seeded(1)), task.batch(4, seeded(2))
    assert torch.equal(ids, again[0]) and torch.equal(labels, again[1])
    assert not torch.equal(ids, other[0])
    assert ids.shape == labels.shape == (4, task.length)
    assert ids.min() >= 0 and ids.max() < task.vocab_size and labels[labels != NO_LABEL].max() < task.vocab_size
    first, second = task.tests(), task.tests()
    assert all(
        torch.equal(a.ids, b.ids) and torch.equal(a.labels, b.labels) for a, b in zip(first, second, strict=True)
    )
    for test in first:
        assert all((test.labels[counted] != NO_LABEL).all() and counted.any() for counted in test.conditions.values())


@pytest.mark.parametrize(("count", "length"), [(4, 32), (8, 32), (16, 64)])
def test_in_recall_each_key_is_shown_with_one_value_and_asked_once_for_it(count, length) -> None:
    task = Recall()
    ids, labels = task.sequences(count, length, 8, seeded(3))
    for row, asked in zip(ids.tolist(), labels.tolist(), strict=True):
        shown = dict(zip(row[0 : 2 * count : 2], row[1 : 2 * count : 2], strict=True))
        assert len(shown) == count
        assert all(1 <= key <= task.keys < value < task.vocab_size for key, value in shown.items())
        questions = {row[t]: asked[t] for t in range(length) if asked[t] != NO_LABEL}
        assert questions == shown and sum(label != NO_LABEL for label in asked) == count
        # Behind the pairs there are questions and blanks: no answer is written down.
        assert sorted(row[2 * count :]) == sorted([0] * (length - 3 * count) + list(shown))
        assert all(row[t] and t >= 2 * count for t in range(length) if asked[t] != NO_LABEL)


def test_in_recall_short_gaps_are_frequent_and_values_independent_of_keys() -> None:
    task = Recall()
    ids, labels = task.sequences(4, 48, 500, seeded(4))
    slots = ((labels != NO_LABEL).double().mean(0))[8::2]
    assert slots[0] > 0.7 and slots[0] > 3 * slots[8:].mean() > 0
    pairs = torch.stack([ids[:, 0:8:2].flatten() - 1, ids[:, 1:8:2].flatten() - 1 - task.keys])
    table = torch.zeros(task.keys, task.values).index_put_(tuple(pairs), torch.ones(2000), accumulate=True)
    expected = 2000 / table.numel()
    assert ((table - expected) ** 2 / expected).sum() < table.numel() + 5 * math.sqrt(2 * table.numel())  # chi-squared


@pytest.mark.parametrize("times", [1, 8])
def test_a_needle_is_hidden_once_anywhere_and_asked_once_at_the_end(times) -> None:
    task = Needle()
    length, count = times * task.length, task.needles
    hay = length - 2 * count
    ids, labels = task.sequences(length, 64, seeded(5))
    places = []
    for row, asked in zip(ids.tolist(), labels.tolist(), strict=True):
        hidden = [t for t in range(hay) if row[t] <= task.keys]
        shown = {row[t]: row[t + 1] for t in hidden}
        assert len(hidden) == len(shown) == count
        assert all(task.keys < value <= task.keys + task.values for value in shown.values())
        assert sum(token <= task.keys + task.values for token in row[:hay]) == 2 * count  # all else is straw
        questions = range(hay, length, 2)
        assert {row[t]: row[t + 1] for t in questions} == shown
        assert {t: label for t, label in enumerate(asked) if label != NO_LABEL} == {t: row[t + 1] for t in questions}
        places += hidden
    thirds = [sum(low <= p / hay < low + 1 / 3 for p in places) / len(places) for low in (0, 1 / 3, 2 / 3)]
    assert all(0.25 < share < 0.4 for share in thirds)


def test_a_batch_of_pairs_is_of_one_of_the_two_tasks() -> None:
    task, generator = Pairs(), seeded(6)
    batches = [task.batch(2, generator)[0] for _ in range(60)]
    straw = [bool((ids > task.recall.vocab_size - 1).any()) for ids in batches]
    blank = [bool((ids == 0).any()) for ids in batches]
    assert not any(a and b for a, b in zip(straw, blank, strict=True)) and 15 < sum(straw) < 45


def test_sequences_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="count is 13; want 1 to 12 pairs in 48 tokens"):
        Recall().sequences(13, 48, 1, seeded(0))
    with pytest.raises(ValueError, match="length is 10; want at least"):
        Needle().sequences(10, 1, seeded(0))


def test_text_is_tested_on_held_out_bytes_by_their_place_in_the_window() -> None:
    task = Text()
    train_text, held_out = task._texts
    (test,) = task.tests()
    assert torch.equal(test.ids[:, 1:], test.labels[:, :-1])
    assert torch.equal(test.ids.flatten(), held_out[: test.ids.numel()])
    assert not any(bytes(row[:100].tolist()) in bytes(train_text.tolist()) for row in test.ids)
    parts = [counted for name, counted in test.conditions.items() if name != f"0-{task.length}"]
    assert torch.stack(parts).sum(0).eq(1).all()  # every place in one part
    assert test.conditions["256-512"].nonzero()[:, 1].unique().tolist() == list(range(256, 512))


class Oracle(torch.nn.Module):
    """Says token ``(id + 1) % vocabulary`` with a given probability, all others alike."""

    def __init__(self, vocabulary: int, probability: float) -> None:
        super().__init__()
        self.vocabulary, self.probability = vocabulary, probability

    def forward(self, ids: torch.Tensor) -> HopeOutput:
        rest = (1 - self.probability) / (self.vocabulary - 1)
        p = torch.full((*ids.shape, self.vocabulary), rest).scatter(
            -1, ((ids + 1) % self.vocabulary)[..., None], self.probability
        )
        return HopeOutput(p.log(), None, None)


def test_scores_are_shares_of_right_answers_and_bits() -> None:
    ids = torch.arange(40).view(40, 1).expand(40, 4) % 5  # more rows than are read at a time
    labels = (ids + 1) % 5
    labels = torch.cat([labels[:, :2], (labels[:, 2:3] + 1) % 5, torch.full((40, 1), NO_LABEL)], 1)
    conditions = {"all": labels != NO_LABEL, "wrong": torch.arange(4).expand(40, 4) == 2}
    test, oracle = Questions(ids, labels, conditions), Oracle(5, 0.5)
    assert score_test(oracle, test, "accuracy") == {"all": pytest.approx(2 / 3), "wrong": 0}
    assert score_test(oracle, test, "bits") == {"all": pytest.approx((1 + 1 + 3) / 3), "wrong": pytest.approx(3)}
    assert score_test(Oracle(5, 1.0), test, "bits") == {"all": None, "wrong": None}  # infinitely many bits
    with pytest.raises(ValueError, match="metric is 'f1'; want"):
        score_test(oracle, test, "f1")


def test_models_have_the_same_number_of_parameters_and_the_parts_that_their_names_say() -> None:
    size = Size()
    for task in TASKS.values():
        configs = {name: config_of(name, task().vocab_size, size) for name in MODELS}
        for config in configs.values():
            assert abs(parameters_of(config) - size.parameters) <= TOLERANCE * size.parameters
        assert {name for name, config in configs.items() if config.has_cms} == {"Hope", "Hope-Attention"}
        assert configs["Hope"].mixer == configs["Hope without CMS"].mixer == "titans"
        assert configs["Transformer"].mixer == "attention" and configs["Titans"].mixer == "neural_memory"
    assert inner_step("neural_memory", size) * size.chunk_size < 2 and inner_step("attention", size) is None
    with pytest.raises(ValueError, match="parameters is 1000; no width of Hope"):
        config_of("Hope", 33, Size(parameters=1000))
    with pytest.raises(ValueError, match="model: got 'Mamba'; want one of 'Hope'"):
        config_of("Mamba", 33, size)


@pytest.mark.parametrize("name", MODELS)
def test_a_few_steps_lower_the_loss_of_every_model_and_repeat_exactly(name) -> None:
    task = Pairs(Recall(test_size=4), Needle(test_size=4, times=(1, 2)))
    run = train(name, task, Size(), Recipe(steps=12, batch=8), 3e-3, seed=0)
    assert run.broke_off is None and len(run.losses) == 12
    assert run.losses[0] == pytest.approx(math.log(task.vocab_size), abs=0.2)
    assert run.losses[-1] < run.losses[0] - 0.1
    assert list(run.scores) == ["mqar 4", "mqar 8", "mqar 12", "mqar 16", "needle 1x", "needle 2x"]
    again = train(name, task, Size(), Recipe(steps=12, batch=8), 3e-3, seed=0, test=False)
    assert again.losses == run.losses and again.scores == {}


def test_a_training_that_breaks_off_says_where_and_has_no_scores() -> None:
    run = train("Transformer", Pairs(), Size(), Recipe(steps=4, batch=2, warmup=0), 1e30, seed=0)
    assert run.scores == {}
    assert run.broke_off is not None and run.final_loss is None and len(run.losses) == run.broke_off


def test_the_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    recipe = Recipe(steps=100, batch=1, warmup=0.1)
    rates = [recipe.lr(step, 2.0) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2 and rates[100] == pytest.approx(0.2)
    assert rates[55] == pytest.approx(1.1) and all(a >= b for a, b in itertools.pairwise(rates[10:]))


def made_up(seed: int, score: float, loss: float = 1.0, broke_off: int | None = None) -> Run:
    return Run("Hope", seed, 1e-3, 10, {"a": score, "b": 1 - score}, loss, [2.0, 1.0], 1.0, broke_off, 3.0)


def test_means_spreads_and_the_choice_are_computed_right() -> None:
    runs = [made_up(0, 0.25), made_up(1, 0.5), made_up(2, 0.9)]
    found = reporting.summary(runs)["a"]
    assert found["mean"] == pytest.approx(0.55) and (found["lowest"], found["highest"]) == (0.25, 0.9)
    assert found["deviation"] == pytest.approx(math.sqrt((0.3**2 + 0.05**2 + 0.35**2) / 2))
    assert reporting.summary(runs[:1])["b"]["deviation"] == 0
    assert reporting.summary([*runs, made_up(3, 0.0, broke_off=3)])["a"] == found
    assert reporting.summary([made_up(3, 0.0, broke_off=3)]) == {}
    runs[1].scores["b"] = None
    assert reporting.summary(runs) == {"a": found}
    tries = [made_up(0, 0, 0.5), made_up(1, 0, 0.1, broke_off=3), made_up(2, 0, 0.4), made_up(3, 0, 0.4)]
    assert reporting.best(tries).seed == 2
    with pytest.raises(ArithmeticError, match="all learning rates of Hope broke off"):
        reporting.best(tries[1:2])
    assert means([1.0, 2, 3, 4, 5], 2) == [1.5, 4.0] and means([1.0, 2], 5) == [1, 2] and means([], 5) == []


@pytest.mark.parametrize("task", TASKS)
def test_committed_results_are_whole_and_the_readme_shows_them(task) -> None:
    report = json.loads((RESULTS / f"learning-{task}.json").read_text())
    assert report["task"]["name"] == task and len(report["seeds"]) >= 3 and list(report["models"]) == list(MODELS)
    for entry in report["models"].values():
        assert [run["seed"] for run in entry["runs"]] == report["seeds"]
        assert report["search_seed"] not in report["seeds"]
        assert abs(entry["parameters"] - report["size"]["parameters"]) <= TOLERANCE * report["size"]["parameters"]
        for condition, found in entry["summary"].items():
            scores = [run["scores"][condition] for run in entry["runs"] if run["broke_off"] is None]
            assert found["mean"] == pytest.approx(statistics.fmean(scores))
    readme = (ROOT / "benchmarks" / "learning" / "README.md").read_text()
    shown = re.search(rf"<!-- {task}: begin -->\n(.*?)\n<!-- {task}: end -->", readme, re.DOTALL)
    assert shown is not None and shown[1].strip() == reporting.table(report)
    assert (RESULTS / f"learning-{task}.png").stat().st_size > 10_000


def test_the_sweep_changes_the_bounds_it_names_and_nothing_else() -> None:
    usual = config_of("Hope", 256, sweep.SIZE)
    assert {case.series for case in sweep.CASES} == set(sweep.SERIES)
    for case in sweep.CASES:
        config = case.config(256)
        assert config.lr_max == pytest.approx(0.1 * case.factor)
        bounds = [
            (level.step_bound, wider.step_bound) for level, wider in zip(usual.levels, config.levels, strict=True)
        ]
        levels = case.factor if case.series == "mixer and CMS levels" else 1
        assert all(wider == pytest.approx(levels * bound) for bound, wider in bounds) and bounds[0][0] > 0
        assert (config.weight_norm_max is None) == (case.series == "mixer, initial weights not bounded")
        rest = {"lr_max": None, "weight_norm_max": usual.weight_norm_max, "levels": usual.levels}
        assert replace(config, **rest) == usual
    with pytest.raises(ValueError, match="series: got 'levels'; want one of 'mixer'"):
        sweep.Case("levels", 1.0).config(256)


def test_a_kept_run_is_not_trained_again_and_another_is_refused(tmp_path, monkeypatch) -> None:
    trained = []
    monkeypatch.setattr(sweep, "train", lambda *a, **k: trained.append(k) or made_up(0, 0.5))
    case, recipe = sweep.CASES[0], Recipe(steps=1, batch=1)
    run = sweep.trained(case, 0, Text(), recipe, tmp_path)
    assert run == dataclasses.asdict(made_up(0, 0.5)) == sweep.trained(case, 0, Text(), recipe, tmp_path)
    assert len(trained) == 1 and trained[0]["config"] == case.config(256)
    with pytest.raises(ValueError, match="of another configuration or recipe; want another folder"):
        sweep.trained(case, 0, Text(), Recipe(steps=2, batch=1), tmp_path)
    for again in (sweep.trained(case, 1, Text(), recipe, tmp_path), sweep.trained(case, 0, Text(), recipe, None)):
        assert again == run
    assert len(trained) == 3


def test_a_run_that_breaks_off_is_said_to() -> None:
    config = replace(sweep.CASES[0].config(256), lr_max=1e6, value_norm_max=None, weight_norm_max=None)
    run = dataclasses.asdict(train("Hope", Text(), sweep.SIZE, Recipe(steps=4, batch=1), 1.0, 0, config=config))
    assert run["broke_off"] is not None and sweep.told(run) == f"broke off at step {run['broke_off']}"
    assert sweep.said(run, "0-256") == "broke off"


def test_the_committed_sweep_is_whole_and_the_readme_shows_it() -> None:
    report = json.loads((RESULTS / "inner-step.json").read_text())
    assert [(entry["series"], entry["factor"]) for entry in report["entries"]] == [
        (case.series, case.factor) for case in sweep.CASES
    ]
    for case, entry in zip(sweep.CASES, report["entries"], strict=True):
        assert HopeConfig.from_dict(entry["config"]) == case.config(256)  # what came since has its default
        assert [run["seed"] for run in entry["runs"]] == [*case.seeds(2)]
        assert all(len(run["scores"]) == 5 or run["broke_off"] is not None for run in entry["runs"])
    readme = (ROOT / "benchmarks" / "learning" / "README.md").read_text()
    shown = re.search(r"<!-- inner-step: begin -->\n(.*?)\n<!-- inner-step: end -->", readme, re.DOTALL)
    assert shown is not None and shown[1].strip() == sweep.table(report)
    assert (RESULTS / "inner-step.png").stat().st_size > 10_000


def test_at_the_default_bounds_every_seed_reads_on() -> None:
    report = json.loads((RESULTS / "inner-step.json").read_text())
    (default,) = (e for e in report["entries"] if (e["series"], e["factor"]) == ("mixer", 1))
    assert HopeConfig.from_dict(default["config"]) == replace(config_of("Hope", 256, sweep.SIZE), lr_max=0.1)
    assert all(score is not None for run in default["runs"] for score in run["scores"].values())
