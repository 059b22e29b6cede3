// Every run as a line across its parameters and figures; a range on an axis keeps the runs that go through it.
function drawParallel() {
  const note = find("#parameters .note");
  const container = find("#parameters .chart");
  const most = 12, kinds = 14;
  const usable = data.parameters.filter((p) => p.numeric || p.values.length <= kinds);
  const axes = usable.slice(0, most).map((p) => ({
    id: p.key, label: p.label, numeric: p.numeric, log: p.log, values: p.values,
    of: (r) => (p.numeric ? r.changes[p.key] : r.shown[p.key]),
  }));
  for (const f of shownFigures()) {
    if (runs.some((r) => r.figures[f.key] !== undefined)) {
      const values = runs.map((r) => r.figures[f.key]).filter((v) => v !== undefined);
      axes.push({ id: `figure ${f.key}`, label: titled(f), numeric: true, log: spansDecades(values), of: (r) => r.figures[f.key], figure: true });
    }
  }
  if (!usable.length) {
    container.remove();
    note.textContent = data.parameters.length ? "What differs has too many different values for an axis; the table has them." : "No recipe keys differ.";
    return;
  }
  const ranges = new Map();
  const clear = el("button", { hidden: true, onclick: () => { ranges.clear(); choose(); redraw(); } }, "show all runs");
  const count = el("span", {});

  function choose() {
    kept = ranges.size ? new Set(runs.map((_, i) => i).filter((i) => axes.every((axis) => inside(axis, i)))) : null;
    clear.hidden = !ranges.size;
    count.textContent = kept ? `${kept.size} of ${runs.length} runs kept` : "Drag along an axis to keep the runs that go through.";
    refresh();
  }
  function inside(axis, i) {
    const range = ranges.get(axis.id);
    const y = axis.y(axis.of(runs[i]));
    return !range || (y >= Math.min(...range) && y <= Math.max(...range));
  }

  const redraw = responsive(container, (given) => {
    const left = 40, right = 80;
    const width = Math.max(given, left + right + (axes.length - 1) * 105);
    const absent = axes.some((axis) => runs.some((r) => axis.of(r) === undefined || axis.of(r) === null));
    const top = 42, bottom = 334, none = absent ? 364 : bottom, height = none + 20;
    const step = axes.length > 1 ? (width - left - right) / (axes.length - 1) : 0;
    const svg = draw("svg", { class: runs.length > 60 ? "many" : null, width, height, role: "img", "aria-label": "parameters and figures of all runs" });
    container.append(svg);
    axes.forEach((axis, n) => {
      axis.x = left + n * step;
      const values = runs.map(axis.of).filter((v) => v !== undefined && v !== null);
      axis.absent = values.length < runs.length;
      if (axis.numeric) {
        const place = scale(values, bottom, top + 12, { log: axis.log, pad: 0 });
        axis.y = (v) => (v === undefined || v === null ? none : place(v));
        axis.ticks = place.ticks(6).map((t) => [t, number(t)]);
      } else {
        const gap = (bottom - top - 12) / Math.max(1, axis.values.length - 1);
        const at = new Map(axis.values.map((v, k) => [v, axis.values.length > 1 ? bottom - k * gap : (bottom + top) / 2]));
        axis.y = (v) => (at.has(v) ? at.get(v) : none);
        axis.ticks = axis.values.map((v) => [v, v]);
      }
    });
    for (const i of runs.map((_, k) => k).reverse()) {
      const d = axes.map((axis, n) => `${n ? "L" : "M"}${axis.x.toFixed(1)} ${axis.y(axis.of(runs[i])).toFixed(1)}`).join("");
      svg.append(follow(i, draw("path", { class: `series${finished(runs[i]) ? "" : " open"}`, d, stroke: colour(i), "aria-label": runs[i].name })), follow(i, draw("path", { class: "reach", d })));
    }
    axes.forEach((axis, n) => {
      const letters = Math.max(5, Math.floor((step || 200) / 7.2));
      svg.append(draw("line", { class: "axis firm", x1: axis.x, x2: axis.x, y1: top + 6, y2: bottom + 6 }));
      const anchor = n === 0 ? "start" : "middle";
      svg.append(draw("text", { class: "strong", x: n === 0 ? axis.x - 34 : axis.x, y: 16, "text-anchor": anchor }, shortly(axis.label, letters), draw("title", {}, axis.id)));
      if (axis.log) svg.append(draw("text", { x: n === 0 ? axis.x - 34 : axis.x, y: 31, "text-anchor": anchor }, "log"));
      for (const [value, text] of axis.ticks) {
        svg.append(draw("text", { class: "halo", x: axis.x + 7, y: axis.y(value) + (axis.numeric ? 4 : -5) }, shortly(text, letters - 1)), draw("line", { class: "axis", x1: axis.x - 3, x2: axis.x + 3, y1: axis.y(value), y2: axis.y(value) }));
      }
      if (axis.absent) svg.append(draw("text", { class: "halo", x: axis.x + 7, y: none + 4 }, "none"));
      const mark = draw("rect", { class: "brush", x: axis.x - 7, width: 14, y: 0, height: 0 });
      const show = () => {
        const range = ranges.get(axis.id);
        mark.setAttribute("y", range ? Math.min(...range) : 0);
        mark.setAttribute("height", range ? Math.abs(range[1] - range[0]) : 0);
      };
      const hit = draw("rect", { class: "hit", x: axis.x - 11, width: 22, y: top - 6, height: none - top + 16, "data-axis": axis.id });
      hit.addEventListener("pointerdown", (event) => {
        hit.setPointerCapture(event.pointerId);
        const local = (e) => e.clientY - svg.getBoundingClientRect().top;
        const start = local(event);
        const move = (e) => { ranges.set(axis.id, [start, local(e)]); show(); choose(); };
        const up = (e) => {
          hit.removeEventListener("pointermove", move);
          if (Math.abs(local(e) - start) < 4) ranges.delete(axis.id);
          show();
          choose();
        };
        hit.addEventListener("pointermove", move);
        hit.addEventListener("pointerup", up, { once: true });
      });
      svg.append(mark, hit);
      show();
    });
    choose();
  });
  find("#parameters .bar").append(count, clear, ...(key() ? [key()] : []));
  const left = data.parameters.length - Math.min(usable.length, most);
  note.textContent = [
    left ? `${left} of ${data.parameters.length} keys that differ are not drawn: the table has them.` : "",
    runs.some((r) => !finished(r)) ? "Dashed: not finished, with the figures they had last." : "",
  ].filter(Boolean).join(" ");
}
