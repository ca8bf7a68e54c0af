"""Times prefill and decode steps of several settings, in turn: the measuring half of bench.py.

A setting is our model with or without a filter (OurSetting), or Hugging Face's
(TransformersSetting). A Case says what all of them are fed.
"""

import gc
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from filter_config import FilterConfig
from kv_cache import USAGE
from model import ModelConfig, Transformer
from runtime.cuda_graph import record_decode
from token_filter import token_filter

# Steps before the timed ones: in the first a step is compiled, in the second it is captured, and
# the third is the first replay.
WARM_STEPS = 3
# Steps after the timed ones, to find out how the time is spent in them.
EXTRA_STEPS = 2

READ = USAGE.index("read")
DENSE_READ = USAGE.index("dense_read")


def wait_for(device):
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory():
    """Give back what the latest run took of the device's memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def make_on(device, dtype, make: Callable):
    """The module that make() makes, its weights made where they are used, without gradients."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return make().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)


# --------------------------------------------------------------------------- filter functions


def none_redundant(k, v, lengths, state, ratio, config, q=None):
    """The filter's work, and no gain from it: what it costs at worst."""
    redundant, score = token_filter(k, v, lengths, state, ratio, config, q)
    return torch.zeros_like(redundant), score


def drawn_at_ratio(k, v, lengths, state, ratio, config, q=None):
    """All of the filter's work, and then a decision drawn at the layer's ratio.

    Scores of random weights drift, so their own decisions would miss the ratio. The draw is a hash
    of position, row and layer.
    """
    redundant, score = token_filter(k, v, lengths, state, ratio, config, q)
    B, T = redundant.shape
    row = torch.arange(B, device=k.device)[:, None]
    first = state.count - (T if lengths is None else lengths)  # token_filter has moved the count on
    position = first[:, None] + torch.arange(T, device=k.device)
    # Small factors, as a kernel made by a compiler wants them.
    x = position * 40503 + row * 25747 + state.layer * 60493
    for _ in range(3):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    # The filter's own decision has a part in it that is always 0, or a compiler would leave it out.
    x = x + (redundant & (position < 0))
    chosen = x.double() / 2**32 < ratio
    return chosen & (position >= config.n_sinks) & ~score.isnan(), score


# ----------------------------------------------------------------------------------- settings


class OurSetting:
    """Our model, dense or with a filter."""

    def __init__(
        self,
        name,
        model: Transformer,
        filter: FilterConfig | None,
        filter_fn: Callable = token_filter,
        eager=True,
        record: Callable | None = None,
    ):
        """eager: neither compiled nor captured, so that the parts of a step can be timed.

        record: what captures a decode step, for runtime.cuda_graph.record_decode.
        """
        self.name = name
        self.model = model
        self.filter = filter
        self.filter_fn = filter_fn
        self.eager = eager
        self.record = record
        self.times_filter = False
        self.filter_seconds = 0.0  # while times_filter is set

    def timed_filter_fn(self, k, *rest):
        """The filter function, with a stopwatch around it while times_filter is set."""
        if not self.times_filter:
            return self.filter_fn(k, *rest)
        wait_for(k.device)
        started = time.perf_counter()
        result = self.filter_fn(k, *rest)
        wait_for(k.device)
        self.filter_seconds += time.perf_counter() - started
        return result

    def prefill(self, tokens, length):
        """A cache that was fed tokens (B, T) and has room for `length` of them in a row."""
        if self.record is not None:
            # Anew each time, as capturing is given up once it has failed, for want of memory say.
            record_decode(self.model, self.record)
        filter_fn = self.timed_filter_fn if self.eager else self.filter_fn
        cache = self.model.new_cache(len(tokens), self.filter, filter_fn, length)
        self.model.prefill(tokens.tolist(), cache)
        return cache

    def copy_rows(self, cache, rows):
        cache.select(rows)

    def step(self, cache, tokens):
        """Feed tokens (B, 1)."""
        self.model(tokens, cache, last=True)

    def figures(self, cache) -> dict[str, float]:
        """What the cache holds."""
        pairs, redundant, held, _, _ = cache.usage().sum(0).tolist()
        dense_slots = int(cache.lengths.clamp(max=cache.window).sum()) * len(cache.layers)
        return {
            "skipped": redundant / pairs,
            "kv_held": held / dense_slots,
            "cache_bytes": cache.nbytes(),
            "live_bytes": cache.live_bytes(),
            "dense_bytes": dense_slots * cache.slot_bytes,
        }


