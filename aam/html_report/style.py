"""How a report looks: on a screen of any width, light or dark, and on paper."""

CSS = """
:root {
  --page: #ffffff; --text: #1c2126; --soft: #57606a; --line: #d8dee4; --panel: #f4f6f8; --accent: #0b5c8e;
  --picture: #fbfbf9;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14181c; --text: #e3e7eb; --soft: #9da7b1; --line: #333b44; --panel: #1d2329; --accent: #7cc4f0;
    --picture: #dfe0dc;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 1rem clamp(0.9rem, 3vw, 2rem) 3rem; max-width: 70rem;
  background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: anywhere;
}
header { border-bottom: 2px solid var(--accent); margin-bottom: 1rem; }
h1 { font-size: clamp(1.4rem, 4.5vw, 2rem); line-height: 1.2; margin: 0.5rem 0 0.25rem; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 0.5rem; padding-top: 0.5rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.5rem 0 0.25rem; }
p, ul { margin: 0.5rem 0; }
li { margin: 0.15rem 0; }
.subtitle, figcaption, caption, .soft { color: var(--soft); }
a { color: var(--accent); }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: 0.25rem 1rem; padding: 0; }
.tiles { display: grid; gap: 0.6rem; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); margin: 1rem 0; }
.tiles div { background: var(--panel); border-radius: 0.5rem; padding: 0.5rem 0.75rem; }
.tiles dt { color: var(--soft); font-size: 0.82rem; line-height: 1.3; }
.tiles dd { margin: 0; font-size: 1.3rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.facts { display: flex; flex-wrap: wrap; gap: 0.15rem 1.5rem; margin: 0.35rem 0 0; font-size: 0.88rem; }
.facts div { display: flex; flex-wrap: wrap; gap: 0 0.4rem; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; font-variant-numeric: tabular-nums; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); }
.pair { display: grid; gap: 1rem; grid-template-columns: repeat(2, minmax(0, 1fr)); }
figure { margin: 0.5rem 0; min-width: 0; max-width: 34rem; }
figure svg {
  display: block; width: 100%; height: auto; background: var(--picture); border-radius: 0.5rem;
}
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif !important; }
figcaption { font-size: 0.85rem; line-height: 1.4; margin-top: 0.35rem; }
.scroll { overflow-x: auto; margin: 0.75rem 0; overflow-wrap: normal; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: 0.35rem; font-size: 0.85rem; }
th, td { text-align: right; padding: 0.3rem 0.7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child { text-align: left; padding-left: 0; font-weight: 500; }
thead th { color: var(--soft); font-weight: 500; vertical-align: bottom; }
code, pre, .sequence { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { background: var(--panel); border-radius: 0.5rem; padding: 0.75rem; white-space: pre-wrap; font-size: 0.82rem; }
.sequence { font-size: 0.78rem; line-height: 1.35; overflow-wrap: anywhere; user-select: all; display: block; }
ol.asvs { padding: 0; list-style: none; }
ol.asvs > li { border-bottom: 1px solid var(--line); padding: 0.6rem 0; }
ol.asvs p { margin: 0 0 0.25rem; }
.warning { border-left: 4px solid #d55e00; background: var(--panel); padding: 0.5rem 0.75rem; border-radius: 0.25rem; }
details { margin: 0.5rem 0; }
summary { cursor: pointer; color: var(--accent); }
@media (max-width: 700px) {
  .grid, .pair { grid-template-columns: minmax(0, 1fr); }
  figure { max-width: none; }
}
@media print {
  :root { --page: #fff; --text: #000; --soft: #444; --line: #bbb; --panel: #f4f4f4; --picture: #fff; }
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  nav { display: none; }
  figure, tr, .tiles div, ol.asvs > li { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .scroll { overflow: visible; }
}
"""
