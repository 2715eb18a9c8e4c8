"""What XLA finds fastest on a GPU, kept in the run's folder. No GPU is here: tests/compiled shows that XLA takes it."""

from pathlib import Path

import jax
import pytest
from conftest import make_config

from jaxlm import Trainer
from jaxlm.config import DataConfig
from jaxlm.errors import UserError
from jaxlm.ops.compiler import DUMP, LOAD
from jaxlm.run import autotuning
from jaxlm.run.autotuning import FILE, kept_options
from jaxlm.run.setup import compile_step
from jaxlm.train.assemble import assemble


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotuning, "_loaded", set())


RESULTS = 'version: 3\nresults {\n  device: "CUDA: 9.0, Cores: 132"\n  hlo: "{ROOT x = f32[]{} parameter(0)}"\n}\n'


def test_the_first_start_writes_and_later_ones_use_what_it_wrote(tmp_path: Path) -> None:
    """The name that XLA is given tells the content, since the key of a cached program has the name alone."""
    run, data = tmp_path / "run", DataConfig(cache_dir=str(tmp_path / "cache"))
    run.mkdir()
    assert kept_options(run, data, "gpu") == {DUMP: str(run / FILE)}
    (run / FILE).write_text(RESULTS)
    first = kept_options(run, data, "gpu")
    assert list(first) == [LOAD] and Path(str(first[LOAD])).read_text() == RESULTS
    (tmp_path / "moved").mkdir()
    (run / FILE).rename(tmp_path / "moved" / FILE)
    assert kept_options(tmp_path / "moved", data, "gpu") == first
    (run / FILE).write_text(RESULTS.replace("9.0", "8.0"))
    with pytest.raises(UserError, match="takes autotuning results once, and this process has given it others"):
        kept_options(run, data, "gpu")


def test_runs_of_several_processes_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"^training.keep_autotuning \(true\) is for a run of one process"):
        kept_options(tmp_path, DataConfig(), "gpu")


@pytest.mark.parametrize("content", ["", RESULTS[:-4], RESULTS[:-2] + "  result {\n    triton {\n    }\n"])
def test_results_that_were_cut_short_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(UserError, match=rf"^autotuning results \({tmp_path}/{FILE}\): .*cut short; delete the file"):
        kept_options(tmp_path, DataConfig(cache_dir=str(tmp_path)), "gpu")


def test_a_program_that_writes_them_is_compiled_though_it_is_cached(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(make_config(tmp_path / "run", corpus, **{"training.keep_autotuning": True}))
    assert "training.keep_autotuning: nothing is tuned on CPU" in capsys.readouterr().err
    writing = assemble(trainer.resolved, options={DUMP: str(tmp_path / FILE)})
    before = jax.config.jax_enable_compilation_cache
    for _ in range(2):
        vars(writing).pop("compiled_step", None)
        compile_step(writing, None)
        said = capsys.readouterr().err
        assert "compiled the step in" in said and "XLA has found nothing to write into" in said
    assert jax.config.jax_enable_compilation_cache == before
