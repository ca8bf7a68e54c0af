"""Time and memory of dense and filtered generation, side by side in one run.

    python bench.py [CHECKPOINT] --batch 1 8 --context 1024 --prune 0.5 --preset paper cache --vs transformers
    python bench.py --shape llama-2-13b --dtype bfloat16 --batch 1 32 128 --context 512     random weights, made on the device

Every setting gets the same weights and the same tokens: `context` tokens are prefilled, then each decode step is fed the
text's own next token, so the cache holds what it would hold in real use. The settings take turns, step by step on the
CPU, run by run on CUDA, so that a machine whose speed drifts treats them alike. Figures are medians. Prefill is timed twice, the
*first* and *again*; then come WARM steps that are not timed, so that the rest is compiled and captured. Scores of random weights
drift, so with --shape the verdict is drawn at each layer's ratio, after all of the filter's work.

What each column says stands in COLUMNS and MORE; it is printed before the tables, and by --help.
"""

import argparse
import gc
import json
import os
import resource
import statistics
import sys
import time
from pathlib import Path

from filter_config import PRESETS
from cli.arguments import Parser, add_filter_arguments, add_model_arguments, check_filter_arguments, share
from cli.process import N_RANKS, fail, run_command, single_process_only

from cli.report import check_output, read_text

#               vocab     C   L   H KVH    D    MLP     theta   eps  context  tied window
SIZES: dict[str, tuple] = {  # of published models, as ModelConfig takes them
    "llama-2-7b": (32000, 4096, 32, 32, 32, 128, 11008, 10000.0, 1e-5, 4096, False),
    "llama-2-13b": (32000, 5120, 40, 40, 40, 128, 13824, 10000.0, 1e-5, 4096, False),
    "llama-3-8b": (128256, 4096, 32, 32, 8, 128, 14336, 500000.0, 1e-5, 8192, False),
    "mistral-7b": (32000, 4096, 32, 32, 8, 128, 14336, 10000.0, 1e-5, 32768, False, 4096),
    "phi-4": (100352, 5120, 40, 40, 10, 128, 17920, 250000.0, 1e-5, 16384, False),
}
COLUMNS = (  # of a table, after the setting: title, width, what it says
    ("first ms", 10, "time of the first prefill of the first run"),
    ("again ms", 10, "time of a prefill once memory is taken and code is made"),
    ("x dense", 8, "again ms, over that of dense"),
    ("step ms", 10, "time of a decode step"),
    ("quartiles", 16, "a quarter of the steps was faster than the first, a quarter slower than the second, ms"),
    ("x dense", 8, "step ms, over that of dense"),
    ("x best", 8, "step ms, over that of the fastest dense one, ours or transformers'"),
    ("bound", 7, "bytes that a step reads, over dense's: x dense where memory single_process_only limits the speed"),
    ("GB/s", 8, "bytes that a step reads, all weights and KV read of the cache, over step ms"),
    ("tokens/s", 10, "decoded tokens of all rows together, in a second"),
    ("cache MB", 10, "memory that the cache takes at the end, the filter's own numbers included"),
    ("skipped", 9, "redundant (token, layer) pairs over all pairs, of the whole run"),
    ("KV held", 9, "keys and values in the cache at the end, over dense's"),
    ("KV read", 9, "keys and values that the measured steps read, over dense's"),
)
MORE = {  # columns that are there if they were measured: title, what it says
    "filter_share": ("filter", "share of a step's time that the filter takes"),
    "attention_share": ("attention", "share of a step's time that attention takes"),
    "products_share": ("products", "share of a step's time that the products with the weights take"),
    "peak_bytes": ("peak GB", "the most memory of the device that a run took"),
}
LEGEND = "columns (times are medians; a setting is a preset and its --prune):\n" + "\n".join(
    f"  {title:<11}{text}"
    for title, text in [*((title, text) for title, _, text in COLUMNS), *MORE.values()]
)


