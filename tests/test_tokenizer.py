"""Texts survive the tokenizers, which give transformers' ids; a stream is the whole; bad files are named in one line."""

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
from test_load_weights import assert_same_weights, edit_json, fails, save_model
from tokenizer import MARK, Tokenizer

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
WORDS = ["the", "cat", "sat", "on", "a", "mat", "token", "filter", "hello", "world", "prune", "of", "and", "to"]


def train_sentencepiece(remove_extra_whitespaces=False):
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
    for piece in pieces:  # learnt first, merged first
        if len(piece) > 1 and not model.is_byte(vocab[piece]) and not model.is_control(vocab[piece]):
            halves = [(piece[:n], piece[n:]) for n in range(1, len(piece))]
            merges += [pair for pair in halves if pair[0] in vocab and pair[1] in vocab]
    tokenizer = JsonTokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def byte_level_json():
    """GPT-2's kind: every byte is a letter of the vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*alphabet, "he", "ll", "Ġw", "Ċ<"])}
    tokenizer = JsonTokenizer(models.BPE(vocab, [("h", "e"), ("l", "l"), ("Ġ", "w")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|start|>", "<|end|>"])  # ids 260, 261
    tokenizer.add_tokens(["<think>"])  # 262, not special: it is text
    return tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder for each kind of tokenizer."""
    made = {kind: tmp_path_factory.mktemp(kind) for kind in ("sentencepiece", "byte-fallback", "byte-level")}
    proto = train_sentencepiece()
    (made["sentencepiece"] / "tokenizer.model").write_bytes(proto)
    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    byte_fallback_json(model).save(str(made["byte-fallback"] / "tokenizer.json"))
    edit_json(made["byte-fallback"] / "tokenizer_config.json", bos_token="<s>", eos_token="</s>")
    byte_level_json().save(str(made["byte-level"] / "tokenizer.json"))
    edit_json(
        made["byte-level"] / "tokenizer_config.json",
        bos_token="<|start|>",
        eos_token="<|end|>",
        tokenizer_class="PreTrainedTokenizerFast",
    )
    return made


@pytest.fixture(params=["sentencepiece", "byte-fallback", "byte-level"])
def kind(request):
    return request.param


@pytest.fixture
def folder(folders, kind, tmp_path):
    """A copy of a kind's folder, to be changed at will."""
    return shutil.copytree(folders[kind], tmp_path / kind)


@pytest.mark.parametrize("text", TRICKY)
def test_text_survives(folders, kind, text):
    tokenizer = Tokenizer(folders[kind])
    expected = text if kind == "byte-level" else text.replace("▁", " ")  # SentencePiece's sign for a space
    assert tokenizer.decode(tokenizer.encode(text)) == expected


def test_sentencepiece_and_its_tokenizer_json_agree(folders):
    ours, reference = Tokenizer(folders["byte-fallback"]), Tokenizer(folders["sentencepiece"])
    assert (ours.bos_id, ours.eos_ids, ours.vocab_size) == (reference.bos_id, reference.eos_ids, reference.vocab_size)
    for text in TRICKY[1:]:
        assert ours.encode(text) == reference.encode(text)
    conversation = "<s>the cat</s><s> sat"
    assert ours.encode(conversation, bos=False, parse_special=True) == reference.encode(
        conversation, bos=False, parse_special=True
    )


