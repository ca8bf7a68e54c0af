"""Zero-shot and few-shot tasks through EleutherAI's lm-evaluation-harness, dense against filtered.

    python eval_tasks.py [CHECKPOINT] --suite commonsense --prune 0 0.2 0.5 --preset paper cache --limit 100
    python eval_tasks.py --tasks common_sense --num-fewshot 5          the questions in tasks/, no download

Needs `pip install -r requirements-extra.txt`. The harness knows the tasks and the metrics; this file gives it the model.
Every (context, continuation) is scored as if alone, from an empty cache: what begins alike shares that part's prefill, which
changes nothing, because filtering is causal, chunk-free and batch-invariant.
"""

import os
import sys
from collections import defaultdict
from dataclasses import asdict
from functools import partial
from itertools import groupby
from pathlib import Path

from command_line import PRUNE, Parser, add_filter_arguments, add_model_arguments, as_process, check_filter, fail

SUITES = {
    "commonsense": ["boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"],
    "mmlu": ["mmlu"],
    "wikitext": ["wikitext"],
}


def read_arguments(argv=None):
    """The command's arguments, checked as far as they can be without the model."""
    parser = Parser(description="Tasks of the lm-evaluation-harness, dense against filtered.")
    add_model_arguments(parser)
    parser.add_argument("--suite", choices=SUITES, help="the benchmarks that the paper reports")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="tasks of the harness, of tasks/ or of --include-path")
    parser.add_argument("--include-path", action="append", metavar="FOLDER", help="more task files, beside tasks/ (repeatable)")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="solved examples before each question (default: the task's)")
    parser.add_argument("--fewshot-seed", type=int, default=1234, metavar="N", help="which examples (default: the harness's, %(default)s)")
    parser.add_argument("--chat", action="store_true", help="ask through the checkpoint's chat template")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N documents of each task")
    parser.add_argument("--prune", type=PRUNE, nargs="+", default=[0.0, 0.2, 0.5], metavar="P",
                        help="shares of (token, layer) pairs to skip (default: 0 0.2 0.5)")  # fmt: skip
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="continuations at a time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what tasks and --rivals draw at random (default: 0)")
    parser.add_argument("--rivals", action="store_true", help="also presets with tokens by chance, and last layers without attention, "
                        "to which the filter's flags mean nothing")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    add_filter_arguments(parser, several=True)
    args = parser.parse_args(argv)

    args.tasks = SUITES.get(args.suite, []) + args.tasks
    if not args.tasks:
        fail("no task: give --suite or --tasks")
    if args.batch < 1 or args.seed < 0 or (args.limit is not None and args.limit < 1) or (args.num_fewshot or 0) < 0:
        fail("--batch and --limit must be at least 1, --seed and --num-fewshot at least 0")
    if args.seed >= 2**32:
        fail("--seed must be below 2**32")
    check_filter(args)
    for folder in args.include_path or []:
        if not os.path.isdir(folder):
            fail(f"--include-path {folder}: no such folder")
    return args


if __name__ == "__main__":
    given = as_process(read_arguments)  # before torch is imported, which takes seconds

import logging
import math
import random
import statistics

from command_line import filters_from

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from generate import check_settings, feed, generate, in_common, overflow, row_seed
from load_weights import CheckpointError, Tokenizer, load
from model import Transformer
from report import Answer, Stats, finite, print_json
from rivals import by_chance, last_layers
from token_filter import FilterConfig, token_filter
from tokenizer import MARK

for name in ("HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):  # read when lm_eval is imported: data sets, and metrics, which are
    os.environ.setdefault(name, os.environ.get("HF_HUB_OFFLINE", "1"))  # programs, come from this machine only
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

AVERAGED = ("acc", "acc_norm", "exact_match")  # metrics that mean the same on every task
GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}  # what generate_until understands
NEUTRAL = {  # Settings that tasks write out at the value that changes nothing: at this value they are understood, too.
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1,
    "length_penalty": 1,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
    "typical_p": 1,
    "early_stopping": False,
}
OTHER_SEED = 1234  # the harness's default for NumPy and torch; Python's own generator it starts at 0


# ------------------------------------------------------------------------------------------- the harness's model