class TransformersSetting:
    """Hugging Face's model of the same checkpoint or shape, with torch's attention."""

    name = "transformers"
    filter = None

    def __init__(self, folder, shape: ModelConfig | None, device, dtype):
        """The model in a folder, or one of this shape, with random weights."""
        import transformers  # it takes seconds, and only this setting needs it

        if shape is None:
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, attn_implementation="sdpa"
            )
        else:
            self.model = make_on(device, dtype, lambda: random_transformers_model(shape))
        self.model.to(device).eval()
        self.device = device
        self.eager = device.type == "cpu"

    @torch.no_grad()
    def prefill(self, tokens, length):
        output = self.model(tokens.to(self.device), use_cache=True, logits_to_keep=1)
        return output.past_key_values

    def copy_rows(self, cache, rows):
        cache.batch_select_indices(torch.tensor(rows, device=self.device))

    @torch.no_grad()
    def step(self, cache, tokens):
        self.model(tokens.to(self.device), past_key_values=cache, use_cache=True)

    def figures(self, cache) -> dict[str, float]:
        tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        nbytes = sum(tensor.nbytes for tensor in tensors)
        return {
            "skipped": 0.0,
            "kv_held": 1.0,
            "cache_bytes": nbytes,
            "live_bytes": nbytes,
            "dense_bytes": nbytes,
        }


def random_transformers_model(shape: ModelConfig):
    import transformers

    sizes = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp_width,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.max_positions,
        "attn_implementation": "sdpa",
    }
    if shape.window is None:
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    config = transformers.MistralConfig(sliding_window=shape.window, **sizes)
    return transformers.MistralForCausalLM(config)


Setting = OurSetting | TransformersSetting


# -------------------------------------------------------------------------------------- a run


@dataclass
class Case:
    """What all settings are fed: a batch of texts, whose first `context` tokens are prefilled."""

    tokens: torch.Tensor  # (B, context + WARM_STEPS + new_tokens + EXTRA_STEPS) int64, on the host
    context: int
    new_tokens: int  # decode steps that are timed
    distinct: int  # only so many rows are prefilled, and copied to fill the batch
    device: torch.device


