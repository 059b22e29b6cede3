// What mattered, and the samples.
function drawImportance() {
  const found = data.importance;
  const note = find("#importance .note");
  const container = find("#importance .chart");
  const rows = Object.entries(found.shares).slice(0, 20);
  if (!rows.length) {
    container.remove();
    note.textContent = `${found.why[0].toUpperCase()}${found.why.slice(1)}.`;
    return;
  }
  responsive(container, (width) => {
    const longest = Math.max(...rows.map(([k]) => k.length));
    const left = Math.min(width * 0.45, 16 + longest * 6.8), step = 26;
    const most = rows[0][1] || 1;
    const svg = draw("svg", { width, height: rows.length * step + 6, role: "img", "aria-label": "importance of parameters" });
    rows.forEach(([name, share], n) => {
      const y = n * step + 6, long = Math.max(1, (share / most) * (width - left - 64));
      svg.append(draw("text", { x: left - 10, y: y + 13, "text-anchor": "end" }, shortly(name, Math.floor(left / 6.8)), draw("title", {}, name)),
        draw("rect", { class: "fill", x: left, y: y + 2, width: long, height: 14, rx: 3 }),
        draw("text", { class: "strong", x: left + long + 8, y: y + 13 }, `${Math.round(share * 100)}%`));
    });
    container.append(svg);
  });
  if (found.cycle) find("#importance h2").textContent = `Importance after ${found.cycle} cycles`;
  const after = found.cycle ? ` on the ${found.runs} runs that have a figure after ${found.cycle} cycles: only ${found.finished} have finished, of ${found.enough} needed` : ` on ${found.runs} finished runs`;
  note.textContent = `Which keys the better runs by ${titled(data.by)} have in common: Optuna's ${found.evaluator}${after}. ` +
    `${found.runs < 30 ? "With so few runs the order may change with the next ones. " : ""}Keys that were changed together share what one of them may have caused.`;
}

function drawSamples() {
  const container = find("#samples .groups");
  if (data.sample_notes.length) find("#samples").append(el("p", { class: "note" }, data.sample_notes.map((n) => `${n[0].toUpperCase()}${n.slice(1)}.`).join(" ")));
  if (!data.samples.length) { container.append(el("p", { class: "note" }, "No run here has left samples that could be read.")); return; }
  if (data.samples.length > 1) {
    container.append(el("p", { class: "note" }, "These runs' samples are of different prompts, seeds or models, and can't be compared across: each table by itself can."));
  }
  for (const group of data.samples) {
    const told = [group.model ? `${group.model}` : "", group.seed === null || group.seed === undefined ? "" : `evaluation seed ${group.seed}`, `${group.students.length} run${group.students.length > 1 ? "s" : ""}`];
    container.append(el("h3", {}, `The same prompts and seeds (${told.filter(Boolean).join(", ")})`));
    const heads = [el("th", {}, "run"), ...group.prompts.map((p) => el("th", { title: p }, shortly(p, 90) || "(no prompt)"))];
    const rows = [];
    group.teachers.forEach((teacher, n) => rows.push(el("tr", { class: "teacher" },
      el("td", {}, el("b", {}, teacher.title), group.teachers.length > 1 ? el("span", {}, `as asked by some of the runs (${n + 1} of ${group.teachers.length})`) : null), ...teacher.shots.map(shot))));
    for (const student of group.students) {
      const run = runs[student.run];
      const figures = shownFigures().filter((f) => run.figures[f.key] !== undefined).map((f) => `${titled(f)} ${number(run.figures[f.key])}`);
      rows.push(follow(student.run, el("tr", {}, el("td", {}, el("b", {}, run.name), el("span", {}, figures.join(", "))), ...student.shots.map(shot))));
    }
    container.append(el("div", { class: "sheet" }, el("table", {}, el("thead", {}, el("tr", {}, ...heads)), el("tbody", {}, ...rows))));
  }

  function shot(made) {
    const size = { width: made.width, height: made.height, loading: "lazy" };
    if (!made.moving) return el("td", {}, el("img", { src: made.still, ...size, alt: "sample" }));
    return el("td", {}, el("img", { class: "moving", src: made.moving, ...size, alt: "the clip, moving" }), el("img", { class: "still", src: made.still, height: made.height, alt: "frames of the clip" }));
  }
}
