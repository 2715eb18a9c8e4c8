"""The text that is given out token by token is the text of all tokens, cut at the first stop string."""

import pytest
from conftest import documents
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data.tokenizer import Tokenizer
from jaxlm.generation.text import TextStream

TOKENIZER = Tokenizer.train(documents(60, 1), 300)
IDS = st.lists(st.integers(3, TOKENIZER.vocab_size - 1), max_size=25)  # any bytes, so mostly no UTF-8
TEXTS = st.text(alphabet="ab é🙂\n", max_size=12)


def streamed(ids: list[int], stops: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(TOKENIZER.decode, stops)
    pieces = []
    for token in ids:
        pieces.append(stream.extend([token], is_last=False))
        if stream.stopped:
            break
    else:
        pieces.append(stream.extend([], is_last=True))
    return pieces, stream


@given(ids=IDS)
@settings(deadline=None)
def test_any_bytes(ids: list[int]) -> None:
    pieces, stream = streamed(ids)
    assert "".join(pieces) == stream.text == TOKENIZER.decode(ids)
    assert not stream.stopped


@given(text=TEXTS, stops=st.lists(st.text(alphabet="ab é🙂", min_size=1, max_size=3), max_size=3))
@settings(deadline=None)
def test_stop_strings(text: str, stops: list[str]) -> None:
    pieces, stream = streamed(TOKENIZER.encode(text), tuple(stops))
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    assert stream.stopped == bool(ends)
    assert "".join(pieces) == stream.text
    assert not any(stop in stream.text for stop in stops)
    assert text.startswith(stream.text)
    if not ends:
        assert stream.text == text
    else:
        assert any(text[len(stream.text) :].startswith(stop) for stop in stops), "cut where a stop string begins"


@pytest.mark.parametrize(("stop", "shown"), [("🙂", ["q", "é"]), ("é🙂", ["q"]), ("🙂c", ["q", "é"])])
def test_nothing_of_a_stop_string_or_of_half_a_character_is_shown(stop: str, shown: list[str]) -> None:
    text, seen = "qé🙂", []
    stream = TextStream(TOKENIZER.decode, (stop,))
    for token in TOKENIZER.encode(text):
        seen.append(stream.extend([token], is_last=False))
    assert [piece for piece in seen if piece] == shown
    assert stream.extend([], is_last=True) == ("🙂" if stop == "🙂c" else "")
    assert stream.stopped == (stop in text)


@pytest.mark.parametrize("stops", [("c", "bc"), ("bc", "c")])
def test_of_stop_strings_that_end_together_the_longest_goes(stops: tuple[str, ...]) -> None:
    assert streamed(TOKENIZER.encode("abcd"), stops)[1].text == "a"


@given(words=st.lists(st.integers(0, 4), max_size=9), size=st.integers(0, 9))
def test_what_follows_a_prompt_is_the_whole_less_the_prompt(words: list[int], size: int) -> None:
    """A decoder of words drops the blank of a text's first, wherever the prompt ends; token 0 is special."""
    texts = ["", "▁the", "▁cat", "s", "▁"]
    decode = lambda ids: "".join(texts[i] for i in ids).replace("▁", " ").removeprefix(" ")  # noqa: E731
    prompt, new = words[:size], words[size:]
    stream = TextStream(decode, (), prompt)
    pieces = [stream.extend([token], is_last=False) for token in new] + [stream.extend([], is_last=True)]
    assert decode(prompt) + "".join(pieces) == decode(words)
    assert TextStream(decode, (), prompt).extend(new, is_last=True) == stream.text
    assert stream.tokens == new


def test_a_decoder_that_drops_the_first_space() -> None:
    """As SentencePiece's: the space before a word is part of its token, and shown only after another token."""
    words = ["", "▁the", "▁cat", "s"]
    decode = lambda ids: "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")  # noqa: E731
    stream = TextStream(decode)
    assert [stream.extend([token], is_last=False) for token in (1, 2, 3)] == ["the", " cat", "s"]
