"""Generate text with token filtering: the main job.

    python generate.py [CHECKPOINT] --prompt "..." --prune 0.5      filtered as in the paper
    python generate.py --chat --prompt "..." --prune 0.3 --compare  dense and every preset, one after another

From Python: `for row, token in generate(model, prompts, filter=preset("cache", prune=0.5)): ...`
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from tqdm import tqdm

from load_weights import CheckpointError, Tokenizer, load
from model import Transformer
from token_filter import CHOICES, PRESETS, FilterConfig, preset, token_filter

DEMO = Path(__file__).resolve().parent / "checkpoints" / "smollm2-135m"


# ---------------------------------------------------------------------------------------------- from Python


class CompiledFilter:
    """token_filter through torch.compile at decode, where its sixty small kernels become a few; prefill runs it as it is.

    The first token takes half a minute. Where torch.compile cannot work (no C++ compiler, say), one line on stderr says
    so, and token_filter runs as it is.
    """

    def __init__(self):
        self.compiled = torch.compile(token_filter)

    def __call__(self, k, v, n_new, state, ratio, config):
        if k.shape[1] == 1 and self.compiled is not None:
            try:
                if not isinstance(ratio, torch.Tensor):  # a float would be compiled in
                    ratio = torch.full((len(k),), ratio, dtype=torch.float64, device=k.device)
                return self.compiled(k, v, n_new, state, ratio, config)
            except Exception as e:  # noqa: BLE001 (compilers fail in many ways; nothing has run yet when they do)
                self.compiled = None
                reason = (str(e).strip() or type(e).__name__).splitlines()[0]
                print(f"note: torch.compile failed, the filter runs uncompiled: {reason}", file=sys.stderr)
        return token_filter(k, v, n_new, state, ratio, config)


@dataclass
class Stats:
    """What one call of generate() did, summed over its rows. Times exclude the caller's own work between tokens."""

    prompt_tokens: int = 0
    new_tokens: int = 0  # sampled, an end-of-text token included
    prefill_seconds: float = 0.0  # up to and including each row's first new token
    decode_seconds: float = 0.0  # all further ones
    skip_ratio: float = 0.0  # redundant (token, layer) pairs over all pairs
    kv_bytes: int = 0  # cache in use by each row when it ended: K, V, positions, filter state
    dense_kv_bytes: int = 0  # K and V of every token in every layer
    row_skip_ratio: list[float] = field(default_factory=list)

    def line(self) -> str:
        """The figures in one line."""
        prefill = self.prompt_tokens / max(self.prefill_seconds, 1e-9)
        decoded = self.new_tokens - len(self.row_skip_ratio)
        decode = f"{decoded / self.decode_seconds:.1f} tokens/s" if self.decode_seconds else "none"
        return (
            f"prefill {self.prompt_tokens} tokens at {prefill:.1f} tokens/s; decode {decode}; "
            f"skipped {self.skip_ratio:.1%} of (token, layer) pairs; "
            f"KV cache {self.kv_bytes / 1e6:.2f} MB, {self.kv_bytes / self.dense_kv_bytes:.0%} of dense"
        )


def sample(logits, temperature=0.0, top_k=0, top_p=1.0, rng=None) -> int:
    """One token from logits (vocab,): greedy at temperature 0; else from the top_k likeliest (0: all), of which the
    smallest set with probability top_p stays."""
    if temperature == 0:
        return int(logits.argmax())
    logits, order = (logits.double().cpu() / temperature).sort(descending=True)
    probabilities = logits[: top_k or None].softmax(0)
    probabilities[probabilities.cumsum(0) - probabilities >= top_p] = 0  # the likeliest always stays
    return int(order[torch.multinomial(probabilities, 1, generator=rng)])


