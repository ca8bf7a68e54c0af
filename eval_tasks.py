"""Zero-shot and few-shot tasks through EleutherAI's lm-evaluation-harness, dense against filtered.

    python eval_tasks.py [CHECKPOINT] --suite commonsense --prune 0 0.2 0.5 --preset paper cache --limit 100
    python eval_tasks.py --tasks common_sense --num-fewshot 5          the questions in tasks/, no download

Needs `pip install -r requirements-extra.txt`. The harness knows the tasks and the metrics; this file gives it the model.
Every (context, continuation) is scored as if alone, from an empty cache: what shares a context shares its prefill, which
changes nothing, because filtering is causal, chunk-free and batch-invariant.
"""

import logging
import math
import os
import random
from collections import defaultdict
from dataclasses import asdict
from functools import partial
from itertools import groupby
from pathlib import Path

from command_line import Parser, add_filter_arguments, add_model_arguments, as_process, fail, filter_from, overflow, print_json

import torch
import torch.nn.functional as F
from tqdm import tqdm

from generate import sample
from load_weights import CheckpointError, Tokenizer, load
from model import Transformer
from token_filter import FilterConfig

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when lm_eval is imported: data sets come from this machine only
try:
    import datasets
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as e:
    if __name__ != "__main__":
        raise
    fail(f"{e}: the harness is an extra, pip install -r requirements-extra.txt")

SUITES = {
    "commonsense": ["boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"],
    "mmlu": ["mmlu"],
    "wikitext": ["wikitext"],
}
AVERAGED = ("acc", "acc_norm", "exact_match")  # metrics that mean the same on every task
GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}  # what generate_until understands


# ------------------------------------------------------------------------------------------- the harness's model


def batches(pairs, size):
    """Cut pairs (context, continuation) into lists of at most `size` indices, those of one context together if they fit.

    Longest first, so that memory runs out early if at all, and rows of a batch are of similar length.
    """
    batch: list[int] = []
    order = sorted(range(len(pairs)), key=lambda i: (-len(pairs[i][0]), pairs[i][0], -len(pairs[i][1])))
    for _, same in groupby(order, key=lambda i: pairs[i][0]):
        group = list(same)
        if batch and len(batch) + len(group) > size:
            yield batch
            batch = []
        batch += group
        while len(batch) > size:
            yield batch[:size]
            batch = batch[size:]
    if batch:
        yield batch


def score(model: Transformer, pairs, filter: FilterConfig | None, chunk=128):
    """Score pairs (context, continuation) of token tuples, none empty, each from an empty cache, as one batch.

    Returns for each: sum of log p(token | all before it) over the continuation, in nats; whether every token of it is
    the likeliest; the row of cache.usage(), of all tokens but the last, which is only predicted. `chunk` bounds the
    memory the logits take. Raises ValueError beyond the model's context, FloatingPointError where logits are not finite.
    """
    contexts = list(dict.fromkeys(context for context, _ in pairs))
    fork = [contexts.index(context) for context, _ in pairs]
    cache = model.new_cache(len(contexts), filter)
    logits = model.prefill([list(context) for context in contexts], cache)[fork][:, None]  # (B, 1, V)
    cache.select(fork)

    n = torch.tensor([len(continuation) for _, continuation in pairs])
    targets = torch.nn.utils.rnn.pad_sequence([torch.tensor(c) for _, c in pairs], batch_first=True)  # (B, T)
    nll, greedy, done = torch.zeros(len(pairs), dtype=torch.float64), torch.ones(len(pairs), dtype=torch.bool), 0
    while True:
        target = targets[:, done : done + logits.shape[1]]  # what these logits predict
        pad = torch.arange(done, done + target.shape[1]) >= n[:, None]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
        losses = F.cross_entropy(logits, target.flatten().to(logits.device), reduction="none").cpu().view(target.shape)
        nll += losses.double().masked_fill(pad, 0).sum(1)
        if not nll.isfinite().all():
            context, continuation = pairs[int(nll.isfinite().int().argmin())]
            raise FloatingPointError(overflow(model, [*context, *continuation], filter))
        greedy &= ((logits.argmax(-1).cpu().view(target.shape) == target) | pad).all(1)
        done += target.shape[1]
        if done == targets.shape[1]:
            break
        logits = model(targets[:, done - 1 : -1][:, :chunk], cache, (n - done).clamp(0, chunk))
    return list(zip((-nll).tolist(), greedy.tolist(), cache.usage().tolist()))


