"""Generate text with token filtering: the main job.

    python generate.py [CHECKPOINT] --prompt "..." --prune 0.5           filtered as in the paper
    python generate.py --prompt "..." --prune 0.5 --preset local         a redundant token still attends to what is near
    python generate.py --chat --prompt "..." --prune 0.3 --compare       dense and every preset, one after another
    python generate.py --chat --prune 0.5 --preset cache                 a conversation, in one cache

From Python: `for row, token in generate(model, prompts, filter=preset("cache", prune=0.5)): ...`
"""

import math
import operator
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice, takewhile
from numbers import Integral, Real

from command_line import PRESETS, PRUNE, Parser, add_filter_arguments, add_model_arguments, alone, as_process, check_filter, fail, number

from report import Answer, Stats, check_output, print_json, read_prompts


def check_settings(max_new_tokens=1, temperature=0.0, top_k=0, top_p=1.0, seed=0, chunk=1):
    """Raises ValueError for a value that makes no sense, naming it."""
    for name, value, kind, low, high, words in (
        ("max_new_tokens", max_new_tokens, Integral, 1, math.inf, "a whole number of at least 1"),
        ("temperature", temperature, Real, 0, sys.float_info.max, "a finite number of at least 0"),
        ("top_k", top_k, Integral, 0, math.inf, "a whole number of at least 0"),
        ("top_p", top_p, Real, math.ulp(0), 1, "a number above 0 and at most 1"),
        ("seed", seed, Integral, 0, 2**63 - 1, "a whole number of at least 0 and below 2**63"),
        ("chunk", chunk, Integral, 1, math.inf, "a whole number of at least 1"),
    ):
        if not issubclass(type(value), kind) or not low <= value <= high:
            raise ValueError(f"{name} is {value!r}, not {words}")


