"""Processes that write one file at once: none sees or deletes the unfinished file of another."""

import os

import pytest

from lightning_zipit._common.files import replacing


def test_writers_with_one_process_id_do_not_share_an_unfinished_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as in containers
    output = tmp_path / "rows.csv"
    with replacing(output) as first, pytest.raises(KeyError), replacing(output) as second:
        first.write_text("first")
        second.write_text("second")
        raise KeyError
    assert output.read_text() == "first" and list(tmp_path.iterdir()) == [output]