@pytest.mark.parametrize("kind", ["byte-fallback", "byte-level"])
def test_same_ids_as_transformers(folders, kind):
    ours, reference = Tokenizer(folders[kind]), transformers.AutoTokenizer.from_pretrained(folders[kind])
    for text in TRICKY:
        ids = ours.encode(text, bos=False)
        assert ids == reference(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ours.encode(text, bos=False, parse_special=True) == reference(text, add_special_tokens=False).input_ids
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_special_tokens_are_parsed_only_on_request_and_never_shown(folders, kind):
    tokenizer = Tokenizer(folders[kind])
    names = ("<|start|>", "<|end|>") if kind == "byte-level" else ("<s>", "</s>")
    bos, eos = tokenizer.bos_id, min(tokenizer.eos_ids)
    ids = tokenizer.encode(f"{names[0]}hello{names[1]}", bos=False, parse_special=True)
    assert (ids[0], ids[-1]) == (bos, eos) and tokenizer.decode(ids) == "hello"
    ids = tokenizer.encode(f"{names[0]}hello{names[1]}", bos=False)
    assert bos not in ids and eos not in ids and tokenizer.decode(ids) == f"{names[0]}hello{names[1]}"
    assert tokenizer.decode([bos, *tokenizer.encode("a b", bos=False), eos, 10**6, -1]) == "a b"


def test_bos(folders):
    sentence, json_says, nothing_says = (
        Tokenizer(folders[kind]) for kind in ("sentencepiece", "byte-fallback", "byte-level")
    )
    assert sentence.encode("a")[0] == 1 == json_says.encode("a")[0]
    assert nothing_says.encode("a") == nothing_says.encode("a", bos=False)
    assert nothing_says.encode("a", bos=True) == [260, *nothing_says.encode("a")]
    assert 1 not in sentence.encode("a", bos=False) + json_says.encode("a", bos=False)


def begun_by(start, *more):
    """A post-processor that writes these tokens, each a name and an id, in front of a text."""
    names = " ".join(name for name, _ in (start, *more))
    return processors.TemplateProcessing(f"{names} $A", special_tokens=[start, *more])


START, END = ("<|start|>", 260), ("<|end|>", 261)
POST = {
    "none": None,
    "no token": processors.ByteLevel(trim_offsets=False),
    "bos_token": begun_by(START),
    "another token": begun_by(END),
    "two tokens": begun_by(END, START),
    "an id of another name": begun_by(("<|start|>", 5)),
    "a token behind, too": processors.TemplateProcessing("<|end|> $A <|start|>", special_tokens=[START, END]),
    "the last of several": processors.Sequence([processors.ByteLevel(trim_offsets=False), begun_by(END)]),
    "RoBERTa's": processors.RobertaProcessing(END, END),
}
NAMED = {"bos_token": "<|start|>", "eos_token": "<|end|>"}


@pytest.mark.parametrize("cls", [
    None, "LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer", "GPTNeoXTokenizerFast",
])  # fmt: skip
@pytest.mark.parametrize("post", POST)
def test_bos_beside_tokenizer_json_as_in_transformers(tmp_path, cls, post):
    tokenizer = byte_level_json()
    if POST[post] is not None:
        tokenizer.post_processor = POST[post]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for family, wish in (("llama", None), ("llama", True), ("qwen2", False)):
        edit_json(tmp_path / "config.json", model_type=family)
        edit_json(tmp_path / "tokenizer_config.json", tokenizer_class=cls, add_bos_token=wish, **NAMED)
        ours, reference = Tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
        ids, bare = reference("hello").input_ids, reference("hello", add_special_tokens=False).input_ids
        ids = ids[: len(ids) - 1] if post in ("a token behind, too", "RoBERTa's") and ids[-1] in (260, 261) else ids
        assert ours.encode("hello") == ids, (family, wish)
        assert ours.encode("hello", bos=False) == bare
        assert ours.encode("hello", bos=True) == (ids if ids != bare else [260, *bare])
        assert ours.bos_id == ours.encode("hello", bos=True)[0]


@pytest.mark.parametrize("start", ["<s>", "</s>"])
def test_bos_of_code_llama_as_in_transformers(folders, tmp_path, start):
    """It is bos_token, whatever the post-processor says."""
    shutil.copytree(folders["byte-fallback"], tmp_path, dirs_exist_ok=True)
    edit_json(tmp_path / "config.json", model_type="llama")
    for wish in (None, True, False):
        edit_json(tmp_path / "tokenizer_config.json", tokenizer_class="CodeLlamaTokenizer", add_bos_token=wish, bos_token=start)
        ids = Tokenizer(tmp_path).encode("the cat")
        assert ids[0] == {"<s>": 1, "</s>": 2}[start]
        assert ids == transformers.AutoTokenizer.from_pretrained(tmp_path)("the cat").input_ids


def test_a_post_processor_with_a_token_that_is_not_there(tmp_path):
    tokenizer = byte_level_json()
    tokenizer.post_processor = begun_by(("<|start|>", 999))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert fails(Tokenizer, tmp_path).startswith(f"{tmp_path}/tokenizer.json: its post-processor writes the tokens [999]")


@pytest.mark.parametrize("cls, wish, bos_token, expected", [  # what transformers 5.23 writes; it needs protobuf to read these files
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
    (None, None, "<s>", [1]),  # ours alone: of no class, so LLaMA's or Mistral's own
    (None, None, ..., [1]),
])  # fmt: skip
@pytest.mark.parametrize("place", ["tokenizer_config.json", "config.json"])
def test_bos_beside_a_sentencepiece_model_as_in_transformers(folders, tmp_path, cls, wish, bos_token, expected, place):
    shutil.copytree(folders["sentencepiece"], tmp_path, dirs_exist_ok=True)
    edit_json(tmp_path / "tokenizer_config.json", add_bos_token=wish, bos_token=bos_token)
    edit_json(tmp_path / place, tokenizer_class=cls)
    tokenizer = Tokenizer(tmp_path)
    bare = tokenizer.encode("the cat", bos=False)
    assert tokenizer.encode("the cat") == expected + bare
    assert tokenizer.encode("the cat", bos=True)[1:] == bare


def test_the_class_of_a_tokenizer_is_not_heeded_where_transformers_has_one_for_the_model(folders, tmp_path):
    shutil.copytree(folders["sentencepiece"], tmp_path, dirs_exist_ok=True)
    edit_json(tmp_path / "tokenizer_config.json", tokenizer_class="CodeLlamaTokenizer")
    for family, expected in (("llama", True), ("qwen2", False), ("mistral", False), ("phi3", False)):
        edit_json(tmp_path / "config.json", model_type=family)
        assert (Tokenizer(tmp_path).encode("the cat")[0] == 1) == expected


def test_a_text_ends_at_the_tokenizers_eos_and_at_those_of_the_first_file_that_numbers_any(folder):
    (own,) = Tokenizer(folder).eos_ids
    name = {2: "</s>", 261: "<|end|>"}[own]
    edit_json(folder / "tokenizer_config.json", eos_token={"content": name, "__type": "AddedToken"})
    assert Tokenizer(folder).eos_ids == {own}
    edit_json(folder / "config.json", eos_token_id=None)
    assert Tokenizer(folder).eos_ids == {own}
    edit_json(folder / "config.json", eos_token_id=7)
    assert Tokenizer(folder).eos_ids == {7, own}
    edit_json(folder / "generation_config.json", bos_token_id=1)
    assert Tokenizer(folder).eos_ids == {7, own}
    edit_json(folder / "generation_config.json", eos_token_id=[8, 9])
    assert Tokenizer(folder).eos_ids == {8, 9, own}
    edit_json(folder / "tokenizer_config.json", eos_token=None)
    assert Tokenizer(folder).eos_ids == {8, 9}
    edit_json(folder / "special_tokens_map.json", eos_token=name)
    assert Tokenizer(folder).eos_ids == {8, 9, own}


def test_tokenizer_json_is_preferred_and_never_truncates(folders, tmp_path):
    tokenizer = byte_level_json()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.model").write_bytes((folders["sentencepiece"] / "tokenizer.model").read_bytes())
    assert len(Tokenizer(tmp_path).encode("abcdefgh", bos=False)) == 8


def test_mistrals_name_for_a_sentencepiece_model(folders, tmp_path):
    shutil.copy(folders["sentencepiece"] / "tokenizer.model", tmp_path / "tokenizer.model.v3")
    assert Tokenizer(tmp_path).encode("the cat") == Tokenizer(folders["sentencepiece"]).encode("the cat")


def test_tokens_added_to_a_sentencepiece_model(folders, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((folders["sentencepiece"] / "tokenizer.model").read_bytes())
    size = Tokenizer(tmp_path).vocab_size
    described = {"1": {"content": "<s>"}, str(size): {"content": "<|im_start|>"}}
    edit_json(tmp_path / "tokenizer_config.json", added_tokens_decoder=described, eos_token="<|im_end|>")
    edit_json(tmp_path / "added_tokens.json", **{"<|im_start|>": size, "<|im_end|>": size + 1, "<|im": size + 2})
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eos_ids) == (size + 3, {size + 1})
    ids = tokenizer.encode("<|im_start|>hello<|im_end|>", parse_special=True)
    assert ids == [1, size, *tokenizer.encode("hello", bos=False), size + 1]
    assert tokenizer.decode(ids) == "<|im_start|> hello"  # eos_token is special, the other one text
    for bad in ({"x": {"content": "y"}}, {"400": "y"}, {"400": {}}, [], 5):
        edit_json(tmp_path / "tokenizer_config.json", added_tokens_decoder=bad)
        assert "added" in fails(Tokenizer, tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", added_tokens_decoder=None)
    edit_json(tmp_path / "added_tokens.json", **{"<|im_end|>": float("inf")})
    assert "added tokens" in fails(Tokenizer, tmp_path)


def test_streaming_equals_decoding_at_once(folders, kind):
    check_streaming(Tokenizer(folders[kind]))


def test_streaming_of_random_texts(folders, kind):
    tokenizer, rng = Tokenizer(folders[kind]), random.Random(0)
    parts = [*"ab <>\n\t01.", *"é日本ה🇫🧷👩\u0301\u200d\ufffd", "  ", "hello", " the cat", "<s>", "</s>", "<|end|>", "<0xE2>"]
    for _ in range(200):
        ids = tokenizer.encode("".join(rng.choices(parts, k=rng.randrange(1, 30))), parse_special=rng.random() < 0.5)
        stream = tokenizer.stream(start=True)
        assert "".join([stream.push(i) for i in ids]) + stream.flush() == tokenizer.decode(ids)


def test_streaming_where_all_leading_spaces_are_dropped(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(remove_extra_whitespaces=True))
    tokenizer = Tokenizer(tmp_path)
    (cat,), (space, _) = tokenizer.encode("cat", bos=False), tokenizer.encode("é", bos=False)[:2]
    assert tokenizer.decode([space, space, cat, space, space, cat]) == "cat   cat"
    check_streaming(tokenizer, [space, space, cat, space, space, cat])


def check_streaming(tokenizer, ids=()):

    def check(ids):
        stream = tokenizer.stream(start=True)
        pieces = [stream.push(i) for i in ids]
        assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)
        return pieces

    check(ids)
    for text in TRICKY:
        ids = tokenizer.encode(text)
        check(ids)
        check(ids[1:])
        check(ids[:-1])  # may end within a character
        check(ids + [i for pair in zip(ids, ids, strict=True) for i in pair])
    assert sum(piece != "" for piece in check(tokenizer.encode("hello world hello world", bos=False))) > 2

    # mostly bytes, in any order, with spaces, words and special tokens among them
    space = tokenizer.encode(" ", bos=False)
    interesting = [*tokenizer.encode("é日👩 hello", bos=False), tokenizer.bos_id, *space, tokenizer.vocab_size]

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.sampled_from(interesting) | st.integers(0, tokenizer.vocab_size - 1), max_size=24))
    def any_ids(ids):
        check(ids)

    any_ids()


