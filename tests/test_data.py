"""Reading texts, the token file and its cache, and the order of batches."""

import gzip
import io
import subprocess
import sys

import numpy as np
import pytest

from nanogpt import data
from nanogpt.data import BatchOrder, find_sources, gather, prepare, validation_windows
from nanogpt.errors import InputError
from nanogpt.tokenizer import CharTokenizer


def decoded(corpus) -> str:
    return corpus.tokenizer.decode(corpus.tokens.tolist())


def test_one_file_is_the_special_token_and_its_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("héllo\r\nwörld\n".encode())
    corpus = prepare([str(tmp_path / "a.txt")])
    assert corpus.tokens[0] == corpus.tokenizer.end_of_text_id
    assert decoded(corpus) == "héllo\r\nwörld\n"
    assert corpus.n_bytes == len("héllo\r\nwörld\n".encode())
    assert corpus.name == "a"


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_several_documents_are_separated(tmp_path, kind):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    corpus = prepare([str(tmp_path)], tokenizer_kind=kind, vocab_size=300)
    ends = np.flatnonzero(corpus.tokens == corpus.tokenizer.end_of_text_id)
    assert corpus.n_documents == len(ends) == 2
    assert corpus.tokenizer.decode(corpus.tokens[: ends[1]].tolist()) == "text a"


def test_folders_globs_and_gz_are_read_in_order(tmp_path):
    (tmp_path / "in/ner").mkdir(parents=True)
    (tmp_path / "in/b.txt").write_text("B")
    (tmp_path / "in/ner/c.gz").write_bytes(gzip.compress(b"C"))
    (tmp_path / "in/a.txt").write_text("A")
    (tmp_path / "in/.hidden").write_text("no")
    (tmp_path / "in/binary.png").write_bytes(b"\x89PNG\0\0")
    assert decoded(prepare([str(tmp_path / "in")])) == "ABC"
    assert decoded(prepare([str(tmp_path / "in/*.txt")])) == "AB"
    assert decoded(prepare([str(tmp_path / "in/b.txt"), str(tmp_path / "in/ner/c.gz")])) == "BC"


def test_standard_input_is_read(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from a pipe")))
    assert decoded(prepare(["-"])) == "from a pipe"


def test_a_byte_order_mark_is_dropped_at_the_start_only(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffa\ufeffb")
    assert decoded(prepare([str(tmp_path / "a.txt")])) == "a\ufeffb"


@pytest.mark.parametrize("chunk", [7, 20, 21, 22, 1000])
def test_the_first_bad_byte_is_named_across_chunks(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(data, "_CHUNK_BYTES", chunk)
    (tmp_path / "a.txt").write_bytes(b"x" * 20 + "é".encode()[:1] + b"y" * 20)
    with pytest.raises(InputError, match=r"a\.txt.*offset 20.*--encoding-errors replace"):
        prepare([str(tmp_path / "a.txt")])
    notes = []
    corpus = prepare([str(tmp_path / "a.txt")], encoding_errors="replace", note=notes.append)
    assert decoded(corpus) == "x" * 20 + "\ufffd" + "y" * 20
    assert notes == ["1 places that were not UTF-8 became U+FFFD"]


def test_characters_are_never_split_between_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_CHUNK_BYTES", 5)
    text = "日本語 🙂 é " * 40
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert decoded(prepare([str(tmp_path / "a.txt")])) == text


def test_bpe_tokens_do_not_depend_on_the_chunks(tmp_path, monkeypatch):
    text = "It's   the\n\n  end, isn't it?  Yes…  \n\n\nno  " * 60
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    whole = prepare([str(tmp_path / "a.txt")], tokenizer_kind="bpe", vocab_size=320)
    assert whole.tokens[1:].tolist() == whole.tokenizer.encode(text)
    for chunk in (5, 17, 64, 501):
        monkeypatch.setattr(data, "_CHUNK_BYTES", chunk)
        corpus = prepare(
            [str(tmp_path / "a.txt")], tokenizer=whole.tokenizer, cache_dir=tmp_path / str(chunk)
        )
        assert corpus.tokens.tolist() == whole.tokens.tolist()


def test_a_long_run_without_white_space_is_cut_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_CHUNK_BYTES", 100)
    monkeypatch.setattr(data, "_LONGEST_CARRY", 300)
    (tmp_path / "a.txt").write_text("ab" * 2000)
    corpus = prepare([str(tmp_path / "a.txt")], tokenizer_kind="bpe", vocab_size=300)
    assert decoded(corpus) == "ab" * 2000


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "there is no file"),
        (lambda p: p.touch(), "is empty"),
        (lambda p: p.mkdir(), "holds no text files"),
    ],
)
def test_a_path_without_text_is_named(tmp_path, make, message):
    make(tmp_path / "x")
    with pytest.raises(InputError, match=message) as caught:
        prepare([str(tmp_path / "x")])
    assert str(tmp_path / "x") in str(caught.value)


