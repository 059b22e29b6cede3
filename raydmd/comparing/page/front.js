// Two figures against each other, and the runs that none beats in both.
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
    const xs = shown.map((i) => at(i)[0]), ys = shown.map((i) => at(i)[1]);
    const f = frame(svg, width, height, xs, ys, { xName: named(xKey), yName: named(yKey), logX: spansDecades(xs), logY: spansDecades(ys) });
    const best = goalOf[xKey] && goalOf[yKey] ? edge(shown.filter((i) => finished(runs[i])), at) : [];
    if (best.length > 1) {
      const steps = best.map((i, n) => (n ? `H${f.x(at(i)[0])}V${f.y(at(i)[1])}` : `M${f.x(at(i)[0])} ${f.y(at(i)[1])}`)).join("");
      svg.append(draw("path", { class: "edge-line", d: steps }));
    }
    const boxes = shown.map((i) => { const [px, py] = [f.x(at(i)[0]), f.y(at(i)[1])]; return [px - 7, py - 7, px + 7, py + 7]; });
    for (const i of [...shown].reverse()) {
      const point = follow(i, draw("circle", {
        class: "point", cx: f.x(at(i)[0]), cy: f.y(at(i)[1]), r: best.includes(i) ? 6.5 : 5, tabindex: 0, role: "img",
        stroke: colour(i), fill: finished(runs[i]) ? colour(i) : "var(--card)", "aria-label": `${runs[i].name}: ${xKey} ${number(at(i)[0])}, ${yKey} ${number(at(i)[1])}`,
      }));
      point.dataset.said = [xKey, yKey].filter((k) => !shownFigures().some((s) => s.key === k)).map((k) => `${named(k)} ${number(runs[i].figures[k])}`).join(", ");
      svg.append(point);
    }
    for (const i of best.slice(0, 24)) {
      const [px, py] = [f.x(at(i)[0]), f.y(at(i)[1])];
      const wide = runs[i].name.length * 6.9;
      const spots = [[px + 11, py - 9, "start"], [px - 11, py + 17, "end"], [px - 11, py - 9, "end"], [px + 11, py + 17, "start"]];
      const spot = spots.find(([sx, sy, anchor]) => {
        const box = [anchor === "end" ? sx - wide : sx, sy - 11, anchor === "end" ? sx : sx + wide, sy + 3];
        if (box[0] < f.left || box[2] > f.right || box[1] < f.top - 8 || box[3] > f.bottom) return false;
        if (boxes.some((b) => b[0] < box[2] && b[2] > box[0] && b[1] < box[3] && b[3] > box[1])) return false;
        boxes.push(box);
        return true;
      });
      if (spot) svg.append(follow(i, draw("text", { class: "mark halo", x: spot[0], y: spot[1], "text-anchor": spot[2] }, runs[i].name)));
    }
    const open = shown.filter((i) => !finished(runs[i])).length;
    const missing = runs.length - shown.length;
    note.textContent = [
      best.length ? `${best.length === 1 ? "One finished run beats" : `${best.length} finished runs are on the front: no other beats one of them in both, and together they beat`} all others.` :
        goalOf[xKey] && goalOf[yKey] ? "No finished run has both figures." : "Of one of these figures neither way is better: there is no front.",
      open ? `Hollow: ${open} not finished, with the figures they had last.` : "",
      missing ? `Not drawn: ${missing} ${box.checked ? "not finished, or " : ""}without these figures.` : "",
    ].filter(Boolean).join(" ");
  });

  find("#front .bar").append(
    choice("across", options, xKey, (value) => { xKey = value; redraw(); }),
    choice("up", options, yKey, (value) => { yKey = value; redraw(); }),
    ...(runs.some(finished) && !runs.every(finished) ? [el("label", {}, box, "finished runs alone")] : []), ...(key() ? [key()] : []),
  );

  function edge(of, at) {
    const cost = (i) => [goalOf[xKey] === "max" ? -at(i)[0] : at(i)[0], goalOf[yKey] === "max" ? -at(i)[1] : at(i)[1]];
    const beats = (a, b) => a[0] <= b[0] && a[1] <= b[1] && (a[0] < b[0] || a[1] < b[1]);
    return of.filter((i) => !of.some((j) => beats(cost(j), cost(i)))).sort((a, b) => cost(a)[0] - cost(b)[0]);
  }
}
