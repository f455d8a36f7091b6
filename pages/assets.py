"""Template, style and script of the page."""

TEMPLATE = """\
{%- macro group_of(block) -%}
{% if block.group is not none %} data-group="{{ block.group }}"{% endif %}
{%- endmacro -%}

{%- macro grid(table) %}
<div class="scroll" role="region" tabindex="0" aria-label="{{ table.caption }}">
<table class="sortable">
<caption><span>{{ table.caption }}</span></caption>
<thead><tr>
{%- for name in table.header -%}
<th scope="col"{% if name|length > 24 %} class="words"{% endif %}>{{ name }}</th>
{%- endfor -%}
</tr></thead>
<tbody>
{% for row in table.rows %}
<tr{{ group_of(row) }}>
{%- for cell in row.cells -%}
{% if loop.first %}<th scope="row">{{ cell.text }}</th>
{%- else %}<td{% if cell.value is not none %} data-value="{{ cell.value }}"{% endif %}
{%- if cell.text|length > 24 %} class="words"{% endif %}
{%- if cell.heat is not none %} class="heat" style="--heat: {{ "%.3f"|format(cell.heat) }}"{% endif %}>
{{- cell.text }}</td>{% endif %}
{%- endfor -%}
</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endmacro -%}

{%- macro show_table(table) %}
{% if table.folded %}
<details{{ group_of(table) }}><summary>{{ table.caption }}</summary>{{ grid(table) }}</details>
{% else %}
<div{{ group_of(table) }}>{{ grid(table) }}</div>
{% endif %}
{% endmacro -%}

{%- macro show_plot(plot) %}
<figure{{ group_of(plot) }} aria-label="{{ plot.title }}">
<figcaption>{{ plot.title }}</figcaption>
{{ drawing(plot) }}
<ul class="legend">
{% for line in plot.series %}
{% set color, dashes = style_of(line.style) %}
<li{{ group_of(line) }}><svg aria-hidden="true" focusable="false" width="28" height="8" viewBox="0 0 28 8">
{#- #}<line x1="0" y1="4" x2="28" y2="4" stroke="{{ color }}" stroke-width="2"
{%- if dashes %} stroke-dasharray="{{ dashes|join(" ") }}"{% endif %}></line></svg> {{ line.name }}</li>
{% endfor %}
</ul>
<details><summary>Numbers</summary>{{ grid(numbers(plot)) }}</details>
</figure>
{% endmacro -%}

{%- macro show_gallery(gallery) %}
<h3>{{ gallery.title }}</h3>
<ul class="gallery">
{% for picture in gallery.pictures %}
<li>
{% if picture.png is not none %}
<img src="{{ address(picture.png) }}" alt="{{ gallery.title }}, {{ picture.title }}">
{% endif %}
<p>{{ picture.title }}</p>
{% for caption in picture.captions %}
<dl class="{{ "right" if caption.is_right else "wrong" }}"{{ group_of(caption) }}>
<dt>{{ caption.name }}</dt>
{% for line in caption.lines %}
<dd>{{ line }}</dd>
{% endfor %}
</dl>
{% endfor %}
</li>
{% endfor %}
</ul>
{% endmacro -%}

<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header>
<h1>{{ title }}</h1>
<p>{{ summary }}</p>
<nav aria-label="Sections"><ul>
{% for section in sections %}
<li><a href="#{{ section.name }}">{{ section.title }}</a></li>
{% endfor %}
</ul></nav>
<fieldset id="filter" hidden>
<legend>Show</legend>
{% for index, label in groups.items() %}
<label><input type="checkbox" value="{{ index }}" checked> {{ label }}</label>
{% endfor %}
</fieldset>
</header>
<main id="main">
{% for section in sections %}
<section id="{{ section.name }}" aria-labelledby="{{ section.name }}-title">
<h2 id="{{ section.name }}-title">{{ section.title }}</h2>
{% for block in section.blocks %}
{% if kind(block) == "Text" %}
<p{% if block.is_problem %} class="problem"{% endif %}>{{ block.text }}</p>
{% elif kind(block) == "Table" %}
{{ show_table(block) }}
{% elif kind(block) == "Plot" %}
{{ show_plot(block) }}
{% elif kind(block) == "Gallery" %}
{{ show_gallery(block) }}
{% else %}
<details{{ group_of(block) }}>
<summary>{{ block.title }}</summary>
<pre tabindex="0">{{ block.text }}</pre>
</details>
{% endif %}
{% endfor %}
</section>
{% endfor %}
</main>
<footer><p>{{ footer }}</p></footer>
<script>{{ script }}</script>
</body>
</html>
"""

