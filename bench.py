"""Time and memory of dense and filtered generation, side by side in one run.

    python bench.py [CHECKPOINT] --batch 1 8 --context 1024 --prune 0.5 --preset paper cache --vs transformers
    python bench.py --shape llama-2-13b --dtype bfloat16 --batch 1 32 128 --context 512     random weights, made on the device

Every setting gets the same weights and the same tokens: `context` tokens are prefilled, then each decode step is fed the
text's own next token, so the cache holds what it would hold in real use. The settings take turns, step by step on the
CPU, run by run on CUDA, so that a machine whose speed drifts treats them alike. Figures are medians.

*KV read* is of the measured steps alone, the share of what dense reads of its cache in them; *KV held* and the share of skipped
pairs are of the whole run. The *bound* is what a step reads, all weights and that much of the cache, over what the dense step
reads: about where the time would be on a machine that is limited by memory.
"""

import json
import resource
import statistics
import sys
import time
from pathlib import Path

from command_line import PRESETS, PRUNE, Parser, add_filter_arguments, add_model_arguments, as_process, check_filter, fail

from report import read_text

#               vocab     C   L   H KVH    D    MLP     theta   eps  context  tied window
SIZES: dict[str, tuple] = {  # of published models, as ModelConfig takes them
    "llama-2-7b": (32000, 4096, 32, 32, 32, 128, 11008, 10000.0, 1e-5, 4096, False),
    "llama-2-13b": (32000, 5120, 40, 40, 40, 128, 13824, 10000.0, 1e-5, 4096, False),
    "llama-3-8b": (128256, 4096, 32, 32, 8, 128, 14336, 500000.0, 1e-5, 8192, False),
    "mistral-7b": (32000, 4096, 32, 32, 8, 128, 14336, 10000.0, 1e-5, 32768, False, 4096),
    "phi-4": (100352, 5120, 40, 40, 10, 128, 17920, 250000.0, 1e-5, 16384, False),
}


def read_arguments(argv=None):
    parser = Parser(description="Time and memory of dense and filtered generation, side by side.")
    add_model_arguments(parser)
    parser.add_argument("--shape", choices=SIZES, help="random weights of this shape in place of a checkpoint")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text to feed (default: this project's own files; random with --shape)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], metavar="N", help="sequences side by side (default: 1 8)")
    parser.add_argument("--context", type=int, nargs="+", default=[512], metavar="N",
                        help="tokens in the cache when decoding starts (default: 512)")  # fmt: skip
    parser.add_argument("--new-tokens", type=int, default=16, metavar="N", help="decode steps that are measured (default: %(default)s)")
    parser.add_argument("--prune", type=PRUNE, nargs="+", default=[0.5], metavar="P",
                        help="shares of (token, layer) pairs to skip (default: 0.5); dense is always measured too")  # fmt: skip
    parser.add_argument("--nothing-skipped", action="store_true", help="add a filter that skips nothing after all: its own cost")
    parser.add_argument(
        "--compile", action="store_true", help="run decode through torch.compile, dense too; the filter's own share is then not measured"
    )
    parser.add_argument("--vs", choices=["transformers"], help="add Hugging Face's model of the same checkpoint")
    parser.add_argument("--distinct", type=int, metavar="N",
                        help="prefill N rows only and copy them to fill the batch: quicker; the prefill column is then theirs")  # fmt: skip
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="runs of each setting (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N",
                        help="of random weights and tokens (default: 0)")  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write all figures, after each batch and context")
    parser.add_argument("--plot", metavar="FILE.png", help="draw time and cache against batch or context (needs matplotlib)")
    add_filter_arguments(parser, several=True, default="all of them")
    args = parser.parse_args(argv)

    numbers = [*args.batch, *args.context, args.new_tokens, args.repeat, args.distinct or 1]
    if min(numbers) < 1:
        fail("--batch, --context, --new-tokens, --repeat and --distinct must be at least 1")
    check_filter(args)
    if args.vs and args.shape:
        fail("--vs transformers needs a checkpoint, not --shape")
    return args


if __name__ == "__main__":
    given = as_process(read_arguments)  # before torch is imported, which takes seconds

from command_line import compile_decode, filters_from

import torch
from tqdm import tqdm

from checkpoint_files import checkpoint_folder
from load_weights import CheckpointError, load
from model import BLOCK, ModelConfig, Transformer
from token_filter import FilterConfig, token_filter

SHAPES = {name: ModelConfig(*sizes) for name, sizes in SIZES.items()}


