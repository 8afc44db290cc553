"""The adapter: draws of omega, their schedules in training, what a state dict brings back, what is counted."""

import copy
import hashlib
import os
import subprocess
import sys

import paths
import pytest
import torch
from conversions import adapters, converted
from families import CACHE, PEFT_ASKS, build, inputs_for, lora, outputs_of, token_ids
from torch.testing import assert_close
from trainers import Texts, arguments, losses
from transformers import Trainer

import hf_rfa
from hf_rfa import ConfigError, ResampleCallback
from hf_rfa.runtime.arguments import cache_of


def omegas(model):
    return [adapter.omega.clone() for adapter in adapters(model)]


def draws(model):
    """The draw of every layer, from the tensor that is saved and from what a cache is told."""
    numbers = {int(adapter.draw) for adapter in adapters(model)}
    assert numbers == {adapter.draw_number for adapter in adapters(model)}
    assert len(numbers) == 1
    return numbers.pop()


def same(one, two):
    return [torch.equal(a, b) for a, b in zip(one, two, strict=True)]


# --- draws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["orthogonal", "gaussian"])
def test_omega_differs_by_layer_and_key_head_and_seed(kind):
    one, other = omegas(converted(omega=kind)), omegas(converted(omega=kind, seed=1))
    assert [tuple(omega.shape) for omega in one] == [(2, 16, 8), (2, 16, 8)]  # key heads, not query heads
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one[0][0], one[0][1])
    assert same(one, other) == [False, False]
    assert same(one, omegas(converted(omega=kind))) == [True, True]


def test_omega_does_not_depend_on_the_global_random_state_or_the_layers_chosen():
    torch.manual_seed(1)
    one = omegas(converted())
    torch.manual_seed(2)
    two = omegas(converted(layers=[1]))
    assert same(one, two) == [True, True]


def test_resample_changes_every_layer_and_counts():
    model = converted()
    seen = [omegas(model)]
    for number in (1, 2, 3):
        assert hf_rfa.resample(model) == number
        assert draws(model) == number
        assert not any(any(same(omegas(model), before)) for before in seen)
        seen.append(omegas(model))


def test_a_draw_is_a_function_of_its_number():
    one, two = converted(), converted()
    for _ in range(3):
        hf_rfa.resample(one)
    assert hf_rfa.resample(two, draw=3) == 3
    assert same(omegas(one), omegas(two)) == [True, True]
    hf_rfa.resample(two, draw=3)
    assert same(omegas(one), omegas(two)) == [True, True]
    hf_rfa.resample(two, draw=0)
    assert same(omegas(converted()), omegas(two)) == [True, True]
    assert torch.equal(outputs_of(two, inputs_for(two)), outputs_of(converted(), inputs_for(two)))


@pytest.mark.parametrize("draw", [-1, 1.0, "2", True])
def test_a_draw_is_a_non_negative_integer(draw):
    model = converted()
    before = omegas(model)
    with pytest.raises(ConfigError, match="draw"):
        hf_rfa.resample(model, draw=draw)
    assert all(same(before, omegas(model)))


def test_the_outputs_follow_the_draw_and_nothing_else_does():
    model = converted(softmax_heads=[(0, 1)])
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = outputs_of(model, inputs_for(model))
    hf_rfa.resample(model)
    assert not torch.equal(outputs_of(model, inputs_for(model)), before)
    changed = {name.rpartition(".")[2] for name, t in model.state_dict().items() if not torch.equal(t, state[name])}
    assert changed == {"omega", "draw"}


def test_the_adapter_follows_the_model_to_another_dtype_and_is_redrawn_there():
    model = converted()
    model.bfloat16()
    hf_rfa.resample(model)
    twin = converted()
    hf_rfa.resample(twin)
    assert same(omegas(model), omegas(twin)) == [True, True]


PROGRAM = """
import hashlib, sys
sys.path[:0] = [{tests!r}, {root!r}]
import torch
torch.manual_seed({seed})
torch.rand({seed})
import hf_rfa
from families import SHORT, attention_modules, build
model = hf_rfa.convert(build("llama"), SHORT)
for _ in range(3):
    hf_rfa.resample(model)
print(hashlib.sha256(b"".join(m.rfa.omega.numpy().tobytes() for m in attention_modules(model))).hexdigest())
"""


