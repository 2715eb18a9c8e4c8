#!/usr/bin/env bash
# A run's metric in MLflow is its highest step's, and of one step's the largest: a run gone back keeps what it had before.
#
# mlflow 3.17.2 (mlflow-skinny here), with its default store, a database of SQLite. One would take run.data.metrics["loss"],
# the column of search_runs and the order in which it sorts runs for the value that was logged last. It is the one with the highest step.
# A run that goes back to an earlier checkpoint after its loss blew up, and logs on under the same run from there, shows
# the blown up loss until it is past the step where that was; the best run is then chosen by values that no checkpoint has. Of
# values with the same step and time in milliseconds, as a batch that is logged at once has them, the largest is the run's:
# of a loss the worst. And infinity is 1.7976931348623157e+308 in the database, an ordinary number; the documentation of
# log_metric says so, but math.isinf of what comes back is false. Right: get_metric_history, where all values are
# with their times, or a new run after going back.
# In the library: mlflow/store/tracking/sqlalchemy_store.py, which compares (step, timestamp, value).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q mlflow-skinny==3.17.2 sqlalchemy==2.1.9 alembic==1.20.1 pandas==3.1.1
cat >"$folder/show.py" <<'PYTHON'
import math
import sys

import mlflow
from mlflow.entities import Metric

mlflow.set_tracking_uri(f"sqlite:///{sys.argv[1]}/mlflow.db")
client = mlflow.MlflowClient()
experiment = client.create_experiment("losses")


def show(name: str, *values: tuple[int, float, int]) -> None:
    """Logs values as (step, value, time), one by one."""
    run = client.create_run(experiment, run_name=name).info.run_id
    for step, value, time in values:
        client.log_batch(run, [Metric("loss", value, time, step)])
    print(f"{name}: last {values[-1][1]}, the run's {client.get_run(run).data.metrics['loss']}")


show("goes on", (100, 3.0, 1), (200, 2.5, 2), (300, 2.25, 3))
show("went back", (100, 3.0, 1), (200, 2.5, 2), (300, 9.5, 3), (200, 2.4, 4), (250, 2.2, 5))
show("one step, later", (300, 2.5, 1), (300, 2.25, 2))
show("one step, one time", (300, 2.5, 1), (300, 2.25, 1))
show("infinite", (300, math.inf, 1))
best = mlflow.search_runs([experiment], order_by=["metrics.loss"])
print(", ".join(f"{name} {loss}" for name, loss in zip(best["tags.mlflow.runName"], best["metrics.loss"])))
PYTHON
export MLFLOW_DISABLE_TELEMETRY=true
cd "$folder"
found=$("$folder/venv/bin/python" show.py "$folder" 2>"$folder/stderr") || { tail -5 "$folder/stderr"; exit 1; }
echo "$found"
[[ $found == "goes on: last 2.25, the run's 2.25
went back: last 2.2, the run's 9.5
one step, later: last 2.25, the run's 2.25
one step, one time: last 2.25, the run's 2.5
infinite: last inf, the run's 1.7976931348623157e+308
one step, later 2.25, goes on 2.25, one step, one time 2.5, went back 9.5, infinite 1.7976931348623157e+308" ]] || {
  echo "this has changed"
  exit 1
}
