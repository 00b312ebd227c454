"""`python -m repo_jax.tokenize`: text to a folder of tokens to train on."""

from collections.abc import Sequence

from repo_jax import cli
from repo_jax.config import DataConfig
from repo_jax.data import Corpus, build_corpus


def main(arguments: Sequence[str] | None = None) -> None:
    """Tokenises, then says what was written and how to train on it."""
    options = vars(_parser().parse_args(arguments))
    out = options.pop("out")
    _report(build_corpus(DataConfig(**options), out))


def run() -> None:
    """The console script."""
    cli.run(main)


def _parser() -> cli.Parser:
    defaults = DataConfig()
    parser = cli.Parser(prog="tokenize", description="Tokenises text into a folder.")
    parser.add_argument(
        "--text",
        nargs="+",
        required=True,
        help="files, folders or globs of plain text or JSON lines, or python-stdlib",
    )
    parser.add_argument("--out", required=True, help="the folder to write; new or empty")
    parser.add_argument(
        "--tokenizer",
        default=defaults.tokenizer,
        help="bytes, bpe:N, or a tokenizer.json or a folder that has one",
    )
    parser.add_argument(
        "--validation_fraction",
        type=float,
        default=defaults.validation_fraction,
        help="of the documents, to validate on",
    )
    parser.add_argument(
        "--text_suffixes",
        nargs="+",
        default=list(defaults.text_suffixes),
        help="which files of a folder are read",
    )
    parser.add_argument(
        "--text_field", default=defaults.text_field, help="of a JSON line, which has the text"
    )
    parser.add_argument(
        "--eos_id",
        type=int,
        help="the id that ends a document, for a tokenizer.json that does not tell",
    )
    return parser


def _report(corpus: Corpus) -> None:
    manifest = corpus.manifest
    for name in ("train", "validation"):
        split = getattr(manifest, name)
        print(
            f"{corpus.folder / name}.bin: {split.tokens:,} tokens of {manifest.dtype}, "
            f"{split.documents:,} documents, {split.utf8_bytes:,} bytes of text"
        )
    print(f"vocabulary: {manifest.vocab_size} entries; documents end with {manifest.eos_id}")
    print(
        "train on it with: repo-train --config CONFIG "
        f"--data.tokens {corpus.folder} --model.vocab_size {manifest.vocab_size}"
    )


if __name__ == "__main__":
    run()
