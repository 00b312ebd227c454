"""Tokens per second of a training step: repo-jax (rope, repo) and transformers' OLMo 2.

    python -m benchmarks.train_step --torch_python /path/to/python-with-torch

Contenders, each with new weights and the same batch of random tokens, float32, on the same
CPUs: repo-jax with preset rope; repo-jax with preset repo; Olmo2ForCausalLM of Hugging Face
transformers in PyTorch eager (SDPA attention, fused AdamW). A step is forward, backward,
clipping to norm 1 and AdamW, all of it and no more: state advances, nothing is logged, data
are in memory. Rounds alternate; see harness.py for that and for the intervals.

Limits:
* One machine, one size. Speed ratios of other sizes, and of other CPUs, differ.
* CPU only; says nothing of a GPU or TPU.
* PyTorch eager is what transformers runs by default; torch.compile may be faster. Both sides
  use the system's malloc.
* Our step does a little more: z-loss, six metrics, a learning-rate schedule.
* Compilation is not counted; the JSON has the seconds of our first steps.
* Same batch in every step: speed does not depend on which tokens, learning does.
"""

import statistics

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from repo_jax.config import DecoderConfig, OptimizerConfig, PositionConfig, TrainingConfig
from repo_jax.modeling import RePoLM, init_params
from repo_jax.training.step import create_state, make_train_step

OPTIMIZER = OptimizerConfig()
TRAINING = TrainingConfig()
ROPE, REPO, OLMO2 = "repo-jax rope", "repo-jax repo", "transformers olmo2"
# (name in the JSON, what it says, whose seconds, over whose seconds)
PAIRS = (
    ("rope_over_transformers", "tokens/s, repo-jax rope / transformers", OLMO2, ROPE),
    ("repo_over_transformers", "tokens/s, repo-jax repo / transformers", OLMO2, REPO),
    ("repo_step_time_over_rope", "step time, repo-jax repo / repo-jax rope", REPO, ROPE),
)


def add_model_options(p) -> None:
    p.add_argument("--d_model", type=int, default=512)
    p.add_argument("--d_ff", type=int, default=1408)
    p.add_argument("--n_layers", type=int, default=8)
    p.add_argument("--n_heads", type=int, default=8)
    p.add_argument("--vocab_size", type=int, default=8192)


def options():
    p = harness.parser(__doc__.splitlines()[0])
    add_model_options(p)
    p.add_argument("--batch_size", type=int, default=2)
    p.add_argument("--length", type=int, default=1024, help="tokens in a row of the batch")
    return p


def model_config(args, preset: str) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=args.vocab_size,
        d_model=args.d_model,
        n_layers=args.n_layers,
        n_heads=args.n_heads,
        d_ff=args.d_ff,
        max_length=args.length,
        positions=PositionConfig(preset=preset),
    )


def ours(args, preset: str, tokens: np.ndarray) -> tuple[harness.Contender, int]:
    """The contender, and its number of parameters."""
    model = RePoLM(model_config(args, preset))
    params = init_params(model, jax.random.key(args.seed))
    count = sum(p.size for p in jax.tree.leaves(params))
    optimizer, step = make_train_step(model, OPTIMIZER, TRAINING, params)
    step = jax.jit(step, donate_argnums=0)
    batch = {"tokens": jnp.asarray(tokens)}
    state = create_state(params, optimizer, args.seed)
    del params  # donated with the state

    def run():
        nonlocal state
        state, _ = step(state, batch)
        return state.params

    return harness.jax_contender(run), count


def transformers_config(c: DecoderConfig) -> dict:
    """The same model, for Olmo2Config."""
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_ff,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "max_position_embeddings": c.max_length,
        "rope_theta": c.rope_theta,
        "rms_norm_eps": c.norm_eps,
        "initializer_range": c.init_std,
    }


def theirs(args, tokens: np.ndarray) -> harness.Torch:
    c = model_config(args, "rope")
    setup = {
        "kind": "train_step",
        "seed": args.seed,
        "tokens": tokens.tolist(),
        "model": transformers_config(c),
        "optimizer": {
            name: getattr(OPTIMIZER, name)
            for name in ("learning_rate", "b1", "b2", "eps", "weight_decay", "clip_norm")
        },
    }
    return harness.Torch(args, setup)


def main():
    args = options().parse_args()
    path = harness.prepare(args, "train_step")
    shape = (args.batch_size, args.length)
    tokens = np.random.default_rng(args.seed).integers(args.vocab_size, size=shape, dtype=np.int32)
    # torch first: what it lacks is said before anything is compiled
    torch = None if args.no_torch else theirs(args, tokens)
    contenders, parameters = {}, {}
    for name, preset in ((ROPE, "rope"), (REPO, "repo")):
        contenders[name], parameters[name] = ours(args, preset, tokens)
    if torch:
        contenders[OLMO2] = torch.contender("train_step")
        parameters[OLMO2] = torch.about["parameters"]
    print("parameters:", ", ".join(f"{k} {v:,}" for k, v in parameters.items()))
    if torch:
        if not torch.about["is_causal"]:
            raise SystemExit(f"{OLMO2} does not run SDPA's causal path; see torch_worker.py")
        if parameters[ROPE] != parameters[OLMO2]:
            raise SystemExit(f"{ROPE} and {OLMO2} differ in size: not the same model")
        print(f"{ROPE} and {OLMO2} have the same number of parameters")

    times, first = harness.measure(contenders, args)
    if torch:
        torch.close()
    speed = {
        name: args.batch_size * args.length / statistics.median(t) for name, t in times.items()
    }
    ratios = {
        key: harness.compare(times[a], times[b], args.seed)
        for key, _, a, b in PAIRS
        if a in times and b in times
    }
    sizes = (
        f"D {args.d_model}, F {args.d_ff}, {args.n_layers} layers, {args.n_heads} heads, "
        f"V {args.vocab_size}, B {args.batch_size}, T {args.length}, float32"
    )
    lines = [
        *(f"{sizes}; median over rounds.", ""),
        *harness.table(
            ("contender", "parameters", "tokens/s", "seconds a step"),
            (
                f"{name} | {parameters[name]:,} | {speed[name]:,.0f} | "
                f"{statistics.median(times[name]):.4f}"
                for name in times
            ),
        ),
        *harness.table(
            ("ratio", "median", "95 % interval"),
            (f"{what} | {harness.show(ratios[k])}" for k, what, _, _ in PAIRS if k in ratios),
        ),
    ]
    data = {
        "parameters": parameters,
        "tokens_per_second": speed,
        "ratios": ratios,
        "first_step_seconds": {name: first[name] for name in (ROPE, REPO)},
        "step_seconds": times,
    }
    harness.report(path, "Training step", lines, data, args, torch)


if __name__ == "__main__":
    main()
