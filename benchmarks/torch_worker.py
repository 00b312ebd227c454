"""The torch side of the benchmarks, a process of its own that needs no JAX.

`harness.Torch` starts it. Lines of JSON: the first on stdin says what to prepare and is
answered with versions and facts; each further one, {"task", "calls"}, is answered with the
seconds per call and, as `idle`, the CPU and wall seconds since the answer before.
"""

import json
import os
import sys
import time


def train_step(setup: dict):
    """One step of transformers' Olmo2ForCausalLM: forward, backward, clipping, fused AdamW."""
    import torch
    import transformers

    config = transformers.Olmo2Config(
        **setup["model"],
        pad_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(setup["seed"])
    model = transformers.Olmo2ForCausalLM(config).float().train()
    tokens = torch.tensor(setup["tokens"])
    optimizer = setup["optimizer"]
    embedding = list(model.model.embed_tokens.parameters())
    decayed = [p for p in model.parameters() if all(p is not e for e in embedding)]
    groups = [dict(params=embedding, weight_decay=0.0), dict(params=decayed)]
    adamw = torch.optim.AdamW(
        groups,
        lr=optimizer["learning_rate"],
        betas=(optimizer["b1"], optimizer["b2"]),
        eps=optimizer["eps"],
        weight_decay=optimizer["weight_decay"],
        fused=True,
    )

    # Without a cache, transformers falls back to a dense mask unless it sees that nothing is
    # padding; with this one SDPA runs its faster is_causal path. `_attends_causally` checks.
    everything = torch.ones_like(tokens)

    def step():
        model(input_ids=tokens, attention_mask=everything, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer["clip_norm"])
        adamw.step()
        adamw.zero_grad(set_to_none=True)

    parameters = sum(p.numel() for p in model.parameters())
    facts = {"parameters": parameters, "is_causal": _attends_causally(step)}
    return {"train_step": step}, facts, {"transformers": transformers.__version__}


def _attends_causally(step) -> bool:
    """Whether all attention of a step is SDPA with is_causal and no mask."""
    import torch

    sdpa, calls = torch.nn.functional.scaled_dot_product_attention, []

    def spy(*args, attn_mask=None, is_causal=False, **kwargs):
        calls.append(attn_mask is None and is_causal)
        return sdpa(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    torch.nn.functional.scaled_dot_product_attention = spy
    try:
        step()
    finally:
        torch.nn.functional.scaled_dot_product_attention = sdpa
    return bool(calls) and all(calls)


def attention(setup: dict):
    """scaled_dot_product_attention, causal; tasks `forward T` and `forward+backward T`."""
    import torch

    torch.manual_seed(setup["seed"])
    tasks = {}
    for length in setup["lengths"]:
        shape = (setup["batch_size"], length, setup["n_heads"], setup["head_dim"])
        # [B, N, T, H] for torch, laid out in memory as a model's projections leave it.
        q, k, v, d_out = (torch.randn(shape).transpose(1, 2) for _ in range(4))

        def forward(q=q, k=k, v=v):
            with torch.no_grad():
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

        def backward(qkv=(q, k, v), d_out=d_out):
            qkv = [x.detach().requires_grad_() for x in qkv]
            out = torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True)
            return out, torch.autograd.grad(out, qkv, d_out)

        tasks |= {f"forward {length}": forward, f"forward+backward {length}": backward}
    return tasks, {}, {}


def decode(setup: dict):
    """`generate` of transformers' Olmo2ForCausalLM, greedy, with its cache.

    Tasks `B 1, 64 new` for each batch and each number of new tokens.
    """
    import torch
    import transformers

    config = transformers.Olmo2Config(
        **setup["model"],
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    torch.manual_seed(setup["seed"])
    model = transformers.Olmo2ForCausalLM(config).float().eval()
    counts = set()

    def task(tokens, new_tokens):
        tokens = torch.tensor(tokens)

        @torch.inference_mode()
        def run():
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )
            counts.add(out.shape[1] - tokens.shape[1])

        return run

    tasks = {
        f"B {len(tokens)}, {n} new": task(tokens, n)
        for tokens in setup["prompts"]
        for n in setup["new_tokens"]
    }
    for run in tasks.values():
        run()
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "attention": model.config._attn_implementation,
        "new_tokens": sorted(counts),
    }
    return tasks, facts, {"transformers": transformers.__version__}


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer

    def answer(**values):
        print(json.dumps(values), file=answers, flush=True)

    setup = json.loads(sys.stdin.readline())
    try:
        import torch

        torch.set_num_threads(setup["threads"])
        kinds = {"train_step": train_step, "attention": attention, "decode": decode}
        tasks, facts, versions = kinds[setup["kind"]](setup)
    except ImportError as error:
        return answer(missing=str(error))
    answer(versions={"torch": torch.__version__, **versions}, **facts)
    cpu, wall = time.process_time(), time.perf_counter()
    for line in sys.stdin:
        idle = time.process_time() - cpu, time.perf_counter() - wall
        request = json.loads(line)
        run = tasks[request["task"]]
        start = time.perf_counter()
        for _ in range(request["calls"]):
            run()
        seconds = (time.perf_counter() - start) / request["calls"]
        time.sleep(setup["settle"])  # until OpenMP's threads no longer spin
        cpu, wall = time.process_time(), time.perf_counter()
        answer(seconds=seconds, idle=idle)


if __name__ == "__main__":
    main()
