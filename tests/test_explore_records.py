"""Readers of tables, logs and texts, and the serialisation of their records."""

import gzip
import io
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.errors import InputError, UsageError
from nanogpt.explore import delimited, json_records, sources
from nanogpt.explore.reading import read_records
from nanogpt.explore.records import Records, write_csv
from nanogpt.explore.serialising import escape, parse, serialise, unescape


@pytest.fixture
def written(tmp_path):
    def write(content, name="data.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def rows(records):
    return [list(record.values()) for record in records]


def as_csv(records):
    file = io.BytesIO()
    write_csv(records, file)
    return file.getvalue()


def many(row, n=40):
    """Good rows, so that a bad one is less than a tenth."""
    return f"{row}\n" * n


# E8: nothing is lost.

HARD = [
    "Hello, World is big", " is ", "=", "a=b|c", '"quoted"', "it's", "line\nbreak", "\r\n", "tab\t",
    "\x1f", "\x1e", "\x1a", "\x10", "\x10^", "\x10Z", "\x00", "😀 é", "", None, "None", "null",
    "NaN", "007", " padded ", "\ufeff",
]  # fmt: skip


@pytest.mark.parametrize("value", HARD)
def test_e8_every_value_survives_as_name_and_as_value(value):
    record = {"title": value, "other": "x", value or "": value}
    text = serialise(record)
    assert parse(text) == record
    assert list(parse(text)) == list(record)


def test_e8_a_record_is_name_us_value_rs():
    assert serialise({"a": "1", "b": None, "c": ""}) == "a\x1f1\x1eb\x1f\x1a\x1ec\x1f\x1e"
    assert serialise({"a": "\x1e\x1f\x1a\x10"}) == "a\x1f\x10^\x10_\x10Z\x10P\x1e"
    assert serialise({}) == ""
    assert parse("") == {}


CHARACTERS = st.one_of(st.characters(), st.sampled_from("\x10\x1a\x1e\x1f^_ZP,;\"'\r\n"))
TEXTS = st.text(CHARACTERS, max_size=12)


@given(st.dictionaries(TEXTS, st.none() | TEXTS, max_size=5))
def test_e8_any_record_comes_back_and_different_ones_differ(record):
    assert list(parse(serialise(record)).items()) == list(record.items())


@given(TEXTS)
def test_what_can_be_parsed_is_what_serialise_makes(text):
    try:
        record = parse(text)
    except ValueError:
        return
    assert serialise(record) == text


@given(TEXTS)
def test_escaped_text_holds_no_separator(text):
    assert not set(escape(text)) & set("\x1a\x1e\x1f")
    assert unescape(escape(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "a\x1f1",
        "a\x1e",
        "a\x1f1\x1f2\x1e",
        "a\x1f1\x1ea\x1f2\x1e",
        "a\x1f\x10\x1e",
        "a\x1f\x10x\x1e",
        "a\x1fb\x1a\x1e",
        "\x1a\x1fb\x1e",
        "\x1e",
    ],
)
def test_malformed_text_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011
        parse(text)


# E9: tables.


def test_e9_quotes_and_newlines_follow_rfc_4180(written):
    path = written('name,said\r\nann,"one\r\ntwo, ""three"""\r\nbob, 007 \r\n')
    records = read_records(path)
    assert records.names == ("name", "said")
    assert rows(records) == [["ann", 'one\r\ntwo, "three"'], ["bob", " 007 "]]
    assert records.lines.tolist() == [2, 4]
    assert records.format == "csv"
    assert records.name == str(path)
    assert records.notes == ()


def test_e9_an_empty_cell_is_missing_and_an_empty_quote_is_empty(written):
    path = written('a,b\n,None\n"",null\n"NA",\n')
    assert rows(read_records(path)) == [[None, "None"], ["", "null"], ["NA", None]]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["data.csv", "data.tsv"])
def test_e9_the_delimiter_is_found_out(written, delimiter, name):
    lines = [
        ["when", "how, much", "x"],
        ["1,5", "2,5", "a"],
        ["3,5", "", "b;c"],
        ["4,5", "7,5", "d"],
    ]
    quoted = [[f'"{c}"' if delimiter in c else c for c in line] for line in lines]
    path = written("".join(delimiter.join(line) + "\n" for line in quoted), name)
    records = read_records(path)
    assert records.names == ("when", "how, much", "x")
    assert rows(records)[1] == ["3,5", None, "b;c"]
    usual = {"data.csv": ",", "data.tsv": "\t"}[name]
    assert bool(records.notes) == (delimiter != usual)