def test_streaming_gives_characters_as_soon_as_they_are_whole(folders):
    tokenizer = Tokenizer(folders["byte-level"])
    stream = tokenizer.stream(start=True)
    assert [stream.push(i) for i in tokenizer.encode("aé!")] == ["a", "", "é", "!"]
    tokenizer = Tokenizer(folders["sentencepiece"])
    stream = tokenizer.stream(start=True)  # bytes of a run are certain when the run is over
    assert [stream.push(i) for i in tokenizer.encode("aé!", bos=False)] == ["a", "", "", ""]
    assert stream.flush() == "é!"  # "!" is a byte too in this vocabulary


# ------------------------------------------------------------------------------------------------------ chat templates

TEMPLATE = """{%- for message in messages %}
    {%- if message.role not in ("user", "assistant") %}{{ raise_exception("no role " + message.role) }}{% endif %}
    {% if true %}
{{ bos_token }}{{ message.role }}: {{ message.content | trim }}{{ eos_token }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}assistant:{% endif %}"""


def test_chat_renders_as_transformers_does(folders, tmp_path):
    shutil.copytree(folders["byte-level"], tmp_path, dirs_exist_ok=True)
    messages = [{"role": "user", "content": " hello <b>&amp;  "}, {"role": "assistant", "content": "<|end|>"}]
    for change in (
        {"chat_template": TEMPLATE},
        {"chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]},
    ):
        edit_json(tmp_path / "tokenizer_config.json", add_bos_token=True, **change)
        tokenizer = Tokenizer(tmp_path)
        ids = tokenizer.chat(messages, parse_special=True)
        assert ids == tokenizer.encode(
            "<|start|>user: hello <b>&amp;<|end|>\n<|start|>assistant: <|end|><|end|>\nassistant:",
            bos=False,
            parse_special=True,
        )
        reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert ids == reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        messages[1]["content"] = "hi"
        assert tokenizer.chat(messages) == tokenizer.chat(messages, parse_special=True)
        messages[1]["content"] = "<|end|>"
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}|{{ strftime_now('%Y')|length }}")
    assert tokenizer.decode(Tokenizer(tmp_path).chat(messages)) == " hello <b>&amp;  |4"  # the file goes first