def random_model(shape, device, dtype) -> Transformer:
    """A model of a published shape with random weights, made where and as it will be used."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Transformer(SHAPES[shape]).requires_grad_(False)
    finally:
        torch.set_default_dtype(default)


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def none_skipped(*args):
    """The filter's work, and no gain from it: what it costs at worst."""
    redundant, score = token_filter(*args)
    return torch.zeros_like(redundant), score


class Ours:
    """One setting of our model."""

    def __init__(self, name, model: Transformer, filter: FilterConfig | None, compiled=False, criterion=token_filter):
        self.name, self.model, self.filter, self.compiled, self.criterion = name, model, filter, compiled, criterion
        self.clocked, self.filter_seconds = False, 0.0

    def timed_filter(self, *args):
        """The criterion, with a stopwatch around it while `clocked`."""
        if not self.clocked:
            return self.criterion(*args)
        wait(args[0].device)
        started = time.perf_counter()
        result = self.criterion(*args)
        wait(args[0].device)
        self.filter_seconds += time.perf_counter() - started
        return result

    def prefill(self, tokens):
        cache = self.model.new_cache(len(tokens), self.filter, self.criterion if self.compiled else self.timed_filter)
        self.model.prefill(tokens.tolist(), cache)
        return cache

    def copy(self, cache, rows):
        cache.select(rows)

    def step(self, cache, tokens):
        self.model(tokens, cache, last=True)

    def figures(self, cache):
        pairs, redundant, held, _, _ = cache.usage().sum(0).tolist()
        return {
            "skipped": redundant / pairs,
            "kv_held": held / pairs,
            "cache_bytes": cache.nbytes(),
            "live_bytes": cache.live_bytes(),
            "dense_bytes": pairs * cache.slot_bytes,
        }


class Transformers:
    """Hugging Face's model of the same checkpoint, with scaled_dot_product_attention and its own cache."""

    name, filter, compiled = "transformers", None, False

    def __init__(self, folder, device, dtype):
        import transformers  # heavy, and only needed here

        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        self.model, self.device = model.to(device), device

    @torch.no_grad()
    def prefill(self, tokens):
        return self.model(tokens.to(self.device), use_cache=True, logits_to_keep=1).past_key_values

    def copy(self, cache, rows):
        cache.batch_select_indices(torch.tensor(rows, device=self.device))

    @torch.no_grad()
    def step(self, cache, tokens):
        self.model(tokens.to(self.device), past_key_values=cache, use_cache=True)

    def figures(self, cache):
        held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
        return {"skipped": 0.0, "kv_held": 1.0, "cache_bytes": held, "live_bytes": held, "dense_bytes": held}


def profiled(side, cache, tokens, device):
    """What attention and the products with the weights take of the steps that feed tokens (B, T) one by one, by torch's profiler."""
    with torch.profiler.profile() as profiler:
        for t in range(tokens.shape[1]):
            side.step(cache, tokens[:, t : t + 1])
        wait(device)
    time_of = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    spent = {e.key: getattr(e, time_of) for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CPU}
    products = ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise")
    return {
        "attention_share": sum(time for name, time in spent.items() if "attention" in name) / sum(spent.values()),
        "products_share": sum(spent.get(name, 0) for name in products) / sum(spent.values()),
    }


def session(side, device, tokens, rows, context, new_tokens):
    """One run of one setting, as a generator that hands over after each measured piece; its last word is the result."""
    copies = [i % rows for i in range(len(tokens))]
    fed = tokens[copies]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    wait(device)
    started = time.perf_counter()
    cache = side.prefill(tokens[:rows, :context])
    wait(device)
    prefill_ms, step_ms = (time.perf_counter() - started) * 1e3, []
    if rows < len(tokens):
        side.copy(cache, copies)
    before = None if side.filter is None else cache.usage()
    yield None
    for t in range(context, context + new_tokens):
        started = time.perf_counter()
        side.step(cache, fed[:, t : t + 1])
        wait(device)
        step_ms.append((time.perf_counter() - started) * 1e3)
        yield None
    result = {"prefill_ms": prefill_ms, "step_ms": step_ms, "kv_read": 1.0, **side.figures(cache)}
    if side.filter is not None:
        read, dense_read = (cache.usage() - before)[:, 3:].sum(0).tolist()
        result["kv_read"] = read / dense_read
    if device.type == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    if side.filter is not None and not side.compiled:
        # the filter's share, on two steps of their own: the stopwatch makes the device wait
        side.clocked, side.filter_seconds = True, 0.0
        started = time.perf_counter()
        for t in range(context + new_tokens, context + new_tokens + 2):
            side.step(cache, fed[:, t : t + 1])
        wait(device)
        result["filter_share"] = side.filter_seconds / (time.perf_counter() - started)
        side.clocked = False
    yield result | profiled(side, cache, fed[:, -2:], device)