def flags() -> Parser:
    parser = Parser(
        description="Time and memory of dense and filtered generation, side by side.",
        epilog=LEGEND,
        formatter_class=argparse.RawDescriptionHelpFormatter,  # the legend's lines stay as they are
    )
    add_model_arguments(parser)
    parser.add_argument("--shape", choices=SIZES, help="random weights of this shape in place of a checkpoint")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text to feed (default: this project's own files; random with --shape)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], metavar="N", help="sequences side by side (default: 1 8)")
    parser.add_argument("--context", type=int, nargs="+", default=[512], metavar="N",
                        help="tokens in the cache when decoding starts (default: 512)")  # fmt: skip
    parser.add_argument("--new-tokens", type=int, default=16, metavar="N", help="decode steps that are measured (default: %(default)s)")
    parser.add_argument("--prune", type=share, nargs="+", default=[0.5], metavar="P",
                        help="shares of (token, layer) pairs to skip (default: 0.5); dense is always measured too")  # fmt: skip
    parser.add_argument("--nothing-skipped", action="store_true", help="add a filter that skips nothing after all: its own cost")
    parser.add_argument(
        "--compile", action="store_true", help="run decode through torch.compile, dense too; the filter's own share is then not measured"
    )
    parser.add_argument("--no-graph", action="store_true", help="on CUDA, do not capture decode steps and replay them")
    parser.add_argument("--profile", action="store_true", help="print what takes the time of a step of the first filtered setting")
    parser.add_argument("--vs", choices=["transformers"], help="add Hugging Face's model of the same checkpoint or shape")
    parser.add_argument("--distinct", type=int, metavar="N",
                        help="prefill N rows only and copy them to fill the batch: quicker; the prefill column is then theirs")  # fmt: skip
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="runs of each setting (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N",
                        help="of random weights and tokens (default: 0)")  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write all figures, after each batch and context")
    parser.add_argument("--plot", metavar="FILE.png", help="draw time and cache against batch or context (needs matplotlib)")
    add_filter_arguments(parser, several=True, default="all of them")
    return parser


def read_arguments(argv=None):
    args = flags().parse_args(argv)
    numbers = [*args.batch, *args.context, args.new_tokens, args.repeat, args.distinct or 1]
    if min(numbers) < 1:
        fail("--batch, --context, --new-tokens, --repeat and --distinct must be at least 1")
    check_filter_arguments(args)
    single_process_only(shape=args.shape, vs=args.vs, compile=args.compile)
    if not -(2**63) <= args.seed < 2**63:
        fail(f"--seed {args.seed}: must be a number of 64 bits")
    if args.json:
        check_output("--json", args.json)
    if args.plot:
        check_output("--plot", args.plot, (".png", ".pdf", ".svg"))
    return args


if __name__ == "__main__":
    given = run_command(read_arguments)  # before torch is imported, which takes seconds
    # torch's profiler, which reads this once, else writes its own steps to stderr, as "USDT: ..."
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")

from cli.arguments import compile_decode, filters_from

import torch
from tqdm import tqdm

from runtime import tensor_parallel as parallel
from loading.checkpoint_files import checkpoint_folder
from load_weights import CheckpointError, load
from model import ModelConfig, Transformer
from runtime.cuda_graph import CudaGraph
from filter_config import FilterConfig
from token_filter import token_filter

SHAPES = {name: ModelConfig(*sizes) for name, sizes in SIZES.items()}
WARM = 3  # steps: at the first it is compiled, at the second captured, the third is the first replay


def on(device, dtype, make):
    """What `make` makes, without gradients, with its weights made where and as they will be used."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return make().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)


def random_model(shape, device, dtype) -> Transformer:
    """A model of a published shape with random weights."""
    return on(device, dtype, lambda: Transformer(SHAPES[shape]))


def counted(n, noun) -> str:
    """A number and its noun, which has an s unless the number is 1."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free():
    """Nothing of what ran before takes memory of the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def none_skipped(*args):
    """The filter's work, and no gain from it: what it costs at worst."""
    redundant, score = token_filter(*args)
    return torch.zeros_like(redundant), score


def drawn(k, v, n_new, state, ratio, config):
    """All of the filter's work, and then a verdict drawn at the layer's ratio, as a hash of position, row and layer."""
    redundant, score = token_filter(k, v, n_new, state, ratio, config)
    step, row = torch.arange(k.shape[1], device=k.device), torch.arange(len(k), device=k.device)[:, None]
    position = (state.count - (k.shape[1] if n_new is None else n_new))[:, None] + step
    x = position * 40503 + row * 25747 + state.layer * 60493  # small, as a kernel made by a compiler wants them
    for _ in range(3):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    # the filter's own verdict has a part in it that is always 0, or a compiler would leave it out
    return ((x + (redundant & (position < 0))).double() / 2**32 < ratio) & (position >= max(config.warmup, 1)) & (score == score), score


