"""What trains a Hope model of transformers gets the loss it asked for, of whole or of sharded parameters."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.integrations.hope_support import TIGHT, gradients, make, transformers
from tests.integrations.support import in_a_process_group
from tests.models.common import VOCABULARY, ids_of


def test_label_smoothing_is_of_the_next_token(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed (hope_kernels[integrations])")
    model, hope = make()
    ids = ids_of(2, 9)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to=[]
    )
    trainer = transformers.Trainer(model=model, args=arguments)
    found = trainer.compute_loss(model, {"input_ids": ids, "labels": ids.clone()})
    want = F.cross_entropy(hope(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(found.double(), want, rtol=1e-6, atol=1e-6)


def test_labels_are_looked_at_and_none_are_a_loss_of_0():
    model, _ = make("attention")
    ids = ids_of(2, 5)
    want = model(ids, labels=ids).loss
    for dtype in (torch.int32, torch.uint8):
        assert torch.equal(model(ids, labels=ids.to(dtype)).loss, want)
    with pytest.raises(TypeError, match="labels is a list; want an integer tensor"):
        model(ids, labels=[1])
    with pytest.raises(ValueError, match=r"labels is torch.int64 of shape \(2, 4\); want integers of shape \(2, 5\)"):
        model(ids, labels=ids[:, 1:])
    with pytest.raises(ValueError, match=r"labels is torch.float64 of shape \(2, 5\)"):
        model(ids, labels=ids.double())
    with pytest.raises(ValueError, match="labels has ids from 11 to 11; want 0 to 10, or -100"):
        model(ids, labels=torch.full((2, 5), VOCABULARY))
    none = model(ids, labels=torch.full((2, 5), -100)).loss
    assert none == 0 and not any(gradient.any() for gradient in gradients(model, none).values())


def sharded_blocks_train() -> None:
    from torch.distributed.fsdp import fully_shard

    model, _ = make()
    ids = ids_of(2, 9)
    loss = model(ids, labels=ids, use_cache=False).loss
    want = gradients(model, loss)
    shards = [part for part in model.modules() if type(part).__name__ in model._no_split_modules]
    assert len(shards) == model.config.depth
    for part in (*shards, model):
        fully_shard(part)
    found = model.train()(ids, labels=ids).loss
    torch.testing.assert_close(found, loss, **TIGHT)
    for name, gradient in gradients(model, found).items():
        torch.testing.assert_close(gradient.full_tensor(), want[name], **TIGHT, msg=name)
    with pytest.raises(ValueError, match="the parameters are sharded, and states refer to whole ones; want use_cache"):
        model(ids, use_cache=True)
    written = model.eval().generate(ids, do_sample=False, max_new_tokens=3, use_cache=False)
    assert written.shape == (2, 12)


def test_a_model_whose_blocks_are_sharded_trains_as_a_whole_one():
    in_a_process_group(sharded_blocks_train)
