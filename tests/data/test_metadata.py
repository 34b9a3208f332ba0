"""Metadata files as QIIME 2, Qiita, R and spreadsheets write them, good and bad."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from aam.data.metadata import numeric_column, read_metadata, text_column

DATA = os.environ.get("AAM_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="AAM_TEST_DATA names no folder with the public datasets")


def write(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "metadata.tsv"
    path.write_bytes(text.encode(encoding))
    return path


def read(folder: Path, text: str):
    return read_metadata(write(folder, text))


def fault(call, *arguments, **named) -> str:
    """Return the text of the ValueError of a call: always one line."""
    with pytest.raises(ValueError) as caught:
        call(*arguments, **named)
    message = str(caught.value)
    assert "\n" not in message
    assert "metadata.tsv" in message
    return message


def refused(folder: Path, text: str) -> str:
    return fault(read_metadata, write(folder, text))


def test_cells_are_text_as_written(tmp_path):
    frame, notes = read(tmp_path, "sample-id\tage\tsite\n007\t01.50\tgut\n10317.000001234\t\ttongue\n")
    assert frame.index.tolist() == ["007", "10317.000001234"]
    assert frame.columns.tolist() == ["age", "site"]
    assert frame["age"].tolist() == ["01.50", None]
    assert frame["site"].tolist() == ["gut", "tongue"]
    assert notes == ()


@pytest.mark.parametrize("header", ["sample-id", "#SampleID", "SampleID", "sample_name", "id", "Sample ID", "#OTU ID"])
def test_known_headers_need_no_note(tmp_path, header):
    frame, notes = read(tmp_path, f"{header}\tage\ns1\t3\n")
    assert frame.loc["s1", "age"] == "3"
    assert notes == ()


@pytest.mark.parametrize("header", ["sample_id", "sample-name", "#sampleid", "#Sample_Name", "Run", "", "Unnamed: 0"])
def test_other_headers_are_read_and_said(tmp_path, header):
    frame, notes = read(tmp_path, f"{header}\tage\ns1\t3\n")
    assert frame.index.tolist() == ["s1"]
    assert frame.columns.tolist() == ["age"]
    assert notes == (f"first column {header!r} is read as the sample ids",)


def test_a_second_id_column_keeps_its_name(tmp_path):
    frame, _ = read(tmp_path, "sample_id\tsample_name\tage\ns1\t1.s1\t3\n")
    assert frame.columns.tolist() == ["sample_name", "age"]
    assert frame.loc["s1", "sample_name"] == "1.s1"


@pytest.mark.parametrize("header", ["sample-id", "sample_id"])
def test_types_line_is_no_sample_and_changes_no_text(tmp_path, header):
    text = f"{header}\tage\tcode\n#q2:types\tnumeric\tcategorical\ns1\t3.50\t007\n"
    frame, _ = read(tmp_path, text)
    assert frame.index.tolist() == ["s1"]
    assert frame.loc["s1"].tolist() == ["3.50", "007"]


def test_missing_line_keeps_our_words(tmp_path):
    text = "id\tage\n#q2:missing\tINSDC:missing\ns1\tnot collected\ns2\t4\n"
    frame, notes = read(tmp_path, text)
    assert frame["age"].tolist() == [None, "4"]
    assert notes == ("column 'age': read as missing: 'not collected' 1",)


def test_byte_order_mark_crlf_quotes_and_empty_lines(tmp_path):
    text = '\ufeffsample-id\tage\tnote\t\r\n"s1"\t3\t"two\twords ""here"""\r\ns2\t4\r\n\r\n\t\t\r\n'
    frame, notes = read(tmp_path, text)
    assert frame.index.tolist() == ["s1", "s2"]
    assert frame["age"].tolist() == ["3", "4"]
    assert frame["note"].tolist() == ['two\twords "here"', None]
    assert notes == ()


def test_comments_before_the_header_are_passed_over_and_below_it_said(tmp_path):
    frame, notes = read(tmp_path, "# exported on Monday\n# by\tme\nsample-id\tage\ns1\t3\n#s2\t4\n")
    assert frame.index.tolist() == ["s1"]
    assert notes == ("lines that begin with # were skipped: 1 (#s2)",)


