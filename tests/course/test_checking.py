"""`check` shows every check, `hint` one after another, `solution` once they were read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nemotron_lite.course import CheckResult, check, hint, own, progress_store, solution
from nemotron_lite.course.checking import has_passed, hints_read
from nemotron_lite.course.exercises import ExerciseError
from tests.course.conftest import Shown
from tests.course.sample_exercises import FADE, forget, use

RIGHT = """99.fade: right. 3 of 3 checks, 6 of 6 points.
  ✓ by hand
  ✓ many values
  ✓ gradients"""


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    use(monkeypatch)
    yield
    forget()


def test_check_shows_its_message_once(shown: Callable[..., Shown]) -> None:
    seen = shown(check, "99.fade", FADE.build())
    assert seen.plain == RIGHT
    assert "99.fade" in seen.html
    assert isinstance(seen.result, CheckResult)
    assert shown(seen.result._ipython_display_).bundles == []


def test_a_kept_result_can_be_shown_in_a_later_cell(shown: Callable[..., Shown]) -> None:
    result = replace(shown(check, "99.fade", FADE.build()).result, shown_in_cell=-1)
    assert shown(result._ipython_display_).plain == result.message


def test_an_unknown_exercise_lists_those_of_its_chapter() -> None:
    with pytest.raises(
        ExerciseError, match=r"no exercise '99\.face'; choose one of \['99\.fade', '99\.gate'"
    ):
        check("99.face", abs)
    with pytest.raises(ExerciseError, match="Chapter '77' has no exercises"):
        check("77.fade", abs)
    with pytest.raises(ExerciseError, match="Chapter 'fade' has no exercises"):
        hint("fade")


def test_hints_come_one_after_another(shown: Callable[..., Shown]) -> None:
    messages = [shown(hint, "99.fade").plain for _ in range(4)]
    assert messages[0] == "Hint 1 of 3 · 99.fade\nThink of A = 0."
    assert "Use `torch.exp`." in messages[1]
    assert messages[2] == messages[3]
    assert "the last one" in messages[2]
    assert ["solution(" in message for message in messages] == [False, False, True, True]
    assert "Hint 2 of 3" in shown(hint, "99.fade", 2).plain
    with pytest.raises(ValueError, match="n is 4"):
        hint("99.fade", 4)


def test_a_wrong_answer_lists_every_check_and_explains_the_first(
    shown: Callable[..., Shown],
) -> None:
    answer = FADE.build("def fade(dt, A):\n    return torch.exp(dt * A.detach())\n")
    lines = shown(check, "99.fade", answer).plain.splitlines()
    assert lines[:4] == [
        "99.fade: not right yet. 2 of 3 checks, 3 of 6 points.",
        "  ✓ by hand",
        "  ✓ many values",
        "  ✗ gradients",
    ]
    assert lines[4].startswith("gradients: the gradient of A does not exist")
    assert lines[5] == 'Read hint("99.fade", 3) next.'


def test_hints_go_on_after_a_restart(shown: Callable[..., Shown], tmp_path: Path) -> None:
    (tmp_path / ".course").mkdir()
    shown(hint, "99.fade")
    forget()
    assert "Hint 2 of 3" in shown(hint, "99.fade").plain
    assert hints_read("99.fade") == {1, 2}


def test_the_solution_comes_after_three_hints(shown: Callable[..., Shown]) -> None:
    closed = shown(solution, "99.fade")
    assert "3 hints are left" in closed.plain
    assert "torch.exp" not in closed.plain + closed.html
    hint("99.fade", 3)
    hint("99.fade", 3)
    assert "2 hints are left" in shown(solution, "99.fade").plain
    hint("99.fade")
    assert 'One hint is left: hint("99.fade").' in shown(solution, "99.fade").plain
    hint("99.fade")
    (bundle,) = shown(solution, "99.fade").bundles
    assert bundle["text/plain"] == f"Solution · 99.fade\n{FADE.solution.strip()}"
    assert f"```python\n{FADE.solution.strip()}\n```" in bundle["text/markdown"]


def test_the_solution_comes_at_once_after_a_pass(shown: Callable[..., Shown]) -> None:
    check("99.fade", FADE.build())
    assert "torch.exp" in shown(solution, "99.fade").plain


def test_a_later_failure_does_not_undo_a_pass() -> None:
    check("99.fade", FADE.build())
    check("99.fade", FADE.build("def fade(dt, A):\n    return dt\n"))
    assert has_passed("99.fade")
    assert progress_store.get("checks/99.fade")["points"] == 6


def test_a_failure_is_kept_with_its_points_and_an_untouched_stub_is_not() -> None:
    check("99.fade", FADE.build(FADE.stub))
    assert progress_store.get("checks/99.fade") is None
    check("99.fade", FADE.build("def fade(dt, A):\n    return 1 + dt * A\n"))
    assert progress_store.get("checks/99.fade") == {"passed": False, "points": 1, "max_points": 6}
    assert not has_passed("99.fade")


def test_the_packages_answer_is_not_counted(shown: Callable[..., Shown]) -> None:
    answer = own("99.fade")
    seen = shown(check, "99.fade", answer)
    assert seen.plain == f"{RIGHT}\nThis is the package's answer, not yours: it is not counted."
    assert isinstance(seen.result, CheckResult)
    assert not has_passed("99.fade")
    assert progress_store.get("answers/99.fade.py") is None
