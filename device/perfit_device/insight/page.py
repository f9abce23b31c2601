"""One HTML page with everything in it: no script, no request, and no text that a browser reads as markup."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape

from perfit_device.insight.charts import Bar, Line, bars, lines
from perfit_device.insight.report import Answered, Insight, Learned
from perfit_device.training.journal import Entry
from perfit_shared.terminal import clean

__all__ = ["render"]

_SHOWN = 10  # examples
_LONGEST = 280  # characters of a text

_STYLE = """
:root { color-scheme: light dark; --ground: #fbfaf7; --card: #ffffff; --ink: #1d2126; --soft: #5b636d;
  --rule: #e2dfd7; --one: #2f6f6b; --two: #b4632a; --three: #8a8f98; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171a; --card: #1c2024; --ink: #e7e6e1;
  --soft: #a2a9b1; --rule: #32383e; --one: #6cc2b9; --two: #e79a61; --three: #7d858f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 46rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 0 0 .25rem; }
p { margin: .25rem 0 .75rem; }
section > :last-child { margin-bottom: 0; }
code { white-space: nowrap; }
.soft, figcaption, caption { color: var(--soft); font-size: .9rem; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; padding: 1.25rem;
  margin-top: 1.25rem; }
figure { margin: .75rem 0; }
svg { display: block; width: 100%; max-width: 36rem; height: auto; margin: .5rem 0;
  font: 14px system-ui, sans-serif; }
svg.small { width: 60px; }
@media (max-width: 30rem) { svg.small { display: none; } main { padding: 1.5rem .75rem; } }
svg text { fill: var(--ink); }
svg .tick { fill: var(--soft); font-size: 13px; }
svg .end { text-anchor: end; }
svg .middle { text-anchor: middle; }
.grid { stroke: var(--rule); }
.line { fill: none; stroke-width: 2.5; }
.line.one, .dot.one { stroke: var(--one); }
.line.two, .dot.two { stroke: var(--two); }
.line.three, .dot.three { stroke: var(--three); }
.line.three { stroke-dasharray: 5 4; }
.dot { stroke-width: 2; }
.dot.one { fill: var(--one); } .dot.two { fill: var(--two); } .dot.three { fill: var(--three); }
.dot.hollow { fill: var(--card); }
.bar.one { fill: var(--one); } .bar.three { fill: var(--three); }
.key { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 0; padding: 0; list-style: none;
  color: var(--soft); font-size: .9rem; }
.key span { display: inline-block; width: 1.1em; height: .25em; border-radius: 2px; margin-right: .45em;
  vertical-align: middle; }
.key .one { background: var(--one); } .key .two { background: var(--two); }
.key .three { background: var(--three); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .25rem; }
th, td { text-align: right; padding: .3rem .5rem; border-top: 1px solid var(--rule); vertical-align: top;
  white-space: nowrap; }
th { white-space: normal; font-weight: 600; color: var(--soft); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.text { text-align: left; overflow-wrap: anywhere; white-space: normal; }
.text b { display: block; font-weight: 600; }
dl { margin: 1rem 0 0; padding-top: .75rem; border-top: 1px solid var(--rule); }
dt { color: var(--soft); font-size: .85rem; }
dd { margin: 0 0 .5rem; overflow-wrap: anywhere; white-space: pre-line; }
dd.one { border-left: 3px solid var(--one); padding-left: .6rem; }
@media print { body { background: none; } section { break-inside: avoid; border-color: #bbb; }
  main { max-width: none; padding: 0; } }
"""


def render(insight: Insight) -> str:
    """The page, in UTF-8."""
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    title = f"What your shift for {insight.artefact} learned"
    sections = [
        _updates(insight.updates),
        _measured(insight),
        _layers(insight),
        _examples(insight),
        _answers(insight.answers),
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="referrer" content="no-referrer">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{_text(title)}</h1>
<p class="soft">Version {insight.version}, as of {_day(insight.date)}. This page holds texts of your own:
keep it where you would keep a diary. Losses are in nats a token, and lower is better.</p>
{"".join(sections)}
</main>
</body>
</html>
"""


def _text(text: str, most: int = 0) -> str:
    """Escaped, without characters that steer a reader's eye, and cut after `most` characters."""
    plain = clean(text).strip()
    return escape(plain if not most or len(plain) <= most else plain[:most].rstrip() + " …", quote=True)


def _day(date: str) -> str:
    return _text(date.partition("T")[0])


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{body}\n</section>\n"


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in rows)
    return (
        f'<div class="scroll"><table><caption>{caption}</caption><thead><tr>{top}</tr></thead>'
        f"<tbody>\n{body}</tbody></table></div>"
    )


def _figure(picture: str, caption: str) -> str:
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _updates(entries: Sequence[Entry]) -> str:
    if not entries:
        return _section("Loss of each update", "<p>No update has been recorded yet.</p>")
    series = [
        Line("training, at its end", "two", [each.train_after for each in entries]),
        Line("gate, before", "three", [each.gate_before for each in entries]),
        Line("gate, after", "one", [each.gate_after for each in entries]),
    ]
    key = "".join(f'<li><span class="{each.css}"></span>{each.name}</li>' for each in series)
    labels = [str(n) for n in range(1, len(entries) + 1)]
    picture = lines("Loss of each update", labels, series, [each.accepted for each in entries])
    caption = "A hollow point is an update that the gate kept out. The gate has examples that did not train."
    rows = [
        [
            str(n),
            _day(each.date),
            str(each.examples),
            f"{each.train_before:.3f} → {each.train_after:.3f}",
            f"{each.gate_before:.3f} → {each.gate_after:.3f}",
            "kept out" if not each.accepted else f"version {each.version}",
        ]
        for n, each in enumerate(entries, start=1)
    ]
    head = ["Update", "Date", "Examples", "Training", "Gate", "Became"]
    body = f'<ul class="key">{key}</ul>' + _figure(picture, caption)
    return _section("Loss of each update", body + _table("The same in figures", head, rows))


def _measured(insight: Insight) -> str:
    measured = insight.measured
    if measured is None:
        return _section(
            "Which way is better", "<p>Not measured yet: <code>perfit evaluate --with-seed</code> does.</p>"
        )
    best = measured.best
    values = [
        Bar(name, loss, f"{loss:.3f}", "one" if name == best else "three")
        for name, loss in measured.loss.items()
    ]
    old = "" if measured.version == insight.version else f" That was version {measured.version or '–'}."
    caption = f"Loss on {measured.examples} test examples, by evaluate on {_day(measured.date)}.{old}"
    rows = [
        [_text(name), f"{loss:.4f}", f"{measured.metric.get(name, float('nan')):.4f}"]
        for name, loss in measured.loss.items()
    ]
    table = _table("The same in figures", ["Shift", "Loss", _text(measured.metric_name)], rows)
    picture = _figure(bars("Loss of each shift on test examples", values), caption)
    return _section("Which way is better", f"<p><b>{_text(best)}</b> loses least.</p>" + picture + table)


def _layers(insight: Insight) -> str:
    title = "Distance from the seed"
    if not insight.layers:
        return _section(
            title, "<p>The seed is not kept on this device: <code>--online</code> fetches it.</p>"
        )
    values = [Bar(f"layer {each.number}", each.moved, f"{each.moved:.3f}") for each in insight.layers]
    caption = (
        "How far the map itself moved in each layer, however its numbers are written: the Frobenius norm of "
        "what your shift adds to a hidden state beyond the seed."
    )
    rows = [[str(each.number), f"{each.moved:.4f}", f"{each.seed:.4f}"] for each in insight.layers]
    table = _table("The same in figures", ["Layer", "Yours from the seed", "The seed from nothing"], rows)
    return _section(title, _figure(bars("Distance from the seed in each layer", values), caption) + table)


def _examples(insight: Insight) -> str:
    title = "What it learned most of"
    if not insight.examples:
        return _section(title, "<p>Not scored yet: <code>perfit insight --online</code> does.</p>")
    shown = insight.examples[:_SHOWN]
    mean = sum(each.drop for each in insight.examples) / len(insight.examples)
    text = f"Of {len(insight.examples)} examples that trained, the loss fell by {mean:.3f} on average"
    if insight.gain_on_test is not None:
        text += (
            f", and by {insight.gain_on_test:.3f} on test examples; a far smaller one means learned by heart"
        )
    old = "" if insight.examples_version == insight.version else f" under version {insight.examples_version}"
    most = max(each.drop for each in shown) or 1.0
    rows = [[_shown(each), _small_bar(each.drop / most), _fall(each)] for each in shown]
    table = _table(
        f"Loss under the seed and under your shift, scored on {_day(insight.examples_date)}{old}",
        ["Example", "", "Loss"],
        rows,
    )
    return _section(title, f"<p>{text}.</p>{table}")


def _shown(each: Learned) -> str:
    prompt, answer = _text(each.prompt, _LONGEST), _text(each.answer, _LONGEST)
    return f'<div class="text"><b>{answer}</b>{prompt}</div>'


def _small_bar(share: float) -> str:
    width = max(1.0, 60 * max(0.0, share))
    return (
        '<svg class="small" viewBox="0 0 60 12" width="60" height="12" aria-hidden="true">'
        f'<rect class="bar one" x="0" y="0" width="{width:.1f}" height="12" rx="2"/></svg>'
    )


def _fall(each: Learned) -> str:
    return f"{each.before:.2f}&nbsp;→&nbsp;{each.after:.2f}"


def _answers(answers: Sequence[Answered]) -> str:
    title = "Base beside personal"
    if not answers:
        return _section(title, "<p>Not asked: <code>perfit insight --online</code> does.</p>")
    cards = "".join(
        f"<dl><dt>Question</dt><dd>{_text(each.prompt, _LONGEST)}</dd>"
        f"<dt>You</dt><dd>{_text(each.mine, _LONGEST)}</dd>"
        f"<dt>Base model</dt><dd>{_text(each.base, _LONGEST)}</dd>"
        f'<dt>Personal</dt><dd class="one">{_text(each.personal, _LONGEST)}</dd></dl>\n'
        for each in answers
    )
    return _section(title, f"<p>On examples of yours that no shift was trained on.</p>{cards}")
