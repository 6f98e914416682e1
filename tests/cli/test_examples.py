"""The examples do what they say."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from hope_kernels import CMS
from hope_kernels.cli.demo_training import load_example

ROOT = Path(__file__).parents[2]


def test_quickstart_prints_differences_at_the_level_of_rounding():
    result = subprocess.run(
        [sys.executable, "examples/quickstart.py"],
        cwd=ROOT,
        env=_environment(),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    differences = [float(number) for number in re.findall(r": ([0-9.e-]+)$", result.stdout, re.MULTILINE)]
    assert len(differences) == 2 and all(difference < 1e-5 for difference in differences)


def _environment() -> dict[str, str]:
    import os

    return os.environ | {"PYTHONPATH": str(ROOT)}


def test_the_held_out_topics_are_apart_from_the_rest():
    from pydoc_data.topics import topics

    example = load_example("byte_transformer")
    train, held_out = (bytes(text.tolist()) for text in example.documentation())
    complete = {name for name, text in topics.items() if text.encode() in held_out}
    assert complete and 0.03 < len(held_out) / (len(train) + len(held_out)) < 0.3
    # Topics repeat one another in whole sections: of what is held out next to nothing may be in the training text.
    passages = {train[start : start + 48] for start in range(len(train))}
    starts = range(len(held_out) - 48)
    assert sum(held_out[start : start + 48] in passages for start in starts) < 0.03 * len(starts)
    # Nothing else is missing there.
    known = {part for name in complete for part in topics[name].split("\n\n")}
    rest = [part for name, text in topics.items() if name not in complete for part in text.split("\n\n")]
    assert all(part.encode() in train for part in rest if part not in known)


def test_a_model_that_knows_nothing_needs_eight_bits_per_byte():
    example = load_example("byte_transformer")
    model = example.ByteTransformer(dim=32, depth=1, context=16)
    nn.init.zeros_(model.head.weight)
    text = torch.randint(256, (200,), generator=torch.Generator().manual_seed(0))
    assert math.isclose(example.bits_per_byte(model, text), 8.0, rel_tol=1e-6)


def test_one_line_puts_cms_layers_in_the_place_of_the_mlps_and_leaves_the_rest():
    example = load_example("byte_transformer")
    plain, cms = example.build(False, seed=1, dim=32), example.build(True, seed=1, dim=32)
    assert all(isinstance(block.mlp, CMS) for block in cms.blocks)
    rest = {name: value for name, value in plain.state_dict().items() if ".mlp." not in name}
    assert rest and all(torch.equal(cms.state_dict()[name], value) for name, value in rest.items())


def test_no_byte_is_seen_before_it_is_predicted():
    example = load_example("byte_transformer")
    model = example.build(True, dim=32, depth=1, context=96).eval()
    text = torch.randint(256, (1, 96), generator=torch.Generator().manual_seed(0))
    changed = text.clone()
    changed[0, 70] = (changed[0, 70] + 1) % 256
    with torch.no_grad():
        before, after = model(text), model(changed)
    assert torch.equal(before[:, :70], after[:, :70])
    assert not torch.equal(before[:, 70:], after[:, 70:])
