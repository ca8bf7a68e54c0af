"""Texts survive the tokenizers, which give transformers' ids, and render chats as it does.

What a stream gives out is the whole text; bad files are named in one line.
"""

import io
import json
import random
import shutil

import pytest
import sentencepiece
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers import Tokenizer as JsonTokenizer

from load_weights import CheckpointError, load
from loading.tokenizer import MARK, Tokenizer
from test_load_weights import assert_same_weights, edit_json, fails, save_model

TRICKY = [
    "",
    " ",
    "hello world",
    " two  leading  and trailing ",
    "line\n\n\ttab\r\n",
    "naïve café — “quotes” …",
    "日本語とעברית",
    "👩‍👩‍👧 flags 🇫🇷🇫🇷 \U0001f9ff",
    "e\u0301 combining",
    "0123456789 3.14",
    "<s> </s> <|end|> <unk> <0xE2>",
    "\ufffd replacement \ufffd",
    "hello ▁ world",
    "def f(x):\n    return {'a': x[0]}  # </code>\n",
    "hello<s>world</s> <|start|><|end|>",
]
WORDS = ["the", "cat", "sat", "on", "a", "mat", "token", "filter", "hello", "world"]
WORDS += ["prune", "of", "and", "to"]
KINDS = ["sentencepiece", "byte-fallback", "byte-level"]

# Ids of the byte-level tokenizer.
START = 260
END = 261
THINK = 262


# -------------------------------------------------------------------------- tokenizers to try on


def train_sentencepiece(remove_extra_whitespaces=False):
    """The bytes of a tokenizer.model."""
    random.seed(0)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(random.choices(WORDS, k=8)) for _ in range(500)),
        model_writer=model,
        model_type="bpe",
        vocab_size=330,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=remove_extra_whitespaces,
        minloglevel=2,
    )
    return model.getvalue()


def byte_fallback_json(model):
    """The same BPE as a tokenizer.json, in the way that LLaMA-2's is written."""
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for i, piece in enumerate(pieces):  # learnt first, merged first
        if not model.is_byte(i) and not model.is_control(i):
            halves = [(piece[:n], piece[n:]) for n in range(1, len(piece))]
            merges += [(left, right) for left, right in halves if left in vocab and right in vocab]
    bpe = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = JsonTokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    names = ("<unk>", "<s>", "</s>")
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def byte_level_json():
    """GPT-2's kind: every byte is a letter of the vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*alphabet, "he", "ll", "Ġw", "Ċ<"])}
    tokenizer = JsonTokenizer(models.BPE(vocab, [("h", "e"), ("l", "l"), ("Ġ", "w")]))
    digits = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|start|>", "<|end|>"])  # START and END
    tokenizer.add_tokens(["<think>"])  # THINK; not special: it is text
    return tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder for each kind of tokenizer."""
    made = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    proto = train_sentencepiece()
    (made["sentencepiece"] / "tokenizer.model").write_bytes(proto)

    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    byte_fallback_json(model).save(str(made["byte-fallback"] / "tokenizer.json"))
    edit_config(made["byte-fallback"], bos_token="<s>", eos_token="</s>")

    byte_level_json().save(str(made["byte-level"] / "tokenizer.json"))
    class_name = "PreTrainedTokenizerFast"
    edit_config(
        made["byte-level"], bos_token="<|start|>", eos_token="<|end|>", tokenizer_class=class_name
    )
    return made


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def folder(folders, kind, tmp_path):
    """A copy of a kind's folder, to be changed at will."""
    return shutil.copytree(folders[kind], tmp_path / kind)


@pytest.fixture
def byte_level(folders, tmp_path):
    """A copy of the byte-level tokenizer's folder."""
    return shutil.copytree(folders["byte-level"], tmp_path / "copy")


@pytest.fixture
def byte_fallback(folders, tmp_path):
    """A copy of the folder of the tokenizer.json with byte fallback."""
    return shutil.copytree(folders["byte-fallback"], tmp_path / "copy")


@pytest.fixture
def model_folder(folders, tmp_path):
    """A copy of the folder with a tokenizer.model."""
    return shutil.copytree(folders["sentencepiece"], tmp_path / "copy")


def edit_config(folder, **changes):
    edit_json(folder / "tokenizer_config.json", **changes)