def flags() -> Parser:
    parser = Parser(description="Generate text with token filtering.")
    add_model_arguments(parser)
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue (-: stdin's); many of them are one batch")
    parser.add_argument("--prompts-file", metavar="FILE", help="more prompts, one a line (-: stdin)")
    parser.add_argument("--chat", action="store_true", help="send each prompt as a user's message in the chat template; without a prompt, "
                        "talk: each line of stdin is a turn, and the cache is kept from turn to turn")  # fmt: skip
    parser.add_argument("--system", metavar="TEXT", help="message that tells the model of --chat what it is (default: the template's)")
    parser.add_argument("--no-echo", action="store_true", help="print answers alone (otherwise each stands under its prompt)")
    parser.add_argument("--num-samples", type=number(1), default=1, metavar="N", help="answers to one prompt, fed once (default: 1)")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="length of an answer (default: %(default)s)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end answers before this text; may be given often")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after an end-of-text token")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="of sampling (default: 0, always the likeliest)")
    parser.add_argument("--top-k", type=int, default=0, metavar="N", help="sample from the N likeliest tokens (default: 0, all)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="and from the likeliest that together make up P (default: 1)")
    parser.add_argument("--seed", type=int, metavar="N", help="of sampling (default: 0)")
    parser.add_argument("--prune", type=PRUNE, metavar="P", help="share of (token, layer) pairs to skip (default: 0, dense)")
    parser.add_argument("--no-graph", action="store_true", help="on CUDA, do not record a decode step as a graph and replay it: slower")
    parser.add_argument("--compile", action="store_true", help="decode through torch.compile: faster, after a minute or so for compiling")
    parser.add_argument("--compare", action="store_true", help="dense, then every preset, at --prune (default then: 0.3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--show-skips", action="store_true", help="colour each token by the share of layers that found it redundant")
    parser.add_argument("--skip-map", metavar="FILE", help="each layer's decision on each token, and its score: FILE.html, a page to take "
                        "apart in a browser, or FILE.png, a picture (needs matplotlib)")  # fmt: skip
    add_filter_arguments(parser)
    return parser


def read_arguments(argv=None):
    """The command's arguments, and the texts of the prompts. Exits with one line where they make no sense, alone or together."""
    args = flags().parse_args(argv)
    try:
        check_settings(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed or 0)
    except ValueError as e:
        name, _, problem = str(e).partition(" ")
        fail(f"--{name.replace('_', '-')} {problem}")
    sampling = {"--top-k": args.top_k, "--top-p": args.top_p < 1, "--num-samples": args.num_samples > 1, "--seed": args.seed is not None}
    for flag, given in sampling.items():
        if args.temperature == 0 and given:
            fail(f"{flag} does nothing without --temperature")
    args.seed = args.seed or 0
    if args.compare and args.prune is None:
        args.prune = 0.3
    given = check_filter(args, "compare", "show_skips", "skip_map")
    if args.compare and given[0] != "--compare":
        fail(f"--compare runs every preset as it is: it cannot be combined with {given[0]}")
    if args.show_skips and args.json:
        fail("--show-skips colours text: it cannot be combined with --json")
    if args.show_skips and args.no_echo:
        fail("--show-skips colours prompts too: it cannot be combined with --no-echo")
    if args.system is not None and not args.chat:
        fail("--system does nothing without --chat")
    talks = args.chat and not args.prompt and not args.prompts_file
    alone(show_skips=args.show_skips, skip_map=args.skip_map, compile=args.compile, chat=talks)
    texts = read_prompts(args)
    if args.skip_map is not None:
        if args.compare or len(texts) > 1:
            fail("--skip-map draws one prompt with one setting: leave out --compare and all prompts but one")
        check_output("--skip-map", args.skip_map, (".html", ".png"))
    return args, texts


if __name__ == "__main__":
    given = as_process(read_arguments)  # before torch is imported, which takes seconds

from command_line import compile_decode, filters_from

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from checkpoint_files import checkpoint_folder
from load_weights import CheckpointError, Tokenizer, load, read_config
from model import KVCache, ModelConfig, Transformer
from skip_map import Decisions, paint, paint_legend, token_pieces, write_skip_map
from token_filter import FilterConfig

SHARED = 128  # tokens that prompts have in common, such as instructions or solved examples, from which on they are fed once

# ---------------------------------------------------------------------------------------------- from Python


def sample(logits, temperature=0.0, top_k=0, top_p=1.0, rng=None) -> int:
    """sample_rows for one row, logits (vocab,)."""
    return int(sample_rows(logits[None], temperature, top_k, top_p, [rng]))


@torch.no_grad()
def sample_rows(logits, temperature, top_k, top_p, rngs) -> torch.Tensor:
    """A token for each row of logits (B, vocab), (B,) int64 on their device. Greedy at temperature 0; else from the top_k likeliest
    (0: all), of which the smallest set with probability top_p stays. Of equals, the lower id comes first.

    Each id has a random number of its own, e ~ Exp(1), from its row's generator, one of the logits' device. The largest p / e of
    those that stay wins: id i with probability p_i. Where rounding moves the logits a little, the draw is another one only as
    often as they moved.
    """
    if temperature == 0:
        return logits.argmax(1)
    if logits.device.type == "cpu" and len(logits) > 16:
        # So it stays in the processor's cache: 128 rows of 32000 take 0.6 s, all at once 0.9 s.
        parts = [slice(i, i + 16) for i in range(0, len(logits), 16)]
        return torch.cat([sample_rows(logits[part], temperature, top_k, top_p, rngs[part]) for part in parts])
    scaled = (logits.double() - logits.amax(1, keepdim=True)) / temperature
    noise = torch.empty_like(scaled)
    for row, rng in zip(noise, rngs):
        row.exponential_(generator=rng)
    race = scaled.exp() / noise
    if top_k or top_p < 1:
        race.masked_fill_(~likeliest(logits, temperature, top_k, top_p), 0)
    return race.argmax(1)


def likeliest(logits, temperature, top_k, top_p) -> torch.Tensor:
    """Which ids sample_rows draws from, (B, vocab) bool."""
    if logits.device.type == "cpu":
        # NumPy sorts 128 rows of 32000 in 0.06 s, torch in 0.8 s. It has no bfloat16.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        ranked = torch.from_numpy(np.sort(logits.numpy(), axis=1)).flip(1)
    else:
        ranked = logits.sort(dim=1, descending=True).values
    ranked = ranked[:, : top_k or None]
    p = ((ranked.double() - ranked[:, :1]) / temperature).softmax(1)
    before = F.pad(p.cumsum(1)[:, :-1], (1, 0))  # the probability of those that are likelier
    n = (before < top_p).sum(1, keepdim=True)  # so many stay, one at least
    least = ranked.gather(1, n - 1)
    above = logits > least
    equal = logits == least
    return above | (equal & (equal.cumsum(1, dtype=torch.int32) <= n - above.sum(1, keepdim=True)))


def row_seed(seed: int, row: int) -> int:
    """The seed of a row's own random numbers, mixed so that any two pairs, neighbours or not, give independent ones.

    Below 2**63, of which torch's generator on the CPU uses 32 bits. Raises ValueError for a seed that is none.
    """
    check_settings(seed=seed)
    mixed = np.random.SeedSequence(int(seed), spawn_key=(row,)).generate_state(1, np.uint64)
    return int(mixed[0]) // 2


def overflow(model, tokens: list[int], config) -> str:
    """Where the logits of a text stop being finite, in a line; config: a FilterConfig or None."""
    cache, dtype = model.new_cache(1, config), str(model.embed.weight.dtype)[6:]
    with torch.inference_mode():
        x = model.embed(torch.tensor(tokens, device=cache.position.device))
        chunk = cache.advance(torch.tensor([len(tokens)]), len(tokens), x.dtype)
        finite = [bool((x := block(x, chunk, layer)).isfinite().all()) for block, layer in zip(model.blocks, cache.layers)]
    where = f"layer {finite.index(False)}" if False in finite else "the output"
    others = [name for name in ("bfloat16", "float32", "float64") if name != dtype]
    return f"{dtype} is not enough for this model: from {where} on, values are not finite; use --dtype {' or '.join(others)}"


def generate(
    model: Transformer, prompts: list[list[int]], max_new_tokens: int = 128, filter: FilterConfig | None = None, eos_ids=frozenset(),
    temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int | Sequence[int] = 0, chunk: int = 512,
    stats: Stats | None = None, watch: Callable[[list[int], KVCache], None] | None = None, cache: KVCache | None = None,
    ended: set[int] | None = None,
) -> Iterator[tuple[int, int]]:  # fmt: skip
    """Continue token prompts of any lengths as one batch, yielding (row, token) as each token is found.

    A row ends at a token of eos_ids, which is not yielded, or after max_new_tokens, and leaves the batch. Each row has its own
    random numbers, those of row_seed(seed, row), or, where `seed` is a list, of its own seed there. So what a row says does not
    depend on its neighbours: in float64 and, nearly always, in float32. In half precision, other neighbours mean other rounding of
    the logits, and sooner or later another token, greedy or not. Prompts are prefilled `chunk` tokens at a time, what all begin
    with and equal ones once: the cache is forked.
    `stats`, if given, is complete once the iterator is exhausted.
    `watch(rows, cache)`, if given, is called after each forward with the numbers of the rows in the cache, whose layers hold
    their latest decisions; prompts are then prefilled in one go, each by itself.
    `cache`, if given, is one of model.new_cache(len(prompts), filter) that was fed the first cache.seen[row] tokens of each prompt
    before: only the others are fed. `ended`, if given, is a set of rows: those that the caller puts in end with their latest token.
    Raises ValueError where the cache is one of another filter, for a prompt that is no list of token ids, is empty, does not fit
    the model's context with its new tokens or has a token that the model does not know, and for settings that make no sense;
    FloatingPointError where logits are not finite.
    """
    check_settings(max_new_tokens, temperature, top_k, top_p, chunk=chunk)
    if filter is not None and not isinstance(filter, FilterConfig):
        raise ValueError(f"filter is {filter!r}, not None or a FilterConfig, as token_filter.preset(name) makes it")
    if cache is not None:
        wanted = filter or FilterConfig(prune=0.0)
        if wanted != cache.filter and (wanted.prune > 0 or cache.filter.prune > 0):
            raise ValueError(f"filter is {wanted}, but the cache was made for {cache.filter}: it must be the same one")
    prompts = checked(prompts, max_new_tokens, model.config, cache)
    seeds = seeds_of(seed, len(prompts))
    sampling, chunk = (temperature, top_k, top_p), chunk if watch is None else max(map(len, prompts))
    stats, ended = Stats() if stats is None else stats, set[int]() if ended is None else ended
    return _steps(model, prompts, max_new_tokens, filter, eos_ids, sampling, seeds, chunk, stats, watch, cache, ended)


def seeds_of(seed, n_rows) -> list[int]:
    """The seed of each row, from generate()'s `seed`. Raises ValueError."""
    if not isinstance(seed, list | tuple):
        return [row_seed(seed, row) for row in range(n_rows)]
    for row_s_own in seed:
        check_settings(seed=row_s_own)
    if len(seed) != n_rows:
        raise ValueError(f"seed has {len(seed)} numbers for {n_rows} prompts")
    return list(seed)


def checked(prompts, max_new_tokens, config: ModelConfig, cache: KVCache | None) -> list[list[int]]:
    """The prompts, or ValueError, as generate() raises it."""
    try:
        prompts = [[operator.index(token) for token in prompt] for prompt in prompts]
    except TypeError:
        raise ValueError("prompts is not a list of lists of token ids, as tokenizer.encode(text) makes one") from None
    if not prompts:
        raise ValueError("there is no prompt")
    context, vocab = config.max_positions, config.vocab_size
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row + 1} is empty")
        if len(prompt) + max_new_tokens > context:
            beyond = f"with {max_new_tokens} new ones it is longer than the model's context of {context}"
            raise ValueError(f"prompt {row + 1} has {len(prompt)} tokens: {beyond}")
        if unknown := [token for token in prompt if not 0 <= token < vocab]:
            raise ValueError(f"prompt {row + 1} has the token {unknown[0]}: the model knows those from 0 to {vocab - 1}")
    if cache is not None and (len(cache.seen) != len(prompts) or any(map(operator.ge, cache.seen.tolist(), map(len, prompts)))):
        raise ValueError(f"cache holds texts of {cache.seen.tolist()} tokens: it is for as many prompts, each longer than its text")
    return prompts


