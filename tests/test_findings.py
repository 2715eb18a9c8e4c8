"""docs/surprises.md lists what is in findings/; `python tests/test_findings.py` rewrites it."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "surprises.md"


def rows() -> list[str]:
    """What each script shows, which its second line says, and its name."""
    scripts = sorted((ROOT / "findings").glob("*.sh"))
    titles = [script.read_text(encoding="utf-8").splitlines()[1] for script in scripts]
    assert all(title.startswith("# ") and title.endswith(".") for title in titles)
    shown = [title[2:].replace("|", r"\|") for title in titles]
    return [f"| {title} | `{script.stem}` |" for title, script in zip(shown, scripts, strict=True)]


def page(text: str) -> str:
    """`text` with the rows of its table replaced."""
    head, line, _ = text.partition("|---|---|\n")
    return head + line + "\n".join(rows()) + "\n"


def test_the_page_of_surprises_is_current() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == page(text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
