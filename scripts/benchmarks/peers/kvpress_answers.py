"""Answer the prompts of prompts.py by an original whose cache the presses of kvpress make smaller after each document.

    python -m venv KVPRESS && KVPRESS/bin/pip install -r scripts/benchmarks/peers/requirements-kvpress.txt
    KVPRESS/bin/python scripts/benchmarks/peers/kvpress_answers.py --prompts prompts.json --model MODEL
        --output kvpress.json [--presses StreamingLLM SnapKV] [--shares 0.1 0.25 0.5] [--device cuda]

This file runs in that environment and imports nothing of hf_rfa. A document is read once with full attention; then
each press makes a cache of its own of the full one, before any question is known. Questions and continuations are read
through these caches, uncompressed, at the positions that they would have behind the whole document. Presses have the
settings of their package. DuoAttention has patterns for a few models only: here its heads are scored by kvpress's own
experimental function for other models, on texts of the training split instead of BookSum.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from kvpress import DuoAttentionPress, ExpectedAttentionPress, KeyDiffPress, KnormPress, SnapKVPress, StreamingLLMPress
from kvpress.presses import duo_attention_press
from transformers import AutoModelForCausalLM, DynamicCache

SCORING = {
    "StreamingLLM": StreamingLLMPress,
    "SnapKV": SnapKVPress,
    "ExpectedAttention": ExpectedAttentionPress,
    "Knorm": KnormPress,
    "KeyDiff": KeyDiffPress,
}
DUO = "DuoAttention"
#: Sinks and recent tokens of DuoAttention's streaming heads, kvpress's numbers where it scores heads itself.
DUO_SINKS, DUO_RECENT = 128, 256


class Texts:
    """Stands for the data set that kvpress's scoring of heads loads."""

    def __init__(self, texts):
        self.texts = texts

    def to_pandas(self):
        return self

    def sample(self, number, random_state):
        return {"chapter": self}

    def tolist(self):
        return self.texts


class Cache:
    """The keys and values of every layer that one press left, and for DuoAttention which of them are masked."""

    def __init__(self):
        self.layers, self.masked = [], []

    def length(self):
        return self.layers[0][0].shape[2]


class Reader:
    """Reads documents with a model, and asks what its presses have kept of them."""

    def __init__(self, model, presses, scores):
        self.model, self.presses, self.scores = model, presses, scores
        self.attentions = [layer.self_attn for layer in model.model.layers]
        for attention in self.attentions:
            attention.rotary_emb = model.model.rotary_emb  # as kvpress's own context manager does

    def read(self, ids):
        """{column: cache} after a document: the full one under None, and that of each (press, share)."""
        self.number, ids = len(ids), torch.tensor([ids], device=self.model.device)
        caches = {name: Cache() for name in (None, *self.presses) if self.press(name) is not False}
        hooks = [each.register_forward_hook(self._keep(caches), with_kwargs=True) for each in self.attentions]
        try:
            self.model.model(input_ids=ids, past_key_values=DynamicCache())
        finally:
            for hook in hooks:
                hook.remove()
        return caches

    def press(self, column):
        """The press of a column, None for the full cache, False where the share cannot be reached at this length."""
        if column is None:
            return None
        name, share = column
        if name in SCORING:
            return SCORING[name](compression_ratio=1 - share)
        if self.number <= DUO_SINKS + DUO_RECENT:
            return False
        heads = (1 - share) / (1 - (DUO_SINKS + DUO_RECENT) / self.number)
        if heads > 1:
            return False
        press = DuoAttentionPress(head_compression_ratio=heads)
        press.sink_size, press.recent_size = DUO_SINKS, DUO_RECENT
        chosen = self.scores.flatten().argsort()[: round(self.scores.numel() * heads)]
        press.streaming_mask = torch.zeros(self.scores.numel(), dtype=torch.bool)
        press.streaming_mask[chosen] = True
        press.streaming_mask = press.streaming_mask.view(self.scores.shape).to(self.model.device)
        return press

    def _keep(self, caches):
        presses = {column: self.press(column) for column in caches}

        def hook(module, _, kwargs, output):
            layer = kwargs["past_key_values"].layers[module.layer_idx]
            for column, press in presses.items():
                pair, module.masked_key_indices = (layer.keys, layer.values), None
                if press is not None:
                    pair = press.compress(module, kwargs["hidden_states"], *pair, output[1], kwargs)
                caches[column].layers.append(pair)
                caches[column].masked.append(module.masked_key_indices)
            module.masked_key_indices = None

        return hook

    def share(self, column, cache):
        """Share of the full cache's bytes; DuoAttention is counted as if its masked keys were not held."""
        masked = sum(len(each[0]) for each in cache.masked if each is not None)
        keys = sum(key.shape[1] * key.shape[2] for key, _ in cache.layers)
        heads = sum(key.shape[1] for key, _ in cache.layers)
        return (keys - masked) / (heads * self.number)

    def go_on(self, caches):
        """A callable that reads tokens (B, n) of all of these caches, which have one length, and gives logits."""
        joined = DynamicCache()
        for number in range(len(self.attentions)):
            pairs = [cache.layers[number] for cache in caches]
            # New tensors: DuoAttention writes into the keys that it masks.
            joined.update(*(torch.cat(each) for each in zip(*pairs, strict=True)), number)
        seen = self.number

        def step(ids, last=0):
            nonlocal seen
            for attention, masked in zip(self.attentions, caches[0].masked, strict=True):
                attention.masked_key_indices = masked
            places = torch.arange(seen, seen + ids.shape[1], device=ids.device).expand(len(ids), -1)
            logits = self.model(input_ids=ids, past_key_values=joined, position_ids=places, logits_to_keep=last).logits
            for attention in self.attentions:
                attention.masked_key_indices = None
            seen += ids.shape[1]
            return logits

        return step

    def answers(self, caches, question):
        """Greedy token ids of each cache, up to the end-of-sequence token."""
        end = self.model.generation_config.eos_token_id
        stop = set(end if isinstance(end, list) else [] if end is None else [end])
        step, answers = self.go_on(caches), [[] for _ in caches]
        ids = torch.tensor([question["ids"]], device=self.model.device).expand(len(caches), -1)
        open_ = set(range(len(caches)))
        for _ in range(question["new_tokens"]):
            ids = step(ids, last=1)[:, -1].argmax(-1, keepdim=True)
            for number in list(open_):
                token = int(ids[number])
                if token in stop:
                    open_.remove(number)
                else:
                    answers[number].append(token)
            if not open_:
                break
        return answers


