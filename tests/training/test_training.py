"""The fine-tuning loop: it learns, resumes exactly where it was, and stops loudly."""

import copy
import functools
import itertools

import pytest
import torch
from accelerate.tracking import GeneralTracker
from tqdm import tqdm

import hf_rfa
from hf_rfa.errors import CheckpointError, ConfigError
from hf_rfa.training import finetune


def batches(count: int | None = None, seed: int = 0):
    """Always the same batches (2, 24): counting from a random start, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randint(128, (2, 1), generator=generator) + torch.arange(24) for _ in itertools.count())
    return itertools.islice((batch % 128 for batch in drawn), count)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(model, expected):
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, msg=name)


class Recorder:
    """A hook that keeps every step's weights and can be saved."""

    def __init__(self):
        self.seen, self.count = [], 0

    def step(self, model):
        self.count += 1
        self.seen.append(weights(model))

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_the_first_step_is_adamw_on_the_mean_next_token_loss(tiny_llama):
    by_hand = copy.deepcopy(tiny_llama).train()
    ids = next(batches())
    logits = by_hand(ids).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
    torch.optim.AdamW(by_hand.parameters(), lr=1e-2, weight_decay=0.1).step()

    done = finetune(
        tiny_llama,
        batches(),
        steps=1,
        learning_rate=1e-2,
        weight_decay=0.1,
        warmup_steps=0,
        max_grad_norm=0.5,
        progress=False,
    )
    assert done.losses == pytest.approx([loss.item()], rel=1e-5)
    assert (done.step, done.tokens) == (1, 48)
    for (name, parameter), expected in zip(tiny_llama.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_converted_model_learns_and_keeps_its_mode(tiny_llama, schedule):
    hf_rfa.convert(tiny_llama, hf_rfa.RFAConfig(num_features=8, window=8, sink_tokens=1), calibrate=False)
    done = finetune(tiny_llama, batches(), steps=30, learning_rate=1e-2, schedule=schedule, progress=False)
    assert done.losses[-1] < done.losses[0] - 0.5
    assert done.tokens_per_second > 0
    assert not tiny_llama.training


def test_frozen_parameters_stay(tiny_llama):
    tiny_llama.model.embed_tokens.requires_grad_(False)
    before = weights(tiny_llama)
    finetune(tiny_llama, batches(), steps=2, progress=False)
    after = tiny_llama.state_dict()
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])


def test_bfloat16_autocast_leaves_the_weights_in_float32(tiny_llama):
    plain = copy.deepcopy(tiny_llama)
    losses = finetune(tiny_llama, batches(), steps=2, mixed_precision="bf16", progress=False).losses
    expected = finetune(plain, batches(), steps=2, progress=False).losses
    assert losses == pytest.approx(expected, rel=2e-2)
    assert losses != expected
    assert {p.dtype for p in tiny_llama.parameters()} == {torch.float32}
    assert tiny_llama(next(batches())).logits.dtype == torch.float32  # nothing is left wrapped


