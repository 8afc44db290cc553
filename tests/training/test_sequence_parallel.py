"""A document split over processes gives what one process gives; documents cut in time, what the whole one gives."""

import copy
import itertools
import json

import paths
import pytest
import torch
import torch.nn.functional as F
from families import CACHE, checkpoint_activations, llama
from operator_inputs import random_inputs
from operator_states import assert_equal_states
from processes import launch

import hf_rfa
from hf_rfa import rfa_attention
from hf_rfa.data.document_batches import IGNORED, Batch, carried_batches, packed_batches
from hf_rfa.errors import ConfigError, UnsupportedModelError
from hf_rfa.ops.state import RFAState
from hf_rfa.training import FinetuneConfig, finetune
from hf_rfa.training.carry import Carry, without_rows
from hf_rfa.training.sequence_parallel import sequence_parallel, shard_batch

WORKER = str(paths.TESTS / "worker_sequence_parallel.py")


@pytest.mark.multi_process
@pytest.mark.parametrize(
    ("processes", "feature_map", "heads", "checkpointing"),
    [
        (2, "positive", [], "no"),
        (4, "trigonometric", [[0, 1]], "yes"),
        (4, "hyperbolic", [[0, 1], [1, 0], [1, 1]], "no"),
    ],
)
def test_forward_and_gradients_are_those_of_one_process(tmp_path, processes, feature_map, heads, checkpointing):
    result = tmp_path / "errors.json"
    launch([WORKER, str(result), feature_map, json.dumps(heads), checkpointing], processes)
    errors = json.loads(result.read_text())
    assert len(errors) > 10
    assert max(errors) < 1e-5


def test_shares_cover_the_document_once():
    ids = torch.arange(11)[None]
    shares = [shard_batch(ids, rank, 4) for rank in range(4)]
    assert torch.cat([s.position_ids for s in shares], 1).tolist() == [list(range(12))]
    targets = torch.cat([s.targets for s in shares], 1)[0]
    assert targets.tolist() == [*range(1, 11), IGNORED, IGNORED]


def test_what_cannot_be_split_is_refused(tiny_llama):
    with pytest.raises(ConfigError, match="one whole document per row"):
        shard_batch(next(packed_batches([torch.arange(20)], context=8, batch_size=1)), 0, 2)
    with pytest.raises(UnsupportedModelError, match="not converted"), sequence_parallel(tiny_llama, None):
        pass
    pure = hf_rfa.convert(tiny_llama, hf_rfa.RFAConfig(window=0, sink_tokens=0), calibrate=False)
    with pytest.raises(ConfigError, match="exact window"), sequence_parallel(pure, None):
        pass
    keeping = hf_rfa.convert(llama(), hf_rfa.RFAConfig(window=8, kept_keys=4), calibrate=False)
    with (
        pytest.raises(ConfigError, match=r"Which far keys are kept .* Got kept_keys=4"),
        sequence_parallel(keeping, None),
    ):
        pass
    with pytest.raises(ConfigError, match="`sequence_parallel` must divide the 1 processes"):
        finetune(
            pure,
            iter([torch.ones(1, 64, dtype=torch.long)]),
            FinetuneConfig(steps=1, sequence_parallel=2, progress=False),
        )


# --- cut documents: the state is carried ----------------------------------------------------------------------------


def losses_of(model, batches, lanes=1) -> list[torch.Tensor]:
    """Loss of each position of each batch, (batch, seq)."""
    carries, found = [Carry() for _ in range(lanes)], []
    for number, batch in enumerate(batches):
        cache = carries[number % lanes].start(batch)
        logits = model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, **{CACHE: cache}, use_cache=True
        ).logits
        nll = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="none")
        found.append(nll.view_as(batch.targets))
    return found


@pytest.mark.parametrize("kept_keys", [0, 5])
@pytest.mark.parametrize("heads", [[], [(0, 1), (1, 0)]])
def test_pieces_with_the_state_carried_give_the_losses_of_whole_documents(tiny_llama, heads, kept_keys):
    config = hf_rfa.RFAConfig(num_features=8, window=8, sink_tokens=2, softmax_heads=heads, kept_keys=kept_keys)
    model = hf_rfa.convert(tiny_llama, config, calibrate=False)
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(128, (n,), generator=generator) for n in (90, 37, 61)]
    batches = list(itertools.islice(carried_batches(documents, context=16, batch_size=2), 12))
    expected = {}
    with torch.no_grad():
        for ids in documents:
            expected[tuple(ids[:4].tolist())] = F.cross_entropy(
                model(input_ids=ids[None], use_cache=False).logits[0, :-1], ids[1:], reduction="none"
            )
        found = losses_of(model, batches)
    for row in range(2):
        for nll, batch in zip(found, batches, strict=True):
            if batch.fresh[row]:
                whole = expected[tuple(batch.input_ids[row, :4].tolist())]
            counted = batch.targets[row] != IGNORED
            place = batch.position_ids[row][counted]
            torch.testing.assert_close(nll[row][counted], whole[place], rtol=1e-4, atol=1e-4)


