"""Lists of terms: between commas, or lines of a file."""

import pytest

from nanogpt.errors import InputError, UsageError
from nanogpt.terms import read_terms


def test_terms_stand_between_commas_without_the_spaces_around_them():
    assert read_terms(" gene therapy ,, quark\t,é", "--reward-terms") == [
        "gene therapy", "quark", "é",
    ]  # fmt: skip


def test_a_file_of_that_name_holds_one_term_a_line(tmp_path):
    path = tmp_path / "terms"
    path.write_bytes("gene, therapy\r\n\n  Quark \né".encode())
    assert read_terms(str(path), "--reward-terms") == ["gene, therapy", "Quark", "é"]


def test_a_folder_of_that_name_is_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gene").mkdir()
    assert read_terms("gene", "--reward-terms") == ["gene"]


def test_a_term_may_be_longer_than_any_file_name():
    assert read_terms("g" * 5000, "--x") == ["g" * 5000]


@pytest.mark.parametrize("value", ["", " , ,", "\t"])
def test_no_terms_are_refused(value):
    with pytest.raises(UsageError, match="--align-terms needs at least one term"):
        read_terms(value, "--align-terms")


def test_bytes_that_are_no_text_are_refused(tmp_path):
    with pytest.raises(UsageError, match="--reward-terms is not UTF-8 text"):
        read_terms("g\udce9ne", "--reward-terms")
    path = tmp_path / "latin.txt"
    path.write_bytes("gène".encode("latin-1"))
    with pytest.raises(InputError, match="is not UTF-8 text: bad byte at 1"):
        read_terms(str(path), "--reward-terms")


def test_a_file_that_is_missing_or_holds_nothing_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the terms of --reward-terms .*none\.txt"):
        read_terms(str(tmp_path / "none.txt"), "--reward-terms")
    path = tmp_path / "empty.txt"
    path.write_text("\n \n")
    with pytest.raises(InputError, match=r"empty\.txt holds no terms, one a line"):
        read_terms(str(path), "--reward-terms")
