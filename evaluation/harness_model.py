"""The model as EleutherAI's lm-evaluation-harness wants it: FilteredLM, for tasks.py.

Every (context, continuation) is scored as if alone, from an empty cache. What begins alike shares
the prefill of that part, which changes nothing, because filtering is causal, chunk-free and
batch-invariant.

Shapes: B continuations, T tokens of them at a time, V the vocabulary.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from eval_ppl import token_losses
from filter_config import FilterConfig
from generation import (
    Answer,
    Stats,
    check_settings,
    feed,
    generate,
    overflow,
    row_seed,
    shared_beginning,
)
from kv_cache import USAGE
from load_weights import CheckpointError, Tokenizer
from loading.tokenizer import MARK
from model import Transformer
from token_filter import token_filter

# Data sets, and metrics, which are programs, come from this machine alone, unless HF_HUB_OFFLINE=0
# says otherwise. The harness reads both variables when it is imported.
os.environ.setdefault("HF_DATASETS_OFFLINE", os.environ.get("HF_HUB_OFFLINE", "1"))
os.environ.setdefault("HF_EVALUATE_OFFLINE", os.environ.get("HF_HUB_OFFLINE", "1"))

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

Pair = tuple[tuple[int, ...], tuple[int, ...]]  # the ids of a context and of its continuation

# The generation settings that generate_until understands.
GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}
# Settings that tasks write out at the value that changes nothing. At it they are understood.
NEUTRAL = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1,
    "length_penalty": 1,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
    "typical_p": 1,
    "early_stopping": False,
}

# ------------------------------------------------------------------------------------ scoring


def families(contexts) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Of each context whose beginning is worth sharing: the first, in order, that shares it."""
    family_of = {}
    first: tuple[int, ...] = ()
    for context in sorted(set(contexts)):
        if shared_beginning([first, context]) > 0:
            family_of[first] = first
            family_of[context] = first
        else:
            first = context
    return family_of


def batches(pairs: list[Pair], size: int) -> Iterator[list[int]]:
    """Cut pairs into batches: lists of at most `size` indices.

    Those of one context are together if they fit, and those of contexts that begin alike are apart
    from others. Longest first, so that memory runs out early if at all, and rows of a batch have
    similar lengths.
    """
    family_of = families(context for context, _ in pairs)
    groups: dict[tuple, list[int]] = defaultdict(list)  # by family and context
    for i, (context, _) in enumerate(pairs):
        groups[family_of.get(context, ()), context].append(i)

    def longest_first(key):
        family, context = key
        return -len(family), family, -len(context), context

    batch: list[int] = []
    family_of_batch: tuple[int, ...] = ()
    for family, context in sorted(groups, key=longest_first):
        group = sorted(groups[family, context], key=lambda i: -len(pairs[i][1]))
        if batch and (len(batch) + len(group) > size or family != family_of_batch):
            yield batch
            batch = []
        batch += group
        family_of_batch = family
        while len(batch) > size:
            yield batch[:size]
            batch = batch[size:]
    if batch:
        yield batch


def score(
    model: Transformer,
    pairs: list[Pair],
    filter: FilterConfig | None,
    filter_fn: Callable = token_filter,
    chunk=128,
) -> list[tuple[float, bool, list[int]]]:
    """Score pairs, none of whose parts is empty, each from an empty cache, as one batch.

    Returns for each: the sum of log p(token | all before it) over the continuation, in nats;
    whether every token of it is the likeliest; its row of cache.usage(), of all tokens but the
    last, which is only predicted. chunk bounds the memory that the logits take.
    Raises ValueError beyond the model's context, FloatingPointError where logits are not finite.
    """
    B = len(pairs)
    lengths = torch.tensor([len(continuation) for _, continuation in pairs])
    targets = pad_sequence(
        [torch.tensor(continuation) for _, continuation in pairs], batch_first=True
    )
    loss = torch.zeros(B, dtype=torch.float64)
    greedy = torch.ones(B, dtype=torch.bool)
    usage = torch.zeros(B, len(USAGE), dtype=torch.int64)

    cache = model.new_cache(B, filter, filter_fn)
    logits, _ = feed(model, [context for context, _ in pairs], cache)
    logits = logits[:, None]  # (B, 1, V): they predict each continuation's first token
    rows = torch.arange(B)  # those in the cache, in its order
    n_scored = 0
    while True:
        # What these logits predict.
        target = targets[rows, n_scored : n_scored + logits.shape[1]]  # (B, T)
        position = torch.arange(n_scored, n_scored + target.shape[1])
        is_real = position < lengths[rows, None]
        loss[rows] += token_losses(logits, target).masked_fill(~is_real, 0).sum(1)
        is_finite = loss.isfinite()
        if not is_finite.all():
            context, continuation = pairs[int(is_finite.int().argmin())]
            raise FloatingPointError(overflow(model, [*context, *continuation], filter))
        is_likeliest = logits.argmax(-1).cpu() == target
        greedy[rows] &= (is_likeliest | ~is_real).all(1)
        n_scored += target.shape[1]

        # Rows at their end leave.
        n_left = lengths[rows] - n_scored
        goes_on = n_left > 0
        if not goes_on.all():
            usage[rows] = cache.usage()
            if not goes_on.any():
                return list(zip((-loss).tolist(), greedy.tolist(), usage.tolist()))
            cache.select(goes_on.nonzero()[:, 0])
            rows = rows[goes_on]
            n_left = n_left[goes_on]

        # On to the end of the shortest, lest the others feed padding, but not for a token or two.
        n_fed = int(n_left.min().clamp(16, chunk))
        tokens = targets[rows, n_scored - 1 : -1][:, :n_fed]
        logits = model(tokens, cache, n_left.clamp(max=n_fed))