class Ours:
    """One setting of our model; its parts can be timed where it is eager, neither compiled nor captured."""

    def __init__(self, name, model: Transformer, filter: FilterConfig | None, eager=True, criterion=token_filter):
        self.name, self.model, self.filter, self.eager, self.criterion = name, model, filter, eager, criterion
        self.clocked, self.filter_seconds, self.capture = False, 0.0, model.capture

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

    def prefill(self, tokens, length):
        self.model.capture = self.capture  # which a model without the memory for it switches off
        cache = self.model.new_cache(len(tokens), self.filter, self.timed_filter if self.eager else self.criterion, length=length)
        self.model.prefill(tokens.tolist(), cache)
        return cache

    def copy(self, cache, rows):
        cache.select(rows)

    def step(self, cache, tokens):
        self.model(tokens, cache, last=True)

    def figures(self, cache):
        pairs, redundant, held, _, _ = cache.usage().sum(0).tolist()
        dense = int(cache.seen.clamp(max=cache.window).sum()) * len(cache.layers)
        return {
            "skipped": redundant / pairs,
            "kv_held": held / dense,
            "cache_bytes": cache.nbytes(),
            "live_bytes": cache.live_bytes(),
            "dense_bytes": dense * cache.slot_bytes,
        }


class Transformers:
    """Hugging Face's model of the same checkpoint or shape, with scaled_dot_product_attention and its own cache."""

    name, filter = "transformers", None

    def __init__(self, folder, shape: ModelConfig | None, device, dtype):
        import transformers  # heavy, and only needed here

        if shape:
            kind, more = ("Mistral", {"sliding_window": shape.window}) if shape.window else ("Llama", {})
            config = getattr(transformers, kind + "Config")(
                vocab_size=shape.vocab_size, hidden_size=shape.width, intermediate_size=shape.mlp_width,
                num_hidden_layers=shape.n_layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
                max_position_embeddings=shape.max_positions, attn_implementation="sdpa", **more)  # fmt: skip
            model = on(device, dtype, lambda: getattr(transformers, kind + "ForCausalLM")(config).eval())
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        self.model, self.device, self.eager = model.to(device), device, device.type == "cpu"

    @torch.no_grad()
    def prefill(self, tokens, length):
        return self.model(tokens.to(self.device), use_cache=True, logits_to_keep=1).past_key_values

    def copy(self, cache, rows):
        cache.batch_select_indices(torch.tensor(rows, device=self.device))

    @torch.no_grad()
    def step(self, cache, tokens):
        self.model(tokens.to(self.device), past_key_values=cache, use_cache=True)

    def figures(self, cache):
        held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
        return {"skipped": 0.0, "kv_held": 1.0, "cache_bytes": held, "live_bytes": held, "dense_bytes": held}


def profiled(side, cache, tokens, device, show):
    """What attention and the products with the weights take of a decode step fed tokens (B, 1), by torch's profiler, where that is
    to be had: on the CPU, eager. show: prints what takes the time, operators, or kernels on CUDA.
    """
    with torch.profiler.profile() as profiler:
        side.step(cache, tokens)
        wait(device)
    kind, time_of = ("CUDA", "self_device_time_total") if device.type == "cuda" else ("CPU", "self_cpu_time_total")
    spent = {e.key: (getattr(e, time_of), e.count) for e in profiler.key_averages() if e.device_type.name == kind}
    total = sum(us for us, _ in spent.values()) or 1
    if show:
        print(f"\na decode step of {side.name}, {total / 1e3:.2f} ms\n{'ms':>9}{'share':>8}{'times':>7}  name")
        for name, (us, n) in sorted(spent.items(), key=lambda item: item[1], reverse=True)[:16]:
            print(f"{us / 1e3:>9.3f}{us / total:>8.1%}{n:>7}  {name[:100]}")
    if not side.eager or kind == "CUDA":
        return {}
    products = ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise")
    return {
        "attention_share": sum(us for name, (us, _) in spent.items() if "attention" in name) / total,
        "products_share": sum(spent[name][0] for name in products if name in spent) / total,
    }


def filter_share(side, cache, steps, device):
    """Of the time of steps of their own, as the stopwatch makes the device wait."""
    side.clocked, side.filter_seconds = True, 0.0
    started = time.perf_counter()
    for token in steps:
        side.step(cache, token)
    wait(device)
    side.clocked = False
    return side.filter_seconds / (time.perf_counter() - started)