def test_a_row_that_begins_anew_is_empty():
    inputs, options = random_inputs(40), {"window": 4, "kept_keys": 5}
    _, state = rfa_attention(**inputs, **options, output_final_state=True)
    fresh = without_rows(state, torch.tensor([False, True]))
    old, new = (fresh.select_rows(torch.tensor([row])) for row in (0, 1))
    assert_equal_states(new, RFAState.empty(1, inputs["key"], inputs["value"], 16, 4, 4, 5, 2), 0.0)
    assert_equal_states(old, state.select_rows(torch.tensor([0])), 0.0)
    assert bool((new.log_max == -torch.inf).all())


@pytest.mark.parametrize("kept_keys", [0, 5])
def test_no_gradient_reaches_an_earlier_piece_and_memory_stays(tiny_llama, kept_keys):
    config = hf_rfa.RFAConfig(num_features=8, window=8, sink_tokens=2, softmax_heads=[], kept_keys=kept_keys)
    model = hf_rfa.convert(tiny_llama, config, calibrate=False).train()
    carry, sizes = Carry(), []
    walk = carried_batches([torch.arange(400) % 128], context=16, batch_size=1)
    for number, batch in enumerate(itertools.islice(walk, 20)):
        cache = carry.start(batch)
        for layer in cache.layers:
            assert layer.state is None or not any(t.requires_grad for t in layer.state._tensors().values())
        model(input_ids=batch.input_ids, position_ids=batch.position_ids, **{CACHE: cache}).logits.sum().backward()
        sizes.append(hf_rfa.cache_bytes(cache))
        assert number == 0 or sizes[-1] == sizes[0]


@pytest.mark.parametrize("kept_keys", [0, 5])
def test_carried_training_resumes_in_the_middle_of_a_document(tiny_llama, tmp_path, kept_keys):
    config = hf_rfa.RFAConfig(num_features=8, window=8, sink_tokens=2, softmax_heads=[(0, 0)], kept_keys=kept_keys)
    model = hf_rfa.convert(tiny_llama, config, calibrate=False)
    documents = [torch.arange(n) % 128 for n in (90, 150)]

    def batches(count=None):
        return itertools.islice(carried_batches(documents, context=16, batch_size=1, lanes=2), count)

    options = {"steps": 8, "batches_per_step": 2, "learning_rate": 1e-2, "progress": False}
    whole = finetune(copy.deepcopy(model), batches(), FinetuneConfig(**options))
    with pytest.raises(ConfigError, match="ended after 5 of 8"):
        finetune(copy.deepcopy(model), batches(10), FinetuneConfig(output=tmp_path, save_every=3, **options))
    resumed = finetune(copy.deepcopy(model), batches(), FinetuneConfig(output=tmp_path, resume=True, **options))
    assert resumed.losses == whole.losses
    without = [Batch(b.input_ids, b.targets, fresh=torch.ones_like(b.fresh)) for b in batches(16)]
    assert (
        finetune(copy.deepcopy(model), without, FinetuneConfig(**options)).losses[3:] != whole.losses[3:]
    )  # the state matters


def test_carrying_what_cannot_be_carried_is_refused(tiny_llama):
    walk = carried_batches([torch.arange(90)], context=16, batch_size=1)
    with pytest.raises(UnsupportedModelError, match="not converted"):
        finetune(tiny_llama, walk, FinetuneConfig(steps=1, progress=False))
    hf_rfa.convert(tiny_llama, hf_rfa.RFAConfig(resample=2), calibrate=False)
    with pytest.raises(ConfigError, match="one draw of omega"):
        finetune(tiny_llama, walk, FinetuneConfig(steps=1, progress=False))
    hf_rfa.revert(tiny_llama)
    hf_rfa.convert(tiny_llama, hf_rfa.RFAConfig(), calibrate=False)
    checkpoint_activations(tiny_llama, use_reentrant=False)
    with pytest.raises(ConfigError, match="activation checkpointing"):
        finetune(tiny_llama, walk, FinetuneConfig(steps=1, progress=False))
