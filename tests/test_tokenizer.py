"""Round trips, the special token, hostile descriptions."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.errors import InputError, UsageError
from nanogpt.tokenizer import (
    END_OF_TEXT,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    StreamDecoder,
    UnknownCharacterError,
    tokenizer_from_dict,
)

TEXT = "the cat sat on the mat; the dog's 12 cats don't.\n\nÉtude № 5: 日本語 🙂\t" * 20


def all_kinds():
    return [CharTokenizer.from_text(TEXT), ByteTokenizer(), BPETokenizer.train(iter([TEXT]), 400)]


KINDS = {tokenizer.kind: tokenizer for tokenizer in all_kinds()}


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return KINDS[request.param]


def test_a_text_comes_back(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert max(ids) < tokenizer.end_of_text_id
    assert tokenizer.encode_array(TEXT).dtype == np.uint16
    assert tokenizer.encode("") == []


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back_from_bytes_and_bpe(text):
    for kind in ("byte", "bpe"):
        assert KINDS[kind].decode(KINDS[kind].encode(text)) == text


@given(st.binary())
def test_any_bytes_come_back_from_bytes(raw):
    tokenizer = KINDS["byte"]
    assert tokenizer.decode_bytes(tokenizer.encode(raw)) == raw


def test_the_special_token_is_last_and_decode_leaves_it_out(tokenizer):
    end = tokenizer.end_of_text_id
    assert end == tokenizer.vocab_size - 1
    ids = tokenizer.encode("the cat")
    assert tokenizer.decode([end, *ids, end]) == "the cat"
    assert tokenizer.token_bytes[end] == b""


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_its_letters_in_a_text_are_ordinary(kind):
    ids = KINDS[kind].encode(END_OF_TEXT)
    assert KINDS[kind].end_of_text_id not in ids
    assert KINDS[kind].decode(ids) == END_OF_TEXT


def test_character_vocabularies_show_their_maps():
    tokenizer = CharTokenizer("cab")
    assert tokenizer.stoi == {"a": 0, "b": 1, "c": 2, END_OF_TEXT: 3}
    assert tokenizer.itos[2] == "c"
    assert len(tokenizer.stoi) == tokenizer.vocab_size


@pytest.mark.parametrize("character", ["§", "\0", "\U0010ffff", "\ud800"])
def test_an_unknown_character_is_named_with_its_place(character):
    with pytest.raises(UnknownCharacterError) as caught:
        KINDS["char"].encode("the " + character)
    assert repr(character) in str(caught.value)
    assert "position 4" in str(caught.value)


def test_half_a_character_is_refused_by_all(tokenizer):
    with pytest.raises(UnknownCharacterError, match="position 2"):
        tokenizer.encode("th\ud800")


def test_token_bytes_add_up(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert b"".join(tokenizer.token_bytes[i] for i in ids) == TEXT.encode()
    assert tokenizer.token_byte_lengths[ids].sum() == len(TEXT.encode())


@pytest.mark.parametrize("bad", [-1, 10**6])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer, bad):
    with pytest.raises(ValueError, match="outside the vocabulary"):
        tokenizer.decode([bad])


def test_a_stream_never_splits_a_character_and_adds_up(tokenizer):
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.feed(token) for token in tokenizer.encode(TEXT)]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + decoder.flush() == TEXT


@given(st.lists(st.integers(0, 256)))
def test_a_stream_of_any_bytes_equals_decoding_at_once(ids):
    decoder = StreamDecoder(KINDS["byte"])
    text = "".join([*(decoder.feed(token) for token in ids), decoder.flush()])
    assert text == KINDS["byte"].decode(ids)


def test_a_description_rebuilds_the_tokenizer(tokenizer):
    description = json.loads(json.dumps(tokenizer.to_dict()))
    again = tokenizer_from_dict(description)
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    assert again.to_dict() == tokenizer.to_dict()


def test_training_bpe_twice_gives_the_same_tokenizer():
    one, two = (BPETokenizer.train(iter([TEXT]), 290).to_dict() for _ in "12")
    assert one == two
    assert tokenizer_from_dict(one).vocab_size == 290


def test_bpe_shortens_a_text():
    assert len(KINDS["bpe"].encode(TEXT)) < len(TEXT.encode()) / 2


def test_a_bpe_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(UsageError, match="at least 257"):
        BPETokenizer.train(iter([TEXT]), 256)


@pytest.mark.parametrize(
    "hostile",
    [
        None,
        7,
        {},
        {"kind": "word"},
        {"kind": "char"},
        {"kind": "char", "characters": ""},
        {"kind": "char", "characters": "aa"},
        {"kind": "char", "characters": ["a"]},
        {"kind": "char", "characters": "\ud800"},
        {"kind": "bpe"},
        {"kind": "bpe", "tokenizer": {"version": "1.0"}},
        {"kind": ["char"]},
    ],
)
def test_a_hostile_description_is_refused(hostile):
    with pytest.raises(InputError):
        tokenizer_from_dict(hostile)


def test_a_bpe_description_without_its_special_token_is_refused():
    description = json.loads(json.dumps(KINDS["bpe"].to_dict()))
    description["tokenizer"]["added_tokens"] = []
    with pytest.raises(InputError, match="damaged"):
        tokenizer_from_dict(description)


@pytest.mark.parametrize("characters", ["abc\n", "abcé\0€"])
def test_arrays_decode_as_lists_do(characters):
    tokenizer = CharTokenizer(characters)
    ids = np.random.default_rng(0).integers(0, tokenizer.vocab_size, 500).astype(np.uint16)
    assert tokenizer.decode_array(ids) == tokenizer.decode_bytes(ids.tolist())
    assert tokenizer.decode_array(ids[:0]) == b""
    with pytest.raises(ValueError, match="token 99 is outside the vocabulary"):
        tokenizer.decode_array(np.array([0, 99]))
    with pytest.raises(ValueError, match="token -1 is outside the vocabulary"):
        tokenizer.decode_array(np.array([-1]))
