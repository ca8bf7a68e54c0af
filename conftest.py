"""What all tests share: the demo's checkpoint, a small random one, and a seed."""

import json
import os

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cli.arguments import DEMO
from tools import demo_checkpoint

# transformers, which the tests compare with, is to look at files only.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_configure():
    try:
        import hypothesis  # noqa: F401
    except ModuleNotFoundError:  # after `make demo` alone
        install = ".venv/bin/pip install -r requirements-dev.txt"
        pytest.exit(f"the tests need more packages: {install}", returncode=2)


@pytest.fixture(scope="session")
def demo():
    """The demo checkpoint's folder, written first if need be."""
    try:
        demo_checkpoint.main([])
    except SystemExit:
        pytest.fail("there is no demo checkpoint and it cannot be written: `make test` sets it up")
    return DEMO


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A small random checkpoint in three shards, with byte-level tokens and a chat template."""
    import transformers  # heavy; most test files do without

    folder = tmp_path_factory.mktemp("small") / "checkpoint"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
    )
    tokenizer.train_from_iterator(["the quick brown fox"], trainer)

    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=200,
        bos_token_id=0,
        eos_token_id=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="70KB")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert len(list(folder.glob("*.safetensors"))) == 3
    return folder


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
