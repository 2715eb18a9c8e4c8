"""The report of a run: one HTML file, true to its rows, harmless whatever they hold, small however many they are."""

import json
import math
import re
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from jaxlm.__main__ import run as run_command
from jaxlm.config import Config, DataConfig, TrainingConfig, to_dict
from jaxlm.errors import UserError
from jaxlm.report import write_report, write_report_of_run
from jaxlm.report.page import smoothed, thinned
from jaxlm.report.runs import differing_options, number, read_run, read_runs

ROOT = Path(__file__).parents[1]
NASTY = "</pre></script><script>alert('x')</script> & \x00\x1b[31m \ud800 <!-- ]]>"
VENDOR = ROOT / "jaxlm" / "report" / "vendor"
VOID = {"meta", "input"}
ODD_VALUES = [[0.0], [1e-30, 1e-30], [-5.0, -5.0], [3e38], [1e-6, 5.0, 1e6], [math.nan]]
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
        """{the chart's description: what report.js draws}."""
        labels = [str(attributes["aria-label"]) for _, attributes in self.tags if attributes.get("class") == "plot"]
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
        "flops_per_token": 80000.0,
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
    licence, library, style = (
        (VENDOR / name).read_text() for name in ("LICENSE", "uPlot.iife.min.js", "uPlot.min.css")
    )
    assert licence in html and library in html and style in html, "whole, with its licence"
    code = re.sub(r"/\*.*?\*/", "", "".join(page.scripts), flags=re.DOTALL)
    assert not re.search(r"//|url\(|@import|http|fetch\(|import\(|XMLHttpRequest|WebSocket|sendBeacon", code)
    assert any("default-src 'none'" in (attributes.get("content") or "") for _, attributes in page.tags)
    assert [tag for tag, _ in page.tags].count("script") == len(page.charts()) + 3, (
        "one to a chart, the runs' courses, uPlot and report.js"
    )
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
        "Rows filled95.0%",
        "dropped_tokens\n1111\n",
        "JavaScript, which draws the curves, is off",
        "Step 20, validation loss 3.5",
        "training.learning_rate",
        "git checkout 0123abc   # with changes that were not committed",
        "pip install jax==0.10.2",
        "python scripts/train.py --config 'my config.py'",
        "f1a9",
    ):
        assert told in text, told
    changed, others = text.index("changedvaluedefault"), text.index("options left at their defaults")
    assert changed < text.index("training.learning_rate") < others < text.index("model.d_model")
    assert "0.003" in text and "0.0001" in text, "the value, and the default beside it"


def test_charts_are_the_rows(run: Path) -> None:
    """The later row of a step wins, null is a gap, and what has no value has no chart."""
    page, _ = render(run)
    drawn = page.charts()
    label, loss = next(iter(drawn.items()))
    assert " ".join(label.split()) == (
        "Loss, nats per token, by step; training from 4.95 to 2.5; validation from 3.5 to 3.5;"
    )
    training, validation = loss["lines"]
    assert training["x"] == list(range(1, 31)), "the null of step 18 was computed again"
    assert training["y"][17] == pytest.approx(4 - 18 / 20) and training["y"][24] == 9.75
    assert (validation["x"], validation["y"]) == ([20], [3.5])
    assert not any(label.startswith("MFU") for label in drawn)
    assert any(label.startswith("custom/</script><b>") for label in drawn)
    assert [(mark["kind"], mark["symbol"], mark["steps"]) for mark in loss["marks"]] == [
        ("resumed", "\u250a", [15]),
        ("spike", "\u25be", [25]),
        ("skipped", "\u2715", [12]),
    ]
    assert [chart["log_switch"] for chart in drawn.values()].count(True) == 1 == page.text.count("logarithmic")


def test_events(run: Path) -> None:
    assert [(event.step, event.kind) for event in read_run(run).events] == [
        (0, "started"),
        (12, "skipped"),
        (15, "resumed"),
        (25, "spike"),
    ]


