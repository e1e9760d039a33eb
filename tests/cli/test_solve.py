"""`plan solve`: the contest's format in, its contract out."""

import json

import pytest
from cli_support import plan

# Two nodes; the cheap pair is beyond the limit: 1 + 9 + 4 is the best that fits.
PROBLEM = {
    "problem": {
        "nodes": {
            "intervals": [[0, 2], [1, 3]],
            "costs": [[1, 5], [2, 9]],
            "usages": [[6, 2], [6, 2]],
        },
        "edges": {"nodes": [[0, 1]], "costs": [[0, 4, 8, 9]]},
        "usage_limit": 8,
    }
}


@pytest.fixture
def problem(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(PROBLEM))
    return path


@pytest.mark.parametrize("backend", ["auto", "highs", "cbc", "lns"])
def test_every_backend_finds_the_known_answer(problem, capsys, backend):
    ran = plan(capsys, "solve", problem, "--backend", backend, "--time-limit", "10s")
    result = json.loads(ran.out)
    assert ran.code == 0
    assert set(result) == {"cost", "solution", "status", "bound", "seconds"}
    assert (result["cost"], result["solution"]) == (14, [0, 1])
    assert result["bound"] <= 14


def test_a_file_holds_the_same_and_stdout_stays_empty(problem, capsys, tmp_path):
    ran = plan(capsys, "solve", problem, "-o", tmp_path / "s.json")
    assert (ran.code, ran.out) == (0, "")
    assert json.loads((tmp_path / "s.json").read_text())["solution"] == [0, 1]
    assert "cost 14" in ran.err
    assert plan(capsys, "solve", problem, "--quiet").err == ""


def test_infeasible_is_1(problem, capsys):
    problem.write_text(json.dumps(PROBLEM).replace('"usage_limit": 8', '"usage_limit": 3'))
    ran = plan(capsys, "solve", problem)
    assert ran.code == 1
    assert json.loads(ran.out)["status"] == "infeasible"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("[6, 2]", "[6]"), "usages"),
        (("[[0, 1]]", "[[0, 7]]"), "7"),
        (('"usage_limit": 8', '"usage_limit": -8'), "usage_limit"),
        (('"costs": [[1, 5]', '"costs": [["a", 5]'), "costs"),
    ],
)
def test_a_broken_problem_is_2(problem, capsys, change, said):
    problem.write_text(json.dumps(PROBLEM).replace(*change, 1))
    ran = plan(capsys, "solve", problem)
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err


def test_an_unknown_backend_is_2(problem, capsys):
    assert plan(capsys, "solve", problem, "--backend", "magic").code == 2
