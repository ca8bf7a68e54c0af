"""How the ratio p is spread over the L layers."""

import torch

from token_filter import FilterConfig


def layer_ratios(config: FilterConfig, n_layers: int) -> list[float]:
    """Each layer's target ratio r_l in [0, 1]; their mean is p.

    tail: r_l = min(1, a l/(L-1)), a such that the mean is p; head: tail reversed; uniform: r_l = p; last: max(0.9, p) in the
    last layers only, the one before them taking the remainder.
    """
    p, L, layer = config.prune, n_layers, torch.arange(n_layers, dtype=torch.float64)
    if config.schedule == "uniform":
        return [p] * L
    if config.schedule == "last":
        top = max(0.9, p)
        return (p * L - top * layer.flip(0)).clamp(0, top).tolist()  # what the later ones leave
    ratios, full = layer, torch.zeros(L, dtype=torch.bool)
    for _ in range(L):  # each pass holds at 1 what the last one's a took above it
        a = (p * L - full.double().sum()) / layer.masked_fill(full, 0).sum()
        full |= a * layer >= 1 - 1e-12
        ratios = (a * layer).masked_fill(full, 1.0)
    ratios[0] = max(0.0, p * L - (L - 1))  # layer 0 takes only what is left when all the others find everything redundant
    return (ratios.flip(0) if config.schedule == "head" else ratios).tolist()
