"""Generate text with token filtering.

    python generate.py [CHECKPOINT] --prompt "..." --prune 0.5       filtered as in the paper
    python generate.py --prompt "..." --prune 0.5 --preset cache     only the cache is made smaller
    python generate.py --chat --prompt "..." --prune 0.3 --compare   dense and every preset in turn

A conversation is python chat.py. From Python: generation.generate().
"""

import os
import sys
from dataclasses import asdict
from itertools import islice

from cli.arguments import (
    Parser,
    add_filter_arguments,
    add_generation_arguments,
    add_model_arguments,
    check_filter_arguments,
    check_generation_arguments,
    check_text,
    filters_from,
    load_checkpoint,
    note_useless_filter,
    whole_number,
)
from cli.process import fail, run_command, single_process_only
from cli.report import COLUMNS, check_output, print_json, read_text
from filter_config import PRESETS

# Torch takes seconds to import. So what needs it is imported in the functions below, which are
# called once the arguments are known to make sense.


def make_parser() -> Parser:
    parser = Parser(description="Generate text with token filtering.")
    add_model_arguments(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to continue (-: stdin's); several of them are one batch",
    )
    parser.add_argument(
        "--prompts-file", metavar="FILE", help="more prompts, one a line (-: stdin)"
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="send each prompt as a user's message in the checkpoint's chat template",
    )
    parser.add_argument(
        "--no-echo",
        action="store_true",
        help="print answers alone (otherwise each stands under its prompt)",
    )
    parser.add_argument(
        "--num-samples",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="answers to one prompt, which is fed once (default: 1)",
    )
    add_generation_arguments(parser)
    parser.add_argument(
        "--compare",
        action="store_true",
        help="dense, then every preset, at --prune (default then: 0.3)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument(
        "--show-skips",
        action="store_true",
        help="colour each token by the share of layers that found it redundant",
    )
    parser.add_argument(
        "--skip-map",
        metavar="FILE",
        help="each layer's decision on each token, and its score: FILE.html, a page to explore in "
        "a browser, or FILE.png, a picture (needs matplotlib)",
    )
    add_filter_arguments(parser)
    return parser


def read_arguments(argv=None):
    """The arguments, and the texts of the prompts. Fails in one line where they make no sense."""
    args = make_parser().parse_args(argv)
    check_generation_arguments(args, args.num_samples)
    if args.compare and args.prune is None:
        args.prune = 0.3
    given = check_filter_arguments(args, "compare", "show_skips", "skip_map")
    if args.compare and given[0] != "--compare":
        fail(f"--compare runs every preset as it is: it cannot be combined with {given[0]}")
    if args.show_skips and args.json:
        fail("--show-skips colours text: it cannot be combined with --json")
    if args.show_skips and args.no_echo:
        fail("--show-skips colours prompts too: it cannot be combined with --no-echo")
    if args.system is not None and not args.chat:
        fail("--system does nothing without --chat")
    single_process_only(show_skips=args.show_skips, skip_map=args.skip_map, compile=args.compile)
    texts = read_prompts(args)
    if args.skip_map is not None:
        if args.compare or len(texts) > 1:
            fail(
                "--skip-map draws one prompt with one setting: "
                "leave out --compare and all prompts but one"
            )
        check_output("--skip-map", args.skip_map, (".html", ".png"))
    return args, texts


def read_prompts(args) -> list[str]:
    """The texts of --prompt and --prompts-file, each as often as --num-samples says."""
    sources = [*(args.prompt or []), args.prompts_file]
    if sources.count("-") > 1:
        fail("stdin (-) can be read only once")
    texts = []
    for text in args.prompt or []:
        if text == "-":
            text = read_text("-").removesuffix("\n")
        texts.append(text)
    if args.prompts_file:
        lines = read_text(args.prompts_file).split("\n")
        texts += [line for line in lines if line.strip()]
    check_text("--prompt", texts)
    if not texts:
        hint = "; to talk, use python chat.py" if args.chat else ""
        fail(f"no prompt: give --prompt TEXT or --prompts-file FILE{hint}")
    if "" in texts:
        fail(f"prompt {texts.index('') + 1} is empty")
    if args.num_samples > 1 and len(texts) > 1:
        fail(f"--num-samples is for one prompt, and here are {len(texts)}")
    return texts * args.num_samples


# ----------------------------------------------------------------------------------- the work


def encode_prompts(tokenizer, texts, args) -> list[list[int]]:
    """The prompts as tokens, with --chat in the chat template."""
    from generation import opening_messages
    from loading.checkpoint_files import CheckpointError

    try:
        if not args.chat:
            return [tokenizer.encode(text) for text in texts]
        opening = opening_messages(tokenizer, args.system)
        return [tokenizer.chat([*opening, {"role": "user", "content": text}]) for text in texts]
    except CheckpointError as error:
        fail(error)


def generate_answers(model, tokenizer, prompts, args, filter, echo=None, watch=None):
    """Generate for all prompts.

    echo   is called with each piece of a single prompt's answer, as it comes
    watch  as in generation.generate

    Returns each answer as the text of each of its tokens, the Stats, and whether Ctrl-C ended it.
    """
    from tqdm import tqdm

    from generation import Answer, Stats, generate

    stats = Stats()
    ended = set[int]()
    was_interrupted = False
    eos_ids = frozenset() if args.ignore_eos else tokenizer.eos_ids
    # An Answer has to see the token that ends it, so generate() is told of none.
    answers = [Answer(tokenizer, args.stop, eos_ids) for _ in prompts]
    pieces = [list[str]() for _ in prompts]
    tokens = generate(
        model,
        prompts,
        args.max_new_tokens,
        filter,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stats=stats,
        watch=watch,
        ended=ended,
    )
    bar = tqdm(
        tokens,
        desc="tokens",
        unit="",
        total=len(prompts) * args.max_new_tokens,
        disable=True if echo is not None else None,
        leave=False,
    )
    try:
        for row, token in bar:
            piece = answers[row].push(token)
            if answers[row].ended:
                ended.add(row)
            if token in eos_ids:
                continue
            pieces[row].append(piece)
            if echo is not None:
                echo(piece)
    except KeyboardInterrupt:
        was_interrupted = True
        bar.close()
    for answer, given in zip(answers, pieces):
        # An answer that Ctrl-C broke off ends with what was certain.
        is_complete = answer.ended or len(given) == args.max_new_tokens
        if given and is_complete:
            rest = answer.push(None)
            given[-1] += rest
            if echo is not None:
                echo(rest)
    return pieces, stats, was_interrupted


def warm_up_compiled(model, prompts, args, filter):
    """Have compiled steps ready before the clock runs, also for when half of the rows have left."""
    from generation import generate

    n_rows = len(prompts)
    while n_rows > 0:
        steps = generate(model, prompts[:n_rows], args.max_new_tokens, filter)
        list(islice(steps, 40 * n_rows))
        n_rows //= 2


def run_setting(model, tokenizer, prompts, texts, args, title, filter, decisions, coloured):
    """generate_answers(), which it calls and whose result it returns, with the answers printed."""
    echoes = ["" if args.no_echo else f"{text}\n" for text in texts]
    streams = len(prompts) == 1 and not args.json and not coloured
    not_yet_printed = echoes[:1]  # the prompt, until something stands under it

    def echo(text):
        print(*not_yet_printed, text, sep="", end="", flush=True)
        not_yet_printed.clear()

    try:
        if args.compile:
            warm_up_compiled(model, prompts, args, filter)
        pieces, stats, was_interrupted = generate_answers(
            model,
            tokenizer,
            prompts,
            args,
            filter,
            echo if streams else None,
            decisions.watch if coloured or args.skip_map else None,
        )
    except (ValueError, FloatingPointError) as error:
        fail(error)

    if streams:
        print(*not_yet_printed)
    elif coloured:
        print_coloured(tokenizer, prompts, pieces, decisions)
    elif not args.json:
        for i, answer in enumerate(pieces):
            print(f"[{i + 1}] {echoes[i]}{''.join(answer)}\n")
    if not args.json and not was_interrupted:
        # The figures of a comparison belong to its texts; otherwise stdout is for the text alone.
        file = sys.stdout if args.compare else sys.stderr
        print(f"{title}: {stats.line()}", file=file, flush=True)
    return pieces, stats, was_interrupted


def print_coloured(tokenizer, prompts, pieces, decisions):
    """Each prompt with its answer, in the colours of --show-skips."""
    from cli.skip_map import paint, token_pieces

    for i, (prompt, answer) in enumerate(zip(prompts, pieces)):
        number = f"[{i + 1}] " if len(prompts) > 1 else ""
        all_pieces = token_pieces(tokenizer, prompt) + answer
        print(number + paint(all_pieces, len(prompt), decisions.redundant[i]))


def chosen_settings(args):
    """(name, FilterConfig, or None for dense) of what is to be run, one after another."""
    if args.compare:
        return [("dense", None), *filters_from(args, PRESETS, [args.prune])]
    if not args.prune:
        return [("dense", None)]
    return filters_from(args, [args.preset or "paper"], [args.prune])


def shows_colours(args) -> bool:
    """Whether --show-skips was given and has an effect; a note on stderr where it has none."""
    if not args.show_skips:
        return False
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        return True
    print(
        "note: --show-skips has no effect where stdout is not a terminal, or NO_COLOR is set",
        file=sys.stderr,
    )
    return False


def figures_of(name, filter, pieces, stats):
    """What --json says of a setting."""
    return {
        "setting": name,
        "filter": None if filter is None else asdict(filter),
        "texts": ["".join(answer) for answer in pieces],
        "skip_ratio": stats.skip_ratio,
        "kv_held": stats.kv_held,
        "kv_read": stats.kv_read,
        **asdict(stats),
    }


def main(argv=None):
    args, texts = read_arguments(argv)
    from cli.skip_map import Decisions, paint_legend, token_pieces, write_skip_map

    settings = chosen_settings(args)
    coloured = shows_colours(args)
    model, tokenizer = load_checkpoint(args)
    prompts = encode_prompts(tokenizer, texts, args)
    longest = max(len(prompt) for prompt in prompts) + args.max_new_tokens
    note_useless_filter(model, [filter for _, filter in settings], longest)

    if coloured:
        print(paint_legend())
    if args.compare and not args.json:
        print(COLUMNS)  # what the words in the lines below the answers mean
    results = []
    for name, filter in settings:
        title = name if filter is None else f"{name}, prune {filter.prune}"
        if args.compare and not args.json:
            print(f"\n=== {title}")
        decisions = Decisions(len(prompts), model.config.n_layers)
        pieces, stats, was_interrupted = run_setting(
            model, tokenizer, prompts, texts, args, title, filter, decisions, coloured
        )
        results.append(figures_of(name, filter, pieces, stats))
        if was_interrupted:
            break

    if args.json:
        print_json({"prompts": texts, "results": results})
    if was_interrupted:
        not_written = f"; {args.skip_map} was not written" if args.skip_map else ""
        print(
            "interrupted: what was generated until then is above, "
            f"figures are not complete{not_written}",
            file=sys.stderr,
        )
        raise SystemExit(130)
    if args.skip_map and filter is not None:
        all_pieces = token_pieces(tokenizer, prompts[0]) + pieces[0]
        n_prompt = len(prompts[0])
        window = model.config.window
        write_skip_map(args.skip_map, title, all_pieces, n_prompt, decisions, filter, window)


if __name__ == "__main__":
    run_command(main)
