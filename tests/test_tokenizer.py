"""Any text survives the way through the tokenizer; files that are not tokenizers are refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors

from jaxlm.config import DataConfig
from jaxlm.data import tokenizer
from jaxlm.data.special_tokens import from_vocabulary
from jaxlm.data.tokenizer import BOS_NAMES, EOS_NAMES, Tokenizer, split_safely, without_long_words
from jaxlm.errors import UserError

PROSE = [f"The {i}th line of text, isn't it?\n    def f{i}(x):\r\n\treturn x  # <bos> <eos>\n\n" for i in range(60)]
TOKENIZER = Tokenizer.train(PROSE, 400)
# White space as the tokenizer's regular expressions see it and as Python sees it differ in some of these.
ODD = "a'sT1.,<é漢🙂 \n\n\n\r\t\x00\x0b\x0c\x1c\x1f\x85\xa0\u1680\u180e\u2003\u200b\u2028\u3000\ufeff\u0301"


def bare(words: dict[str, int], specials: list[str]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token=next(iter(words))))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(specials)
    return backend


def test_special_tokens_come_first() -> None:
    assert (TOKENIZER.pad_id, TOKENIZER.bos_id, TOKENIZER.eos_id) == (0, 1, 2)
    assert TOKENIZER.vocab_size == 400
    assert TOKENIZER.dtype == np.uint16


def test_null_in_an_old_folder_is_nothing_said(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "config.json").write_text('{"model_type": null}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": null, "additional_special_tokens": null}')
    backend = from_vocabulary(tmp_path, "here")
    assert backend is not None and backend.encode("abb").ids == [2, 1]


def test_smallest_vocabulary_is_the_bytes() -> None:
    tokenizer = Tokenizer.train(PROSE, 259)
    assert tokenizer.vocab_size == 259
    assert len(tokenizer.encode("né\0")) == len("né\0".encode())


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  leading",
        "trailing  ",
        "a\r\nb\rc\n",
        "\x00",
        "🙂👩‍👩‍👧",
        "<bos>",
        "a<eos><pad> <bos>b",
        "日本語 text",
        "\ufeff",
        "e\u0301",
    ],
)
def test_text_round_trips(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@settings(deadline=None, max_examples=200)
@given(st.text() | st.text(ODD) | st.text("<>/bospade ", max_size=30))
def test_any_text_round_trips(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert min(ids, default=3) > 2, "text became a special token"


@settings(deadline=None, max_examples=300)
@given(st.text(ODD, max_size=80), st.integers(1, 20))
def test_cutting_long_text_leaves_words_and_ids_as_they_were(text: str, size: int) -> None:
    parts = [*split_safely(text, size)]
    assert "".join(parts) == text
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True).pre_tokenize_str  # ids follow from words
    assert [word for part in parts for word, _ in words(part)] == [word for word, _ in words(text)]
    assert [i for part in parts for i in TOKENIZER.encode(part)] == TOKENIZER.encode(text)


def test_long_text_is_cut_and_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(PROSE)
    whole = Tokenizer.train([text], 400)
    monkeypatch.setattr(split_safely, "__defaults__", (100,))
    monkeypatch.setattr(tokenizer, "CALL_CHARACTERS", 300)  # of which some take the library more than one call
    assert len([*split_safely(text)]) > 20
    (ids,) = TOKENIZER.encode_documents([text])
    assert ids.tolist() == [1, *TOKENIZER.encode(text), 2]
    assert Tokenizer.train([text], 400).fingerprint == whole.fingerprint, "cut text trained another tokenizer"


def test_documents_begin_and_end() -> None:
    documents = TOKENIZER.encode_documents(["", "<bos>", "a b"])
    assert [ids.dtype for ids in documents] == [np.uint16] * 3
    assert documents[0].tolist() == [1, 2]
    assert documents[1].tolist() == [1, *TOKENIZER.encode("<bos>"), 2]
    assert 1 not in documents[1][1:]


def test_decode_leaves_special_tokens_out() -> None:
    assert TOKENIZER.decode(np.array([1, *TOKENIZER.encode("hi"), 2, 0])) == "hi"


def test_added_tokens_come_back_as_they_are() -> None:
    """The library reads letters of added tokens as bytes, see findings/tokenizers-added-tokens-come-back-broken.sh."""
    backend = tokenizers.Tokenizer.from_str(Tokenizer.train(["a caf\u00e9 "] * 9, 300).to_json())
    backend.add_tokens(["na\u00efve", "plain"])
    backend.add_special_tokens(["<fin\u00e9>"])
    own = Tokenizer.from_json(backend.to_str())
    text = "plain caf\u00e9 na\u00efvena\u00efve \u732b<fin\u00e9>na\u00efve"
    ids = own.encode(text)
    assert own.decode(ids, special=True) == text
    assert own.decode(ids) == text.replace("<fin\u00e9>", "")
    assert own.decode([]) == own.decode([own.eos_id]) == ""
    assert own.decode([own.encode("\u732b")[0]]) == "\ufffd"


def test_saved_and_loaded_is_the_same(tmp_path) -> None:
    TOKENIZER.save(tmp_path / "run" / "tokenizer")
    assert [path.name for path in (tmp_path / "run" / "tokenizer").iterdir()] == ["tokenizer.json"]
    for path in ("run", "run/tokenizer", "run/tokenizer/tokenizer.json"):
        loaded = Tokenizer.load(tmp_path / path)
        assert loaded.fingerprint == TOKENIZER.fingerprint
        assert loaded.encode("<bos>x<eos>") == TOKENIZER.encode("<bos>x<eos>"), "the flag for special tokens was lost"


def test_training_is_deterministic() -> None:
    assert Tokenizer.train(iter(PROSE), 400).to_json() == TOKENIZER.to_json()


def test_foreign_tokenizer_is_stripped_of_markup() -> None:
    backend = bare({"<unk>": 0, "a": 1, "b": 2}, ["<s>", "</s>", "[PAD]"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 3), ("</s>", 4)]
    )
    backend.enable_padding(length=8)
    backend.enable_truncation(2)
    tokenizer = Tokenizer.from_json(backend.to_str())
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (3, 4, 5)
    assert tokenizer.encode("a b a b") == [1, 2, 1, 2]
    assert [ids.tolist() for ids in tokenizer.encode_documents(["a", "a\nb"])] == [[3, 1, 4], [3, 1, 2, 4]]


def test_one_token_may_begin_and_end() -> None:
    tokenizer = Tokenizer.from_json(bare({"a": 0}, ["<|endoftext|>"]).to_str())
    assert tokenizer.bos_id == tokenizer.eos_id == tokenizer.pad_id == 1


@pytest.mark.parametrize(("specials", "names"), [(["</s>"], BOS_NAMES), (["<s>"], EOS_NAMES)])
def test_without_document_tokens_is_refused(tmp_path, specials: list[str], names: tuple[str, ...]) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(bare({"a": 0}, specials).to_str())
    with pytest.raises(UserError, match=r"^data\.tokenizer_path \(.*tokenizer\.json\) has no token") as caught:
        Tokenizer.load(path)
    assert all(name in str(caught.value) for name in names)


NAMED = {"bos_token": "<a>", "eos_token": "<b>"}
LISTED = {"added_tokens_decoder": {}}


@pytest.mark.parametrize(
    ("files", "ids", "ends"),
    [  # ids: what begins, ends and pads; <a> is 1, <b> 2, <c> 3, </s> 4, <s> 5
        ({}, (5, 4, 4), (4,)),
        ({"tokenizer_config.json": NAMED}, (1, 2, 2), (2,)),
        ({"tokenizer_config.json": {"eos_token": {"content": "<c>"}, "pad_token": "<a>"}}, (5, 3, 1), (3,)),
        # transformers 5.24: special_tokens_map.json wins, unless tokenizer_config.json lists the added tokens
        ({"tokenizer_config.json": NAMED, "special_tokens_map.json": {"eos_token": "<c>"}}, (1, 3, 3), (3,)),
        ({"tokenizer_config.json": NAMED | LISTED, "special_tokens_map.json": {"eos_token": "<c>"}}, (1, 2, 2), (2,)),
        ({"config.json": {"bos_token_id": 2, "eos_token_id": [3, 1]}}, (2, 3, 3), (3, 1)),
        ({"config.json": {"eos_token_id": 1}, "generation_config.json": {"eos_token_id": [3, 2]}}, (5, 3, 3), (3, 2)),
        ({"tokenizer_config.json": NAMED, "generation_config.json": {"eos_token_id": 3}}, (1, 2, 2), (2, 3)),
        (
            {"config.json": {"eos_token_id": 50256, "pad_token_id": 3}},
            (5, 4, 3),
            (4,),
        ),  # no such token: a class's default
    ],
)
def test_the_folder_says_which_tokens_are_special(tmp_path, files, ids, ends) -> None:
    (tmp_path / "tokenizer.json").write_text(bare({"a": 0}, ["<a>", "<b>", "<c>", "</s>", "<s>"]).to_str())
    plain = Tokenizer.load(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    found = Tokenizer.load(tmp_path)
    assert (found.bos_id, found.eos_id, found.pad_id) == ids
    assert found.end_ids == ends
    found.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert (again.bos_id, again.eos_id, again.pad_id, again.end_ids) == (*ids, ends)
    assert again.fingerprint == found.fingerprint, "or a resumed run tokenizes anew"
    assert (found.fingerprint == plain.fingerprint) == (not files), "or text that was cached ends with another token"
    chosen = Tokenizer.load(tmp_path, data=DataConfig(bos_token="<c>", eos_token="<a>", pad_token="<b>"))
    assert (chosen.bos_id, chosen.eos_id, chosen.pad_id) == (3, 1, 2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "tokenizer_config.json",
            '{"eos_token": "<x>"}',
            r"has no token <x>, its eos_token; set data\.eos_token to one",
        ),
        ("generation_config.json", "{", r"generation_config\.json is not readable"),
        ("special_tokens_map.json", "[]", r"special_tokens_map\.json is not readable: it holds no object"),
    ],
)
def test_what_a_folder_cannot_say(tmp_path, name: str, content: str, message: str) -> None:
    (tmp_path / "tokenizer.json").write_text(bare({"a": 0}, ["<s>", "</s>"]).to_str())
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        Tokenizer.load(tmp_path)


def test_vocabulary_and_merges_are_the_same_tokenizer(tmp_path) -> None:
    whole = Tokenizer.train(PROSE, 300)
    tokenizers.Tokenizer.from_str(whole.to_json()).model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "eos_token": "<eos>"}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<new>": 300}))
    found = Tokenizer.load(tmp_path)
    assert (found.bos_id, found.eos_id, found.vocab_size) == (1, 2, 301)
    assert found.encode(PROSE[3]) == whole.encode(PROSE[3])
    assert found.decode([1, *found.encode(" x<new>"), 2]) == " x<new>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):  # its words are split in another way
        Tokenizer.load(tmp_path)


def test_bpe_dropout_is_off() -> None:
    settings = json.loads(TOKENIZER.to_json())
    settings["model"]["dropout"] = 0.5
    tokenizer = Tokenizer.from_json(json.dumps(settings))
    assert tokenizer.encode(PROSE[0]) == TOKENIZER.encode(PROSE[0])
    assert tokenizer.to_json() == TOKENIZER.to_json()


def test_ids_without_a_token() -> None:
    assert Tokenizer.from_json(bare({"a": 0, "b": 3}, ["<|endoftext|>"]).to_str()).missing(7) == (1, 4, 5, 6)


@pytest.mark.parametrize("content", ["", "{", json.dumps({"model": 1}), "[]", "\udcff"])
def test_corrupt_file_is_refused(tmp_path, content: str) -> None:
    path = tmp_path / "own.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"^data\.tokenizer_path \(.*own\.json\)") as caught:
        Tokenizer.load(path)
    assert "\n" not in str(caught.value)


def test_missing_file_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match=r"nothing\.json\): no such file"):
        Tokenizer.load(tmp_path / "nothing.json")
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_half_a_character_is_refused() -> None:
    with pytest.raises(UserError, match="at character 1"):
        TOKENIZER.encode("a\udcff")


def test_long_words_are_bounded_in_training() -> None:
    """Such as base64 in one line: BPE's training takes the square of a word's length. Other text trains as ever."""
    for text in ("words " * 999, "a" * 1000 + " b", " " * 1000):
        assert without_long_words(text) == [text]
    text = "a b" + "\n" * 2500 + "x" * 1001 + " y"
    parts = without_long_words(text)
    assert "".join(parts) == text
    assert [len(part) for part in parts] == [1003, 1000, 1500, 3]
