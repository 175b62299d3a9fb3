"""What benchmarks/speed.py found, as tables and a picture."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ssl_bench.report.tables import markdown

COLOURS = {"plain": "#9aa5b1", "plain, tuned": "#66717d", "lightly": "#5b7fa6"}
COLOURS |= {"lightly, tuned": "#2f4d6e", "ours": "#d1495b"}


def tables(result: dict) -> str:
    """Markdown."""
    sections = {
        "contenders": contenders,
        "startup": startup,
        "parts": all_parts,
        "by_batch": by_batch,
        "by_size": by_size,
    }
    return "\n\n".join(
        [heading(result), *(write(result) for name, write in sections.items() if name in result)]
    )


def table(*rows: list[str], left: int = 1) -> str:
    """The first row is the heading; the first `left` columns are text, the others numbers."""
    return markdown(rows[0], list(rows[1:]), right=len(rows[0]) - left)


def middle(found: dict, digits: int = 1) -> str:
    return f"{found['median']:,.{digits}f} ({found['min']:,.{digits}f}-{found['max']:,.{digits}f})"


def heading(result: dict) -> str:
    hardware = ", ".join(result["gpus"]) if result["device"] == "cuda" else "no GPU used"
    memory = f"{result['memory_bytes'] / 1e9:.0f} GB"
    versions = ", ".join(f"{name} {version}" for name, version in result["packages"].items())
    commit = result["git_commit"][:12] + (" with changes" if result["git_dirty"] else "")
    return f"""# Speed on {result["device"]}

`python benchmarks/speed.py`, {result["started"]}, commit {commit}, {result["minutes"]:.0f} minutes.
{result["cpu"]}: {result["cpus"]} cores, {result["cpu_threads"]} threads, {memory}; {hardware}.
Python {result["python"]}, {versions}."""


def contenders(result: dict) -> str:
    found, plan = result["contenders"], result["plan"]
    names = [*found["workers"], "ours"]
    rows = [
        [
            f"{row['backbone']}, batch {row['batch']}",
            *(middle(row["images_per_second"][name]) for name in names),
            *(f"{row['ratio'][name]:.2f}" for name in found["workers"]),
        ]
        for row in found["rows"]
    ]
    workers = ", ".join(f"{name} {number}" for name, number in found["workers"].items())
    busiest = max(
        one["others"] for row in found["rows"] for done in row["repeats"].values() for one in done
    )
    packing = result["packing"]
    shape = f"{plan['image_size']} pixels, queue {plan['queue']:,}"
    cost = f"{packing['seconds']:.1f} s ({packing['images_per_second']:,.0f} images/s)"
    choice = "the best number for each" if found["tuning"] else "as asked for"
    others = "Other programs" + " and what compiles" * any(
        word == "compile=true" for word in plan["ours"]
    )
    note = f"""## End to end, images/s

MoCo v2 at {shape}, from {packing["images"]:,} PNG names of {plan["files"]:,} files, \
in the page cache for all.
Median (least-most) of {result["repeats"]} turns, windows of {plan["steps"]} steps, once warm.
The peers: float32, eager, contiguous; tuned: bfloat16 autocast, channels_last, a fused optimizer, \
on a GPU compiled. Data workers, {choice}: {workers}.
Ours: `{" ".join(plan["ours"])}`, after packing once in {cost}.
{others} took at most {busiest:.2f} of the {result["cpus"]} cores in any turn.

"""
    return note + table(["", *names, *(f"ours / {name}" for name in found["workers"])], *rows)


def startup(result: dict) -> str:
    rows = [[name, middle(found, 2)] for name, found in result["startup"].items()]
    return (
        "## From the start of the process, s\n\n"
        "With a packed store; the first step is part of it.\n\n" + table(["to", "s"], *rows)
    )


def all_parts(result: dict) -> str:
    return "\n\n".join([*map(parts, result["parts"]), one_core(result["parts"][0])])


def parts(row: dict) -> str:
    total = sum(row["seconds"].values())
    rates = row["rates"]
    rows, least = [], 0.0
    for name, seconds in row["seconds"].items():
        floor = max(row["flops"][name] / rates["flops"], row["bytes"].get(name, 0) / rates["bytes"])
        least += floor
        ratio = [f"{1000 * floor:,.1f}", f"{seconds / floor:.1f}"] if floor else ["", ""]
        rows.append([name, f"{1000 * seconds:,.1f}", f"{100 * seconds / total:.1f}", *ratio])
    rows.append(
        ["all", f"{1000 * total:,.1f}", "100.0", f"{1000 * least:,.1f}", f"{total / least:.1f}"]
    )
    gather = row["gather"]
    floor = gather["bytes"] / rates["bytes"]
    beside = (
        f"{1000 * gather['seconds']:,.1f}",
        "",
        f"{1000 * floor:,.1f}",
        f"{gather['seconds'] / floor:.1f}",
    )
    rows.append(["beside it, in a thread: gather a batch", *beside])
    note = f"""## Parts of our step: {row["backbone"]}, batch {row["batch"]}