def test_apostrophes_quote_where_every_row_has_them_and_no_others(written):
    path = written("a,b\n'x, y',1\n'it''s',2\n'z',3\n")
    records = read_records(path)
    assert rows(records) == [["x, y", "1"], ["it's", "2"], ["z", "3"]]
    assert "quoted with '" in records.notes[0]
    path = written("a,b\n'tis,1\nx,2\nrock 'n',3\n")
    assert read_records(path).column("a") == ["'tis", "x", "rock 'n'"]


def test_quotation_marks_that_close_nothing_belong_to_the_values(written):
    path = written('a\tb\n"hi\t1\n5" disk\t2\n"yo\t3\n"so\t4\n', "data.tsv")
    records = read_records(path)
    assert records.column("a") == ['"hi', '5" disk', '"yo', '"so']
    assert "part of the values" in records.notes[0]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_e9_marks_and_line_ends_are_understood(written, encoding, end):
    path = written(end.join(["é,b", "ü,2", "漢,3", ""]).encode(encoding))
    records = read_records(path)
    assert records.names == ("é", "b")
    assert rows(records) == [["ü", "2"], ["漢", "3"]]
    assert records.lines.tolist() == [2, 3]


def test_gzip_is_unpacked(written):
    path = written(gzip.compress(b"a\tb\n1\tx\n2\ty\n"), "data.tsv.gz")
    records = read_records(path)
    assert (records.format, rows(records)) == ("tsv", [["1", "x"], ["2", "y"]])


def test_e9_ragged_rows_are_left_out_and_named(written):
    path = written('a,b\n"x\ny",1\n' + many("p,2") + "q\nr,3,4\n" + many("s,5"))
    records = read_records(path)
    assert len(records) == 81
    assert not {"q", "r"} & set(records.column("a"))
    (note,) = records.notes
    assert note.startswith("2 bad lines were left out")
    assert "line 44: 1 value where there are 2 fields" in note
    assert "line 45: 3 values" in note
    # Lines after a bad one, and after a quoted line end, are counted on.
    assert records.lines[[0, 1, 40, 41]].tolist() == [2, 4, 43, 46]


def test_e9_ragged_rows_are_completed_or_refused_on_demand(written):
    path = written("a,b,c\n" + many("p,2,3") + "q\n" + "r,1,2,3\n")
    records = read_records(path, bad_lines="fill")
    assert rows(records)[-1] == ["q", None, None]
    assert "1 short row was completed with missing values (line 42)" in " ".join(records.notes)
    assert "line 43: 4 values" in " ".join(records.notes)
    with pytest.raises(InputError, match="line 42: 1 value where there are 3 fields"):
        read_records(path, bad_lines="error")


@pytest.mark.parametrize(("bad", "fine"), [(1, True), (2, False)])
def test_more_than_a_tenth_of_bad_lines_is_refused(written, bad, fine):
    path = written("a,b\n" + many("1,x", 10) + many("1", bad))
    if fine:
        assert len(read_records(path)) == 10
    else:
        with pytest.raises(InputError, match=r"line 12: 1 value .* \(2 of 12 records are bad\)"):
            read_records(path)


def test_blank_lines_of_a_table_are_no_records_but_all_missing_rows_are(written):
    path = written("\na,b\n\n1,2\n,\n\n  \n3,4\n\n")
    records = read_records(path)
    assert rows(records) == [["1", "2"], [None, None], ["3", "4"]]
    assert records.lines.tolist() == [4, 5, 8]


def test_a_blank_line_of_one_field_is_a_missing_value(written):
    records = read_records(written('word\nhello, world\n\n""\nx; y\n'))
    assert records.column("word") == ["hello, world", None, "", "x; y"]
    assert records.notes == ("one field was found", "1 blank line is read as missing")


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("1,2.5\n3,4\n", ("column_1", "column_2")),
        ("3.5\n2\n1\n", ("column_1",)),
        ("Adelie,39.1\nAdelie,40\nGentoo,46\n", ("column_1", "column_2")),
        ("yes,red\nno,blue\nyes,blue\nno,red\n", ("column_1", "column_2")),
        ("country,1990,1991\nFR,1,2\nDE,3,4\n", ("country", "1990", "1991")),
        ("0,1,2\n5.5,6.5,7.5\n1,1,1\n", ("0", "1", "2")),
        ("1990\nx\ny\n", ("1990",)),
        ("yes\nno\nyes\n", ("yes",)),
        ('"1","2"\n3,4\n', ("1", "2")),
        ("a,b\n1,2\n", ("a", "b")),
        (",b\n1,2\n", ("column_1", "b")),
        ("column_2,,\n1,2,3\n", ("column_2", "column_2_", "column_3")),
    ],
)
def test_e9_a_header_is_told_from_data(written, content, names):
    records = read_records(written(content))
    assert records.names == names
    made = names[0] == "column_1" and not content.startswith(",")
    assert len(records) == content.count("\n") - (not made)
    assert any("looks like data" in note for note in records.notes) == made


