"""A model divided among processes (parallel.py) is the same model. Run by torchrun, this file is one of the processes."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))  # for torchrun

from runtime import tensor_parallel as parallel  # noqa: E402
from generation import generate  # noqa: E402
from load_weights import load_model  # noqa: E402
from filter_config import PRESETS, preset  # noqa: E402

LENGTHS = [50, 33, 41]
ALL = ("llama", "mistral-window")  # models that every preset is tried on; others: dense, and one that has it all


def results(folder) -> dict[str, torch.Tensor]:
    """What a model says and decides, dense and filtered: chunks of unequal prompts, a fork, steps, and sampled tokens."""
    model, found = load_model(folder, "cpu", "float64"), dict[str, torch.Tensor]()
    prompts = [torch.randint(0, 131, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in LENGTHS]
    for name in ("dense", *(PRESETS if folder.name in ALL else ["local"])):
        filter = None if name == "dense" else preset(name, prune=0.5, recent=min(preset(name).recent, 8), warmup=4)
        cache = model.new_cache(len(prompts), filter)
        logits = [model.prefill(prompts, cache, chunk=30)]
        cache.select([2, 0, 2])
        for step in range(6):
            logits.append(model(torch.tensor([[step], [7], [step + 1]]), cache, last=True))
        found |= {f"{name} logits": torch.stack(logits), f"{name} usage": cache.usage()}
        sampled = generate(model, prompts, 3, filter, temperature=1.0, top_p=0.9, seed=3)
        found[f"{name} sampled"] = torch.tensor(list(sampled))
    return found


def torchrun(n, *command):
    """Runs a command of this project in n processes: its exit code, stdout, stderr."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), *map(str, command)]
    return subprocess.run(run, cwd=HERE, capture_output=True, text=True, timeout=300, check=False)


def small(folder, name, **changes):
    """A small random model of a family, with at least two key/value heads."""
    import transformers

    from test_families import SMALL

    config = copy.deepcopy(SMALL[name])
    config.num_key_value_heads = max(2, config.num_key_value_heads)
    for key, value in changes.items():
        setattr(config, key, value)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for tensor, p in model.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "norm" in tensor else 0.0, 0.15)
    model.save_pretrained(folder / name)
    return folder / name


def same(folder, n, folders):
    """Every process's results are those of one alone: decisions equal, logits to 1e-9."""
    ran = torchrun(n, __file__, folder, *folders)
    assert ran.returncode == 0, ran.stderr
    for each in folders:
        alone = results(each)
        for rank in range(n):
            together = load_file(folder / f"{each.name}-{rank}.safetensors")
            for name, expected in alone.items():
                torch.testing.assert_close(together[name], expected, rtol=0, atol=1e-9, msg=f"{each.name}, rank {rank}, {name}")
        pairs, skipped = alone["local usage"][0, :2]
        assert 0.3 < skipped / pairs < 0.7, each


def test_two_processes_are_one_model_in_every_family(tmp_path):
    from test_families import SMALL, in_mistrals_format

    even = {"mistral", "qwen3"}  # whose output has an even number of rows, so it is divided too
    folders = [small(tmp_path, name, **{"vocab_size": 132} if name in even else {}) for name in SMALL]
    in_mistrals_format(tmp_path / "mistral", tmp_path / "params")
    same(tmp_path, 2, [*folders, tmp_path / "params"])


def test_four_processes_are_one_model(tmp_path):
    many = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "vocab_size": 132}
    same(tmp_path, 4, [small(tmp_path, "llama"), small(tmp_path, "mistral-window", **many)])


@pytest.mark.parametrize("n, flags, problem", [
    (2, ["nowhere"], "nowhere: no such folder"), (3, [], "cannot be divided by 3: --nproc-per-node may be 1, 2"),
])  # fmt: skip
def test_what_fails_is_said_once(checkpoint, n, flags, problem):
    ran = torchrun(n, "generate.py", *(flags if flags == ["nowhere"] else [checkpoint, *flags]), "--prompt", "the quick brown fox")
    said = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert ran.returncode and len(said) == 1 and problem in said[0] and "exitcode  : 2" in ran.stderr, ran.stderr


def test_one_that_dies_ends_all(tmp_path):
    ran = torchrun(2, __file__, "die")
    said = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert ran.returncode and len(said) <= 1 and "RuntimeError" not in ran.stderr, ran.stderr


def test_the_first_speaks_for_all(checkpoint):
    """What is printed is printed once, and is what one process alone prints."""
    command = ["generate.py", str(checkpoint), "--dtype", "float64", "--prompt", "the quick brown fox", "--max-new-tokens", "30"]
    ran = torchrun(2, *command, "--prune", "0.5")
    alone = subprocess.run([sys.executable, *command, "--prune", "0.5"], cwd=HERE, capture_output=True, text=True, check=True)
    assert ran.returncode == 0 and ran.stdout == alone.stdout and "quick" in ran.stdout
    shares = [re.findall("skipped .*", shown) for shown in (ran.stderr, alone.stderr)]
    assert len(shares[0]) == 1 and shares[0][0].split(" (0")[0] == shares[1][0].split(" (0")[0]


def work():
    from cli.process import run_command

    def die():
        parallel.meet(torch.device("cpu"))
        if parallel.RANK == 1:
            raise SystemExit(3)
        parallel.dist.all_reduce(torch.ones(1))

    if sys.argv[1] == "die":
        run_command(die)
    else:
        for folder in map(Path, sys.argv[2:]):
            save_file(results(folder), f"{sys.argv[1]}/{folder.name}-{parallel.RANK}.safetensors")
        parallel.leave()


if __name__ == "__main__":
    work()
