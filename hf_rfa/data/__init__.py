"""From documents to batches of token ids."""

from hf_rfa.data.document_batches import Batch, carried_batches, packed_batches
from hf_rfa.data.documents import (
    Document,
    TokenStream,
    check_tokenizer,
    load_documents,
    stream_documents,
    tokenize_documents,
)
from hf_rfa.data.sampled_rows import sampled_rows
from hf_rfa.data.sequences import evaluation_windows, training_batches

__all__ = [
    "Batch",
    "Document",
    "TokenStream",
    "carried_batches",
    "check_tokenizer",
    "evaluation_windows",
    "load_documents",
    "packed_batches",
    "sampled_rows",
    "stream_documents",
    "tokenize_documents",
    "training_batches",
]
