"""Perplexity of a text, dense and filtered.

    python eval_ppl.py [CHECKPOINT] --text FILE --window 768 --prune 0 0.2 0.5 --preset paper anchored cache

The text is tokenised whole, cut into windows, and each window is scored alone from an empty cache, as real decoding
would: filtering is causal and chunk-free, so one forward pass gives the same figures as token by token.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from generate import Parser, add_filter_arguments, add_model_arguments, fail, filter_from
from load_weights import CheckpointError, load
from model import Transformer
from token_filter import FilterConfig


@dataclass
class Score:
    """Sums over the tokens scored so far."""

    nll: float = 0.0  # negative log-likelihood, in nats
    tokens: int = 0  # whose loss is in nll
    pairs: int = 0  # (token, layer) pairs fed
    kept: int = 0  # of those, not redundant

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return math.exp(self.nll / self.tokens) if self.tokens else math.nan

    @property
    def skip_ratio(self) -> float:
        """Redundant (token, layer) pairs over all pairs."""
        return 1 - self.kept / self.pairs if self.pairs else math.nan


@torch.no_grad()
def evaluate(model: Transformer, windows: list[list[int]], filter: FilterConfig | None, batch=4, chunk=128) -> Iterable[Score]:
    """Score every token of every window but its first; yields the running Score after each chunk of a batch.

    Each window is a text of its own: fresh cache, positions from 0. `chunk` bounds the memory the logits take.
    """
    score = Score()
    for start in range(0, len(windows), batch):
        rows = windows[start : start + batch]
        lengths = torch.tensor([len(row) for row in rows])
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        cache = model.new_cache(len(rows), filter)
        for lo in range(0, tokens.shape[1], chunk):
            logits = model(tokens[:, lo : lo + chunk], cache, (lengths - lo).clamp(0, chunk))  # (B, T, V)
            targets = tokens[:, lo + 1 : lo + 1 + logits.shape[1]]
            scored = torch.arange(lo + 1, lo + 1 + targets.shape[1]) < lengths[:, None]
            losses = F.cross_entropy(
                logits[:, : targets.shape[1]].flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)),
                targets.flatten().to(logits.device),
                reduction="none",
            )
            score.nll += float(losses[scored.flatten().to(losses.device)].double().sum())
            score.tokens += int(scored.sum())
            yield score
        score.pairs += int(cache.seen.sum()) * model.config.n_layers
        score.kept += int(cache.kept().sum())
        yield score


def main(argv=None):
    parser = Parser(description="Perplexity of a text, dense and filtered.")
    add_model_arguments(parser)
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text, tokenised whole")
    parser.add_argument("--window", type=int, default=768, metavar="N", help="tokens scored together (default: %(default)s)")
    parser.add_argument("--offsets", type=int, nargs="+", metavar="N", help="first tokens of the windows (default: all, end to end)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="use only the text's first N tokens")
    parser.add_argument("--prune", type=float, nargs="+", default=[0.0, 0.1, 0.2, 0.3, 0.5], metavar="P")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="windows at a time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of --fusion random")
    add_filter_arguments(parser, several=True)
    args = parser.parse_args(argv)

    if args.window < 2 or args.batch < 1 or (args.max_tokens is not None and args.max_tokens < 2):
        fail("--window and --max-tokens must be at least 2, --batch at least 1")
    filters = []  # one dense row, then every preset at every ratio
    for name in args.preset or ["paper"]:
        for prune in args.prune:
            config = filter_from(args, name, prune)
            if config or "dense" not in [n for n, _ in filters]:
                filters.append((name if config else "dense", config))
    try:
        text = Path(args.text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        fail(f"{args.text}: cannot be read as UTF-8 text: {e}")

    try:
        model, tokenizer = load(args.checkpoint, args.device, args.dtype, progress=True)
        ids = tokenizer.encode(text, bos=False)[: args.max_tokens]
    except CheckpointError as e:
        fail(e)
    if args.window > model.config.max_positions:
        fail(f"--window {args.window} is longer than the model's context of {model.config.max_positions}")
    if len(ids) < 2:
        fail(f"{args.text}: {len(ids)} tokens are too few: perplexity needs at least two")
    offsets = args.offsets or range(0, len(ids) - 1, args.window)
    if not all(0 <= offset < len(ids) - 1 for offset in offsets):
        fail(f"--offsets must lie in the text's {len(ids)} tokens, at least one before the last")
    windows = [ids[offset : offset + args.window] for offset in offsets]

    print(
        f"{args.text}: {len(ids)} tokens, no BOS; {len(windows)} windows of up to {args.window}, each scored alone: "
        f"{sum(len(w) - 1 for w in windows)} losses; {str(model.embed.weight.dtype).removeprefix('torch.')}"
    )
    print(f"{'preset':<10}{'prune':>6}{'perplexity':>13}{'x dense':>10}{'skipped':>10}")
    dense = None
    for name, config in filters:
        steps = tqdm(evaluate(model, windows, config, args.batch), name, unit=" chunks", leave=False)
        for score in steps:
            steps.set_postfix_str(f"perplexity {score.perplexity:.2f}")
        if config is None:
            dense = score.perplexity
        ratio = f"{score.perplexity / dense:>10.3f}" if dense else " " * 10
        prune = config.prune if config else 0.0
        print(f"{name:<10}{prune:>6.2f}{score.perplexity:>13.3f}{ratio}{score.skip_ratio:>10.4f}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
