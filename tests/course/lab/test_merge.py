"""A learner's notebook and the new version of its chapter are merged cell by cell.

Notebooks are written here as short lists: `nb("a=1", "x?=own")` is a code cell with the id "a" and
the source "1", and a markdown cell with the id "x".
"""

from __future__ import annotations

import copy
from typing import Any

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron_lite.course.lab.merge import MergeError, changed_by_both, merge


def cell(written: str, **more: Any) -> dict[str, Any]:
    name, _, source = written.partition("=")
    kind = "markdown" if name.endswith("?") else "code"
    made = dict(cell_type=kind, id=name.rstrip("?"), metadata={}, source=source)
    if kind == "code":
        made |= dict(outputs=[], execution_count=None)
    return {**made, **more}


def nb(*cells: str | dict[str, Any], **metadata: Any) -> dict[str, Any]:
    made = [cell(c) if isinstance(c, str) else c for c in cells]
    return dict(cells=made, metadata=metadata, nbformat=4, nbformat_minor=5)


def written(notebook: dict[str, Any]) -> list[str]:
    """The cells in the same short form."""
    mark = {"markdown": "?", "code": ""}
    return [f"{c['id']}{mark[c['cell_type']]}={c['source']}" for c in notebook["cells"]]


def printed(text: str, count: int = 1) -> dict[str, Any]:
    output = dict(output_type="stream", name="stdout", text=text)
    return dict(outputs=[output], execution_count=count)


@pytest.mark.parametrize(
    ("base", "mine", "new", "expected"),
    [
        pytest.param("a=1 b=2", "a=1 b=2", "a=1 b=3", "a=1 b=3", id="unchanged follows"),
        pytest.param("a=1 b=2", "a=1 b=9", "a=1 b=2", "a=1 b=9", id="an answer stays"),
        pytest.param("a=1 b=2", "a=1 b=9", "a=5 b=2", "a=5 b=9", id="both, in different cells"),
        pytest.param("a=1 b=2", "a=1 b=3", "a=1 b=3", "a=1 b=3", id="both alike"),
        pytest.param("a=1 b=2", "a=1", "a=1 b=3", "a=1", id="what the learner removed"),
        pytest.param("a=1 b=2", "a=1 b=2", "a=1", "a=1", id="what the chapter removed"),
        pytest.param("a=1 b=2 c=3", "a=1 b=9 c=3", "a=1 c=3", "a=1 b=9 c=3", id="an answer to it"),
        pytest.param("a=1 b=2", "a=1 b=2", "n=0 a=1 m=5 b=2", "n=0 a=1 m=5 b=2", id="new cells"),
        pytest.param("a=1 b=2", "a=1 x=7 b=2 y=8", "a=1 b=3", "a=1 x=7 b=3 y=8", id="own cells"),
        pytest.param("a=1 b=2", "x=7 a=1 b=2", "a=3 b=2", "x=7 a=3 b=2", id="own cell on top"),
        pytest.param("a=1 b=2", "x=7 a=1 b=2", "n=0 a=1 b=2", "n=0 x=7 a=1 b=2", id="both on top"),
        pytest.param("a=1 b=2", "a=1 x=7 y=8 b=2", "a=1 n=5 b=2", "a=1 x=7 y=8 n=5 b=2",
                     id="own cells stay directly below theirs"),
        pytest.param("a=1 b=2 c=3", "a=1 b=2 x=7 c=3", "a=1 c=3", "a=1 x=7 c=3",
                     id="own cell below a removed one"),
        pytest.param("a=1 b=2", "b=2 a=1", "a=1 b=3 n=4", "b=3 n=4 a=1", id="moved by the learner"),
        pytest.param("a=1 b=2 c=3", "a=1 x=7 b=2 c=3", "c=3 a=1 b=2", "c=3 a=1 x=7 b=2",
                     id="moved by the chapter"),
        pytest.param("", "a=1 x=7", "a=1 b=2", "a=1 x=7 b=2", id="unknown base"),
    ],
)  # fmt: skip
def test_what_becomes_of_cells(base: str, mine: str, new: str, expected: str) -> None:
    merged = merge(nb(*base.split()), nb(*mine.split()), nb(*new.split()))
    assert written(merged) == expected.split()
    assert changed_by_both(merged) == []


