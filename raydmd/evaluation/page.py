"""The report's page, a Jinja template; in Python so that every way of packaging brings it along."""

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }} · raydmd</title>
<style>
:root {
  --paper: #fcfcfb; --card: #ffffff; --ink: #1b1c1f; --muted: #6a6d74; --line: #e4e4e1;
  --accent: #2f5fd0; --tint: #f3f5fb;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #131416; --card: #1a1b1e; --ink: #e9e9e7; --muted: #989ba3; --line: #2d2f34;
    --accent: #8aadff; --tint: #1d212c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
}
main { max-width: 1320px; margin: 0 auto; padding: 48px 32px 80px; }
header p { max-width: 68ch; margin: 10px 0 0; font-size: 17px; color: var(--muted); }
header strong { color: var(--ink); font-weight: 600; }
h1 { margin: 0; font-size: 30px; line-height: 1.2; font-weight: 650; letter-spacing: -.015em; }
h2 { margin: 52px 0 14px; font-size: 18px; font-weight: 650; letter-spacing: -.005em; }
.note { max-width: 78ch; margin: 10px 0 0; color: var(--muted); font-size: 13.5px; }
.tiles {
  display: grid; gap: 12px; margin-top: 28px;
  grid-template-columns: repeat(auto-fit, minmax(200px, 1fr));
}
.tile {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px;
}
.tile b {
  display: block; font-size: 28px; line-height: 1.2; font-weight: 620; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums;
}
.tile span { color: var(--muted); font-size: 13px; }
.tile .label { display: block; color: var(--ink); font-size: 13.5px; font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
.figures { font-size: 13.5px; font-variant-numeric: tabular-nums; }
.scroll + .scroll { margin-top: 26px; }
.figures th, .figures td {
  padding: 7px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line);
}
.figures th { color: var(--muted); font-weight: 500; font-size: 12.5px; vertical-align: bottom; }
.figures th[title] { cursor: help; }
.figures th:first-child, .figures td:first-child {
  text-align: left; padding-left: 0; min-width: 215px;
}
.figures tr.teacher td { color: var(--muted); }
.figures tr.student td { background: var(--tint); }
.figures tr.student td:first-child { box-shadow: -10px 0 0 var(--tint); }
.figures td.best { font-weight: 700; }
.sheet th {
  text-align: left; padding: 0 18px 8px 0; color: var(--muted); font-weight: 500; font-size: 13px;
}
.sheet td { padding: 0 18px 8px 0; vertical-align: middle; }
.sheet td:first-child { min-width: 150px; max-width: 220px; font-size: 13.5px; line-height: 1.35;
  overflow-wrap: anywhere; }
.sheet .clip { display: flex; gap: 6px; }
.sheet img { display: block; image-rendering: pixelated; border-radius: 3px; }
.sheet .strip { opacity: .94; }
@media (max-width: 1279px) and (prefers-reduced-motion: no-preference) {
  .sheet .moving + .strip { display: none; }  /* or the student would be out of sight */
}
@media (prefers-reduced-motion: reduce) { .moving { display: none !important; } }
.curves { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 14px 8px; }
figcaption { font-size: 13px; font-weight: 600; margin-bottom: 4px; }
svg { display: block; width: 100%; height: auto; font-variant-numeric: tabular-nums; }
.facts { width: auto; font-size: 13.5px; }
.facts th { text-align: left; font-weight: 500; color: var(--muted); padding: 4px 28px 4px 0;
  vertical-align: top; white-space: nowrap; }
.facts td { padding: 4px 0; overflow-wrap: anywhere; }
details { margin-top: 36px; border-top: 1px solid var(--line); padding-top: 16px; }
summary { cursor: pointer; font-weight: 650; font-size: 18px; }
pre {
  overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 16px 18px;
  font: 12.5px/1.55 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace;
}
dl { columns: 2; column-gap: 40px; margin: 14px 0 0; font-size: 13px; color: var(--muted); }
dl div { break-inside: avoid; padding: 2px 0; }
dt { display: inline; font-weight: 600; color: var(--ink); }
dd { display: inline; margin: 0 0 0 6px; }
@media (max-width: 720px) { main { padding: 28px 16px 60px; } dl { columns: 1; } }
@media print { details { display: none; } .moving { display: none; } }
</style>
</head>
<body>
<main>
<header>
<h1>{{ title }}</h1>
{% if lede %}<p>{% for part in lede %}{% if part.strong is defined -%}
<strong>{{ part.text }}</strong>{% else %}{{ part.text }}{% endif %}{% endfor %}</p>{% endif %}
</header>

{% if tiles %}<div class="tiles">
{% for tile in tiles %}<div class="tile"><span class="label">{{ tile.label }}</span>
<b>{{ tile.value }}</b><span>{{ tile.note }}</span></div>
{% endfor %}</div>{% endif %}

<h2>Figures</h2>
{% for table in tables %}<div class="scroll"><table class="figures">
<thead><tr><th>sampler</th>{% for c in table.columns -%}
<th title="{{ c.help }}">{{ c.label }}{{ c.arrow }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in table.rows %}
<tr class="{{ row.kind }}"><td>{{ row.title }}</td>{% for cell in row.cells -%}
<td{% if cell.best %} class="best"{% endif %}>{{ cell.text }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div>
{% endfor %}
<p class="note">{{ clips }} clips per sampler. Bold is best, the teacher aside; figures without an
arrow are best where the teacher's are. A prompt has few clips, so it misses some of what it leaves
open even where the draws are uniform: read that figure beside the teacher's.</p>
<dl>{% for c in legend %}<div><dt>{{ c.label }}</dt><dd>{{ c.help }}</dd></div>{% endfor %}</dl>

{% if sheet %}<h2>The same prompts and seeds</h2>
<div class="scroll"><table class="sheet">
<thead><tr><th>prompt</th>{% for head in sheet.heads %}<th>{{ head }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in sheet.rows %}
<tr><td>{{ row.prompt }}</td>{% for clip in row.clips %}<td><div class="clip">
{%- if clip.moving %}<img class="moving" src="{{ clip.moving }}" width="{{ clip.width }}"
 height="{{ clip.height }}" alt="the clip, moving">{% endif -%}
<img class="strip" src="{{ clip.strip }}" width="{{ clip.strip_width }}" height="{{ clip.height }}"
 alt="frames of the clip"></div></td>{% endfor %}</tr>{% endfor %}
</tbody></table></div>{% endif %}

{% if curves %}<h2>Training</h2>
<div class="curves">{% for name, svg in curves %}<figure><figcaption>{{ name }}</figcaption>
{{ svg }}</figure>{% endfor %}</div>
<p class="note">Losses mean little in distribution matching; look for figures that run away. Dashed
lines are where one phase ends and the next begins.</p>
{% endif %}

{% if facts %}<h2>Facts</h2>
<table class="facts">{% for name, value in facts.items() -%}
<tr><th>{{ name }}</th><td>{{ value }}</td></tr>{% endfor %}</table>{% endif %}

<details><summary>Recipe</summary>
<pre>{{ recipe }}</pre></details>
</main>
</body>
</html>
"""
