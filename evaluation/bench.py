"""Time and memory of dense and filtered generation, side by side in one run.

    python -m evaluation.bench [CHECKPOINT] --batch 1 8 --context 1024 --prune 0.5 --preset cache
    python -m evaluation.bench --shape llama-2-13b --dtype bfloat16 --batch 1 32 128 --context 512

The first compares with dense on a checkpoint (add --vs transformers for Hugging Face's model), the
second on random weights of a published shape, made on the device.

Every setting gets the same weights and the same tokens: `context` tokens are prefilled, then each
decode step is fed the text's own next token, so the cache holds what it would hold in real use. How
settings take turns is in timing.py. Figures are medians. With --shape decisions are drawn at each
layer's ratio, after all of the filter's work, as scores of random weights drift.

What each column says stands in COLUMNS and MORE_COLUMNS. It is printed before the tables, and by
--help.
"""

import argparse
import json
import os
import resource
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from cli.arguments import (
    Parser,
    add_filter_arguments,
    add_model_arguments,
    check_filter_arguments,
    compile_decode,
    filters_from,
    share,
)
from cli.process import N_RANKS, fail, run_command, single_process_only
from cli.report import check_output, read_text
from evaluation.timing import (
    EXTRA_STEPS,
    WARM_STEPS,
    Case,
    OurSetting,
    Setting,
    TransformersSetting,
    drawn_at_ratio,
    free_memory,
    make_on,
    none_redundant,
    run_in_turn,
)
from filter_config import PRESETS, FilterConfig
from load_weights import CheckpointError, load
from loading.checkpoint_files import checkpoint_folder
from model import ModelConfig, Transformer
from runtime.cuda_graph import CudaGraph, record_decode
from runtime.tensor_parallel import seconds_of_sums
from token_filter import token_filter

ROOT = Path(__file__).resolve().parent.parent

# Published models. The columns are ModelConfig's first fields: vocab_size, width, n_layers, heads,
# kv_heads, head_dim, mlp_width, rope_theta, norm_eps, max_positions, tied, window.
SHAPES: dict[str, ModelConfig] = {
    "llama-2-7b": ModelConfig(32000, 4096, 32, 32, 32, 128, 11008, 1e4, 1e-5, 4096, False),
    "llama-2-13b": ModelConfig(32000, 5120, 40, 40, 40, 128, 13824, 1e4, 1e-5, 4096, False),
    "llama-3-8b": ModelConfig(128256, 4096, 32, 32, 8, 128, 14336, 5e5, 1e-5, 8192, False),
    "mistral-7b": ModelConfig(32000, 4096, 32, 32, 8, 128, 14336, 1e4, 1e-5, 32768, False, 4096),
    "phi-4": ModelConfig(100352, 5120, 40, 40, 10, 128, 17920, 2.5e5, 1e-5, 16384, False),
}

# ---------------------------------------------------------------------------------- the table


@dataclass
class Column:
    title: str
    width: int
    key: str  # of a row that summarise() makes
    text: Callable  # of the value
    meaning: str

    def cell(self, row) -> str:
        """In its width. "-" where the row has no such value."""
        text = self.text(row[self.key]) if self.key in row else "-"
        return f"{text:>{self.width}}"


one_digit = "{:.1f}".format
two_digits = "{:.2f}".format
three_digits = "{:.3f}".format
percent = "{:.1%}".format


def megabytes(n) -> str:
    return f"{n / 1e6:.1f}"


def gigabytes(n) -> str:
    return f"{n / 1e9:.2f}"


def gigabytes_per_second(n) -> str:
    return f"{n / 1e9:.1f}"


def span(quartiles) -> str:
    return f"{quartiles[0]:.2f}-{quartiles[1]:.2f}"