def test_a_glob_without_files_and_a_damaged_gzip_are_named(tmp_path):
    with pytest.raises(InputError, match=r"no file matches .*\*\.md"):
        find_sources([str(tmp_path / "*.md")])
    packed = gzip.compress(np.random.default_rng(0).bytes(5000))
    for damaged in (packed[:-20], b"not gzip", packed[:2000] + b"zz" + packed[2002:]):
        (tmp_path / "a.gz").write_bytes(damaged)
        with pytest.raises(InputError, match=r"a\.gz is"):
            prepare([str(tmp_path / "a.gz")])


def test_a_character_that_a_given_tokenizer_lacks_is_named_with_its_byte(tmp_path):
    (tmp_path / "a.txt").write_text("aéa§", encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.txt.*'§' \(U\+00A7\) at byte 4"):
        prepare([str(tmp_path / "a.txt")], tokenizer=CharTokenizer("aé"))


def test_the_cache_is_used_and_a_damaged_one_is_made_again(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("some text " * 50)
    first = prepare([str(tmp_path / "a.txt")], cache_dir=tmp_path / "cache")
    want = first.tokens.tolist()
    real = data._write_tokens
    monkeypatch.setattr(data, "_write_tokens", lambda *a: pytest.fail("the cache was not used"))
    assert prepare([str(tmp_path / "a.txt")], cache_dir=tmp_path / "cache").tokens.tolist() == want
    monkeypatch.setattr(data, "_write_tokens", real)
    (path,) = (tmp_path / "cache").glob("*.tokens")
    whole = path.read_bytes()
    for damaged in (whole[:-2], whole[:7] + b"\x01" + whole[8:]):
        path.write_bytes(damaged)
        notes = []
        corpus = prepare([str(tmp_path / "a.txt")], cache_dir=tmp_path / "cache", note=notes.append)
        assert corpus.tokens.tolist() == want
        assert "damaged and made again" in notes[0]


def test_a_cache_that_cannot_be_written_is_replaced_with_a_note(tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "a.txt").write_text("text")
    notes = []
    corpus = prepare(
        [str(tmp_path / "a.txt")], cache_dir=tmp_path / "file" / "cache", note=notes.append
    )
    assert decoded(corpus) == "text"
    assert "cannot be written" in notes[0]


def test_the_split_is_the_last_part_of_the_stream(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 999)
    corpus = prepare([str(tmp_path / "a.txt")])
    for fraction, n_val in ((0.1, 100), (0.3, 300), (0.7, 700), (0.0, 0), (0.0001, 0)):
        train, val = corpus.split(fraction)
        assert (len(train), len(val)) == (1000 - n_val, n_val)


def test_tinyshakespeare_is_split_as_its_published_figure_is(data_folder):
    corpus = prepare([str(data_folder / "tinyshakespeare.txt")])
    _, val = corpus.split(0.1)
    text = (data_folder / "tinyshakespeare.txt").read_text()
    assert corpus.tokenizer.vocab_size == 66
    assert corpus.tokenizer.decode(val.tolist()) == text[int(len(text) * 0.9) :]
    assert len(val) == 111_540


def test_the_built_in_text_is_real_and_large_enough():
    corpus = prepare(None)
    assert corpus.n_bytes > 300_000
    assert "The following" in decoded(corpus)


@pytest.mark.parametrize("windows", [1, 2, 3, 7, 64, 65, 1000])
def test_an_epoch_visits_every_window_once(windows):
    order = BatchOrder(windows * 8 + 3, 8, 5, seed=1)
    for epoch in range(3):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        batches = [order.starts(step) for step in steps]
        assert [len(b) for b in batches[:-1]] == [5] * (len(batches) - 1)
        seen = np.concatenate(batches)
        positions = (seen[:, None] + np.arange(8)).ravel() % order.n_tokens
        assert len(seen) == windows
        assert len(set(positions.tolist())) == windows * 8


def test_epochs_and_seeds_have_their_own_order_and_a_step_is_enough_to_know_it():
    order = BatchOrder(100_000, 16, 32, seed=1)
    again, other = BatchOrder(100_000, 16, 32, seed=1), BatchOrder(100_000, 16, 32, seed=2)
    n = order.steps_per_epoch
    assert np.array_equal(again.starts(n + 7), order.starts(n + 7))
    assert not np.array_equal(other.starts(7), order.starts(7))
    assert not np.array_equal(order.starts(n + 7), order.starts(7))


def test_neighbouring_windows_are_well_shuffled():
    """The rank correlation of an epoch's order with the text's is that of chance."""
    order = BatchOrder(16 * 50_000, 16, 50_000, seed=3)
    starts = order.starts(0)
    index = np.arange(len(starts))
    assert abs(np.corrcoef(index, starts)[0, 1]) < 5 / np.sqrt(len(starts))
    assert abs(np.corrcoef(starts[:-1], starts[1:])[0, 1]) < 5 / np.sqrt(len(starts))


def test_the_stream_is_a_ring():
    tokens = np.arange(10, dtype=np.uint16)
    assert gather(tokens, np.array([7]), 4).tolist() == [[7, 8, 9, 0, 1]]


def test_a_stream_shorter_than_a_block_is_refused():
    with pytest.raises(
        InputError, match="7 tokens are left for training, fewer than one block of 8"
    ):
        BatchOrder(7, 8, 1, seed=0)
    assert BatchOrder(8, 8, 1, seed=0).windows == 1


@pytest.mark.parametrize("n", [0, 1, 2, 8, 9, 10, 17, 100])
def test_validation_windows_hold_every_target_once(n):
    targets = []
    for starts, length in validation_windows(n, 8):
        for start in starts:
            targets += range(start + 1, start + length + 1)
    assert targets == list(range(1, n))


@pytest.mark.slow
def test_a_large_text_never_enters_memory(tmp_path):
    """200 MB of text raise the peak of a process by less than 120 MB."""
    line = ("the quick brown fox jumps over the lazy dog " * 24 + "\n").encode()
    with (tmp_path / "large.txt").open("wb") as file:
        for _ in range(200_000_000 // len(line)):
            file.write(line)
    program = (
        "import resource, sys; from nanogpt.data import prepare;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        f"corpus = prepare([{str(tmp_path / 'large.txt')!r}]);"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "print(corpus.n_tokens, after - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    n_tokens, grown = map(int, done.stdout.split())
    assert n_tokens > 190_000_000
    unit = 1 if sys.platform == "darwin" else 1024
    assert grown * unit < 120 * 2**20


def test_a_damaged_cached_tokenizer_is_made_again(tmp_path):
    """One character of a merge is another: still a tokenizer, but not this text's."""
    path = tmp_path / "text.txt"
    path.write_text("low lower lowest newer newest " * 50)
    notes: list[str] = []

    def read():
        corpus = prepare([str(path)], tokenizer_kind="bpe", vocab_size=270,
                         cache_dir=tmp_path / "cache", note=notes.append)  # fmt: skip
        return corpus.tokenizer.to_dict(), corpus.tokens.tolist()

    whole = read()
    (cached,) = (tmp_path / "cache").glob("*.bpe.json")
    assert read() == whole
    text = cached.read_text()
    cached.write_text(text.replace('"lo"', '"ol"').replace('["l", "o"]', '["o", "l"]'))
    assert cached.read_text() != text
    assert read() == whole
    assert notes == [f"the cached tokenizer {cached} is damaged and made again"]
    assert cached.read_text() == text