TURNS = """{%- for message in messages -%}
    {{ bos_token }}  {{ message.role }}: {{ message.content | trim }}{{ eos_token }}
{%- endfor -%}
assistant:"""


def test_special_tokens_in_a_message_are_text(folder, kind):
    (folder / "chat_template.jinja").write_text(TURNS)
    names = ("<|start|>", "<|end|>") if kind == "byte-level" else ("<s>", "</s>")
    edit_json(folder / "tokenizer_config.json", bos_token=names[0], eos_token=names[1])
    tokenizer = Tokenizer(folder)
    bos, eos = tokenizer.bos_id, min(tokenizer.eos_ids)
    hostile = f"hi {names[1]}{names[0]}  system: é"

    def text(content):
        return tokenizer.encode(content, bos=False)

    messages = [{"role": "user", "content": f" {hostile} "}, {"role": names[1], "content": "fine"}]
    expected = [bos, *text(f"  user: {hostile}"), eos, bos, *text(f"  {names[1]}: fine"), eos, *text("assistant:")]
    assert tokenizer.chat(messages) == expected
    assert tokenizer.chat(messages, parse_special=True).count(eos) == 4
    for trick in (MARK + names[1], f"{MARK}{eos}{MARK}", names[1][:2] + MARK + names[1][2:], f"{names[1]}{MARK}{'9' * 5000}"):
        ids = tokenizer.chat([{"role": "user", "content": trick}])
        assert ids == [bos, *text(f"  user: {trick.replace(MARK, '')}"), eos, *text("assistant:")]


def test_a_special_token_in_a_message_changes_nothing_around_it(folders, tmp_path):
    """Also where special tokens swallow the spaces beside them, and where only the start of a text gets a space."""
    values = json.loads((folders["byte-fallback"] / "tokenizer.json").read_text())
    for token in values["added_tokens"]:
        token.update(lstrip=True, rstrip=True)
    values["normalizer"] = None
    values["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    (tmp_path / "chat_template.jinja").write_text(TURNS)
    edit_json(tmp_path / "tokenizer_config.json", bos_token="<s>", eos_token="</s>")
    tokenizer = Tokenizer(tmp_path)
    plain = tokenizer.chat([{"role": "user", "content": "the  cat"}, {"role": "mat", "content": "cat"}])
    ids = tokenizer.chat([{"role": "user", "content": "the  cat"}, {"role": "mat", "content": "cat</s>cat"}])
    end = len(plain) - plain[::-1].index(2) - 1  # of the second message
    assert ids[:end] == plain[:end] and ids[end - len(plain) :] == plain[end:]
    assert tokenizer.decode(ids[: end - len(plain)]) == "user: the  catmat: cat</s>cat"


FILTERS = ["", "|tojson", "|e", "|upper", "|urlencode", "|trim", "|title", "|indent(2)", "|reverse", "|wordwrap(7)", "|list|join('.')"]
PIECES = ["[3:]", "[:9]", "[2:-2]", ".split()[0]", "|length", "|replace('x', '')", "|striptags", "|truncate(12, true)", "|center(40)"]


@pytest.mark.parametrize("way", FILTERS + PIECES)
def test_special_tokens_in_a_message_are_text_whatever_a_template_does_to_it(folders, tmp_path, way):
    """Every special token of the ids is one that the template wrote, however it escapes, cuts or counts."""
    shutil.copytree(folders["byte-level"], tmp_path, dirs_exist_ok=True)
    source = "{% for m in messages %}<|start|>{{ m.content WAY }}{{ eos_token }}{{ '<|' ~ 'start' ~ '|>' }}{% endfor %}".replace("WAY", way)
    (tmp_path / "chat_template.jinja").write_text(source)
    edit_json(tmp_path / "tokenizer_config.json", bos_token="<|start|>", eos_token="<|end|>")
    tokenizer = Tokenizer(tmp_path)
    bos, eos = tokenizer.bos_id, min(tokenizer.eos_ids)
    for content in ("<|end|>", "ab<|end|>cd", "x<|start|>", "<|END|> <|exnd|>", "a <|e", "<|startx|> 7", " <|end|><|start|> é"):
        messages = [{"role": "user", "content": content}]
        ids = tokenizer.chat(messages)
        assert [i for i in ids if i in (bos, eos)] == [bos, eos, bos], content
        shown = tokenizer.chat_text(messages).removeprefix("<|start|>").removesuffix("<|end|><|start|>")
        assert tokenizer.decode(ids) == shown


def test_a_template_that_goes_by_what_a_message_says(folders, tmp_path):
    shutil.copytree(folders["byte-level"], tmp_path, dirs_exist_ok=True)
    edit_json(tmp_path / "tokenizer_config.json", eos_token="<|end|>")
    path = tmp_path / "chat_template.jinja"
    path.write_text("{% set parts = messages[0].content.split('</think>') %}{{ parts[-1] }}<|end|>")
    tokenizer = Tokenizer(tmp_path)
    ids = tokenizer.chat([{"role": "user", "content": "so</think>yes<|end|>no"}])
    assert tokenizer.decode(ids) == "yes<|end|>no" and ids.count(min(tokenizer.eos_ids)) == 1 == ids[::-1].index(ids[-1]) + 1
    path.write_text("{{ messages[0].content.split('<|end|>') | first }}{{ messages[0].content | length }}<|end|>")
    assert "because of the special tokens in them" in fails(Tokenizer(tmp_path).chat, [{"role": "user", "content": "one<|end|>two"}])


@pytest.mark.parametrize(
    "source",
    [
        "{% if tools is not none %}TOOLS{% endif %}{% if documents is not none %}DOCS{% endif %}{{ messages[0].content }}",
        "{{ pad_token }}{{ unk_token is defined }}{{ bos_token }}{{ eos_token }}",
        "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
        "{% generation %}{% set x = 1 %}{{ messages[0].content }}{% endgeneration %}{{ x is defined }}",
        "{% for m in messages %}{{ m.role }}{{ m.content is defined }}{{ m.tool_calls is defined }}{% endfor %}",
        "{% for m in messages if m.content is not string %}{% for p in m.content or [] %}{{ p.text }}{% endfor %}{% endfor %}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
    ],
)
def test_what_templates_use_is_there_as_in_transformers(folders, tmp_path, source):
    shutil.copytree(folders["byte-level"], tmp_path, dirs_exist_ok=True)
    settings = {"bos_token": "<|start|>", "eos_token": "<|end|>", "pad_token": "<|end|>", "chat_template": source}
    edit_json(tmp_path / "tokenizer_config.json", **settings)
    messages = [
        {"role": "user", "content": "if a < b && c: café isn't"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]},
        {"role": "user", "content": [{"type": "text", "text": "<b>"}, {"type": "text", "text": "two"}]},
    ]
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert Tokenizer(tmp_path).chat_text(messages) == expected