def test_key_figures(run: Path) -> None:
    found = read_run(run).key_figures
    assert found["Steps"] == "30 of 30"
    assert found["Best validation loss"] == "3.5 at step 20"
    assert found["Last training loss"] == "2.5"
    assert found["Tokens trained on"] == f"{30 * 8 * 32 * 0.95:,.0f}"
    assert found["Time in updates"] == "0:00:07"
    assert "Median MFU" not in found
    course = read_run(run).course
    assert course["tokens"][-1] == (30, pytest.approx(30 * 8 * 32 * 0.95))
    assert course["hours"][-1][1] * 3600 == pytest.approx(30 * 8 * 32 * 0.95 / 1000, rel=0.2)
    assert course["FLOPs"][-1][1] == pytest.approx(course["tokens"][-1][1] * 80000)


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
    assert "The folder has no starts.jsonl" in page.text
    ended(folder, 2)
    assert "Not finished" in render(folder)[0].text, "the final model is of an earlier end"
    ended(folder, 3)
    assert "Not finished" not in render(folder)[0].text


def ended(folder: Path, step: int, evaluations_since_best: int = 0) -> None:
    """Gives a run's folder a final model."""
    (folder / "final_model" / "progress").mkdir(parents=True, exist_ok=True)
    progress = {"step": step, "evaluations_since_best": evaluations_since_best}
    (folder / "final_model" / "progress" / "progress.json").write_text(json.dumps(progress))


def test_a_run_that_went_back_or_on(tmp_path: Path) -> None:
    """What was written beyond the step that a start went back to is no part of the run, nor is a final model there."""
    rows = [row(step, 5.0 - step / 10) for step in range(1, 7)]
    begun = start(total_steps=6, metrics_lines=0)
    samples = [{"step": step, "name": "sample", "text": f"at {step}"} for step in (2, 6)]
    folder = make_run(tmp_path / "run", rows, starts=[begun], samples=samples, config=Config())
    ended(folder, 6)
    assert read_run(folder).finished

    def start_again(step: int, lines: int, total_steps: int = 6) -> None:
        with (folder / "starts.jsonl").open("a") as file:
            file.write(json.dumps(start(step, total_steps=total_steps, metrics_lines=lines)) + "\n")

    start_again(3, 6)
    found = read_run(folder)
    assert not found.finished and found.last_step == 3
    assert [point[0] for point in found.points("train/loss")] == [1, 2, 3]
    assert [sample["step"] for sample in found.samples] == [2]
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row(step, 1.0)) + "\n" for step in (5, 6))
    found = read_run(folder)
    assert found.points("train/loss") == [(1, 4.9), (2, 4.8), (3, 4.7), (5, 1.0), (6, 1.0)]
    assert found.finished
    start_again(6, 8, total_steps=9)
    assert not read_run(folder).finished, "it goes on to step 9"
    patient = Config(training=TrainingConfig(early_stopping_patience=2))
    (folder / "config.json").write_text(json.dumps(to_dict(patient)))
    assert not read_run(folder).finished
    ended(folder, 6, evaluations_since_best=2)
    assert read_run(folder).finished
    (folder / "metrics.jsonl").write_text(json.dumps(row(8, 1.0)) + "\n")
    assert read_run(folder).points("train/loss") == [(8, 1.0)], "a new file: where older starts began in it is void"


def test_rows_without_any_number(tmp_path: Path) -> None:
    page, _ = render(make_run(tmp_path / "run", [row(1, None), {"step": 2, "custom/x": "text"}]))
    assert "the loss was not finite" in page.text