def in_common(prompts) -> int:
    """How many tokens all of these begin with, the last of each left out, or 0 if not worth being fed apart."""
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(min(prompts)[:-1], max(prompts))))
    return shared if len(prompts) > 1 and shared >= SHARED else 0


def feed(model, prompts, cache: KVCache, chunk=512):
    """Prefill an empty cache, with equal prompts and what all of them begin with once: logits (B, vocab) after each, and how many
    tokens that took.
    """
    different = list(dict.fromkeys(map(tuple, prompts)))
    shared = in_common(different)
    if (rows := 1 if shared else len(different)) < len(prompts):
        cache.select(range(rows))
    if shared:
        model.prefill([different[0][:shared]], cache, chunk)
        cache.select([0] * len(different))
    logits = model.prefill([prompt[shared:] for prompt in different], cache, chunk)
    if len(different) < len(prompts):
        fork = [different.index(tuple(prompt)) for prompt in prompts]
        cache.select(fork)
        logits = logits[fork]
    return logits, shared + sum(len(prompt) - shared for prompt in different)


def _steps(
    model, prompts, max_new_tokens, filter, eos_ids, sampling: tuple[float, int, float], seeds, chunk, figures, watch, cache, enough
):  # fmt: skip
    rngs = [torch.Generator(model.embed.weight.device).manual_seed(seed) for seed in seeds]
    rows, made, said = list(range(len(prompts))), 0, [list[int]() for _ in prompts]  # rows: the cache's
    live, ride = set(rows), watch is None and model.fixed_batch()  # of these the ones to go on; ended ones ride along for a while

    started = time.perf_counter()
    cache = model.new_cache(len(prompts), filter) if cache is None else cache
    cache.length = max(map(len, prompts)) + max_new_tokens
    if watch is None and not cache.seen.any():
        logits, figures.prompt_tokens = feed(model, prompts, cache, chunk)
    else:  # what is watched is each prompt by itself
        new = [prompt[seen:] for prompt, seen in zip(prompts, cache.seen.tolist())]
        logits, figures.prompt_tokens = model.prefill(new, cache, chunk), sum(map(len, new))
    figures.rows, figures.slot_bytes = [{} for _ in prompts], cache.slot_bytes
    while live:
        finite, tokens = torch.stack((logits.isfinite().all(1), logits.argmax(1))).tolist()  # the one wait of a greedy step
        for row, fine in zip(rows, finite):
            if row in live and not fine:
                raise FloatingPointError(overflow(model, prompts[row] + said[row], filter))
        if sampling[0] > 0:
            tokens = sample_rows(logits, *sampling, [rngs[row] for row in rows]).tolist()
        phase = "decode_seconds" if made else "prefill_seconds"
        setattr(figures, phase, getattr(figures, phase) + time.perf_counter() - started)
        made, figures.new_tokens = made + 1, figures.new_tokens + len(live)
        if watch is not None:
            watch(rows, cache)
        for row, token in zip(rows, tokens):
            if row in live:
                said[row].append(token)
                if token not in eos_ids:
                    yield row, token

        started = time.perf_counter()
        ended = [i for i, row in enumerate(rows) if row in live and (tokens[i] in eos_ids or row in enough or made == max_new_tokens)]
        for i, usage in zip(ended, cache.usage()[ended].tolist() if ended else ()):
            figures.end(rows[i], usage)
        live -= {rows[i] for i in ended}
        half = len(rows) // 2
        size = len(live) if not ride else half if len(live) <= half else len(rows)  # who rides along does so until half have ended
        if live and size < len(rows):
            stay = sorted(sorted(range(len(rows)), key=lambda i: rows[i] not in live)[:size])
            cache.select(stay)
            rows, tokens = [rows[i] for i in stay], [tokens[i] for i in stay]
        if live:
            logits = model(torch.tensor(tokens)[:, None], cache, last=True)


