"""Files that people or other programs wrote are checked where they are read."""

import pytest

from nnunet_semiseg.files import read_json, read_table


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"settings": {"la', r"a\.json is cut off or not valid JSON \(.*line 1"),
        (b"", r"a\.json is cut off or not valid JSON \(.*line 1"),
        (b"[1]", r"a\.json has no keys, but must be a JSON object with settings, cases\. Write it again"),
        (b'{"settings": 1}', r"a\.json has no key 'cases'\. Write it again"),
        (b'{"settings": "\xe4"}', r"a\.json is not UTF-8 text \(byte 14"),
    ],
)
def test_json_names_the_file_and_what_is_missing(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "a.json", ("settings", "cases"), "Write it again")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", r"a\.csv has no column 'case'\. Write it again"),
        (b"name;score\n", r"a\.csv has no column 'case'"),
        (b"score\n1\n", r"a\.csv has no column 'case'"),
        ("case\nmüller\n".encode("latin-1"), r"a\.csv is not UTF-8 text \(byte 6"),
    ],
)
def test_table_names_the_file_and_what_is_missing(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / "a.csv", ("case",), "Write it again")


def test_table_of_a_spreadsheet(tmp_path):
    (tmp_path / "a.csv").write_bytes('case,note\r\nmüller,"two\r\nlines"\r\n'.encode("utf-8-sig"))
    assert read_table(tmp_path / "a.csv", ("case",)) == [{"case": "müller", "note": "two\nlines"}]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_columns_are_separated_by_commas_semicolons_or_tabs(tmp_path, separator):
    (tmp_path / "a.csv").write_text(separator.join(("case", "score")) + "\n" + separator.join(("a", "0.5")) + "\n")
    assert read_table(tmp_path / "a.csv", ("case", "score")) == [{"case": "a", "score": "0.5"}]
    # As people type them.
    (tmp_path / "a.csv").write_text(f"case{separator} score\na{separator} 0.5\n")
    assert read_table(tmp_path / "a.csv", ("case", "score")) == [{"case": "a", "score": "0.5"}]
