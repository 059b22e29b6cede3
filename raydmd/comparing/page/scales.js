// Axes: from values to pixels, with ticks that people read easily.
function scale(values, from, to, { log = false, pad = 0.05 } = {}) {
  let low = Math.min(...values), high = Math.max(...values);
  if (low === high) { const by = Math.abs(low) * 0.1 || 1; low -= log ? low * 0.5 : by; high += by; }
  const f = log ? Math.log10 : (v) => v;
  let a = f(low), b = f(high);
  const extra = (b - a) * pad;
  // A figure that is never negative has no axis below zero.
  a = !log && low >= 0 && a - extra < 0 ? Math.max(0, a - extra) : a - extra;
  b += extra;
  const place = (v) => from + ((f(v) - a) / (b - a)) * (to - from);
  place.back = (pixel) => { const v = a + ((pixel - from) / (to - from)) * (b - a); return log ? 10 ** v : v; };
  place.ticks = (count) => (log ? logTicks(a, b, count) : plainTicks(a, b, count));
  return place;
}

function plainTicks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

function logTicks(low, high, count) {
  const wide = high - low;
  const every = Math.max(1, Math.ceil(wide / Math.max(1, count)));
  const parts = wide < 1 ? [1, 2, 3, 5, 7] : wide < 2.2 ? [1, 2, 5] : [1];
  const found = [];
  for (let e = Math.floor(low); e <= high; e += parts.length > 1 ? 1 : every) {
    for (const part of parts) { const v = part * 10 ** e; if (Math.log10(v) >= low - 1e-9 && Math.log10(v) <= high + 1e-9) found.push(Number(v.toPrecision(6))); }
  }
  return found.length > 1 ? found : plainTicks(10 ** low, 10 ** high, count);
}

const spansDecades = (values) => Math.min(...values) > 0 && Math.max(...values) / Math.min(...values) > 100;

// A frame with both axes; returns the scales. Labels say which way is better.
function frame(svg, width, height, xs, ys, { left = 62, right = 18, top = 30, bottom = 44, logX = false, logY = false, padX = 0.05, xName, yName }) {
  const x = scale(xs, left, width - right, { log: logX, pad: padX });
  const y = scale(ys, height - bottom, top, { log: logY });
  for (const tick of y.ticks(Math.max(2, (height - top - bottom) / 55))) {
    svg.append(draw("line", { class: "grid", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }),
      draw("text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, number(tick)));
  }
  for (const tick of x.ticks(Math.max(2, (width - left - right) / 95))) {
    svg.append(draw("line", { class: "grid", x1: x(tick), x2: x(tick), y1: top, y2: height - bottom }),
      draw("text", { x: x(tick), y: height - bottom + 18, "text-anchor": "middle" }, number(tick)));
  }
  svg.append(draw("path", { class: "axis", fill: "none", d: `M${left} ${top}V${height - bottom}H${width - right}` }),
    draw("text", { class: "strong", x: left - 50, y: 14 }, yName),
    draw("text", { class: "strong", x: width - right, y: height - 6, "text-anchor": "end" }, xName));
  return { x, y, left, right: width - right, top, bottom: height - bottom };
}

// Drawn anew whenever its width changes.
function responsive(container, paint) {
  let width = 0;
  const again = () => {
    const now = Math.floor(container.clientWidth - 24);
    if (now === width || now <= 0) return;
    width = now;
    redraw();
  };
  const redraw = () => { forget(container); container.replaceChildren(); paint(Math.max(280, width)); refresh(); };
  new ResizeObserver(again).observe(container);
  again();
  return redraw;
}

// Names beside points or ends of lines, none upon another.
function apart(wanted, gap, low, high) {
  const sorted = wanted.map((y, i) => [y, i]).sort((a, b) => a[0] - b[0]);
  let last = -Infinity;
  for (const item of sorted) { item[0] = Math.max(item[0], last + gap); last = item[0]; }
  let next = high + gap;
  for (const item of [...sorted].reverse()) { item[0] = Math.min(item[0], next - gap); next = item[0]; }
  const found = [];
  for (const [y, i] of sorted) found[i] = Math.max(y, low);
  return found;
}

function choice(label, options, value, change) {
  const select = el("select", { onchange: () => change(select.value) }, ...options.map((o) => el("option", { value: o.value }, o.label)));
  select.value = value;
  return el("label", {}, label, select);
}
