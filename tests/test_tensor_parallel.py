"""A model divided among processes (runtime/tensor_parallel.py) is the same model.

Run by torchrun, this file is one of the processes.
"""

import copy
import re
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for torchrun

from filter_config import PRESETS, FilterConfig, preset  # noqa: E402
from generation import generate  # noqa: E402
from load_weights import load_model  # noqa: E402
from runtime import tensor_parallel  # noqa: E402

VOCAB = 131
LENGTHS = [50, 33, 41]  # of the three prompts
# The models that every preset is tried on. Others are run dense, and with the preset that uses
# everything.
ALL_PRESETS = ("llama", "mistral-window")


def random_prompt(length):
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, VOCAB, (length,), generator=generator).tolist()


def results(folder) -> dict[str, torch.Tensor]:
    """What a model says and decides, dense and filtered.

    That is of chunks of unequal prompts, of rows that are dropped and doubled, of decode steps, and
    of sampled tokens.
    """
    model = load_model(folder, "cpu", "float64")
    prompts = [random_prompt(length) for length in LENGTHS]
    filters: dict[str, FilterConfig | None] = {"dense": None}
    for name in PRESETS if folder.name in ALL_PRESETS else ("local",):
        recent = min(preset(name).recent, 8)
        filters[name] = preset(name, prune=0.5, recent=recent, warmup=4)

    found = {}
    for name, filter in filters.items():
        cache = model.new_cache(len(prompts), filter)
        logits = [model.prefill(prompts, cache, chunk=30)]
        cache.select([2, 0, 2])
        for step in range(6):
            tokens = torch.tensor([[step], [7], [step + 1]])
            logits.append(model(tokens, cache, last=True))
        sampled = generate(model, prompts, 3, filter, temperature=1.0, top_p=0.9, seed=3)
        found[f"{name} logits"] = torch.stack(logits)
        found[f"{name} usage"] = cache.usage()
        found[f"{name} sampled"] = torch.tensor(list(sampled))
    return found


# --------------------------------------------------------------- the process that torchrun starts


def run_as_rank():
    """Save this rank's results, or die as a test wants it."""
    from cli.process import Ranks, run_command

    if sys.argv[1] == "die":
        run_command(die_while_the_other_waits)
        return
    target, *folders = [Path(argument) for argument in sys.argv[1:]]
    for folder in folders:
        save_file(results(folder), target / f"{folder.name}-{tensor_parallel.RANK}.safetensors")
    Ranks.leave()


def die_while_the_other_waits():
    tensor_parallel.init_distributed(torch.device("cpu"))
    if tensor_parallel.RANK == 1:
        raise SystemExit(3)
    tensor_parallel.sum_over_ranks(torch.ones(1))


# ------------------------------------------------------------------------------------------ tests


def torchrun(n, *command):
    """Run a command of this project in n processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    return subprocess.run(
        [sys.executable, *launcher, *[str(part) for part in command]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def error_lines(ran):
    return [line for line in ran.stderr.splitlines() if line.startswith("error: ")]


def save_small(folder, name, **changes):
    """A small random model of a family, with at least two key/value heads; returns its folder."""
    import transformers

    from test_families import SMALL, randomise

    config = copy.deepcopy(SMALL[name])
    config.num_key_value_heads = max(2, config.num_key_value_heads)
    for key, value in changes.items():
        setattr(config, key, value)
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomise(model)
    model.save_pretrained(folder / name)
    return folder / name


def check_same(target, n, folders):
    """Every process's results are those of one process: decisions equal, logits to 1e-9."""
    ran = torchrun(n, __file__, target, *folders)
    assert ran.returncode == 0, ran.stderr
    for folder in folders:
        alone = results(folder)
        for rank in range(n):
            together = load_file(target / f"{folder.name}-{rank}.safetensors")
            for name, expected in alone.items():
                where = f"{folder.name}, rank {rank}, {name}"
                torch.testing.assert_close(together[name], expected, rtol=0, atol=1e-9, msg=where)
        pairs, redundant = alone["local usage"][0, :2]
        assert 0.3 < redundant / pairs < 0.7, folder


def test_two_processes_are_one_model_in_every_family(tmp_path):
    from test_families import SMALL, in_mistrals_format

    folders = []
    for name in SMALL:
        # An output projection of an even number of rows is divided, too.
        even = {"vocab_size": 132} if name in ("mistral", "qwen3") else {}
        folders.append(save_small(tmp_path, name, **even))
    in_mistrals_format(tmp_path / "mistral", tmp_path / "params")
    check_same(tmp_path, 2, [*folders, tmp_path / "params"])


def test_four_processes_are_one_model(tmp_path):
    sizes = {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "vocab_size": 132,
    }
    llama = save_small(tmp_path, "llama")
    mistral = save_small(tmp_path, "mistral-window", **sizes)
    check_same(tmp_path, 4, [llama, mistral])


def test_a_checkpoint_that_is_not_there_is_said_once():
    ran = torchrun(2, "generate.py", "nowhere", "--prompt", "the quick brown fox")
    check_failed_once(ran, "nowhere: no such folder")


def test_heads_that_cannot_be_divided_are_said_once(checkpoint):
    ran = torchrun(3, "generate.py", checkpoint, "--prompt", "the quick brown fox")
    check_failed_once(ran, "cannot be divided by 3: --nproc-per-node may be 1, 2")


def check_failed_once(ran, problem):
    assert ran.returncode != 0
    (line,) = error_lines(ran)
    assert problem in line
    assert "exitcode  : 2" in ran.stderr, ran.stderr


def test_one_that_dies_ends_all(tmp_path):
    ran = torchrun(2, __file__, "die")
    assert ran.returncode != 0
    assert len(error_lines(ran)) <= 1, ran.stderr
    assert "RuntimeError" not in ran.stderr, ran.stderr


def test_the_first_speaks_for_all(checkpoint):
    """What is printed is printed once, and is what a single process prints."""
    command = ["generate.py", str(checkpoint), "--prompt", "the quick brown fox"]
    command += ["--dtype", "float64", "--max-new-tokens", "30", "--prune", "0.5"]
    ran = torchrun(2, *command)
    alone = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == alone.stdout
    assert "quick" in ran.stdout
    (line,) = re.findall("skipped .*", ran.stderr)
    (expected,) = re.findall("skipped .*", alone.stderr)
    # Without the memory, of which each rank has its part.
    assert line.split(" (0")[0] == expected.split(" (0")[0]


if __name__ == "__main__":
    run_as_rank()