def together(caches):
    """Columns whose caches can be read at once: of one length, and not masked."""
    groups = {}
    for column, cache in caches.items():
        alone = column if any(each is not None for each in cache.masked) else None
        groups.setdefault((cache.length(), alone), []).append(column)
    return groups.values()


def head_scores(model, texts):
    """Scores (layers, key heads) by kvpress's function for models without a pattern; high ones stay whole."""
    if not texts:
        raise SystemExit("DuoAttention scores heads on texts. The prompts have none. Write them with --texts 4.")
    duo_attention_press.load_dataset = lambda *_, **__: Texts(texts)
    return torch.as_tensor(duo_attention_press.duo_attention_on_the_fly(model, num_samples=len(texts))).cpu()


def column_name(column):
    return "full cache" if column is None else f"{column[0]} at {100 * column[1]:g} %"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, help="file that prompts.py wrote")
    parser.add_argument("--model", required=True, help="folder or hub id of the original")
    parser.add_argument("--output", type=Path, required=True, help="file of the answers, JSON")
    parser.add_argument("--presses", nargs="+", choices=[*SCORING, DUO], default=[*SCORING, DUO])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.1, 0.25, 0.5], help="shares that are kept")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--full-cache", action=argparse.BooleanOptionalAction, default=True,
        help="a column of the full cache, too; needed once where several runs share the presses out",
    )  # fmt: skip
    given = parser.parse_args()
    prompts = json.loads(given.prompts.read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval().to(given.device)
    started = time.process_time()
    columns = [None, *((name, share) for name in given.presses for share in given.shares)]
    found = {column: {"shares": [], "kl": [], "answers": []} for column in columns}
    with torch.no_grad():
        scores = head_scores(model, prompts["texts"]) if DUO in given.presses else None
        reader = Reader(model, columns[1:], scores)
        for number, each in enumerate(prompts["continuations"]):
            measure_continuation(reader, each, found)
            print(f"continuation {number + 1} of {len(prompts['continuations'])}", flush=True)
        for number, each in enumerate(prompts["documents"]):
            measure_document(reader, each, found)
            print(
                f"document {number + 1} of {len(prompts['documents'])}, {time.process_time() - started:.0f} CPU s",
                flush=True,
            )
    if not given.full_cache:
        del found[None]
    written = {
        "environment": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "kvpress": version(),
            "device": given.device,
        },
        "cpu_seconds": time.process_time() - started,
        "columns": {column_name(column): summary(each) for column, each in found.items()},
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(written), encoding="utf-8")


def measure_continuation(reader, given, found):
    """KL(full cache || press) over the tokens of the continuation, nats/token, and the shares of the bytes."""
    caches = reader.read(given["ids"])
    ids = torch.tensor([given["continuation"]], device=reader.model.device)
    log_p = reader.go_on([caches[None]])(ids)[0].float().log_softmax(-1)
    for column in found:
        if column not in caches:
            found[column]["kl"].append(None)
            continue
        # One after the other: the logits of all would take more memory than the caches.
        log_q = log_p if column is None else reader.go_on([caches[column]])(ids)[0].float().log_softmax(-1)
        found[column]["kl"].append(F.kl_div(log_q, log_p, reduction="batchmean", log_target=True).item())
        found[column]["shares"].append(reader.share(column, caches[column]))


def measure_document(reader, given, found):
    caches = reader.read(given["ids"])
    answers = {column: [] for column in caches}
    for question in given["questions"]:
        for group in together(caches):
            for column, answer in zip(group, reader.answers([caches[c] for c in group], question), strict=True):
                answers[column].append(answer)
    for column in found:
        found[column]["answers"].append(answers.get(column))
        if column in caches:
            found[column]["shares"].append(reader.share(column, caches[column]))


def summary(found):
    """`kl` and `answers` have None where a press cannot keep so little of a document."""
    shares = found.pop("shares")
    return {"share": sum(shares) / len(shares) if shares else None, **found}


def version():
    from importlib.metadata import version as installed

    return installed("kvpress")


if __name__ == "__main__":
    main()