COLUMNS = (
    Column("first ms", 10, "first_prefill_ms", one_digit,
           "time of the first prefill of the first run"),
    Column("again ms", 10, "prefill_ms", one_digit,
           "time of a prefill once memory is taken and code is made"),
    Column("x dense", 8, "prefill_ratio", three_digits,
           "again ms, over that of dense"),
    Column("step ms", 10, "step_ms", two_digits,
           "time of a decode step"),
    Column("quartiles", 16, "step_ms_quartiles", span,
           "a quarter of the steps was faster than the first, a quarter slower than the other, ms"),
    Column("x dense", 8, "step_ratio", three_digits,
           "step ms, over that of dense"),
    Column("x best", 8, "best_ratio", three_digits,
           "step ms, over that of the fastest dense one, ours or transformers'"),
    Column("bound", 7, "bound", three_digits,
           "bytes that a step reads, over dense's: x dense where memory alone limits the speed"),
    Column("GB/s", 8, "bytes_per_second", gigabytes_per_second,
           "bytes that a step reads, all weights and KV read of the cache, over step ms"),
    Column("tokens/s", 10, "tokens_per_second", one_digit,
           "decoded tokens of all rows together, in a second"),
    Column("cache MB", 10, "cache_bytes", megabytes,
           "memory that the cache takes at the end, the filter's own numbers included"),
    Column("skipped", 9, "skipped", three_digits,
           "redundant (token, layer) pairs over all pairs, of the whole run"),
    Column("KV held", 9, "kv_held", three_digits,
           "keys and values in the cache at the end, over dense's"),
    Column("KV read", 9, "kv_read", three_digits,
           "keys and values that the measured steps read, over dense's"),
)  # fmt: skip
# Columns that are there if one of the rows has them.
MORE_COLUMNS = (
    Column("filter", 10, "filter_share", percent,
           "share of a step's time that the filter takes"),
    Column("attention", 10, "attention_share", percent,
           "share of a step's time that attention takes"),
    Column("products", 10, "products_share", percent,
           "share of a step's time that the products with the weights take"),
    Column("peak GB", 10, "peak_bytes", gigabytes,
           "the most memory of the device that a run took"),
)  # fmt: skip
LEGEND = "columns (times are medians; a setting is a preset and its --prune):\n" + "\n".join(
    f"  {column.title:<11}{column.meaning}" for column in (*COLUMNS, *MORE_COLUMNS)
)


def print_table(rows):
    more = [column for column in MORE_COLUMNS if any(column.key in row for row in rows)]
    columns = (*COLUMNS, *more)
    print(f"{'setting':<18}" + "".join(f"{column.title:>{column.width}}" for column in columns))
    for row in rows:
        cells = "".join(column.cell(row) for column in columns)
        print(f"{row['setting']:<18}{cells}", flush=True)


def summarise(results, case: Case, weight_bytes) -> list[dict]:
    """A row for each setting: medians over its runs, and their ratios to dense's, the first.

    results: of run_in_turn(); weight_bytes: of the weights that a step reads.
    """
    rows = [
        {"setting": name, **medians(runs, case, weight_bytes)} for name, runs in results.items()
    ]
    dense = rows[0]
    best = min(row["step_ms"] for row in rows if row["setting"] in ("dense", "transformers"))
    for row in rows:
        row["prefill_ratio"] = row["prefill_ms"] / dense["prefill_ms"]
        row["step_ratio"] = row["step_ms"] / dense["step_ms"]
        row["best_ratio"] = row["step_ms"] / best
    return rows


def medians(runs, case: Case, weight_bytes) -> dict:
    """The figures of several runs of one setting as one."""
    step_ms = [ms for run in runs for ms in run["step_ms"]]
    quartiles = [step_ms[0]] * 3
    if len(step_ms) > 1:
        quartiles = statistics.quantiles(step_ms, n=4)
    lower, median, upper = quartiles

    row = {"batch": len(case.tokens), "context": case.context}
    for key in runs[0]:
        if key != "step_ms":
            row[key] = statistics.median(run[key] for run in runs)
    row["first_prefill_ms"] = runs[0]["first_prefill_ms"]
    row["step_ms"] = median
    row["step_ms_quartiles"] = [lower, upper]
    row["tokens_per_second"] = len(case.tokens) / median * 1e3
    step_bytes = weight_bytes + row["kv_read"] * row["dense_bytes"]
    row["bytes_per_second"] = step_bytes / median * 1e3
    row["bound"] = step_bytes / (weight_bytes + row["dense_bytes"])
    return row