def of_transformers(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


def token_names(kind):
    """The names of BOS and EOS."""
    if kind == "byte-level":
        return "<|start|>", "<|end|>"
    return "<s>", "</s>"


def from_user(content):
    """A conversation of one message."""
    return [{"role": "user", "content": content}]


def streamed(tokenizer, ids, start=True):
    """All text that a stream gives out."""
    stream = tokenizer.stream(start)
    pieces = [stream.push(i) for i in ids]
    return "".join(pieces) + stream.flush()


def pieces_of(tokenizer, text):
    """The names of a text's tokens, of a SentencePiece tokenizer."""
    ids = tokenizer.encode(text, bos=False, parse_special=True)
    return [tokenizer._backend.model.id_to_piece(i) for i in ids]


# ----------------------------------------------------------------------------- encode and decode


@pytest.mark.parametrize("text", TRICKY)
def test_text_survives(folders, kind, text):
    tokenizer = Tokenizer(folders[kind])
    expected = text
    if kind != "byte-level":
        expected = text.replace("▁", " ")  # SentencePiece's sign for a space
    assert tokenizer.decode(tokenizer.encode(text)) == expected


def test_sentencepiece_and_its_tokenizer_json_agree(folders):
    ours = Tokenizer(folders["byte-fallback"])
    reference = Tokenizer(folders["sentencepiece"])
    assert ours.bos_id == reference.bos_id
    assert ours.eos_ids == reference.eos_ids
    assert ours.vocab_size == reference.vocab_size
    for text in TRICKY[1:]:
        assert ours.encode(text) == reference.encode(text)
    conversation = "<s>the cat</s><s> sat"
    ids = ours.encode(conversation, bos=False, parse_special=True)
    assert ids == reference.encode(conversation, bos=False, parse_special=True)


@pytest.mark.parametrize("kind", ["byte-fallback", "byte-level"])
def test_same_ids_as_transformers(folders, kind):
    ours = Tokenizer(folders[kind])
    reference = of_transformers(folders[kind])
    for text in TRICKY:
        ids = ours.encode(text, bos=False)
        expected = reference(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ids == expected
        parsed = ours.encode(text, bos=False, parse_special=True)
        assert parsed == reference(text, add_special_tokens=False).input_ids
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_special_tokens_are_parsed_only_on_request_and_never_shown(folders, kind):
    tokenizer = Tokenizer(folders[kind])
    bos_name, eos_name = token_names(kind)
    bos = tokenizer.bos_id
    eos = min(tokenizer.eos_ids)
    text = f"{bos_name}hello{eos_name}"

    ids = tokenizer.encode(text, bos=False, parse_special=True)
    assert (ids[0], ids[-1]) == (bos, eos)
    assert tokenizer.decode(ids) == "hello"

    ids = tokenizer.encode(text, bos=False)
    assert bos not in ids
    assert eos not in ids
    assert tokenizer.decode(ids) == text

    outside = [10**6, -1]
    ids = [bos, *tokenizer.encode("a b", bos=False), eos, *outside]
    assert tokenizer.decode(ids) == "a b"


def test_empty_text(folder):
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    tokenizer = Tokenizer(folder)
    assert tokenizer.encode("", bos=False) == []
    assert tokenizer.encode("", bos=False, parse_special=True) == []
    assert tokenizer.chat([]) == []
    assert tokenizer.chat(from_user("")) == []
    assert tokenizer.decode([]) == ""
    assert tokenizer.stream().flush() == ""
    edit_json(folder / "added_tokens.json", **{"": tokenizer.vocab_size})
    assert "the added token '' has two ids, or a bad one" in fails(Tokenizer, folder)


def test_tokenizer_json_is_preferred_and_never_truncates(model_folder):
    tokenizer = byte_level_json()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(model_folder / "tokenizer.json"))
    assert len(Tokenizer(model_folder).encode("abcdefgh", bos=False)) == 8


def test_mistrals_name_for_a_sentencepiece_model(folders, tmp_path):
    shutil.copy(folders["sentencepiece"] / "tokenizer.model", tmp_path / "tokenizer.model.v3")
    expected = Tokenizer(folders["sentencepiece"]).encode("the cat")
    assert Tokenizer(tmp_path).encode("the cat") == expected


# ----------------------------------------------------------------------------------- BOS and EOS


def test_bos(folders):
    sentencepiece_model = Tokenizer(folders["sentencepiece"])
    json_says = Tokenizer(folders["byte-fallback"])
    nothing_says = Tokenizer(folders["byte-level"])
    for tokenizer in (sentencepiece_model, json_says):
        assert tokenizer.encode("a")[0] == 1
        assert 1 not in tokenizer.encode("a", bos=False)
    bare = nothing_says.encode("a", bos=False)
    assert nothing_says.encode("a") == bare
    assert nothing_says.encode("a", bos=True) == [START, *bare]


def begun_by(first, *more):
    """A post-processor that writes these tokens, each a name and an id, in front of a text."""
    names = " ".join(name for name, _ in (first, *more))
    return processors.TemplateProcessing(f"{names} $A", special_tokens=[first, *more])


START_TOKEN = ("<|start|>", START)
END_TOKEN = ("<|end|>", END)
NO_TOKEN = processors.ByteLevel(trim_offsets=False)
POST_PROCESSORS = {
    "none": None,
    "no token": NO_TOKEN,
    "bos_token": begun_by(START_TOKEN),
    "another token": begun_by(END_TOKEN),
    "two tokens": begun_by(END_TOKEN, START_TOKEN),
    "an id of another name": begun_by(("<|start|>", 5)),
    "a token behind, too": processors.TemplateProcessing(
        "<|end|> $A <|start|>", special_tokens=[START_TOKEN, END_TOKEN]
    ),
    "the last of several": processors.Sequence([NO_TOKEN, begun_by(END_TOKEN)]),
    "RoBERTa's": processors.RobertaProcessing(END_TOKEN, END_TOKEN),
}
WRITE_BEHIND = ("a token behind, too", "RoBERTa's")  # which ours leaves out
CLASSES = [
    None,
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "PreTrainedTokenizerFast",
    "GPT2Tokenizer",
    "Qwen2Tokenizer",
    "GPTNeoXTokenizerFast",
]


@pytest.mark.parametrize("class_name", CLASSES)
@pytest.mark.parametrize("post", POST_PROCESSORS)
def test_bos_beside_tokenizer_json_as_in_transformers(tmp_path, class_name, post):
    tokenizer = byte_level_json()
    if POST_PROCESSORS[post] is not None:
        tokenizer.post_processor = POST_PROCESSORS[post]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    edit_config(tmp_path, tokenizer_class=class_name, bos_token="<|start|>", eos_token="<|end|>")
    for family, add_bos_token in (("llama", None), ("llama", True), ("qwen2", False)):
        edit_json(tmp_path / "config.json", model_type=family)
        edit_config(tmp_path, add_bos_token=add_bos_token)
        ours = Tokenizer(tmp_path)
        reference = of_transformers(tmp_path)
        bare = reference("hello", add_special_tokens=False).input_ids
        ids = reference("hello").input_ids
        if post in WRITE_BEHIND and ids[-1] in (START, END):
            ids = ids[:-1]
        assert ours.encode("hello") == ids, (family, add_bos_token)
        assert ours.encode("hello", bos=False) == bare
        with_bos = [START, *bare] if ids == bare else ids
        assert ours.encode("hello", bos=True) == with_bos
        assert ours.bos_id == with_bos[0]


@pytest.mark.parametrize("bos_token, bos_id", [("<s>", 1), ("</s>", 2)])
def test_bos_of_code_llama_as_in_transformers(byte_fallback, bos_token, bos_id):
    """It is bos_token, whatever the post-processor says."""
    edit_json(byte_fallback / "config.json", model_type="llama")
    edit_config(byte_fallback, tokenizer_class="CodeLlamaTokenizer", bos_token=bos_token)
    for add_bos_token in (None, True, False):
        edit_config(byte_fallback, add_bos_token=add_bos_token)
        ids = Tokenizer(byte_fallback).encode("the cat")
        assert ids[0] == bos_id
        assert ids == of_transformers(byte_fallback)("the cat").input_ids


def test_a_post_processor_with_a_token_that_is_not_there(tmp_path):
    tokenizer = byte_level_json()
    tokenizer.post_processor = begun_by(("<|start|>", 999))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    problem = "its post-processor writes the tokens [999]"
    assert fails(Tokenizer, tmp_path).startswith(f"{tmp_path}/tokenizer.json: {problem}")


@pytest.mark.parametrize(
    "class_name, add_bos_token, bos_token, expected",
    [
        # What transformers 5.23 writes. It needs protobuf to read these files.
        ("LlamaTokenizer", None, "<s>", []),
        ("LlamaTokenizer", True, "<s>", [1]),
        ("LlamaTokenizerFast", True, "</s>", [2]),
        ("LlamaTokenizer", False, "<s>", []),
        ("LlamaTokenizer", True, None, []),
        ("LlamaTokenizer", True, ..., [1]),
        ("CodeLlamaTokenizer", None, "<s>", [1]),
        ("CodeLlamaTokenizer", False, "<s>", []),
        ("PreTrainedTokenizerFast", None, "<s>", []),
        ("PreTrainedTokenizerFast", True, "<s>", [1]),
        ("GPTNeoXTokenizer", True, "<s>", [1]),
        (None, False, "<s>", []),
        # Ours alone: of no class, so LLaMA's or Mistral's own.
        (None, None, "<s>", [1]),
        (None, None, ..., [1]),
    ],
)
@pytest.mark.parametrize("place", ["tokenizer_config.json", "config.json"])
def test_bos_beside_a_sentencepiece_model_as_in_transformers(
    model_folder, class_name, add_bos_token, bos_token, expected, place
):
    edit_config(model_folder, add_bos_token=add_bos_token, bos_token=bos_token)
    edit_json(model_folder / place, tokenizer_class=class_name)
    tokenizer = Tokenizer(model_folder)
    bare = tokenizer.encode("the cat", bos=False)
    assert tokenizer.encode("the cat") == expected + bare
    assert tokenizer.encode("the cat", bos=True)[1:] == bare


@pytest.mark.parametrize(
    "family, adds_bos", [("llama", True), ("qwen2", False), ("mistral", False), ("phi3", False)]
)
def test_the_class_does_not_count_where_transformers_has_one_for_the_model(
    model_folder, family, adds_bos
):
    edit_config(model_folder, tokenizer_class="CodeLlamaTokenizer")
    edit_json(model_folder / "config.json", model_type=family)
    ids = Tokenizer(model_folder).encode("the cat")
    assert (ids[0] == 1) == adds_bos


def test_a_text_ends_at_the_tokenizers_eos_and_at_those_of_the_first_file_that_numbers_any(
    folder, kind
):
    _, name = token_names(kind)
    (own,) = Tokenizer(folder).eos_ids
    edit_config(folder, eos_token={"content": name, "__type": "AddedToken"})
    assert Tokenizer(folder).eos_ids == {own}
    edit_json(folder / "config.json", eos_token_id=None)
    assert Tokenizer(folder).eos_ids == {own}
    edit_json(folder / "config.json", eos_token_id=7)
    assert Tokenizer(folder).eos_ids == {7, own}
    edit_json(folder / "generation_config.json", bos_token_id=1)
    assert Tokenizer(folder).eos_ids == {7, own}
    edit_json(folder / "generation_config.json", eos_token_id=[8, 9])
    assert Tokenizer(folder).eos_ids == {8, 9, own}
    edit_config(folder, eos_token=None)
    assert Tokenizer(folder).eos_ids == {8, 9}
    edit_json(folder / "special_tokens_map.json", eos_token=name)
    assert Tokenizer(folder).eos_ids == {8, 9, own}


def test_bos_is_wanted_but_unknown(tmp_path):
    byte_level_json().save(str(tmp_path / "tokenizer.json"))
    assert "no BOS token" in fails(Tokenizer(tmp_path).encode, "a", bos=True)
    edit_config(tmp_path, add_bos_token=True)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("a") == tokenizer.encode("a", bos=False)


# ------------------------------------------------------------------- special and added tokens


@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token": "<think>"},
        {"image_token": "<think>"},
        {"additional_special_tokens": ["", {"content": "<think>"}, 5]},
        {"extra_special_tokens": {"x": "<think>"}},
        {"added_tokens_decoder": {str(THINK): {"content": "<think>", "special": True}}},
    ],
)
def test_what_the_files_call_special_is_special(byte_level, settings):
    """Named, listed or marked in tokenizer_config.json, whatever tokenizer.json says of it."""
    template = "{{ messages[0].content }}<think>"
    edit_config(byte_level, chat_template=template, **settings)
    tokenizer = Tokenizer(byte_level)
    ids = tokenizer.chat(from_user("a<think>b"))
    assert ids.count(THINK) == 1
    assert ids[-1] == THINK
    assert tokenizer.decode(ids) == "a<think>b"