def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int = 128,
    filter: FilterConfig | None = None,
    eos_ids=frozenset(),
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    chunk: int = 512,
    stats: Stats | None = None,
) -> Iterator[tuple[int, int]]:
    """Continue token prompts of any lengths as one batch, yielding (row, token) as each token is found.

    A row ends at a token of eos_ids, which is not yielded, or after max_new_tokens, and leaves the batch. Each row has
    its own random numbers (seed + row), so what it says does not depend on its neighbours. Prompts are prefilled `chunk`
    tokens at a time. `stats`, if given, is complete once the iterator is exhausted.
    Raises ValueError for an empty prompt, or one that does not fit the model's context with its new tokens.
    """
    if not prompts:
        raise ValueError("there is no prompt")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row + 1} is empty")
        if len(prompt) + max_new_tokens > model.config.max_positions:
            raise ValueError(
                f"prompt {row + 1} has {len(prompt)} tokens: with {max_new_tokens} new ones it is longer than "
                f"the model's context of {model.config.max_positions}"
            )

    def steps():
        figures = stats if stats is not None else Stats()
        figures.prompt_tokens = sum(map(len, prompts))
        figures.row_skip_ratio = [0.0] * len(prompts)
        rngs = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]
        cache, rows, made, pairs, kept_pairs = model.new_cache(len(prompts), filter), list(range(len(prompts))), 0, 0, 0

        started = time.perf_counter()
        logits = model.prefill(prompts, cache, chunk)
        while rows:
            tokens = [sample(row_logits, temperature, top_k, top_p, rngs[row]) for row, row_logits in zip(rows, logits)]
            seconds = time.perf_counter() - started
            if made == 0:
                figures.prefill_seconds += seconds
            else:
                figures.decode_seconds += seconds
            made, figures.new_tokens = made + 1, figures.new_tokens + len(rows)
            for row, token in zip(rows, tokens):
                if token not in eos_ids:
                    yield row, token

            started = time.perf_counter()
            stay = [i for i, token in enumerate(tokens) if token not in eos_ids and made < max_new_tokens]
            if len(stay) < len(rows):
                bytes_before, kept = cache.live_bytes(), cache.kept()
                for i in set(range(len(rows))) - set(stay):
                    all_pairs = int(cache.seen[i]) * model.config.n_layers
                    figures.row_skip_ratio[rows[i]] = 1 - int(kept[i]) / all_pairs
                    pairs, kept_pairs = pairs + all_pairs, kept_pairs + int(kept[i])
                    figures.dense_kv_bytes += int(cache.seen[i]) * model.kv_bytes_per_token()
                cache.select(stay)
                rows = [rows[i] for i in stay]
                figures.kv_bytes += bytes_before - cache.live_bytes()
                figures.skip_ratio = 1 - kept_pairs / pairs
            if rows:
                logits = model(torch.tensor([tokens[i] for i in stay])[:, None], cache, last=True)

    return steps()


# ----------------------------------------------------------------------------------------- the command line


class Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message):
        fail(message)