# ----------------------------------------------------------------------------------------- the command line


def run(model, tokenizer: Tokenizer, prompts, args, filter, echo=None, watch=None) -> tuple[list[list[str]], Stats, bool]:
    """Generate for all prompts: each answer as the text of each of its tokens; and whether Ctrl-C stopped it.

    `echo`, if given, is called with the text of a single prompt as it comes; `watch` is generate's.
    """
    stats, stopped, ended = Stats(), False, set[int]()
    eos_ids = frozenset() if args.ignore_eos else tokenizer.eos_ids
    # An Answer has to see the token that ends it, so generate() is told of none.
    rows = [Answer(tokenizer, args.stop, eos_ids) for _ in prompts]
    answers = [list[str]() for _ in prompts]
    sampling = (args.temperature, args.top_k, args.top_p, args.seed)
    steps = generate(model, prompts, args.max_new_tokens, filter, frozenset(), *sampling, stats=stats, watch=watch, ended=ended)
    bar = tqdm(steps, desc="tokens", unit="", total=len(prompts) * args.max_new_tokens, disable=echo is not None or None, leave=False)
    try:
        for row, token in bar:
            piece = rows[row].push(token)
            if rows[row].ended:
                ended.add(row)
            if token in eos_ids:
                continue
            answers[row].append(piece)
            if echo:
                echo(piece)
    except KeyboardInterrupt:
        stopped = True
        bar.close()
    for answer, row in zip(answers, rows):
        whole = row.ended or len(answer) == args.max_new_tokens
        if answer and whole:  # an answer that Ctrl-C broke off ends with what was certain
            rest = row.push(None)
            answer[-1] += rest
            if echo:
                echo(rest)
    return answers, stats, stopped


