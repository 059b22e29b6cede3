// Elements, numbers, colours, and which runs are pointed at.
const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs;
const find = (selector) => document.querySelector(selector);

// All text goes in as text: names and prompts are other people's words.
function el(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function draw(name, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function number(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e6) return value.toExponential(3).replace(/\.?0+e/, "e").replace("e+", "e");
  return String(Number(value.toPrecision(4)));
}

const ARROW = { min: " ↓", max: " ↑", teacher: " ≈" };
const titled = (figure) => figure.key + (ARROW[figure.goal] || "");
const goalOf = Object.fromEntries([...data.figures, ...data.objectives, ...(data.by ? [data.by] : [])].map((f) => [f.key, f.goal]));
const helpOf = Object.fromEntries(data.figures.map((f) => [f.key, f.help]));
// The end of a name tells it from its neighbours.
const shortName = (name, most) => (name.length > most ? `…${name.slice(name.length - Math.max(1, most - 1))}` : name);
const shortly = (text, most) => (text.length > most ? text.slice(0, Math.max(1, most - 1)) + "…" : text);
const finished = (run) => run.state === "finished";

// Blue to orange: apart for every kind of eyes, and visible on light and dark paper. Runs that have not finished are
// grey: their figures are of fewer cycles, and no match for the others'.
const RAMP = [[37, 99, 214], [66, 148, 190], [140, 168, 116], [212, 154, 40], [214, 92, 20]];
const GREY = "#8d8f96";
const places = (() => {
  if (!data.by) return runs.map((_, i) => i);
  const some = runs.some((r) => finished(r) && r.cost !== null);
  const worth = (i) => (runs[i].cost === null || (some && !finished(runs[i])) ? Infinity : runs[i].cost);
  const sorted = runs.map((_, i) => i).sort((a, b) => worth(a) - worth(b) || a - b);
  const found = [];
  sorted.forEach((run, place) => { found[run] = worth(run) === Infinity ? null : place; });
  return found;
})();
const ranked = places.filter((place) => place !== null).length;

// What a figure of a run costs: the smaller the better.
function costOf(run, key) {
  const own = run.figures[key];
  const value = run.repeats && run.repeats.means[key] !== undefined ? run.repeats.means[key] : own;
  if (own === undefined) return Infinity;
  if (goalOf[key] === "teacher") return run.teacher[key] === undefined ? Infinity : Math.abs(value - run.teacher[key]);
  return goalOf[key] === "max" ? -value : value;
}

function mix(share) {
  const at = Math.min(Math.max(share, 0), 1) * (RAMP.length - 1);
  const low = Math.min(Math.floor(at), RAMP.length - 2);
  return `rgb(${RAMP[low].map((c, i) => Math.round(c + (at - low) * (RAMP[low + 1][i] - c))).join(" ")})`;
}

function colour(run) {
  if (places[run] === null) return GREY;
  return mix(ranked > 1 ? places[run] / (ranked - 1) : 0);
}

function key() {
  if (!data.by || ranked < 2) return null;
  const bar = el("i");
  bar.style.background = `linear-gradient(90deg, ${RAMP.map((c) => `rgb(${c.join(" ")})`).join(", ")})`;
  const grey = places.includes(null) ? [el("i", { class: "grey" }), "not finished"] : [];
  return el("span", { class: "key" }, "best", bar, `worst by ${titled(data.by)}`, ...grey);
}

// What is pointed at, pinned by a click, or kept by a range on an axis; every drawing follows.
const marked = new Map();
const pinned = new Set();
let pointed = null;
let kept = null;

function follow(run, element) {
  if (!marked.has(run)) marked.set(run, new Set());
  marked.get(run).add(element);
  element.dataset.run = run;
  element.addEventListener("pointerenter", (event) => { pointed = run; refresh(); showTip(event, run); });
  element.addEventListener("pointermove", (event) => showTip(event, run));
  element.addEventListener("pointerleave", () => { pointed = null; refresh(); hideTip(); });
  element.addEventListener("click", (event) => {
    if (event.target.closest("a")) return;
    if (!pinned.delete(run)) pinned.add(run);
    refresh();
  });
  return element;
}

function forget(container) {
  for (const elements of marked.values()) for (const element of elements) if (container.contains(element)) elements.delete(element);
}

function refresh() {
  const hot = new Set(pinned);
  if (pointed !== null) hot.add(pointed);
  for (const [run, elements] of marked) {
    const faint = hot.size ? !hot.has(run) : kept !== null && !kept.has(run);
    for (const element of elements) {
      element.classList.toggle("hot", hot.has(run));
      element.classList.toggle("dim", faint);
    }
  }
}

const tip = find("#tip");
function showTip(event, run) {
  const told = runs[run];
  const lines = [el("b", {}, told.name)];
  const state = told.state + (told.measured ? `, figures after ${told.measured} cycles` : "");
  lines.push(el("div", {}, el("span", {}, state)));
  if (event.currentTarget.dataset.said) lines.push(el("div", {}, event.currentTarget.dataset.said));
  for (const figure of shownFigures()) {
    if (told.figures[figure.key] !== undefined) lines.push(line(titled(figure), number(told.figures[figure.key])));
    if (meanOf(told, figure.key)) lines.push(line(`mean ${figure.key}`, meanOf(told, figure.key)));
  }
  for (const parameter of data.parameters.slice(0, 8)) {
    if (parameter.key in told.shown) lines.push(line(parameter.label, shortly(told.shown[parameter.key], 60)));
  }
  if (data.parameters.length > 8) lines.push(el("div", {}, el("span", {}, `and ${data.parameters.length - 8} more that differ`)));
  tip.replaceChildren(...lines);
  tip.style.display = "block";
  const box = tip.getBoundingClientRect();
  const left = event.clientX + 16 + box.width > innerWidth ? event.clientX - box.width - 14 : event.clientX + 16;
  tip.style.left = `${Math.max(6, left)}px`;
  tip.style.top = `${Math.max(6, Math.min(event.clientY + 14, innerHeight - box.height - 8))}px`;
}
const line = (name, value) => el("div", {}, el("span", {}, `${name} `), value);
function hideTip() { tip.style.display = "none"; }

// Of a setting that was run with several seeds.
function meanOf(run, key) {
  const again = run.repeats;
  return again && again.means[key] !== undefined ? `${number(again.means[key])} ± ${Number(again.spread[key].toPrecision(2))} (${again.runs} seeds)` : "";
}

// The figures that were chosen to compare by.
function shownFigures() {
  const found = new Map();
  for (const figure of [...(data.by ? [data.by] : []), ...data.objectives]) if (!found.has(figure.key)) found.set(figure.key, figure);
  return [...found.values()];
}