{whole(row)}Not compiled.
Floor: operations at the measured rate of a large matrix product \
({rates["flops"] / 1e9:,.0f} GFLOP/s),
or bytes that must move at the measured rate of memory ({rates["bytes"] / 1e9:,.1f} GB/s), \
whichever takes longer.

"""
    return note + table(["part", "ms a step", "share, %", "floor, ms", "times the floor"], *rows)


def whole(row: dict) -> str:
    if not row.get("profile"):
        return ""
    busy, augmenting = (1000 * row["profile"][key] for key in ("busy", "augmenting"))
    return (
        f"As the program runs it the GPU computes {busy:.1f} ms a step, "
        f"{augmenting:.1f} ms of them the augmentation ({100 * augmenting / busy:.1f} %).\n"
        "The parts are timed by waiting after each, one kernel after another. "
    )


def one_core(row: dict) -> str:
    rows = [[name, f"{rate:,.0f}"] for name, rate in row["one_core"].items()]
    return "## One core\n\n" + table(["", "a second"], *rows)


def by_batch(result: dict) -> str:
    rows = [[str(row["batch"]), middle(row["images_per_second"])] for row in result["by_batch"]]
    return f"## Ours by batch size: {result['by_batch'][0]['backbone']}\n\n" + table(
        ["batch", "images/s"], *rows, left=0
    )


def by_size(result: dict) -> str:
    rows = [
        [
            f"{row['images']:,}",
            middle(row["images_per_second"], 0),
            f"{row['private_bytes'] / 1e9:.2f}",
            f"{row['first_line_seconds']:.1f}",
            f"{row['packing']['images_per_second']:,.0f}",
        ]
        for row in result["by_size"]
    ]
    head = [
        "images",
        "images/s",
        "private memory, GB",
        "start to first line, s",
        "packing, images/s",
    ]
    return (
        "## Ours by size of the data set\n\nA small network, so that the loop is measured; "
        + f"{result['plan']['small_steps']} steps a line.\n\n"
        + table(head, *rows, left=0)
    )


def plot(result: dict, path: Path) -> None:
    """A panel for each of what was measured over batches, data sets or contenders; no file where
    nothing was.
    """
    panels = {"contenders": end_to_end, "by_batch": batches, "by_size": sizes}
    drawn = [name for name in panels if name in result]
    if not drawn:
        return
    figure, axes = plt.subplots(
        1, len(drawn), figsize=(4 * len(drawn), 3.6), layout="constrained", squeeze=False
    )
    for place, name in zip(axes[0], drawn, strict=True):
        panels[name](place, result)
        place.set_ylabel("images/s")
        place.set_ylim(0, 1.15 * place.dataLim.y1)
        place.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def end_to_end(axes: plt.Axes, result: dict) -> None:
    found = result["contenders"]
    names = [*found["workers"], "ours"]
    width = 0.78 / len(names)
    for place, name in enumerate(names):
        rates = [row["images_per_second"][name] for row in found["rows"]]
        middles = [rate["median"] for rate in rates]
        below_above = [
            [m - r["min"] for m, r in zip(middles, rates, strict=True)],
            [r["max"] - m for m, r in zip(middles, rates, strict=True)],
        ]
        at = [group + (place - (len(names) - 1) / 2) * width for group in range(len(rates))]
        drawn = axes.bar(
            at,
            middles,
            0.92 * width,
            yerr=below_above,
            label=name,
            color=COLOURS[name],
            ecolor="#444",
            capsize=2,
        )
        axes.bar_label(drawn, [f"{value:,.0f}" for value in middles], padding=3, fontsize=8)
    axes.set_xticks(
        range(len(found["rows"])),
        [f"{row['backbone']}\nbatch {row['batch']}" for row in found["rows"]],
    )
    axes.set_title(f"End to end on {result['device']}")
    axes.legend(frameon=False)


def batches(axes: plt.Axes, result: dict) -> None:
    curve(axes, result["by_batch"], "batch")
    axes.set_title(f"Ours by batch size, {result['by_batch'][0]['backbone']}")


def sizes(axes: plt.Axes, result: dict) -> None:
    curve(axes, result["by_size"], "images")
    axes.set_title("Ours by data set, a small network")


def curve(axes: plt.Axes, rows: list[dict], key: str) -> None:
    values = [row[key] for row in rows]
    rates = [row["images_per_second"] for row in rows]
    axes.fill_between(
        values,
        [r["min"] for r in rates],
        [r["max"] for r in rates],
        color=COLOURS["ours"],
        alpha=0.2,
        lw=0,
    )
    axes.plot(values, [r["median"] for r in rates], "o-", color=COLOURS["ours"])
    axes.set_xscale("log", base=2 if key == "batch" else 10)
    axes.set_xticks(
        values, [f"{value}" if value < 1000 else f"{value // 1000}k" for value in values]
    )
    axes.minorticks_off()
    axes.set_xlabel(key)
