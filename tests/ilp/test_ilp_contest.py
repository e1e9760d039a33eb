"""Contest files from text to written solution: reading, refusing, pricing, interruption."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ilp_support import brute_force, random_problem

from planner.ilp import Problem, Usage
from planner.ilp.contest import as_problem, price, solve_file
from planner.ilp.contest_reader import FORBIDDEN, BadProblem, parse
from planner.ilp.partner import possible

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data" / "iopddl"
TOY: dict[str, Any] = {
    "problem": {
        "name": "toy",
        "nodes": {
            "intervals": [[0, 4], [1, 5], [3, 9]],
            "costs": [[15], [55, 65], [25, 45, 35]],
            "usages": [[10], [25, 25], [15, 20, 15]],
        },
        "edges": {"nodes": [[0, 1], [0, 2]], "costs": [[30, 40], [50, 10, 40]]},
        "usage_limit": 50,
    }
}


def toy(**changes: Any) -> dict[str, Any]:
    """The toy with entries replaced: keys are paths such as nodes__costs."""
    problem: dict[str, Any] = json.loads(json.dumps(TOY))
    for path, value in changes.items():
        *parents, last = path.split("__")
        at = problem["problem"]
        for key in parents:
            at = at[key]
        at[last] = value
    return problem


def save(folder: Path, content: Any, name: str = "p.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def as_contest(problem: Problem) -> dict[str, Any]:
    """A problem with integers and one usage per node in the contest's format."""

    def integers(values: np.ndarray) -> list[int]:
        return [FORBIDDEN if v == np.inf else int(v) for v in np.ravel(values)]

    usage = {u.node: u for u in problem.usages}
    none = [Usage(n, 0, 0, np.zeros(len(c))) for n, c in enumerate(problem.costs)]
    used = [usage.get(n, none[n]) for n in range(problem.size)]
    return {
        "problem": {
            "nodes": {
                "intervals": [[u.start, u.stop] for u in used],
                "costs": [integers(c) for c in problem.costs],
                "usages": [integers(u.amount) for u in used],
            },
            "edges": {
                "nodes": [[e.i, e.j] for e in problem.edges if e.i != e.j],
                "costs": [integers(e.cost) for e in problem.edges if e.i != e.j],
            },
            "usage_limit": int(problem.limit or 0),
        }
    }


# ---- reading --------------------------------------------------------------------------------


def test_gzip_is_recognised_by_content(tmp_path: Path) -> None:
    path = tmp_path / "no-suffix"
    path.write_bytes(gzip.compress(json.dumps(TOY).encode()))
    assert solve_file(path)["cost"] == solve_file(save(tmp_path, TOY))["cost"]


def test_equal_arrays_are_stored_once_and_floats_that_are_whole_are_integers() -> None:
    usages = [[1], [7, 7], [7, 7, 7]]
    text = json.dumps(toy(nodes__costs=[[1e3], [7, 7], [7, 7, 7]], nodes__usages=usages))
    raw = parse(text.encode(), "text")
    assert raw.costs[1] is raw.usages[1]
    assert raw.costs[0].tolist() == [1000]


