"""The report of a run: one HTML file, true to its rows, harmless whatever they hold, small however many they are."""

import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from jaxlm.config import Config, DataConfig, TrainingConfig, to_dict
from jaxlm.errors import UserError
from jaxlm.report import charts, write_report, write_report_of_run
from jaxlm.report.elements import brief, element, number
from jaxlm.report.runs import differing, figures, read_run

ROOT = Path(__file__).parents[1]
NASTY = "</pre></script><script>alert('x')</script> & \x00\x1b[31m \ud800 <!-- ]]>"
VOID = {"meta", "input"}
PACKING = {
    "rows": 40,
    "row_length": 32,
    "tokens": 1216,
    "fill": 0.95,
    "documents": 120,
    "cut_documents": 7,
    "dropped_documents": 3,
    "dropped_tokens": 11,
}


class Page(HTMLParser):
    """What stands in a page: its texts, attributes, JSON; fails where tags don't close."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.scripts if self.open and self.open[-1] in ("script", "style") else self.texts).append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def charts(self) -> dict[str, dict[str, Any]]:
        """{the drawing's description: its points}."""
        labels = [str(attributes["aria-label"]) for tag, attributes in self.tags if tag == "svg"]
        return dict(zip(labels, (json.loads(text) for text in self.scripts if text.startswith("{")), strict=True))


def make_run(folder: Path, rows: list[dict], **files: Any) -> Path:
    """A run's folder with these rows; `files` are config, starts, samples."""
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if "config" in files:
        (folder / "config.json").write_text(json.dumps(to_dict(files["config"])))
    for name in ("starts", "samples"):
        if name in files:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in files[name]))
    return folder


def start(step: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "time": f"2026-11-24T1{step % 10}:00:00Z",
        "command": "python scripts/train.py --config 'my config.py'",
        "commit": "0123abc-dirty",
        "versions": {"jaxlm": "0.1.0", "python": "3.11.7", "jax": "0.10.2"},
        "system": "Linux x86_64",
        "total_steps": 30,
        "parameters": 12345,
        "devices": "4 x H100 (gpu)",
        "processes": 1,
        "layout": "4 data",
        "attention": "blockwise",
        "rows_an_update": 8,
        "data_fingerprint": "f1a9",
        "train": PACKING,
        "validation": PACKING | {"rows": 2},
        **more,
    }


def row(step: int, loss: float | None, **more: Any) -> dict[str, Any]:
    return {"step": step, "train/loss": loss, "train/tokens_per_second": 1000.0, "train/mfu": None} | more