def test_several_runs(tmp_path: Path, run: Path) -> None:
    other = make_run(tmp_path / "other", [row(s, 6.0) for s in range(1, 9)], config=Config(), starts=[start()])
    third = tmp_path / "deep" / "other"
    third.parent.mkdir()
    shutil.copytree(other, third)
    make_run(tmp_path / "begun", [])
    assert [each.name for each in read_runs([tmp_path])] == sorted(["a <b>run", "other"])  # a folder of runs
    page, _ = render(run, other, third)
    assert "3 runs compared" in page.text
    lines = next(iter(page.charts().values()))["lines"]
    assert [line["label"] for line in lines] == ["a <b>run", str(other), str(third)]
    assert len({line["colour"] for line in lines}) == 3
    assert differing_options([read_run(run), read_run(other)]) == [
        ["training.learning_rate", "0.003", "0.0001"],
        ["training.wandb_project", "<i>", "jaxlm"],
        ["data.text_column", NASTY, "text"],
    ]
    assert differing_options([read_run(other), read_run(third)]) == []
    (third / "config.json").unlink()
    assert differing_options([read_run(other), read_run(third)]) == []
    text = render(run, other, third)[0].text
    assert "A run without config.json has no options here" in text and "training.learning_rate0.0030.0001" in (
        "".join(text.split())
    )


def test_long_runs_are_thinned_and_keep_their_extremes(tmp_path: Path) -> None:
    """100,000 rows: less than 2 MB, and the one loss of 77 and the first steps (for a logarithmic axis) are there."""
    lines = [f'{{"step": {s}, "train/loss": {3 + s % 7 / 10}, "train/grad_norm": 1.0}}\n' for s in range(1, 100_001)]
    lines[54_320] = '{"step": 54321, "train/loss": 77.0, "train/grad_norm": 0.5}\n'
    folder = make_run(tmp_path / "run", [])
    (folder / "metrics.jsonl").write_text("".join(lines))
    out = tmp_path / "out.html"
    write_report([folder] * 2, out)
    assert out.stat().st_size < 2e6
    for label, chart in Page(out.read_text(encoding="utf-8")).charts().items():
        if label.startswith("Loss"):
            raw, means = ([line for line in chart["lines"] if line["kind"] == kind] for kind in ("faint", "smoothed"))
            assert len(raw) == len(means) == 2
            assert all(77.0 in line["y"] for line in raw)
            assert all(line["x"][0] == 1 and line["x"][-1] == 100_000 for line in chart["lines"])
            assert all(sum(x <= 100 for x in line["x"]) > 20 for line in chart["lines"])


def test_thinning_and_smoothing() -> None:
    points = [(x, math.nan if x == 500 else math.sin(x) + (x == 700) * 9) for x in range(1, 1001)]
    few = thinned(points, 50)
    assert len(few) <= 202 and few == sorted(few) and max(y for _, y in few) == points[699][1]
    assert thinned(points[:100], 50) == points[:100]
    straight = [(x, 2.0 * x) for x in range(1, 301)]
    means = smoothed(straight, 50)
    assert [y for _, y in means] == pytest.approx([2.0 * x for x, _ in means]), "what is straight stays where it is"
    assert means[0] == straight[0] and means[-1] == straight[-1] and 50 <= len(means) <= 100
    gap = smoothed([(1, 1.0), (2, math.nan), (3, math.inf)], 3)
    assert gap[0] == (1, 1.0) and math.isnan(gap[2][1])


@pytest.mark.parametrize("values", ODD_VALUES)
def test_any_values_have_a_chart(tmp_path: Path, values: list[float]) -> None:
    rows = [row(step, 1.0, **{"custom/x": value}) for step, value in enumerate(values)]
    drawn = [chart for chart in render(make_run(tmp_path / "run", rows))[0].charts().values() if "x" in chart["title"]]
    assert [chart["lines"][0]["y"] for chart in drawn] == [values] * (values != ODD_VALUES[-1])


def test_numbers() -> None:
    values = (None, math.nan, 0.0, 12345.0, 1234.5, 4.5921, 3e-5, math.inf)
    shown = ["\N{EN DASH}", "\N{EN DASH}", "0", "12,345", "1,234", "4.592", "3e-05", "inf"]
    assert [number(value) for value in values] == shown


