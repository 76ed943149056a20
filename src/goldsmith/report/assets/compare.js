// Two sides on the same gold: the paired difference, its histogram, a scatter; and calibration of every side.

function drawCompare(root, report, state, redraw) {
  const { a, b } = state;
  const [first, second] = [report.sides[a].name, report.sides[b].name];
  if (report.sides.length > 2) root.append(el("div", { class: "controls" }, sideSelects(report, state, redraw)));
  const pair = report.pair(a, b);
  if (a === b || !pair || !pair.num_examples) {
    root.append(el("p", { class: "notice" }, a === b ? "A and B are the same." : "A and B have no example in common."));
    return;
  }
  root.append(el("dl", { class: "figures" },
    keyFigure(`Mean change of log P, nats an example`, signed(pair.mean.estimate),
      pair.mean.low === null ? "one row only: no interval" : `95 % interval ${signed(pair.mean.low)} to ${signed(pair.mean.high)}`),
    keyFigure(`Higher under \u201C${second}\u201D`, count(pair.higher), `of ${count(pair.num_examples)} examples`),
    keyFigure(`Lower under \u201C${second}\u201D`, count(pair.lower), pair.num_examples - pair.higher - pair.lower ? `${count(pair.num_examples - pair.higher - pair.lower)} the same` : `of ${count(pair.num_examples)} examples`)));
  const cutOtherwise = report.ids.some((_, example) => report.numTokens(a, example) && report.numTokens(b, example) && !report.sameTokens(a, b, example));
  if (cutOtherwise) root.append(el("p", { class: "notice" }, "The two cut the gold into different tokens: compare nats an example and bits a byte, not nats a token."));
  root.append(table("In sum, with 95 % intervals over rows", ["", "Examples", "nll an example, nats", "nll a token, nats", "Bits a byte"],
    [a, b].map((side) => { const { name, totals } = report.sides[side]; return [name, count(totals.num_examples), interval(totals.nll_per_example, 2), interval(totals.nll_per_token), interval(totals.bits_per_byte)]; }), { class: "numbers" }));

  const known = report.ids.map((_, example) => example).filter((example) => report.change(a, b, example) !== null);
  const changes = known.map((example) => report.change(a, b, example));
  const { edges, counts } = histogram(changes, 30);
  const detail = el("div", { class: "detail", id: "point", "aria-live": "polite" });
  const show = (example) => {
    state.point = example;
    detail.replaceChildren(example === null ? el("p", { class: "missing" }, "Choose a point to see its example.") : exampleCard(report, { ...state, view: "both" }, example));
  };
  root.append(el("div", { class: "charts" },
    barChart({
      title: "Change of log P", note: `\u201C${second}\u201D minus \u201C${first}\u201D, nats an example; a click shows the examples of a bar`, edges, counts, xLabel: "change, nats", yLabel: "examples", height: 380,
      summary: `Histogram of the change of log P over ${count(known.length)} examples, from ${signed(Math.min(...changes))} to ${signed(Math.max(...changes))} nats`,
      onBar: (index) => { state.only = null; state.range = [edges[index], index === counts.length - 1 ? Infinity : edges[index + 1]]; state.page = 0; location.hash = "gold"; },
    }),
    scatterChart({
      title: "log P of each example", note: "above the line the second gives more; a click shows the example", xLabel: first, yLabel: second,
      points: known.map((example) => ({ x: report.sides[a].log_prob[example], y: report.sides[b].log_prob[example], key: example, name: oneLine(report.ids[example]) })),
      summary: `Scatter of log P under ${first} and ${second}; ${count(pair.higher)} examples lie above the diagonal, ${count(pair.lower)} below`,
      chosen: () => state.point, onPoint: show,
    })), detail);
  detail.addEventListener("keydown", (event) => tokenKeys(event, detail));
  show(state.point !== null && state.point < report.ids.length ? state.point : null);
  drawDiffering(root, report, state);
}

// Bins of a round width that hold all values; an edge lies at 0 where values have both signs.
function histogram(values, most) {
  const low = Math.min(...values), high = Math.max(...values);
  const rough = (high - low) / most || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const width = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const first = Math.floor(low / width);
  const bins = Math.max(1, Math.floor(high / width) - first + 1);
  const counts = new Array(bins).fill(0);
  values.forEach((value) => counts[Math.min(bins - 1, Math.max(0, Math.floor(value / width) - first))]++);
  return { edges: Array.from({ length: bins + 1 }, (_, index) => (first + index) * width), counts };
}

const TENTHS = Array.from({ length: 11 }, (_, index) => index / 10);

function drawCalibration(root, report) {
  root.append(el("p", { class: "prose" }, "At each gold position the model has a likeliest token, and a confidence in it: its probability. If the model is calibrated, the likeliest token is the gold one in as large a share of places as its confidence says. The expected calibration error is the mean distance between the two, over ten bins weighted by their tokens."));
  for (const side of report.sides) root.append(sideCalibration(side));
}

function sideCalibration(side) {
  const own = side.calibration;
  const tokens = own.gold_histogram.reduce((total, value) => total + value, 0);
  const section = el("div", { class: "run" }, el("h2", {}, side.name));
  if (!tokens) { section.append(el("p", { class: "notice" }, "No tokens in this score file; goldsmith score --tokens writes them.")); return section; }
  if (!own.num_tokens) section.append(el("p", { class: "notice" }, "The reliability diagram needs the probability of the best token and the rank of the gold one, which this score file lacks; goldsmith score --tokens writes them."));
  else {
    section.append(el("dl", { class: "figures" },
      keyFigure("Expected calibration error", percent(own.expected_calibration_error), `over ${count(own.num_tokens)} gold tokens`),
      keyFigure("Likeliest token is the gold", percent(own.accuracy), "accuracy"),
      keyFigure("Mean confidence", percent(own.confidence), own.confidence > own.accuracy ? "above accuracy: overconfident" : "not above accuracy"),
      own.entropy === null ? null : keyFigure("nll and entropy, nats", [number(own.entropy_nll, 3), el("span", { class: "to" }, "/"), number(own.entropy, 3)], "equal on average, if the gold were drawn from the model")));
  }
  const diagrams = el("div", { class: "charts" });
  if (own.num_tokens) {
    diagrams.append(barChart({
      title: "Reliability", note: "bars: share of places where the likeliest token is the gold; dashed: what its confidence says", edges: TENTHS, counts: own.accuracies, xLabel: "confidence", yLabel: "accuracy", height: 300, range: [0, 1],
      marks: [{ label: "mean confidence", values: own.confidences, colour: colour("series-2"), points: true, dash: [6, 4] }],
      summary: `Reliability diagram of ${side.name}: expected calibration error ${percent(own.expected_calibration_error)}`,
      head: ["Confidence", "Tokens", "Mean confidence", "Accuracy"],
      rows: () => own.counts.map((value, index) => [`${TENTHS[index]} to ${TENTHS[index + 1]}`, count(value), percent(own.confidences[index]), percent(own.accuracies[index])]),
    }));
  }
  diagrams.append(barChart({
    title: "Probability of the gold token", note: "how many gold tokens have which probability; not a measure of calibration", edges: TENTHS, counts: own.gold_histogram, xLabel: "probability", yLabel: "gold tokens", height: 300, bars: colour("series-1"),
    summary: `Histogram of the probability of ${count(tokens)} gold tokens under ${side.name}; ${percent(own.gold_histogram[0] / tokens)} are under 0.1, ${percent(own.gold_histogram[9] / tokens)} at least 0.9`,
  }));
  section.append(diagrams);
  return section;
}
