"""The real demo's results as a table and a picture."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from esr_distill.complete_files import complete_file

HEADINGS = (
    "model",
    "accuracy (%)",
    "has #### n (%)",
    "finished (%)",
    "reply (tokens)",
    "KL in horizon (nats)",
    "KL past it (nats)",
)
COLORS = {"student before": "#7f7f7f", "student after": "#d62728"}


def table_rows(results: dict) -> list[tuple[str, ...]]:
    """One row a model, columns as in HEADINGS."""
    return [
        (
            name,
            f"{100 * model['accuracy']:.1f} ± {100 * model['standard_error']:.1f}",
            f"{100 * model['teacher_format']:.0f}",
            f"{100 * model['finished']:.0f}",
            f"{model['mean_length']:.0f}",
            _nats(model.get("reverse_kl_inside_horizon")),
            _nats(model.get("reverse_kl_past_horizon")),
        )
        for name, model in results["models"].items()
    ]


def _nats(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def summary(name: str, model: dict) -> str:
    """One line about one model."""
    return (
        f"{name}: accuracy {100 * model['accuracy']:.1f} ± {100 * model['standard_error']:.1f} % (n {model['count']}), "
        f"#### in {100 * model['teacher_format']:.0f} %, finished {100 * model['finished']:.0f} %, "
        f"{model['mean_length']:.0f} tokens; {model['seconds']:.0f} s"
    )


def print_table(results: dict, console: Console) -> None:
    """Accuracy, form and distance of the three models, what they mean, and the time of each stage."""
    settings, model = results["settings"], results["models"]["student after"]
    table = Table(
        title=f"SmolLM2-135M-Instruct on {model['count']} short GSM8K test problems, horizon {settings['horizon']}, "
        f"{settings['steps']} steps, seed {settings['seed']}",
        title_justify="left",
    )
    for i, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if i else "left", overflow="fold")
    for row in table_rows(results):
        table.add_row(*row)
    console.print(table)
    console.print(
        "Accuracy: of greedy replies (first number after #, else the last number), ± one standard error; it is low for a "
        "model of this size. KL: mean KL(student || teacher) on the student's own rollouts at temperature 1. The teacher is "
        f"the same model fine-tuned for {settings['teacher_steps']} steps on worked training solutions, not a stronger one.",
        highlight=False,
    )
    console.print(", ".join(f"{name} {seconds:.0f} s" for name, seconds in results["stage_seconds"].items()))


def write_picture(results: dict, path: Path) -> None:
    """Divergence by response position before and after; loss by step."""
    figure, (divergence, loss) = plt.subplots(1, 2, figsize=(13, 5.2), constrained_layout=True)
    draw_divergence(divergence, results)
    draw_loss(loss, results)
    settings, machine = results["settings"], results["machine"]
    figure.suptitle(
        f"Early Stopping Rollout, SmolLM2-135M-Instruct on GSM8K prompts: {settings['steps']} steps of "
        f"{results['distillation']['config']['rollout']['batch_size']} rollouts, seed {settings['seed']}, "
        f"{machine['gpu'] or machine['processor']}, {machine['torch_threads']} thread(s)",
        fontsize=12,
    )
    with complete_file(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)


def draw_divergence(axes: Axes, results: dict) -> None:
    """Single positions are noisy: points, under their running mean."""
    horizon, least = results["settings"]["horizon"], min(8, results["settings"]["problems"])
    for name, color in COLORS.items():
        model = results["models"][name]
        counts = model["rollouts_by_position"]
        values = [v for v, count in zip(model["reverse_kl_by_position"], counts, strict=True) if count >= least]
        axes.plot(range(1, len(values) + 1), values, ".", color=color, alpha=0.35, markersize=5)
        axes.plot(range(1, len(values) + 1), running_mean(values, 4), color=color, linewidth=1.8, label=name)
    axes.axvline(horizon + 0.5, color="black", linestyle="--", linewidth=1, label=f"horizon, {horizon} tokens")
    axes.set(
        title="Divergence from the teacher by response position (line: running mean)",
        xlabel=f"response position (tokens; positions that at least {least} rollouts reach)",
        ylabel="mean KL(student || teacher) on own rollouts (nats)",
    )
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=9)
    axes.grid(alpha=0.3)


def running_mean(values: list[float], reach: int) -> list[float]:
    """Mean over each position and up to `reach` neighbours on either side."""
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def draw_loss(axes: Axes, results: dict) -> None:
    loss = results["distillation"]["loss"]
    axes.plot(
        range(1, len(loss) + 1), loss, "o-", color=COLORS["student after"], markersize=4, label="distillation loss"
    )
    axes.set(
        title="Loss by step (fresh prompts in every step)",
        xlabel="distillation step",
        ylabel="mean KL(student || teacher) inside the horizon (nats)",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=9)
    axes.grid(alpha=0.3)
