"""What `handloop plan` prints of a forecast."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from train.commands.forecast import PROCESS_BYTES, Between, Forecast
from train.memory.gpus import gpus_of_size
from train.memory.outlook import GIB


def print_forecast(found: Forecast, console: Console) -> None:
    """Memory by component, the plan, and its speed or what would fit."""
    table = Table(title=f"{found.gpu.name}: {found.budget / GIB:.2f} GiB may be used", title_justify="left")
    table.add_column("on the GPU")
    table.add_column("GiB", justify="right")
    for name, num_bytes in found.plan.parts:
        if num_bytes:
            table.add_row(name, f"{num_bytes / GIB:.3f}")
    table.add_row("predicted peak", f"{found.plan.peak_bytes / GIB:.3f}", style="bold")
    console.print(table)
    lines = [*_needs(found), *(_between(found) if found.cluster.num_processes > 1 else []), *_speed(found)]
    lines += [f"note      {note}" for note in found.notes]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _needs(found: Forecast) -> list[str]:
    """The plan, and what it takes of the host."""
    plan, count = found.plan, found.cluster.num_gpus
    graph = ", as a CUDA graph" if plan.uses_graphs else ""
    paged = f"; {found.paged_bytes / GIB:.2f} GiB of optimizer state may be paged" if found.paged_bytes else ""
    machine = " on each machine" if found.cluster.num_nodes > 1 else ""
    processes = f"each of {count} processes" if count > 1 else "the process"
    lines = [
        f"plan      {plan}",
        f"batch     at most {plan.micro_batch_tokens:,} tokens in a micro-batch{graph}",
        f"host      {plan.host_bytes / GIB:.2f} GiB pinned{machine}, beside about {PROCESS_BYTES / GIB:.1f} GiB of "
        f"{processes}{paged}",
    ]
    if plan.streamed:
        traffic = plan.traffic_bytes / GIB
        lines.append(f"traffic   {traffic:.2f} GiB of weights to the GPU a micro-batch, forward and backward")
    return lines


def _between(found: Forecast) -> list[str]:
    """What goes between several GPUs."""
    between, cluster = found.between, found.cluster
    lines = [
        f"GPUs      {cluster}{_together(between)}",
        f"added     {between.added_bytes / GIB:.2f} GiB of gradients a step, of which each GPU sends "
        f"{between.sent_bytes / GIB:.2f} GiB at {between.rate / 1e9:,.3g} GB/s: {between.seconds:.2g} s",
    ]
    if between.peer_bytes:
        lines.append(
            f"parts     {between.peer_bytes / GIB:.1f} GiB of weights a step are read by each GPU from the others, at "
            f"{found.gpu.link / 1e9:,.0f} GB/s"
        )
    if cluster.num_nodes > 1:
        rates = ", ".join(f"{gbit:g} Gbit/s {faster:.2f}" for gbit, faster in between.speedups.items())
        lines.append(f"network   times as fast by what is between machines: {rates} (predicted, never measured)")
    return lines


def _together(between: Between) -> str:
    """How several GPUs work, and how much faster than one that has a process's work alone."""
    each = between.cluster.num_processes // between.num_groups
    if each == 1:
        return f", {between.speedup:.2f} times as fast as one with the same work for each"
    if between.num_groups == 1:
        return " that share each row's tokens"
    shared = f" in {between.num_groups} groups, of which each shares its rows' tokens"
    return f"{shared}; {between.speedup:.2f} times as fast as one group with the same work for each"


def _speed(found: Forecast) -> list[str]:
    """How fast it would be, or what would fit."""
    if not found.fits:
        return [f"does not fit: {found.advice}"]
    if found.tokens_per_second is None or found.step_seconds is None:
        names = ", ".join(gpu.name for gpu in gpus_of_size(found.gpu.memory_bytes))
        cards = f"; cards of this size are {names}" if names and not found.is_card else ""
        return [f"speed     unknown: its rates are not known; name a card with --gpu, or --probe it here{cards}"]
    basis = "predicted; linear attention was never measured" if found.plan.num_linear else "predicted"
    lines = [
        f"speed     about {found.tokens_per_second:,.0f} tokens/s ({basis}), {found.step_seconds:.3g} s a step",
    ]
    if found.seconds is not None:
        count = found.cluster.num_processes
        cards = f"{count if count > 1 else 'one'} {found.gpu.name}"
        lines.append(f"time      about {time_of(found.seconds)} on {cards}, without validation and saving")
    return lines


def time_of(seconds: float) -> str:
    """A predicted time in its largest unit: no more than two figures of it are known."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def print_known_gpus(found: Sequence[Forecast], console: Console) -> None:
    """A line for each known GPU."""
    table = Table(title="known GPUs, predicted", title_justify="left")
    has_times = any(each.seconds is not None for each in found)
    for heading in ("GPU", "GiB", "peak GiB", "blocks kept", "streamed", "tokens/s", *(["time"] if has_times else [])):
        table.add_column(heading, justify="left" if heading == "GPU" else "right")
    for each in found:
        cells = ("", "", "does not fit")
        if each.tokens_per_second is not None:
            cells = (str(each.plan.num_kept), str(len(each.plan.streamed)), f"{each.tokens_per_second:,.0f}")
            cells += (time_of(each.seconds),) if each.seconds is not None else ()
        table.add_row(each.gpu.name, f"{each.budget / GIB:.1f}", f"{each.plan.peak_bytes / GIB:.2f}", *cells)
    console.print(table)
    if untried := [each.gpu.name for each in found if each.gpu.is_untried]:
        console.print(f"nothing was ever tried on Blackwell: {', '.join(untried)}", highlight=False, soft_wrap=True)
