"""From prompts to tokens to text: generate(), sampling, stop texts, and figures of what was done.

    for row, token in generate(model, prompts, filter=preset("cache", prune=0.5)):
        ...

Prompts are lists of token ids, as tokenizer.encode(text) and tokenizer.chat(messages) make them.
"""

import copy
import operator
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile
from numbers import Integral, Real

import numpy as np
import torch
import torch.nn.functional as F

from filter_config import FilterConfig
from kv_cache import KVCache
from loading.checkpoint_files import CheckpointError
from model import ModelConfig, Transformer
from runtime.cuda_graph import has_fixed_batch

# From so many tokens on, what all prompts begin with (instructions, solved examples) is fed once.
LEAST_SHARED = 128


def check_settings(max_new_tokens=1, temperature=0.0, top_k=0, top_p=1.0, seed=0, chunk=1):
    """Raise ValueError, naming it, for a value that makes no sense."""
    _check_number("max_new_tokens", max_new_tokens, Integral, at_least=1)
    _check_number("top_k", top_k, Integral, at_least=0)
    _check_number("chunk", chunk, Integral, at_least=1)
    if not _is_number(temperature, Real) or not 0 <= temperature <= sys.float_info.max:
        raise ValueError(f"temperature is {temperature!r}, not a finite number of at least 0")
    if not _is_number(top_p, Real) or not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p!r}, not a number above 0 and at most 1")
    if not _is_number(seed, Integral) or not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed!r}, not a whole number of at least 0 and below 2**63")


def _is_number(value, kind) -> bool:
    return issubclass(type(value), kind) and not isinstance(value, bool)


def _check_number(name, value, kind, at_least):
    if not _is_number(value, kind) or value < at_least:
        raise ValueError(f"{name} is {value!r}, not a whole number of at least {at_least}")


# ----------------------------------------------------------------------------------- sampling


def sample(logits, temperature=0.0, top_k=0, top_p=1.0, rng=None) -> int:
    """sample_rows for one row, logits (vocab,)."""
    return int(sample_rows(logits[None], temperature, top_k, top_p, [rng]))


@torch.no_grad()
def sample_rows(logits, temperature, top_k, top_p, rngs) -> torch.Tensor:
    """A token for each row of logits (B, vocab): (B,) int64, on the same device.

    Greedy at temperature 0. Otherwise drawn from the top_k likeliest ids (0: all), of which the
    smallest set with probability top_p stays. Of equals, the lower id comes first. rngs: each row's
    generator, on the logits' device.

    Each id gets a random number of its own, e ~ Exp(1), and the largest p / e wins, which is id i
    with probability p_i. Where rounding moves the logits a little, few draws change: as few as
    probabilities moved.
    """
    if temperature == 0:
        return logits.argmax(1)
    if logits.device.type == "cpu" and len(logits) > 16:
        # So it stays in the processor's cache: 128 rows of 32000 take 0.6 s, all at once 0.9 s.
        draws = []
        for start in range(0, len(logits), 16):
            part = slice(start, start + 16)
            draws.append(sample_rows(logits[part], temperature, top_k, top_p, rngs[part]))
        return torch.cat(draws)

    scaled = (logits.double() - logits.amax(1, keepdim=True)) / temperature
    noise = torch.empty_like(scaled)
    for row, rng in zip(noise, rngs):
        row.exponential_(generator=rng)
    race = scaled.exp() / noise
    if top_k > 0 or top_p < 1:
        race.masked_fill_(~likeliest(logits, temperature, top_k, top_p), 0)
    return race.argmax(1)