@pytest.mark.parametrize(
    "settings", [{"eos_token": "▁cat"}, {"additional_special_tokens": ["▁cat"]}]
)
def test_a_piece_of_a_sentencepiece_model_that_is_called_special(model_folder, settings):
    (cat,) = Tokenizer(model_folder).encode("cat", bos=False)
    edit_config(model_folder, **settings)
    tokenizer = Tokenizer(model_folder)
    assert cat not in tokenizer.encode("▁cat")
    assert tokenizer.encode("▁cat", parse_special=True)[-1] == cat


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
@pytest.mark.parametrize("place", ["tokenizer.json", "tokenizer_config.json", "both"])
def test_space_around_added_tokens(byte_level, flag, place):
    """The flag stands in one of the files; where both have the token, the config's counts."""
    if place != "tokenizer_config.json":
        flags = {flag: True} if place == "tokenizer.json" else {}
        tokenizer = byte_level_json()
        tokenizer.add_tokens([AddedToken("<|user|>", special=True, normalized=False, **flags)])
        tokenizer.save(str(byte_level / "tokenizer.json"))
    if place != "tokenizer.json":
        entry = {"content": "<|user|>", "special": True, "normalized": False, flag: True}
        edit_config(byte_level, added_tokens_decoder={"263": entry})
    template = "{% for m in messages %}x<|user|>\n{{ m.content }} <|user|> \n<|user|>y{% endfor %}"
    edit_config(byte_level, chat_template=template)
    messages = from_user(" hello  world")
    expected = of_transformers(byte_level).apply_chat_template(messages, return_dict=False)
    tokenizer = Tokenizer(byte_level)
    assert tokenizer.chat(messages) == expected
    assert tokenizer.chat(messages, parse_special=True) == expected


