"""Trackers: what they are told can be read back, once each, whatever breaks."""

import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bilevel as bl
from bilevel.outer.tracking import SERIES
from tests.faults import trainee


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: scalars by series, without what was taken back."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("events.out.*"), key=lambda path: path.stat().st_mtime_ns):
        content, place = path.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack("<Q", content[place : place + 8])
            event = Event.FromString(content[place + 12 : place + 12 + length])
            place += 16 + length
            if event.HasField("session_log") and event.session_log.status == 1:
                for name, steps in found.items():
                    found[name] = [entry for entry in steps if entry[0] < event.step]
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def stopping(epoch: int) -> Callable[[bl.Event], None]:
    def stop(event: bl.Event) -> None:
        if event.epoch == epoch:
            raise KeyboardInterrupt

    return stop


def test_tensorboard_has_each_epoch_once_after_a_resume(tmp_path: Path):
    pytest.importorskip("tensorboardX")
    directory, folder = tmp_path / "run", tmp_path / "events"
    # The third epoch is told before the last checkpoint knows of it.
    trainee.train(
        directory, callbacks=[bl.TensorBoard(folder, {"rate": {"first": 0.05}}), stopping(3)]
    )
    assert len(trainee.moments(directory)) > 1
    for name in trainee.moments(directory)[1:]:
        for file in (directory / "checkpoints" / name).iterdir():
            file.write_bytes(b"")  # damaged, so that an earlier one is gone on from
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        run = trainee.train(directory, callbacks=bl.TensorBoard(folder), resume=True)
    found = events(folder)
    for field, series in SERIES.items():
        expected = [
            (record.epoch, pytest.approx(getattr(record, field), rel=1e-6))
            for record in run.history
            if getattr(record, field) is not None
        ]
        if not series.startswith("time/"):
            assert found.get(series, []) == expected, series
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4]
    first = min(folder.glob("events.out.*"), key=lambda path: path.stat().st_mtime_ns)
    assert b"| rate.first | 0.05 |" in first.read_bytes()


def test_a_tensorboard_that_cannot_be_written_is_said_once(tmp_path: Path):
    pytest.importorskip("tensorboardX")
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="cannot write to .*file") as said:
        run = trainee.train(None, callbacks=bl.TensorBoard(tmp_path / "file"))
    assert run.status == "completed"
    assert len(said) == 1


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("mlflow", reason="needs bilevel[mlflow], 90 MB")
    # MLflow without a database is for tests.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return f"file://{tmp_path / 'mlruns'}"


def steps(uri: str, series: str) -> tuple[Any, list[int], list[float]]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("bilevel")
    (run,) = client.search_runs([experiment.experiment_id])
    metrics = client.get_metric_history(run.info.run_id, series)
    return run, [metric.step for metric in metrics], [metric.value for metric in metrics]


@pytest.mark.slow
def test_mlflow_has_each_epoch_once_after_a_resume(tmp_path: Path, store: str):
    directory = tmp_path / "run"
    tracker = bl.MLflow(store, parameters={"rate": 0.05})
    trainee.train(directory, callbacks=[tracker, stopping(3)], seconds=1e9)
    stopped, _, _ = steps(store, "loss")
    assert stopped.info.status == "KILLED"
    run = trainee.train(directory, callbacks=bl.MLflow(store), resume=True)
    for field in ("loss", "metric", "primal_iterations"):
        logged, found, values = steps(store, SERIES[field])
        known = [r for r in run.history if getattr(r, field) is not None]
        assert found == [record.epoch for record in known]
        assert values == [getattr(record, field) for record in known]
    assert logged.info.run_id == stopped.info.run_id
    assert logged.info.status == "FINISHED"
    assert logged.data.params == {
        "task": "task", "metric": "metric", "epochs": "4", "rate": "0.05",
    }  # fmt: skip


@pytest.mark.slow
def test_a_dead_server_ends_no_run(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("mlflow", reason="needs bilevel[mlflow], 90 MB")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.warns(RuntimeWarning, match=r"127\.0\.0\.1:9 is not logged to any more") as said:
        run = trainee.train(None, callbacks=bl.MLflow("http://127.0.0.1:9", patience=20.0))
    assert run.status == "completed"
    assert len([one for one in said if "MLflow" in str(one.message)]) == 1


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_not_waited_for():
    import socket
    import time

    pytest.importorskip("mlflow", reason="needs bilevel[mlflow], 90 MB")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        tracker = bl.MLflow(f"http://127.0.0.1:{port}", patience=0.5)
        trained = time.perf_counter()
        with pytest.warns(RuntimeWarning, match=r"not everything was logged within 0\.5 s"):
            run = trainee.train(None, callbacks=tracker)
        assert time.perf_counter() - trained < run.summary.seconds + 3.0


def test_what_is_missing_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    import sys

    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ImportError, match="pip install tensorboardX"):
        bl.TensorBoard("events")
    with pytest.raises(ImportError, match="pip install mlflow-skinny"):
        bl.MLflow("http://localhost:5000")