def likeliest(logits, temperature, top_k, top_p) -> torch.Tensor:
    """Which ids sample_rows draws from: (B, vocab) bool."""
    if logits.device.type == "cpu":
        # NumPy sorts 128 rows of 32000 in 0.06 s, torch in 0.8 s. It has no bfloat16.
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        ranked = torch.from_numpy(np.sort(exact.numpy(), axis=1)).flip(1)
    else:
        exact = logits
        ranked = logits.sort(dim=1, descending=True).values
    ranked = ranked[:, : top_k or None]
    p = ((ranked.double() - ranked[:, :1]) / temperature).softmax(1)
    likelier = F.pad(p.cumsum(1)[:, :-1], (1, 0))  # the probability of all that come before
    n_stay = (likelier < top_p).sum(1, keepdim=True)  # at least 1
    least = ranked.gather(1, n_stay - 1)
    above = exact > least
    equal = exact == least
    n_equal = n_stay - above.sum(1, keepdim=True)  # so many of the equal ones stay, lower ids first
    return above | (equal & (equal.cumsum(1, dtype=torch.int32) <= n_equal))


def row_seed(seed: int, row: int) -> int:
    """The seed of a row's own random numbers: any two (seed, row) pairs give independent ones.

    Raises ValueError for a seed that check_settings refuses.
    """
    check_settings(seed=seed)
    mixed = np.random.SeedSequence(int(seed), spawn_key=(row,)).generate_state(1, np.uint64)
    return int(mixed[0]) // 2  # below 2**63, which torch's generators take


def row_seeds(seed: int | list[int] | tuple[int, ...], n_rows: int) -> list[int]:
    """The seed of each row, from generate()'s `seed`. Raises ValueError."""
    if not isinstance(seed, list | tuple):
        return [row_seed(seed, row) for row in range(n_rows)]
    for own in seed:
        check_settings(seed=own)
    if len(seed) != n_rows:
        raise ValueError(f"seed has {len(seed)} numbers for {n_rows} prompts")
    return list(seed)


# ------------------------------------------------------------------------------------ figures


