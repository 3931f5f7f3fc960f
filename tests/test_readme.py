"""README and docs: every Python block runs as printed, every link leads somewhere, nothing public is left out."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

import add_ops
from training.data.sources import KINDS
from training.models.distillers import DISTILLERS

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
site = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site)

PAGES = {page.relative_to(ROOT).as_posix(): page for page in site.pages().values()}
BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def run(one_thread):
    """Runs the Python blocks of a page in one session and gives its names; what they register is forgotten."""

    def run_blocks(page: str) -> dict:
        torch.manual_seed(0)
        names: dict = {}
        for block in BLOCK.findall(PAGES[page].read_text(encoding="utf-8")):
            exec(compile(block, page, "exec"), names)
        return names

    tables = [(table, dict(table)) for table in (KINDS, DISTILLERS)]
    yield run_blocks
    for table, before in tables:
        table.clear()
        table.update(before)


@pytest.mark.parametrize("page", [name for name, page in PAGES.items() if BLOCK.search(page.read_text())])
def test_every_python_example_runs(page, run):
    run(page)


def test_what_the_examples_of_the_readme_say_is_so(run):
    names = run("README.md")
    assert names["attention"].shape == (8, 16, 16) and names["vectors"].shape == (8, 2, 32)
    assert names["distance"].shape == (8,) and names["vectors"].sum(2).sub(1).abs().max() < 1e-5
    assert names["student"].grad.abs().sum() > 0 and names["x"].grad.abs().sum() > 0
    assert all(features.grad.abs().sum() > 0 for features in names["student_maps"])
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120, "the first page is a first page"


def test_what_the_examples_of_the_quick_start_say_is_so(run):
    names = run("docs/quick-start.md")
    assert names["per_slice"].shape == (4, 12) and names["direction"].shape == (4, 3) and len(names["terms"]) == 6
    assert (names["largest"] >= names["per_slice"].amax(1) * 0.99).all(), "no direction tells more"
    assert all(p.grad.abs().sum() > 0 for p in names["distil"].parameters())
    assert all(features.grad is not None for features in names["student_maps"][1:])


def test_what_the_examples_of_extending_say_is_so(run):
    names = run("docs/extending.md")
    assert names["terms"]["means"].item() == 0 and "pairs_of_names" in KINDS and "means" in DISTILLERS
    assert names["unsupported"](None, None, "cosine", 1.0, "ortho") and not names["unsupported"](
        0, 0, "l2", 1.0, "ortho"
    )


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_somewhere(page, tmp_path, monkeypatch):
    monkeypatch.setattr(site, "TARGET", tmp_path)
    text = site.with_links_of_the_site(PAGES[page].read_text(encoding="utf-8"), PAGES[page])
    known = {site.name_on_site(path) for path in PAGES.values()}
    for _, to, _, file in site.LINK.findall("".join(site.FENCE.split(text)[::2])):
        name = (to or file).partition("#")[0]
        assert not name or ":" in name or name in known or (tmp_path / "pages" / name).is_file(), name


def test_the_site_shows_the_programs_of_the_worked_examples(tmp_path, monkeypatch):
    monkeypatch.setattr(site, "TARGET", tmp_path)
    page = site.with_links_of_the_site(PAGES["docs/examples.md"].read_text(encoding="utf-8"), PAGES["docs/examples.md"])
    programs = sorted((ROOT / "examples").glob("*.py"))
    assert sorted(BLOCK.findall(page)) == sorted(path.read_text(encoding="utf-8") for path in programs)


@pytest.mark.parametrize("page", PAGES)
def test_tables_and_lists_are_the_same_on_a_forge_and_on_the_site(page):
    text = "".join(site.FENCE.split(PAGES[page].read_text(encoding="utf-8"))[::2])
    for table in re.findall(r"(?:^ *\|.*\n)+", text, flags=re.MULTILINE):
        assert len({row.count("|") for row in table.splitlines()}) == 1, f"a bar within a cell of {table}"
    within = re.findall(r"\n\n {1,3}\S.*", text)
    assert not within, "what follows a blank line within a list is indented by four spaces, else the site ends the list"


def test_a_link_to_nothing_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"README\.md: links to 'docs/none\.md', which does not exist"):
        site.with_links_of_the_site("see [this](docs/none.md)", ROOT / "README.md")


def test_the_api_has_every_public_name_with_its_docstring():
    entries = re.findall(r"^::: add_ops\.(\w+)$", site.api(), flags=re.MULTILINE)
    assert sorted(entries) == sorted(add_ops.__all__)
    assert not [name for name in entries if name != "__version__" and not getattr(add_ops, name).__doc__]


def test_every_environment_variable_is_documented():
    told = (ROOT / "docs" / "environment.md").read_text()
    sources = [*(ROOT / "add_ops").rglob("*.py"), *(ROOT / "csrc").glob("*"), ROOT / "setup.py"]
    read = re.compile(r'(?:environ\.get\(|environ\[|getenv\()"(ADD_OPS_\w+)"')
    found = {name for path in sources for name in read.findall(path.read_text())}
    assert {"ADD_OPS_BACKEND", "ADD_OPS_CPU_CAPABILITY", "ADD_OPS_NO_CPP"} <= found
    assert not [name for name in found if f"`{name}`" not in told]


def test_the_messages_under_troubleshooting_are_those_that_users_meet():
    sources = [*ROOT.glob("add_ops/**/*.py"), *ROOT.glob("training/**/*.py"), ROOT / "setup.py"]
    text = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text() for path in sources))  # one string on several lines
    messages = re.findall(r"^\*\*`(.*)`\*\*$", (ROOT / "docs" / "troubleshooting.md").read_text(), flags=re.MULTILINE)
    parts = [part.strip(" ;:()") for message in messages for part in re.split("[…']", message)]
    assert len(messages) > 10 and not [part for part in parts if len(part) > 8 and part not in text]


def test_the_tests_of_the_claims_are_there():
    rows = [row for row in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines() if "::" in row]
    for row in rows:
        file = None
        for named, test in re.findall(r"`(tests/\w+\.py)?::(\w+)`", row):
            file = ROOT / named if named else file
            assert f"\ndef {test}(" in file.read_text(encoding="utf-8"), test
    assert len(rows) > 20


def test_the_version_is_one():
    assert f"version: {add_ops.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{add_ops.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