def session(side, device, tokens, rows, context, new_tokens, profile=False):
    """One run of one setting, as a generator that hands over after each measured piece; its last word is the result."""
    copies, cache = [i % rows for i in range(len(tokens))], None
    prefills: list[float] = []
    step_ms: list[float] = []
    fed = tokens[copies].to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(2):
        cache = None  # so that there is one at a time
        wait(device)
        started = time.perf_counter()
        cache = side.prefill(tokens[:rows, :context], tokens.shape[1])
        wait(device)
        prefills.append((time.perf_counter() - started) * 1e3)
    if rows < len(tokens):
        side.copy(cache, copies)
    steps = fed[:, context:].split(1, dim=1)
    for token in steps[:WARM]:
        side.step(cache, token)
    before = cache.usage() if cache and side.filter else None
    yield None
    for token in steps[WARM : WARM + new_tokens]:
        wait(device)
        started = time.perf_counter()
        side.step(cache, token)
        wait(device)
        step_ms.append((time.perf_counter() - started) * 1e3)
        yield None
    result = {"first_prefill_ms": prefills[0], "prefill_ms": prefills[1], "step_ms": step_ms, "kv_read": 1.0, **side.figures(cache)}
    if cache and before is not None:
        read, dense_read = (cache.usage() - before)[:, 3:].sum(0).tolist()
        result["kv_read"] = read / dense_read
    if device.type == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    if side.filter is not None and side.eager:
        result["filter_share"] = filter_share(side, cache, steps[-2:], device)
    yield result | (profiled(side, cache, steps[-1], device, profile) if side.eager or profile else {})


def run(sides, device, tokens, rows, context, new_tokens, repeat, bar, profile=False):
    """All settings on the same tokens, `repeat` times: {name: [result of each repetition]}."""
    results: dict[str, list[dict]] = {side.name: [] for side in sides}
    shown = next((side for side in sides if side.filter), sides[0]) if profile else None
    for _ in range(repeat):
        waiting = [(side.name, session(side, device, tokens, rows, context, new_tokens, side is shown)) for side in sides]
        shown = None
        while waiting:
            name, current = waiting.pop(0)
            result = next(current)
            bar.update()
            if result is not None:
                results[name].append(result)
                del current
                free()
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
        row["first_prefill_ms"], steps = runs[0]["first_prefill_ms"], [ms for r in runs for ms in r["step_ms"]]
        quartiles = statistics.quantiles(steps, n=4) if len(steps) > 1 else [steps[0]] * 3
        row |= {"step_ms": quartiles[1], "step_ms_quartiles": [quartiles[0], quartiles[2]]}
        row["tokens_per_second"] = batch / quartiles[1] * 1e3
        shares = ("filter_share", "attention_share", "products_share")
        for key in ("skipped", "cache_bytes", "live_bytes", "dense_bytes", "kv_held", "kv_read", "peak_bytes", *shares):
            if key in runs[0]:
                row[key] = statistics.median(r[key] for r in runs)
        row["bytes_per_second"] = (weights + row["kv_read"] * row["dense_bytes"]) / row["step_ms"] * 1e3
        row["bound"] = (weights + row["kv_read"] * row["dense_bytes"]) / (weights + row["dense_bytes"])
        rows.append(row)
    dense, best = rows[0], min(row["step_ms"] for row in rows if row["setting"] in ("dense", "transformers"))
    for row in rows:
        row["prefill_ratio"] = row["prefill_ms"] / dense["prefill_ms"]
        row["step_ratio"], row["best_ratio"] = row["step_ms"] / dense["step_ms"], row["step_ms"] / best
    return rows


HEAD = f"{'setting':<18}" + "".join(f"{title:>{width}}" for title, width, _ in COLUMNS)


def line(row, more):
    low, high = row["step_ms_quartiles"]
    text = (
        f"{row['setting']:<18}{row['first_prefill_ms']:>10.1f}{row['prefill_ms']:>10.1f}{row['prefill_ratio']:>8.3f}{row['step_ms']:>10.2f}"
        f"{f'{low:.2f}-{high:.2f}':>16}{row['step_ratio']:>8.3f}{row['best_ratio']:>8.3f}{row['bound']:>7.3f}"
        f"{row['bytes_per_second'] / 1e9:>8.1f}{row['tokens_per_second']:>10.1f}"
        f"{row['cache_bytes'] / 1e6:>10.1f}{row['skipped']:>9.3f}{row['kv_held']:>9.3f}{row['kv_read']:>9.3f}"
    )
    for key in more:
        text += f"{'-' if key not in row else f'{row[key] / 1e9:.2f}' if key == 'peak_bytes' else f'{row[key]:.1%}':>10}"
    return text


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
        fail(
            f"the text is too short: --context and --new-tokens ask for {longest} tokens, "
            f"and it has {len(stream)}"
        )
    return model, stream