def test_whether_there_is_a_header_can_be_said(written):
    path = written("1,2\n3,4\n")
    assert read_records(path, header=True).names == ("1", "2")
    assert rows(read_records(written("a,b\nc,d\n"), header=False)) == [["a", "b"], ["c", "d"]]


def test_a_header_that_comes_again_is_no_record(written):
    records = read_records(written("a,b\n" + many("1,2") + "a,b\n" + many("3,4")))
    assert len(records) == 80
    assert "line 42: the header stands there again" in records.notes[0]


def test_blocks_join_without_a_seam(written, monkeypatch):
    draw = random.Random(5)
    alphabet = ["a", "é", '"', ",", "\n", "\r\n", "\ufeff", " ", "9"]
    values = [
        ["".join(draw.choices(alphabet, k=draw.randrange(6))) for _ in range(3)] for _ in range(300)
    ]
    records = Records.from_rows([dict(zip("xyz", row, strict=True)) for row in values])
    path = written(as_csv(records))
    whole = read_records(path, header=True)
    monkeypatch.setattr(delimited, "_BLOCK_BYTES", 1)
    assert read_records(path, header=True) == whole == records


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ab\"',;\n\r 1\ufeff"), max_size=30), st.sampled_from(",;"))
def test_rows_are_framed_as_they_are_taken_apart(text, delimiter):
    """Cells of a row are the same alone, and after any other rows."""
    dialect = delimited.Dialect(delimiter.encode(), b'"')
    lines = list(enumerate(io.BytesIO(text.encode()).readlines(), 1))
    frames = [f for f in delimited._frames(lines, dialect) if f.closed and not f.stray]
    for width in {frame.fields for frame in frames}:
        contents = [frame.content for frame in frames if frame.fields == width]
        alone = [delimited._cells([content], dialect, width) for content in contents]
        joined = [[column[0] for column in cells] for cells in alone]
        assert [
            list(row) for row in zip(*delimited._cells(contents, dialect, width), strict=True)
        ] == (joined)


# E9: JSON and text.


def test_e9_objects_are_flattened_and_absent_keys_missing(written):
    lines = [
        '{"a": {"b": {"c": 1}, "d": [1.0, "x", {"y": null}]}, "t": "None"}',
        '{"t": null, "n": 007.5}'.replace("007.5", "7.50"),
        "",
        '{"t": "", "ok": true, "big": 123456789012345678901234567890, "e": {}}',
    ]
    records = read_records(written("\n".join(lines), "data.jsonl"))
    assert records.names == ("a.b.c", "a.d", "t", "n", "ok", "big", "e")
    assert records[0]["a.b.c"] == "1"
    assert records[0]["a.d"] == '[1.0, "x", {"y": null}]'
    assert records.column("t") == ["None", None, ""]
    assert records.column("n") == [None, "7.50", None]
    assert records[2]["ok"] == "true"
    assert records[2]["big"] == "123456789012345678901234567890"
    assert records[2]["e"] == "{}"
    assert records.lines.tolist() == [1, 2, 4]


def test_nan_is_missing_and_infinity_a_word(written):
    path = written('{"a": NaN, "b": "NaN"}\n{"a": -Infinity, "b": [NaN]}\n', "data.jsonl")
    records = read_records(path)
    assert rows(records) == [[None, "NaN"], ["-Infinity", "[NaN]"]]
    assert "NaN is read as missing (1 of them)" in records.notes


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{'a': 1}", "this is not JSON"),
        ('{"a": 1', "this is not JSON"),
        ("[1, 2]", "JSON, but not an object"),
        ("7", "JSON, but not an object"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ('{"a.b": 1, "a": {"b": 2}}', "two values have the name 'a.b'"),
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ('{"b\\u0000\\ud800": 1}', "b\\x00\\ud800 holds half of a surrogate pair"),
        ('{"' + "c" * 99 + '": "\\ud800"}', "c" * 60 + "… holds half of a surrogate pair"),
        ('{"a": {"b": ' + "[" * 100_000 + "]" * 100_000 + "}}", "nested too deep"),
    ],
)
def test_e9_bad_lines_of_json_are_named(written, line, reason):
    path = written(many('{"a": 1}', 20) + line + "\n" + many('{"a": 2}', 20), "data.jsonl")
    records = read_records(path)
    assert records.column("a") == ["1"] * 20 + ["2"] * 20
    assert "line 21: " in records.notes[0]
    assert reason in records.notes[0]
    assert records.lines[20] == 22
    with pytest.raises(InputError, match="line 21: "):
        read_records(path, bad_lines="error")


