"""The pages in docs/: their code runs, in order, and they name every op."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
# CONTRIBUTING says why there is no such file; the other is a part of Gemma 3.
NO_CODE = ("kernels/__init__.py", "model.language_model")


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
            marks = [pytest.mark.slow] * ('from_pretrained("smollm2' in blocks(page))
            yield pytest.param(page, id=page.stem, marks=marks)


@pytest.mark.parametrize("page", list(pages()))
def test_the_code_of_a_page_runs(page, monkeypatch, tmp_path):
    """The files that a page names: the tiny model of the tests, and shipped facts, sixteen to edit, two more to edit
    later, and others to learn from."""
    facts = (ROOT / "fastedit/data/demo.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "edits.jsonl").write_text("".join(facts[:16]), encoding="utf-8")
    (tmp_path / "more.jsonl").write_text("".join(facts[16:18]), encoding="utf-8")
    (tmp_path / "records.jsonl").write_text("".join(facts[18:]), encoding="utf-8")
    shutil.copytree(ROOT / "tests" / "tiny" / "model", tmp_path / "model")
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


def test_links_between_pages_lead_somewhere():
    for page in [*PAGES, *ROOT.glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.relative_to(ROOT)} links to {link}"


def test_the_files_and_modules_that_a_page_names_exist():
    """Paths of the repository, and modules as `package.module` or `fastedit.package.module`."""
    packages = "|".join(path.parent.name for path in (ROOT / "fastedit").glob("*/__init__.py"))
    wrong = []
    for page in [*PAGES, *ROOT.glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        paths = re.findall(r"\b(?:fastedit|tests|bench|kernels|csrc|docs)/[\w/]+\.(?:py|md|sh|cpp|cu|yaml)\b", text)
        wrong += [(page.name, path) for path in paths if path not in NO_CODE and not (ROOT / path).exists()]
        modules = re.findall(rf"`(?:fastedit\.)?((?:{packages}|recipes)(?:\.\w+)+)`", text)
        wrong += [(page.name, module) for module in modules if module not in NO_CODE and not is_module(module)]
    assert wrong == []


def is_module(name: str) -> bool:
    """Whether `package.module` is one, or a name inside one."""
    parts = name.split(".")
    places = [ROOT.joinpath("fastedit", *parts[:n]) for n in range(2, len(parts) + 1)]
    return any(place.is_dir() or place.with_suffix(".py").is_file() for place in places)


def test_the_tree_in_architecture_lists_every_module():
    tree = re.findall(r"```\n(.*?)```", (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"), flags=re.DOTALL)[0]
    listed = re.findall(r"\w+", " ".join(line for line in tree.splitlines() if line.startswith(" " * 18)))
    listed += re.findall(r"^  (\w+)\.py", tree, flags=re.MULTILINE)
    modules = [path.stem for path in (ROOT / "fastedit").rglob("*.py") if path.parent.name != "presets"]
    wanted = [name for name in modules if name != "__init__"]
    assert sorted(name for name in listed if name not in ("presets", "__init__")) == sorted(
        name for name in wanted if name != "presets"
    )