def fail(message):
    """One line on stderr, exit code 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def add_model_arguments(parser):
    parser.add_argument("checkpoint", nargs="?", default=DEMO, help="checkpoint folder (default: the demo's, %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (auto: cuda if there is one)")
    dtypes = ("auto", "float32", "bfloat16", "float16", "float64")
    parser.add_argument("--dtype", default="auto", choices=dtypes, help="auto: the checkpoint's on cuda, float32 on cpu")


def add_filter_arguments(parser, several=False):
    """--preset (one name, or several), and a flag for every field of FilterConfig but prune and seed."""
    group = parser.add_argument_group("token filtering")
    group.add_argument("--preset", choices=PRESETS, nargs="+" if several else None, help="default: paper")
    for f in fields(FilterConfig):
        if f.name not in ("prune", "seed"):
            group.add_argument(f"--{f.name}", type=type(f.default), choices=CHOICES.get(f.name), help="overrides the preset")


def filter_from(args, name, prune) -> FilterConfig | None:
    """The named preset with what the flags override, or None for prune 0. Exits with one line if that makes no sense."""
    chosen = {f.name: getattr(args, f.name) for f in fields(FilterConfig) if f.name not in ("prune", "seed")}
    overrides = {key: value for key, value in chosen.items() if value is not None}
    try:
        config = preset(name, prune=prune, seed=args.seed, **overrides)
    except ValueError as e:
        fail(e)
    return config if prune > 0 else None


def read_prompts(args) -> list[str]:
    """The texts of --prompt and --prompts-file."""
    texts = list(args.prompt or [])
    if args.prompts_file:
        try:
            lines = Path(args.prompts_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            fail(f"{args.prompts_file}: cannot be read as UTF-8 text: {e}")
        texts += [line for line in lines if line.strip()]
    if not texts:
        fail("no prompt: give --prompt TEXT or --prompts-file FILE")
    for i, text in enumerate(texts):
        if not text:
            fail(f"prompt {i + 1} is empty")
    return texts


def run(model, tokenizer: Tokenizer, prompts, args, filter, echo=None) -> tuple[list[str], Stats]:
    """Generate for all prompts; `echo`, if given, is called with the text of a single prompt as it comes."""
    stats, streams, texts = Stats(), [tokenizer.stream() for _ in prompts], [""] * len(prompts)
    eos_ids = frozenset() if args.ignore_eos else tokenizer.eos_ids
    steps = generate(
        model, prompts, args.max_new_tokens, filter, eos_ids, args.temperature, args.top_k, args.top_p, args.seed, stats=stats
    )
    bar = tqdm(steps, desc="tokens", unit="", total=len(prompts) * args.max_new_tokens, disable=echo is not None, leave=False)
    for row, token in bar:
        piece = streams[row].push(token)
        texts[row] += piece
        if echo:
            echo(piece)
    for row, stream in enumerate(streams):
        piece = stream.flush()
        texts[row] += piece
        if echo:
            echo(piece)
    return texts, stats


def echo_stdout(piece):
    print(piece, end="", flush=True)


def main(argv=None):
    parser = Parser(description="Generate text with token filtering.")
    add_model_arguments(parser)
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="may be given many times: one batch")
    parser.add_argument("--prompts-file", metavar="FILE", help="one prompt a line")
    parser.add_argument("--chat", action="store_true", help="send each prompt as a user's message in the chat template")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after an end-of-text token")
    parser.add_argument("--temperature", type=float, default=0.0, help="default: 0, the likeliest token always")
    parser.add_argument("--top-k", type=int, default=0, metavar="N", help="sample from the N likeliest (0: all)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="and from the likeliest that make up P")
    parser.add_argument("--seed", type=int, default=0, help="of sampling and of --fusion random")
    parser.add_argument("--prune", type=float, metavar="P", help="share of (token, layer) pairs to skip (default: 0, dense)")
    add_filter_arguments(parser)
    parser.add_argument("--compare", action="store_true", help="dense, then every preset, at --prune (default: 0.3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    args = parser.parse_args(argv)

    if args.max_new_tokens < 1:
        fail(f"--max-new-tokens {args.max_new_tokens} is not at least 1")
    if not args.temperature >= 0 or args.top_k < 0 or not 0 < args.top_p <= 1 or args.seed < 0:
        fail("--temperature, --top-k and --seed must be at least 0, --top-p in (0, 1]")
    given = [f"--{f.name}" for f in fields(FilterConfig) if f.name != "seed" and getattr(args, f.name) is not None]
    if args.preset:
        given.append("--preset")
    if args.compare:
        if set(given) - {"--prune"}:
            fail(f"--compare runs every preset as it is: it cannot be combined with {given[-1]}")
        args.prune = 0.3 if args.prune is None else args.prune
        settings = [("dense", None)] + [(name, filter_from(args, name, args.prune)) for name in PRESETS]
    else:
        if args.prune is None and given:
            fail(f"{given[0]} does nothing without --prune")
        filter = filter_from(args, args.preset or "paper", args.prune or 0.0)
        settings = [(args.preset or "paper" if filter else "dense", filter)]
    texts_in = read_prompts(args)

    try:
        model, tokenizer = load(args.checkpoint, args.device, args.dtype, progress=True)
        if args.chat:
            prompts = [tokenizer.chat([{"role": "user", "content": text}]) for text in texts_in]
        else:
            prompts = [tokenizer.encode(text) for text in texts_in]
    except CheckpointError as e:
        fail(e)

    small = sum(p.numel() for p in model.parameters()) < 1e9
    if small and not args.compare and settings[0][1] and (settings[0][1].mode, settings[0][1].fill) == ("attention", "zero"):
        print(
            "note: models below a billion parameters rarely survive adding nothing for a skipped attention; "
            "try --preset cache, or --compare to see them side by side",
            file=sys.stderr,
        )

    results = []
    for name, filter in settings:
        title = name if filter is None else f"{name}, prune {filter.prune}"
        if args.compare and not args.json:
            print(f"\n=== {title}")
        stream = len(prompts) == 1 and not args.json
        try:
            texts, stats = run(model, tokenizer, prompts, args, filter, echo_stdout if stream else None)
        except ValueError as e:
            fail(e)
        results.append({"setting": name, "filter": filter and asdict(filter), "texts": texts, **asdict(stats)})
        if stream:
            print()
        elif not args.json:
            for i, text in enumerate(texts):
                print(f"[{i + 1}] {texts_in[i]}\n{text}\n")
        if not args.json:  # a comparison's figures belong to its texts; otherwise stdout is for the text alone
            print(f"{title}: {stats.line()}", file=sys.stdout if args.compare else sys.stderr, flush=True)
    if args.json:
        print(json.dumps({"prompts": texts_in, "results": results}, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader (head, say) has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