class FilteredLM(TemplateLM):
    """A Transformer and its Tokenizer as the harness wants a model.

    `batch` is how many continuations are scored, or texts continued, at a time. `used[task]` lists what
    cache.usage() says of every text scored or continued for that task, a shared context counted for each.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, filter: FilterConfig | None = None, batch=8, seed=0, title=""):
        super().__init__()
        self.model, self.tokenizer, self.filter = model, tokenizer, filter
        self.batch, self.seed, self.title = batch, seed, title
        self.context = model.config.max_positions
        self.used: dict[str, list[list[int]]] = defaultdict(list)

    @property
    def eot_token_id(self):
        return min(self.tokenizer.eos_ids)

    @property
    def prefix_token_id(self):
        """What an empty context becomes: BOS, or else the end of another text."""
        return self.eot_token_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def tokenizer_name(self):
        return str(self.tokenizer.path)

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        text = self.tokenizer.chat_text(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()  # a turn that is begun and goes on: without what would end it
        return text[: text.rindex(last) + len(last)]

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        """Ids; special tokens written out in the string count as such; no second BOS in front of one."""
        ids = self.tokenizer.encode(string, bos=False, parse_special=True)
        if add_special_tokens is False or ids[:1] == [self.tokenizer.bos_id]:
            return ids
        return self.tokenizer.encode(string, parse_special=True)

    def score_all(self, requests):
        """score() for (context ids, continuation ids) of any number and length, truncated from the left as need be."""
        pairs = []
        for context, continuation in requests:
            if not 0 < len(continuation) <= self.context:
                raise ValueError(f"a continuation has {len(continuation)} tokens, not 1 to {self.context}, the model's context")
            ids = (*context, *continuation)[-(self.context + 1) :]
            pairs.append((ids[: -len(continuation)], ids[-len(continuation) :]))
        scored: dict[int, tuple] = {}
        with tqdm(total=len(pairs), desc=self.title, unit=" texts", leave=False) as bar:
            for batch in batches(pairs, self.batch):
                scored.update(zip(batch, score(self.model, [pairs[i] for i in batch], self.filter)))
                bar.update(len(batch))
        return [scored[i] for i in range(len(pairs))]

    def _loglikelihood_tokens(self, requests, **kwargs):
        self._latest = self.score_all([(context, continuation) for _, context, continuation in requests])
        return [(logprob, greedy) for logprob, greedy, _ in self._latest]

    def loglikelihood(self, requests, disable_tqdm=False):
        answers = super().loglikelihood(requests, disable_tqdm=True)
        for request, (_, _, used) in zip(requests, self._latest):
            self.used[request.task_name].append(used)
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Log-probability of whole texts, in windows as long as the model's context that do not overlap."""
        windows, owner = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.context, context_len=1):
                windows.append(make_disjoint_window(window))
                owner.append(i)
        totals = [0.0] * len(requests)
        for i, (logprob, _, used) in zip(owner, self.score_all(windows)):
            totals[i] += logprob
            self.used[requests[i].task_name].append(used)
        return totals

    def generate_until(self, requests, disable_tqdm=False):
        """Texts that continue the contexts, each cut before the first of its stop strings.

        Greedy, unless the task asks for sampling. Raises ValueError for generation settings that are not known here.
        """
        prompts, options, texts = [], [], [""] * len(requests)
        for request in requests:
            context, given = request.args
            option = normalize_gen_kwargs(given, default_max_gen_toks=256)
            room = self.context - option["max_gen_toks"]
            if set(option) - GENERATION or room < 1:
                raise ValueError(f"{request.task_name}: cannot generate with {given} in a context of {self.context} tokens")
            prompts.append(self.tok_encode(context)[-room:] or [self.prefix_token_id])
            options.append({"temperature": 0.0, "top_k": 0, "top_p": 1.0, **option})

        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        with tqdm(total=len(prompts), desc=self.title, unit=" texts", leave=False) as bar:
            for start in range(0, len(order), self.batch):
                rows, made = order[start : start + self.batch], 0
                streams = {i: self.tokenizer.stream() for i in rows}
                rngs = {i: torch.Generator().manual_seed(self.seed + i) for i in rows}
                cache = self.model.new_cache(len(rows), self.filter)
                logits = self.model.prefill([prompts[i] for i in rows], cache)
                while rows:
                    stay, tokens, usage, made = [], [], cache.usage().tolist(), made + 1
                    for b, i in enumerate(rows):
                        option = options[i]
                        if not logits[b].isfinite().all():
                            raise FloatingPointError(overflow(self.model, prompts[i], self.filter))
                        token = sample(logits[b], option["temperature"], option["top_k"], option["top_p"], rngs[i])
                        texts[i] += streams[i].push(token)
                        ended = token in self.tokenizer.eos_ids or made == option["max_gen_toks"]
                        if ended or any(stop in texts[i] for stop in option["until"] if stop):
                            texts[i] += streams[i].flush()
                            self.used[requests[i].task_name].append(usage[b])
                            bar.update()
                        else:
                            stay.append(b)
                            tokens.append(token)
                    cache.select(stay)
                    rows = [rows[b] for b in stay]
                    if rows:
                        logits = self.model(torch.tensor(tokens)[:, None], cache, last=True)
        for i, option in enumerate(options):
            for stop in filter(None, option["until"]):
                texts[i] = texts[i].split(stop)[0]
        return texts