def test_an_array_of_objects_is_read_with_lines(written):
    path = written('\n[\n {"a": 1,\n  "b": {"c": 2}},\n {"a": 3}\n]\n', "data.json")
    records = read_records(path)
    assert rows(records) == [["1", "2"], ["3", None]]
    assert records.lines.tolist() == [3, 5]
    assert records.format == "jsonl"
    assert rows(read_records(written('{"a": 1}\n{"a": 2}\n', "data.json"))) == [["1"], ["2"]]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"a": 1}\n {"a": 2}]', "line 2: a comma or ] is wanted"),
        ('[{"a": 1},\n {"a": }]', "line 2: this is not JSON"),
        ('[{"a": 1}]\n[{"a": 2}]', "line 2: there is more after the array"),
        ("[1, 2]", "line 1: this is JSON, but not an object"),
        ('[{"a": 1}', "a comma or ] is wanted"),
        ("[]", "is empty"),
        ("[", "this is not JSON"),
    ],
)
def test_a_damaged_array_is_refused(written, content, words):
    with pytest.raises(InputError) as caught:
        read_records(written(content, "data.json"))
    assert words in str(caught.value)


def test_e9_a_text_holds_a_record_a_line(written):
    path = written(b"\xef\xbb\xbf one,\ttwo \r\n\r\n   \nthree\x0b\x1f\xe2\x80\xa8four", "data.txt")
    records = read_records(path)
    assert records.names == ("text",)
    assert records.column("text") == [" one,\ttwo ", "three\x0b\x1f\u2028four"]
    assert records.lines.tolist() == [1, 4]


@pytest.mark.parametrize(
    ("content", "format"),
    [
        ('{"a": 1}\n{"a": 2}\n', "jsonl"),
        ('[\n{"a": 1}]', "jsonl"),
        ("a,b\n1,2\n3,4\n", "csv"),
        ("a\tb\n1\t2\n3\t4\n", "tsv"),
        ("Well, yes.\nIt is so.\nWho, me, sir?\n", "txt"),
        ("one line\n", "txt"),
    ],
)
def test_an_unknown_ending_is_sniffed_and_said(written, content, format):
    records = read_records(written(content, "data.xyz"))
    assert records.format == format
    assert f"known: it was read as {format}" in records.notes[0]
    assert read_records(written(content, "data.xyz"), format="txt").format == "txt"


