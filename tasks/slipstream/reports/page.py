"""The report as one self-contained HTML page: styles and plots are in it.

MLflow shows it in a sandboxed frame of about 800 px, so its wide parts scroll, it contains no script, and it follows
the light or dark scheme of the browser.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from slipstream.contract import Verdict
from slipstream.contract.evidence import EngineEvidence, Row
from slipstream.plugins import SELECT
from slipstream.reports import layers, wording
from slipstream.reports.document import Figure, GateLine, Made, Report
from slipstream.reports.theme import CSS, themed

OUTCOMES = {
    "released": ("good", "✓ released"),
    "unchanged": ("good", "✓ unchanged"),
    "held": ("unsure", "◦ not rolled out"),
    "rejected": ("bad", "✕ rejected"),
    "stopped": ("bad", "✕ stopped in the small-scale test"),
    "rolled_back": ("bad", "✕ rolled back"),
    "failed": ("bad", "! failed"),
}
PLOTS = {
    "pareto": (
        "Quality against latency",
        "All engines took turns in one run, by which the release was picked; of those that may be as fast as the "
        "fastest, the smallest. Bars are the confidence bounds of the drop against the baseline and of the time to "
        "that of the fastest; the line joins the passing engines that no other beats on both axes.",
    ),
    "latency": (
        "Latency",
        "Single requests at batch 1, issued by LoadGen, candidates and baseline interleaved on the same machine. "
        "Not an MLPerf result.",
    ),
    "timeline": (
        "Small-scale test and rollout",
        "Who answered the traffic, and what the clients saw, window by window.",
    ),
}


def render(report: Report, plots: Mapping[str, str]) -> str:
    """Return the page; `plots` maps the names in PLOTS to their SVG. A part without data is omitted."""
    parts = [
        _head(report),
        _alert(report),
        _tiles(report),
        _engines(report),
        *(_plot(name, plots[name]) for name in PLOTS if name in plots),
        layers.section(report.layers),
        _gates(report),
        _lineage(report),
        _data(report),
        _machine(report),
    ]
    title = escape(f"{report.model}: slipstream report")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{CSS}</style></head>'
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _head(report: Report) -> str:
    tone, label = OUTCOMES[report.outcome]
    why = f'<p class="why">{escape(report.explanation)}</p>' if report.explanation else ""
    when = report.created.replace("T", " ").removesuffix("+00:00")
    return (
        f'<p class="eyebrow"><span class="pill {tone}">{label}</span><b>{escape(report.model)}</b>'
        f"<span>spec {escape(report.spec)}</span><span>{escape(when)} UTC</span>"
        f"<code>{escape(report.run_key)}</code></p><h1>{escape(report.headline)}.</h1>{why}"
    )


def _alert(report: Report) -> str:
    lines = [f"<b>{escape(f.where)}</b> failed: {escape(f.reason)}" for f in report.failures if f.step != SELECT]
    if report.missing:
        lines.append(f"No evidence for {escape(', '.join(report.missing))}; a missing engine never passes.")
    if not lines:
        return ""
    return '<div class="alert">' + "".join(f"<p>{line}</p>" for line in lines) + "</div>"


def tiles(report: Report) -> list[Figure]:
    """Return the figures at the top: those of the picked engine, or how many were judged and why none was picked."""
    row = report.winning_row
    if row is None or row.evidence is None:
        judged = [r for r in report.rows if r.status != "reference"]
        by_status = {s: sum(r.status == s for r in judged) for s in ("passed", "rejected", "inconclusive", "missing")}
        counts = [Figure(name=s, value=str(n)) for s, n in by_status.items() if n or s in ("passed", "rejected")]
        metric = wording.metric(report.objective.metric)
        allowed = Figure(name="allowed drop", value=f"{report.objective.max_drop:g} pt", note=metric)
        return [Figure(name="engines judged", value=str(len(judged))), *counts, allowed]
    e = row.evidence
    drop = f"drop {wording.points(e.drop_pp.low)} to {wording.points(e.drop_pp.high)}"
    figures = [Figure(name=f"{wording.metric(e.metric)}, held-out", value=f"{e.engine_quality:.2f} %", note=drop)]
    p99 = e.latency.p99_ms
    figures.append(
        Figure(name="p99 latency", value=f"{wording.milliseconds(p99)} ms", note=f"p50 {_ms(e.latency.p50_ms)}")
        if p99 is not None
        else Figure(name="p50 latency", value=_ms(e.latency.p50_ms), note="too few queries for a p99")
    )
    for name, gain in ((f"against {report.framework} eager", e.speedup_eager), ("against FP32", e.speedup_reference)):
        if gain is not None:
            figures.append(Figure(name=name, value=wording.ratio(gain.estimate), note=wording.bounds(gain)))
    return [*figures, Figure(name="engine size", value=wording.size(e.size_bytes))]


def _ms(value: float) -> str:
    return f"{wording.milliseconds(value)} ms"


def _tiles(report: Report) -> str:
    cells = (
        f'<div><dt>{escape(f.name)}</dt><dd class="value">{escape(f.value)}</dd><dd class="note">{escape(f.note)}</dd>'
        "</div>"
        for f in tiles(report)
    )
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def _engines(report: Report) -> str:
    if not report.rows:
        return ""
    span = _drop_span(report)
    goal = report.objective
    scale = f"0 to {goal.max_drop:g} pt allowed"
    confidence = f"{goal.confidence * 100:g} %"
    surer = f"{max((r.evidence.confidence for r in report.rows if r.evidence), default=goal.confidence) * 100:.4g} %"
    head = (
        '<tr><th class="text">engine</th><th class="text">verdict</th>'
        f"<th>{escape(wording.metric(goal.metric))}<small>%</small></th><th>drop<small>{surer} bounds</small></th>"
        f'<th class="drawn" aria-label="drop, drawn"><small>{escape(scale)}</small></th>'
        f"<th>p50<small>ms</small></th><th>p99<small>ms</small></th>"
        f"<th>against eager<small>{confidence} bounds</small></th>"
        f"<th>against FP32<small>{confidence} bounds</small></th>"
        "<th>rate<small>per s</small></th><th>size<small>gzipped</small></th>"
        "<th>memory<small>peak, MiB</small></th></tr>"
    )
    body = "".join(_engine(report, row, span) for row in report.rows)
    return (
        "<h2>Engines</h2><p>Every engine that was built, judged as it would be deployed. FP32 is the baseline's own "
        "FP32 engine on the same target; an engine that is not faster than that is rejected. "
        f"{escape(wording.best_of(report.rows, goal.confidence))}</p>"
        f'<div class="scroll"><table><thead>{head}</thead>{body}</table></div>'
    )


def _engine(report: Report, row: Row, span: tuple[float, float]) -> str:
    recipe, _, target = row.cell.partition("@")
    release = ' class="release"' if row.release else ""
    name = f'<td class="text"><b>{escape(recipe)}</b><small>{escape(target)}</small></td>'
    picked = "<small>picked</small>" if row.release else "<small>for comparison</small>" if row.comparison else ""
    glyph = wording.STATUS_GLYPH[row.status]
    verdict = f'<td class="text"><span class="{row.status}">{glyph} {row.status}</span>{picked}</td>'
    figures = _figures(row.evidence, report.objective.max_drop, span) if row.evidence else '<td colspan="10"></td>'
    reasons = "; ".join(f"{v.gate}: {v.reason}" for v in row.verdicts if not v.passed)
    reason = f'<tr class="reason"><td></td><td colspan="11">{escape(reasons)}</td></tr>' if reasons else ""
    return f'<tbody{release}><tr class="lead">{name}{verdict}{figures}</tr>{reason}</tbody>'


def _figures(e: EngineEvidence, allowed: float, span: tuple[float, float]) -> str:
    interval = f"<small>{wording.points(e.drop_pp.low)} to {wording.points(e.drop_pp.high)}</small>"
    cells = [
        wording.percent(e.engine_quality),
        wording.points(e.drop_pp.estimate) + interval,
        wording.milliseconds(e.latency.p50_ms),
        wording.milliseconds(e.latency.p99_ms),
    ]
    for gain in (e.speedup_eager, e.speedup_reference):
        speedup = f"{wording.ratio(gain.estimate)}<small>{wording.bounds(gain)}</small>" if gain else wording.DASH
        cells.append(speedup)
    gzipped = f"<small>{wording.size(e.size_gzip_bytes)}</small>" if e.size_gzip_bytes is not None else ""
    arena = f"<small>arena {wording.size(e.arena_bytes)}</small>" if e.arena_bytes is not None else ""
    memory = wording.DASH if e.peak_memory_mib is None else f"{e.peak_memory_mib:.0f}"
    cells += [wording.rate(e.latency.rate_per_s), wording.size(e.size_bytes) + gzipped, memory + arena]
    drawn = f'<td class="drawn">{_interval(e, allowed, span)}</td>'
    return "".join(f"<td>{cell}</td>" for cell in cells[:2]) + drawn + "".join(f"<td>{cell}</td>" for cell in cells[2:])


def _drop_span(report: Report) -> tuple[float, float]:
    """Return the range of the drawn drop intervals: all of them, zero and the allowed drop."""
    drops = [r.evidence.drop_pp for r in report.rows if r.evidence]
    low = min([0.0, *(d.low for d in drops)])
    high = max([report.objective.max_drop, *(d.high for d in drops)])
    margin = (high - low) * 0.05
    return low - margin, high + margin


def _interval(e: EngineEvidence, allowed: float, span: tuple[float, float]) -> str:
    """Return a small drawing of the drop: its interval, the zero line and the allowed drop."""

    def x(value: float) -> float:
        return round((value - span[0]) / (span[1] - span[0]) * 104, 1)

    d = e.drop_pp
    tone = "bad" if d.high > allowed else "good"
    return (
        f'<svg class="interval" viewBox="0 0 104 16" role="img" aria-label="drop {escape(wording.drop(d))}">'
        f'<path d="M{x(0)} 1V15" stroke="var(--line)" stroke-width="1.5"/>'
        f'<path d="M{x(allowed)} 1V15" stroke="var(--bad)" stroke-dasharray="2 2"/>'
        f'<path d="M{x(d.low)} 8H{x(d.high)}" stroke="var(--{tone})" stroke-width="2"/>'
        f'<circle cx="{x(d.estimate)}" cy="8" r="3.2" fill="var(--{tone})"/></svg>'
    )


def _plot(name: str, svg: str) -> str:
    title, caption = PLOTS[name]
    return f"<h2>{title}</h2><p>{caption}</p><figure>{themed(svg)}</figure>"


def _gates(report: Report) -> str:
    if not report.gates:
        return ""
    head = ("step", "gate", "answer", "evidence", "estimate", "interval", "limit", "n")
    rows = "".join(_gate(line) for line in report.gates)
    passed = sum(g.verdict.passed for g in report.gates)
    return _folded("Gates", f"{passed} of {wording.count(len(report.gates), 'verdict')} pass", _table(head, rows, 4))


def _gate(line: GateLine) -> str:
    v = line.verdict
    where = f"{escape(line.step)}<small>{escape(line.cell)}</small>" if line.cell else escape(line.step)
    answer = f'<span class="{v.answer}">{wording.ANSWER_GLYPH[v.answer]} {v.answer}</span>'
    texts = (where, escape(v.gate), answer)
    numbers = (_number(v.estimate, v.unit), _bounds(v), _number(v.limit, v.unit), f"{v.n:,}" if v.n else wording.DASH)
    return (
        '<tr class="lead">'
        + "".join(f'<td class="text">{t}</td>' for t in texts)
        + f'<td class="text wrap">{escape(v.reason)}</td>'
        + "".join(f"<td>{n}</td>" for n in numbers)
        + "</tr>"
    )


def _number(value: float | None, unit: str) -> str:
    return wording.DASH if value is None else escape(f"{value:.4g} {unit}".strip().replace("-", "−"))


def _bounds(v: Verdict) -> str:
    if v.low is None and v.high is None:
        return wording.DASH
    return " to ".join("…" if b is None else f"{b:.4g}".replace("-", "−") for b in (v.low, v.high))


def _lineage(report: Report) -> str:
    if not report.made:
        return ""
    reused = sum(m.reused for m in report.made)
    note = f"{wording.count(len(report.made), 'result')}, {reused} reused from earlier runs"
    head = ("step", "cell", "made", "MLflow run", "MLflow model", "sha256", "size")
    return _folded("Lineage", note, _table(head, "".join(_made(m) for m in report.made), 6))


def _made(m: Made) -> str:
    cells = [
        escape(m.step),
        escape(m.cell or ""),
        "reused" if m.reused else "in this run",
        f"<code>{escape(m.run_id)}</code>",
        f"<code>{escape(m.model_id)}</code>" if m.model_id else wording.DASH,
        f'<code title="{escape(m.sha256)}">{escape(m.sha256[:12])}…</code>' if m.sha256 else wording.DASH,
    ]
    return (
        '<tr class="lead">'
        + "".join(f'<td class="text">{c}</td>' for c in cells)
        + f"<td>{wording.size(m.size_bytes)}</td></tr>"
    )


def _data(report: Report) -> str:
    if not report.data:
        return ""
    facts = {f"{split} split": f"sha256 {digest}" for split, digest in report.data.items()}
    first = next((r.evidence for r in report.rows if r.evidence), None)
    if first:
        facts |= {"judged on": f"{first.samples:,} held-out samples"}
    return _folded("Data", "by digest", _facts(facts))


def _machine(report: Report) -> str:
    if not report.hardware:
        return ""
    noise = [r.evidence.noise for r in report.rows if r.evidence]
    facts = {name.replace("_", " "): value for name, value in report.hardware.items() if value}
    if noise:
        clean, rounds = sum(n.clean_rounds for n in noise), sum(n.rounds for n in noise)
        facts["clean rounds"] = f"{clean} of {rounds}" + (
            "; the other rounds shared the machine with other work, and the intervals are wider for it"
            if any(n.noisy for n in noise)
            else ""
        )
    measured_on = sorted({r.evidence.hardware for r in report.rows if r.evidence})
    facts |= {"measured on": "; ".join(measured_on)} if measured_on else {}
    return _folded("Machine", report.hardware.get("cpu", ""), _facts(facts))


def _folded(title: str, note: str, body: str) -> str:
    return f"<details><summary>{escape(title)} <span>{escape(note)}</span></summary>{body}</details>"


def _table(head: Sequence[str], rows: str, texts: int) -> str:
    cells = "".join(f"<th{' class=text' if i < texts else ''}>{escape(h)}</th>" for i, h in enumerate(head))
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table></div>'


def _facts(facts: Mapping[str, str]) -> str:
    pairs: Iterable[str] = (f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    return f'<dl class="facts">{"".join(pairs)}</dl>'
