"""The pages in docs/: their code runs, in order, and they name every op."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


def blocks(page: Path) -> str:
    """The page's Python, every block on the lines that it has in the page, so that an error names them."""
    lines, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        inside = not inside and line == "```python" if line.startswith("```") else inside
        lines.append(line if inside and not line.startswith("```") else "")
    return "\n".join(lines)


def pages():
    """The pages that have Python; what edits the default model takes minutes and needs its file."""
    for page in PAGES:
        if blocks(page).strip():
            yield pytest.param(page, id=page.stem, marks=[pytest.mark.slow] * ("from_pretrained" in blocks(page)))


@pytest.mark.parametrize("page", list(pages()))
def test_the_code_of_a_page_runs(page, monkeypatch, tmp_path):
    """The files that a page names are facts that are shipped, sixteen to edit and others to learn from."""
    facts = (ROOT / "fastedit/data/demo.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "edits.jsonl").write_text("".join(facts[:16]), encoding="utf-8")
    (tmp_path / "records.jsonl").write_text("".join(facts[16:]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTEDIT_BACKEND", raising=False)
    code = blocks(page)
    saved = re.findall(r'\.save\("(.+?)"\)', code)
    assert saved or "assert " in code, "the page shows no result that could be wrong"
    exec(compile(code, str(page), "exec"), {})
    assert [name for name in saved if not Path(name).is_file()] == []


def test_the_page_of_the_ops_calls_each_of_them():
    code = blocks(ROOT / "docs" / "ops.md")
    ops = [path.stem for path in (ROOT / "fastedit/ops").glob("[a-z]*.py")]
    assert ops
    for op in ops:
        assert re.search(rf"\b{op}\(", code), f"docs/ops.md does not call {op}"
