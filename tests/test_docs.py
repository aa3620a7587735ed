"""The documentation: its links lead somewhere, and the messages that it explains are those of the code."""

import ast
import re

import pytest
from conftest import REPOSITORY

PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])
PACKAGES = ("nnunet_semiseg", "pseudo_label", "dataset_conversion")


def prose(page):
    """The text of a page without blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_index_names_every_page():
    index = (REPOSITORY / "docs" / "index.md").read_text(encoding="utf-8")
    for page in (REPOSITORY / "docs").glob("*.md"):
        assert page.name == "index.md" or f"]({page.name}" in index, page.name


def messages():
    """All strings of the packages, with ``...`` for what is filled in."""
    found = []
    for package in PACKAGES:
        for file in (REPOSITORY / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(v.value if isinstance(v, ast.Constant) else "..." for v in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(found)


def test_messages_that_are_explained_exist():
    explained = re.findall(r"^(\*\*.*)$", prose(REPOSITORY / "docs" / "typical_problems.md"), flags=re.MULTILINE)
    known = messages()
    for heading in explained:
        if heading.endswith(("(nnU-Net)", "(PyTorch)")):
            continue
        for message in re.findall(r"`([^`]+)`", heading.split("** (")[0]):
            for piece in message.split("..."):
                assert piece in known, f"{message}: {piece}"