def plot(rows, path):
    """Decode time and cache bytes against batch, or context if that varies more often."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, ScalarFormatter

    n_batches = len({row["batch"] for row in rows})
    n_contexts = len({row["context"] for row in rows})
    if n_contexts > n_batches:
        axis, other, label = "context", "batch", "context (tokens)"
    else:
        axis, other, label = "batch", "context", "batch (sequences)"
    figure = Figure(figsize=(11, 4.5))
    times, caches = figure.subplots(1, 2)
    times.set_ylabel("decode, ms per step")
    caches.set_ylabel("KV cache, MB")
    for name in dict.fromkeys(row["setting"] for row in rows):
        of_setting = sorted(
            (row for row in rows if row["setting"] == name), key=lambda row: row[axis]
        )
        x = [row[axis] for row in of_setting]
        times.plot(x, [row["step_ms"] for row in of_setting], marker="o", label=name)
        caches.plot(x, [row["cache_bytes"] / 1e6 for row in of_setting], marker="o", label=name)
    for panel in (times, caches):
        panel.set_xlabel(label)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(sorted({row[axis] for row in rows}))
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.yaxis.set_major_formatter(ScalarFormatter())
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    times.legend()
    others = sorted({row[other] for row in rows})
    figure.suptitle(f"{other} {', '.join(map(str, others))}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


# ---------------------------------------------------------------------------- the command line


def make_parser() -> Parser:
    parser = Parser(
        description="Time and memory of dense and filtered generation, side by side.",
        epilog=LEGEND,
        formatter_class=argparse.RawDescriptionHelpFormatter,  # the legend's lines stay as they are
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--shape", choices=SHAPES, help="random weights of this shape in place of a checkpoint"
    )
    parser.add_argument(
        "--text",
        metavar="FILE",
        help="UTF-8 text to feed (default: this project's own files; random with --shape)",
    )
    parser.add_argument(
        "--batch",
        type=int,
        nargs="+",
        default=[1, 8],
        metavar="N",
        help="sequences side by side (default: 1 8)",
    )
    parser.add_argument(
        "--context",
        type=int,
        nargs="+",
        default=[512],
        metavar="N",
        help="tokens in the cache when decoding starts (default: 512)",
    )
    parser.add_argument(
        "--new-tokens",
        type=int,
        default=16,
        metavar="N",
        help="decode steps that are measured (default: %(default)s)",
    )
    parser.add_argument(
        "--prune",
        type=share,
        nargs="+",
        default=[0.5],
        metavar="P",
        help="shares of (token, layer) pairs to skip (default: 0.5); dense is always measured too",
    )
    parser.add_argument(
        "--nothing-skipped",
        action="store_true",
        help="add a filter that skips nothing after all: its own cost",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="run decode through torch.compile, dense too; the filter's own share is then not "
        "measured",
    )
    parser.add_argument(
        "--no-graph",
        action="store_true",
        help="on CUDA, do not capture decode steps and replay them",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="print what takes the time of a step of the first filtered setting",
    )
    parser.add_argument(
        "--vs",
        choices=["transformers"],
        help="add Hugging Face's model of the same checkpoint or shape",
    )
    parser.add_argument(
        "--distinct",
        type=int,
        metavar="N",
        help="prefill N rows only and copy them to fill the batch: quicker; the prefill column is "
        "then theirs",
    )
    parser.add_argument(
        "--repeat",
        type=int,
        default=3,
        metavar="N",
        help="runs of each setting (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of random weights and tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write all figures, after each batch and context"
    )
    parser.add_argument(
        "--plot",
        metavar="FILE.png",
        help="draw time and cache against batch or context (needs matplotlib)",
    )
    add_filter_arguments(parser, several=True, default="all of them")
    return parser


def read_arguments(argv=None):
    """The arguments. Fails in one line where they make no sense."""
    args = make_parser().parse_args(argv)
    distinct = 1 if args.distinct is None else args.distinct
    if min(*args.batch, *args.context, args.new_tokens, args.repeat, distinct) < 1:
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


def load_model_and_text(args, longest) -> tuple[Transformer, torch.Tensor]:
    """The model, and ids (N,) of a text for it, N >= longest. Fails where there are none."""
    torch.manual_seed(args.seed)
    try:
        if args.shape:
            model = random_model(args)
            # Rows begin 997 tokens apart.
            n_tokens = 2 * longest + 997 * max(args.batch)
            ids = torch.randint(0, model.config.vocab_size, (n_tokens,))
        else:
            model, tokenizer = load(
                args.checkpoint, args.device, args.dtype, progress=sys.stderr.isatty()
            )
            files = [args.text] if args.text else [ROOT / "README.md", *sorted(ROOT.glob("*.py"))]
            text = "\n".join(read_text(file) for file in files)
            ids = torch.tensor(tokenizer.encode(text, bos=False))
    except (CheckpointError, RuntimeError, AssertionError) as error:
        fail(error)

    context = model.config.max_positions
    if longest > context:
        fail(
            f"--context and --new-tokens make {longest} tokens, "
            f"more than the model's context of {context}"
        )
    if len(ids) < longest:
        fail(
            f"the text is too short: --context and --new-tokens ask for {longest} tokens, "
            f"and it has {len(ids)}"
        )
    return model, ids


def random_model(args) -> Transformer:
    """A model of the shape --shape, with random weights."""
    device_name = args.device
    if device_name == "auto":
        device_name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device_name)
    if args.dtype != "auto":
        dtype = getattr(torch, args.dtype)
    else:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return make_on(device, dtype, lambda: Transformer(SHAPES[args.shape]))


def make_settings(args, model: Transformer, eager, record) -> list[Setting]:
    """What is measured: dense, filtered, and what else was asked for."""
    filter_fn = drawn_at_ratio if args.shape else token_filter
    filters = filters_from(args, args.preset or list(PRESETS), args.prune, with_ratio=True)
    settings: list[Setting] = [OurSetting("dense", model, None, filter_fn, eager, record)]
    for label, filter in filters:
        settings.append(OurSetting(label, model, filter, filter_fn, eager, record))
    if args.nothing_skipped:
        uniform = FilterConfig(schedule="uniform")
        settings.append(OurSetting("none skipped", model, uniform, none_redundant, eager, record))
    if args.vs:
        weight = model.embed.weight
        shape = SHAPES[args.shape] if args.shape else None
        folder = None if args.shape else checkpoint_folder(args.checkpoint)
        settings.append(TransformersSetting(folder, shape, weight.device, weight.dtype))
    return settings


def counted(n, noun) -> str:
    """A number and its noun, which has an s unless the number is 1."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def measure(args, settings, case: Case, weight_bytes) -> list[dict]:
    """The rows of one batch and context, which are printed; none where the memory is not enough."""
    batch = len(case.tokens)
    title = f"batch {batch}, context {case.context}"
    n_pieces = (args.new_tokens + 2) * len(settings) * args.repeat
    results = None
    with tqdm(total=n_pieces, desc=title, leave=False, unit="piece", disable=None) as bar:
        try:
            results = run_in_turn(settings, case, args.repeat, bar, args.profile)
        except torch.OutOfMemoryError:
            pass  # freed below, when nothing holds it any more
    free_memory()
    if results is None:
        print(f"\n{title}: out of memory", file=sys.stderr)
        return []
    rows = summarise(results, case, weight_bytes)
    if case.distinct < batch:
        title += f" ({counted(case.distinct, 'row')} prefilled and copied)"
    print(f"\n{title}")
    print_table(rows)
    return rows