def test_a_run_that_crashed_resumes_to_the_same_weights(tiny_llama, tmp_path):
    whole = copy.deepcopy(tiny_llama)
    expected = finetune(whole, batches(), steps=7, progress=False)

    crashing = copy.deepcopy(tiny_llama)
    with pytest.raises(ConfigError, match="ended after 5 of 7 steps"):
        finetune(crashing, batches(5), steps=7, output=tmp_path, save_every=2, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    (tmp_path / "checkpoint-6.partial").mkdir()  # what a run leaves that is killed while it saves

    done = finetune(tiny_llama, batches(), steps=7, output=tmp_path, save_every=2, resume=True, progress=False)
    assert done.losses == expected.losses
    assert done.tokens == expected.tokens
    assert_same_weights(tiny_llama, weights(whole))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7"]


def test_hooks_see_each_step_and_are_saved_with_the_run(tiny_llama, tmp_path):
    hook = Recorder()
    finetune(tiny_llama, batches(), steps=3, output=tmp_path, hooks=[hook], progress=False)
    assert hook.count == 3
    assert_same_weights(tiny_llama, hook.seen[-1])
    resumed = Recorder()
    finetune(tiny_llama, batches(), steps=5, output=tmp_path, resume=True, hooks=[resumed], progress=False)
    assert (resumed.count, len(resumed.seen)) == (5, 2)


def test_the_draw_of_omega_is_resumed(tiny_llama, tmp_path):
    config = hf_rfa.RFAConfig(num_features=8, window=8, sink_tokens=1, resample=2)
    whole, first, second = (hf_rfa.convert(copy.deepcopy(tiny_llama), config, calibrate=False) for _ in range(3))
    expected = finetune(whole, batches(), steps=5, hooks=[hf_rfa.ResampleCallback()], progress=False)

    run = {"output": tmp_path, "save_every": 3, "progress": False}
    with pytest.raises(ConfigError, match="ended after 4"):
        finetune(first, batches(4), steps=5, hooks=[hf_rfa.ResampleCallback()], **run)
    done = finetune(second, batches(), steps=5, resume=True, hooks=[hf_rfa.ResampleCallback()], **run)
    assert done.losses == expected.losses
    assert_same_weights(second, weights(whole))
    assert hf_rfa.resample(second) == 3  # two draws after the first, at steps 2 and 4


def test_a_loss_that_is_no_number_stops_at_its_step(tiny_llama, tmp_path):
    class Breaker:
        calls = 0

        def step(self, model):
            self.calls += 1
            if self.calls == 2:
                model.lm_head.weight.data[0] = torch.nan

    with pytest.raises(FloatingPointError, match="nan at step 3"):
        finetune(tiny_llama, batches(), steps=5, output=tmp_path, save_every=1, hooks=[Breaker()], progress=False)
    assert not tiny_llama.training
    assert (tmp_path / "checkpoint-2").is_dir()


def test_a_broken_checkpoint_says_what_to_do(tiny_llama, tmp_path):
    finetune(tiny_llama, batches(), steps=2, output=tmp_path, progress=False)
    with pytest.raises(CheckpointError, match="has 2 steps, more than `steps`=1"):
        finetune(tiny_llama, batches(), steps=1, output=tmp_path, resume=True, progress=False)
    (tmp_path / "checkpoint-2" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="Cannot resume from checkpoint-2"):
        finetune(tiny_llama, batches(), steps=3, output=tmp_path, resume=True, progress=False)


def test_resume_without_a_checkpoint_starts_at_the_beginning(tiny_llama, tmp_path):
    assert finetune(tiny_llama, batches(), steps=1, output=tmp_path, resume=True, progress=False).step == 1


def test_progress_shows_loss_and_speed(tiny_llama, capsys, monkeypatch):
    monkeypatch.setattr(
        "hf_rfa.training.loop.tqdm", functools.partial(tqdm, mininterval=0)
    )  # every step, however fast
    finetune(tiny_llama, batches(), steps=2, description="learning")
    shown = capsys.readouterr().err
    assert "learning" in shown
    assert "loss=" in shown
    assert "tokens_per_s=" in shown


class Log(GeneralTracker):
    """A tracker of Accelerate that keeps what it gets."""

    name, requires_logging_directory = "log", False

    def __init__(self):
        super().__init__()
        self.rows, self.finished = [], False

    @property
    def tracker(self):
        return self.rows

    def store_init_configuration(self, values):
        pass

    def log(self, values, step, **kwargs):
        self.rows.append((step, values))

    def finish(self):
        self.finished = True


def test_trackers_get_every_step_and_every_evaluation(tiny_llama, tmp_path):
    log = Log()
    evaluations = iter([1.5, 2.5])
    done = finetune(
        tiny_llama, batches(), steps=4, warmup_steps=0, learning_rate=1e-3, output=tmp_path, trackers=[log],
        evaluate=lambda _: {"perplexity": next(evaluations)}, evaluate_every=2, progress=False,
    )  # fmt: skip
    losses = [(step, values["loss"]) for step, values in log.rows if "loss" in values]
    assert losses == list(enumerate(done.losses, start=1))
    assert [(step, values) for step, values in log.rows if "loss" not in values] == [
        (2, {"perplexity": 1.5}), (4, {"perplexity": 2.5}),
    ]  # fmt: skip
    last = log.rows[-2][1]
    assert last["tokens"] == done.tokens == 4 * 48
    assert last["tokens/s"] > 0
    assert last["learning_rate"] == pytest.approx(0, abs=1e-9)  # the end of the cosine
    assert log.finished
    with pytest.raises(ConfigError, match="Set `output`"):
        finetune(tiny_llama, batches(), steps=1, trackers=["tensorboard"], progress=False)


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_trackers_by_name(tiny_llama, tmp_path, monkeypatch, name):
    pytest.importorskip(name)
    for variable, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", tmp_path), ("TRACKIO_DIR", tmp_path)):
        monkeypatch.setenv(variable, str(value))
    assert finetune(tiny_llama, batches(), steps=1, output=tmp_path, trackers=[name], progress=False).step == 1
    assert len(list(tmp_path.rglob("*"))) > 4  # more than the checkpoint's folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "`steps`"),
        ({"save_every": 0}, "`save_every`"),
        ({"learning_rate": -1.0}, "`learning_rate`"),
        ({"schedule": "linear"}, "`schedule`"),
        ({"mixed_precision": "fp8"}, "`mixed_precision`"),
        ({"resume": True}, "Set `output`"),
    ],
)
def test_arguments_out_of_range(tiny_llama, arguments, message):
    with pytest.raises(ConfigError, match=message):
        finetune(tiny_llama, batches(), **{"steps": 1, "progress": False, **arguments})


def test_a_model_with_nothing_to_train(tiny_llama):
    tiny_llama.requires_grad_(False)
    with pytest.raises(ConfigError, match="Unfreeze"):
        finetune(tiny_llama, batches(), steps=1, progress=False)


def test_a_model_with_exact_heads_trains_under_autocast(tiny_llama):
    config = hf_rfa.RFAConfig(num_features=8, window=8, sink_tokens=1, softmax_heads=[(1, 0)])
    plain = hf_rfa.convert(copy.deepcopy(tiny_llama), config, calibrate=False)
    losses = finetune(
        hf_rfa.convert(tiny_llama, config, calibrate=False), batches(), steps=2, mixed_precision="bf16", progress=False
    )
    expected = finetune(plain, batches(), steps=2, progress=False)
    assert losses.losses == pytest.approx(expected.losses, rel=2e-2)