BAD: dict[str, tuple[Any, str]] = {
    "negative size": (toy(nodes__usages=[[10], [25, -1], [15, 20, 15]]), "negative"),
    "negative cost": (toy(nodes__costs=[[-1], [55, 65], [25, 45, 35]]), "negative"),
    "negative edge cost": (
        toy(edges__costs=[[30, 40], [50, -10, 40]]),
        r"problem.edges.costs\[1\]",
    ),
    "ragged matrix": (toy(edges__costs=[[30, 40], [50, 10]]), "expected 1 × 3"),
    "usages of another length": (toy(nodes__usages=[[10], [25], [15, 20, 15]]), "has 1 entries"),
    "missing usages": (toy(nodes__usages=[[10], [25, 25]]), "has 2 entries"),
    "missing interval": (toy(nodes__intervals=[[0, 4], [1, 5]]), "has 2 entries"),
    "interval of three": (toy(nodes__intervals=[[0, 4, 5], [1, 5], [3, 9]]), "expected 2"),
    "backward interval": (toy(nodes__intervals=[[4, 0], [1, 5], [3, 9]]), "start must not"),
    "no strategy": (toy(nodes__costs=[[], [55, 65], [25, 45, 35]]), "is empty"),
    "node out of range": (toy(edges__nodes=[[0, 1], [0, 3]]), "nodes are 0 … 2"),
    "negative node": (toy(edges__nodes=[[0, 1], [-1, 2]]), "nodes are 0 … 2"),
    "edge without costs": (toy(edges__nodes=[[0, 1]]), "has 1 entries"),
    "fraction": (toy(nodes__costs=[[1.5], [55, 65], [25, 45, 35]]), "expected an integer"),
    "text for a number": (toy(nodes__costs=[["1"], [55, 65], [25, 45, 35]]), "array of integers"),
    "true": (toy(nodes__costs=[[True], [55, 65], [25, 45, 35]]), "expected an integer"),
    "huge": (toy(nodes__costs=[[2**64], [55, 65], [25, 45, 35]]), "64 bits"),
    "negative limit": (toy(usage_limit=-1), "usage_limit"),
    "limit is text": (toy(usage_limit="50"), "usage_limit"),
    "not a problem": ({"a": 1}, "problem is missing"),
    "a list": ([1, 2], "problem is missing"),
    "no edges": ({"problem": {"nodes": {}, "usage_limit": 1}}, "edges is missing"),
    "NaN": (json.dumps(TOY).replace("[15]", "[NaN]"), "nan"),
    "Infinity": (json.dumps(TOY).replace("[15]", "[Infinity]"), "inf"),
    "empty": ("", "the end of the file"),
    "text": ("hello", "expected"),
    "trailing": (json.dumps(TOY) + "]", "after the end"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    content, words = BAD[name]
    out = tmp_path / "out.json"
    with pytest.raises(BadProblem, match=f"(?i){words}"):
        solve_file(save(tmp_path, content), out=out)
    assert [p.name for p in tmp_path.iterdir()] == ["p.json"]


def test_every_truncation_is_refused() -> None:
    text = json.dumps(TOY).encode()
    for length in range(len(text)):
        with pytest.raises(BadProblem):
            parse(text[:length], "text")


def test_damaged_gzip_and_missing_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.json.gz"
    path.write_bytes(gzip.compress(json.dumps(TOY).encode())[:-20])
    with pytest.raises(BadProblem, match="gzip"):
        solve_file(path)
    with pytest.raises(BadProblem, match="cannot be read"):
        solve_file(tmp_path / "absent.json")


# ---- solving --------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 12))
def test_file_is_brute_force(tmp_path_factory: pytest.TempPathFactory, seed: int, n: int) -> None:
    """Up to 12 nodes with binding memory and forbidden pairs, priced in integers."""
    rng = np.random.default_rng(seed)
    drawn = random_problem(rng, nodes=n, strategies=3, edges=2 * n, tightness=0.2)
    text = json.dumps(as_contest(drawn))
    problem = as_problem(parse(text.encode(), "text"))
    best = brute_force(problem)
    result = solve_file(save(tmp_path_factory.mktemp("p"), text))
    if best is None:
        assert (result["status"], result["cost"]) == ("infeasible", None)
        return
    assert (result["status"], result["cost"]) == ("optimal", best.cost)
    assert price(parse(text.encode(), "text"), result["solution"])[0] == best.cost


def test_infeasible_limit_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = solve_file(save(tmp_path, toy(usage_limit=39)), out=out)
    assert (result["status"], result["solution"]) == ("infeasible", None)
    assert not out.exists()


def test_output_is_complete_and_replaces_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    out.write_text("old")
    result = solve_file(save(tmp_path, TOY), out=out)
    written = json.loads(out.read_text())
    assert set(written) == {"cost", "solution", "status", "bound", "seconds"}
    assert written["solution"] == result["solution"]
    # Node 2 must not use 20 beside 10 + 25: 45 + 10 is out, 25 + 50 and 35 + 40 are left.
    assert written["cost"] == written["bound"] == 15 + 55 + 30 + 75
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", "p.json"]


def test_price_refuses_what_is_no_choice() -> None:
    raw = parse(json.dumps(TOY).encode(), "text")
    with pytest.raises(ValueError, match="expected 3"):
        price(raw, [0, 0])
    with pytest.raises(ValueError, match="no strategy"):
        price(raw, [0, 2, 0])


def hard_problem() -> dict[str, Any]:
    """A grid with random costs and tight memory: minutes for branch and bound."""
    rng = np.random.default_rng(1)
    side, strategies = 25, 8
    count = side * side
    grid = np.arange(count).reshape(side, side)
    edges = [*zip(grid[:, :-1].ravel(), grid[:, 1:].ravel(), strict=True)]
    edges += [*zip(grid[:-1].ravel(), grid[1:].ravel(), strict=True)]
    usages = rng.integers(1, 100, (count, strategies))
    return {
        "problem": {
            "nodes": {
                "intervals": [[n // 5, n // 5 + 30] for n in range(count)],
                "costs": rng.integers(0, 1000, (count, strategies)).tolist(),
                "usages": usages.tolist(),
            },
            "edges": {
                "nodes": [[int(i), int(j)] for i, j in edges],
                "costs": rng.integers(0, 1000, (len(edges), strategies**2)).tolist(),
            },
            "usage_limit": int(usages.min(axis=1).mean() * 150 * 1.6),
        }
    }


def wait_for_partner(pid: int) -> None:
    """Until the process has a child; the test's watchdog ends it if it never has."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    while not children.read_text():
        time.sleep(0.05)


@pytest.mark.parametrize("backend", ["auto", "lns"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_writes_the_incumbent(tmp_path: Path, number: int, backend: str) -> None:
    """And leaves no process behind: "lns" has a partner by then."""
    path, out = save(tmp_path, hard_problem()), tmp_path / "out.json"
    program = (
        "import sys; from planner.ilp.contest import solve_file\n"
        "p = lambda cost, bound: print(cost, flush=True)\n"
        "r = solve_file(sys.argv[1], time_limit=600, backend=sys.argv[3], out=sys.argv[2],"
        " progress=p)\n"
        "sys.exit(0 if r['interrupted'] else 5)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path), str(out), backend], cwd=ROOT, text=True,
        start_new_session=True, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if float(line) < np.inf:
                break
        if backend == "lns" and possible():
            wait_for_partner(process.pid)
        process.send_signal(number)
        begin = time.monotonic()
        process.stdout.read()
        assert process.wait() == 0
    finally:
        watchdog.cancel()
        process.kill()
    assert time.monotonic() - begin < 30
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    written = json.loads(out.read_text())
    raw = parse(path.read_bytes(), "text")
    cost, peak = price(raw, written["solution"])
    assert written["cost"] == cost >= written["bound"]
    assert peak <= raw.usage_limit
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", "p.json"]


def test_a_time_limit_holds_and_says_so(tmp_path: Path) -> None:
    result = solve_file(save(tmp_path, hard_problem()), time_limit=5.0)
    assert result["seconds"] < 20  # the machine may be busy; unlimited it takes minutes
    assert result["status"] == "time_limit"
    assert result["cost"] is None or result["bound"] <= result["cost"]


# ---- the contest's own problems ---------------------------------------------------------------


def shared(letter: str) -> Path:
    path = SHARED / f"asplos-2025-iopddl-{letter}.json.gz"
    if not path.exists():
        pytest.skip(f"{path.name} is not there")
    return path


def test_problem_g_is_proven() -> None:
    result = solve_file(shared("G"))
    assert (result["status"], result["cost"], result["bound"]) == ("optimal", 217_039, 217_039)


@pytest.mark.slow
def test_problem_a_is_proven() -> None:
    result = solve_file(shared("A"))
    assert (result["status"], result["cost"]) == ("optimal", 6_548_553_650)
