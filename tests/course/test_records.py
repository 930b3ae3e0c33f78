"""Records are found in the checkout, and a wrong name is answered with those that exist."""

from __future__ import annotations

import pytest

from nemotron_lite.course.records import record


def test_a_record_has_its_machine_and_command() -> None:
    found = record("ssd_operator")
    assert {"machine", "versions", "command"} <= set(found)


def test_an_unknown_record_is_named_with_the_known_ones() -> None:
    with pytest.raises(FileNotFoundError, match=r"'none'.*ssd_operator"):
        record("none")