def test_tokens_added_to_a_sentencepiece_model(model_folder):
    size = Tokenizer(model_folder).vocab_size
    entries = {"1": {"content": "<s>"}, str(size): {"content": "<|im_start|>"}}
    ids = {"<|im_start|>": size, "<|im_end|>": size + 1, "<|im": size + 2}
    edit_config(model_folder, added_tokens_decoder=entries, eos_token="<|im_end|>")
    edit_json(model_folder / "added_tokens.json", **ids)
    tokenizer = Tokenizer(model_folder)
    assert tokenizer.vocab_size == size + 3
    assert tokenizer.eos_ids == {size + 1}
    hello = tokenizer.encode("hello", bos=False)
    found = tokenizer.encode("<|im_start|>hello<|im_end|>", parse_special=True)
    assert found == [1, size, *hello, size + 1]
    # eos_token is special, the other one text.
    assert tokenizer.decode(found) == "<|im_start|> hello"


def test_bad_tables_of_added_tokens(model_folder):
    for bad in ({"x": {"content": "y"}}, {"400": "y"}, {"400": {}}, [], 5):
        edit_config(model_folder, added_tokens_decoder=bad)
        assert "added" in fails(Tokenizer, model_folder)
    edit_config(model_folder, added_tokens_decoder=None)
    edit_json(model_folder / "added_tokens.json", **{"<|im_end|>": float("inf")})
    assert "added tokens" in fails(Tokenizer, model_folder)


FLAGS = [(), ("lstrip",), ("rstrip",), ("single_word",), ("lstrip", "rstrip")]


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("legacy", [True, False])
def test_tokens_added_to_a_sentencepiece_model_are_as_in_its_tokenizer_json(
    model_folder, tmp_path, legacy, flags
):
    """Those that are not special are text, and one token wherever they are typed."""
    ours, reference = with_added_tokens(model_folder, tmp_path / "json", legacy, flags)
    rng = random.Random(0)
    parts = [*"ab  <>\n\t1.é日", "hello", " the cat", MARK]
    parts += ["<s>", "</s>", "<tool>", " <tool> ", "<tool_x>", "<|end|>", "<|e", "<re>"]
    for _ in range(60):
        text = "".join(rng.choices(parts, k=rng.randrange(1, 12)))
        # Metaspace gives a text that begins with a space no other.
        text = text.lstrip()
        assert ours.encode(text, bos=False) == reference.encode(text, bos=False), text
        ids = ours.encode(text, bos=False, parse_special=True)
        assert ids == reference.encode(text, bos=False, parse_special=True), text
        assert ours.decode(ids) == reference.decode(ids), text
        assert streamed(ours, ids) == reference.decode(ids), text
        assert ours.chat(from_user(text)) == reference.chat(from_user(text)), text

    (tool,) = ours.encode("<tool>", bos=False)
    assert ours.decode([tool, tool]) == "<tool><tool>"
    all_bytes = range(3, 259)
    words = [i for i in range(ours.vocab_size + 1) if i not in all_bytes]
    often = [tool, tool + 1, tool + 2]
    for _ in range(200):
        ids = rng.choices(words + 20 * often, k=8)
        assert ours.decode(ids) == reference.decode(ids), ids


def with_added_tokens(model_folder, json_folder, legacy, flags):
    """The tokenizer of a tokenizer.model and of the same as tokenizer.json, with tokens added."""
    path = model_folder / "tokenizer.model"
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    same = byte_fallback_json(model)
    if not legacy:
        same.normalizer = None
        same.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    json_folder.mkdir()
    same.save(str(json_folder / "tokenizer.json"))

    is_special = {
        "<tool>": False,
        "<|end|>": True,
        "<tool_x>": False,
        "<|e": False,
        "<re>": True,
    }
    more = dict.fromkeys(flags, True)
    first_id = model.get_piece_size()
    entries = {}
    for i, (name, special) in enumerate(is_special.items()):
        entry = {"content": name, "special": special, "normalized": False, **more}
        entries[first_id + i] = entry
    template = "{% for m in messages %}<s>{{ m.content }}<|end|>{% endfor %}<tool>x"
    for folder in (model_folder, json_folder):
        edit_config(folder, bos_token="<s>", legacy=legacy)
        edit_config(folder, chat_template=template, added_tokens_decoder=entries)
    return Tokenizer(model_folder), Tokenizer(json_folder)


@pytest.mark.parametrize("special", [False, True])
def test_another_name_for_a_piece_of_a_sentencepiece_model(model_folder, special):
    (cat,) = Tokenizer(model_folder).encode("cat", bos=False)
    entry = {"content": "<tool>", "special": special}
    edit_config(model_folder, added_tokens_decoder={cat: entry})
    tokenizer = Tokenizer(model_folder)
    assert tokenizer.encode("<tool>", bos=False, parse_special=True) == [cat]
    if special:
        assert tokenizer.decode([cat]) == ""
        assert tokenizer.encode("<tool>", bos=False) != [cat]
    else:
        assert tokenizer.decode([cat]) == "<tool>"
        assert tokenizer.encode("<tool>", bos=False) == [cat]