@pytest.mark.parametrize(
    "word",
    [
        "not collected",
        "Not Applicable",
        "not provided",
        "missing",
        "Missing: Not provided",
        "missing: control sample",
        "restricted access",
        "LabControl test",
        "nan",
        "NaN",
        "NA",
        "n/a",
        "#N/A",
        "<NA>",
        "  na  ",
    ],
)
def test_words_for_missing(tmp_path, word):
    frame, notes = read(tmp_path, f"id\tage\tsite\ns1\t3\tgut\ns2\t{word}\t{word}\ns3\t\tgut\n")
    assert frame["age"].tolist() == ["3", None, None]
    assert frame["site"].tolist() == ["gut", None, "gut"]
    said = repr(word.strip())
    assert notes == (f"column 'age': read as missing: {said} 1", f"column 'site': read as missing: {said} 1")


@pytest.mark.parametrize("word", ["unknown", "none", "None", "null", "other", "no", "-", "missing tooth", "0", "nano"])
def test_words_that_can_be_answers_stay(tmp_path, word):
    frame, notes = read(tmp_path, f"id\tsite\ns1\t{word}\n")
    assert frame["site"].tolist() == [word]
    assert notes == ()


def test_a_column_of_missing_cells_only(tmp_path):
    path = write(tmp_path, "id\tage\tempty\ns1\tNA\t\ns2\tNA\t\n")
    frame, notes = read_metadata(path)
    assert frame["age"].tolist() == [None, None]
    assert frame["empty"].tolist() == [None, None]
    assert notes == ("column 'age': read as missing: 'NA' 2",)
    assert np.isnan(numeric_column(frame, "empty", source=path)).all()


# Files that are no metadata.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "an empty file"),
        ("\n\n  \n", "an empty file"),
        ("sample-id,age\ns1,3\n", "comma-separated"),
        ('"sample-id","age"\n"s1","3"\n', "comma-separated"),
        ("sample-id,age,note\ns1,3,a\tb\n", "one column only"),
        ("sample-id\ns1\n", "without any tab"),
        ("# only\ta comment\n", "only comments"),
        ("sample-id\tage\n", "at least one ID"),
        ("sample-id\tage\ns1\t1\ns2\t2\ns1\t3\n", "'s1'"),
        ("sample_id\tage\tage\ns1\t1\t2\n", "'age'"),
        ("sample_id\tsample_name\tsample_name\ns1\t1\t2\n", "sample_name"),
        ("sample_id\tsample_id\ns1\t1\n", "'sample_id'"),
        ("sample-id\tage\t\tsite\ns1\t1\t2\t3\n", "without a name"),
        ("sample-id\tage\ns1\t1\t2\n", "'s1' has 3 cells"),
        ("sample-id\tage\n\t17\n", "no sample id (17)"),
        ('sample-id\tage\ns1\t"3\ns2\t4\n', "quote"),
        ("#q2:types\tnumeric\nsample-id\tage\ns1\t3\n", "#q2:types"),
        ("sample-id\tage\n#q2:types\tnumber\ns1\t3\n", "'number'"),
        ('{"rows": []}', "JSON"),
        ("(a,b);", "newick"),
        (">a\nACGT\n", "FASTA"),
        ("<html></html>", "HTML"),
    ],
)
def test_faulty_files(tmp_path, text, words):
    message = refused(tmp_path, text)
    assert words in message
    assert len(message) < 600 + len(str(tmp_path))


def test_a_workbook_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "metadata.tsv", "w") as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        archive.writestr("xl/workbook.xml", "<workbook/>")
    message = fault(read_metadata, tmp_path / "metadata.tsv")
    assert "Excel" in message
    assert "tab-separated" in message


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_other_encodings_are_refused(tmp_path, encoding):
    path = write(tmp_path, "sample-id\tsite\ns1\tcafé\n", encoding)
    assert "UTF-8" in fault(read_metadata, path)


