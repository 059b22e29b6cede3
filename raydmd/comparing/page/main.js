// The page from top to bottom.
find("h1").textContent = data.title;
const best = data.by ? runs.find((r) => finished(r) && r.cost !== null) : null;
if (best) {
  const lede = find("#lede");
  const mean = meanOf(best, data.by.key);
  lede.append("Best by ", el("strong", {}, titled(data.by)), ": ", el("strong", {}, mean ? `the setting of ${best.name}` : best.name), ` with ${mean || number(best.figures[data.by.key])}`);
  const told = data.parameters.filter((p) => p.key in best.shown).slice(0, 4).map((p) => `${p.label} ${shortly(best.shown[p.key], 40)}`);
  lede.append(told.length ? ` (${told.join(", ")}).` : ".");
}
const states = Object.entries(data.states).map(([state, n]) => `${n} ${state}`).join(", ");
find("#summary").textContent = `${runs.length} run${runs.length > 1 ? "s" : ""}: ${states}. ${data.parameters.length} recipe key${data.parameters.length === 1 ? "" : "s"} differ${data.parameters.length === 1 ? "s" : ""}. Point at a run to see it everywhere, click to keep it.`;
find("#notes").append(...data.notes.map((n) => el("p", {}, n)));
find("nav").append(...[...document.querySelectorAll("section")].map((s) => el("a", { href: `#${s.id}` }, s.querySelector("h2").textContent)));
drawTable();
drawFront();
drawCurves();
drawParallel();
drawImportance();
drawSamples();
find("footer").textContent = `raydmd ${data.facts.raydmd} · made ${data.facts.made} · read ${data.facts.read}`;
document.documentElement.dataset.ready = "yes";
