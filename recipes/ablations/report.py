"""docs/ablations.md and its plot, from the results of the runs."""

import json
import statistics
from collections import defaultdict
from pathlib import Path

from longvlm.evaluation.storyline import KINDS
from recipes.ablations.variants import VARIANTS

BEGIN, END = "<!-- results: made by recipes/ablations/run.py -->", "<!-- end of results -->"
PLOT = "ablations.png"


def read_results(folder: Path) -> dict[str, list[dict]]:
    """variant -> its runs."""
    runs = defaultdict(list)
    for file in sorted(folder.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        runs[result["variant"]].append(result)
    return dict(runs)


def _spread(values: list[float]) -> str:
    mean = f"{100 * statistics.mean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def results_table(runs: dict[str, list[dict]]) -> str:
    """Markdown, in percent; ±: standard deviation over the seeds."""
    lines = [f"| | tokens | seeds | all | {' | '.join(KINDS)} |", f"|---|{'---:|' * (len(KINDS) + 3)}"]
    for variant in VARIANTS:
        if variant.name not in runs:
            continue
        its = runs[variant.name]
        kinds = [f"{100 * statistics.mean(run['kinds'][kind] for run in its):.0f}" for kind in KINDS]
        spread = _spread([run["accuracy"] for run in its])
        title = f"**{variant.title}**" if variant.main else variant.title
        lines.append(f"| {title} | {its[0]['tokens']} | {len(its)} | {spread} | {' | '.join(kinds)} |")
    return "\n".join(lines)


def plot(runs: dict[str, list[dict]], file: Path) -> None:
    """One bar a variant, a dot a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [variant for variant in VARIANTS if variant.name in runs][::-1]
    figure, axes = pyplot.subplots(figsize=(9, 0.42 * len(shown) + 1.2), layout="constrained")
    for row, variant in enumerate(shown):
        values = [100 * run["accuracy"] for run in runs[variant.name]]
        mean = statistics.mean(values)
        axes.barh(row, mean, color="#3b6ea5" if variant.main else "#a9b8c8", height=0.7)
        axes.plot(values, [row] * len(values), "o", color="black", markersize=3)
        axes.text(max(values) + 1.5, row, f"{mean:.1f}", va="center", fontsize=9)
    labels = [f"{variant.title}, {runs[variant.name][0]['tokens']} tokens" for variant in shown]
    axes.set_yticks(range(len(shown)), labels, fontsize=9)
    axes.set_xlim(0, 100)
    axes.set_xlabel("Storyline, test split: questions answered rightly (%). A dot is a run.")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    # Without a date, so that the same results give the same file.
    figure.savefig(file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def write_report(results: Path, folder: Path) -> None:
    """Puts table and plot into `folder`; text of ablations.md around the results stays."""
    runs = read_results(results)
    plot(runs, folder / PLOT)
    file = folder / "ablations.md"
    text = file.read_text(encoding="utf-8") if file.exists() else f"# Ablations\n\n{BEGIN}\n{END}\n"
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    any_run = next(iter(runs.values()))[0]
    minutes = sum(run["seconds"] for its in runs.values() for run in its) / 60
    about = (
        f"{any_run['steps']} steps of 12 stories with 10 questions each; {any_run['questions']} questions of the test "
        f"split; {sum(map(len, runs.values()))} runs, {minutes:.0f} minutes of training in all."
    )
    middle = f"{BEGIN}\n{results_table(runs)}\n\n{about}\n\n![The same as bars]({PLOT})\n{END}"
    file.write_text(before + middle + after, encoding="utf-8")