def render(*folders: Path) -> tuple[Page, str]:
    out = folders[0].parent / "out.html"
    write_report(folders, out)
    html = out.read_text(encoding="utf-8")
    return Page(html), html


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Interrupted after step 20 and resumed from 15, with a spike, skipped updates and texts that want out."""
    rows = [
        row(s, 5 - s / 20, **{"train/skipped_steps": float(s >= 12) * 2, "custom/</script><b>": 1.0})
        for s in range(1, 21)
    ]
    rows[17]["train/loss"] = None
    later = [row(s, 4 - s / 20, **{"train/skipped_steps": 2.0}) for s in range(16, 31)]
    later[9]["train/loss"] = 9.75
    later[4] |= {"eval/loss": 3.5, "eval/bits_per_byte": 1.5, "eval/perplexity": math.exp(3.5)}
    samples = [{"step": 10, "name": "sample", "text": "first"}, {"step": 20, "name": "sample", "text": NASTY}]
    config = Config(
        training=TrainingConfig(learning_rate=3e-3, wandb_project="<i>"), data=DataConfig(text_column=NASTY)
    )
    return make_run(tmp_path / "a <b>run", rows + later, config=config, samples=samples, starts=[start(), start(15)])


def test_page_is_whole_and_alone(run: Path) -> None:
    """It parses, asks for nothing outside itself, and no text of the run is taken for markup."""
    page, html = render(run)
    for tag, attributes in page.tags:
        assert not {"src", "href", "srcset", "action", "xmlns"} & set(attributes), tag
    assert not re.search(r"//|url\(|@import|http", "".join(page.scripts))
    assert any("default-src 'none'" in (attributes.get("content") or "") for _, attributes in page.tags)
    assert [tag for tag, _ in page.tags].count("script") == len(page.charts()) + 1, "one to a chart, and report.js"
    assert "<script>alert" not in html and "\x00" not in html
    assert "</pre></script><script>alert('x')</script> & \ufffd\ufffd[31m \ufffd <!-- ]]>" in page.text
    assert "a <b>run" in page.text


def test_page_tells_all(run: Path) -> None:
    page, _ = render(run)
    text = page.text
    for told in (
        "Not finished: step 30 of 30, 4 x H100 (gpu)",
        "3.5 at step 20",
        "resumed from step 15, 2026-11-24 15:00 UTC",
        "2 updates skipped",
        "loss spike: 9.7500",
        "rows are 95.0% full",
        "Step 20, validation loss 3.5",
        "training.learning_rate",
        "git checkout 0123abc   # with changes that were not committed",
        "pip install jax==0.10.2",
        "python scripts/train.py --config 'my config.py'",
        "f1a9",
    ):
        assert told in text, told
    changed = text.index("changed from the default")
    assert changed < text.index("training.learning_rate") < text.index("as by default") < text.index("model.d_model")
    assert "0.003" in text and "0.0001" in text, "the value, and the default beside it"


def test_charts_are_the_rows(run: Path) -> None:
    """The later row of a step wins, null is a gap, and what has no value has no chart."""
    page, html = render(run)
    drawn = page.charts()
    loss, logarithmic = (chart for label, chart in drawn.items() if label.startswith("Loss"))
    training, validation = loss["lines"]
    assert training["x"] == list(range(1, 31)), "the null of step 18 was computed again"
    assert training["y"][17] == pytest.approx(4 - 18 / 20) and training["y"][24] == 9.75
    assert (validation["x"], validation["y"]) == ([20], [3.5])
    assert not any(label.startswith("MFU") for label in drawn)
    assert any(label.startswith("custom/</script><b>") for label in drawn)
    assert html.count("\N{MULTIPLICATION X}") and "\N{BLACK DOWN-POINTING SMALL TRIANGLE}" in html
    assert (logarithmic["x"][4], logarithmic["lines"]) == (True, loss["lines"])


def test_marks(run: Path) -> None:
    assert [(mark.step, mark.kind) for mark in read_run(run).marks] == [
        (12, "skipped"),
        (15, "resumed"),
        (25, "spike"),
    ]


def test_figures(run: Path) -> None:
    found = dict(figures(read_run(run)))
    assert found["Steps"] == "30 of 30"
    assert found["Training loss, last"] == "2.5"
    assert found["Tokens trained on"] == f"{30 * 8 * 32 * 0.95:,.0f}"
    assert found["Time in updates"] == "7 s"
    assert "MFU, median" not in found


def test_old_and_unfinished_runs(tmp_path: Path) -> None:
    """metrics.jsonl alone is enough, its last line may be half written, and a resume shows in its steps."""
    folder = make_run(tmp_path / "old", [row(1, 3.0), row(2, 2.0), row(3, math.nan), row(2, 1.5), row(3, 1.0)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('not JSON\n[1]\n{"step": 4, "train/lo')
    page, _ = render(folder)
    assert "resumed from step 1" in page.text
    assert "2 line(s) of metrics.jsonl could not be read" in page.text
    assert "config.json is not there" in page.text
    assert next(iter(page.charts().values()))["lines"][0]["y"] == [3.0, 1.5, 1.0]
    (tmp_path / "old" / "final_model").mkdir()
    assert "Finished" in render(folder)[0].text


def test_rows_without_any_number(tmp_path: Path) -> None:
    page, _ = render(make_run(tmp_path / "run", [row(1, None), {"step": 2, "custom/x": "text"}]))
    assert "the loss was not finite" in page.text


def test_several_runs(tmp_path: Path, run: Path) -> None:
    other = make_run(tmp_path / "other", [row(s, 6.0) for s in range(1, 9)], config=Config(), starts=[start()])
    third = tmp_path / "deep" / "other"
    third.parent.mkdir()
    shutil.copytree(other, third)
    page, _ = render(run, other, third)
    assert "3 runs compared" in page.text
    lines = next(iter(page.charts().values()))["lines"]
    assert [line["label"] for line in lines] == ["a <b>run", str(other), str(third)]
    assert len({line["colour"] for line in lines}) == 3
    assert set(differing([read_run(run), read_run(other)])) == {
        "training.learning_rate",
        "training.wandb_project",
        "data.text_column",
    }
    assert differing([read_run(other), read_run(third)]) == []


def test_long_runs_are_thinned_and_keep_their_extremes(tmp_path: Path) -> None:
    """100,000 rows: less than 2 MB, and the one loss of 77 among them is still there, on both axes."""
    lines = [f'{{"step": {s}, "train/loss": {3 + s % 7 / 10}, "train/grad_norm": 1.0}}\n' for s in range(1, 100_001)]
    lines[54_320] = '{"step": 54321, "train/loss": 77.0, "train/grad_norm": 0.5}\n'
    folder = make_run(tmp_path / "run", [])
    (folder / "metrics.jsonl").write_text("".join(lines))
    out = tmp_path / "out.html"
    write_report([folder] * 2, out)
    assert out.stat().st_size < 2e6
    for label, chart in Page(out.read_text(encoding="utf-8")).charts().items():
        if label.startswith("Loss"):
            assert all(77.0 in line["y"] and line["x"][0] == 1 and line["x"][-1] == 100_000 for line in chart["lines"])


def test_thinning_and_smoothing() -> None:
    points = [(float(x), math.nan if x == 500 else math.sin(x) + (x == 700) * 9) for x in range(1, 1001)]
    scale = charts.Scale(0, 1000, charts.LEFT, charts.RIGHT)
    few = charts.thinned(points, scale, 50)
    assert len(few) <= 102 and few == sorted(few) and max(y for _, y in few) == points[699][1]
    assert charts.thinned(points[:100], scale, 50) == points[:100]
    straight = [(float(x), 2.0 * x) for x in range(1, 301)]
    assert [y for _, y in charts.smoothed(straight)] == pytest.approx([y for _, y in straight]), (
        "what is straight stays where it is"
    )
    gap = charts.smoothed([(1.0, 1.0), (2.0, math.nan), (3.0, math.inf)])
    assert gap[0] == (1.0, 1.0) and math.isnan(gap[2][1])


@pytest.mark.parametrize("values", [[0.0], [1e-30, 1e-30], [-5.0, -5.0], [3e38], [1e-6, 5.0, 1e6], [math.nan]])
def test_any_values_have_an_axis(values: list[float]) -> None:
    line = charts.Line("x", list(enumerate(values)), 0)
    scale = charts.y_scale([line])
    assert scale.low < scale.high and len(scale.ticks(5)) < 20
    assert "nan" not in charts._path(line.points, charts.x_scale([line], True), scale)


def test_numbers() -> None:
    assert [number(v) for v in (None, math.nan, 0.0, 12345.0, 1234.5, 4.5921, 3e-5, math.inf)] == [
        "\N{EN DASH}",
        "\N{EN DASH}",
        "0",
        "12,345",
        "1,234",
        "4.592",
        "3e-05",
        "inf",
    ]
    assert [brief(v) for v in (0.0, 0.25, 2000.0, 20_000.0, 1.5e6, 5e-4)] == [
        "0",
        "0.25",
        "2000",
        "20k",
        "1.5M",
        "5e-4",
    ]
    assert element("p", "a", element("b"), "c").find("b").tail == "c"  # type: ignore[union-attr]


# ---- The command, and the trainer's own


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(ROOT / "scripts" / "report.py"), *arguments]
    return subprocess.run(script, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)


def test_command(run: Path, tmp_path: Path) -> None:
    done = command(str(run), "--out", str(tmp_path / "r.html"))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'r.html'}\n", "")
    assert command(str(run)).stdout == f"{run / 'report.html'}\n"
    (tmp_path / "empty").mkdir()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "metrics.jsonl").touch()
    for arguments, message in (
        ([str(tmp_path / "none")], r"error: .*none: no such folder; name a run's folder"),
        ([str(run), str(tmp_path / "empty")], r"error: .*empty: not a run's folder, it has no metrics\.jsonl"),
        ([str(tmp_path / "new")], r"error: .*new: has no rows yet"),
        ([str(run), "--out", str(tmp_path / "no" / "x")], r"error: .*no/x: cannot be written \(No such file"),
        ([], r"error: the following arguments are required: RUN"),
    ):
        done = command(*arguments)
        assert done.returncode == 2 and done.stdout == ""
        assert re.match(message, done.stderr) and done.stderr.count("\n") == 1, done.stderr


def test_reports_need_no_jax() -> None:
    program = "import sys, jaxlm.report; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0


def test_a_report_that_fails_costs_nothing_else(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    write_report_of_run(run, said.append)
    assert (run / "report.html").is_file() and said == [f"report: {run / 'report.html'}"]
    said.clear()
    with (run / "starts.jsonl").open("a") as file:
        file.write('{"step": "many"}\n')
    write_report_of_run(run, said.append)
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    (run / "starts.jsonl").unlink()
    write_report_of_run(run, said.append)
    assert [line.partition(":")[0] for line in said] == ["no report"] * 2
    write_report_of_run(tmp_path, said.append)
    assert len(said) == 2, "a run that ended before its first row has nothing to report"
    with pytest.raises(UserError):
        read_run(tmp_path)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on the PATH")
def test_in_a_browser(run: Path, tmp_path: Path) -> None:
    """Values come up under the pointer, nothing is wider than a phone, and no script fails."""
    _, html = render(run)
    probe = """<script>
        const shown = document.querySelector("svg"), box = shown.getBoundingClientRect();
        shown.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width * 0.98, bubbles: true}));
        document.body.dataset.probe = document.querySelector(".tip").textContent;
        document.body.dataset.wide = document.documentElement.scrollWidth > window.innerWidth;
        </script></body>"""
    (tmp_path / "probe.html").write_text(html.replace("</body>", probe), encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += f" --disable-component-update --disable-sync --dump-dom --window-size=500,900 --user-data-dir={tmp_path}/p"
    browser = ["chromium", *flags.split(), f"file://{tmp_path}/probe.html"]
    dom = subprocess.run(browser, capture_output=True, text=True, timeout=60, check=False).stdout
    found = re.search(r'data-probe="([^"]*)" data-wide="([^"]*)"', dom)
    assert found is not None, dom[-500:]
    assert found.groups() == ("step 30training 2.5", "false")
