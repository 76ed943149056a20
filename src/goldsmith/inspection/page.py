"""An inspection as one HTML file that needs no other. Everything that comes from the data is escaped."""

from __future__ import annotations

import jinja2
from markupsafe import Markup

from goldsmith.inspection.lengths import bars_svg
from goldsmith.inspection.report import InspectReport, duration, losses_line, rows_line
from goldsmith.inspection.visible import near, visible
from goldsmith.storage import format_bytes

__all__ = ["html_page"]

_SHOWN_PLACES = 100
_SHOWN_TOKENS = 4000

_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>goldsmith inspect {{ report.output_dir | visible }}</title>
<style>
:root { color-scheme: light dark; --gold: #b8860b33; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: .5rem 0 1rem; }
th, td { padding: .15rem .8rem .15rem 0; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
svg { max-width: 100%; height: auto; } svg rect { fill: #b8860b; }
svg text { font-size: 9px; text-anchor: middle; fill: currentColor; }
.error { color: #c0392b; } .warning { color: #b9770e; } .info { color: #2471a3; }
.level { font-weight: bold; margin-right: .5rem; }
.places { font: 13px/1.4 ui-monospace, monospace; }
.example { font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line);
  padding: .7rem; border-radius: .4rem; unicode-bidi: plaintext; }
.t { border-right: 1px dotted var(--line); } .g { background: var(--gold); } .w { font-size: 9px; vertical-align: super; }
.note { opacity: .7; }
</style>
<h1>{{ report.output_dir | visible }}</h1>
{% for split in report.splits %}
<h2>{{ split.split }}: {{ rows_line(split.report) }}</h2>
{% if split.report.rejected %}<ul>{% for reason, count in split.report.rejected.items() %}
<li>rejected, {{ reason | visible }}: {{ "{:,}".format(count) }}</li>{% endfor %}</ul>{% endif %}
{% if losses_line(split.report) %}<p>{{ losses_line(split.report) }}</p>{% endif %}
<table><tr><th>file<th>rows<th>examples<th>tokens<th>gold<th>gold share</tr>
{% for file in split.report.files %}<tr><td>{{ file.path | near | visible }}<td>{{ "{:,}".format(file.used) }}
<td>{{ "{:,}".format(file.examples) }}<td>{{ "{:,}".format(file.tokens) }}<td>{{ "{:,}".format(file.gold_tokens) }}
<td>{{ "{:.1%}".format(file.gold_tokens / file.tokens) if file.tokens else "-" }}</tr>{% endfor %}</table>
<table><tr><th>role<th>messages<th>characters<th>gold characters</tr>
{% for role, said in split.roles.items() %}<tr><td>{{ role | visible }}<td>{{ "{:,}".format(said.messages) }}
<td>{{ "{:,}".format(said.characters) }}<td>{{ "{:,}".format(said.gold_characters) }}</tr>{% endfor %}</table>
{% if split.lengths %}
<table><tr><th>tokens of an example<th>mean<th>min
{% for percent in split.lengths.total.percentiles %}<th>{{ percent }}%{% endfor %}<th>max</tr>
{% for name, lengths in split.lengths.items() %}<tr><td>{{ name }}<td>{{ "{:,.1f}".format(lengths.mean) }}
<td>{{ "{:,}".format(lengths.minimum) }}{% for value in lengths.percentiles.values() %}<td>{{ "{:,}".format(value) }}{% endfor %}
<td>{{ "{:,}".format(lengths.maximum) }}</tr>{% endfor %}</table>
{% for name, lengths in split.lengths.items() %}<h4>examples by {{ name }} tokens</h4>{{ plot(lengths.bars, name) }}{% endfor %}
{% endif %}
{% endfor %}
<h2>Findings</h2>
{% for finding in report.findings %}
<p><span class="level {{ finding.level }}">{{ finding.level }}</span><b>{{ finding.kind }}</b> ({{ finding.split }}):
{{ "{:,}".format(finding.count) }} rows: {{ finding.meaning }}<br><span class="note">{{ finding.remedy }}</span></p>
<details class="places"><summary>rows</summary>
{% for place in finding.places[:shown_places] %}<div>{{ place.source | near | visible }}
{%- if place.detail %}: {{ place.detail | near | visible }}{% endif %}</div>{% endfor %}
{% if finding.count > shown_places %}<div>... and {{ "{:,}".format(finding.count - shown_places) }} more</div>{% endif %}
</details>
{% else %}<p>none</p>
{% endfor %}
{% if report.plan %}{% set plan = report.plan %}
<h2>The run</h2>
<p>{{ "{:,}".format(plan.steps) }} steps of {{ "{:,}".format(plan.batch_size) }} examples =
{{ "{:,.2f}".format(plan.epochs) }} epochs of {{ "{:,}".format(plan.steps_per_epoch) }} steps.
An epoch: {{ "{:,.0f}".format(plan.examples) }} examples, {{ "{:,.0f}".format(plan.tokens) }} tokens,
{{ "{:,.0f}".format(plan.gold_tokens) }} of them gold. A step: {{ "{:,.0f}".format(plan.tokens_per_step) }} tokens in
{{ "{:.2f}".format(plan.microbatches_per_step) }} micro-batches, filled to {{ "{:.1%}".format(plan.fill) }} of
{{ "{:,}".format(plan.tokens_per_microbatch) }} tokens; padded to its longest row it would be {{ "{:.1%}".format(plan.padding) }}
padding.</p>{% endif %}
{% if report.measured %}<p>Measured on {{ report.measured.device }}: {{ "{:,.0f}".format(report.measured.tokens_per_second) }}
tokens a second; a step {{ duration(report.measured.seconds_per_step) }}, the run {{ duration(report.measured.seconds_total) }},
peak memory {{ format_bytes(report.measured.peak_memory_bytes) }}.</p>
{% elif report.not_measured %}<p>Time and memory were not measured: {{ report.not_measured | visible }}</p>{% endif %}
{% if report.examples %}<h2>Examples</h2>
<p class="note">Gold is coloured; its weight stands beside it where it is not 1. Hover for ids.</p>{% endif %}
{% for example in report.examples %}
<h4>{{ example.example_id | visible }} ({{ example.source | near | visible }}),
weight {{ "{:g}".format(example.example_weight) }}</h4>
<div class="example">
{%- for run in example.runs(max_tokens=shown_tokens) -%}
{%- for token in run.tokens -%}
<span class="t{{ ' g' if run.weight > 0 else '' }}" title="id {{ token.token_id }}, weight {{ '{:g}'.format(token.weight) }}">
{{- token.shown }}
{%- if run.weight > 0 and run.weight != 1 %}<span class="w">{{ "{:g}".format(run.weight) }}</span>{% endif %}</span>
{%- endfor -%}
{%- if run.skipped %}<span class="note"> ... {{ "{:,}".format(run.skipped) }} tokens ... </span>{% endif -%}
{%- endfor -%}
</div>
{% endfor %}
</html>
"""


def html_page(report: InspectReport) -> str:
    """The page."""
    # Before a value is escaped: what would be obeyed or hidden by a browser is written out.
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"near": near, "visible": visible}
    return environment.from_string(_PAGE).render(
        report=report,
        rows_line=rows_line,
        losses_line=losses_line,
        duration=duration,
        format_bytes=format_bytes,
        # Numbers and a title of our own.
        plot=lambda bars, name: Markup(bars_svg(bars, title=f"examples by {name} tokens")),
        shown_places=_SHOWN_PLACES,
        shown_tokens=_SHOWN_TOKENS,
    )
