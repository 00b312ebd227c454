"""The path carries signal: a model that was taught a needle task solves it through lm-eval."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from repo_jax import init_params, save_pretrained
from repo_jax.config import DecoderConfig, OptimizerConfig, PositionConfig, TrainingConfig
from repo_jax.data import Tokenizer
from repo_jax.evaluation import command
from repo_jax.modeling import RePoLM
from repo_jax.training.step import create_state, make_train_step

WORDS = [f"w{i}" for i in range(12)]
VALUES = [f"v{i}" for i in range(10)]
VOCAB = ["<eos>", "needle", "ask", *WORDS, *VALUES]
LENGTH = 16

TASK = """
task: recall
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/recall.json"}}}}
output_type: generate_until
test_split: test
doc_to_text: prompt
doc_to_target: value
generation_kwargs: {{until: [" "], max_gen_toks: 1, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


def texts(rng, n):
    """n prompts in which a needle hides among words, and the values to recall."""
    prompts, values = [], rng.choice(VALUES, n)
    for value in values:
        words = list(rng.choice(WORDS, LENGTH - 4))
        at = rng.integers(len(words) + 1)
        prompts.append(" ".join([*words[:at], "needle", value, *words[at:], "ask"]))
    return prompts, values


def save_tokenizer(folder):
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(VOCAB)}, unk_token="<eos>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    Tokenizer(backend, 0).save(folder)


def train(model, steps):
    """The model after so many batches of the task."""
    training = TrainingConfig(steps=steps)
    params = init_params(model, jax.random.key(0))
    optimizer, step = make_train_step(model, OptimizerConfig(learning_rate=5e-3), training, params)
    state, step = create_state(params, optimizer, 0), jax.jit(step, donate_argnums=0)
    rng, ids = np.random.default_rng(0), {word: i for i, word in enumerate(VOCAB)}
    for _ in range(steps):
        prompts, values = texts(rng, 64)
        rows = [[ids[w] for w in f"{p} {v}".split()] for p, v in zip(prompts, values, strict=True)]
        state, _ = step(state, {"tokens": jnp.array(rows)})
    return state.params


def test_a_model_that_was_taught_to_find_needles_finds_them(tmp_path):
    config = DecoderConfig(
        vocab_size=64,
        d_model=64,
        n_layers=2,
        n_heads=4,
        d_ff=128,
        max_length=32,
        rope_theta=1e4,
        positions=PositionConfig(preset="repo"),
        eos_ids=(0,),
    )
    model = RePoLM(config)
    tokenizer, own = tmp_path / "tokenizer", tmp_path / "own"
    save_tokenizer(tokenizer)
    own.mkdir()
    n = 100
    prompts, values = texts(np.random.default_rng(1), n)
    rows = [{"prompt": p, "value": v} for p, v in zip(prompts, values, strict=True)]
    (own / "recall.json").write_text("\n".join(map(json.dumps, rows)))
    (own / "recall.yaml").write_text(TASK.format(folder=own))
    found = {}
    for name, params in (
        ("untrained", init_params(model, jax.random.key(0))),
        ("trained", train(model, 200)),
    ):
        save_pretrained(tmp_path / name, model, params, tokenizer_dir=tokenizer)
        output = tmp_path / f"{name}-results"
        command.main(
            [
                *("--model", str(tmp_path / name), "--tasks", "recall"),
                *("--tasks_dir", str(own), "--output", str(output)),
            ]
        )
        report = json.loads((output / "evaluation" / "tasks.json").read_text())
        found[name] = report["tasks"]["recall"]
    # One of ten values is right by chance, and 5 standard deviations of 100 draws are far above.
    chance = 1 / len(VALUES)
    bound = chance + 5 * math.sqrt(chance * (1 - chance) / n)
    assert found["trained"]["score"] > bound
    assert found["trained"]["low"] > found["trained"]["constant"]
    assert found["untrained"]["score"] <= bound