def bytes_of_weights(model: Transformer) -> int:
    """Of the weights that a decode step reads: of an untied embedding it reads a few rows only."""
    n_bytes = sum(p.nbytes for p in model.parameters())
    if not model.config.tied:
        n_bytes -= model.embed.weight.nbytes
    return n_bytes


def describe(args, model: Transformer, weight_bytes) -> str:
    """What is measured, and on what, in a line."""
    weight = model.embed.weight
    if weight.device.type == "cuda":
        device = torch.cuda.get_device_name(weight.device)
    else:
        device = f"CPU, {counted(torch.get_num_threads(), 'thread')}"
    return (
        f"{args.shape or args.checkpoint}; {device}; torch {torch.__version__}; "
        f"{str(weight.dtype)[6:]}; weights {weight_bytes / 1e9:.3f} GB"
    )


def main(argv=None):
    args = read_arguments(argv)
    # Torch's profiler reads it when it is first used. It would write its own steps to stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    n_steps = WARM_STEPS + args.new_tokens + EXTRA_STEPS
    longest = max(args.context) + n_steps
    model, ids = load_model_and_text(args, longest)
    device = model.embed.weight.device

    # How our model decodes.
    ways = []
    record = None
    if args.compile and compile_decode(model):
        ways.append("compiled")
    if device.type == "cuda" and not args.no_graph:
        ways.append("captured")
        record = CudaGraph
    record_decode(model, record)
    settings = make_settings(args, model, eager=not ways, record=record)

    weight_bytes = bytes_of_weights(model)
    title = describe(args, model, weight_bytes)
    how = " and ".join(ways) or "eager"
    if args.shape:
        how += ", verdicts drawn at the ratio"
    steps = counted(args.new_tokens, "decode step")
    repetitions = counted(args.repeat, "repetition")
    print(f"{title}\n{steps}, {repetitions}, ours {how}\n\n{LEGEND}")

    rows: list[dict] = []
    for batch in args.batch:
        for context in args.context:
            first = (torch.arange(batch) * 997) % (len(ids) - longest + 1)
            tokens = ids[first[:, None] + torch.arange(context + n_steps)]
            distinct = min(args.distinct or batch, batch)
            case = Case(tokens, context, args.new_tokens, distinct, device)
            rows += measure(args, settings, case, weight_bytes)
            if N_RANKS > 1:
                ms = seconds_of_sums(model, batch) * 1e3
                print(
                    f"{N_RANKS} processes, each with {weight_bytes / 1e9:.3f} GB of weights; "
                    f"their sums in a dense step, timed alone: {ms:.2f} ms"
                )
            if args.json:  # after each case, so that an interrupted run keeps what it has
                table = {"settings": title, "command": sys.argv, "rows": rows}
                Path(args.json).write_text(json.dumps(table, indent=1))
    if device.type == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(
            f"\nweights {weight_bytes / 1e6:.0f} MB; "
            f"peak resident memory of the whole run {peak / 1e6:.0f} MB"
        )
    if args.plot and rows:
        plot(rows, args.plot)


if __name__ == "__main__":
    run_command(main)