def test_absent_file_and_directory(tmp_path):
    assert "No such file" in fault(read_metadata, tmp_path / "metadata.tsv")
    (tmp_path / "metadata.tsv").mkdir()
    assert "a directory" in fault(read_metadata, tmp_path / "metadata.tsv")


# Columns.


def test_numeric_column(tmp_path):
    path = write(tmp_path, "id\tage\na\t1\nb\t-2.5\nc\t1e3\nd\t.5\ne\t+7.\nf\tNot collected\ng\t\n")
    frame, _ = read_metadata(path)
    column = numeric_column(frame, "age", source=path)
    assert column.dtype == np.float64
    assert column.index.tolist() == list("abcdefg")
    assert column[:5].tolist() == [1.0, -2.5, 1000.0, 0.5, 7.0]
    assert column[5:].isna().all()


@pytest.mark.parametrize("cell", ["gut", "inf", "-Infinity", "1e999", "1_000", "1,5", "12 days", "unknown", "٣"])
def test_a_cell_that_is_no_number_is_shown_with_its_sample(tmp_path, cell):
    path = write(tmp_path, f"id\tage\n007\t1\ns2\t{cell}\n")
    message = fault(numeric_column, read_metadata(path)[0], "age", source=path)
    assert f"{cell!r} (sample s2)" in message
    assert "007" not in message
    assert "--classifier" in message


def test_at_most_five_offending_values_are_shown(tmp_path):
    rows = "".join(f"s{i}\tclass{i % 8}\n" for i in range(24))
    path = write(tmp_path, f"id\tsite\n{rows}")
    message = fault(numeric_column, read_metadata(path)[0], "site", source=path)
    assert "'class4' (sample s4), ... (3 more values)" in message
    assert "class5" not in message


def test_text_column(tmp_path):
    path = write(tmp_path, "id\tsite\ns1\t007\ns2\tn/a\n")
    column = text_column(read_metadata(path)[0], "site", source=path)
    assert column.tolist() == ["007", None]
    assert column.index.tolist() == ["s1", "s2"]


@pytest.mark.parametrize("column_of", [numeric_column, text_column])
def test_an_unknown_column_shows_the_close_ones_first(tmp_path, column_of):
    path = write(tmp_path, "id\tsite\tDay_Of_Life\tsex\ns1\ta\t1\tf\n")
    message = fault(column_of, read_metadata(path)[0], "day_of_live", source=path)
    assert "no column 'day_of_live': did you mean 'Day_Of_Life'? other columns: 'site', 'sex'" in message
    message = fault(column_of, read_metadata(path)[0], "zzz", source=path)
    assert "no column 'zzz': its columns: 'site', 'Day_Of_Life', 'sex'" in message


@needs_data
@pytest.mark.parametrize(
    ("name", "samples", "number", "label", "classes"),
    [
        ("ibd", 470, "age", "surgery_and_ibd", 3),
        ("ecam", 741, "day_of_life", "mom_child", 2),
        ("pmi", 1731, "add_0c", "facility", 3),
        ("moving-pictures", 34, "DaysSinceExperimentStart", "BodySite", 4),
    ],
)
def test_public_metadata(name, samples, number, label, classes):
    path = Path(str(DATA)) / name / "metadata.tsv"
    frame, notes = read_metadata(path)
    assert len(frame) == samples
    assert "first column 'sample_id' is read as the sample ids" in notes
    assert numeric_column(frame, number, source=path).notna().sum() > 0.7 * samples
    assert text_column(frame, label, source=path).nunique() == classes
    assert fault(numeric_column, frame, label, source=path).count("(sample ") == classes


@needs_data
def test_public_words_for_missing():
    path = Path(str(DATA)) / "ibd" / "metadata.tsv"
    frame, notes = read_metadata(path)
    assert "column 'weeks': read as missing: 'Missing: Not provided' 284" in notes
    assert frame["weeks"].isna().sum() == 284
    frame, notes = read_metadata(Path(str(DATA)) / "pmi" / "metadata.tsv")
    assert "column 'body_site': read as missing: 'not applicable' 6" in notes
    assert (frame["days_of_decomposition"] == "unknown").sum() > 100