@dataclass
class Stats:
    """What one call of generate() did, summed over its rows.

    Times exclude what the caller does between tokens.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0  # sampled, an end-of-text token included
    prefill_seconds: float = 0.0  # up to and including each row's first new token
    decode_seconds: float = 0.0  # all further ones
    slot_bytes: int = 0  # K and V of one token in one layer
    # Of each row that has ended what it used, by name: pairs (of a token and a layer), skipped
    # (redundant ones), held (slots at the end), read (slots that its queries have read), dense_read
    # (slots that they would have read without a filter). A row that has not ended has no names.
    rows: list[dict[str, int]] = field(default_factory=list)

    def add_seconds(self, seconds):
        """Add to prefill_seconds before the first tokens, to decode_seconds after them."""
        if self.new_tokens == 0:
            self.prefill_seconds += seconds
        else:
            self.decode_seconds += seconds

    def end_row(self, row, usage):
        """Keep what KVCache.usage() says of a row that has ended."""
        pairs, redundant, held, read, dense_read = usage
        self.rows[row] = {
            "pairs": pairs,
            "skipped": redundant,
            "held": held,
            "read": read,
            "dense_read": dense_read,
        }

    def total(self, name) -> int:
        return sum(row.get(name, 0) for row in self.rows)

    @property
    def skip_ratio(self) -> float:
        """Redundant (token, layer) pairs over all pairs."""
        return self.total("skipped") / max(self.total("pairs"), 1)

    @property
    def kv_held(self) -> float:
        """Share of the keys and values that are in the cache at the end; without a filter, 1."""
        return self.total("held") / max(self.total("pairs"), 1)

    @property
    def kv_read(self) -> float:
        """Slots that queries have read over those that they would have read without a filter."""
        return self.total("read") / max(self.total("dense_read"), 1)

    def line(self) -> str:
        """The figures in one line."""
        prefill = self.prompt_tokens / max(self.prefill_seconds, 1e-9)
        n_decoded = self.new_tokens - len(self.rows)
        decode = "none"
        if self.decode_seconds > 0:
            decode = f"{n_decoded / self.decode_seconds:.1f} tokens/s"
        megabytes = self.total("held") * self.slot_bytes / 1e6
        return (
            f"prefill {self.prompt_tokens} tokens at {prefill:.1f} tokens/s; decode {decode}; "
            f"skipped {self.skip_ratio:.1%} of (token, layer) pairs; "
            f"KV held {self.kv_held:.0%} ({megabytes:.2f} MB), read {self.kv_read:.0%} of dense"
        )


# ----------------------------------------------------------------------------------- the loop


def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int = 128,
    filter: FilterConfig | None = None,
    eos_ids=frozenset(),
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | list[int] | tuple[int, ...] = 0,
    chunk: int = 512,
    stats: Stats | None = None,
    watch: Callable[[list[int], KVCache], None] | None = None,
    cache: KVCache | None = None,
    ended: set[int] | None = None,
) -> Iterator[tuple[int, int]]:
    """Continue token prompts of any lengths as one batch.

    Yields (row, token), each token as soon as it is found. A row ends at a token of eos_ids, which
    is not yielded, or after max_new_tokens. Then it leaves the batch. Each row has its own random
    numbers, from row_seed(seed, row), or its own seed where `seed` is a list. So its tokens do not
    depend on its neighbours: in float64 and, nearly always, in float32. In half precision other
    neighbours mean other rounding, and sooner or later another token, greedy or not.

    chunk  prompts are fed so many tokens at a time; equal prompts, and what all begin with, once
    stats  is complete once the iterator is exhausted
    watch  is called as watch(rows, cache) after each forward, with the numbers of the rows in the
           cache, whose decisions() are the latest; prompts are then fed whole, each by itself
    cache  one of model.new_cache(len(prompts), filter) that was fed the first cache.lengths[row]
           tokens of each prompt before: only the others are fed
    ended  a set of rows: those that the caller puts in end with their latest token

    Raises ValueError for settings that make no sense; for a cache of another filter; for a prompt
    that is no list of token ids, is empty, has a token that the model does not know, or does not
    fit the context with its new tokens. Raises FloatingPointError where logits are not finite.
    """
    check_settings(max_new_tokens, temperature, top_k, top_p, chunk=chunk)
    if filter is not None and not isinstance(filter, FilterConfig):
        raise ValueError(
            f"filter is {filter!r}, "
            "not None or a FilterConfig, as filter_config.preset(name) makes it"
        )
    if cache is not None:
        check_filter_of(cache, filter)
    prompts = checked_prompts(prompts, max_new_tokens, model.config, cache)
    seeds = row_seeds(seed, len(prompts))
    loop = _Loop(
        model=model,
        prompts=prompts,
        max_new_tokens=max_new_tokens,
        filter=filter,
        eos_ids=eos_ids,
        sampling=(temperature, top_k, top_p),
        rngs=[torch.Generator(model.embed.weight.device).manual_seed(own) for own in seeds],
        chunk=chunk,
        stats=Stats() if stats is None else stats,
        watch=watch,
        cache=model.new_cache(len(prompts), filter) if cache is None else cache,
        ended=set() if ended is None else ended,
    )
    return loop.run()


def check_filter_of(cache: KVCache, filter: FilterConfig | None):
    """Raise ValueError, naming both, where the cache filters in another way than asked for."""
    wanted = filter or FilterConfig(prune=0.0)
    both_dense = wanted.prune == 0 and cache.filter.prune == 0
    if wanted != cache.filter and not both_dense:
        raise ValueError(
            f"filter is {wanted}, but the cache was made for {cache.filter}: "
            "it must be the same one"
        )


def checked_prompts(
    prompts, max_new_tokens, config: ModelConfig, cache: KVCache | None
) -> list[list[int]]:
    """The prompts as lists of int, or ValueError, as generate() raises it."""
    try:
        prompts = [[operator.index(token) for token in prompt] for prompt in prompts]
    except TypeError:
        raise ValueError(
            "prompts is not a list of lists of token ids, as tokenizer.encode(text) makes one"
        ) from None
    if not prompts:
        raise ValueError("there is no prompt")
    context = config.max_positions
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row + 1} is empty")
        if len(prompt) + max_new_tokens > context:
            raise ValueError(
                f"prompt {row + 1} has {len(prompt)} tokens: with {max_new_tokens} new ones it is "
                f"longer than the model's context of {context}"
            )
        for token in prompt:
            if not 0 <= token < config.vocab_size:
                raise ValueError(
                    f"prompt {row + 1} has the token {token}: "
                    f"the model knows those from 0 to {config.vocab_size - 1}"
                )
    if cache is not None:
        fed = cache.lengths.tolist()
        lengths = [len(prompt) for prompt in prompts]
        if len(fed) != len(lengths) or any(n >= length for n, length in zip(fed, lengths)):
            raise ValueError(
                f"cache holds texts of {fed} tokens: "
                "it is for as many prompts, each longer than its text"
            )
    return prompts


@dataclass
class _Loop:
    """One call of generate(), whose arguments these are; run() is its iterator."""

    model: Transformer
    prompts: list[list[int]]
    max_new_tokens: int
    filter: FilterConfig | None
    eos_ids: frozenset[int]
    sampling: tuple[float, int, float]  # temperature, top_k, top_p
    rngs: list[torch.Generator]
    chunk: int
    stats: Stats
    watch: Callable | None
    cache: KVCache
    ended: set[int]

    def run(self) -> Iterator[tuple[int, int]]:
        self.generated: list[list[int]] = [[] for _ in self.prompts]
        self.rows = list(range(len(self.prompts)))  # the rows in the cache, in its order
        self.active = set(self.rows)  # those of them that go on
        self.stats.rows = [{} for _ in self.prompts]
        self.stats.slot_bytes = self.cache.slot_bytes

        started = time.perf_counter()
        logits = self.prefill()
        while True:
            # Sample.
            tokens = self.sample(logits)
            self.stats.add_seconds(time.perf_counter() - started)
            self.stats.new_tokens += len(self.active)

            # Hand out.
            if self.watch is not None:
                self.watch(self.rows, self.cache)
            for row, token in zip(self.rows, tokens):
                if row in self.active:
                    self.generated[row].append(token)
                    if token not in self.eos_ids:
                        yield row, token

            # End rows.
            started = time.perf_counter()
            self.end_rows(tokens)
            if not self.active:
                return
            tokens = self.drop_ended_rows(tokens)

            # Step.
            logits = self.model(torch.tensor(tokens)[:, None], self.cache, last=True)

    def prefill(self):
        """Feed the prompts: logits (B, vocab) after each."""
        self.cache.length = max(len(prompt) for prompt in self.prompts) + self.max_new_tokens
        if self.watch is None and not self.cache.lengths.any():
            logits, n_tokens = feed(self.model, self.prompts, self.cache, self.chunk)
        else:
            # What is watched is each prompt by itself, and whole. What the cache holds is not fed
            # again.
            fed = self.cache.lengths.tolist()
            rest = [prompt[n:] for prompt, n in zip(self.prompts, fed)]
            chunk = self.chunk
            if self.watch is not None:
                chunk = max(len(prompt) for prompt in self.prompts)
            logits = self.model.prefill(rest, self.cache, chunk)
            n_tokens = sum(len(prompt) for prompt in rest)
        self.stats.prompt_tokens = n_tokens
        return logits

    def sample(self, logits) -> list[int]:
        """A token for each row of the cache.

        Raises FloatingPointError where logits are not finite.
        """
        # Both in one tensor: a greedy step waits for the device once.
        is_finite, tokens = torch.stack((logits.isfinite().all(1), logits.argmax(1))).tolist()
        for row, fine in zip(self.rows, is_finite):
            if row in self.active and not fine:
                text = self.prompts[row] + self.generated[row]
                raise FloatingPointError(overflow(self.model, text, self.filter))
        temperature, top_k, top_p = self.sampling
        if temperature > 0:
            rngs = [self.rngs[row] for row in self.rows]
            tokens = sample_rows(logits, temperature, top_k, top_p, rngs).tolist()
        return tokens

    def end_rows(self, tokens):
        """Rows that end with these tokens are no longer active; their figures are kept."""
        usage = None
        for i, (row, token) in enumerate(zip(self.rows, tokens)):
            if row not in self.active or not self.has_ended(row, token):
                continue
            if usage is None:  # it waits for the device, so only where a row has ended
                usage = self.cache.usage().tolist()
            self.stats.end_row(row, usage[i])
            self.active.remove(row)

    def has_ended(self, row, token) -> bool:
        """Whether a row ends with this token, its latest."""
        is_full = len(self.generated[row]) == self.max_new_tokens
        return is_full or token in self.eos_ids or row in self.ended

    def drop_ended_rows(self, tokens) -> list[int]:
        """Let ended rows leave the cache: the tokens of those that stay.

        Where steps are made for one number of rows, ended ones are kept until half have ended.
        """
        n_rows = len(self.rows)
        n_active = len(self.active)
        keep_finished = self.watch is None and has_fixed_batch(self.model)
        if not keep_finished:
            n_stay = n_active
        elif n_active <= n_rows // 2:
            n_stay = n_rows // 2
        else:
            n_stay = n_rows
        if n_stay == n_rows:
            return tokens
        active_first = sorted(range(n_rows), key=lambda i: self.rows[i] not in self.active)
        stay = sorted(active_first[:n_stay])
        self.cache.select(stay)
        self.rows = [self.rows[i] for i in stay]
        return [tokens[i] for i in stay]


def overflow(model: Transformer, tokens: list[int], filter: FilterConfig | None) -> str:
    """Where the logits of a text stop being finite, in a line for an error."""
    cache = model.new_cache(1, filter)
    dtype = str(model.embed.weight.dtype)[6:]
    where = "the output"
    with torch.inference_mode():
        chunk = cache.begin_prefill(torch.tensor([len(tokens)]), len(tokens))
        chunk.cos, chunk.sin = model.rope(chunk.packing.unpad(chunk.position))
        x = model.embed(torch.tensor(tokens, device=cache.position.device))
        for l, (block, layer) in enumerate(zip(model.blocks, cache.layers)):
            x = block(x, chunk, layer)
            if not x.isfinite().all():
                where = f"layer {l}"
                break
    others = [name for name in ("bfloat16", "float32", "float64") if name != dtype]
    return (
        f"{dtype} is not enough for this model: from {where} on, values are not finite; "
        f"use --dtype {' or '.join(others)}"
    )


# ----------------------------------------------------------------------- feeding many prompts


def shared_beginning(prompts) -> int:
    """How many tokens all of these prompts begin with, or 0 if that is not worth being fed apart.

    The last token of a prompt is never one of them, as something must be left to feed.
    """
    if len(prompts) < 2:
        return 0
    # What the first and the last in order have in common, all have.
    first = min(prompts)
    last = max(prompts)
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(first[:-1], last))
    n_shared = sum(1 for _ in pairs)
    return n_shared if n_shared >= LEAST_SHARED else 0


def feed(model: Transformer, prompts, cache: KVCache, chunk=512):
    """Prefill an empty cache; equal prompts, and what all of them begin with, are fed once.

    Returns logits (B, vocab) after each prompt, and how many tokens were fed.
    """
    different = list(dict.fromkeys(tuple(prompt) for prompt in prompts))
    n_shared = shared_beginning(different)
    n_rows = 1 if n_shared > 0 else len(different)
    if n_rows < len(prompts):
        cache.select(range(n_rows))
    if n_shared > 0:
        model.prefill([list(different[0][:n_shared])], cache, chunk)
        cache.select([0] * len(different))
    rest = [list(prompt[n_shared:]) for prompt in different]
    logits = model.prefill(rest, cache, chunk)
    if len(different) < len(prompts):
        fork = [different.index(tuple(prompt)) for prompt in prompts]
        cache.select(fork)
        logits = logits[fork]
    return logits, n_shared + sum(len(prompt) for prompt in rest)


# ------------------------------------------------------------------------------ tokens to text


def opening_messages(tokenizer, system: str | None) -> list[dict]:
    """The messages that a conversation begins with: the system's, if there is one.

    Raises CheckpointError where the chat template has no use for it.
    """
    if system is None:
        return []

    def rendered(*system_texts):
        messages = [{"role": "system", "content": text} for text in system_texts]
        with suppress(CheckpointError):
            return tokenizer.chat_text([*messages, {"role": "user", "content": "a"}])
        return None

    works_without = rendered() is not None
    refuses_it = rendered("b") is None
    leaves_it_out = rendered("b") == rendered("c")
    if works_without and (refuses_it or leaves_it_out):
        raise CheckpointError(
            tokenizer.path.parent,
            "the chat template takes no message of a system: leave out --system",
        )
    return [{"role": "system", "content": system}]


class Answer:
    """A row's text, token by token, up to one of eos_ids or the first stop text to be complete.

    Stop texts are looked for where special tokens are written out, the one that ends the answer
    too. What is given out is without these, as decode() of the tokens is.
    """

    def __init__(self, tokenizer, stop=(), eos_ids=frozenset(), start=False):
        """start: decode as a text that starts here, not as one that goes on."""
        self.tokenizer = tokenizer
        self.stream = tokenizer.stream(start)
        self.stop = [text for text in stop if text]
        self.eos_ids = eos_ids
        self.ended = False
        self.text = ""  # what was not given out yet, with special tokens written out
        self.shown = list[bool]()  # of each letter of `text` whether it belongs to the answer
        self.special = tokenizer.special_names

    def push(self, token: int | None) -> str:
        """The text that has become certain with this token; "" for one of eos_ids.

        None comes last: all that is left.
        """
        if not self.ended:
            for piece, shown in self._pieces(token):
                self.text += piece
                self.shown += [shown] * len(piece)
        self._cut_at_stop_text()
        if token in self.eos_ids:
            self.ended = True
            return ""

        n_certain = len(self.text)
        if token is not None and not self.ended:
            n_certain -= self._begun_stop_text()
        certain = zip(self.text[:n_certain], self.shown)
        given = "".join(letter for letter, shown in certain if shown)
        self.text = self.text[n_certain:]
        self.shown = self.shown[n_certain:]
        return given

    def _cut_at_stop_text(self):
        """End the answer before the stop text that is complete first, the longest of several."""
        found = [stop for stop in self.stop if stop in self.text]
        if not found:
            return
        first = min(found, key=lambda stop: (self.text.index(stop) + len(stop), -len(stop)))
        self.text = self.text[: self.text.index(first)]
        self.ended = True

    def _begun_stop_text(self) -> int:
        """How many letters at the end of the text may be the beginning of a stop text."""
        begun = [
            length
            for stop in self.stop
            for length in range(1, len(stop))
            if self.text.endswith(stop[:length])
        ]
        return max(begun, default=0)

    def _pieces(self, token: int | None) -> list[tuple[str, bool]]:
        """The text that a token adds, in parts, and whether each belongs to the answer."""
        if token is None:
            return [(self.stream.flush(), True)]
        if token in self.eos_ids:
            name = self.special.get(token) or self.tokenizer.decode([token])
            return [(self.stream.flush(), True), (name, False)]
        if token not in self.special:
            return [(self.stream.push(token), True)]
        name = self.special[token]
        held = copy.copy(self.stream).flush()
        if held.endswith("\N{REPLACEMENT CHARACTER}"):
            # An unfinished letter, with which decode() goes on after the special token.
            return [(name, False)]
        return [(self.stream.flush(), True), (name, False)]