def warn(model, settings, longest):
    """Notes on stderr of what will be of no use: filtering texts of up to `longest` tokens, or so small a model."""
    warmup = max([filter.warmup for _, filter in settings if filter], default=0)
    if longest <= warmup:
        print(f"note: the first {warmup} tokens of a text (the warm-up) are not filtered, and no text here is longer", file=sys.stderr)
    elif [filter.mode for _, filter in settings if filter] == ["skip"] and sum(p.numel() for p in model.parameters()) < 1e9:
        print("note: models below a billion parameters rarely survive having attention skipped; try --preset cache, or --compare to see "
              "dense and all presets one after another", file=sys.stderr)  # fmt: skip


def prepare(args, texts):
    """Model and tokenizer, the messages that a conversation begins with, and the prompts as tokens."""
    from chat import begin  # which imports this file

    try:
        folder = checkpoint_folder(args.checkpoint)
        if args.max_new_tokens >= (context := read_config(folder).max_positions):
            fail(f"--max-new-tokens {args.max_new_tokens} leaves no room for a prompt in the model's context of {context}")
        model, tokenizer = load(folder, args.device, args.dtype, progress=sys.stderr.isatty())
        opening = begin(tokenizer, args.system) if args.chat else []
        chats = ([*opening, {"role": "user", "content": text}] for text in texts)
        prompts = [*map(tokenizer.chat, chats)] if args.chat else [*map(tokenizer.encode, texts)]
    except CheckpointError as e:
        fail(e)
    model.capture = None if args.no_graph else model.capture
    return model, tokenizer, opening, prompts