def timed_run(setting: Setting, case: Case, print_profile=False) -> Iterator[dict | None]:
    """One run of one setting, in pieces: it yields None after each, and its figures at the end.

    A piece is prefill with the warm steps, then each timed step.
    """
    B = len(case.tokens)
    device = case.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    prefill_ms = []
    prompts = case.tokens[: case.distinct, : case.context]
    cache: Any = None
    for _ in range(2):
        cache = None  # so that there is one at a time
        wait_for(device)
        started = time.perf_counter()
        cache = setting.prefill(prompts, case.tokens.shape[1])
        wait_for(device)
        prefill_ms.append((time.perf_counter() - started) * 1e3)
    rows = [i % case.distinct for i in range(B)]
    if case.distinct < B:
        setting.copy_rows(cache, rows)

    steps = case.tokens[rows, case.context :].to(device).split(1, dim=1)
    for tokens in steps[:WARM_STEPS]:
        setting.step(cache, tokens)
    before = cache.usage() if setting.filter is not None else None
    yield None

    step_ms = []
    for tokens in steps[WARM_STEPS : WARM_STEPS + case.new_tokens]:
        wait_for(device)
        started = time.perf_counter()
        setting.step(cache, tokens)
        wait_for(device)
        step_ms.append((time.perf_counter() - started) * 1e3)
        yield None

    figures = {
        "first_prefill_ms": prefill_ms[0],
        "prefill_ms": prefill_ms[1],
        "step_ms": step_ms,
        "kv_read": 1.0,
        **setting.figures(cache),
    }
    if before is not None:
        of_steps = (cache.usage() - before).sum(0)
        figures["kv_read"] = float(of_steps[READ] / of_steps[DENSE_READ])
    if device.type == "cuda":
        figures["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    if setting.eager and setting.filter is not None:
        figures["filter_share"] = filter_share(setting, cache, steps[-EXTRA_STEPS:], device)
    if setting.eager or print_profile:
        figures |= profile_step(setting, cache, steps[-1], device, print_profile)
    yield figures


def filter_share(setting: Setting, cache, steps, device) -> float:
    """The filter's share of the time of these steps, which are not timed otherwise.

    The stopwatch waits for the device before and after the filter, so it would slow them down.
    """
    assert isinstance(setting, OurSetting)
    setting.filter_seconds = 0.0
    setting.times_filter = True
    started = time.perf_counter()
    for tokens in steps:
        setting.step(cache, tokens)
    wait_for(device)
    seconds = time.perf_counter() - started
    setting.times_filter = False
    return setting.filter_seconds / seconds


# What torch calls the products with the weights.
PRODUCTS = ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise")


def profile_step(setting: Setting, cache, tokens, device, show) -> dict[str, float]:
    """The shares of attention and of the products in the time of a step, by torch's profiler.

    They are known on the CPU, of a setting that is eager. show: print what takes the time, which is
    kernels on CUDA and operators on the CPU.
    """
    with torch.profiler.profile() as profiler:
        setting.step(cache, tokens)
        wait_for(device)
    seconds = {}
    times = {}
    for event in profiler.key_averages():
        if event.device_type.name == device.type.upper():
            if device.type == "cuda":
                microseconds = event.self_device_time_total
            else:
                microseconds = event.self_cpu_time_total
            seconds[event.key] = microseconds / 1e6
            times[event.key] = event.count
    total = sum(seconds.values()) or 1.0

    if show:
        print(f"\na decode step of {setting.name}, {total * 1e3:.2f} ms")
        print(f"{'ms':>9}{'share':>8}{'times':>7}  name")
        for name in sorted(seconds, key=lambda name: -seconds[name])[:16]:
            part = seconds[name]
            print(f"{part * 1e3:>9.3f}{part / total:>8.1%}{times[name]:>7}  {name[:100]}")
    if device.type == "cuda" or not setting.eager:
        return {}
    attention = sum(part for name, part in seconds.items() if "attention" in name)
    products = sum(seconds.get(name, 0.0) for name in PRODUCTS)
    return {"attention_share": attention / total, "products_share": products / total}


def run_in_turn(settings, case: Case, repeat, bar, profile=False) -> dict[str, list[dict]]:
    """Each setting's runs: {name: the figures of each of `repeat` runs}.

    On the CPU settings take turns piece by piece, so that a machine whose speed drifts treats all
    of them alike; on CUDA run by run, so that the peak memory is a run's own.

    bar      moves on by 1 after each piece
    profile  print what takes the time of a step of the first filtered setting
    """
    results: dict[str, list[dict]] = {setting.name: [] for setting in settings}
    filtered = [setting for setting in settings if setting.filter is not None]
    profiled = (filtered or settings)[0]
    for repetition in range(repeat):
        waiting: deque[tuple[str, Iterator[dict | None]]] = deque()
        for setting in settings:
            print_profile = profile and repetition == 0 and setting is profiled
            waiting.append((setting.name, timed_run(setting, case, print_profile)))
        while waiting:
            name, run = waiting.popleft()
            figures = next(run)
            bar.update()
            if figures is not None:
                results[name].append(figures)
                del run  # and with it its cache
                free_memory()
            elif case.device.type == "cuda":
                waiting.appendleft((name, run))
            else:
                waiting.append((name, run))
    return results
