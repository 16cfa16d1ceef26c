"""The demo's results as a table, a picture and a page."""

import base64
import html
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table

from esr_distill.complete_files import complete_file, write_text
from esr_distill.evaluation.accuracy import percent

# The loss-masked arm is dashed and drawn last: its line lies on that of ESR, which trains on the same tokens.
STYLES = {
    "teacher": {"color": "black", "linestyle": ":"},
    "student": {"color": "tab:gray", "linewidth": 1.2},
    "full": {"color": "tab:blue", "linewidth": 1.6},
    "esr": {"color": "tab:red", "linewidth": 2.2},
    "full-loss-masked": {"color": "tab:green", "linewidth": 1.4, "linestyle": "--"},
}
ENOUGH_ROLLOUTS = 32
HEADINGS = (
    "model",
    "accuracy (%)",
    "training time (s)",
    "s / step",
    "tokens generated",
    "tokens trained",
    "reply length",
)


def table_rows(results: dict) -> list[tuple[str, ...]]:
    """Teacher, student and the arms, as text; columns as in HEADINGS."""
    rows = [
        (role, _accuracy(model), "", "", "", "", f"{model['mean_length']:.1f}")
        for role, model in results["models"].items()
    ]
    for arm in results["arms"].values():
        rows.append(
            (
                arm["title"],
                _accuracy(arm),
                f"{arm['train_seconds']:.1f}",
                f"{arm['train_seconds'] / arm['steps']:.3f}",
                f"{arm['generated_tokens']:,}",
                f"{arm['trained_tokens']:,}",
                f"{arm['mean_length']:.1f}",
            )
        )
    return rows


def _accuracy(model: dict) -> str:
    return percent(model["accuracy"], model["standard_error"]).replace("+-", "±")


def print_table(results: dict, console: Console) -> None:
    """Print what the page also shows."""
    table = Table(title=f"task {results['settings']['task']}: {caption(results)}", title_justify="left")
    for i, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if i else "left", overflow="fold")
    for row in table_rows(results):
        table.add_row(*row)
    console.print(table)


def caption(results: dict) -> str:
    """What the numbers mean, in one line."""
    count, steps = results["models"]["student"]["count"], results["settings"]["steps"]
    return f"greedy accuracy on {count} held-out problems, ± one standard error; {steps} steps an arm, one seed"


def write_picture(results: dict, path: Path) -> None:
    """Accuracy against time; divergence by position before and after; right steps by number."""
    figure, (accuracy, divergence, steps) = plt.subplots(1, 3, figsize=(17, 5.2), constrained_layout=True)
    draw_accuracy(accuracy, results)
    draw_divergence(divergence, results)
    draw_right_steps(steps, results)
    settings, machine = results["settings"], results["machine"]
    figure.suptitle(
        f"Early Stopping Rollout on the {settings['task']} task: {settings['steps']} steps, seed {settings['seed']}, "
        f"{machine['gpu'] or machine['processor']}, {machine['torch_threads']} threads",
        fontsize=12,
    )
    with complete_file(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)


def draw_accuracy(axes: Axes, results: dict) -> None:
    for name, arm in results["arms"].items():
        curve = arm["curve"]
        axes.errorbar(
            [point["train_seconds"] for point in curve],
            [100 * point["accuracy"] for point in curve],
            yerr=[100 * (point["standard_error"] or 0.0) for point in curve],
            label=arm["title"],
            marker="o",
            markersize=4,
            capsize=2,
            **STYLES[name],
        )
        count = curve[0]["count"]
    axes.axhline(100 * results["models"]["teacher"]["accuracy"], label="teacher", **STYLES["teacher"])
    axes.set(
        title="Accuracy against training time",
        xlabel="training time (s, without evaluation)",
        ylabel=f"accuracy on {count} held-out problems (%)",
        ylim=(0, 103),
    )
    axes.legend(loc="best", fontsize=9)
    axes.grid(alpha=0.3)


