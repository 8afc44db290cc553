"""The loss that never holds all logits, the KL to the original, and folders that cannot take a checkpoint."""

import copy

import pytest
import torch
import torch.nn.functional as F

import hf_rfa
from hf_rfa.data.document_batches import IGNORED, Batch, packed_batches
from hf_rfa.errors import CheckpointError, ConfigError
from hf_rfa.training import finetune
from hf_rfa.training.loss import LossModule


def ids_of(length: int = 40) -> torch.Tensor:
    return torch.randint(128, (2, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("with_kl", [False, True])
def test_fused_and_plain_loss_have_the_value_and_gradients_of_the_definition(tiny_llama, with_kl):
    teacher = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(2.0)
    batch = Batch.of(ids_of())
    logits = tiny_llama(batch.input_ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, batch.input_ids[:, 1:].flatten(), reduction="sum")
    if with_kl:
        with torch.no_grad():
            original = teacher(batch.input_ids, use_cache=False).logits[:, :-1].flatten(0, 1).log_softmax(-1)
        expected = expected + 0.5 * F.kl_div(logits.log_softmax(-1), original, reduction="sum", log_target=True)
    expected.backward()
    gradients = [p.grad.clone() for p in tiny_llama.parameters()]
    extra = {"kl_weight": 0.5, "teacher": teacher} if with_kl else {}
    for fused in (False, True):
        tiny_llama.zero_grad()
        loss = LossModule(tiny_llama, fused=fused, **extra)(batch.input_ids, batch.targets, use_cache=False)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-3)
        loss.backward()
        for parameter, gradient in zip(tiny_llama.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("heads", [[], [(0, 1), (1, 0)]])
def test_nothing_leaks_from_one_packed_document_to_the_next(tiny_llama, heads):
    config = hf_rfa.RFAConfig(num_features=8, window=8, sink_tokens=2, softmax_heads=heads)
    model = hf_rfa.convert(tiny_llama, config, calibrate=False)
    documents = [ids_of(30)[0], ids_of(90)[1]]
    losses = []
    for first in (documents[0], documents[0].flip(0)):
        batch = next(packed_batches(iter([first, documents[1]]), context=120, batch_size=1))
        targets = batch.targets.clone()
        targets[:, :30] = IGNORED
        losses.append(
            LossModule(model, fused=True)(batch.input_ids, targets, position_ids=batch.position_ids, use_cache=False)
        )
    alone = Batch.of(documents[1][None])
    losses.append(LossModule(model, fused=True)(alone.input_ids, alone.targets, use_cache=False))
    assert losses[0] == losses[1]
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-5, atol=1e-4)


def test_before_torch_2_13_the_fused_loss_is_made_in_blocks(tiny_llama, monkeypatch):
    batch = Batch.of(ids_of(1200))  # more than two blocks
    values = []
    for has in (True, False):
        if not has:
            monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
        tiny_llama.zero_grad()
        loss = LossModule(tiny_llama, fused=True)(batch.input_ids, batch.targets, use_cache=False)
        loss.backward()
        values.append([loss.detach(), *(p.grad.clone() for p in tiny_llama.parameters())])
    for found, expected in zip(*values, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_a_model_that_scales_its_logits_is_not_trained_on_the_wrong_loss(tiny_llama):
    forward = tiny_llama.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = 3 * output.logits
        return output

    tiny_llama.forward = scaled
    with pytest.raises(ConfigError, match="Set `fused_loss=False`"):
        finetune(tiny_llama, [ids_of()], steps=1, fused_loss=True, progress=False)


def test_a_folder_that_cannot_be_written_is_named_before_the_first_step(tiny_llama, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Cannot write checkpoints"):
        finetune(tiny_llama, [ids_of()], steps=1, output=tmp_path / "file" / "run", progress=False)
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("hf_rfa.training.checkpoint.shutil.disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match="0 MiB left"):
        finetune(tiny_llama, [ids_of()], steps=1, output=tmp_path / "run", progress=False)


def test_a_disk_that_fills_up_leaves_the_checkpoint_before(tiny_llama, tmp_path, monkeypatch):
    finetune(tiny_llama, [ids_of()], steps=1, output=tmp_path, progress=False)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("accelerate.Accelerator.save_state", full)
    with pytest.raises(CheckpointError, match=r"Could not save step 2 .* checkpoint-1 is whole"):
        finetune(tiny_llama, [ids_of()] * 2, steps=2, output=tmp_path, resume=True, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


class Breaker:
    """Breaks the model after the first step."""

    def step(self, model):
        model.lm_head.weight.data[0] = torch.nan


def test_a_loss_that_is_no_number_names_step_batch_and_last_checkpoint(tiny_llama, tmp_path):
    with pytest.raises(FloatingPointError, match=r"The loss is nan at step 2, in batch 2 \(.*checkpoint-1\."):
        finetune(
            tiny_llama, [ids_of()] * 4, steps=2, batches_per_step=2, output=tmp_path, save_every=1, hooks=[Breaker()],
            progress=False,
        )  # fmt: skip


def test_a_gradient_that_is_no_number_leaves_the_weights_of_the_step_before(tiny_llama, tmp_path):
    calls = []

    def broken(gradient):
        calls.append(1)
        return gradient * torch.nan if len(calls) == 3 else gradient

    tiny_llama.model.norm.weight.register_hook(broken)
    after_one = copy.deepcopy(tiny_llama.state_dict())

    class Keep:
        def step(self, model):
            after_one.update(copy.deepcopy(model.state_dict()))

    with pytest.raises(
        FloatingPointError, match=r"norm is nan at step 2, in one of the batches 2 to 3 .*checkpoint-1"
    ):
        finetune(
            tiny_llama, [ids_of()] * 4, steps=2, batches_per_step=2, output=tmp_path, save_every=1, hooks=[Keep()],
            progress=False,
        )  # fmt: skip
    assert len(calls) == 4
    assert all(torch.equal(tensor, after_one[name]) for name, tensor in tiny_llama.state_dict().items())
    assert all(p.grad is None for p in tiny_llama.parameters())