def run(sides, device, tokens, rows, context, new_tokens, repeat, bar):
    """All settings on the same tokens, `repeat` times: {name: [result of each repetition]}."""
    results: dict[str, list[dict]] = {side.name: [] for side in sides}
    for side in sides:
        if side.compiled:  # beforehand, on short texts: at this batch size, before and after the cache grows
            cache = side.prefill(tokens[:, :2])
            for t in range(BLOCK + 3):
                side.step(cache, tokens[:, t % tokens.shape[1], None])
    for _ in range(repeat):
        waiting = [(side.name, session(side, device, tokens, rows, context, new_tokens)) for side in sides]
        while waiting:
            name, current = waiting.pop(0)
            result = next(current)
            bar.update()
            if result is not None:
                results[name].append(result)
            elif device.type == "cuda":  # to the end before the next starts, so that the peak memory is its own
                waiting.insert(0, (name, current))
            else:
                waiting.append((name, current))
    return results


def summarise(results, batch, context, weights):
    """One table row for each setting: medians over repetitions, and the ratio to dense in the same run."""
    rows = []
    for name, runs in results.items():
        row = {"setting": name, "batch": batch, "context": context, "prefill_ms": statistics.median(r["prefill_ms"] for r in runs)}
        steps = [ms for r in runs for ms in r["step_ms"][1:] or r["step_ms"]]  # the first step warms up
        quartiles = statistics.quantiles(steps, n=4) if len(steps) > 1 else [steps[0]] * 3
        row |= {"step_ms": quartiles[1], "step_ms_quartiles": [quartiles[0], quartiles[2]]}
        row["tokens_per_second"] = batch / quartiles[1] * 1e3
        shares = ("filter_share", "attention_share", "products_share")
        for key in ("skipped", "cache_bytes", "live_bytes", "dense_bytes", "kv_held", "kv_read", "peak_bytes", *shares):
            if key in runs[0]:
                row[key] = statistics.median(r[key] for r in runs)
        row["bound"] = (weights + row["kv_read"] * row["dense_bytes"]) / (weights + row["dense_bytes"])
        rows.append(row)
    dense = rows[0]
    for row in rows:
        row["prefill_ratio"] = row["prefill_ms"] / dense["prefill_ms"]
        row["step_ratio"] = row["step_ms"] / dense["step_ms"]
    return rows


HEAD = f"{'setting':<22}{'prefill ms':>11}{'x dense':>8}{'step ms':>9}{'quartiles':>16}{'x dense':>8}{'bound':>7}{'tokens/s':>10}"
HEAD += f"{'cache MB':>10}{'skipped':>9}{'KV held':>9}{'KV read':>9}{'filter':>8}{'attention':>11}{'products':>10}{'peak GB':>9}"


def line(row):
    low, high = row["step_ms_quartiles"]
    share = f"{row['filter_share']:.1%}" if "filter_share" in row else "-"
    peak = f"{row['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in row else "-"
    return (
        f"{row['setting']:<22}{row['prefill_ms']:>11.1f}{row['prefill_ratio']:>8.3f}{row['step_ms']:>9.1f}"
        f"{f'{low:.1f}-{high:.1f}':>16}{row['step_ratio']:>8.3f}{row['bound']:>7.3f}{row['tokens_per_second']:>10.1f}"
        f"{row['cache_bytes'] / 1e6:>10.1f}{row['skipped']:>9.3f}{row['kv_held']:>9.3f}{row['kv_read']:>9.3f}{share:>8}"
        f"{row['attention_share']:>11.1%}{row['products_share']:>10.1%}{peak:>9}"
    )