def show(model, tokenizer, prompts, texts, args, title, filter, decisions: Decisions, coloured):
    """As run(), which it calls, and prints the answers."""
    echoes = ["" if args.no_echo else f"{text}\n" for text in texts]
    waiting, stream = echoes[:1], len(prompts) == 1 and not args.json and not coloured  # the prompt, until something stands under it

    def echo(text):
        print(*waiting, text, sep="", end="", flush=True)
        waiting.clear()

    watch = decisions.watch if coloured or args.skip_map else None
    try:
        for n in [len(prompts) >> i for i in range(len(prompts).bit_length())] if args.compile else ():  # also when rows have left
            list(islice(generate(model, prompts[:n], args.max_new_tokens, filter), 40 * n))
        answers, stats, stopped = run(model, tokenizer, prompts, args, filter, echo if stream else None, watch)
    except (ValueError, FloatingPointError) as e:
        fail(e)
    if stream:
        print(*waiting)
    elif coloured:
        for i, (prompt, answer) in enumerate(zip(prompts, answers)):
            number = f"[{i + 1}] " if len(prompts) > 1 else ""
            print(number + paint(token_pieces(tokenizer, prompt) + answer, len(prompt), decisions.redundant[i]))
    elif not args.json:
        for i, answer in enumerate(answers):
            print(f"[{i + 1}] {echoes[i]}{''.join(answer)}\n")
    if not args.json and not stopped:  # a comparison's figures belong to its texts; otherwise stdout is for the text alone
        print(f"{title}: {stats.line()}", file=sys.stdout if args.compare else sys.stderr, flush=True)
    return answers, stats, stopped


def main(argv=None, given=None):
    from chat import talk

    args, texts = given or read_arguments(argv)
    settings: list[tuple[str, FilterConfig | None]] = [("dense", None)] * (args.compare or not args.prune)
    settings += filters_from(args, PRESETS if args.compare else [args.preset or "paper"], [args.prune or 0])
    coloured = args.show_skips and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    if args.show_skips and not coloured:
        print("note: --show-skips has no effect where stdout is not a terminal, or NO_COLOR is set", file=sys.stderr)
    model, tokenizer, opening, prompts = prepare(args, texts)
    args.compile = args.compile and compile_decode(model)
    if args.compile:
        print("compiling ...", file=sys.stderr, flush=True)
    warn(model, settings, max(map(len, prompts), default=model.config.max_positions) + args.max_new_tokens)
    if not prompts:
        return talk(model, tokenizer, opening, args)
    if coloured:
        print(paint_legend())
    results = list[dict]()
    for name, filter in settings:
        title = name if filter is None else f"{name}, prune {filter.prune}"
        if args.compare and not args.json:
            print(f"\n=== {title}")
        decisions = Decisions(len(prompts), model.config.n_layers)
        answers, stats, stopped = show(model, tokenizer, prompts, texts, args, title, filter, decisions, coloured)
        shares = {"skip_ratio": stats.skip_ratio, "kv_held": stats.kv_held, "kv_read": stats.kv_read}
        said = {"texts": [*map("".join, answers)], **shares, **asdict(stats)}
        results.append({"setting": name, "filter": filter and asdict(filter), **said})
        if stopped:
            break
    if args.json:
        print_json({"prompts": texts, "results": results})
    if stopped:
        unwritten = f"; {args.skip_map} was not written" if args.skip_map else ""
        print(f"interrupted: what was generated until then is above, figures are not complete{unwritten}", file=sys.stderr)
        raise SystemExit(130)
    if args.skip_map and filter:
        pieces = token_pieces(tokenizer, prompts[0]) + answers[0]
        write_skip_map(args.skip_map, title, pieces, len(prompts[0]), decisions, filter, model.config.window)


if __name__ == "__main__":
    as_process(main, None, given)