def batches(pairs, size):
    """Cut pairs (context, continuation) into lists of at most `size` indices, those of one context together if they fit, and
    those of contexts that begin alike apart from others.

    Longest first, so that memory runs out early if at all, and rows of a batch are of similar length.
    """
    begun, family = (), {}  # family: of each context that shares its beginning, the first that has it
    for context in sorted({context for context, _ in pairs}):
        if in_common([begun, context]):
            family[begun] = family[context] = begun
        else:
            begun = context
    batch: list[int] = []
    order = [(family.get(context, ()), context, i) for i, (context, _) in enumerate(pairs)]
    order.sort(key=lambda at: (-len(at[0]), at[0], -len(at[1]), at[1], -len(pairs[at[2]][1])))
    for (begun, _), same in groupby(order, key=lambda at: at[:2]):
        group = [i for _, _, i in same]
        if batch and (len(batch) + len(group) > size or begun != family.get(pairs[batch[0]][0], ())):
            yield batch
            batch = []
        batch += group
        while len(batch) > size:
            yield batch[:size]
            batch = batch[size:]
    if batch:
        yield batch


def score(model: Transformer, pairs, filter: FilterConfig | None, criterion=token_filter, chunk=128):
    """Score pairs (context, continuation) of token tuples, none empty, each from an empty cache, as one batch.

    Returns for each: sum of log p(token | all before it) over the continuation, in nats; whether every token of it is
    the likeliest; the row of cache.usage(), of all tokens but the last, which is only predicted. `criterion` is as in
    model.new_cache, `chunk` bounds the memory the logits take. Raises ValueError beyond the model's context,
    FloatingPointError where logits are not finite.
    """
    cache = model.new_cache(len(pairs), filter, criterion)
    logits = feed(model, [context for context, _ in pairs], cache)[0][:, None]
    n = torch.tensor([len(continuation) for _, continuation in pairs])
    targets = torch.nn.utils.rnn.pad_sequence([torch.tensor(c) for _, c in pairs], batch_first=True)  # (B, T)
    nll, greedy = torch.zeros(len(pairs), dtype=torch.float64), torch.ones(len(pairs), dtype=torch.bool)
    usage, rows, done = torch.zeros(len(pairs), 5, dtype=torch.int64), torch.arange(len(pairs)), 0  # rows: not at their end yet
    while True:
        target = targets[rows, done : done + logits.shape[1]]  # what these logits predict
        pad = torch.arange(done, done + target.shape[1]) >= n[rows, None]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
        losses = F.cross_entropy(logits, target.flatten().to(logits.device), reduction="none").cpu().view(target.shape)
        nll[rows] += losses.double().masked_fill(pad, 0).sum(1)
        if not nll.isfinite().all():
            context, continuation = pairs[int(nll.isfinite().int().argmin())]
            raise FloatingPointError(overflow(model, [*context, *continuation], filter))
        greedy[rows] &= ((logits.argmax(-1).cpu().view(target.shape) == target) | pad).all(1)
        done += target.shape[1]
        left = n[rows] - done
        if left.min() <= 0:
            usage[rows] = cache.usage()
            if left.max() <= 0:
                return list(zip((-nll).tolist(), greedy.tolist(), usage.tolist()))
            cache.select((left > 0).nonzero()[:, 0])
            rows, left = rows[left > 0], left[left > 0]
        step = int(left.min().clamp(16, chunk))  # to the end of the shortest, lest others feed padding, but not for a token or two
        logits = model(targets[rows, done - 1 : -1][:, :step], cache, left.clamp(max=step))