def plot(rows, path):
    """Decode time and cache bytes against batch (against context if only that varies), a line for each setting."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, ScalarFormatter

    axis = "context" if len({row["context"] for row in rows}) > len({row["batch"] for row in rows}) else "batch"
    figure = Figure(figsize=(11, 4.5))
    panels = figure.subplots(1, 2)
    for key, label, scale, panel in (("step_ms", "decode, ms per step", 1, panels[0]), ("cache_bytes", "KV cache, MB", 1e6, panels[1])):
        for name in dict.fromkeys(row["setting"] for row in rows):
            points = sorted((row[axis], row[key] / scale) for row in rows if row["setting"] == name)
            panel.plot(*zip(*points), marker="o", label=name)
        unit = "batch (sequences)" if axis == "batch" else "context (tokens)"
        panel.set(xlabel=unit, ylabel=label)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        panel.set_xticks([p[0] for p in points])
        for ticks in (panel.xaxis, panel.yaxis):
            ticks.set_major_formatter(ScalarFormatter())
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].legend()
    other = "context" if axis == "batch" else "batch"
    figure.suptitle(f"{other} {', '.join(map(str, sorted({row[other] for row in rows})))}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def read_model(args, longest):
    """The model, and a stream of tokens for it of at least `longest`."""
    torch.manual_seed(args.seed)
    try:
        if args.shape:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else torch.device(args.device)
            dtype = {"auto": torch.bfloat16 if device.type == "cuda" else torch.float32}.get(args.dtype) or getattr(torch, args.dtype)
            model = random_model(args.shape, device, dtype)
            stream = torch.randint(0, model.config.vocab_size, (2 * longest + 997 * max(args.batch),))
        else:
            model, tokenizer = load(args.checkpoint, args.device, args.dtype, progress=sys.stderr.isatty())
            here = Path(__file__).resolve().parent
            files = [args.text] if args.text else [here / "README.md", *sorted(here.glob("*.py"))]
            stream = torch.tensor(tokenizer.encode("\n".join(map(read_text, files)), bos=False))
    except (CheckpointError, RuntimeError) as e:
        fail(e)
    if longest > model.config.max_positions:
        fail(f"--context and --new-tokens make {longest} tokens, more than the model's context of {model.config.max_positions}")
    if len(stream) < longest:
        fail(f"the text has {len(stream)} tokens, fewer than the {longest} that --context and --new-tokens ask for")
    return model, stream


def main(argv=None, given=None):
    args = given or read_arguments(argv)
    names, longest = args.preset or list(PRESETS), max(args.context) + args.new_tokens + 4
    filters = filters_from(args, names, args.prune, with_ratio=True)
    model, stream = read_model(args, longest)
    device, dtype = model.embed.weight.device, model.embed.weight.dtype
    compiled = args.compile and compile_decode(model)
    sides: list[Ours | Transformers] = [Ours(name, model, filter, compiled) for name, filter in [("dense", None), *filters]]
    if args.nothing_skipped:
        sides += [Ours("none skipped", model, FilterConfig(schedule="uniform"), compiled, none_skipped)]
    if args.vs:
        sides += [Transformers(checkpoint_folder(args.checkpoint), device, dtype)]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if not model.config.tied:  # of the embedding, a step reads a few rows only
        weights -= model.embed.weight.numel() * model.embed.weight.element_size()

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    title = f"{args.shape or args.checkpoint}; {name}; torch {torch.__version__}; {str(dtype)[6:]}; weights {weights / 1e9:.3f} GB"
    print(f"{title}\n{args.new_tokens} decode steps, {args.repeat} repetitions, ours {'compiled' if compiled else 'eager'}")
    table = []
    cases = [(batch, context) for batch in args.batch for context in args.context]
    pieces = (args.new_tokens + 2) * len(sides) * args.repeat
    for batch, context in cases:
        offsets = (torch.arange(batch) * 997) % (len(stream) - longest + 1)
        tokens = stream[offsets[:, None] + torch.arange(longest)]  # (B, longest)
        rows = min(args.distinct or batch, batch)
        with tqdm(total=pieces, desc=f"batch {batch}, context {context}", leave=False, unit="piece") as bar:
            try:
                results = run(sides, device, tokens, rows, context, args.new_tokens, args.repeat, bar)
            except torch.OutOfMemoryError:
                print(f"\nbatch {batch}, context {context}: out of memory", file=sys.stderr)
                continue
        copied = f" ({rows} rows prefilled and copied)" if rows < batch else ""
        print(f"\nbatch {batch}, context {context}{copied}\n{HEAD}")
        for row in summarise(results, batch, context, weights):
            print(line(row), flush=True)
            table.append(row)
        if args.json:  # after each case, so that an interrupted run keeps what it has
            Path(args.json).write_text(json.dumps({"settings": title, "command": sys.argv, "rows": table}, indent=1))
    if device.type == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(f"\nweights {weights / 1e6:.0f} MB; peak resident memory of the whole run {peak / 1e6:.0f} MB")
    if args.plot and table:
        plot(table, args.plot)


if __name__ == "__main__":
    as_process(main, None, given)
