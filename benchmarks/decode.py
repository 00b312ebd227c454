"""Seconds to continue prompts: repo-jax (rope, repo) and transformers' OLMo 2.

    python -m benchmarks.decode --torch_python /path/to/python-with-torch

Contenders, with random weights and prompts, float32, greedy, on the same CPUs: repo-jax with
preset rope; repo-jax with preset repo; `generate` of Olmo2ForCausalLM of Hugging Face
transformers in PyTorch eager with its key/value cache. A call is from prompts on the host to
continuations on the host. Each is called for one new token, too, which is the prompt's part; what
a round's two calls differ by is decoding. Rounds alternate; see harness.py for that and for the
intervals.

Limits:
* One machine, one size. CPU only; says nothing of a GPU or TPU.
* Decoding at batch 1 reads every weight for each token, so it measures memory more than arithmetic.
* Compilation is not counted.
"""

import statistics

import jax
import numpy as np

from benchmarks import harness
from benchmarks.train_step import (
    OLMO2,
    REPO,
    ROPE,
    add_model_options,
    model_config,
    transformers_config,
)
from repo_jax.inference import Generator
from repo_jax.modeling import RePoLM, init_params

BATCHES = (1, 8)
PAIRS = (
    ("rope_over_transformers", "tokens/s, repo-jax rope / transformers", OLMO2, ROPE),
    ("repo_over_transformers", "tokens/s, repo-jax repo / transformers", OLMO2, REPO),
    ("repo_time_over_rope", "time, repo-jax repo / repo-jax rope", REPO, ROPE),
)


def options():
    p = harness.parser(__doc__.splitlines()[0])
    add_model_options(p)
    p.add_argument("--length", type=int, default=256, help="tokens of a prompt")
    p.add_argument("--new_tokens", type=int, default=64)
    return p


def main():
    args = options().parse_args()
    if args.new_tokens < 2:
        raise SystemExit(f"--new_tokens is {args.new_tokens}; it must be 2 or above")
    path = harness.prepare(args, "decode")
    rng = np.random.default_rng(args.seed)
    prompts = {n: rng.integers(args.vocab_size, size=(n, args.length)).tolist() for n in BATCHES}
    cases = [(n, new) for n in BATCHES for new in (1, args.new_tokens)]
    torch = None
    if not args.no_torch:
        model = transformers_config(model_config(args, "rope"))
        setup = dict(kind="decode", seed=args.seed, model=model, new_tokens=[1, args.new_tokens])
        torch = harness.Torch(args, setup | {"prompts": list(prompts.values())})
        if torch.about["new_tokens"] != [1, args.new_tokens]:
            raise SystemExit(f"{OLMO2} gave {torch.about['new_tokens']} tokens")

    contenders, parameters = {}, {}
    for name, preset in ((ROPE, "rope"), (REPO, "repo")):
        model = RePoLM(model_config(args, preset))
        params = init_params(model, jax.random.key(args.seed))
        parameters[name] = sum(p.size for p in jax.tree.leaves(params))
        generator = Generator(model, params)
        for n, new in cases:

            def run(generator=generator, n=n, new=new):
                given = dict(max_new_tokens=new, eos_ids=())
                return [c.ids for c in generator.complete(prompts[n], **given)]

            contenders[f"{name}, B {n}, {new} new"] = harness.jax_contender(run)
    if torch:
        parameters[OLMO2] = torch.about["parameters"]
        for n, new in cases:
            task = f"B {n}, {new} new"
            contenders[f"{OLMO2}, {task}"] = torch.contender(task)
        if parameters[ROPE] != parameters[OLMO2]:
            raise SystemExit(f"{ROPE} and {OLMO2} differ in size: not the same model")

    times, _ = harness.measure(contenders, args)
    if torch:
        torch.close()
    names = [ROPE, REPO, OLMO2] if torch else [ROPE, REPO]
    decoding, whole = {}, {}
    for name in names:
        for n in BATCHES:
            prompt, both = (times[f"{name}, B {n}, {new} new"] for new in (1, args.new_tokens))
            whole[name, n] = both
            decoding[name, n] = np.subtract(both, prompt).tolist()
    median = statistics.median
    speed = {
        f"{name}, B {n}": n * (args.new_tokens - 1) / median(decoding[name, n])
        for n in BATCHES
        for name in names
    }
    ratios = {
        f"{key}_b{n}{suffix}": (f"B {n}: {what}", harness.compare(*given, args.seed))
        for n in BATCHES
        for suffix, measured, seconds in (
            ("", "decoding", decoding),
            ("_with_prompt", "with the prompt", whole),
        )
        for key, label, a, b in PAIRS
        if a in names and b in names
        for what, given in [(f"{label}, {measured}", (seconds[a, n], seconds[b, n]))]
    }
    sizes = (
        f"D {args.d_model}, F {args.d_ff}, {args.n_layers} layers, {args.n_heads} heads, V "
        f"{args.vocab_size}, prompts of {args.length} tokens, {args.new_tokens} new, float32"
    )
    attention = f" transformers' attention: {torch.about['attention']}." if torch else ""
    lines = [
        *(f"{sizes}; median over rounds.{attention}", ""),
        *harness.table(
            ("contender", "decoding, tokens/s", "ms a token", "prompt, s", "both, s"),
            (
                f"{name}, B {n} | {speed[f'{name}, B {n}']:,.0f} | "
                f"{median(decoding[name, n]) / (args.new_tokens - 1) * 1e3:.2f} | "
                f"{median(times[f'{name}, B {n}, 1 new']):.4f} | {median(whole[name, n]):.4f}"
                for n in BATCHES
                for name in names
            ),
        ),
        *harness.table(
            ("ratio", "median", "95 % interval"),
            (f"{what} | {harness.show(ratio)}" for what, ratio in ratios.values()),
        ),
    ]
    data = {
        "parameters": parameters,
        "new_tokens_per_second": speed,
        "ratios": {key: ratio for key, (_, ratio) in ratios.items()},
        "seconds": times,
    }
    harness.report(path, "Decoding", lines, data, args, torch)


if __name__ == "__main__":
    main()