class FilteredLM(TemplateLM):
    """A Transformer and its Tokenizer as the harness wants a model.

    `batch` is how many continuations are scored, or texts continued, at a time. `used[task]` lists what
    cache.usage() says of every text scored or continued for that task, a shared context counted for each.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, filter: FilterConfig | None = None, batch=8, seed=0, title="",
                 criterion=token_filter):  # fmt: skip
        super().__init__()
        self.model, self.tokenizer, self.filter, self.criterion = model, tokenizer, filter, criterion
        self.batch, self.seed, self.title = batch, seed, title
        self.context = model.config.max_positions
        self.used: dict[str, list[list[int]]] = defaultdict(list)

    @property
    def eot_token_id(self):
        """The tokenizer's own EOS, or else one that ends a generated text; None if there is none."""
        own = self._own("eos_token")
        return min(self.tokenizer.eos_ids, default=None) if own is None else own

    @property
    def prefix_token_id(self):
        """What an empty context becomes: BOS, or else the end of another text; ValueError if there is neither."""
        for token in (self._own("bos_token"), self._own("eos_token"), self.tokenizer.bos_id, self.eot_token_id):
            if token is not None:
                return token
        raise ValueError("an empty context has to become a BOS or EOS token, and the checkpoint's files name none")

    def _own(self, name):
        """The id of the token that the tokenizer has under this name, None if it has none."""
        return self.tokenizer._backend.vocab.get(self.tokenizer._template_tokens.get(name, ""))

    @property
    def tokenizer_name(self):
        return str(self.tokenizer.path)

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        """The text of a conversation, without its system messages if the template refuses them: up to where the assistant speaks
        next, or to the end of the last message, a turn that is begun and goes on.
        """
        *earlier, last = chat_history
        if not add_generation_prompt:  # the mark shows where the message ends, and the space whether the template strips it
            chat_history = [*earlier, {**last, "content": last["content"] + MARK + " "}]
        try:
            text = self.tokenizer.chat_text(chat_history, add_generation_prompt)
        except CheckpointError:
            if all(message["role"] != "system" for message in chat_history):
                raise
            text = self.tokenizer.chat_text([m for m in chat_history if m["role"] != "system"], add_generation_prompt)
        if add_generation_prompt:
            return text
        text, mark, rest = text.rpartition(MARK)
        if not mark:
            raise ValueError("the chat template does not show the last message as it is, so no answer can be begun with it")
        return text if rest.startswith(" ") else text.rstrip()

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        """Ids; special tokens written out in the string count as such; no second BOS in front of one."""
        ids = self.tokenizer.encode(string, bos=False, parse_special=True)
        if add_special_tokens is False or ids[:1] == [self.tokenizer.bos_id]:
            return ids
        return self.tokenizer.encode(string, parse_special=True)

    def _encode_pair(self, context, continuation):
        """Ids of both; spaces that end the context begin the continuation, and an empty context becomes a token."""
        if context.strip():
            return super()._encode_pair(context, continuation)
        ids = self.tok_encode(context + continuation, add_special_tokens=False)
        return (ids[:1], ids[1:]) if ids[:1] == [self.prefix_token_id] else ([self.prefix_token_id], ids)

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
                scored.update(zip(batch, score(self.model, [pairs[i] for i in batch], self.filter, self.criterion)))
                bar.update(len(batch))
        return [scored[i] for i in range(len(pairs))]

    def _loglikelihood_tokens(self, requests, **kwargs):
        return [scored[:2] for scored in self.score_all([(context, continuation) for _, context, continuation in requests])]

    def loglikelihood(self, requests, disable_tqdm=False):
        scored = self.score_all([self._encode_pair(*request.args) for request in requests])
        for request, (_, _, used) in zip(requests, scored):
            self.used[request.task_name].append(used)
        return [(logprob, greedy) for logprob, greedy, _ in scored]

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

    def generation_options(self, task, given):
        """A task's generation settings with all of GENERATION's names. Raises ValueError for what is not known here, and, as the
        harness's own model does, for sampling without a temperature."""
        problem = f"{task}: cannot generate with {given}"
        named = {name: value for name, value in given.items() if value is not None}  # null: the default
        try:
            option = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, **normalize_gen_kwargs(named, default_max_gen_toks=256)}
            check_settings(1, option["temperature"], option["top_k"], option["top_p"])
        except (TypeError, ValueError, OverflowError) as e:
            raise ValueError(f"{problem}: {e}") from None
        unknown = [name for name in option if name not in GENERATION and option[name] != NEUTRAL.get(name)]
        if unknown:
            raise ValueError(f"{problem}: {', '.join(map(str, unknown))} is not supported at this value")
        if option["do_sample"] and option["temperature"] == 0:
            raise ValueError(f"{problem}: do_sample draws at random, which takes a temperature above 0")
        if not 0 < option["max_gen_toks"] < self.context:
            raise ValueError(f"{problem} in a context of {self.context} tokens")
        return option

    def generate_until(self, requests, disable_tqdm=False):
        """Texts that continue the contexts, each cut before the first of its stop strings, of which the tokenizer's EOS is one.

        Greedy, unless the task asks for sampling. Raises ValueError for generation settings that are not known here.
        """
        prompts, answers = [], []
        together: dict[tuple, list[int]] = defaultdict(list)  # texts that are to be generated alike
        for i, request in enumerate(requests):
            context, given = request.args
            option = self.generation_options(request.task_name, given)
            room = self.context - option["max_gen_toks"]
            prompts.append(self.tok_encode(context)[-room:] or [self.prefix_token_id])
            stops = [*option["until"], self.tokenizer._template_tokens.get("eos_token")]
            # A text by itself, as in the harness.
            answers.append(Answer(self.tokenizer, stops, self.tokenizer.eos_ids, start=True))
            together[tuple(option[name] for name in ("max_gen_toks", "temperature", "top_k", "top_p"))].append(i)

        said = [""] * len(prompts)
        with tqdm(total=len(prompts), desc=self.title, unit=" texts", leave=False) as bar:
            for (most, temperature, top_k, top_p), texts in together.items():
                texts.sort(key=lambda i: -len(prompts[i]))
                for start in range(0, len(texts), self.batch):
                    rows, stats, ended = texts[start : start + self.batch], Stats(), set[int]()
                    seeds = [row_seed(self.seed, i) for i in rows]
                    settings = most, self.filter, frozenset[int](), temperature, top_k, top_p, seeds
                    cache = self.model.new_cache(len(rows), self.filter, self.criterion)
                    for row, token in generate(self.model, [prompts[i] for i in rows], *settings, stats=stats, cache=cache, ended=ended):
                        i = rows[row]
                        said[i] += answers[i].push(token)
                        if answers[i].ended:
                            ended.add(row)
                    for i, used in zip(rows, stats.rows):
                        self.used[requests[i].task_name].append([*used.values()])
                    bar.update(len(rows))
        return [text + answer.push(None) for text, answer in zip(said, answers)]


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
    """The harness's results of one setting, {name: row}. A row has "metrics" {metric: (value, stderr)}; "outcomes" {metric: each
    question's own}; of its texts how many and how long they are, how many are not filtered, and cache.usage()'s shares.

    With several tasks, "average" is over all that report a metric ("acc of 7": over 7), its stderr as of independent tasks.
    """
    table: dict[str, dict] = {}
    for name, parts in lines.items():
        row = table[name] = {"metrics": {}, "outcomes": {}, "used": [text for part in parts for text in lm.used[part]]}
        for key, value in results["results"][name].items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr"):
                stderr = results["results"][name].get(f"{metric}_stderr,{kind}")
                label = metric if kind == "none" else f"{metric}, {kind}"
                row["metrics"][label] = (value, stderr if isinstance(stderr, float) and math.isfinite(stderr) else None)
                samples = [sample for part in parts for sample in results["samples"][part] if sample["filter"] == kind]
                row["outcomes"][label] = [float(s[metric]) for s in samples if isinstance(s.get(metric), bool | int | float)]
    if len(table) > 1:
        used = [text for row in table.values() for text in row["used"]]
        table["average"] = {"metrics": averages(table, "metrics"), "used": used}
    for row in table.values():
        usage = torch.tensor(row.pop("used") or [[0] * 5])  # (texts, 5); none where the only text is empty
        pairs, redundant, held, read, dense_read = usage.sum(0).tolist()
        lengths = (usage[:, 0] // lm.model.config.n_layers).tolist()
        row["texts"], row["longest"] = len(lengths), max(lengths)
        row |= {"skip_ratio": redundant / (pairs or 1), "kv_held": held / (pairs or 1), "kv_read": read / (dense_read or 1)}
        row["unfiltered"] = sum(n <= max(lm.filter.warmup, 1) for n in lengths) if lm.filter else len(lengths)
    return table


def averages(table, key):
    """{"acc of 7": the mean of what 7 rows have under `key`, and its stderr, None if one is}, for each metric of AVERAGED."""
    found = {}
    for metric in AVERAGED:
        having = [row[key][metric] for row in table.values() if metric in row[key]]
        if len(having) > 1:
            values, errors = zip(*having)
            error = None if None in errors else math.hypot(*errors) / len(having)
            found[f"{metric} of {len(having)}"] = (sum(values) / len(having), error)
    return found


def compare(table, dense):
    """Give each row of `table` "- dense" {metric: (difference, stderr)}, paired: the same questions, with and without a filter."""
    tasks = {name: row for name, row in table.items() if name != "average"}
    for name, row in tasks.items():
        row["- dense"] = {}
        for metric, outcomes in row["outcomes"].items():
            changes = [ours - theirs for ours, theirs in zip(outcomes, dense[name]["outcomes"][metric])]
            error = statistics.stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else None
            row["- dense"][metric] = (row["metrics"][metric][0] - dense[name]["metrics"][metric][0], error)
    if "average" in table:
        table["average"]["- dense"] = averages(tasks, "- dense")


HEAD = ("value", "stderr", "- dense", "stderr", "skipped", "KV held", "KV read", "whole")  # whole: texts the warm-up covers


def print_table(title, table, width, head=False):
    """One line per task and metric of one setting, summarise()'s table, as wide as the longest title; with `head` what they are."""
    name_width = max(map(len, table))
    if head:
        print(f"{'setting':<{width}}  {'task':<{name_width}}  {'metric':<13}", *(f"{name:>8}" for name in HEAD))
    for name, row in table.items():
        for metric, figures in row["metrics"].items():
            shares = row["skip_ratio"], row["kv_held"], row["kv_read"], row["unfiltered"] / row["texts"]
            figures = *figures, *row.get("- dense", {}).get(metric, (None, None)), *shares
            formats = (".4f", ".4f", "+.4f", ".4f", ".4f", ".4f", ".4f", ".0%")
            cells = (f"{'' if figure is None else format(figure, form):>8}" for figure, form in zip(figures, formats))
            print(f"{title:<{width}}  {name:<{name_width}}  {metric:<13}", *cells, flush=True)


def prepare(args):
    """load_tasks() of what the arguments name, with as many solved examples as they want."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = partial(tqdm, disable=True)  # one bar for each task, and MMLU has 57: ours are enough
    # A few tasks shuffle their choices or make their data with one of these. In the harness, too, a seed that is given is for all.
    random.seed(args.seed)
    other = args.seed or OTHER_SEED
    np.random.seed(other)
    torch.manual_seed(other)
    loaded, lines = load_tasks(args.tasks, [str(Path(__file__).resolve().parent / "tasks"), *(args.include_path or [])])
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None or (args.num_fewshot is not None and task.get_config("num_fewshot") > 0):
            task.set_config("num_fewshot", args.num_fewshot or 0)  # a 0 in a task's own file stays, as in the harness
    return loaded, lines


def main(argv=None, given=None):
    args = given or read_arguments(argv)
    settings = {} if all(args.prune) else {"dense": (None, token_filter)}
    for title, config in filters_from(args, args.preset or ["paper"], sorted(args.prune), with_ratio=True):
        settings[title] = config, token_filter
        if args.rivals:
            settings[f"{title}, random"] = config, partial(by_chance, seed=args.seed)
    loaded, lines = prepare(args)
    drawn = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        model, tokenizer = load(args.checkpoint, args.device, args.dtype, progress=sys.stderr.isatty())
    except CheckpointError as e:
        fail(e)

    for prune in sorted(filter(None, args.prune if args.rivals else ())):
        settings[f"last layers {prune:g}"] = last_layers(prune, model.config.n_layers)
    tables: dict[str, dict] = {}
    for title, (config, criterion) in settings.items():
        lm = FilteredLM(model, tokenizer, config, args.batch, args.seed, title, criterion)
        random.setstate(drawn[0])  # for every setting anew, so that all get the same prompts
        np.random.set_state(drawn[1])
        torch.set_rng_state(drawn[2])
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(args.fewshot_seed)
        chat = {"apply_chat_template": args.chat, "fewshot_as_multiturn": args.chat}  # as turns: the harness's command does it too
        try:
            results = lm_eval.evaluate(lm, loaded, limit=args.limit, **chat)
        except (ValueError, FloatingPointError, CheckpointError) as e:
            fail(e)
        except ArithmeticError as e:
            fail(f"{title}: the harness cannot make figures of what was scored, {e}: a loss without bound, or only empty texts?")
        tables[title] = summarise(results, lm, lines)
        if title != "dense" and "dense" in tables:
            compare(tables[title], tables["dense"])
        if not args.json:
            print_table(title, tables[title], max(map(len, ("setting", *settings))), head=len(tables) == 1)

    if args.json:
        about = {"lm_eval": lm_eval.__version__, "checkpoint": str(args.checkpoint), "limit": args.limit, "chat": args.chat}
        about |= {"num_fewshot": results["n-shot"], "versions": results["versions"]}
        rows = [{"setting": title, "filter": settings[title][0] and asdict(settings[title][0]), "tasks": tables[title]} for title in tables]
        print_json(finite({**about, "results": rows}))


if __name__ == "__main__":
    as_process(main, None, given)
