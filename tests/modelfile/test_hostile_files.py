"""Input that is no model file at all: fast, a clear message, never a traceback."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshes import MeshError, resolve
from meshes.yamltree import MAX_CHARACTERS, MAX_DEPTH
from planner.modelfile import ModelErrors, load_file, load_model
from planner.modelfile.diagnostics import MAX_DIAGNOSTICS

GOOD = Path(__file__).parent / "good"
GRAPH = (GOOD / "design.yaml").read_text(encoding="utf-8")


def codes(text: str) -> list[str]:
    with pytest.raises(ModelErrors) as error:
        load_model(text, "model.yaml")
    return [d.code for d in error.value.diagnostics]


def file_codes(path: Path, data: bytes) -> list[str]:
    """Codes for a file's content, read as a model and, which must agree, as a mesh."""
    path.write_bytes(data)
    with pytest.raises(ModelErrors) as error:
        load_file(path)
    with pytest.raises(MeshError) as mesh_error:
        resolve(str(path))
    found = [d.code for d in error.value.diagnostics]
    assert found == [mesh_error.value.code]
    return found


def test_fifty_megabytes(tmp_path: Path) -> None:
    start = time.perf_counter()
    assert file_codes(tmp_path / "m.yaml", b"a: 1\n" * 10_000_000) == ["too-large"]
    assert time.perf_counter() - start < 2.0  # writing it included


def test_largest_file_that_is_read() -> None:
    start = time.perf_counter()
    line = "  - x = gather(embed, tokens)\n"
    head = 'graph:\n  inputs: {tokens: "i32[8]"}\n  params: {embed: "[8, 8]"}\n  ops:\n'
    assert "too-large" in codes(head + line * ((MAX_CHARACTERS - 200) // len(line)))
    assert time.perf_counter() - start < 10.0
    assert codes("#" * (MAX_CHARACTERS + 1)) == ["too-large"]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty"),
        (b"\n\n# comment\n", "empty"),
        (b"\xff\xfe\x00a", "not-text"),
        (bytes(range(256)) * 100, "not-text"),
        ("name: é\n".encode("latin-1"), "not-text"),
        (b"\x00" * 1000, "not-text"),
        (b"a: *a\n", "alias"),
        (b"a: &a [*a]\n", "alias"),
        (b"\x89PNG\r\n\x1a\n", "not-text"),
        (b"%YAML 3.0\n---\na: 1\n", "yaml-syntax"),
        (b"[" * 100_000, "too-deep"),
        (b"- " * 100_000, "too-deep"),
        (b"{a: " * 100_000, "too-deep"),
        (b"? " * 100_000, "bad-key"),
    ],
)
def test_no_yaml(tmp_path: Path, data: bytes, code: str) -> None:
    start = time.perf_counter()
    assert file_codes(tmp_path / "m.yaml", data) == [code]
    assert time.perf_counter() - start < 5.0


def test_place_of_the_first_bad_byte(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_bytes("a: ä\nb: ü".encode() + b"\xff")
    with pytest.raises(ModelErrors) as error:
        load_file(path)
    (d,) = error.value.diagnostics
    assert (d.line, d.column, d.code) == (2, 5, "not-text")


def test_billion_laughs() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for i in range(1, 12):
        lines.append(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]")
    start = time.perf_counter()
    assert codes("\n".join(lines)) == ["alias"]
    assert time.perf_counter() - start < 1.0


def test_depth_limit_is_where_it_says() -> None:
    assert codes("[" * (MAX_DEPTH + 1)) == ["too-deep"]
    assert codes("[" * MAX_DEPTH + "]" * MAX_DEPTH) == ["wrong-type"]


@pytest.mark.parametrize(
    "op",
    [
        "x = " + "(" * 300 + "y" + ")" * 300,
        "x = " + "-" * 3000 + "y",
        "x = " + "y + " * 900 + "y",
        "x = " + "gelu(" * 150 + "y" + ")" * 150,
        "x = 9 ** 9 ** 9 ** 9",
        "x = 10 ** 300 ** 2",
        "x = ((2 ** 390) ** 390) ** 390",
        "x = " + "9" * 3500,
        "x = 1e999 * 0",
        "x = -1 ** 0.5 + 1j",
        "x = (-8) ** 0.5",
        "x = b'bytes'",
        "x = f'{y}'",
        "x = ...",
        "x = __import__('os').system('true')",
        "x = einsum(*y)",
        "x = einsum(**y)",
        "x, x.y = y",
        "x = y = z",
        "x += 1",
        "x = [1, 2",
        "import os",
        "x = 'a' 'b",
        "x = gather(embed,\\",
        "x = \U0001f600",
        "",
        " ",
        "=",
        "x = (y := 3)",
    ],
)
def test_odd_ops(op: str) -> None:
    text = GRAPH.replace("x = gather(embed, tokens)", "'" + op.replace("'", "''") + "'", 1)
    start = time.perf_counter()
    assert codes(text)
    assert time.perf_counter() - start < 2.0


def test_many_errors_end_early() -> None:
    text = GRAPH + "".join(f"  nothing_{i}: [data]\n" for i in range(5000))
    start = time.perf_counter()
    assert len(codes(text)) == MAX_DIAGNOSTICS
    assert time.perf_counter() - start < 5.0


TOKENS = st.sampled_from(
    [
        "[", "]", "{", "}", ":", ",", "-", "x", "B", "0", "-1", "1e9", "1e400", "~", '"', "'", "\n",
        "  ", "(", ")", "=", "**", "/", "|", "&a ", "*a", "!!int ", "null", "layers", "einsum",
        "\t", "é", "#", "%", "?", "ops", "[B, S]", "true", "999999999999999999999", "gelu(", "\x07",
    ]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutations_never_crash(data: st.DataObject) -> None:
    """Good files with pieces cut out and put in load, or fail with places inside the text."""
    name = data.draw(st.sampled_from(sorted(p.name for p in GOOD.glob("*.yaml"))))
    text = (GOOD / name).read_text(encoding="utf-8")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.integers(0, 6))
        text = text[:at] + data.draw(TOKENS) + text[at + cut :]
    try:
        load_model(text, "model.yaml")
    except ModelErrors as error:
        lines = text.split("\n")
        for d in error.diagnostics:
            if d.file == "model.yaml":
                assert 1 <= d.line <= len(lines) + 1
                assert 1 <= d.column <= len(d.source) + 1
