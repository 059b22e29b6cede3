// The table of runs, sorted by any column.
function drawTable() {
  let all = false;
  let by = null, down = false;
  const most = 40;

  function columns() {
    const chosen = shownFigures();
    const others = all ? data.figures.filter((f) => !chosen.some((c) => c.key === f.key)) : [];
    const figures = [...chosen, ...others];
    return [
      { name: "run", value: (r) => r.name, cell: nameCell },
      { name: "state", value: (r) => r.state, cell: (r) => el("td", { class: `state-${r.state.split(" ")[0]}`, title: r.error || null }, r.state) },
      { name: "cycles", number: true, value: (r) => r.measured || r.cycles, cell: (r) => el("td", { class: "number" }, cyclesOf(r)) },
      ...figures.map((f, i) => ({
        key: f.key, name: titled(f), help: helpOf[f.key], number: true, edge: i === 0, best: bestOf(f), goal: f.goal,
        value: (r) => r.figures[f.key],
        cell: (r, c) => {
          const value = r.figures[f.key];
          const text = value === undefined ? (r.not_finite.includes(f.key) ? "not finite" : "–") : number(value);
          return el("td", { title: meanOf(r, f.key) || null, class: `number${value !== undefined && finished(r) && costOf(r, f.key) === c.best ? " best" : ""}${c.edge ? " edge" : ""}` }, text);
        },
      })),
      ...data.parameters.slice(0, most).map((p, i) => ({
        name: p.label, help: p.key, number: p.numeric, edge: i === 0,
        value: (r) => (p.numeric ? r.changes[p.key] : r.shown[p.key]),
        cell: (r, c) => el("td", {
          class: `value${p.numeric ? " number" : ""}${c.edge ? " edge" : ""}${p.key in r.shown ? "" : " quiet"}`, title: r.shown[p.key] || null,
        }, p.key in r.shown ? r.shown[p.key] : "–"),
      })),
    ];
  }

  const cyclesOf = (r) => (r.measured || r.cycles ? `${r.measured || r.cycles}${r.planned && r.planned !== (r.measured || r.cycles) ? ` of ${r.planned}` : ""}` : "–");

  function bestOf(figure) {
    const costs = runs.filter(finished).map((r) => costOf(r, figure.key)).filter((c) => c !== Infinity);
    return !figure.goal || costs.length < 2 ? null : costs.reduce((a, b) => Math.min(a, b));
  }

  function nameCell(r) {
    const i = runs.indexOf(r);
    const dot = el("i", { class: "dot" });
    dot.style.borderColor = colour(i);
    if (finished(r)) dot.style.background = colour(i);
    const name = r.link ? el("a", { href: r.link }, r.name) : r.name;
    return el("td", {}, dot, name, r.front ? el("span", { class: "badge", title: "on the Pareto front" }, "front") : null);
  }

  function paint() {
    const container = find("#runs .table");
    const scrolled = container.scrollLeft;
    forget(container);
    const shown = columns();
    const order = runs.map((_, i) => i);
    if (by !== null && by < shown.length) {
      const value = shown[by].value;
      const empty = (v) => v === undefined || v === null;
      order.sort((a, b) => {
        const x = value(runs[a]), y = value(runs[b]);
        if (empty(x) || empty(y)) return empty(x) - empty(y) || a - b;
        const sign = down ? -1 : 1;
        return sign * (typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), undefined, { numeric: true })) || a - b;
      });
    }
    const heads = shown.map((c, i) => el("th", {
      class: `${c.number ? "number" : ""}${c.edge ? " edge" : ""}`, title: c.help || null, scope: "col",
      "aria-sort": by === i ? (down ? "descending" : "ascending") : null,
    }, el("button", { onclick: () => { down = by === i ? !down : c.goal === "max"; by = i; paint(); } }, c.name + (by === i ? (down ? " ▾" : " ▴") : ""))));
    const rows = order.map((i) => follow(i, el("tr", {}, ...shown.map((c) => c.cell(runs[i], c)))));
    const known = data.baselines.slice(0, 8).map((b) => el("tr", { class: "baseline" }, ...shown.map((c) => {
      if (c.name === "run") return el("td", {}, b.title, data.baselines.some((o) => o !== b && o.title === b.title) ? ` (of ${b.runs} runs)` : "");
      return el("td", { class: `${c.number ? "number" : ""}${c.edge ? " edge" : ""}` }, c.key && b.figures[c.key] !== undefined ? number(b.figures[c.key]) : "");
    })));
    container.replaceChildren(el("table", {}, el("thead", {}, el("tr", {}, ...heads)), el("tbody", {}, ...rows), el("tbody", { class: "baselines" }, ...known)));
    container.scrollLeft = scrolled;
    refresh();
  }

  const more = data.figures.length - shownFigures().filter((f) => f.key in helpOf).length;
  const box = el("input", { type: "checkbox", onchange: () => { all = box.checked; by = null; paint(); } });
  find("#runs .bar").append(...(more > 0 ? [el("label", {}, box, `all ${data.figures.length} figures`)] : []), ...(key() ? [key()] : []));
  paint();
  const under = find("#runs .under");
  if (data.parameters.length > most) under.append(el("p", { class: "note" }, `The ${most} keys that mattered most of ${data.parameters.length} that differ; compare.json has all.`));
  const failed = runs.filter((r) => r.error);
  if (failed.length) under.append(el("ul", { class: "errors" }, ...failed.map((r) => el("li", {}, el("b", {}, `${r.name}: `), r.error))));
  const same = Object.entries(data.same);
  const words = same.length === 1 ? "1 key" : `${same.length} keys`;
  under.append(el("details", {}, el("summary", {}, `All the same: ${words}`), el("dl", { class: "same" },
    ...same.sort((a, b) => a[0].localeCompare(b[0])).map(([k, v]) => el("div", {}, el("dt", {}, k), el("dd", {}, typeof v === "string" ? v : JSON.stringify(v)))))));
}