# ------------------------------------------------------------------------ the harness's model


class FilteredLM(TemplateLM):
    """A Transformer and its Tokenizer as the harness wants a model.

    batch  how many continuations are scored, or texts continued, at a time
    title  of its progress bars
    used   for each task what cache.usage() says of every text scored or continued for it; a context
           that several share is counted for each
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        filter: FilterConfig | None = None,
        batch=8,
        seed=0,
        title="",
        filter_fn: Callable = token_filter,
    ):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.filter = filter
        self.filter_fn = filter_fn
        self.batch = batch
        self.seed = seed
        self.title = title
        self.context = model.config.max_positions
        self.used: dict[str, list[list[int]]] = defaultdict(list)

    def bar(self, total):
        return tqdm(total=total, desc=self.title, unit=" texts", leave=False, disable=None)

    # --------------------------------------------------------------------------------- tokens

    @property
    def eot_token_id(self):
        """The tokenizer's own EOS, or else one that ends a generated text; None without one."""
        own = self.tokenizer.named_id("eos_token")
        return min(self.tokenizer.eos_ids, default=None) if own is None else own

    @property
    def prefix_token_id(self):
        """What an empty context becomes: BOS, or else the end of another text.

        Raises ValueError if there is neither.
        """
        candidates = (
            self.tokenizer.named_id("bos_token"),
            self.tokenizer.named_id("eos_token"),
            self.tokenizer.bos_id,
            self.eot_token_id,
        )
        for token in candidates:
            if token is not None:
                return token
        raise ValueError(
            "an empty context has to become a BOS or EOS token, "
            "and the checkpoint's files name none"
        )

    @property
    def tokenizer_name(self):
        return str(self.tokenizer.path)

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        """The text of a conversation, without its system messages if the template refuses them.

        It goes up to where the assistant speaks next, or to the end of the last message, a turn
        that is begun and goes on.
        """
        if add_generation_prompt:
            return self._conversation(chat_history, True)
        # The mark shows where the last message ends, and the space whether the template strips it.
        *earlier, last = chat_history
        marked = {**last, "content": last["content"] + MARK + " "}
        text, mark, rest = self._conversation([*earlier, marked], False).rpartition(MARK)
        if not mark:
            raise ValueError(
                "the chat template does not show the last message as it is, "
                "so no answer can be begun with it"
            )
        return text if rest.startswith(" ") else text.rstrip()

    def _conversation(self, messages, add_generation_prompt):
        try:
            return self.tokenizer.chat_text(messages, add_generation_prompt)
        except CheckpointError:
            others = [message for message in messages if message["role"] != "system"]
            if len(others) == len(messages):
                raise
            return self.tokenizer.chat_text(others, add_generation_prompt)

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        """Ids; special tokens written out in the string count as such; no second BOS before one."""
        ids = self.tokenizer.encode(string, bos=False, parse_special=True)
        if add_special_tokens is False or ids[:1] == [self.tokenizer.bos_id]:
            return ids
        return self.tokenizer.encode(string, parse_special=True)

    def _encode_pair(self, context, continuation):
        """Ids of both. Spaces that end the context begin the continuation.

        An empty context becomes prefix_token_id.
        """
        if context.strip():
            return super()._encode_pair(context, continuation)
        ids = self.tok_encode(context + continuation, add_special_tokens=False)
        if ids[:1] == [self.prefix_token_id]:
            return ids[:1], ids[1:]
        return [self.prefix_token_id], ids

    # ---------------------------------------------------------------------------- likelihoods

    def score_all(self, requests):
        """score() for (context ids, continuation ids) of any number and length.

        Contexts are truncated from the left where both together are too long.
        """
        pairs: list[Pair] = []
        for context, continuation in requests:
            if not 0 < len(continuation) <= self.context:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens, "
                    f"not 1 to {self.context}, the model's context"
                )
            # The last token is only predicted.
            ids = (*context, *continuation)[-(self.context + 1) :]
            pairs.append((ids[: -len(continuation)], ids[-len(continuation) :]))

        scored: dict[int, tuple] = {}
        with self.bar(len(pairs)) as bar:
            for batch in batches(pairs, self.batch):
                in_batch = [pairs[i] for i in batch]
                scored.update(zip(batch, score(self.model, in_batch, self.filter, self.filter_fn)))
                bar.update(len(batch))
        return [scored[i] for i in range(len(pairs))]

    def _loglikelihood_tokens(self, requests, **kwargs):
        pairs = [(context, continuation) for _, context, continuation in requests]
        return [(log_prob, greedy) for log_prob, greedy, _ in self.score_all(pairs)]

    def loglikelihood(self, requests, disable_tqdm=False):
        scored = self.score_all([self._encode_pair(*request.args) for request in requests])
        for request, (_, _, used) in zip(requests, scored):
            self.used[request.task_name].append(used)
        return [(log_prob, greedy) for log_prob, greedy, _ in scored]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Log-probability of whole texts, in windows as long as the context that do not overlap."""
        windows = []
        owners = []  # of each window the request that it belongs to
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(
                ids, self.prefix_token_id, self.context, context_len=1
            ):
                windows.append(make_disjoint_window(window))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (log_prob, _, used) in zip(owners, self.score_all(windows)):
            totals[i] += log_prob
            self.used[requests[i].task_name].append(used)
        return totals

    # ----------------------------------------------------------------------------- generation

    def generation_options(self, task, given):
        """A task's generation settings with all of GENERATION's names.

        Raises ValueError for what is not known here, and, as the harness's own model does, for
        sampling without a temperature.
        """
        problem = f"{task}: cannot generate with {given}"
        named = {name: value for name, value in given.items() if value is not None}  # null: default
        options = {"temperature": 0.0, "top_k": 0, "top_p": 1.0}
        try:
            options |= normalize_gen_kwargs(named, default_max_gen_toks=256)
            check_settings(1, options["temperature"], options["top_k"], options["top_p"])
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{problem}: {error}") from None
        unknown = [
            str(name)
            for name, value in options.items()
            if name not in GENERATION and value != NEUTRAL.get(name)
        ]
        if unknown:
            raise ValueError(f"{problem}: {', '.join(unknown)} is not supported at this value")
        if options["do_sample"] and options["temperature"] == 0:
            raise ValueError(
                f"{problem}: do_sample draws at random, which takes a temperature above 0"
            )
        if not 0 < options["max_gen_toks"] < self.context:
            raise ValueError(f"{problem} in a context of {self.context} tokens")
        return options

    def generate_until(self, requests, disable_tqdm=False):
        """Texts that continue the contexts, each up to its first stop text or the tokenizer's EOS.

        Greedy, unless the task asks for sampling. Raises ValueError for generation settings that
        are not known here.
        """
        prompts: list[list[int]] = []
        answers: list[Answer] = []
        alike: dict[tuple, list[int]] = defaultdict(list)  # texts that are generated the same way
        eos = self.tokenizer.named_token("eos_token")
        for i, request in enumerate(requests):
            context, given = request.args
            options = self.generation_options(request.task_name, given)
            room = self.context - options["max_gen_toks"]
            prompts.append(self.tok_encode(context)[-room:] or [self.prefix_token_id])
            # A text by itself, as in the harness.
            stops = [*options["until"], eos]
            answers.append(Answer(self.tokenizer, stops, self.tokenizer.eos_ids, start=True))
            names = ("max_gen_toks", "temperature", "top_k", "top_p")
            alike[tuple(options[name] for name in names)].append(i)

        texts = [""] * len(prompts)
        with self.bar(len(prompts)) as bar:
            for options, rows in alike.items():
                rows.sort(key=lambda i: -len(prompts[i]))
                for start in range(0, len(rows), self.batch):
                    batch = rows[start : start + self.batch]
                    in_batch = [(prompts[i], answers[i], row_seed(self.seed, i)) for i in batch]
                    for i, (text, used) in zip(batch, self.generate_batch(in_batch, *options)):
                        texts[i] = text
                        self.used[requests[i].task_name].append(used)
                    bar.update(len(batch))
        return texts

    def generate_batch(self, batch, max_new_tokens, temperature, top_k, top_p):
        """batch: (prompt, Answer, seed) of each row -> (text, its row of cache.usage()) of each."""
        prompts, answers, seeds = zip(*batch)
        certain = [""] * len(batch)
        stats = Stats()
        ended: set[int] = set()
        steps = generate(
            self.model,
            list(prompts),
            max_new_tokens,
            self.filter,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=list(seeds),
            stats=stats,
            cache=self.model.new_cache(len(batch), self.filter, self.filter_fn),
            ended=ended,
        )
        for row, token in steps:  # an EOS token too: an Answer knows these
            certain[row] += answers[row].push(token)
            if answers[row].ended:
                ended.add(row)
        texts = [text + answer.push(None) for text, answer in zip(certain, answers)]
        usage = [list(used.values()) for used in stats.rows]
        return list(zip(texts, usage))