def settings(args, model, eager) -> list:
    """What is measured: dense, filtered, and what else was asked for."""
    filters = filters_from(args, args.preset or list(PRESETS), args.prune, with_ratio=True)
    criterion = drawn if args.shape else token_filter
    sides: list[Ours | Transformers] = [Ours(name, model, filter, eager, criterion) for name, filter in [("dense", None), *filters]]
    if args.nothing_skipped:
        sides += [Ours("none skipped", model, FilterConfig(schedule="uniform"), eager, none_skipped)]
    if args.vs:
        weight, folder = model.embed.weight, None if args.shape else checkpoint_folder(args.checkpoint)
        sides += [Transformers(folder, SHAPES.get(args.shape), weight.device, weight.dtype)]
    return sides


def measure(args, sides, device, tokens, context, weights) -> list[dict]:
    """One batch and context: its rows, printed; none where the memory is not enough."""
    batch, pieces = len(tokens), (args.new_tokens + 2) * len(sides) * args.repeat
    rows, case = min(args.distinct or batch, batch), f"batch {batch}, context {context}"
    with tqdm(total=pieces, desc=case, leave=False, unit="piece") as bar:
        try:
            results = run(sides, device, tokens, rows, context, args.new_tokens, args.repeat, bar, args.profile)
        except torch.OutOfMemoryError:
            results = None
    free()
    if results is None:
        print(f"\n{case}: out of memory", file=sys.stderr)
        return []
    table = summarise(results, batch, context, weights)
    more = [key for key in MORE if any(key in row for row in table)]
    copied = f" ({counted(rows, 'row')} prefilled and copied)" if rows < batch else ""
    print(f"\n{case}{copied}\n{HEAD}{''.join(f'{MORE[key][0]:>10}' for key in more)}")
    for row in table:
        print(line(row, more), flush=True)
    return table


def main(argv=None, given=None):
    args = given or read_arguments(argv)
    longest = max(args.context) + args.new_tokens + WARM + 2
    model, stream = read_model(args, longest)
    device, dtype = model.embed.weight.device, str(model.embed.weight.dtype)[6:]
    captured = device.type == "cuda" and not args.no_graph
    model.capture = CudaGraph if captured else None
    compiled = args.compile and compile_decode(model)
    sides = settings(args, model, eager=not compiled and not captured)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if not model.config.tied:  # of the embedding, a step reads a few rows only
        weights -= model.embed.weight.numel() * model.embed.weight.element_size()

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {counted(torch.get_num_threads(), 'thread')}"
    title = f"{args.shape or args.checkpoint}; {name}; torch {torch.__version__}; {dtype}; weights {weights / 1e9:.3f} GB"
    how = " and ".join(word for word, is_so in (("compiled", compiled), ("captured", captured)) if is_so) or "eager"
    how += ", verdicts drawn at the ratio" if args.shape else ""
    steps, runs = counted(args.new_tokens, "decode step"), counted(args.repeat, "repetition")
    print(f"{title}\n{steps}, {runs}, ours {how}\n\n{LEGEND}")
    table: list[dict] = []
    for batch, context in [(batch, context) for batch in args.batch for context in args.context]:
        offsets = (torch.arange(batch) * 997) % (len(stream) - longest + 1)
        tokens = stream[offsets[:, None] + torch.arange(context + longest - max(args.context))]  # (B, what this case needs)
        table += measure(args, sides, device, tokens, context, weights)
        if N_RANKS > 1:
            ms = parallel.seconds_of_sums(model, batch) * 1e3
            print(f"{N_RANKS} processes, each with {weights / 1e9:.3f} GB of weights; their sums in a dense step, timed single_process_only: {ms:.2f} ms")
        if args.json:  # after each case, so that an interrupted run keeps what it has
            Path(args.json).write_text(json.dumps({"settings": title, "command": sys.argv, "rows": table}, indent=1))
    if device.type == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(f"\nweights {weights / 1e6:.0f} MB; peak resident memory of the whole run {peak / 1e6:.0f} MB")
    if args.plot and table:
        plot(table, args.plot)


if __name__ == "__main__":
    run_command(main, None, given)