# ------------------------------------------------------------------------------------------------ the command line


def load_tasks(names, include_path):
    """What the harness loads for these names, {"tasks": {name: Task}, "groups": {name: Group}}, and the lines to report:
    {name of a group or task: its tasks}. Exits with one line if a task cannot be had.
    """
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):  # the harness's own are thousands of files to read
        manager = TaskManager(include_path=include_path)
    loaded: dict[str, dict] = {"tasks": {}, "groups": {}}
    lines: dict[str, list[str]] = {}
    for name in names:
        try:
            found = manager.load([name])
        except KeyError:
            fail(f"task {name}: neither the harness nor {' nor '.join(include_path)} has it")
        except Exception as e:  # noqa: BLE001 (whatever a data set's loading raises)
            local = isinstance(e, FileNotFoundError) and str(e).startswith("Unable to find '/")
            hint = "is the path in its task file right?" if local else "to download them, run once with HF_HUB_OFFLINE=0"
            fail(f"task {name}: its data cannot be loaded: {e}; {hint}")
        loaded["tasks"].update(found["tasks"])
        loaded["groups"].update(found["groups"])
        lines.update({name: list(found["tasks"])} if name in found["groups"] else {task: [task] for task in found["tasks"]})
    return loaded, lines


def summarise(results, lm: FilteredLM, lines):
    """The harness's results of one setting: {name: {"metrics": {metric: (value, stderr)}, skip ratio and lengths}}.

    With several tasks, "average" is over all that report a metric ("acc of 7": over 7), its stderr as of independent tasks.
    """
    table: dict[str, dict] = {}
    for name, parts in lines.items():
        metrics = {}
        for key, value in results["results"][name].items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr"):
                stderr = results["results"][name].get(f"{metric}_stderr,{kind}")
                label = metric if kind == "none" else f"{metric}, {kind}"
                metrics[label] = (value, stderr if isinstance(stderr, float) and math.isfinite(stderr) else None)
        table[name] = {"metrics": metrics, "used": [text for part in parts for text in lm.used[part]]}
    if len(table) > 1:
        averages = {}
        for metric in AVERAGED:
            having = [row["metrics"][metric] for row in table.values() if metric in row["metrics"]]
            if len(having) > 1:
                mean = sum(value for value, _ in having) / len(having)
                known = all(stderr is not None for _, stderr in having)
                error = math.hypot(*(stderr for _, stderr in having)) / len(having) if known else None
                averages[f"{metric} of {len(having)}"] = (mean, error)
        table["average"] = {"metrics": averages, "used": [text for row in table.values() for text in row["used"]]}
    for row in table.values():
        usage = torch.tensor(row.pop("used"))  # (texts, 5)
        pairs, redundant, held, read, dense_read = usage.sum(0).tolist()
        lengths = (usage[:, 0] // lm.model.config.n_layers).tolist()
        row["texts"], row["longest"] = len(lengths), max(lengths)
        row |= {"skip_ratio": redundant / pairs, "kv_held": held / pairs, "kv_read": read / dense_read}
        row["unfiltered"] = sum(n <= max(lm.filter.warmup, 1) for n in lengths) if lm.filter else len(lengths)
    return table


def print_table(settings):
    """One line per task, metric and setting: [(title, summarise()'s table)], the dense one first if there is one."""
    dense = settings[0][1] if settings[0][0] == "dense" else None
    width = max(map(len, settings[0][1]))
    head = f"{'task':<{width}}  {'metric':<15} {'setting':<14} {'value':>9} {'stderr':>8} {'- dense':>9}"
    print(f"{head} {'skipped':>8} {'KV held':>8} {'KV read':>8}")
    for name, row in settings[0][1].items():
        for metric in row["metrics"]:
            for title, table in settings:
                value, stderr = table[name]["metrics"][metric]
                error = "" if stderr is None else f"{stderr:.4f}"
                change = "" if dense is None or table is dense else f"{value - dense[name]['metrics'][metric][0]:+.4f}"
                shares = " ".join(f"{table[name][key]:>8.4f}" for key in ("skip_ratio", "kv_held", "kv_read"))
                print(f"{name:<{width}}  {metric:<15} {title:<14} {value:>9.4f} {error:>8} {change:>9} {shares}")


def read_arguments(argv):
    """The command's arguments, and the settings to run, (title, FilterConfig or None) each."""
    parser = Parser(description="Tasks of the lm-evaluation-harness, dense against filtered.")
    add_model_arguments(parser)
    parser.add_argument("--suite", choices=SUITES, help="the benchmarks that the paper reports")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="tasks of the harness, of tasks/ or of --include-path")
    parser.add_argument("--include-path", action="append", metavar="FOLDER", help="more task files, beside tasks/ (repeatable)")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="solved examples before each question (default: the task's)")
    parser.add_argument("--fewshot-seed", type=int, default=1234, metavar="N", help="which examples (default: the harness's, %(default)s)")
    parser.add_argument("--chat", action="store_true", help="ask through the checkpoint's chat template")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N documents of each task")
    parser.add_argument("--prune", type=float, nargs="+", default=[0.0, 0.2, 0.5], metavar="P",
                        help="shares of (token, layer) pairs to skip (default: 0 0.2 0.5)")  # fmt: skip
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="continuations at a time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N",
                        help="of what tasks draw at random (default: 0)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    add_filter_arguments(parser, several=True)
    args = parser.parse_args(argv)

    args.tasks = SUITES.get(args.suite, []) + args.tasks
    if not args.tasks:
        fail("no task: give --suite or --tasks")
    if args.batch < 1 or args.seed < 0 or (args.limit is not None and args.limit < 1) or (args.num_fewshot or 0) < 0:
        fail("--batch and --limit must be at least 1, --seed and --num-fewshot at least 0")
    filters: list[tuple[str, FilterConfig | None]] = []  # dense once, then every preset at every ratio
    for name in args.preset or ["paper"]:
        for prune in sorted(args.prune):
            config = filter_from(args, name, prune)
            if config or "dense" not in [title for title, _ in filters]:
                filters.append((f"{name} {prune:g}" if config else "dense", config))

    for folder in args.include_path or []:
        if not os.path.isdir(folder):
            fail(f"--include-path {folder}: no such folder")
    return args, filters