@pytest.mark.parametrize(
    "flag, written", [("lstrip", "the<|x|> \ncat"), ("rstrip", "the <|x|>cat")]
)
def test_space_around_tokens_added_to_a_sentencepiece_model(model_folder, flag, written):
    size = Tokenizer(model_folder).vocab_size
    template = "the <|x|> \ncat"
    entry = {"content": "<|x|>"}
    edit_config(model_folder, chat_template=template, added_tokens_decoder={size: entry})
    expected = Tokenizer(model_folder).encode(written, bos=False, parse_special=True)
    entry[flag] = True
    edit_config(model_folder, added_tokens_decoder={size: entry})
    tokenizer = Tokenizer(model_folder)
    assert tokenizer.chat([]) == expected
    assert tokenizer.encode(template, bos=False, parse_special=True) == expected


@pytest.mark.parametrize("kind, name", [("byte-level", "<|end|>"), ("sentencepiece", "</s>")])
def test_added_tokens_say_the_same_everywhere(folder, name):
    tokenizer = Tokenizer(folder)
    old = tokenizer.encode(name, bos=False, parse_special=True)[0]
    new = tokenizer.vocab_size
    entries = {old: {"content": name}, new: {"content": "<x>", "special": True}}
    edit_config(folder, added_tokens_decoder=entries)
    edit_json(folder / "added_tokens.json", **{"<x>": new})
    tokenizer = Tokenizer(folder)
    assert tokenizer.encode("<x>", bos=False, parse_special=True) == [new]
    assert tokenizer.encode("<x>", bos=False) != [new]

    edit_json(folder / "added_tokens.json", **{"<x>": new + 1})
    assert "the added token '<x>' has two ids" in fails(Tokenizer, folder)
    edit_json(folder / "added_tokens.json", **{"<x>": new, name: old + 1})
    assert "has two ids" in fails(Tokenizer, folder)
    edit_config(folder, added_tokens_decoder={old + 1: {"content": name}})
    edit_json(folder / "added_tokens.json", **{"<x>": ..., name: ...})
    assert f"{name!r} the id {old + 1}, unlike" in fails(Tokenizer, folder)


# -------------------------------------------------------------------------- a space in front


@pytest.mark.parametrize("wish", [True, False])
@pytest.mark.parametrize(
    "kind, settings",
    [
        ("byte-level", {"tokenizer_class": "Qwen2Tokenizer"}),
        ("byte-fallback", {"tokenizer_class": "LlamaTokenizer"}),
        ("byte-fallback", {}),
    ],
)
def test_add_prefix_space_as_in_transformers(folder, settings, wish):
    edit_config(folder, add_prefix_space=wish, **settings)
    ours = Tokenizer(folder)
    reference = of_transformers(folder)
    eos = reference.eos_token
    for text in ("", "the cat", f"the{eos}cat", f"{eos}cat"):
        ids = reference(text, add_special_tokens=False).input_ids
        assert ours.encode(text, bos=False, parse_special=True) == ids
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("wish, written", [(True, "▁the"), (False, "the")])
def test_add_prefix_space_of_a_sentencepiece_model(model_folder, wish, written):
    edit_config(model_folder, add_prefix_space=wish)
    tokenizer = Tokenizer(model_folder)
    assert "".join(pieces_of(tokenizer, "the")) == written
    assert tokenizer.encode("", bos=False) == []
    for text in TRICKY:
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")
    check_streaming(tokenizer)


def test_a_sentencepiece_model_that_is_not_legacy_puts_no_space_after_a_special_token(
    model_folder,
):
    legacy = Tokenizer(model_folder)
    assert pieces_of(legacy, "the</s>cat") == ["▁the", "</s>", "▁cat"]

    edit_config(model_folder, legacy=False)
    tokenizer = Tokenizer(model_folder)
    the, eos, *cat = pieces_of(tokenizer, "the</s>cat")
    assert (the, eos, "".join(cat)) == ("▁the", "</s>", "cat")
    assert pieces_of(tokenizer, "the</s> cat") == ["▁the", "</s>", "▁cat"]
    assert "".join(pieces_of(tokenizer, "</s>cat")) == "</s>cat"
    assert pieces_of(tokenizer, "the cat") == pieces_of(legacy, "the cat")


# ------------------------------------------------------------------------------------ streaming


def check_stream(tokenizer, ids):
    """What a stream gives out is the text; returns its pieces."""
    stream = tokenizer.stream(start=True)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)
    return pieces


def check_streaming(tokenizer):
    for text in TRICKY:
        ids = tokenizer.encode(text)
        check_stream(tokenizer, ids)
        check_stream(tokenizer, ids[1:])
        check_stream(tokenizer, ids[:-1])  # may end within a character
        doubled = [i for i in ids for _ in range(2)]
        check_stream(tokenizer, ids + doubled)
    pieces = check_stream(tokenizer, tokenizer.encode("hello world hello world", bos=False))
    assert sum(piece != "" for piece in pieces) > 2

    # Mostly bytes, in any order, with spaces, words and special tokens among them.
    interesting = tokenizer.encode("é日👩 hello", bos=False) + tokenizer.encode(" ", bos=False)
    interesting += [tokenizer.bos_id, tokenizer.vocab_size]
    any_id = st.sampled_from(interesting) | st.integers(0, tokenizer.vocab_size - 1)

    @settings(max_examples=300, deadline=None)
    @given(st.lists(any_id, max_size=24))
    def check_any(ids):
        check_stream(tokenizer, ids)

    check_any()


def test_streaming_equals_decoding_at_once(folders, kind):
    check_streaming(Tokenizer(folders[kind]))


def test_streaming_of_random_texts(folders, kind):
    tokenizer = Tokenizer(folders[kind])
    rng = random.Random(0)
    parts = [*"ab <>\n\t01.", *"é日本ה🇫🧷👩\u0301\u200d\ufffd"]
    parts += ["  ", "hello", " the cat", "<s>", "</s>", "<|end|>", "<0xE2>"]
    for _ in range(200):
        text = "".join(rng.choices(parts, k=rng.randrange(1, 30)))
        ids = tokenizer.encode(text, parse_special=rng.random() < 0.5)
        check_stream(tokenizer, ids)


def test_streaming_where_all_leading_spaces_are_dropped(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(remove_extra_whitespaces=True))
    tokenizer = Tokenizer(tmp_path)
    (cat,) = tokenizer.encode("cat", bos=False)
    space = tokenizer.encode("é", bos=False)[0]
    ids = [space, space, cat, space, space, cat]
    assert tokenizer.decode(ids) == "cat   cat"
    check_stream(tokenizer, ids)
    check_streaming(tokenizer)