# ---- The command, and the trainer's own


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(ROOT / "scripts" / "report.py"), *arguments]
    return subprocess.run(script, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)


def test_command(run: Path, tmp_path: Path) -> None:
    done = command(str(run), "--out", str(tmp_path / "r.html"))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'r.html'}\n", "")
    assert command(str(run)).stdout == f"{run / 'report.html'}\n"
    done = command()
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: the following arguments are required: RUN.*\n", done.stderr), done.stderr
    (tmp_path / "empty").mkdir()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "metrics.jsonl").touch()
    for arguments, message in (
        ([str(tmp_path / "none")], r".*none: no such folder; name a run's folder"),
        ([str(run), str(tmp_path / "empty")], r".*empty: not a run's folder, it has no metrics\.jsonl"),
        ([str(tmp_path / "new")], r".*new: has no rows yet"),
        ([str(run), "--out", ""], r"argument --out: is empty; name a file or a folder, or leave it out"),
        ([str(run), "--out", str(tmp_path / "no" / "x")], r".*no/x: cannot be written \(No such file"),
    ):
        with pytest.raises(UserError) as refused:
            run_command("report", arguments)
        assert re.match(message, str(refused.value))


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
    """Values come up under the pointer and by arrow keys, every axis has a range, nothing is wider than a phone."""
    with (run / "metrics.jsonl").open("a") as file:
        for i, values in enumerate(ODD_VALUES):
            file.writelines(json.dumps({"step": 31 + n, f"custom/{i}": v}) + "\n" for n, v in enumerate(values))
    _, html = render(run)
    spy = """<script>
        const plots = [], probe = [], errors = [], Plot = uPlot;
        uPlot = function (...options) { const made = new Plot(...options); plots.push(made); return made; };
        uPlot.join = Plot.join;
        addEventListener("error", (event) => errors.push(event.message));
        </script>"""
    check = """<script>
        const over = document.querySelector(".u-over"), box = over.getBoundingClientRect();
        const legend = () => probe.push(document.querySelector(".u-legend").textContent);
        legend();
        const clientX = box.left + box.width * 0.99, clientY = box.top + 9;
        over.dispatchEvent(new MouseEvent("mousemove", {clientX, clientY, bubbles: true}));
        legend();
        document.querySelector(".plot").dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowLeft"}));
        legend();
        document.querySelector("input").click();
        const {x, y} = plots.at(-1).scales;
        probe.push(x.distr, document.querySelectorAll(".uplot").length, plots.length);
        const by = document.querySelector("select");
        by.value = "tokens";
        by.dispatchEvent(new Event("change"));
        queueMicrotask(() => {
          legend();
          const scales = plots.flatMap((plot) => [plot.scales.x, plot.scales.y]);
          probe.push(scales.every((scale) => scale.min < scale.max));
          probe.push(document.documentElement.scrollWidth > innerWidth, errors);
          document.body.dataset.probe = JSON.stringify(probe);
        });
        </script></body>"""
    before, last = html.rsplit("<script>", 1)
    html = before + spy + "<script>" + last.replace("</body>", check)
    (tmp_path / "probe.html").write_text(html, encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += f" --disable-component-update --disable-sync --dump-dom --window-size=500,900 --user-data-dir={tmp_path}/p"
    browser = ["chromium", *flags.split(), f"file://{tmp_path}/probe.html"]
    dom = subprocess.run(browser, capture_output=True, text=True, timeout=60, check=False).stdout
    found = re.search(r'data-probe="([^"]*)"', dom)
    assert found is not None, dom[-500:]
    charts = html.count('class="plot"')
    assert json.loads(unescape(found[1])) == [
        "step30training2.5validation3.5",
        "step30training2.5validation\N{EN DASH}",
        "step29training2.55validation\N{EN DASH}",
        *(3, charts, charts + 1, "tokens7,296training2.5validation3.5"),
        *(True, False, []),
    ]