STYLE = """
:root { --ink: #1b1f24; --paper: #ffffff; --quiet: #57606a; --line: #d0d7de; --accent: #1f6fb2;
  --problem: #9a3412; --right: #1a6b34; --wrong: #b42318; --wash: #f6f8fa; color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --paper: #14171a; --quiet: #a3abb5; --line: #3a4149; --accent: #6cb3f0;
    --problem: #ffa775; --right: #6fd08c; --wrong: #ff9d94; --wash: #1c2126; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 0 1rem 3rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 1.2rem 0 .2rem; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; padding-bottom: .2rem;
  border-bottom: 1px solid var(--line); }
p { max-width: 46rem; overflow-wrap: anywhere; }
a { color: var(--accent); }
.skip { position: absolute; left: -100rem; }
.skip:focus { left: 1rem; top: .5rem; background: var(--paper); padding: .3rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1rem; list-style: none; padding: 0; margin: .6rem 0; }
fieldset { border: 1px solid var(--line); border-radius: .4rem; margin: .6rem 0; }
fieldset label { display: flex; align-items: baseline; gap: .5rem; padding: .15rem 0;
  overflow-wrap: anywhere; }
.problem { color: var(--problem); border-left: .25rem solid var(--problem); padding-left: .7rem;
  white-space: pre-wrap; }
figure { display: inline-block; vertical-align: top; width: min(100%, 31rem); margin: 1rem 0; }
@media (min-width: 40rem) { figure { padding-right: 1.5rem; } }
figcaption, caption { font-weight: 600; text-align: left; padding: .2rem 0; overflow-wrap: anywhere; }
caption span { display: block; position: sticky; left: 0; max-width: calc(100vw - 2rem); }
figure > svg { width: 100%; height: auto; display: block; }
figure > svg text { font-family: system-ui, sans-serif !important; }
figure > svg text { fill: currentColor; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; overflow-wrap: anywhere; }
.gallery { display: flex; flex-wrap: wrap; gap: .8rem; list-style: none; padding: 0; margin: 0; }
.gallery li { width: 9.5rem; }
.gallery img { width: 100%; display: block; image-rendering: pixelated; }
.gallery p, .gallery dl { margin: .2rem 0; font-size: .85rem; overflow-wrap: anywhere; }
.gallery dt { color: var(--quiet); }
.gallery dd { margin: 0; }
.right dd:nth-of-type(1) { color: var(--right); font-weight: 600; }
.wrong dd:nth-of-type(1) { color: var(--wrong); font-weight: 600; }
.legend { list-style: none; padding: 0; margin: .3rem 0; font-size: .9rem; }
.legend li { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; max-height: 34rem; margin: .4rem 0 1rem; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.words { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 14rem; }
thead .words { text-align: right; min-width: 11rem; }
thead th { text-align: right; vertical-align: bottom; background: var(--wash); position: sticky; top: 0;
  z-index: 1; }
th:first-child { text-align: left; }
tbody th { font-weight: 400; max-width: 24rem; overflow-wrap: anywhere; min-width: 8rem; }
.heat { background: color-mix(in srgb, var(--accent) calc(var(--heat) * 45%), transparent); }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0;
  cursor: pointer; text-align: inherit; }
th button::after { content: "\\a0\\2195" / ""; color: var(--quiet); }
th[aria-sort=ascending] button::after { content: "\\a0\\2191" / ""; }
th[aria-sort=descending] button::after { content: "\\a0\\2193" / ""; }
details { margin: .4rem 0; }
summary { cursor: pointer; overflow-wrap: anywhere; }
pre { overflow-x: auto; background: var(--wash); padding: .7rem; font-size: .85rem; }
footer { color: var(--quiet); font-size: .9rem; margin-top: 3rem; }
[hidden] { display: none !important; }
@media print { .scroll { overflow: visible; max-height: none; } nav, fieldset { display: none; } }
"""

SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const sign = down ? -1 : 1;
      const rows = [...body.rows].map((row) => {
        const cell = row.cells[column];
        const known = cell && cell.dataset.value !== undefined;
        return { row, number: known ? Number(cell.dataset.value) : NaN, text: cell ? cell.textContent : "" };
      });
      rows.sort((a, b) => {
        const aKnown = !Number.isNaN(a.number), bKnown = !Number.isNaN(b.number);
        if (aKnown !== bKnown) return aKnown ? -1 : 1;
        if (aKnown) return sign * (a.number - b.number);
        return sign * a.text.localeCompare(b.text, undefined, { numeric: true });
      });
      body.append(...rows.map((each) => each.row));
    });
  });
}
const filter = document.getElementById("filter");
filter.hidden = false;
filter.addEventListener("change", (event) => {
  const group = event.target.value, hidden = !event.target.checked;
  for (const element of document.querySelectorAll(`[data-group="${group}"]`)) element.hidden = hidden;
  for (const line of document.querySelectorAll(`svg [id$="-group-${group}"]`)) {
    line.style.display = hidden ? "none" : "";
  }
});
"""
