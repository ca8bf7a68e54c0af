"""What can be chosen about filtering: FilterConfig, its presets, and how the ratio is spread over
layers.

Nothing here needs torch, so a command can read its arguments before torch is imported.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints


def option(default, help, at_least=None, below=None):
    """A field of FilterConfig: its default, the text of --help, and the range of a number."""
    metadata = {"help": help, "at_least": at_least, "below": below}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class FilterConfig:
    """How to filter. The defaults are preset "paper".

    Raises ValueError, naming the field, for a value that a field cannot have.
    """

    prune: float = option(
        0.5,
        "p, the share of (token, layer) pairs to find redundant, 0 <= P < 1",
        at_least=0.0,
        below=1.0,
    )
    mode: Literal["skip", "local", "cache"] = option(
        "skip",
        "what a redundant token loses in a layer: its attention (skip), its attention to all but "
        "the first and the latest tokens (local), or nothing (cache); in all three its key and "
        "value are dropped from the cache, at once or after the next RECENT tokens",
    )
    recent: int = option(
        0,
        "how many tokens before a token are always visible to it, redundant or not",
        at_least=0,
    )
    schedule: Literal["tail", "uniform", "head", "last"] = option(
        "tail",
        "how the share is spread over the layers: growing from the first to the last (tail), "
        "falling (head), the same in all (uniform), or in the last layers alone (last)",
    )
    gamma: float = option(
        0.9,
        "decay of the running averages, 0 <= X < 1",
        at_least=0.0,
        below=1.0,
    )
    warmup: int = option(
        16,
        "how many tokens at the start of a text are always kept and always visible (at least 1)",
        at_least=0,
    )
    history: int = option(
        64,
        "how many past scores a new score is ranked among",
        at_least=1,
    )
    fusion: Literal["variance", "equal", "key", "value", "key-query"] = option(
        "variance",
        "how the similarity of keys and that of values become one score: the side on which the "
        "heads agree more has more weight (variance), both have the same (equal), or one side "
        "alone counts (key, value); or keys alone, less if they are like recent queries "
        "(key-query, not with mode skip)",
    )
    keys: Literal["rotated", "unrotated"] = option(
        "rotated",
        "whether keys are compared after RoPE, as the cache holds them (rotated), or before it "
        "(unrotated)",
    )

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_option(field, getattr(self, field.name))
        if self.needs_queries and self.mode == "skip":
            raise ValueError(
                f"fusion={self.fusion!r} needs mode local or cache: in mode skip redundant tokens "
                "have no queries; choose another fusion"
            )

    @property
    def needs_queries(self) -> bool:
        """Whether the filter looks at queries too."""
        return self.fusion == "key-query"

    @property
    def n_sinks(self) -> int:
        """How many tokens at the start of a text are always kept and can always be seen."""
        return max(self.warmup, 1)


# The allowed values of each field that is a choice between words.
CHOICES: dict[str, tuple[str, ...]] = {
    name: get_args(kind) for name, kind in get_type_hints(FilterConfig).items() if get_args(kind)
}


def check_option(field: dataclasses.Field, value):
    """Raise ValueError, naming the field, if it cannot have this value."""
    if field.name in CHOICES:
        allowed = CHOICES[field.name]
        if value not in allowed:
            raise ValueError(f"{field.name}={value!r} is not one of {', '.join(allowed)}")
        return

    at_least = field.metadata["at_least"]
    below = field.metadata["below"]
    if field.type is int:
        if type(value) is not int or value < at_least:
            wanted = f"a whole number of at least {at_least}"
            raise ValueError(f"{field.name}={value!r} is not {wanted}")
    elif not isinstance(value, int | float) or not at_least <= value < below:
        raise ValueError(f"{field.name}={value!r} is not a number in [{at_least:g}, {below:g})")


# What each preset changes of FilterConfig's defaults. A new preset is a new entry here, no more.
PRESETS: dict[str, dict] = {
    "paper": {},
    "local": {"mode": "local", "recent": 32, "schedule": "uniform"},
    "cache": {
        "mode": "cache",
        "recent": 32,
        "schedule": "uniform",
        "fusion": "key-query",
        "keys": "unrotated",
    },
}


def preset(name: str, **overrides) -> FilterConfig:
    """The named preset with some fields changed: preset("cache", prune=0.3).

    Raises ValueError for an unknown name or a bad value, TypeError for an unknown field.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is not one of {', '.join(PRESETS)}")
    return FilterConfig(**PRESETS[name] | overrides)


def layer_ratios(config: FilterConfig, n_layers: int) -> list[float]:
    """Each layer's ratio r_l in [0, 1]. Their mean is p = config.prune.

    With L layers, l = 0 .. L-1:

    uniform  r_l = p
    tail     r_l = min(1, a l / (L-1)), with a such that the mean is p: later layers filter more
    head     tail reversed: earlier layers filter more
    last     max(0.9, p) in the last layers only; the layer before them takes the remainder
    """
    p = config.prune
    L = n_layers
    if config.schedule == "uniform":
        return [p] * L

    if config.schedule == "last":
        top = max(0.9, p)
        # What is left of the sum p L when each of the later layers has taken `top`.
        left = [p * L - top * (L - 1 - layer) for layer in range(L)]
        return [min(max(share, 0.0), top) for share in left]

    # As long as a l / (L-1) stays below 1, a line through 0 has the mean p. When it would exceed 1,
    # the last `n_full` layers stay at 1 and a steeper line through the others takes the rest.
    ratios = [0.0] * L
    for n_full in range(L):
        others = range(L - n_full)
        slope = (p * L - n_full) / max(sum(others), 1)
        ratios = [slope * layer for layer in others] + [1.0] * n_full
        if slope * (L - n_full - 1) <= 1 + 1e-12:
            break
    # Layer 0 has l = 0, so it takes only what is left when all the others are at 1.
    ratios[0] = max(0.0, p * L - (L - 1))
    if config.schedule == "head":
        ratios.reverse()
    return ratios