def test_streaming_gives_characters_as_soon_as_they_are_whole(folders):
    tokenizer = Tokenizer(folders["byte-level"])
    stream = tokenizer.stream(start=True)
    assert [stream.push(i) for i in tokenizer.encode("aé!")] == ["a", "", "é", "!"]

    # Bytes of a run are certain when the run is over; "!" is a byte too in this vocabulary.
    tokenizer = Tokenizer(folders["sentencepiece"])
    stream = tokenizer.stream(start=True)
    assert [stream.push(i) for i in tokenizer.encode("aé!", bos=False)] == ["a", "", "", ""]
    assert stream.flush() == "é!"


def test_an_answer_has_its_first_space(folders, kind):
    tokenizer = Tokenizer(folders[kind])
    ids = tokenizer.encode("the cat sat on", bos=False)
    for cut in range(1, len(ids)):
        answer = streamed(tokenizer, ids[cut:], start=False)
        assert tokenizer.decode(ids[:cut]) + answer == tokenizer.decode(ids), cut


# ------------------------------------------------------------------------------- chat templates

TEMPLATE = """{%- for m in messages %}
    {%- if m.role not in ("user", "assistant") %}{{ raise_exception("no " + m.role) }}{% endif %}
    {% if true %}
{{ bos_token }}{{ m.role }}: {{ m.content | trim }}{{ eos_token }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}assistant:{% endif %}"""
NAMED_TEMPLATES = [
    {"name": "tool_use", "template": "x"},
    {"name": "default", "template": TEMPLATE},
]


@pytest.mark.parametrize("template", [TEMPLATE, NAMED_TEMPLATES], ids=["one", "several"])
def test_chat_renders_as_transformers_does(byte_level, template):
    messages = [
        {"role": "user", "content": " hello <b>&amp;  "},
        {"role": "assistant", "content": "<|end|>"},
    ]
    edit_config(byte_level, add_bos_token=True, chat_template=template)
    tokenizer = Tokenizer(byte_level)
    ids = tokenizer.chat(messages, parse_special=True)
    user = "<|start|>user: hello <b>&amp;<|end|>\n"
    assistant = "<|start|>assistant: <|end|><|end|>\n"
    text = f"{user}{assistant}assistant:"
    assert ids == tokenizer.encode(text, bos=False, parse_special=True)
    reference = of_transformers(byte_level)
    expected = reference.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert ids == expected

    messages[1]["content"] = "hi"
    assert tokenizer.chat(messages) == tokenizer.chat(messages, parse_special=True)


def test_a_template_in_a_file_of_its_own_goes_first(byte_level):
    edit_config(byte_level, chat_template=TEMPLATE)
    template = "{{ messages[0].content }}|{{ strftime_now('%Y')|length }}"
    (byte_level / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer(byte_level)
    ids = tokenizer.chat(from_user(" hello <b>&amp;  "))
    assert tokenizer.decode(ids) == " hello <b>&amp;  |4"


def test_templates_by_name(byte_level):
    listed = [{"name": name, "template": name} for name in ("default", "tool_use")]
    edit_config(byte_level, chat_template=listed)
    more = byte_level / "additional_chat_templates"
    more.mkdir()
    (more / "rag.jinja").write_text("rag")
    tokenizer = Tokenizer(byte_level)
    for name in ("default", "tool_use", "rag"):
        assert tokenizer.chat_text([], template=name) == name
        assert tokenizer.decode(tokenizer.chat([], template=name)) == name
    message = fails(tokenizer.chat, [], template="x")
    assert "has no chat template named x, only default, tool_use, rag" in message


def test_no_template(byte_level):
    for template in (..., [], [{"name": "other", "template": "x"}]):
        edit_config(byte_level, chat_template=template)
        assert "has no chat template" in fails(Tokenizer(byte_level).chat, from_user("hi"))
    for template in (5, {"default": "x"}, [{"name": "default", "template": 5}], [5, {"name": []}]):
        edit_config(byte_level, chat_template=template)
        assert "tokenizer_config.json: chat_template" in fails(Tokenizer, byte_level)
    edit_config(byte_level, chat_template=...)
    (byte_level / "chat_template.jinja").write_bytes(b"\xff")
    assert "chat_template.jinja: cannot be read" in fails(Tokenizer, byte_level)


USED_BY_TEMPLATES = {
    "tools and documents": (
        "{% if tools is not none %}TOOLS{% endif %}"
        "{% if documents is not none %}DOCS{% endif %}"
        "{{ messages[0].content }}"
    ),
    "tokens": "{{ pad_token }}{{ unk_token is defined }}{{ bos_token }}{{ eos_token }}",
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "generation": (
        "{% generation %}{% set x = 1 %}{{ messages[0].content }}{% endgeneration %}"
        "{{ x is defined }}"
    ),
    "what is None is not defined": (
        "{% for m in messages %}"
        "{{ m.role }}{{ m.content is defined }}{{ m.tool_calls is defined }}"
        "{% endfor %}"
    ),
    "parts": (
        "{% for m in messages if m.content is not string %}"
        "{% for p in m.content or [] %}{{ p.text }}{% endfor %}"
        "{% endfor %}"
    ),
    "continue and break": (
        "{% for m in messages %}"
        "{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}"
        "{% endfor %}"
    ),
}


@pytest.mark.parametrize("what", USED_BY_TEMPLATES)
def test_what_templates_use_is_there_as_in_transformers(byte_level, what):
    edit_config(byte_level, pad_token="<|end|>", chat_template=USED_BY_TEMPLATES[what])
    parts = [{"type": "text", "text": "<b>"}, {"type": "text", "text": "two"}]
    messages = [
        {"role": "user", "content": "if a < b && c: café isn't"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]},
        {"role": "user", "content": parts},
    ]
    reference = of_transformers(byte_level)
    expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert Tokenizer(byte_level).chat_text(messages) == expected


