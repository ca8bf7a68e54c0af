"""How the ratio p is spread over the layers: fixed beforehand by `layer_ratios`, or, with schedule="adaptive", following
what each layer's attention contributes to the sequence at hand.

Shapes: B sequences, T new tokens, L layers.
"""

import torch

from token_filter import FilterConfig


def spread(weight, p, cap):
    """r_l = min(cap, a weight_l), a such that their mean is p: weight (..., L) float64 -> (..., L). p is at most cap."""
    L, full = weight.shape[-1], torch.zeros_like(weight, dtype=torch.bool)
    for _ in range(L):  # each pass holds at the cap what the last one's a took above it
        a = (p * L - cap * full.double().sum(-1, keepdim=True)) / weight.masked_fill(full, 0).sum(-1, keepdim=True)
        full |= a * weight >= cap * (1 - 1e-12)
    return (a * weight).masked_fill(full, cap)


def layer_ratios(config: FilterConfig, n_layers: int) -> list[float]:
    """Each layer's target ratio r_l in [0, 1]; their mean is p.

    tail: r_l = min(1, a l/(L-1)), a such that the mean is p; head: tail reversed; uniform: r_l = p; last: max(0.9, p) in the
    last layers only, the one before them taking the remainder; adaptive: p, until `Adaptive` has something to go by.
    """
    p, L, layer = config.prune, n_layers, torch.arange(n_layers, dtype=torch.float64)
    if config.schedule in ("uniform", "adaptive"):
        return [p] * L
    if config.schedule == "last":
        top = max(0.9, p)
        return (p * L - top * layer.flip(0)).clamp(0, top).tolist()  # what the later ones leave
    ratios = spread(layer, p, 1.0)
    ratios[0] = max(0.0, p * L - (L - 1))  # layer 0 skips only what is left when all the others skip everything
    return (ratios.flip(0) if config.schedule == "head" else ratios).tolist()


def adaptive_ratios(contribution, p):
    """r_l = min(0.95, a D_l^-8), a such that their mean is p: the less a layer's attention contributes, the more of its
    tokens it skips. contribution: D, (B, L) -> (B, L) float64.
    """
    return spread(contribution.double().clamp(min=1e-9) ** -8, p, max(0.95, p))


class Adaptive:
    """The ratios of B sequences' layers, set anew at positions warmup, 2 warmup, 4 warmup, ... of each sequence.

    D_l is the mean over the sequence's kept tokens, from position 4 on, of ||o_t - f_t|| / ||x_t||: how far the attention
    output o is from the anchor output f, which would stand in for it, relative to the residual stream x it is added to.
    Where only a share 1 - r_l is kept, a kept token counts 1 / (1 - r_l) times. Otherwise a layer that happened to look
    idle at first would be skipped from then on and, with few tokens left to show better, go on looking idle.
    """

    def __init__(self, config: FilterConfig, B, n_layers, dtype, device):
        self.p, self.warmup = config.prune, max(config.warmup, 1)
        self.ratio = torch.full((B, n_layers), config.prune, dtype=torch.float64, device=device)
        self.total = torch.zeros(B, n_layers, dtype=dtype, device=device)  # sum of ||o_t - f_t|| / ||x_t||, and
        self.number = torch.zeros_like(self.total)  # of how many tokens

    def changes(self, position):
        """Whether the ratios are set anew before the token at each position, an int64 tensor on the host."""
        times = position // self.warmup
        return (times * self.warmup == position) & (times > 0) & (times & (times - 1) == 0)

    def update(self, seen):
        """Set anew the ratios of the rows whose next position, seen (B,) on the host, is one where they change."""
        rows = self.changes(seen).nonzero()[:, 0].to(self.ratio.device)
        if len(rows):
            contribution = (self.total / self.number).where(self.number > 0, 1)  # a layer that kept none to go by is taken to matter
            self.ratio[rows] = adaptive_ratios(contribution[rows], self.p)  # in place: the layers hold views of it

    def measure(self, layer, departure, kept, position):
        """Take in a chunk's departures ||o_t - f_t|| / ||x_t|| in one layer; all (B, T), of which only kept tokens count."""
        kept = kept & (position >= 4)
        weight = torch.where(position >= self.warmup, (1 / (1 - self.ratio[:, layer, None])).to(departure.dtype), 1)
        weight = weight.masked_fill(~kept, 0)
        self.total[:, layer] += (weight * departure.masked_fill(~kept, 0)).sum(1)
        self.number[:, layer] += weight.sum(1)

    def select(self, rows):
        self.ratio, self.total, self.number = self.ratio[rows], self.total[rows], self.number[rows]

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.ratio, self.total, self.number))