# What is refused, in a sentence.


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("data.csv", b"", "data.csv is empty"),
        ("data.tsv", b"\n\n  \n", "data.tsv is empty"),
        ("data.jsonl", b"\n", "data.jsonl is empty"),
        ("data.txt", b" \n", "data.txt is empty"),
        ("data.xyz", b"", "data.xyz is empty"),
        ("data.csv", b"a,b\n", "holds a header and no records"),
        ("data.csv", b"a,b,a\n1,2,3\n", "line 1: two fields are called 'a'"),
        ("data.csv", b"\na,a\n1,2\n", "line 2: two fields are called 'a'"),
        ("data.csv", b"a,b\n1,\x00\n", "line 2: this is not text"),
        ("data.txt", b"\x89PNG\r\n\x1a\n\x00\x00\x00", "this is not text"),
        ("data.jsonl", b'{"a": 1}\n\x00\n', "line 2: this is not text"),
        ("data.json", b'[{"a": "\x00"}]', "this is not text"),
        ("data.json", b'[\n{"a": "\xff"}]', "line 2: this is not UTF-8"),
        ("data.csv", "a,b\n1,é\n".encode("latin-1"), "line 2: this is not UTF-8 text"),
        ("data.txt", "a\rb\ré".encode("latin-1"), "line 3: this is not UTF-8 text"),
        ("data.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "line 2: this is not UTF-8 text"),
        ("data.csv", "a,b\n1,2\n".encode("utf-16") + b"x", "this is not UTF-16 text"),
        ("data.csv", "a,b\n1,2\n".encode("utf-16-le"), "line 1: this is not text"),
        ("data.csv", b"a,b\r1,\xff\r", "line 2: this is not UTF-8"),
        ("data.csv", b'a,b\n1,2\n3,"four\n5,6\n', "line 3: a quotation mark is opened"),
        ("data.csv", b'"a,b\n1,2\n', "line 1: a quotation mark is opened"),
        ("data.csv", b"a\rb,c\nd,e\n", "line 1: a carriage return stands outside quotes"),
        ("data.csv", b",".join(b"f%d" % i for i in range(2001)) + b"\n", "2,001 fields are more"),
        ("data.csv", b"PK\x03\x04...", "is an Excel workbook or a zip archive"),
        ("data.csv.gz", gzip.compress(b"a,b\n1,2\n" * 99)[:-9], "is a damaged gzip file"),
        ("data.csv", b"\x1f\x8b\x00\x00", "is a damaged gzip file"),
        ("data.jsonl", b'{"a": 1\n', "line 1: this is not JSON"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(written, name, content, words):
    path = written(content, name)
    with pytest.raises(InputError) as caught:
        read_records(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


def test_objects_with_ever_new_keys_are_refused(written):
    content = "".join(json.dumps({f"key{i}": 1}) + "\n" for i in range(2001))
    with pytest.raises(InputError, match="line 2,001: 2,001 fields are more than 2,000"):
        read_records(written(content, "data.jsonl"))


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(InputError, match=r"there is no file .*gone\.csv"):
        read_records(tmp_path / "gone.csv")
    with pytest.raises(InputError, match="is a folder"):
        read_records(tmp_path)


def test_unknown_choices_are_refused(written):
    path = written("a,b\n1,2\n")
    with pytest.raises(UsageError, match="the format is one of csv, tsv, jsonl, txt, not 'xls'"):
        read_records(path, "xls")
    with pytest.raises(UsageError, match="bad_lines is one of"):
        read_records(path, bad_lines="ignore")


@pytest.mark.parametrize("name", ["data.csv", "data.txt", "data.jsonl", "data.json", "data.xyz"])
def test_a_line_of_a_gigabyte_is_refused_before_it_is_read(tmp_path, monkeypatch, name):
    """The file is sparse after its first byte; what is read of it is counted."""
    path = tmp_path / name
    with open(path, "wb") as file:
        file.write(b"[" if name == "data.json" else b"a")
        file.truncate(2**30)
    size = 0

    class Counted(io.FileIO):
        def readinto(self, buffer):
            nonlocal size
            n = super().readinto(buffer)
            # Zeros of the hole stand for letters.
            view = memoryview(buffer).cast("B")
            view[:n] = bytes(view[:n]).replace(b"\0", b"x")
            size += n
            return n

    def opened(self):
        return io.BufferedReader(Counted(self.name), 2**20)

    monkeypatch.setattr(sources.Source, "_open", opened)
    monkeypatch.setattr(sources, "LONGEST_LINE_BYTES", 2**21)
    monkeypatch.setattr(json_records, "_LARGEST_ARRAY_BYTES", 2**22)
    with pytest.raises(InputError, match=r"longer than 2 MB|more than 4 MB"):
        read_records(path)
    assert 2**20 < size < 2**25


@pytest.mark.parametrize(("extra", "fine"), [(0, True), (1, False)])
def test_the_longest_line_allowed_is_read(written, monkeypatch, extra, fine):
    monkeypatch.setattr(sources, "LONGEST_LINE_BYTES", 1000)
    path = written("short\n" + "é" * 499 + "x" * (1 + extra) + "\n", "data.txt")
    if fine:
        assert len(read_records(path).column("text")[1]) == 500
    else:
        with pytest.raises(InputError, match="line 2: the line is longer"):
            read_records(path)


def test_an_open_quote_does_not_swallow_a_large_file(written, monkeypatch):
    monkeypatch.setattr(delimited, "LONGEST_LINE_BYTES", 2000)
    path = written("a,b\n1,2\n" + '3,"x\n' + many("4,5", 1000))
    with pytest.raises(InputError, match="line 3: a quotation mark is opened"):
        read_records(path)


# Records.


def test_rows_of_python_become_text():
    records = Records.from_rows(
        [{"a": 1, "b": True, "c": "007"}, {"d": 2.50, "a": float("nan"), "c": None}]
    )
    assert records.names == ("a", "b", "c", "d")
    assert rows(records) == [["1", "true", "007", None], [None, None, None, "2.5"]]
    assert records.lines.tolist() == [1, 2]
    assert Records.from_rows([{"a": np.int64(3), "b": np.float32(0.5)}])[0] == {
        "a": "3",
        "b": "0.5",
    }
    with pytest.raises(TypeError, match=r"row 2 of records: .* not list"):
        Records.from_rows([{"a": 1}, {"a": [1]}])
    with pytest.raises(ValueError, match="surrogate"):
        Records.from_rows([{"a": "\udc00"}])


def test_records_are_a_sequence_of_mappings():
    records = Records.from_rows([{"a": i, "b": None} for i in range(5)])
    assert len(records) == 5
    assert records[-1] == {"a": "4", "b": None}
    assert rows(records[1:3]) == [["1", None], ["2", None]]
    taken = records.take([3, 0, 3])
    assert taken.column("a") == ["3", "0", "3"]
    assert taken.lines.tolist() == [4, 1, 4]
    assert list(records)[2] == {"a": "2", "b": None}
    with pytest.raises(IndexError):
        records[5]
    with pytest.raises(KeyError):
        records.column("c")
    with pytest.raises(ValueError, match="two fields"):
        Records("x", "csv", ["a", "a"], [[], []], [])
    with pytest.raises(ValueError, match="every column"):
        Records("x", "csv", ["a"], [["1"]], [])


def test_the_digest_is_of_names_and_values_alone(written):
    one = read_records(written("a,b\n1,x\n,y\n"))
    assert one.digest == read_records(written('"a";"b"\n"1";x\n;y\n', "other.csv")).digest
    assert one.digest == Records.from_rows([{"a": "1", "b": "x"}, {"b": "y"}]).digest
    others = [
        [{"a": "1", "b": "x"}, {"a": "", "b": "y"}],
        [{"a": "1x", "b": ""}, {"b": "y"}],
        [{"a": "1", "c": "x"}, {"c": "y"}],
        [{"b": "x", "a": "1"}, {"b": "y"}],
    ]
    digests = {Records.from_rows(other).digest for other in others} | {one.digest}
    assert len(digests) == 5


def test_a_table_is_written_as_rfc_4180():
    records = Records.from_rows([{"a": None, "b": ""}, {"a": 'x,"y"', "b": "1\n2"}])
    assert as_csv(records) == b'"a","b"\r\n,""\r\n"x,""y""","1\n2"\r\n'


CELLS = st.none() | st.text(
    st.one_of(
        st.characters(exclude_characters="\0", exclude_categories=["Cs"]),
        st.sampled_from(",;\"'\r\n\t| 1"),
    ),
    max_size=8,
)
NAMES = st.lists(
    st.text(
        st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=5
    ),
    min_size=1,
    unique=True,
)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_what_is_written_is_read_back(tmp_path_factory, data):
    names = data.draw(NAMES)
    columns = st.lists(st.tuples(*[CELLS] * len(names)), min_size=1, max_size=6)
    values = list(zip(*data.draw(columns), strict=True))
    lines = range(1, len(values[0]) + 1)
    records = Records("x", "csv", names, map(list, values), lines)
    path = tmp_path_factory.mktemp("csv") / "x.csv"
    path.write_bytes(as_csv(records))
    assert read_records(path, header=True) == records


def test_what_commas_explain_is_no_table_of_semicolons(written):
    """Between semicolons these quotes would be letters, and the rows agree as well."""
    for row in ({"0": None, ";": ";"}, {"0": None, ";": None, "\r": None, "00": ";"}):
        records = Records.from_rows([row])
        assert read_records(written(as_csv(records)), header=True) == records


def test_numbers_as_names_are_read_back_as_names(written):
    records = Records.from_rows([{"1": "3", "2": "4.5"}, {"1": "5", "2": None}])
    assert read_records(written(as_csv(records))) == records


def test_the_records_of_real_files_are_all_there(data_folder):
    expected = {
        "penguins.csv": (344, 7),
        "titanic.csv": (891, 15),
        "humaneval.jsonl": (164, 5),
        "movie_reviews.txt": (10662, 1),
    }
    for name, shape in expected.items():
        records = read_records(data_folder / name)
        assert (len(records), len(records.names)) == shape
        assert not [note for note in records.notes if "bad" in note]
        assert all(parse(serialise(record)) == record for record in records[:50])