def draw_divergence(axes: Axes, results: dict) -> None:
    # Linear: a few decisive positions hold nearly all of the divergence, and what matters is whether they fall or rise.
    lines = {"student": {"title": "student before", **results["models"]["student"]}, **results["arms"]}
    highest = 0.0
    for name, model in lines.items():
        pairs = zip(model["reverse_kl_by_position"], model["rollouts_by_position"], strict=True)
        values = [value for value, count in pairs if count >= ENOUGH_ROLLOUTS]
        highest = max(highest, *values) if values else highest
        axes.plot(range(len(values)), values, label=model["title"], **STYLES[name])
    horizon = results["settings"]["horizon"]
    axes.axvline(horizon - 0.5, color="black", linestyle="--", linewidth=1, label=f"horizon of ESR: {horizon} tokens")
    axes.set(
        title="Divergence from the teacher by response position",
        xlabel=f"response position (tokens; positions that at least {ENOUGH_ROLLOUTS} rollouts reach)",
        ylabel="mean KL(student || teacher) on own rollouts (nats)",
        ylim=(0, 1.4 * highest or None),
    )
    axes.legend(loc="upper center", ncols=2, fontsize=9)
    axes.grid(alpha=0.3)


def draw_right_steps(axes: Axes, results: dict) -> None:
    models = results["models"]
    lines = {
        "teacher": {"title": "teacher", **models["teacher"]},
        "student": {"title": "student before", **models["student"]},
        **results["arms"],
    }
    for name, model in lines.items():
        shares = [100 * share for share in model["right_steps"]]
        axes.plot(range(1, len(shares) + 1), shares, label=model["title"], marker="o", markersize=4, **STYLES[name])
    axes.set(
        title="Right steps by place in the reply",
        xlabel="step of the calculation",
        ylabel="replies in which the step is right (%)",
        ylim=(0, 103),
    )
    axes.legend(loc="lower left", fontsize=9)
    axes.grid(alpha=0.3)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Early Stopping Rollout, demo</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .3rem .8rem; border-bottom: 1px solid #ccc; text-align: right; }}
td:first-child, th:first-child {{ text-align: left; }} img {{ max-width: 100%; }} small {{ color: #555; }}
</style></head><body>
<h1>On-policy distillation of a tiny student: {task} task</h1>
<p>{explanation}</p>
<table><tr>{headings}</tr>{rows}</table>
<p><small>{caption}. Training time leaves evaluation and saving out.</small></p>
<img alt="Accuracy against time, divergence by position, right steps by place" src="data:image/png;base64,{picture}">
<h2>How the student was made</h2>
<p>{fault}</p>
<p><small>{machine}</small></p>
</body></html>
"""
EXPLANATION = (
    "A student writes its own replies to sums, a frozen teacher scores every token of them, and the student is trained to "
    "move its next-token distribution toward the teacher's (reverse KL over the whole vocabulary). The arms start from the "
    "same student and see the same prompts: replies written to their end, replies stopped after {horizon} tokens (ESR), "
    "and replies written to their end of which only the first {horizon} tokens train. A full reply to a problem of "
    "{max_terms} terms has about {length:.0f} tokens."
)
FAULTS = {
    "rewrite": "The student is the teacher after a short training on sums in which every carry and borrow is forgotten. "
    "The fault is the same at every step, and each line of a reply is itself a shorter problem, so what is learnt within "
    "the horizon serves beyond it. That is a construction in favour of short horizons; run "
    "<code>esr-distill demo --task pointer</code> for a task where it is not so.",
    "pointer": "Each step must look up its operand in the prompt, at a place that depends on the step, so the steps behind "
    "the horizon need something that the steps within it do not exercise. Training on the prefix alone cannot repair "
    "them and may let them drift: compare the right steps by place.",
}


def write_report(results: dict, picture: Path, path: Path) -> None:
    """One self-contained page: table, picture, how the student's fault was made, machine."""
    settings, machine = results["settings"], results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    page = PAGE.format(
        task=html.escape(settings["task"]),
        explanation=EXPLANATION.format(
            horizon=settings["horizon"],
            max_terms=settings["max_terms"],
            length=results["models"]["teacher"]["mean_length"],
        ),
        headings="".join(f"<th>{html.escape(heading)}</th>" for heading in HEADINGS),
        rows="".join(
            "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in table_rows(results)
        ),
        caption=html.escape(caption(results)),
        picture=base64.b64encode(picture.read_bytes()).decode(),
        fault=FAULTS[settings["task"]],
        machine=html.escape(
            f"{machine['gpu'] or machine['processor']}, {machine['torch_threads']} threads, Python {machine['python']}, "
            f"{versions}, commit {machine['commit']}, seed {settings['seed']}, {results['total_seconds']:.0f} s in all"
        ),
    )
    write_text(path, page)