def test_a_cell_that_both_changed_keeps_the_learners_text_and_shows_the_new_one() -> None:
    merged = merge(nb("a=1", "b=2"), nb("a=mine", "b=2"), nb("a=theirs", "b=2"))
    assert [c["id"] for c in merged["cells"]] == ["a", "a-new", "b"]
    assert merged["cells"][0]["source"] == "mine"
    note = merged["cells"][1]
    assert note["cell_type"] == "markdown"
    assert note["source"].startswith("<details>")
    assert "\n\n```python\ntheirs\n```\n\n" in note["source"]
    assert changed_by_both(merged) == ["a"]
    nbformat.validate(nbformat.from_dict(merged))


def test_without_a_base_a_different_text_is_kept_and_the_new_one_shown() -> None:
    merged = merge(nb(), nb("a=mine", "b=2"), nb("a=theirs", "b=2"))
    assert [c["id"] for c in merged["cells"]] == ["a", "a-new", "b"]
    assert merged["cells"][0]["source"] == "mine"


def test_new_markdown_is_shown_as_text_and_backticks_in_code_stay_inside() -> None:
    merged = merge(
        nb("t?=one", "c=1"), nb("t?=mine", "c=mine"), nb("t?=**two**", 'c="""\n```\n"""')
    )
    text, code = merged["cells"][1]["source"], merged["cells"][3]["source"]
    assert "\n\n**two**\n\n" in text
    assert '\n\n````python\n"""\n```\n"""\n````\n\n' in code


CONFLICT = nb("a=1"), nb("a=mine"), nb("a=theirs")


def test_a_note_stays_while_nothing_changes_and_goes_when_the_texts_agree() -> None:
    merged = merge(*CONFLICT)
    again = merge(CONFLICT[2], merged, nb("a=theirs", "b=2"))
    assert [c["id"] for c in again["cells"]] == ["a", "a-new", "b"]
    agreed = merge(CONFLICT[2], merged, nb("a=mine"))
    assert written(agreed) == ["a=mine"]


def test_a_note_shows_the_newest_text_and_stays_away_once_deleted() -> None:
    merged = merge(*CONFLICT)
    newest = merge(CONFLICT[2], merged, nb("a=newest"))
    assert [c["id"] for c in newest["cells"]] == ["a", "a-new"]
    assert "newest" in newest["cells"][1]["source"]
    assert "theirs" not in newest["cells"][1]["source"]
    deleted = nb("a=mine")
    assert written(merge(CONFLICT[2], deleted, nb("a=theirs", "b=2"))) == ["a=mine", "b=2"]


def test_a_note_whose_cell_left_the_chapter_is_the_learners() -> None:
    merged = merge(*CONFLICT)
    left = merge(CONFLICT[2], merged, nb("b=2"))
    assert [c["id"] for c in left["cells"]] == ["b", "a", "a-new"]


def test_a_copy_of_a_note_is_the_learners() -> None:
    merged = merge(*CONFLICT)
    pasted = {**merged["cells"][1], "id": "pasted"}
    merged["cells"].append(pasted)
    assert merge(CONFLICT[2], merged, nb("a=mine"))["cells"][1] == pasted


def test_an_output_stays_while_its_source_stays() -> None:
    base = nb(cell("a=1", **printed("base")), cell("b=2", **printed("base", 2)))
    mine = nb(cell("a=1", **printed("mine", 7)), cell("b=2", **printed("mine", 8)))
    new = nb(cell("a=1", **printed("new")), cell("b=3", **printed("new", 2)))
    merged = merge(base, mine, new)["cells"]
    assert (merged[0]["outputs"][0]["text"], merged[0]["execution_count"]) == ("mine", 7)
    assert (merged[1]["outputs"][0]["text"], merged[1]["execution_count"]) == ("new", 2)


def test_an_output_that_the_learner_never_made_follows() -> None:
    base = nb(cell("a=1", **printed("base")))
    new = nb(cell("a=1", **printed("new")))
    assert merge(base, base, new)["cells"][0]["outputs"][0]["text"] == "new"


def test_an_answer_keeps_its_output_beside_a_new_text() -> None:
    mine = nb(cell("a=mine", **printed("passed", 4)))
    merged = merge(nb("a=1"), mine, nb("a=theirs"))
    assert merged["cells"][0] == mine["cells"][0]