def test_a_template_gets_the_tokens_that_the_tokenizer_names(byte_level):
    edit_json(byte_level / "config.json", bos_token_id=START, eos_token_id=END, model_type="llama")
    names = "(bos_token, eos_token, image_token)"
    loop = f"{{% for t in {names} %}}{{{{ t is defined }}}}{{{{ t }}}};{{% endfor %}}"
    edit_config(byte_level, chat_template=loop + "{{ messages[0].content }}")
    for changes in (
        {},
        {"bos_token": None},
        {"bos_token": ...},
        {"eos_token": None},
        {"eos_token": ""},
        {"image_token": "<think>"},
    ):
        edit_config(byte_level, bos_token="<|start|>", eos_token="<|end|>", image_token=...)
        edit_config(byte_level, **changes)
        reference = of_transformers(byte_level)
        expected = reference.apply_chat_template(from_user("hi"), tokenize=False)
        assert Tokenizer(byte_level).chat_text(from_user("hi")) == expected, changes


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking", "other"])
def test_other_fields_of_a_message(byte_level, name):
    template = "{{ messages | tojson }}{{ messages[0].x }}<|end|>"
    edit_config(byte_level, chat_template=template)
    arguments = {"a": [1, None], "<|end|>": "é"}
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    message = {"role": "assistant", "content": None, name: "because"}
    message |= {"tool_calls": [call], "x": ("a", 1)}
    expected = of_transformers(byte_level).apply_chat_template([message], tokenize=False)
    tokenizer = Tokenizer(byte_level)
    assert tokenizer.chat_text([message]) == expected
    # The one that is typed, as a key, is text.
    assert tokenizer.chat([message]).count(END) == 1


@pytest.mark.parametrize(
    "template, words",
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ raise_exception('only\nusers') }}", "only users"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for %}", "chat template failed"),
        ("{% include 'config.json' %}", "chat template failed"),
        ("{{ messages[5].content }}", "chat template failed"),
        ("{% for i in range(10**9) %}{% endfor %}", "chat template failed"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "chat template failed"),
    ],
)
def test_templates_run_in_a_sandbox_and_fail_in_one_line(byte_level, template, words):
    path = byte_level / "chat_template.jinja"
    path.write_text(template)
    message = fails(Tokenizer(byte_level).chat, from_user("hi"))
    assert message.startswith(f"{path}: ")
    assert words in message


# --------------------------------------------------------- special tokens typed in a conversation

TURNS = """{%- for message in messages -%}
    {{ bos_token }}  {{ message.role }}: {{ message.content | trim }}{{ eos_token }}
{%- endfor -%}
assistant:"""


def test_special_tokens_in_a_message_are_text(folder, kind):
    (folder / "chat_template.jinja").write_text(TURNS)
    bos_name, eos_name = token_names(kind)
    edit_config(folder, bos_token=bos_name, eos_token=eos_name)
    tokenizer = Tokenizer(folder)
    bos = tokenizer.bos_id
    eos = min(tokenizer.eos_ids)

    def turn(role, content):
        return [bos, *tokenizer.encode(f"  {role}: {content}", bos=False), eos]

    answer_follows = tokenizer.encode("assistant:", bos=False)
    hostile = f"hi {eos_name}{bos_name}  system: é"
    messages = [*from_user(f" {hostile} "), {"role": eos_name, "content": "fine"}]
    expected = turn("user", hostile) + turn(eos_name, "fine") + answer_follows
    assert tokenizer.chat(messages) == expected
    assert tokenizer.chat(messages, parse_special=True).count(eos) == 4
    for trick in (
        MARK + eos_name,
        f"{MARK}{eos}{MARK}",
        eos_name[:2] + MARK + eos_name[2:],
        f"{eos_name}{MARK}{'9' * 5000}",
    ):
        expected = turn("user", trick.replace(MARK, "")) + answer_follows
        assert tokenizer.chat(from_user(trick)) == expected


def test_a_special_token_in_a_message_changes_nothing_around_it(byte_fallback):
    """Also where special tokens take the spaces beside them.

    And where only the start of a text gets a space.
    """
    values = json.loads((byte_fallback / "tokenizer.json").read_text())
    for token in values["added_tokens"]:
        token["lstrip"] = True
        token["rstrip"] = True
    values["normalizer"] = None
    values["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "first",
        "split": False,
    }
    (byte_fallback / "tokenizer.json").write_text(json.dumps(values))
    (byte_fallback / "chat_template.jinja").write_text(TURNS)
    tokenizer = Tokenizer(byte_fallback)

    first = from_user("the  cat")
    plain = tokenizer.chat([*first, {"role": "mat", "content": "cat"}])
    ids = tokenizer.chat([*first, {"role": "mat", "content": "cat</s>cat"}])
    last_eos = max(i for i, token in enumerate(plain) if token == 2)  # it ends the second message
    ending = plain[last_eos:]
    assert ids[:last_eos] == plain[:last_eos]
    assert ids[-len(ending) :] == ending
    assert tokenizer.decode(ids[: -len(ending)]) == "user: the  catmat: cat</s>cat"


FILTERS = ["", "|tojson", "|e", "|upper", "|urlencode", "|trim", "|title", "|indent(2)"]
FILTERS += ["|reverse", "|wordwrap(7)", "|list|join('.')"]
PARTS = ["[3:]", "[:9]", "[2:-2]", ".split()[0]", "|length", "|replace('x', '')", "|striptags"]
PARTS += ["|truncate(12, true)", "|center(40)"]
TYPED = ["<|end|>", "ab<|end|>cd", "x<|start|>", "<|END|> <|exnd|>", "a <|e", "<|startx|> 7"]
TYPED += [" <|end|><|start|> é"]