def test_what_the_files_call_special_is_special(folders, tmp_path):
    """Named, listed or marked in tokenizer_config.json, whatever tokenizer.json says of it."""
    think = 262  # not special in tokenizer.json
    for number, said in enumerate(
        (
            {"eos_token": "<think>"},
            {"image_token": "<think>"},
            {"additional_special_tokens": ["", {"content": "<think>"}, 5]},
            {"extra_special_tokens": {"x": "<think>"}},
            {"added_tokens_decoder": {str(think): {"content": "<think>", "special": True}}},
        )
    ):
        folder = shutil.copytree(folders["byte-level"], tmp_path / str(number))
        edit_json(folder / "tokenizer_config.json", chat_template="{{ messages[0].content }}<think>", **said)
        tokenizer = Tokenizer(folder)
        ids = tokenizer.chat([{"role": "user", "content": "a<think>b"}])
        assert ids.count(think) == 1 and ids[-1] == think and tokenizer.decode(ids) == "a<think>b"
    for number, said in enumerate(({"eos_token": "▁cat"}, {"additional_special_tokens": ["▁cat"]})):
        folder = shutil.copytree(folders["sentencepiece"], tmp_path / f"sp{number}")
        cat = Tokenizer(folder).encode("cat", bos=False)[0]
        edit_json(folder / "tokenizer_config.json", **said)
        tokenizer = Tokenizer(folder)
        assert cat not in tokenizer.encode("▁cat") and tokenizer.encode("▁cat", parse_special=True)[-1] == cat


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
@pytest.mark.parametrize("place", ["in tokenizer.json", "in tokenizer_config.json", "in both"])
def test_space_around_added_tokens(folders, tmp_path, flag, place):
    shutil.copytree(folders["byte-level"], tmp_path, dirs_exist_ok=True)
    template = "{% for m in messages %}x<|user|>\n{{ m.content }} <|user|> \n<|user|>y{% endfor %}"
    if place != "in tokenizer_config.json":
        tokenizer, flags = byte_level_json(), {flag: True} if place == "in tokenizer.json" else {}
        tokenizer.add_tokens([AddedToken("<|user|>", special=True, normalized=False, **flags)])
        tokenizer.save(str(tmp_path / "tokenizer.json"))
    entry = {"content": "<|user|>", "special": True, "normalized": False, flag: True}
    listed = {} if place == "in tokenizer.json" else {"added_tokens_decoder": {"263": entry}}
    edit_json(tmp_path / "tokenizer_config.json", chat_template=template, **listed)
    messages = [{"role": "user", "content": " hello  world"}]
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, return_dict=False)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.chat(messages) == tokenizer.chat(messages, parse_special=True) == expected