def test_a_cell_that_becomes_text_loses_its_output() -> None:
    mine = nb(cell("a=1", **printed("mine")))
    (merged,) = merge(nb("a=1"), mine, nb("a?=1"))["cells"]
    assert merged == cell("a?=1")


def test_metadata_follow_key_by_key() -> None:
    base = nb(cell("a=1", metadata=dict(tags=["x"], jupyter=dict(source_hidden=True), old=1)))
    mine = nb(cell("a=1", metadata=dict(tags=["x"], jupyter=dict(hidden=False), own=1, old=1)))
    new = nb(cell("a=1", metadata=dict(tags=["y"], jupyter=dict(source_hidden=True), fresh=1)))
    (merged,) = merge(base, mine, new)["cells"]
    assert merged["metadata"] == dict(tags=["y"], jupyter=dict(hidden=False), own=1, fresh=1)


def test_the_notebooks_own_metadata_follow_too() -> None:
    merged = merge(
        nb("a=1", kernelspec=dict(name="k"), nl="one"),
        nb("a=1", kernelspec=dict(name="mine"), nl="one"),
        nb("a=1", kernelspec=dict(name="k"), nl="two"),
    )
    assert merged["metadata"] == dict(kernelspec=dict(name="mine"), nl="two")


@pytest.mark.parametrize("lines", [["x = 1\n", "y = 2"], "x = 1\ny = 2"])
def test_a_source_may_be_lines(lines: Any) -> None:
    base, mine = nb(cell("a=", source="x = 1\ny = 2")), nb(cell("a=", source=lines))
    assert written(merge(base, mine, nb("a=new"))) == ["a=new"]


def test_a_cell_without_an_id_is_refused() -> None:
    lost = cell("a=1")
    del lost["id"]
    with pytest.raises(MergeError, match="cell 1 has no id"):
        merge(nb("a=1"), nb("b=2", lost), nb("a=1"))
    with pytest.raises(MergeError, match="two cells have the id 'a'"):
        merge(nb("a=1"), nb("a=1", "a=2"), nb("a=1"))


def test_an_id_of_full_length_gets_a_valid_note() -> None:
    name = "n" * 64
    merged = merge(nb(f"{name}=1"), nb(f"{name}=mine"), nb(f"{name}=theirs"))
    nbformat.validate(nbformat.from_dict(merged))
    assert changed_by_both(merged) == [name]


# Any three notebooks over a few ids: shared cells in any order, with three texts, two outputs.
_CELL = st.builds(
    lambda source, output: dict(source=source, **printed(output)),
    st.sampled_from("123"),
    st.sampled_from("pq"),
)


def _notebooks(ids: str) -> st.SearchStrategy[dict[str, Any]]:
    names = st.lists(st.sampled_from(ids), unique=True)
    return names.flatmap(
        lambda chosen: st.lists(_CELL, min_size=len(chosen), max_size=len(chosen)).map(
            lambda cells: nb(*(cell(f"{n}=", **c) for n, c in zip(chosen, cells, strict=True)))
        )
    )


@given(base=_notebooks("abcde"), mine=_notebooks("abcdexy"), new=_notebooks("abcdefg"))
def test_merging_loses_nothing_of_the_learners_and_twice_is_once(
    base: dict[str, Any], mine: dict[str, Any], new: dict[str, Any]
) -> None:
    before = copy.deepcopy((base, mine, new))
    merged = merge(base, mine, new)
    assert (base, mine, new) == before
    assert merge(base, merged, new) == merged  # an update that was interrupted
    assert merge(new, merged, new) == merged  # the next start
    ids = [c["id"] for c in merged["cells"]]
    assert len(ids) == len(set(ids))
    sources = {c["id"]: c["source"] for c in base["cells"]}
    for own in mine["cells"]:
        if own["id"] not in sources or own["source"] != sources[own["id"]]:
            (found,) = [c for c in merged["cells"] if c["id"] == own["id"]]
            assert found["source"] == own["source"]
    nbformat.validate(nbformat.from_dict(merged))


@given(base=_notebooks("abcde"), new=_notebooks("abcdefg"))
def test_an_untouched_copy_becomes_the_new_chapter(
    base: dict[str, Any], new: dict[str, Any]
) -> None:
    assert merge(base, base, new)["cells"] == new["cells"]