@pytest.mark.multi_process
def test_two_processes_see_the_same_draw():
    """Whatever their own random state, threads and hash seed are."""
    tests = paths.TESTS
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(tests=str(tests), root=str(tests.parent), seed=seed)],
            env={**os.environ, "PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": str(seed)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in (1, 2)
    ]
    hashes = [process.communicate(timeout=400)[0].strip() for process in running]
    model = converted()
    hf_rfa.resample(model, draw=3)
    here = hashlib.sha256(b"".join(omega.numpy().tobytes() for omega in omegas(model))).hexdigest()
    assert hashes == [here, here]


# --- schedules -------------------------------------------------------------------------------------------------------


def train_steps(model, steps, callback=None, seed=0):
    """A plain loop; the loss of each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    model.train()
    losses = []
    for step in range(steps):
        ids = token_ids(2, 40, seed=100 * seed + step)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if callback is not None:
            callback.step(model)
    model.eval()
    return losses


@pytest.mark.parametrize(("resample", "draw"), [("never", 0), (1, 5), (2, 2), (3, 1), (7, 0)])
def test_the_callback_in_a_plain_loop(resample, draw):
    model = converted(resample=resample)
    train_steps(model, 5, ResampleCallback())
    assert draws(model) == draw


def test_the_callback_says_when_it_redrew():
    model, callback = converted(resample=2), ResampleCallback()
    assert [callback.step(model) for _ in range(5)] == [False, True, False, True, False]


def test_the_callbacks_count_is_saved_and_restored():
    model, callback = converted(resample=3), ResampleCallback()
    train_steps(model, 4, callback)
    again = ResampleCallback()
    again.load_state_dict(callback.state_dict())
    assert [again.step(model) for _ in range(3)] == [False, True, False]


def test_forward_redraws_once_a_training_forward_and_never_else():
    model, ids = converted(resample="forward"), token_ids()
    outputs_of(model, inputs_for(model))
    model(ids)  # evaluation mode with gradients
    model.generate(ids, max_new_tokens=3)
    assert draws(model) == 0
    model.train()
    with torch.no_grad():
        model(ids)
    assert draws(model) == 0
    losses = [model(ids, labels=ids).loss.item() for _ in range(3)]
    assert draws(model) == 3
    assert len(set(losses)) == 3
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert draws(model) == 3


def test_forward_redraws_for_gradient_accumulation_too():
    """Every micro-batch is a training forward of its own."""
    model, ids = converted(resample="forward").train(), token_ids()
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
    assert draws(model) == 2


@PEFT_ASKS
def test_forward_redraws_in_a_lora_too():
    model = converted(resample="forward")
    wrapped = lora(model).train()
    wrapped(input_ids=token_ids()).logits.sum().backward()
    assert draws(model) == 1


def test_forward_in_an_encoder_decoder_counts_the_whole_model_once():
    model = converted("bart", resample="forward").train()
    model(**inputs_for(model))
    assert draws(model) == 1


def trainer(model, folder, steps, callbacks=None):
    schedule = {"max_steps": steps, "save_steps": 3, "save_strategy": "steps", "lr_scheduler_type": "constant"}
    if callbacks is None:
        callbacks = [ResampleCallback()]
    return Trainer(model=model, args=arguments(folder, **schedule), train_dataset=Texts(16), callbacks=callbacks)


def test_the_callback_in_a_trainer(tmp_path):
    model = converted(resample=2)
    trainer(model, tmp_path / "with", 5).train()
    assert draws(model) == 2
    still = converted(resample=2)
    trainer(still, tmp_path / "without", 5, callbacks=[]).train()
    assert draws(still) == 0


@pytest.mark.parametrize(("resample", "at_3", "at_6"), [(2, 1, 3), ("forward", 3, 6), ("never", 0, 0)])
def test_a_resumed_trainer_run_is_the_uninterrupted_run(resample, at_3, at_6, tmp_path):
    whole = converted(resample=resample)
    run = trainer(whole, tmp_path / "whole", 6)
    run.train()
    assert draws(whole) == at_6

    cut = converted(resample=resample)
    trainer(cut, tmp_path / "cut", 3).train()
    assert draws(cut) == at_3

    # A new process would convert again: its draw is 0 until the checkpoint is loaded.
    resumed = converted(resample=resample)
    again = trainer(resumed, tmp_path / "cut", 6)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert draws(resumed) == at_6
    assert same(omegas(resumed), omegas(whole)) == [True, True]
    assert losses(again)[-3:] == losses(run)[-3:]
    assert torch.equal(outputs_of(resumed.eval(), inputs_for(resumed)), outputs_of(whole.eval(), inputs_for(whole)))


def test_a_trainers_checkpoint_loads_as_a_converted_model(tmp_path):
    model = converted(resample=2)
    trainer(model, tmp_path, 3).train()
    loaded = hf_rfa.from_pretrained(tmp_path / "checkpoint-3")
    assert draws(loaded) == 1
    assert torch.equal(outputs_of(loaded, inputs_for(model)), outputs_of(model.eval(), inputs_for(model)))


# --- state dicts -----------------------------------------------------------------------------------------------------


def changed_by_hand():
    """A model whose adapters differ from a fresh conversion in everything that is saved."""
    model = converted()
    hf_rfa.resample(model, draw=5)
    hf_rfa.set_softmax_heads(model, [(1, 0)])
    for adapter in adapters(model):
        adapter.omega += 0.1
        adapter.alpha.copy_(torch.tensor([0.5, 0.75]))
        adapter.gamma.copy_(torch.tensor([0.0, 2.0]))
    return model


def test_load_state_dict_brings_everything_back():
    model, fresh = changed_by_hand(), converted()
    inputs = inputs_for(model)
    assert not torch.equal(outputs_of(fresh, inputs), outputs_of(model, inputs))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(outputs_of(fresh, inputs), outputs_of(model, inputs))
    assert draws(fresh) == 5
    assert [adapter.softmax_heads for adapter in adapters(fresh)] == [(), (0,)]
    assert hf_rfa.resample(fresh) == 6


def test_the_state_dict_of_a_converted_model_does_not_fit_an_unconverted_one():
    with pytest.raises(RuntimeError, match="rfa"):
        build("llama").load_state_dict(converted().state_dict())


def test_alpha_and_gamma_are_read_in_every_forward():
    model = converted()
    inputs = inputs_for(model)
    before = outputs_of(model, inputs)
    for adapter in adapters(model):
        adapter.gamma.zero_()
    window_only = outputs_of(model, inputs)
    assert not torch.equal(window_only, before)
    hf_rfa.resample(model)
    assert torch.equal(outputs_of(model, inputs), window_only)  # without a far part omega says nothing


def test_window_only_sees_the_window_and_the_sinks_alone():
    model = converted("llama", gamma=0.0, layers=[0])
    ids = token_ids(1)
    other = ids.clone()
    other[:, 2:40] = token_ids(1, 38, seed=9)  # neither a sink nor in the chunks of tokens 48 to 69

    def first_layer(ids):
        with torch.no_grad():
            return model(ids, output_hidden_states=True, use_cache=False).hidden_states[1]

    assert_close(first_layer(ids)[:, 48:], first_layer(other)[:, 48:], atol=1e-6, rtol=0)
    assert (first_layer(ids) - first_layer(other))[:, 40:48].abs().max() > 1e-3


# --- statistics ------------------------------------------------------------------------------------------------------


def test_far_statistics_count_the_dropped_estimates_of_the_trigonometric_map():
    model = converted(feature_map="trigonometric", alpha=1.0, num_features=4)
    assert list(hf_rfa.far_statistics(model)) == [0, 1]
    outputs_of(model, inputs_for(model))
    assert any(0 < share < 1 for share in hf_rfa.far_statistics(model).values())


@pytest.mark.parametrize("window", [0, 8])
def test_tempering_makes_fewer_estimates_negative(window):
    shares = []
    for alpha in (1.5, 0.1):
        model = converted(feature_map="trigonometric", alpha=alpha, num_features=8, window=window)
        outputs_of(model, inputs_for(model))
        shares.append(sum(hf_rfa.far_statistics(model).values()))
    assert shares[0] > shares[1]


@pytest.mark.parametrize("feature_map", ["positive", "hyperbolic", "optimal_positive"])
def test_the_positive_maps_drop_nothing(feature_map):
    model = converted(feature_map=feature_map, alpha=1.0, num_features=4)
    outputs_of(model, inputs_for(model))
    assert hf_rfa.far_statistics(model) == {0: 0.0, 1: 0.0}


def test_far_statistics_are_counted_in_cached_forwards_too():
    model = converted(feature_map="trigonometric", alpha=1.0, num_features=4)
    outputs_of(model, {"input_ids": token_ids(), "use_cache": False})
    whole = hf_rfa.far_statistics(model)
    twin = converted(feature_map="trigonometric", alpha=1.0, num_features=4)
    with torch.no_grad():
        cache = cache_of(twin(token_ids()[:, :31], use_cache=True))
        for token in range(31, 70):
            twin(token_ids()[:, token : token + 1], **{CACHE: cache})
    assert hf_rfa.far_statistics(twin) == pytest.approx(whole, abs=0.02)


def test_layers_that_stay_softmax_have_no_statistics():
    assert list(hf_rfa.far_statistics(converted("gemma3"))) == [1]


# --- what it says of itself ------------------------------------------------------------------------------------------


def test_a_printed_model_says_what_was_done():
    model = converted(softmax_heads=[(1, 0)])
    hf_rfa.resample(model)
    text = repr(model)
    assert "hyperbolic, num_features=16, window=8, key_heads=2, draw=1)" in text
    assert "draw=1, softmax_heads=[0])" in text


def test_a_copy_of_an_adapter_redraws_alone():
    adapter = adapters(converted())[0]
    twin = copy.deepcopy(adapter)
    twin.redraw(4)
    assert (adapter.draw_number, twin.draw_number) == (0, 4)
    assert not torch.equal(adapter.omega, twin.omega)


# --- the far kernel as one object ------------------------------------------------------------------------------------

WRITERS = {
    "set_kernel": lambda adapter: adapter.set_kernel(adapter.feature_maps, gamma=adapter.gamma / 2),
    "set_softmax_heads": lambda adapter: adapter.set_softmax_heads((1,)),
    "redraw": lambda adapter: adapter.redraw(3),
    "learn": lambda adapter: adapter.learn(),
    "load_state_dict": lambda adapter: adapter.load_state_dict(adapter.state_dict()),
    "to": lambda adapter: adapter.to(torch.bfloat16),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_kernel_is_one_object_until_a_method_writes_its_tensors(write):
    model = converted()
    adapter = adapters(model)[0]
    before = adapter.kernel
    outputs_of(model, inputs_for(model))
    assert adapter.kernel is adapter.kernel_of(None) is adapter.kernel_of(adapter.draw_number) is before
    write(adapter)
    after = adapter.kernel
    assert after is adapter.kernel
    assert after != before
    assert all(tensor is getattr(adapter, name) for name, tensor in after.tensors().items())


def test_the_kernel_of_another_draw_is_one_of_its_own():
    adapter = adapters(converted())[0]
    other = adapter.kernel_of(5)
    assert torch.equal(other.omega, adapter.drawn(5))
    assert adapter.kernel.omega is adapter.omega
    assert other.gamma is adapter.gamma


def test_gradients_reach_learned_tensors_and_what_stands_in_for_them():
    """`functional_call` puts other tensors into the adapter's places for one call, behind the back of its methods."""
    model = converted(omega="learned")
    inputs = {**inputs_for(model), "use_cache": False}
    given = {name: 0.9 * p.detach() for name, p in model.named_parameters()}
    leaves = {name: tensor.requires_grad_() for name, tensor in given.items() if name.endswith("rfa.omega")}
    model(**inputs)
    got = torch.func.functional_call(model, given, kwargs=inputs).logits
    copied = copy.deepcopy(model)
    gradients = torch.autograd.grad(got.square().sum(), list(leaves.values()))
    copied.load_state_dict(given, strict=False)
    want = copied(**inputs).logits
    assert_close(got, want)
    want.square().sum().backward()
    for name, gradient in zip(leaves, gradients, strict=True):
        assert gradient.any()
        assert_close(gradient, copied.get_parameter(name).grad)
    assert not any(p.grad is not None for p in model.parameters())


def test_a_copy_has_a_kernel_of_its_own():
    model = converted(omega="learned")
    for adapter, copied in zip(adapters(model), adapters(copy.deepcopy(model)), strict=True):
        assert copied.kernel is not adapter.kernel
        assert copied.kernel.omega is copied.omega is not adapter.omega
