// One metric over the cycles, a line for each run.
function drawCurves() {
  const names = Object.keys(data.curves.metrics);
  const note = find("#curves .note");
  if (!names.length) { find("#curves .chart").remove(); note.textContent = "No run has left any metrics."; return; }
  const wanted = data.by ? [`evaluation/${data.by.key}`, data.by.key] : [];
  let name = wanted.find((n) => n in data.curves.metrics) || names[0];
  let log = false;
  const container = find("#curves .chart");
  const box = el("input", { type: "checkbox", onchange: () => { log = box.checked; redraw(); } });

  const redraw = responsive(container, (width) => {
    const metric = data.curves.metrics[name];
    const shown = Object.keys(metric.runs).map(Number);
    const values = shown.flatMap((i) => metric.runs[i][1]);
    const cycles = shown.flatMap((i) => metric.runs[i][0]);
    const canLog = values.reduce((a, b) => Math.min(a, b), Infinity) > 0;
    box.disabled = !canLog;
    const height = Math.max(320, Math.min(470, width * 0.48));
    const few = shown.length <= 16;
    const room = few ? Math.min(170, 22 + 6.9 * Math.max(...shown.map((i) => runs[i].name.length))) : 18;
    const svg = draw("svg", { class: shown.length > 60 ? "many" : null, width, height, role: "img", "aria-label": `${name} by cycle` });
    container.append(svg);
    const ends = (all) => [all.reduce((a, b) => Math.min(a, b), Infinity), all.reduce((a, b) => Math.max(a, b), -Infinity)];
    const f = frame(svg, width, height, ends(cycles), ends(values), {
      xName: "cycles", yName: name + (ARROW[metric.goal] || ""), logY: log && canLog, right: room, padX: 0.01,
    });
    const marks = few ? apart(shown.map((i) => f.y(metric.runs[i][1].at(-1)) + 4), 14, f.top, f.bottom + 4) : [];
    for (const [n, i] of [...shown.entries()].reverse()) {
      const [xs, ys] = metric.runs[i];
      const d = xs.map((x, k) => `${k ? "L" : "M"}${f.x(x).toFixed(1)} ${f.y(ys[k]).toFixed(1)}`).join("");
      const said = `${name} ${number(ys.at(-1))} after ${xs.at(-1)} cycles`;
      svg.append(follow(i, draw("path", { class: `series${finished(runs[i]) ? "" : " open"}`, d, stroke: colour(i), "data-series": runs[i].name, "aria-label": `${runs[i].name}: ${said}` })));
      const reach = follow(i, draw("path", { class: "reach", d }));
      reach.dataset.said = said;
      svg.append(reach);
      svg.append(follow(i, draw("circle", { class: "point", r: 2.6, cx: f.x(xs.at(-1)), cy: f.y(ys.at(-1)), fill: finished(runs[i]) ? colour(i) : "var(--card)", stroke: colour(i) })));
      if (few) {
        const late = f.x(xs.at(-1)) > f.right - 30;
        if (late) svg.append(follow(i, draw("text", { class: "mark", x: f.right + 8, y: marks[n] }, shortName(runs[i].name, 21))));
      }
    }
    const open = shown.filter((i) => !finished(runs[i])).length;
    const missing = runs.length - shown.length;
    note.textContent = [
      open ? `Dashed: ${open} not finished.` : "",
      missing ? `${missing} of ${runs.length} runs have no such metric.` : "",
      data.curves.thinned.includes(name) ? `Thinned to ${data.curves.points_at_most} points a run.` : "",
      data.curves.not_finite_left_out ? `${data.curves.not_finite_left_out} points of all metrics are not finite and left out.` : "",
      name.startsWith("evaluation/") ? "" : "Losses mean little in distribution matching; look for figures that run away.",
    ].filter(Boolean).join(" ");
  });

  find("#curves .bar").append(
    choice("metric", names.map((n) => ({ value: n, label: n + (ARROW[data.curves.metrics[n].goal] || "") })), name, (value) => { name = value; redraw(); }),
    el("label", {}, box, "log scale"), ...(key() ? [key()] : []),
  );
}