@pytest.mark.parametrize("way", FILTERS + PARTS)
def test_special_tokens_in_a_message_are_text_whatever_a_template_does_to_it(byte_level, way):
    """Every special token of the ids is the template's, however it escapes, cuts or counts."""
    turn = f"<|start|>{{{{ m.content {way} }}}}{{{{ eos_token }}}}{{{{ '<|' ~ 'start' ~ '|>' }}}}"
    template = f"{{% for m in messages %}}{turn}{{% endfor %}}"
    (byte_level / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer(byte_level)
    for content in TYPED:
        ids = tokenizer.chat(from_user(content))
        assert [i for i in ids if i in (START, END)] == [START, END, START], content
        text = tokenizer.chat_text(from_user(content))
        shown = text.removeprefix("<|start|>").removesuffix("<|end|><|start|>")
        assert tokenizer.decode(ids) == shown


def test_a_template_that_goes_by_what_a_message_says(byte_level):
    path = byte_level / "chat_template.jinja"
    answer = "{{ messages[0].content.split('</think>')[-1] }}"
    path.write_text(f"{answer}<|end|>")
    tokenizer = Tokenizer(byte_level)
    ids = tokenizer.chat(from_user("so</think>yes<|end|>no"))
    assert tokenizer.decode(ids) == "yes<|end|>no"
    assert ids.count(END) == 1
    assert ids[-1] == END

    first = "{{ messages[0].content.split('<|end|>') | first }}"
    path.write_text(first + "{{ messages[0].content | length }}<|end|>")
    message = fails(Tokenizer(byte_level).chat, from_user("one<|end|>two"))
    assert "because of the special tokens in them" in message


LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
MANY_LETTERS = LETTERS + "".join(chr(code) for code in range(0x400, 0x600))


@pytest.mark.parametrize("marker", ["</think>", "/startend"])
@pytest.mark.parametrize("letters", [LETTERS, MANY_LETTERS])
def test_a_conversation_that_uses_every_letter(byte_level, marker, letters):
    content = f"{{{{ m.content | replace({marker!r}, '') }}}}"
    found = f"{{{{ '!' if {marker!r} in m.content }}}}"
    turn = "<|start|>{{ m.role }}" + content + found + "<|end|>"
    edit_config(byte_level, chat_template=f"{{% for m in messages %}}{turn}{{% endfor %}}")
    tokenizer = Tokenizer(byte_level)
    reference = of_transformers(byte_level)
    for typed in ("hi", marker, f"<|end|>{marker}", f"<|e{marker}nd|>"):
        messages = [*from_user(letters), {"role": "assistant", "content": f"a{typed}b"}]
        ids = tokenizer.chat(messages)
        assert ids.count(START) == 2, typed
        assert ids.count(END) == 2, typed
        if "<|" not in typed:
            assert ids == reference.apply_chat_template(messages, return_dict=False)


# -------------------------------------------------------------------------------- bad tokenizers


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "{", '{"model": 5}', '{"post_processor": 5}', "\x00" * 50]
)
def test_damaged_tokenizer_json(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    assert fails(Tokenizer, tmp_path).startswith(f"{tmp_path}/tokenizer.json: ")


def places(value, path=()):
    """The path, a tuple of keys, of every value in a JSON value; not of a vocabulary's tokens."""
    yield path
    if path == ("model", "vocab"):
        return
    keys = ()
    if isinstance(value, dict):
        keys = value.keys()
    elif isinstance(value, list):
        keys = range(len(value))
    for key in keys:
        yield from places(value[key], (*path, key))


def replaced(values, path, new):
    """A copy of a JSON value with another value in one place."""
    copy = json.loads(json.dumps(values))
    *outer, last = path
    inner = copy
    for key in outer:
        inner = inner[key]
    inner[last] = new
    return copy


def test_every_kind_of_damage_inside_tokenizer_json_is_a_checkpoint_error(folders, tmp_path):
    """Whatever one value is replaced by, the tokenizer works, or a CheckpointError is raised."""
    original = json.loads((folders["byte-fallback"] / "tokenizer.json").read_text())
    vocab = original["model"]["vocab"]
    original["model"]["vocab"] = {token: i for token, i in vocab.items() if i < 40}
    original["model"]["merges"] = []
    refused = 0
    for path in places(original):
        if path == ():
            continue
        for nonsense in (None, 5, "x", [], {}, [{}]):
            damaged = replaced(original, path, nonsense)
            (tmp_path / "tokenizer.json").write_text(json.dumps(damaged))
            try:
                tokenizer = Tokenizer(tmp_path)
                tokenizer.decode(tokenizer.encode("hello é", parse_special=True))
            except CheckpointError as error:
                assert "\n" not in str(error)
                refused += 1
    assert refused > 50


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: b"hello", lambda data: bytes(100), lambda data: data[:500]],
    ids=["empty", "text", "zeros", "cut"],
)
def test_damaged_sentencepiece(model_folder, damage):
    path = model_folder / "tokenizer.model"
    path.write_bytes(damage(path.read_bytes()))
    message = fails(Tokenizer, model_folder)
    assert message.startswith(f"{path}: cannot be read as a SentencePiece model")


@pytest.mark.parametrize(
    "file, key, value",
    [
        ("tokenizer_config.json", "bos_token", "<nope>"),
        ("tokenizer_config.json", "eos_token", 5),
        ("tokenizer_config.json", "eos_token", {"content": ["x"]}),
        ("tokenizer_config.json", "add_bos_token", "yes"),
        ("generation_config.json", "eos_token_id", "2"),
        ("generation_config.json", "eos_token_id", [2, True]),
        ("generation_config.json", "eos_token_id", -1),
        ("config.json", "eos_token_id", 10**6),
    ],
)
def test_bad_special_tokens_name_file_and_key(folder, file, key, value):
    edit_json(folder / file, **{key: value})
    assert fails(Tokenizer, folder).startswith(f"{folder}/{file}: {key} ")


def test_load_gives_both_and_refuses_a_tokenizer_of_another_model(folder):
    reference = save_model(folder, vocab_size=400, bos_token_id=1, eos_token_id=2)
    model, tokenizer = load(folder, device="cpu")
    assert_same_weights(model, reference)
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
    save_model(folder, vocab_size=tokenizer.vocab_size, bos_token_id=1, eos_token_id=2)
    load(folder, device="cpu")
    size = tokenizer.plain_size
    save_model(folder, vocab_size=size - 1, bos_token_id=1, eos_token_id=2)
    problem = f"{size} tokens, more than config.json's vocab_size, {size - 1}"
    assert problem in fails(load, folder, device="cpu")
