// Charts, drawn by uPlot on a canvas. Each has a caption, a text in its place for screen readers, and its values as a table.

const charts = new Set();

function colour(name) { return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim(); }

function forgetCharts() {
  for (const chart of charts) { chart.observer.disconnect(); chart.plot.destroy(); }
  charts.clear();
}

function axis(label, format, extra = {}) {
  return {
    stroke: colour("muted"), size: 30, font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif",
    grid: { stroke: colour("line"), width: 1 }, ticks: { show: false }, gap: 6, label, labelSize: label ? 20 : 0, labelGap: 0,
    values: (_, splits) => splits.map((value) => (value === null || value === undefined ? "" : format(value))), ...extra,
  };
}

// The value under the pointer; nothing while there is no pointer.
function inLegend(plot, value, series, index) { return index === null || index === undefined ? "" : figure(value); }

function tick(value) {
  const size = Math.abs(value);
  if (size >= 1e4) return compact(value);
  if (size !== 0 && size < 1e-3) return value.toExponential(0).replace("-", MINUS);
  return String(Number(value.toPrecision(4))).replace("-", MINUS);
}

// The figure around a chart. `make(width)` gives uPlot's options and data; `rows` the table's, when it is opened.
function chartFigure({ title, note, summary, height, make, head, rows, properties = {} }) {
  const place = el("div", { class: "plot", role: "img", "aria-label": summary });
  const values = el("details", { class: "values" }, el("summary", {}, "Values as a table"));
  values.addEventListener("toggle", () => {
    if (values.open && values.children.length === 1) values.append(table(title, head, thinned(rows())));
  });
  const whole = el("figure", { class: "chart", ...properties },
    el("figcaption", {}, el("span", { class: "name" }, title), note ? el("span", { class: "note" }, note) : null), place, values);
  // Drawn once it has a width, and again when that changes.
  const observer = new ResizeObserver(() => {
    const width = place.clientWidth;
    if (!width) return;
    if (own.plot) own.plot.setSize({ width, height });
    else {
      const { options, data } = make();
      own.plot = new uPlot({ width, height, ...options }, data, place);
      charts.add(own);
    }
  });
  const own = { observer, plot: null };
  observer.observe(place);
  return whole;
}

function thinned(rows, most = 60) {
  const every = Math.ceil(rows.length / most);
  return rows.filter((_, index) => index % every === 0 || index === rows.length - 1);
}

// Lines over one x; `series`: [{label, values, colour, width, points, dash}], null where there is no value.
function lineChart({ title, note, xs, xLabel, yLabel, series, log = false, height = 220, summary, properties }) {
  return chartFigure({
    title, note, height, properties,
    summary: summary ?? `${title}: ${series.map((one) => `${one.label} from ${figure(firstOf(one.values))} to ${figure(lastOf(one.values))}`).slice(0, 8).join("; ")}`,
    head: [xLabel, ...series.map((one) => one.label)],
    rows: () => xs.map((x, index) => [count(x), ...series.map((one) => figure(one.values[index]))]),
    make: () => ({
      data: [xs, ...series.map((one) => (log ? one.values.map((value) => (value > 0 ? value : null)) : one.values))],
      options: {
        scales: { x: { time: false }, y: log ? { distr: 3 } : {} },
        cursor: { y: false, points: { size: 7 }, drag: { x: true, y: false } },
        legend: { live: true, markers: { width: 0, fill: (_, index) => series[index - 1]?.colour } },
        axes: [axis(xLabel, tick), axis(yLabel ?? "", tick, { size: 54, ...(log ? { filter: decades, grid: { stroke: colour("line"), width: 1, filter: decades } } : {}) })],
        series: [
          { label: xLabel, value: (_, value) => (value === null ? "" : count(value)) },
          ...series.map((one) => ({
            label: one.label, stroke: one.colour, width: one.width ?? 1.5, dash: one.dash, spanGaps: true,
            points: { show: one.points ?? xs.length < 2, size: 6, fill: one.colour }, value: inLegend,
          })),
        ],
      },
    }),
  });
}

function decades(_, splits) {
  const powers = splits.map((value) => (Math.abs(Math.log10(value) - Math.round(Math.log10(value))) < 1e-9 ? value : null));
  return powers.filter((value) => value !== null).length > 1 ? powers : splits;
}

function firstOf(values) { return values.find((value) => value !== null && value !== undefined); }

function lastOf(values) { return values.findLast((value) => value !== null && value !== undefined); }