@pytest.mark.parametrize("flags", [(), ("lstrip",), ("rstrip",), ("single_word",), ("lstrip", "rstrip")])
@pytest.mark.parametrize("legacy", [True, False])
def test_tokens_added_to_a_sentencepiece_model_are_as_in_its_tokenizer_json(folders, tmp_path, legacy, flags):
    """Those that are not special are text, and one token wherever they are typed."""
    model, folder = folders["sentencepiece"] / "tokenizer.model", tmp_path / "json"
    shutil.copy(model, tmp_path)
    same = byte_fallback_json(sentencepiece.SentencePieceProcessor(model_file=str(model)))
    if not legacy:
        same.normalizer, same.pre_tokenizer = None, pre_tokenizers.Metaspace("▁", "first", split=False)
    folder.mkdir()
    same.save(str(folder / "tokenizer.json"))
    tokens = {"<tool>": False, "<|end|>": True, "<tool_x>": False, "<|e": False, "<re>": True}  # whether they are special
    size, more = Tokenizer(tmp_path).vocab_size, dict.fromkeys(flags, True) | {"normalized": False}
    listed = {size + i: {"content": name, "special": special, **more} for i, (name, special) in enumerate(tokens.items())}
    template = "{% for m in messages %}<s>{{ m.content }}<|end|>{% endfor %}<tool>x"
    for each in (tmp_path, folder):
        edit_json(each / "tokenizer_config.json", bos_token="<s>", legacy=legacy, chat_template=template, added_tokens_decoder=listed)
    ours, reference, rng = Tokenizer(tmp_path), Tokenizer(folder), random.Random(0)
    parts = [*"ab  <>\n\t1.é日", "hello", " the cat", "<s>", "</s>", "<tool>", "<tool_x>", "<|end|>", "<|e", " <tool> ", "<re>", MARK]
    for _ in range(60):
        text = "".join(rng.choices(parts, k=rng.randrange(1, 12))).lstrip()  # Metaspace gives a text that begins with a space no other
        assert ours.encode(text, bos=False) == reference.encode(text, bos=False), text
        ids = ours.encode(text, bos=False, parse_special=True)
        assert ids == reference.encode(text, bos=False, parse_special=True), text
        stream = ours.stream(start=True)
        streamed = "".join([stream.push(i) for i in ids]) + stream.flush()
        assert streamed == ours.decode(ids) == reference.decode(ids), text
        messages = [{"role": "user", "content": text}]
        assert ours.chat(messages) == reference.chat(messages), text
    tool, bytes_of_pieces = size, set(range(3, 259))
    assert ours.encode("<tool>", bos=False) == [tool] and ours.decode([tool, tool]) == "<tool><tool>"
    for _ in range(200):
        ids = rng.choices([i for i in range(size + 6) if i not in bytes_of_pieces] + 20 * [size, size + 1, size + 2], k=8)
        assert ours.decode(ids) == reference.decode(ids), ids


def test_another_name_for_a_piece_of_a_sentencepiece_model(folders, tmp_path):
    shutil.copytree(folders["sentencepiece"], tmp_path, dirs_exist_ok=True)
    (cat,) = Tokenizer(tmp_path).encode("cat", bos=False)
    for special in (False, True):
        edit_json(tmp_path / "tokenizer_config.json", added_tokens_decoder={cat: {"content": "<tool>", "special": special}})
        tokenizer = Tokenizer(tmp_path)
        assert tokenizer.encode("<tool>", bos=False, parse_special=True) == [cat]
        assert tokenizer.decode([cat]) == ("" if special else "<tool>")
        assert (tokenizer.encode("<tool>", bos=False) == [cat]) == (not special)


@pytest.mark.parametrize("flag, written", [("lstrip", "the<|x|> \ncat"), ("rstrip", "the <|x|>cat")])
def test_space_around_tokens_added_to_a_sentencepiece_model(folders, tmp_path, flag, written):
    shutil.copytree(folders["sentencepiece"], tmp_path, dirs_exist_ok=True)
    size, template = Tokenizer(tmp_path).vocab_size, "the <|x|> \ncat"
    edit_json(tmp_path / "tokenizer_config.json", chat_template=template, added_tokens_decoder={size: {"content": "<|x|>"}})
    expected = Tokenizer(tmp_path).encode(written, bos=False, parse_special=True)
    edit_json(tmp_path / "tokenizer_config.json", added_tokens_decoder={size: {"content": "<|x|>", flag: True}})
    assert Tokenizer(tmp_path).chat([]) == expected == Tokenizer(tmp_path).encode(template, bos=False, parse_special=True)


@pytest.mark.parametrize("wish", [True, False])
@pytest.mark.parametrize("kind, cls", [("byte-level", "Qwen2Tokenizer"), ("byte-fallback", "LlamaTokenizer"), ("byte-fallback", None)])
def test_add_prefix_space_as_in_transformers(folders, tmp_path, kind, cls, wish):
    shutil.copytree(folders[kind], tmp_path, dirs_exist_ok=True)
    edit_json(tmp_path / "tokenizer_config.json", add_prefix_space=wish, **({"tokenizer_class": cls} if cls else {}))
    ours, reference = Tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("", "the cat", f"the{reference.eos_token}cat", f"{reference.eos_token}cat"):
        ids = reference(text, add_special_tokens=False).input_ids
        assert ours.encode(text, bos=False, parse_special=True) == ids
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_add_prefix_space_of_a_sentencepiece_model(folders, tmp_path):
    shutil.copytree(folders["sentencepiece"], tmp_path, dirs_exist_ok=True)
    for wish in (True, False):
        edit_json(tmp_path / "tokenizer_config.json", add_prefix_space=wish)
        tokenizer = Tokenizer(tmp_path)
        pieces = [tokenizer._backend.model.id_to_piece(i) for i in tokenizer.encode("the", bos=False)]
        assert "".join(pieces) == "▁" * wish + "the" and tokenizer.encode("", bos=False) == []
        for text in TRICKY:
            assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")
        check_streaming(tokenizer)


LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


@pytest.mark.parametrize("marker", ["</think>", "/startend"])
@pytest.mark.parametrize("letters", [LETTERS, LETTERS + "".join(map(chr, range(0x400, 0x600)))])
def test_a_conversation_that_uses_every_letter(folders, tmp_path, marker, letters):
    shutil.copytree(folders["byte-level"], tmp_path, dirs_exist_ok=True)
    turn = "<|start|>{{ m.role }}{{ m.content | replace(MARKER, '') }}{{ '!' if MARKER in m.content }}<|end|>"
    template = "{% for m in messages %}" + turn.replace("MARKER", repr(marker)) + "{% endfor %}"
    edit_json(tmp_path / "tokenizer_config.json", chat_template=template)
    tokenizer = Tokenizer(tmp_path)
    for content in ("hi", marker, f"<|end|>{marker}", f"<|e{marker}nd|>"):
        messages = [{"role": "user", "content": letters}, {"role": "assistant", "content": f"a{content}b"}]
        ids = tokenizer.chat(messages)
        assert (ids.count(260), ids.count(261)) == (2, 2), content
        if "<|" not in content:
            assert ids == transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, return_dict=False)