def main(argv=None):
    args, filters = read_arguments(argv)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = partial(tqdm, disable=True)  # one bar for each task, and MMLU has 57: ours are enough
    random.seed(args.seed)  # a few tasks shuffle their choices with it
    include_path = [str(Path(__file__).resolve().parent / "tasks"), *(args.include_path or [])]
    loaded, lines = load_tasks(args.tasks, include_path)
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None or (args.num_fewshot is not None and task.get_config("num_fewshot") > 0):
            task.set_config("num_fewshot", args.num_fewshot or 0)  # a 0 in a task's own file stays, as in the harness
        task.set_fewshot_seed(args.fewshot_seed)
    try:
        model, tokenizer = load(args.checkpoint, args.device, args.dtype, progress=True)
    except CheckpointError as e:
        fail(e)

    settings = []
    for title, config in filters:
        lm = FilteredLM(model, tokenizer, config, args.batch, args.seed, title)
        try:
            options = {"limit": args.limit, "apply_chat_template": args.chat, "log_samples": False}
            results = lm_eval.evaluate(lm, loaded, **options)
        except (ValueError, FloatingPointError, CheckpointError) as e:
            fail(e)
        settings.append((title, summarise(results, lm, lines)))

    if args.json:
        about = {"lm_eval": lm_eval.__version__, "checkpoint": str(args.checkpoint), "limit": args.limit, "chat": args.chat}
        about |= {"num_fewshot": results["n-shot"], "versions": results["versions"]}
        rows = [
            {"setting": title, "filter": config and asdict(config), "tasks": table}
            for (title, table), (_, config) in zip(settings, filters)
        ]
        print_json({**about, "results": rows})
        return
    print_table(settings)
    for title, table in settings:
        for name, row in table.items():
            if title != "dense" and row["unfiltered"] and name != "average":
                share = row["unfiltered"] / row["texts"]
                print(f"note: {title}, {name}: {share:.0%} of the texts are no longer than the warm-up, so not filtered at all")


if __name__ == "__main__":
    as_process(main)
