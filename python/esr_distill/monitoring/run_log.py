"""Where the records of a run go: metrics.jsonl, samples.jsonl, trackers."""

from pathlib import Path

from esr_distill.complete_files import write_errors
from esr_distill.config import TrainConfig
from esr_distill.metrics import MetricsFile, read_metrics
from esr_distill.monitoring.sample_table import SAMPLES_FILE
from esr_distill.monitoring.trackers import numbers_of, open_trackers

METRICS_FILE = "metrics.jsonl"


class RunLog:
    """metrics.jsonl gets every record, as one line; trackers get its numbers; samples.jsonl gets sample rollouts.

        with RunLog(config, output_dir) as log:
            log.write(record)

    Trackers are open inside the `with`. The files need no closing. What cannot be written is a WriteError.
    """

    def __init__(self, config: TrainConfig, output_dir: Path) -> None:
        self.config, self.output_dir = config, output_dir
        self.metrics, self.samples = MetricsFile(output_dir / METRICS_FILE), MetricsFile(output_dir / SAMPLES_FILE)
        self.trackers: list = []

    def __enter__(self) -> "RunLog":
        self.trackers = open_trackers(self.config, self.output_dir)
        return self

    def __exit__(self, *_: object) -> None:
        for tracker in self.trackers:
            tracker.finish()

    def start_anew(self) -> None:
        """Forget what an earlier run left in the folder."""
        for file in (self.metrics, self.samples):
            file.path.unlink(missing_ok=True)

    def go_on_after(self, step: int) -> None:
        """Forget what was written after `step`: the run that goes on writes it again."""
        for file in (self.metrics, self.samples):
            if file.path.exists():
                with write_errors(file.path):
                    file.drop_after(step)

    def steps(self) -> list[dict]:
        """The steps that are recorded."""
        return read_metrics(self.metrics.path, "step")

    def write(self, record: dict) -> None:
        with write_errors(self.metrics.path):
            self.metrics.write(record)
        if self.trackers:
            numbers = numbers_of(record)
            for tracker in self.trackers:
                tracker.log(numbers, step=record["step"])

    def write_samples(self, rows: list[dict]) -> None:
        with write_errors(self.samples.path):
            for row in rows:
                self.samples.write(row)
