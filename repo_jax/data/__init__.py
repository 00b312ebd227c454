"""Text and token files to batches.

`open_data` is what training and evaluation call; the parts serve on their own.
"""

from repo_jax.data.batches import TrainingBatches, ValidationBatches, segment_ids, trim_tokens
from repo_jax.data.build import build_corpus, cached_corpus
from repo_jax.data.corpus import Corpus, Manifest, open_corpus
from repo_jax.data.mixture import Mixture
from repo_jax.data.object_store import StoredTokens
from repo_jax.data.repetition import repeats
from repo_jax.data.sources import Data, check_vocabulary, open_data, open_text
from repo_jax.data.text import Document, find_files, read_documents
from repo_jax.data.token_files import TokenWriter, check_ids, open_tokens
from repo_jax.data.tokenizers import Tokenizer, byte_tokenizer, train_bpe

__all__ = [
    "Corpus",
    "Data",
    "Document",
    "Manifest",
    "Mixture",
    "StoredTokens",
    "TokenWriter",
    "Tokenizer",
    "TrainingBatches",
    "ValidationBatches",
    "build_corpus",
    "byte_tokenizer",
    "cached_corpus",
    "check_ids",
    "check_vocabulary",
    "find_files",
    "open_corpus",
    "open_data",
    "open_text",
    "open_tokens",
    "read_documents",
    "repeats",
    "segment_ids",
    "train_bpe",
    "trim_tokens",
]