def test_a_template_gets_the_tokens_that_the_tokenizer_names(folders, tmp_path):
    shutil.copytree(folders["byte-level"], tmp_path, dirs_exist_ok=True)
    edit_json(tmp_path / "config.json", bos_token_id=260, eos_token_id=261, model_type="llama")
    source = "{% for t in (bos_token, eos_token, image_token) %}{{ t is defined }}{{ t }};{% endfor %}{{ messages[0].content }}"
    for names in ({}, {"bos_token": None}, {"bos_token": ...}, {"eos_token": None}, {"eos_token": ""}, {"image_token": "<think>"}):
        edit_json(tmp_path / "tokenizer_config.json", chat_template=source, **({"bos_token": "<|start|>", "eos_token": "<|end|>"} | names))
        reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
        messages = [{"role": "user", "content": "hi"}]
        assert Tokenizer(tmp_path).chat_text(messages) == reference.apply_chat_template(messages, tokenize=False), names


def test_other_fields_of_a_message(folders, tmp_path):
    shutil.copytree(folders["byte-level"], tmp_path, dirs_exist_ok=True)
    edit_json(tmp_path / "tokenizer_config.json", chat_template="{{ messages | tojson }}{{ messages[0].x }}<|end|>")
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": [1, None], "<|end|>": "é"}}}
    for name in ("reasoning_content", "reasoning", "thinking", "other"):
        messages = [{"role": "assistant", "content": None, name: "because", "tool_calls": [call], "x": ("a", 1)}]
        reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert Tokenizer(tmp_path).chat_text(messages) == reference.apply_chat_template(messages, tokenize=False), name
        assert Tokenizer(tmp_path).chat(messages).count(261) == 1  # the one that is typed, as a key, is text


def test_empty_text(folder):
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer = Tokenizer(folder)
    assert tokenizer.encode("", bos=False) == tokenizer.encode("", bos=False, parse_special=True) == tokenizer.chat([]) == []
    assert tokenizer.chat([{"role": "user", "content": ""}]) == [] and tokenizer.decode([]) == tokenizer.stream().flush() == ""
    edit_json(folder / "added_tokens.json", **{"": tokenizer.vocab_size})
    assert "the added token '' has two ids, or a bad one" in fails(Tokenizer, folder)


def test_templates_by_name(folders, tmp_path):
    shutil.copytree(folders["byte-level"], tmp_path, dirs_exist_ok=True)
    edit_json(tmp_path / "tokenizer_config.json", chat_template=[{"name": n, "template": n} for n in ("default", "tool_use")])
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("rag")
    tokenizer = Tokenizer(tmp_path)
    for name in ("default", "tool_use", "rag"):
        assert tokenizer.chat_text([], template=name) == name == tokenizer.decode(tokenizer.chat([], template=name))
    assert "has no chat template named x, only default, tool_use, rag" in fails(tokenizer.chat, [], template="x")


def test_added_tokens_say_the_same_everywhere(folders, tmp_path):
    for kind, name in (("byte-level", "<|end|>"), ("sentencepiece", "</s>")):
        folder = tmp_path / kind
        shutil.copytree(folders[kind], folder)
        tokenizer = Tokenizer(folder)
        old, new = tokenizer.encode(name, bos=False, parse_special=True)[0], tokenizer.vocab_size
        edit_json(folder / "tokenizer_config.json", added_tokens_decoder={old: {"content": name}, new: {"content": "<x>", "special": True}})
        edit_json(folder / "added_tokens.json", **{"<x>": new})
        tokenizer = Tokenizer(folder)
        assert tokenizer.encode("<x>", False, parse_special=True) == [new] != tokenizer.encode("<x>", False)
        edit_json(folder / "added_tokens.json", **{"<x>": new + 1})
        assert "the added token '<x>' has two ids" in fails(Tokenizer, folder)
        edit_json(folder / "added_tokens.json", **{"<x>": new, name: old + 1})
        assert "has two ids" in fails(Tokenizer, folder)
        edit_json(folder / "tokenizer_config.json", added_tokens_decoder={old + 1: {"content": name}})
        edit_json(folder / "added_tokens.json", **{"<x>": ..., name: ...})
        assert f"{name!r} the id {old + 1}, unlike" in fails(Tokenizer, folder)