// Bars between edges; `onBar(index)` on a click.
function barChart({ title, note, edges, counts, xLabel, yLabel, height = 240, summary, format = tick, onBar, marks = [], range, head, rows, bars }) {
  const centres = counts.map((_, index) => (edges[index] + edges[index + 1]) / 2);
  const step = edges[1] - edges[0];
  return chartFigure({
    title, note, height, summary, head: head ?? [xLabel, yLabel],
    rows: rows ?? (() => counts.map((value, index) => [`${format(edges[index])} to ${format(edges[index + 1])}`, count(value)])),
    make: () => ({
      data: [centres, counts, ...marks.map((mark) => mark.values)],
      options: {
        scales: { x: { time: false, range: [edges[0], edges.at(-1)] }, y: { range: range ?? ((_, low, high) => [0, high * 1.08 || 1]) } },
        cursor: { y: false, drag: { x: false, y: false }, points: { show: false } },
        legend: { markers: { width: 0, fill: (_, index) => [bars ?? colour("series-1"), ...marks.map((mark) => mark.colour)][index - 1] } },
        axes: [axis(xLabel, format), axis(yLabel, tick, { size: 54 })],
        series: [
          { label: xLabel, value: (_, value) => (value === null ? "" : `${format(value - step / 2)} to ${format(value + step / 2)}`) },
          {
            label: yLabel, fill: bars ?? colour("series-1"), stroke: bars ?? colour("series-1"), width: 0, points: { show: false },
            paths: uPlot.paths.bars({ size: [0.94, 60], radius: 0.06 }), value: inLegend,
          },
          ...marks.map((mark) => ({
            label: mark.label, stroke: mark.colour, width: 2, dash: mark.dash, spanGaps: true,
            points: { show: mark.points, size: 8, fill: mark.colour }, value: inLegend,
          })),
        ],
        hooks: onBar ? { ready: [(plot) => {
          plot.over.addEventListener("click", () => { if (plot.cursor.idx !== null) onBar(plot.cursor.idx); });
          plot.over.classList.add("clickable");
        }] } : {},
      },
    }),
  });
}

// Points [{x, y, key}] around the diagonal; `onPoint(key)` on a click, the nearest within 24 pixels.
function scatterChart({ title, note, points, xLabel, yLabel, height = 380, summary, chosen, onPoint }) {
  const sorted = [...points].sort((a, b) => a.x - b.x);
  const low = Math.min(...sorted.map((p) => Math.min(p.x, p.y))), high = Math.max(...sorted.map((p) => Math.max(p.x, p.y)));
  const pad = (high - low || 1) * 0.04;
  const range = [low - pad, high + pad];
  const nearest = (plot) => {
    let best = null, least = 24 ** 2;
    sorted.forEach((point) => {
      const dx = plot.valToPos(point.x, "x") - plot.cursor.left, dy = plot.valToPos(point.y, "y") - plot.cursor.top;
      if (dx * dx + dy * dy < least) { least = dx * dx + dy * dy; best = point; }
    });
    return best;
  };
  const draw = (plot) => {
    const context = plot.ctx, ratio = devicePixelRatio;
    context.save();
    context.strokeStyle = colour("muted"); context.setLineDash([4 * ratio, 4 * ratio]); context.lineWidth = ratio;
    context.beginPath();
    context.moveTo(plot.valToPos(range[0], "x", true), plot.valToPos(range[0], "y", true));
    context.lineTo(plot.valToPos(range[1], "x", true), plot.valToPos(range[1], "y", true));
    context.stroke(); context.setLineDash([]);
    const mark = (point, radius, fill, stroke) => {
      context.beginPath();
      context.arc(plot.valToPos(point.x, "x", true), plot.valToPos(point.y, "y", true), radius * ratio, 0, 2 * Math.PI);
      context.fillStyle = fill; context.fill();
      if (stroke) { context.strokeStyle = stroke; context.lineWidth = 2 * ratio; context.stroke(); }
    };
    context.globalAlpha = sorted.length > 300 ? 0.55 : 0.8;
    // A point below the diagonal, where the second gives less, is also drawn hollow: not by colour alone.
    sorted.forEach((point) => (point.y >= point.x ? mark(point, 3.2, colour("series-1")) : mark(point, 2.6, colour("surface"), colour("series-2"))));
    context.globalAlpha = 1;
    const own = sorted.find((point) => point.key === chosen());
    if (own) mark(own, 5.5, colour("accent-strong"), colour("ink"));
    context.restore();
  };
  return chartFigure({
    title, note, summary, height, head: ["Example", xLabel, yLabel],
    rows: () => sorted.map((point) => [point.name, number(point.x), number(point.y)]),
    make: () => ({
      data: [sorted.map((p) => p.x), sorted.map((p) => p.y)],
      options: {
        scales: { x: { time: false, range }, y: { range } }, legend: { show: false },
        cursor: { drag: { x: false, y: false }, points: { show: false } },
        axes: [axis(xLabel, tick), axis(yLabel, tick, { size: 58 })],
        series: [{}, { paths: () => null, points: { show: false } }],
        hooks: {
          draw: [draw],
          ready: [(plot) => {
            plot.over.classList.add("clickable");
            plot.over.addEventListener("mousemove", () => { const p = nearest(plot); plot.over.title = p ? p.name : ""; });
            plot.over.addEventListener("click", () => { const p = nearest(plot); if (p) { onPoint(p.key); plot.redraw(); } });
          }],
        },
      },
    }),
  });
}
