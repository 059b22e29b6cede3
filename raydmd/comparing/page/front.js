// Two figures against each other, and the runs than which none is as good in both and better in one.
function drawFront() {
  const here = data.figures.map((f) => f.key);
  for (const f of shownFigures()) if (!here.includes(f.key)) here.push(f.key);
  const usable = here.filter((k) => runs.some((r) => r.figures[k] !== undefined));
  const note = find("#front .note");
  if (usable.length < 2) { find("#front .chart").remove(); note.textContent = "No two figures to draw: no run here has been evaluated."; return; }
  let xKey = data.objectives[0] ? data.objectives[0].key : usable[0];
  let yKey = data.objectives[1] ? data.objectives[1].key : usable.find((k) => k !== xKey);
  const named = (k) => k + (ARROW[goalOf[k]] || "");
  const options = usable.map((k) => ({ value: k, label: named(k) }));
  const container = find("#front .chart");

  const box = el("input", { type: "checkbox", onchange: () => redraw() });
  const redraw = responsive(container, (width) => {
    const height = Math.max(320, Math.min(470, width * 0.5));
    const shown = runs.map((_, i) => i).filter((i) => runs[i].figures[xKey] !== undefined && runs[i].figures[yKey] !== undefined && (!box.checked || finished(runs[i])));
    const at = (i) => [runs[i].figures[xKey], runs[i].figures[yKey]];
    const svg = draw("svg", { width, height, role: "img", "aria-label": `${yKey} against ${xKey}` });
    container.append(svg);
    if (!shown.length) { note.textContent = "No run has both figures."; return; }
    const known = data.baselines.filter((b) => b.figures[xKey] !== undefined && b.figures[yKey] !== undefined).slice(0, 8);
    const xs = [...shown.map((i) => at(i)[0]), ...known.map((b) => b.figures[xKey])], ys = [...shown.map((i) => at(i)[1]), ...known.map((b) => b.figures[yKey])];
    const f = frame(svg, width, height, xs, ys, { xName: named(xKey), yName: named(yKey), logX: spansDecades(xs), logY: spansDecades(ys) });
    const best = goalOf[xKey] && goalOf[yKey] ? edge(shown.filter((i) => finished(runs[i]))) : [];
    const stair = !runs.some((r) => r.repeats) && goalOf[xKey] !== "teacher" && goalOf[yKey] !== "teacher";
    if (best.length > 1 && stair) {
      const steps = best.map((i, n) => (n ? `H${f.x(at(i)[0])}V${f.y(at(i)[1])}` : `M${f.x(at(i)[0])} ${f.y(at(i)[1])}`)).join("");
      svg.append(draw("path", { class: "edge-line", d: steps }));
    }
    const labels = [];
    for (const b of known) {
      const [px, py] = [f.x(b.figures[xKey]), f.y(b.figures[yKey])];
      const mark = draw("path", { class: "baseline", d: `M${px - 5} ${py}L${px} ${py - 5}L${px + 5} ${py}L${px} ${py + 5}Z` }, draw("title", {}, `${b.title}: ${xKey} ${number(b.figures[xKey])}, ${yKey} ${number(b.figures[yKey])}`));
      svg.append(mark);
      labels.push([px, py, b.title, { class: "halo" }, null]);
    }
    for (const i of [...shown].reverse()) {
      const point = follow(i, draw("circle", {
        class: "point", cx: f.x(at(i)[0]), cy: f.y(at(i)[1]), r: best.includes(i) ? 6.5 : 5, tabindex: 0, role: "img",
        stroke: colour(i), fill: finished(runs[i]) ? colour(i) : "var(--card)", "aria-label": `${runs[i].name}: ${xKey} ${number(at(i)[0])}, ${yKey} ${number(at(i)[1])}`,
      }));
      point.dataset.said = [xKey, yKey].filter((k) => !shownFigures().some((s) => s.key === k)).map((k) => `${named(k)} ${number(runs[i].figures[k])}`).join(", ");
      svg.append(point);
    }
    // The front as it is drawn, and the best by the figure that the page is sorted by.
    const first = shown.find((i) => finished(runs[i]) && runs[i].cost !== null);
    for (const i of [...new Set([...(first === undefined ? [] : [first]), ...best])].slice(0, 24)) {
      labels.unshift([f.x(at(i)[0]), f.y(at(i)[1]), shortName(runs[i].name, 30), { class: "mark halo" }, i]);
    }
    // Each where it hides nothing; one that finds no such place is told by pointing at it.
    const boxes = [...shown.map(at), ...known.map((b) => [b.figures[xKey], b.figures[yKey]])].map(([x, y]) => [f.x(x) - 7, f.y(y) - 7, f.x(x) + 7, f.y(y) + 7]);
    for (const [px, py, text, attributes, run] of labels) {
      const wide = text.length * 6.9;
      const spots = [[px + 11, py - 9, "start"], [px - 11, py + 17, "end"], [px - 11, py - 9, "end"], [px + 11, py + 17, "start"]];
      const spot = spots.find(([sx, sy, anchor]) => {
        const box = [anchor === "end" ? sx - wide : sx, sy - 11, anchor === "end" ? sx : sx + wide, sy + 3];
        if (box[0] < f.left || box[2] > f.right || box[1] < f.top - 8 || box[3] > f.bottom) return false;
        if (boxes.some((b) => b[0] < box[2] && b[2] > box[0] && b[1] < box[3] && b[3] > box[1])) return false;
        boxes.push(box);
        return true;
      });
      if (!spot) continue;
      const label = draw("text", { ...attributes, x: spot[0], y: spot[1], "text-anchor": spot[2] }, text);
      svg.append(run === null ? label : follow(run, label));
    }
    const open = shown.filter((i) => !finished(runs[i])).length;
    const missing = runs.length - shown.length;
    note.textContent = [
      best.length ? `${best.length} finished run${best.length === 1 ? " is" : "s are"} on this front: no other is as good in both and better in one.` :
        goalOf[xKey] && goalOf[yKey] ? "No finished run has both figures." : "Of one of these figures neither way is better: there is no front.",
      data.objectives.length > 2 ? `In the table the front is that of all ${data.objectives.length} objectives, and may hold more runs.` : "",
      known.length ? "Diamonds: the teacher, and the model before distillation." : "",
      open ? `Hollow: ${open} not finished, with the figures they had last.` : "",
      missing ? `Not drawn: ${missing} ${box.checked ? "not finished, or " : ""}without these figures.` : "",
    ].filter(Boolean).join(" ");
  });

  find("#front .bar").append(
    choice("across", options, xKey, (value) => { xKey = value; redraw(); }),
    choice("up", options, yKey, (value) => { yKey = value; redraw(); }),
    ...(runs.some(finished) && !runs.every(finished) ? [el("label", {}, box, "finished runs alone")] : []), ...(key() ? [key()] : []),
  );

  function edge(all) {
    const cost = (i) => [costOf(runs[i], xKey), costOf(runs[i], yKey)];
    const beats = (a, b) => a[0] <= b[0] && a[1] <= b[1] && (a[0] < b[0] || a[1] < b[1]);
    const of = all.filter((i) => cost(i).every(Number.isFinite));
    return of.filter((i) => !of.some((j) => beats(cost(j), cost(i)))).sort((a, b) => cost(a)[0] - cost(b)[0]);
  }
}