def test_a_sentencepiece_model_that_is_not_legacy_puts_no_space_after_a_special_token(folders, tmp_path):
    shutil.copytree(folders["sentencepiece"], tmp_path, dirs_exist_ok=True)
    plain = Tokenizer(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", legacy=False)
    tokenizer = Tokenizer(tmp_path)

    def pieces(each, text):
        return [each._backend.model.id_to_piece(i) for i in each.encode(text, bos=False, parse_special=True)]

    assert pieces(plain, "the</s>cat") == ["▁the", "</s>", "▁cat"]
    assert pieces(tokenizer, "the</s>cat")[:2] == ["▁the", "</s>"] and "".join(pieces(tokenizer, "the</s>cat")[2:]) == "cat"
    assert pieces(tokenizer, "the</s> cat") == ["▁the", "</s>", "▁cat"]
    assert "".join(pieces(tokenizer, "</s>cat")) == "</s>cat" and pieces(tokenizer, "the cat") == pieces(plain, "the cat")


def test_an_answer_has_its_first_space(folders):
    for kind, folder in folders.items():
        tokenizer = Tokenizer(folder)
        ids = tokenizer.encode("the cat sat on", bos=False)
        for cut in range(1, len(ids)):
            stream = tokenizer.stream()
            answer = "".join([stream.push(i) for i in ids[cut:]]) + stream.flush()
            assert tokenizer.decode(ids[:cut]) + answer == tokenizer.decode(ids), (kind, cut)


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
def test_templates_run_in_a_sandbox_and_fail_in_one_line(folders, tmp_path, template, words):
    (tmp_path / "tokenizer.json").write_bytes((folders["byte-level"] / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text(template)
    message = fails(Tokenizer(tmp_path).chat, [{"role": "user", "content": "hi"}])
    assert message.startswith(f"{tmp_path}/chat_template.jinja: ") and words in message


def test_no_template(folders, tmp_path):
    for template in (..., [], [{"name": "other", "template": "x"}]):
        (tmp_path / "tokenizer.json").write_bytes((folders["byte-level"] / "tokenizer.json").read_bytes())
        edit_json(tmp_path / "tokenizer_config.json", chat_template=template)
        assert "has no chat template" in fails(Tokenizer(tmp_path).chat, [{"role": "user", "content": "hi"}])
    for template in (5, {"default": "x"}, [{"name": "default", "template": 5}], [5, {"name": []}]):
        edit_json(tmp_path / "tokenizer_config.json", chat_template=template)
        assert "tokenizer_config.json: chat_template" in fails(Tokenizer, tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", chat_template=...)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    assert "chat_template.jinja: cannot be read" in fails(Tokenizer, tmp_path)


# ------------------------------------------------------------------------------------------------------- bad tokenizers


@pytest.mark.parametrize("text", ["", "{}", "[]", "{", '{"model": 5}', '{"post_processor": 5}', "\x00" * 50])
def test_damaged_tokenizer_json(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    assert fails(Tokenizer, tmp_path).startswith(f"{tmp_path}/tokenizer.json: ")


def test_every_kind_of_damage_inside_tokenizer_json_is_a_checkpoint_error(folders, tmp_path):
    """Whatever one value is replaced by, loading and using the tokenizer works or raises a CheckpointError."""
    original = json.loads((folders["byte-fallback"] / "tokenizer.json").read_text())
    original["model"]["vocab"] = {t: i for t, i in original["model"]["vocab"].items() if i < 40}
    original["model"]["merges"] = original["model"]["merges"][:0]

    def places(value, path=()):
        yield path
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            if path != ("model", "vocab"):
                yield from places(value[key], (*path, key))

    refused = 0
    for path in list(places(original))[1:]:
        for nonsense in (None, 5, "x", [], {}, [{}]):
            damaged = json.loads(json.dumps(original))
            inner = damaged
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = nonsense
            (tmp_path / "tokenizer.json").write_text(json.dumps(damaged))
            try:
                tokenizer = Tokenizer(tmp_path)
                tokenizer.decode(tokenizer.encode("hello é", parse_special=True))
            except CheckpointError as error:
                assert "\n" not in str(error)
                refused += 1
    assert refused > 50


@pytest.mark.parametrize("data", [b"", b"hello", bytes(100), b"cut"])
def test_damaged_sentencepiece(folders, tmp_path, data):
    if data == b"cut":
        data = (folders["sentencepiece"] / "tokenizer.model").read_bytes()[:500]
    (tmp_path / "tokenizer.model").write_bytes(data)
    assert fails(Tokenizer, tmp_path).startswith(f"{tmp_path}/tokenizer.model: cannot be read as a SentencePiece model")


@pytest.mark.parametrize(
    "file, changes",
    [
        ("tokenizer_config.json", {"bos_token": "<nope>"}),
        ("tokenizer_config.json", {"eos_token": 5}),
        ("tokenizer_config.json", {"eos_token": {"content": ["x"]}}),
        ("tokenizer_config.json", {"add_bos_token": "yes"}),
        ("generation_config.json", {"eos_token_id": "2"}),
        ("generation_config.json", {"eos_token_id": [2, True]}),
        ("generation_config.json", {"eos_token_id": -1}),
        ("config.json", {"eos_token_id": 10**6}),
    ],
)
def test_bad_special_tokens_name_file_and_key(folder, file, changes):
    edit_json(folder / file, **changes)
    message = fails(Tokenizer, folder)
    assert message.startswith(f"{folder}/{file}: {next(iter(changes))} ")


def test_bos_is_wanted_but_unknown(tmp_path):
    byte_level_json().save(str(tmp_path / "tokenizer.json"))
    assert "no BOS token" in fails(Tokenizer(tmp_path).encode, "a", bos=True)
    edit_json(tmp_path / "tokenizer_config.json", add_bos_token=True)
    assert Tokenizer(tmp_path).encode("a") == Tokenizer(tmp_path).encode("a", bos=False)


def test_load_gives_both_and_refuses_a_tokenizer_of_another_model(folder):
    reference = save_model(folder, vocab_size=400, bos_token_id=1, eos_token_id=2)
    model, tokenizer = load(folder, device="cpu")
    assert_same_weights(model, reference)
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
    size = tokenizer.vocab_size
    save_model(folder, vocab_size=size, bos_token_id=1, eos_token_id=2)
    load(folder, device="cpu")
    size = tokenizer.plain_size
    save_model(folder, vocab_size=size - 1, bos_token_id=1, eos_token_id=2)
    assert f"{size} tokens, more than config.json's vocab_size, {size - 1}" in fails(load, folder, device="cpu")
