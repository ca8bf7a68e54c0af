"""Time and bytes of the port against transformers' DynamicCache.

    python -m ports.transformers_bench checkpoints/smollm2-135m --lengths 512 2048 8192 --layers 6

All caches take turns, chunk by chunk and step by step, so that a busy machine is fair to them.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from filter_config import preset
from ports.transformers_cache import TokenFilterCache, detach

ROOT = Path(__file__).parent.parent
TEXTS = ["README.md", "docs/lesson.md", "docs/results.md"]  # what is fed, if no --text is given


def dynamic_cache_bytes(cache):
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


class Contender:
    """One cache, and what it took so far. attn_implementation: how the model attends with it."""

    def __init__(self, name, cache, attn_implementation):
        self.name = name
        self.cache = cache
        self.attn_implementation = attn_implementation
        self.prefill_seconds = 0.0
        self.step_seconds = []

    def feed(self, model, ids):
        """Feed ids (1, T); returns the seconds that it took."""
        model.set_attn_implementation(self.attn_implementation)
        start = time.perf_counter()
        model(ids, past_key_values=self.cache, logits_to_keep=1)
        return time.perf_counter() - start

    def nbytes(self):
        if isinstance(self.cache, TokenFilterCache):
            return self.cache.usage().nbytes
        return dynamic_cache_bytes(self.cache)


def contenders(model, prunes):
    dense = Contender("DynamicCache", DynamicCache(config=model.config), "sdpa")
    filtered = []
    for name in ("paper", "local", "cache"):
        for prune in prunes:
            cache = TokenFilterCache(model, preset(name, prune=prune))
            filtered.append(Contender(f"{name} {prune}", cache, "token_filter"))
    return [dense, *filtered]


@torch.inference_mode()
def measure(model, ids, prunes, chunk, n_steps):
    """Prefill ids (1, T) in chunks, then decode n_steps tokens: the contenders, all measured."""
    everyone = contenders(model, prunes)
    for part in ids.split(chunk, dim=1):
        for one in everyone:
            one.prefill_seconds += one.feed(model, part)
    for step in range(n_steps):
        for one in everyone:
            one.step_seconds.append(one.feed(model, ids[:, step : step + 1]))
    return everyone


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--prune", type=float, nargs="+", default=[0.5])
    parser.add_argument("--layers", type=int, help="use the model's first N layers alone")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a prompt fed at once")
    parser.add_argument("--steps", type=int, default=16, help="decode steps")
    parser.add_argument("--text", type=Path, nargs="+", default=[ROOT / name for name in TEXTS])
    args = parser.parse_args()

    if not Path(args.checkpoint, "config.json").exists():
        parser.error(f"{args.checkpoint} is not a checkpoint folder: it has no config.json")
    changes = {} if args.layers is None else {"num_hidden_layers": args.layers}
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32, **changes)
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    text = "\n".join(path.read_text(encoding="utf-8") for path in args.text)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    if ids.shape[1] < max(args.lengths):
        longest = max(args.lengths)
        parser.error(f"the text has {ids.shape[1]} tokens, but --lengths asks for {longest}")

    measure(model, ids[:, :64], args.prune, args.chunk, n_steps=2)  # to warm up
    n_layers = model.config.num_hidden_layers
    print(f"{args.checkpoint}, {n_layers} layers, float32, {torch.get_num_threads()} thread(s)")
    print(f"prefill in chunks of {args.chunk}; decode: the median of {args.steps} steps\n")
    print("tokens  cache          prefill s decode ms      MB   of DynamicCache's")
    for length in args.lengths:
        everyone = measure(model, ids[:, :length], args.prune, args.chunk, args.steps)
        dense_row = None
        for one in everyone:
            step = 1000 * statistics.median(one.step_seconds)
            row = (one.prefill_seconds, step, one.nbytes() / 1e6)
            if dense_row is None:
                dense_row = row
            ratios = "  ".join(f"{a / b:.2f}" for a, b in zip(row, dense_row))
            print(f"{length:6}  {one.name:14} {row[0]:9.2f} {row[1]:9.1f} {row[2]:7.2f}   {ratios}")
    detach(model)


if __name__ == "__main__":
    main()
